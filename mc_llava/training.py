"""
Fine-tuning on LLaVA's data: one recipe file, TRL's `SFTTrainer`, peft and accelerate.

A `Recipe` says what is trained on what; `read_rows` alone knows LLaVA's JSON and what makes a row unfit; `Collator`
alone turns rows into batches, with the loss on what the assistant says. LLaVA's two stages are two recipes:

    stage 1, captions       LLaVA-Pretrain         train: [coordinates, projector]
    stage 2, conversations  LLaVA-Instruct-150K    train: [coordinates, projector, language_model], or lora
"""

import codecs
import hashlib
import json
import math
import os
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
import yaml
from jinja2 import TemplateError
from PIL import Image
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, TrainerCallback
from transformers.utils.chat_template_utils import render_jinja_template

from . import Crop, MCLlavaForConditionalGeneration, MCLlavaProcessor, check_unicode, load_image
from .batch import refuse_like_image
from .folders import find_model, is_whole
from .journal import check_utf8, difference, hash_file, lock, replacing, storing, to_line, to_text, write_json
from .loading import identify, is_quantized, load_config, load_model, load_processor


IMAGE = "<image>"
ROW = ("id", "image", "conversations")
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# The parts of the model that a recipe can train, and their modules.
PARTS = {
    "tower": ("model.vision_tower",),
    "coordinates": ("model.coord_embed",),
    "projector": ("model.multi_modal_projector",),
    "language_model": ("model.language_model", "lm_head"),
}
# SigLIP's norm after its last block, which the model doesn't use: it gets no gradient, and processes that exchange
# gradients would wait for one.
UNUSED_NORM = "vision_tower.post_layernorm."
LORA_TARGETS = r".*language_model\.layers\.\d+\..*(q_proj|k_proj|v_proj|dense|fc1|fc2)"
checked = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

BROKEN_FILE = "broken.jsonl"
RUN_FILE = "made_of.json"  # what a run's checkpoints depend on
# The values of a recipe that may be changed when a run is resumed.
CHANGEABLE = (
    "images",
    "output",
    "max_broken",
    "epochs",
    "max_steps",
    "save_steps",
    "log_steps",
    "workers",
    "resume",
    "gradient_checkpointing",
)
ROWS_AT_ONCE = 10_000  # submitted to the threads
DIVERGED = (
    "training has diverged. Start again in another output with a lower learning_rate or more warmup; the checkpoints "
    "before this step are kept"
)


@checked
class Lora:
    """Adapters on the language model's linear layers: their rank, the scale alpha / r, and their dropout."""

    r: PositiveInt = 64
    alpha: PositiveInt = 128
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05


@checked
class Recipe:
    """
    What `mc-llava train` does. Paths are relative to the working directory.

    Args:
        model: folder or Hub id to start from.
        data: a file of rows in LLaVA's format, JSON or JSON lines.
        images: folder that the rows' `image` is relative to.
        output: folder for the model, checkpoints, TensorBoard's logs and the list of broken rows.
        train: which of `PARTS` learn; the others are unchanged.
        lora: adapters for the language model, which then must not be in `train`.
        quantize: store the language model's weights, which adapters then must train, in 4 bits while training.
        max_crops, num_tokens: bounds [low, high] from which both knobs are drawn for each row, so that one checkpoint
            serves every budget.
        max_broken: how many broken rows are skipped before training is refused.
        epochs, max_steps: how long; `max_steps` wins if it is above 0.
        batch_size: rows per device and step, `accumulation` of which make an update.
        warmup: of the learning rate, as a share of all steps below 1, or a number of steps.
        dtype: of the weights that don't learn and of the saved model. What learns is in float32.
        bf16: compute in bfloat16.
        resume: continue from the last checkpoint in `output`, if there is one.

    Raises:
        ValueError: if a value is invalid.
    """

    model: str
    data: str
    images: str
    output: str
    train: tuple[str, ...] = ("coordinates", "projector")
    lora: Lora | None = None
    quantize: Literal["nf4"] | None = None
    max_crops: tuple[NonNegativeInt, NonNegativeInt] = (0, 100)
    num_tokens: tuple[PositiveInt, PositiveInt] = (128, 728)
    max_broken: NonNegativeInt = 0
    epochs: PositiveFloat = 1.0
    max_steps: NonNegativeInt = 0
    batch_size: PositiveInt = 8
    accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    warmup: NonNegativeFloat = 0.03
    weight_decay: NonNegativeFloat = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    bf16: bool = True
    gradient_checkpointing: bool = False
    save_steps: PositiveInt = 500
    log_steps: PositiveInt = 10
    workers: NonNegativeInt = 2
    seed: NonNegativeInt = 0
    resume: bool = False

    def __post_init__(self):
        for name in ("max_crops", "num_tokens"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be two bounds, the lower one first, got [{low}, {high}]")
        if unknown := sorted(set(self.train) - set(PARTS)):
            raise ValueError(f"train names unknown parts {unknown}: choose from {list(PARTS)}")
        if self.lora is None and not self.train:
            raise ValueError(f"nothing learns: name parts in train (of {list(PARTS)}), or set lora")
        if self.lora is not None and "language_model" in self.train:
            raise ValueError("lora trains the language model: remove language_model from train, or remove lora")
        if self.quantize is not None and self.lora is None:
            raise ValueError(f"weights in {self.quantize} can't learn: set lora, or remove quantize")


def read_recipe(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> dict:
    """
    The names and values of a YAML file.

    Args:
        overrides: "name=value" each, the value in YAML, which replaces the file's; "part.name=value" inside a part.

    Raises:
        ValueError: if the file can't be read or an override is malformed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} must be a mapping of names to values, got {type(values).__name__}")
    for override in overrides:
        name, equals, value = override.partition("=")
        *parts, name = name.strip().split(".")
        inner = values
        for part in parts:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if not equals or not isinstance(inner, dict):
            raise ValueError(f"an override must read name=value, or part.name=value inside a mapping: {override!r}")
        try:
            inner[name] = yaml.safe_load(value)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"the value of the override {override!r:.200} is not YAML: {error}") from error
    return values


def build_recipe(kind: type, values: dict):
    """An object of a recipe's class. Raises ValueError that names each unknown, missing and impossible value."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() + name_known(kind, e) for e in error.errors()]
        raise ValueError(f"the recipe is invalid: {'; '.join(reasons)}") from None


def name_known(kind: type, error: dict) -> str:
    """The names to choose from, after the error that one is unknown: those of a recipe's class or of a part of it."""
    if error["type"] != "unexpected_keyword_argument":
        return ""
    for part in error["loc"][:-1]:
        hint = get_type_hints(kind)[part]
        kind = next(filter(is_dataclass, get_args(hint)), hint)
    return f", choose from {', '.join(field.name for field in fields(kind))}"


# Rows


@dataclass
class Rows:
    """The rows of a file: good ones as {"row", "id", "image", "messages"}, and broken ones with their reasons."""

    good: list[dict] = field(default_factory=list)
    broken: list[dict] = field(default_factory=list)  # {"row": position in the file, "id", "reason"}
    report: Path | None = None  # where `check` listed the broken ones
    trial: dict[str, torch.Tensor] | None = None  # a batch that `check` made of some, see `pick_trial`


def read_rows(recipe: Recipe, processor: MCLlavaProcessor, context: int) -> Rows:
    """
    Read and check a recipe's data, a file in LLaVA's format. Every image is decoded, in all threads: a broken one is
    found now, not after a night of training.

    A row is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
    {"from": "gpt", "value": "A bus."}, ...]}`; one without `image` is text alone. Wherever a human turn has its
    `<image>`, the model reads the image first, as it was trained. What gpt says before the first human turn is left
    out, as LLaVA does.

    Args:
        context: in tokens. A row without an answer that begins within it teaches nothing, and its loss is NaN.

    Raises:
        ValueError: if the file itself can't be read.
    """
    entries, special_tokens = read_entries(recipe.data), processor.special_tokens

    def read(position_and_entry):
        position, entry = position_and_entry
        name = entry.get("id") if isinstance(entry, dict) else None
        name = str(position if name is None else name)  # what exports a table writes null for no id
        try:
            if isinstance(entry, ValueError):
                raise entry
            check_unicode(name, "the id")
            row = read_row(entry, recipe.images, special_tokens)
            check_room(row, processor, context - (0 if row["image"] is None else recipe.num_tokens[1]))
            return row | {"id": name, "row": position}
        except (ValueError, RecursionError, TemplateError) as error:  # a template may refuse a system's turn
            return {"row": position, "id": name, "reason": str(error)}

    rows = Rows()
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(entries), desc="checking rows", unit="row", disable=not is_main_process()) as progress,
    ):
        for start in range(0, len(entries), ROWS_AT_ONCE):
            for row in pool.map(read, enumerate(entries[start : start + ROWS_AT_ONCE], start)):
                (rows.broken if "reason" in row else rows.good).append(row)
                progress.update()
    return rows


def read_entries(data: str) -> list:
    """
    The values in a file of JSON or JSON lines, with or without a byte order mark, whatever they are. A line that is
    not JSON becomes the ValueError that says why.
    """
    try:
        content = Path(data).read_bytes().removeprefix(codecs.BOM_UTF8)
        check_utf8(content)
        if content.lstrip().startswith(b"["):
            return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {data} as JSON or JSON lines: {error}") from error
    return [read_line(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def read_line(number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"line {number} is not JSON: {error}")


def read_row(entry: dict, images: str | os.PathLike, special_tokens: list[str]) -> dict:
    """
    One row as {"image": path or None, "messages": [{"role", "content"}, ...]}, the image in the first user's message.

    Raises:
        ValueError: if the row is unfit, naming why.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list) or not entry["conversations"]:
        raise ValueError("the row has no conversations")
    turns, messages, placeholders = entry["conversations"], [], 0
    if isinstance(turns[0], dict) and turns[0].get("from") == "gpt":
        turns = turns[1:]
    for turn in turns:
        role, value = (ROLES.get(str(turn.get("from"))), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role is None or not isinstance(value, str):
            raise ValueError(f"a turn must have from (one of {', '.join(ROLES)}) and value, got {str(turn)[:80]}")
        if role == "user":
            placeholders += value.count(IMAGE)
            value = value.replace(IMAGE, "")
        check_unicode(value, f"a turn of {turn['from']}")
        if not value.strip():
            raise ValueError(f"a turn of {turn['from']} is empty")
        if token := next((token for token in special_tokens if token in value), None):
            raise ValueError(f"a turn of {turn['from']} holds the special token {token}")
        messages.append({"role": role, "content": value.strip()})
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(f"the turns must alternate from human to gpt and end with gpt, got {', '.join(roles)}")

    image = entry.get("image")
    if not isinstance(image, str | None):
        raise ValueError(f"image must be one path, got {str(image)[:80]}")
    if image is None:
        refuse_like_image({name: cell for name, cell in entry.items() if name not in ROW}, Path(images), "image")
    if placeholders != (0 if image is None else 1):
        raise ValueError(f"the turns have {placeholders} {IMAGE} for {0 if image is None else 1} images")
    if image is not None:
        image = str(Path(images, image))
        check_unicode(image, "the path of the image")
        load_image(Path(image))
    return {"image": image, "messages": messages}


def check_room(row: dict, processor: MCLlavaProcessor, room: int):
    """Raise a ValueError if the text before a row's first answer takes `room` tokens or more."""
    messages = row["messages"]
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    prompt = processor.apply_chat_template(messages[:first], add_generation_prompt=True)
    length = len(processor.tokenizer.backend_tokenizer.encode(prompt)) + (row["image"] is not None)  # its newline
    if length >= room:
        raise ValueError(f"the first question has {length} tokens, there is room for {room - 1}")


def is_main_process() -> bool:
    """Whether this is the main process under torchrun or accelerate launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def check(recipe: Recipe, processor: MCLlavaProcessor) -> Rows:
    """
    Read a recipe's data and list its broken rows in `output`/broken.jsonl. Each of several processes reads all.

    Raises:
        ValueError: if there are more than `max_broken` of them, or none to train on, `num_tokens` leaves no room in
            the context, the chat template doesn't mark what is learned or has no place for a picture, the tokenizer
            doesn't pad, `output` is the model's folder, or the model was saved with quantized weights or with options
            of `generate` that can't be saved.
    """
    context = check_model(recipe, processor)
    collator = Collator(processor, recipe, context)
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    if not collator.tokenize(said)[1].any():
        raise ValueError(
            f"the chat template of {recipe.model} doesn't mark what the assistant says, so nothing would be learned: "
            "put it between {% generation %} and {% endgeneration %}"
        )
    rows = read_rows(recipe, processor, context)
    rows.report = report_broken(recipe, rows)
    if not rows.good:
        reasons = f": every row is broken, see {rows.report}" if rows.broken else ""
        raise ValueError(f"{recipe.data} has no rows to train on{reasons}")
    rows.trial = collator(pick_trial(rows.good))  # refuses a template without a place for a picture
    return rows


def check_model(recipe: Recipe, processor: MCLlavaProcessor) -> int:
    """
    Check what doesn't depend on the data.

    Returns:
        The number of tokens in the model's context.

    Raises:
        ValueError: if the model can't be trained, or not with this recipe's options: see `check`.
    """
    model = Path(find_model(recipe.model))
    if model.exists() and model.resolve() == Path(recipe.output).resolve():
        raise ValueError(
            f"{recipe.output} is the model to start from, which must not be overwritten: name another output"
        )
    config = load_config(recipe.model)
    if is_quantized(config):
        raise ValueError(
            f"{recipe.model} was saved with quantized weights, into which nothing can be merged: start from the model "
            "it was made from, with quantize: nf4 to train adapters on it in 4 bits"
        )
    check_generation(recipe.model)
    context = config.text_config.max_position_embeddings
    if recipe.num_tokens[1] >= context:
        raise ValueError(
            f"num_tokens goes up to {recipe.num_tokens[1]}, the context is {context}: leave room for text"
        )
    if processor.tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {recipe.model} has no pad_token: name one in its tokenizer_config.json")
    return context


def report_broken(recipe: Recipe, rows: Rows) -> Path:
    """
    List the broken rows in `output`/broken.jsonl.

    Returns:
        The path of that file.

    Raises:
        ValueError: if there are more than `max_broken` of them.
    """
    report = Path(recipe.output, BROKEN_FILE)
    report.parent.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        with replacing(report) as file:
            file.writelines(map(to_line, rows.broken))
    if len(rows.broken) > recipe.max_broken:
        first = rows.broken[0]
        message = (
            f"{len(rows.broken)} of {len(rows.good) + len(rows.broken)} rows are broken, max_broken is "
            f"{recipe.max_broken}; the first is row {first['row']} (id {first['id']}): {first['reason']}. "
            f"See {report}; fix them or raise max_broken"
        )
        raise ValueError(to_text(message))
    return report


def check_generation(model: str):
    """Raise a ValueError if a model has options of `generate` with which transformers writes no checkpoint."""
    try:
        GenerationConfig.from_pretrained(find_model(model)).validate(strict=True)
    except OSError:  # it has none
        return
    except ValueError as error:
        raise ValueError(
            f"generation_config.json of {model} can't be saved with a checkpoint, set do_sample to true there or "
            f"remove the options that need it: {error}"
        ) from error


# Batches


class Collator:
    """
    Turns rows into a batch: int[batch, length] `input_ids`, `attention_mask` and `labels`, padded on the right, and
    the processor's image fields. Labels are -100 except for what the assistant says, including its `<|im_end|>`:

        <|im_start|>user\\n<image>...<image>\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\nA bus.<|im_end|>\\n
        -100 ......................................................................... A bus .<|im_end|>  -100

    Rows longer than the context are truncated. A batch without images gets an extra row with a blank one, without
    labels: processes exchange gradients, and each must have those of the vision tower and the projector. The knobs of
    a batch depend only on its rows and the seed, so that a resumed run draws the same ones as an uninterrupted run. A
    row thus gets other knobs in each epoch, with other neighbors; with batches of one row, the same.
    """

    def __init__(self, processor: MCLlavaProcessor, recipe: Recipe, context: int):
        self.processor, self.recipe, self.context = processor, recipe, context

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.recipe.seed} {[row['row'] for row in rows]}")
        knobs = [(rng.randint(*self.recipe.max_crops), rng.randint(*self.recipe.num_tokens)) for _ in rows]
        pictures = [None if row["image"] is None else load_image(Path(row["image"])) for row in rows]
        plans = [
            None if picture is None else self.processor.image_processor.plan(*picture.size, *bounds, zoom=0)
            for picture, bounds in zip(pictures, knobs)
        ]
        encoded = [self.encode(row["messages"], plan) for row, plan in zip(rows, plans)]
        if not any(plans):
            pictures, plans = [Image.new("RGB", (1, 1))], [[Crop((0, 0, 1, 1), 1)]]
            encoded.append(self.blank_row())
        pad_token_id = self.processor.tokenizer.pad_token_id
        batch = {
            name: nn.utils.rnn.pad_sequence([row[name] for row in encoded], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", pad_token_id), ("attention_mask", 0), ("labels", -100))
        }
        images = [picture for picture in pictures if picture is not None]
        return batch | dict(
            self.processor.image_processor(images, plans=list(filter(None, plans)), return_tensors="pt")
        )

    def blank_row(self) -> dict[str, torch.Tensor]:
        """One `<image>` without labels."""
        inputs = self.processor.tokenizer(self.processor.image_token, return_tensors="pt")
        ids = inputs["input_ids"][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}

    def encode(self, messages: list[dict], plan: list[Crop] | None) -> dict[str, torch.Tensor]:
        """The tokens of a row, with one `<image>` per visual token of its picture's plan."""
        if plan is not None:
            first = next(index for index, message in enumerate(messages) if message["role"] == "user")
            parts = [{"type": "image"}, {"type": "text", "text": messages[first]["content"]}]
            messages = [*messages[:first], {"role": "user", "content": parts}, *messages[first + 1 :]]
        ids, spoken = self.tokenize(messages)
        is_image = ids == self.processor.image_token_id
        if (written := int(is_image.sum())) != (plan is not None):
            raise ValueError(
                f"the chat template writes {written} {IMAGE} for {int(plan is not None)} images: take one that writes "
                f"{IMAGE} for each image part ({messages!r:.200})"
            )
        counts = torch.ones_like(ids).masked_fill(is_image, sum(crop.num_tokens for crop in plan or []))
        ids, spoken = (each.repeat_interleave(counts)[: self.context] for each in (ids, spoken))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(spoken, -100)}

    def tokenize(self, messages: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The ids of a conversation with a single token for its picture, int64[length], and which of them the template
        marks as the assistant's, bool[length]. transformers would search all tokens of the picture for these, in
        Python.
        """
        prompt, tokenizer = self.processor.apply_chat_template(messages), self.processor.tokenizer
        _, (spans,) = render_jinja_template(
            [messages],
            chat_template=self.processor.find_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        inputs = tokenizer(prompt, return_offsets_mapping=True, return_tensors="pt")
        starts, ends = inputs["offset_mapping"][0].T
        spoken = torch.zeros_like(starts, dtype=torch.bool)
        for start, end in spans:
            spoken |= (starts < end) & (ends > start)
        return inputs["input_ids"][0], spoken


# Training


def record_run(recipe: Recipe, rows: Rows):
    """
    Record in `output` what a run's checkpoints depend on.

    Raises:
        ValueError: if they are of a run with another model, other rows or other values of the recipe: rows would be
            repeated or left out, or nothing learned at all.
    """
    path, digest = Path(recipe.output, RUN_FILE), hashlib.sha256()
    hash_file(digest, Path(recipe.data))
    wanted = {name: value for name, value in asdict(recipe).items() if name not in CHANGEABLE}
    wanted |= {"processes": int(os.environ.get("WORLD_SIZE", 1)), "data": f"sha256:{digest.hexdigest()}"}
    if Path(model := find_model(recipe.model)).is_dir():  # a Hub id's commit also changes with its card
        wanted["model"] = identify(model)
    wanted = json.loads(json.dumps(wanted | {"broken": [row["row"] for row in rows.broken]}))  # lists, not tuples
    if last_checkpoint(path.parent) and path.exists():
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): name another output") from error
        if text := difference(found, wanted):
            raise ValueError(f"{path.parent} was begun with {text}: name another output, or resume as it was begun")
    elif is_main_process():
        write_json(path, wanted)


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint of a run, None if there is none."""
    found = (path.parent for path in output.glob("checkpoint-[0-9]*/trainer_state.json"))
    whole = list(filter(is_whole_checkpoint, found))
    return str(max(whole, key=steps_of)) if whole else None


def steps_of(checkpoint: str | Path) -> int:
    """After how many steps a run saved a checkpoint."""
    return int(Path(checkpoint).name.split("-")[1])


def is_whole_checkpoint(checkpoint: Path) -> bool:
    """
    Whether nothing was cut by a kill, a full disk or a loss of power. Trainer's state is the last file it saves, but
    the system may have stored that one and not yet all of the others.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except ValueError:
        return False
    weights, states = checkpoint.glob("*.safetensors"), checkpoint.glob("*.pt*")  # and .pth
    return all(map(is_whole, weights)) and all(map(zipfile.is_zipfile, states))


class FinishedError(Exception):
    """The checkpoint that a run resumes from is its last one."""


class StopIfFinished(TrainerCallback):
    """
    Stops a run that resumes from its last checkpoint. Trainer itself would take one step more than `max_steps`, and
    would save and log as often as the run before.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if state.global_step >= state.max_steps:
            raise FinishedError


class StopIfDiverged(TrainerCallback):
    """
    Stops training with a ValueError if the logged loss or gradient norm is not finite, or if `check_sound` fails
    before a checkpoint is written. Earlier checkpoints are kept.

    Args:
        batch: passed to `check_sound`. By default, only the weights are checked.
    """

    def __init__(self, batch: dict[str, torch.Tensor] | None = None):
        self.batch = batch

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in (logs or {}).items():
            if name in ("loss", "grad_norm") and not math.isfinite(float(value)):
                raise ValueError(f"{name} is {float(value)} at step {state.global_step}: {DIVERGED}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save:
            when = f"step {state.global_step}"
            check_learned(model, when) if self.batch is None else check_sound(model, self.batch, when)


def check_sound(model: nn.Module, batch: dict[str, torch.Tensor], when: str):
    """
    Raise a ValueError if a trainable weight, the loss of a batch or one of its logits is not finite. The loss that was
    logged last doesn't tell: it was computed before the weights were updated. All processes must call this, because
    each may hold only a share of the weights.
    """
    check_learned(model, when)
    device = next(model.parameters()).device
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    model.train()  # in evaluation mode, bitsandbytes rewrites weights on a CPU
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):  # and leave later steps' dropout unchanged
        outputs = model(**{name: values.to(device) for name, values in batch.items()}, use_cache=False)
    logits = outputs.logits[batch["attention_mask"].bool().to(device)]
    if not (outputs.loss.isfinite() and logits.isfinite().all()):
        raise ValueError(
            f"the model's loss is {outputs.loss.item()} at {when}, with {(~logits.isfinite()).sum().item()} of "
            f"{logits.numel()} logits not finite: {DIVERGED}"
        )


def check_learned(model: nn.Module, when: str):
    """`check_finite` for the trainable weights."""
    check_finite({name: weight for name, weight in model.named_parameters() if weight.requires_grad}, when)


def check_finite(weights: dict[str, torch.Tensor], when: str):
    """
    Raise a ValueError that names a weight that is not finite, or whose squares have no finite sum. Each process checks
    its share of a sharded weight.
    """
    shares = {name: getattr(weight, "to_local", lambda weight=weight: weight)() for name, weight in weights.items()}
    finite = torch.stack([share.detach().float().square().sum().isfinite().cpu() for share in shares.values()])
    if not finite.all():
        bad = [name for name, is_finite in zip(shares, finite.tolist()) if not is_finite]
        raise ValueError(
            f"{len(bad)} weights are not finite or too large at {when}, the first is {bad[0]}: {DIVERGED}"
        )


def set_trainable(model: nn.Module, parts: tuple[str, ...]):
    """Make the parameters of these `PARTS` trainable, in float32, and no others: bfloat16 would lose small updates."""
    prefixes = tuple(f"{module}." for part in parts for module in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(prefixes) and UNUSED_NORM not in name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(recipe: Recipe) -> Path:
    """
    Train as a recipe says.

    Returns:
        `recipe.output`, which then holds the model with its processor; LoRA adapters are merged into it and also kept
        in the folder `adapter` there.

    Raises:
        ValueError: if the data has too many broken rows, `num_tokens` leaves no room in the context, `output` has
            checkpoints and `resume` is not set or they are of another run, another run writes there, or training
            diverges.
        OSError: if a file can't be written. What was written before stays: see `resume`.
    """
    import datasets  # noqa: F401  what is missing is told before anything is fetched or written
    import trl  # noqa: F401

    output, processor = Path(recipe.output), load_processor(recipe.model)
    if not is_main_process():
        return _train(recipe, processor, output)
    output.mkdir(parents=True, exist_ok=True)
    with lock(output.absolute()):
        return _train(recipe, processor, output)


def _train(recipe: Recipe, processor: MCLlavaProcessor, output: Path) -> Path:
    from datasets import Dataset
    from trl import SFTTrainer

    checkpoint = last_checkpoint(output)
    if checkpoint and not recipe.resume:
        raise ValueError(
            f"{output} holds {Path(checkpoint).name}: set resume=true to continue, or name another output"
        )
    rows = check(recipe, processor)
    record_run(recipe, rows)

    model, lora = build_trainee(recipe)
    collator = Collator(processor, recipe, model.config.text_config.max_position_embeddings)
    trainer = SFTTrainer(
        model,
        training_arguments(recipe),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows.good),
        processing_class=processor,
        peft_config=lora,
        callbacks=[StopIfFinished(), StopIfDiverged(rows.trial)],
    )
    for name, parameter in trainer.model.named_parameters():  # including the copies that peft made
        parameter.requires_grad = parameter.requires_grad and UNUSED_NORM not in name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    prepare_sharding(trainer, model, recipe.quantize is not None)
    trainer.create_model_card = lambda **_: None  # TRL's would show how to ask a model "None" about text alone
    with storing(output, "free some space and set resume=true to continue"):
        with suppress(FinishedError):
            trainer.train(resume_from_checkpoint=checkpoint)
        check_sound(trainer.model, rows.trial, "the end")
        weights = trainer.accelerator.get_state_dict(trainer.model)  # all processes give theirs
        if trainer.is_world_process_zero():
            save_whole(recipe, trainer, weights, processor)
    trainer.accelerator.wait_for_everyone()
    return output


def pick_trial(rows: list[dict]) -> list[dict]:
    """A row with an image and one without, if there are both: together they use the whole model."""
    first = {row["image"] is None: row for row in reversed(rows)}
    return list(first.values())


def build_trainee(recipe: Recipe) -> tuple[MCLlavaForConditionalGeneration, Any]:
    """The model, with gradients for the parts that learn, and the configuration of LoRA adapters or None."""
    from peft import LoraConfig

    # Weights are quantized on their device and stay there.
    model = load_model(
        recipe.model, recipe.dtype, own_device() if recipe.quantize else "cpu", quantize=recipe.quantize
    )
    if "tower" not in recipe.train:
        # Gradient checkpointing makes all embeddings require gradients, also those of patches: each backward pass
        # would go through a tower in which nothing is trained.
        model.model.vision_tower.embeddings.register_forward_hook(lambda module, inputs, output: output.detach())
    if recipe.lora is None:
        set_trainable(model, recipe.train)
        return model, None
    return model, LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=[module.split(".")[-1] for part in recipe.train for module in PARTS[part]] or None,
    )


def own_device() -> str:
    """The device of this process under torchrun or accelerate launch, or by itself."""
    if not torch.accelerator.is_available():
        return "cpu"
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', 0)}"


def training_arguments(recipe: Recipe):
    """TRL's `SFTConfig` of a recipe."""
    from trl import SFTConfig

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output, "logs"))
    names = ("activation_checkpointing", "gradient_checkpointing")  # since transformers 5.24, and before
    checkpointing = next(name for name in names if name in SFTConfig.__dataclass_fields__)
    return SFTConfig(
        recipe.output,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=recipe.bf16,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,  # which would log the loss of an earlier step instead
        report_to=["tensorboard"],
        dataloader_num_workers=min(recipe.workers, os.cpu_count() or 1),  # torch warns of more, and they gain nothing
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        max_length=None,  # the collator truncates rows, never within an image
        **{checkpointing: recipe.gradient_checkpointing},
    )


def save_whole(recipe: Recipe, trainer, weights: dict[str, torch.Tensor], processor: MCLlavaProcessor):
    """
    Write a folder that `from_pretrained` loads, whatever was trained. Adapters are merged into weights that were not
    quantized.
    """
    from peft import PeftModel

    output = Path(recipe.output)
    whole = load_model(recipe.model, recipe.dtype, "cpu")
    if recipe.lora is None:
        whole.load_state_dict(weights)
    else:
        adapter = output / "adapter"
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(adapter, state_dict=weights)
        whole = PeftModel.from_pretrained(whole, adapter).merge_and_unload()
    check_finite(whole.state_dict(), "the end")
    whole.save_pretrained(output)
    processor.save_pretrained(output)


def prepare_sharding(trainer, model: MCLlavaForConditionalGeneration, quantized: bool):
    """
    If FSDP was requested, let it gather the language model layer by layer and all else once a step: the vision
    tower runs once for each 16 crops, which differ from process to process, and each would wait for the others.

    Raises:
        ValueError: if FSDP was requested and accelerate would silently do something else.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return
    if not trainer.accelerator.is_fsdp2:
        raise ValueError(
            f"FSDP was asked for, accelerate would train with {trainer.accelerator.distributed_type.value}: pass "
            "--fsdp_version 2 and more than one process, on accelerators"
        )
    if quantized:
        raise ValueError("FSDP can't shard quantized weights: remove quantize, or start with torchrun")
    plugin.transformer_cls_names_to_wrap = [type(model.model.language_model.layers[0]).__name__]
    # TRL multiplies by the head's weights without calling the head. Were they not gathered by FSDP then, TRL would
    # gather them in a way that leaves each process's share with the gradient of that process's rows alone.
    model.model.register_forward_hook(lambda *_: model.lm_head.unshard())
