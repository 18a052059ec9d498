"""
How `tiny` is made: its tokenizer and sizes, the features of its frozen tower, and its language model.

The tower comes from `tower.py`. Once it is frozen, the patches it keeps of a crop never change: they are computed
once, and the language model, the projector and the coordinate embedding train on them many times faster.
"""

import copy
import json
import os
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast, SiglipVisionConfig, TrainingArguments

from .. import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor
from ..journal import RUN_AGAIN, lock, storing, write_json
from ..training import StopIfDiverged, build_recipe, checked, last_checkpoint, set_trainable, steps_of
from ..zoom_heads import choose_heads, find_config, write_heads
from ..zoom_heads import measure as measure_heads
from .conversations import ANSWERING_LAYER, KIND_WEIGHTS, SceneCollator, scene_rows
from .encoding import (
    MOST_TOKENS,
    NUM_TOKENS,
    PATCH_SIZE,
    Budget,
    CachedImage,
    cache_scenes,
    encode_scenes,
    image_fields,
    last_tokens,
    scenes_digest,
)
from .making import make_scene
from .materials import Materials
from .photographs import make_photograph_scene, training_scene
from .questions import KINDS, KINDS_ON_PHOTOGRAPHS, ask, can_ask, caption, is_correct
from .scene import SIDE
from .tower import MuonAndAdamW, Report, Stage, pretrain_tower
from .trainee import LanguageModelTrainee, SceneTrainer
from .warm_start import copy_weights, load_start


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<pad>"]
HEAD_WIDTH = 32
VOCABULARY = 768  # at most
MAX_CROPS = 32
TURNS = 8  # at most, of one conversation
CAPTIONS = 0.05  # share of the conversations that are a caption, in batches that are not short
FIRST_TESTED = 10**6  # the first scenes of the test split are the study's
SCENES_FOR_HEADS, ZOOM_HEADS = 300, 2  # scenes that zoom's heads are measured on, and how many are kept
SETTINGS_FILE = "recipe.json"
LENGTHS = ("steps", "decay", "save_steps")  # of a stage, which may change while it is made
# What rounds may differ in.
EARLIER = ("tower.steps", "layers", "short_steps", "num_images", "averaged", "language_model")


@checked
class TinyRecipe:
    """
    How `tiny` is made. A call with the same `output` resumes an earlier one; see `record_settings`.

    Args:
        output: the folder of the model; the stages write their checkpoints next to it, in `output`-work.
        tower: the vision tower's stage, on single crops.
        language_model: the stage for everything else, on whole scenes.
        num_images: how many scenes are encoded for the language model in a round.
        short_steps: the language model's first steps, which show one token a crop, see `SceneCollator`.
        averaged: train that many language models, with seeds counted from `language_model.seed`, and keep the mean of
            their weights and of those the round began with, which usually answers better (model soups, arXiv
            2203.05482). With 0, train one and keep it as it is.
        earlier: for each round before the last one, the values that differ, such as `{"layers": 4, "tower": {"steps":
            8000}}`, of `EARLIER`. A round trains the tower up to its number of steps, encodes scenes with it (new ones
            if the tower was trained further, or more of the same), and trains the rest on them.
        num_tested: how many scenes that are never trained on are asked about during training.
        start: a checkpoint of the same sizes that is trained further, first its tower, then the rest; its language
            model may have fewer layers. None for random weights.
        photographs: folder of photographs for two thirds of the scenes, see `Materials`; None if all are drawn.
        objects: folder of cut-out objects, with photographs only.
        fonts: folder of fonts for scenes with photographs; None for the system's.
        tower_width, tower_layers, width, layers: sizes of the SigLIP and of the Phi architecture. Heads are 32 wide.
        workers: processes that draw.
    """

    output: str
    tower: Stage
    language_model: Stage
    num_images: PositiveInt
    short_steps: NonNegativeInt
    averaged: NonNegativeInt = 0
    num_tested: PositiveInt = 200
    earlier: tuple[dict, ...] = ()
    start: str | None = None
    photographs: str | None = None
    objects: str | None = None
    fonts: str | None = None
    tower_width: Annotated[PositiveInt, Field(multiple_of=HEAD_WIDTH)] = 128
    tower_layers: PositiveInt = 6
    width: Annotated[PositiveInt, Field(multiple_of=HEAD_WIDTH)] = 192
    layers: Annotated[int, Field(gt=ANSWERING_LAYER)] = 4
    workers: NonNegativeInt = 1

    def rounds(self) -> list["TinyRecipe"]:
        """
        The recipe of each round.

        Raises:
            ValueError: if a value of `earlier` is invalid or may not differ, or a round has fewer layers, a shorter
                tower's training, or fewer images of the same tower than the one before it. If a round with `averaged`
                has another tower or more layers than the one before it, or is the first.
        """
        values = TypeAdapter(TinyRecipe).dump_python(self, mode="json") | {"earlier": ()}
        rounds = [build_recipe(TinyRecipe, merge(values, changes)) for changes in (*self.earlier, {})]
        for before, after in pairwise(rounds):
            for name, first, then in (
                ("tower.steps", before.tower.steps, after.tower.steps),
                ("layers", before.layers, after.layers),
                ("num_images", before.num_images * (before.tower.steps == after.tower.steps), after.num_images),
            ):
                if first > then:
                    raise ValueError(
                        f"earlier: {name} is {first} in one round and {then} in the next one, which needs at least as "
                        "many"
                    )
        for number, (before, after) in enumerate(pairwise([None, *rounds]), 1):
            if after.averaged and (before is None or alike(before) != alike(after)):
                raise ValueError(
                    f"averaged is {after.averaged} in round {number}, but there is no mean with weights of another "
                    "tower or with fewer layers: set averaged to 0 there, or add a round with the same before it"
                )
        return rounds

    def materials(self) -> Materials | None:
        """
        Raises:
            ValueError: if there are objects without photographs.
        """
        if self.photographs is None and (self.objects or self.fonts):
            raise ValueError(
                f"objects ({self.objects}) and fonts ({self.fonts}) are for scenes on photographs: set photographs to "
                "a folder, or the others to null too"
            )
        return Materials(self.photographs, self.objects, self.fonts) if self.photographs else None


def alike(recipe: TinyRecipe) -> tuple[int, int]:
    """What two rounds must have in common for a mean of their weights."""
    return recipe.tower.steps, recipe.layers


def merge(values: dict, changes: dict) -> dict:
    """
    The values with some of `EARLIER` changed.

    Raises:
        ValueError: if others would change.
    """
    stages = {name: changes.get(name, {}) for name in ("tower", "language_model")}
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            raise ValueError(f"earlier: {name} must be settings such as {{steps: 1000}}, got {stage!r}")
    named = (set(changes) - {"tower"}) | {f"tower.{name}" for name in stages["tower"]}
    if others := named - set(EARLIER):
        raise ValueError(f"earlier: rounds may differ in {', '.join(EARLIER)}, not in {', '.join(sorted(others))}")
    return values | changes | {name: values[name] | stage for name, stage in stages.items()}


def build_processor(materials: Materials | None = None) -> MCLlavaProcessor:
    """A byte-level BPE trained on questions and answers about scenes. The signs' characters stay single tokens."""
    rng, objects = random.Random(0), tuple(materials.renderings) if materials else ()
    texts = ["user\nassistant\nsystem\n"] * 100 + [f"There is no {name}." for name in objects] * 10
    for seed in range(300):
        scene, said = training_scene(seed, materials), []
        said += caption(scene, rng)
        for kind in (kind for kind in KIND_WEIGHTS if can_ask(scene, kind)):
            question = ask(scene, kind, rng, objects)
            said += [question.text, question.answer]
        signs = {thing.text for thing in scene.things if thing.text}
        texts += [" ".join(word for word in text.split(" ") if word.strip(".,?") not in signs) for text in said]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    image_processor = MCLlavaImageProcessor(
        size={"height": SIDE, "width": SIDE},
        patch_size=PATCH_SIZE,
        max_crops=MAX_CROPS,
        num_tokens=NUM_TOKENS,
    )
    return MCLlavaProcessor(image_processor, fast)


def vision_config(width: int, layers: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        image_size=SIDE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )


def build_model(processor: MCLlavaProcessor, vision: SiglipVisionConfig, width: int, layers: int):
    """A model of `tiny`'s sizes with random weights."""
    tokenizer = processor.tokenizer
    text = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        hidden_act="gelu_pytorch_tanh",  # Phi's `gelu_new` as one operation
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = MCLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MCLlavaForConditionalGeneration(config)


@torch.no_grad()
def answer_cached(
    model, processor, images: list[CachedImage], questions: list[str], batch_size: int = 64
) -> list[str]:
    """Greedy replies of a `LanguageModelTrainee`, which takes cached features in place of pixels."""
    replies = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        prompts = [
            prompt(processor, question, int(image.num_tokens.sum()))
            for image, question in zip(batch, questions[start:])
        ]
        inputs = processor.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = {name: value.to(model.device) for name, value in (dict(inputs) | image_fields(batch)).items()}
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        replies += processor.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return replies


def prompt(processor, question: str, num_tokens: int) -> str:
    """The template's prompt of a question about one image with the given number of visual tokens."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    written = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return written.replace(processor.image_token, processor.image_token * num_tokens)


def measure_language_model(
    model, processor, images: list[CachedImage], kinds: tuple[str, ...], objects: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Percent of right replies for each kind of question, one of each about every image that has what it is about."""
    was_training = model.training
    model.eval()
    rng = random.Random(0)
    accuracies = {}
    for kind in kinds:
        asked = [image for image in images if can_ask(image.scene, kind)]
        questions = [ask(image.scene, kind, rng, objects) for image in asked]
        replies = answer_cached(model, processor, asked, [question.text for question in questions])
        right = [is_correct(question.key, reply) for question, reply in zip(questions, replies)]
        accuracies[kind] = round(100 * sum(right) / max(1, len(right)), 1)
    model.train(was_training)
    return accuracies


@torch.no_grad()
def whiten_projector(projector: torch.nn.Module, images: list[CachedImage]):
    """
    Initialize a projector so that all directions of the tower's features have the same variance. Otherwise the largest
    variances exceed the smallest a hundredfold and mask them.
    """
    features = torch.cat([last_tokens(image).features for image in images[:500]]).float()
    mean, covariance = features.mean(0), features.T.cov()
    variances, directions = torch.linalg.eigh(covariance)
    scales = (variances + 1e-3 * variances.mean()).rsqrt()
    whitening = directions * scales @ directions.T
    weight = projector.linear_1.weight.cpu()
    mixing = weight / weight.std() / len(mean) ** 0.5
    projector.linear_1.weight.copy_(mixing @ whitening)
    projector.linear_1.bias.copy_(-mixing @ whitening @ mean)


def tested_images(model, processor, number: int, materials: Materials | None) -> dict[str, list[CachedImage]]:
    """Scenes that are measured during training and not trained on: drawn ones, and photographs with other fonts."""
    seeds = range(FIRST_TESTED, FIRST_TESTED + number)
    drawn = [make_scene(seed, "test") for seed in seeds]

    def encoded(scenes, budget):
        return encode_scenes(model, processor, scenes, [budget] * number)

    found = {"crops": encoded(drawn, Budget(MAX_CROPS, NUM_TOKENS)), "whole": encoded(drawn, Budget(0, NUM_TOKENS))}
    found["most"] = encoded(drawn, Budget(100, MOST_TOKENS))
    if materials:
        scenes = [make_photograph_scene(seed, "test", materials) for seed in seeds]
        found["photographs"] = encoded(scenes, Budget(MAX_CROPS, NUM_TOKENS))
    return found


def measure_tested(
    trainee: LanguageModelTrainee, processor, tested: dict[str, list[CachedImage]], objects: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """What `measure_language_model` finds on each of the `tested_images` and on images that were trained on."""
    found = {}
    for name, images in tested.items():
        benchmark = name in ("crops", "whole", "most")
        kinds, names = (KINDS, None) if benchmark else (KINDS_ON_PHOTOGRAPHS, objects)
        found[name] = measure_language_model(trainee, processor, images, kinds, names)
    return found


def train_language_model(
    model,
    processor,
    images: list[CachedImage],
    output: Path,
    stage: Stage,
    short_steps: int,
    tested: dict[str, list[CachedImage]],
    objects: tuple[str, ...] = (),
):
    """
    Train all but the tower on cached images, or resume from the last checkpoint in `output`.

    Args:
        tested: what to measure during training, see `measure_tested`.
        objects: the names of all cut-out objects.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    torch.manual_seed(stage.seed)  # of the head, however many stages were finished before
    trainee = LanguageModelTrainee(copy.deepcopy(model.config), objects)  # Trainer sets its use_cache
    trainee.begin_with(model)
    trainee.set_attn_implementation("eager")  # which gives the weights, and whose backward pass takes less on a CPU
    for layer in trainee.model.language_model.layers:
        layer.compile()  # saves time on a CPU; needs a C++ compiler
    set_trainable(trainee, ("coordinates", "projector", "language_model"))
    trainee.reading_head.requires_grad_(True)
    measured = partial(measure_tested, processor=processor, tested=tested, objects=objects)
    trainer = SceneTrainer(
        trainee,
        TrainingArguments(**stage.options(output), train_sampling_strategy="sequential"),
        train_dataset=scene_rows(images, stage, short_steps),
        data_collator=SceneCollator(processor, images, CAPTIONS, TURNS, objects),
        processing_class=processor,
        optimizers=(MuonAndAdamW(trainee, stage.learning_rate, stage.weight_decay), None),
        callbacks=[Report(stage.save_steps, measured), StopIfDiverged()],
    )
    with storing(output, RUN_AGAIN):
        trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainee.give_to(model)


def folder_settings(rounds: list[TinyRecipe], number: int) -> dict[str, dict]:
    """
    Folder of a stage of the round with this number -> the settings that its files depend on. More steps are allowed:
    the stage is continued.
    """
    recipe = rounds[number - 1]
    values = TypeAdapter(TinyRecipe).dump_python(recipe, mode="json")
    tower, language_model = (
        {f"{stage}.{name}": value for name, value in values[stage].items() if name not in LENGTHS}
        for stage in ("tower", "language_model")
    )
    tower |= {name: values[name] for name in ("tower_width", "tower_layers", "start")}
    materials = recipe.materials()
    tower["photographs, objects and fonts"] = materials and materials.digest()
    steps = {f"tower.{name}": values["tower"][name] for name in ("steps", "decay")}
    images = tower | steps | {"scenes": scenes_digest(materials), "first seed": seeds_of(rounds, number).start}
    names = ("width", "layers", "num_images", "short_steps", "averaged")
    language_model |= images | {name: values[name] for name in names}
    language_model["earlier rounds"] = [differing(earlier) for earlier in rounds[: number - 1]]
    return {"tower": tower, f"images-{recipe.tower.steps}": images, f"language_model-{number}": language_model}


def differing(recipe: TinyRecipe) -> dict:
    """The settings of a round that differ from another's and that its model depends on."""
    values = TypeAdapter(TinyRecipe).dump_python(recipe, mode="json")
    stage = {name: value for name, value in values["language_model"].items() if name != "save_steps"}
    stage |= {name: values[name] for name in ("layers", "short_steps", "num_images", "averaged")}
    return stage | {"tower.steps": recipe.tower.steps}


def seeds_of(rounds: list[TinyRecipe], number: int) -> range:
    """Of a round's scenes: others than those of other towers before."""
    recipe = rounds[number - 1]
    counts = {earlier.tower.steps: earlier.num_images for earlier in rounds[:number]}  # of each tower's last round
    first = sum(count for steps, count in counts.items() if steps != recipe.tower.steps)
    return range(first, first + recipe.num_images)


def record_settings(folder: Path, wanted: dict):
    """
    Record in a stage's folder the settings that its files depend on.

    Raises:
        ValueError: if its files were made with other settings, or the record is damaged.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            found = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove the folder, or name another output") from error
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{folder} was made with {name} {found.get(name)}, the recipe has {value}: remove the folder, or "
                    "name another output"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def train_tiny(recipe: TinyRecipe) -> Path:
    """
    Make `tiny`, or resume an interrupted call. Zoom's heads are measured at the end. Returns the model's folder.

    Raises:
        ValueError: if the earlier call had a recipe that this one can't resume, another call is making the same model,
            or `output` can't be a folder.
        OSError: if the disk is full. What was made stays.
    """
    output, rounds = Path(recipe.output), recipe.rounds()
    if output.name in ("", "..") or (output.exists() and not output.is_dir()):
        raise ValueError(f"{recipe.output} can't be the folder of a model: name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock(output.absolute()):
        return _train_tiny(recipe, rounds, output)


def _train_tiny(recipe: TinyRecipe, rounds: list[TinyRecipe], output: Path) -> Path:
    work = output.with_name(output.name + "-work")
    for number in range(1, len(rounds) + 1):
        for name, wanted in folder_settings(rounds, number).items():
            if (work / name).exists():
                record_settings(work / name, wanted)
    if (materials := recipe.materials()) is not None:
        materials.check()
    processor = build_processor(materials)
    start = recipe.start
    for number in range(1, len(rounds) + 1):
        made = output if number == len(rounds) else work / f"round-{number}"
        if made == output or not (made / SETTINGS_FILE).exists():
            model = train_round(rounds, number, start, work, processor, materials)
            with storing(made, RUN_AGAIN):
                model.to(torch.bfloat16).save_pretrained(made)
                processor.save_pretrained(made)
        if made != output:
            record_settings(made, {"round": differing(rounds[number - 1])})  # recorded last: all of the model is there
        start = str(made)
    write_heads(find_config(output), choose_heads(measure_heads(model, processor, SCENES_FOR_HEADS), ZOOM_HEADS))
    return output


def train_round(
    rounds: list[TinyRecipe], number: int, start: str | None, work: Path, processor, materials: Materials | None
) -> MCLlavaForConditionalGeneration:
    """
    Train the tower, encode this round's scenes and train the rest. Returns the model.

    Args:
        start: the folder of the model to begin with: the recipe's, or the last round's.

    Raises:
        ValueError: if the tower is one of a later round.
    """
    recipe, folders = rounds[number - 1], folder_settings(rounds, number)
    tower_folder, images_folder, folder = (work / name for name in folders)
    torch.manual_seed(recipe.language_model.seed)
    model = build_model(processor, vision_config(recipe.tower_width, recipe.tower_layers), recipe.width, recipe.layers)
    if start:
        copy_weights(load_start(start, model.config), model, processor.tokenizer)
    newest = last_checkpoint(tower_folder)
    if newest is not None and steps_of(newest) > recipe.tower.steps:
        raise ValueError(f"{newest} is of a later round than {folder}, whose tower is no longer there: remove {work}")
    record_settings(tower_folder, folders[tower_folder.name])
    tower = model.model.vision_tower
    weights = tower.state_dict() if start else None
    pretrained = pretrain_tower(tower_folder, tower.config, recipe.tower, recipe.workers, materials, weights).tower
    tower.load_state_dict(pretrained.state_dict())
    model.eval().to(pretrained.device)
    record_settings(images_folder, folders[images_folder.name])
    seeds = seeds_of(rounds, number)
    images = cache_scenes(model, processor, images_folder, seeds, recipe.workers, materials)
    record_settings(folder, folders[folder.name])
    if not start:
        whiten_projector(model.model.multi_modal_projector, images)
    train_members(model, processor, images, folder, recipe, materials)
    return model


def train_members(
    model, processor, images: list[CachedImage], folder: Path, recipe: TinyRecipe, materials: Materials | None
):
    """
    Train a round's language models, and leave the mean of their weights in `model`, see `TinyRecipe.averaged`. What is
    measured of the mean is printed.
    """
    begun, stage = copy.deepcopy(model.state_dict()), recipe.language_model
    objects = tuple(materials.renderings) if materials else ()
    tested = tested_images(model, processor, recipe.num_tested, materials) | {"seen": images[: recipe.num_tested]}
    states = [begun] if recipe.averaged else []
    for seed in range(stage.seed, stage.seed + max(1, recipe.averaged)):
        model.load_state_dict(begun)
        output = folder / f"seed-{seed}" if recipe.averaged else folder
        train_language_model(
            model,
            processor,
            images,
            output,
            replace(stage, seed=seed),
            recipe.short_steps,
            tested,
            objects,
        )
        states.append(copy.deepcopy(model.state_dict()))
    if recipe.averaged:
        model.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in begun})
        trainee = LanguageModelTrainee(model.config, objects)
        trainee.begin_with(model)
        print({"mean of": len(states)} | measure_tested(trainee, processor, tested, objects), flush=True)
