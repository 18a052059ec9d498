"""
How `tiny` is made: its tokenizer and sizes, the features of its frozen tower, and its language model.

The tower comes from `tower.py`. Once it is frozen, the patches it keeps of a crop never change: they are computed
once, and the language model, the projector and the coordinate embedding train on them many times faster.
"""

import json
import os
import random
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from datasets import Dataset
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PhiConfig, PreTrainedTokenizerFast, SiglipVisionConfig, Trainer, TrainingArguments

from .. import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaModel, MCLlavaProcessor
from ..journal import replacing, write_json
from ..training import StopIfDiverged, checked, last_checkpoint, set_trainable
from .drawing import draw_scene
from .making import make_scene
from .materials import Materials
from .questions import KINDS, SceneQuestion, ask, caption, is_correct
from .scene import SIDE, Scene, Thing, legible_height, outline
from .tower import MuonAndAdamW, Report, Stage, pretrain_tower


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<pad>"]
VOCABULARY = 512  # at most
PATCH_SIZE = 8
MAX_CROPS, NUM_TOKENS = 32, 128
# How often the training scenes are cut with each max_crops, in percent.
CROP_BUDGETS = {0: 4, 2: 4, 4: 6, 8: 10, 16: 16, 32: 48, 64: 12}

SHARD = 500  # images of one file of the cache
TURNS = 8  # at most, of one conversation
KIND_WEIGHTS = {"ocr": 3, "attribute": 1, "position": 1, "hard": 2}  # how often they are asked: reading comes last
CAPTIONS = 0.05  # share of the conversations that are a caption, in batches that are not short
MANY_CROPS = 16  # max_crops at least, of the scenes of the short steps
SPACINGS = (1, 1, 2, 4, 8, 16)  # of the visual tokens of short batches
READABLE = 6.5  # pixels of the tower, of a glyph
# Heads, the first of a layer, that learn where to look: from a thing's name, and from each word about it.
NAMING_LAYER, ANSWERING_LAYER, LOOKING_HEADS = 1, 2, 2
PLACE_WEIGHT = 4.0  # two places can be compared once each can be read off its name
FIRST_TESTED = 10**6  # the first scenes of the test split are the study's
MADE_OF = "recipe.json"
LENGTHS = ("steps", "decay", "save_steps")  # of a stage, which may change while it is made


@checked
class TinyRecipe:
    """
    How `tiny` is made. A call with the same `output` resumes an earlier one; see `check_made_of`.

    Args:
        output: the folder of the model; the stages write their checkpoints next to it, in `output`-work.
        tower: the vision tower's stage, on single crops.
        language_model: the stage for everything else, on whole scenes.
        num_images: how many scenes are encoded for the language model.
        short_steps: the language model's first steps, which show one token a crop, see `SceneCollator`.
        num_tested: how many scenes that are never trained on are asked about during training.
        photographs: folder of photographs for half of the scenes, see `Materials`; None if all are drawn.
        objects: folder of cut-out objects, with photographs only.
        fonts: folder of fonts for scenes with photographs; None for the system's.
        tower_width, tower_layers, width, layers: sizes of the SigLIP and of the Phi architecture.
        workers: processes that draw.
    """

    output: str
    tower: Stage
    language_model: Stage
    num_images: PositiveInt
    short_steps: NonNegativeInt
    num_tested: PositiveInt = 200
    photographs: str | None = None
    objects: str | None = None
    fonts: str | None = None
    tower_width: PositiveInt = 128
    tower_layers: PositiveInt = 6
    width: PositiveInt = 192
    layers: Annotated[int, Field(gt=ANSWERING_LAYER)] = 4
    workers: NonNegativeInt = 1

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


def build_processor() -> MCLlavaProcessor:
    """A byte-level BPE trained on questions and answers about scenes. The signs' characters stay single tokens."""
    rng = random.Random(0)
    texts = ["user\nassistant\nsystem\n"] * 100
    for seed in range(300):
        scene, said = make_scene(seed), []
        said += caption(scene, rng)
        for kind in KINDS:
            question = ask(scene, kind, rng)
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
        num_attention_heads=width // 32,
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
        num_attention_heads=width // 32,
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


class CachedImage(NamedTuple):
    """A scene's crops behind the frozen tower."""

    seed: int  # of the scene
    budget: tuple[int, int]  # max_crops, num_tokens
    features: torch.Tensor  # float16[tokens, vision_hidden], without coordinates
    boxes: torch.Tensor  # int64[crops, 4]
    coords: torch.Tensor  # float32[crops, 2]
    num_tokens: torch.Tensor  # int64[crops]

    OF_CROPS = ("boxes", "coords", "num_tokens")


class SceneCrops(torch.utils.data.Dataset):
    """Scenes drawn and cut into crops: what the image processor returns for each of `seeds` under its budget."""

    def __init__(self, image_processor, seeds, split: str, budgets):
        self.image_processor, self.seeds, self.split, self.budgets = image_processor, seeds, split, budgets

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = draw_scene(make_scene(self.seeds[index], self.split))
        max_crops, num_tokens = self.budgets[index]
        return dict(self.image_processor(image, max_crops=max_crops, num_tokens=num_tokens, return_tensors="pt"))


@torch.no_grad()
def encode_scenes(model, processor, seeds, split: str, budgets, workers: int = 0) -> list[CachedImage]:
    """Encode drawn scenes. `budgets` has (max_crops, num_tokens) for each of `seeds`."""
    device = model.device
    images = []
    crops = SceneCrops(processor.image_processor, seeds, split, budgets)
    loader = torch.utils.data.DataLoader(crops, batch_size=None, num_workers=workers)
    for seed, budget, inputs in zip(seeds, budgets, loader):
        kept = inputs["crop_num_tokens"]
        with torch.autocast(device.type, torch.bfloat16):
            features = model.model.keep_last(model.model.encode_crops(inputs["pixel_values"].to(device)), kept)
        of_crops = inputs["crop_boxes"], inputs["crop_coords"], kept
        images.append(CachedImage(seed, budget, features.half().cpu(), *of_crops))
    return images


def cache_scenes(model, processor, folder: Path, count: int, workers: int) -> list[CachedImage]:
    """
    The first `count` training scenes, each under a budget drawn from `CROP_BUDGETS`. Those that an earlier run left in
    `folder` are reused.
    """
    images, names = [], ("features", *CachedImage.OF_CROPS)
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, count, SHARD), desc="Encoding scenes", unit_scale=SHARD, unit="scene"):
        seeds = range(start, min(start + SHARD, count))
        path = folder / f"scenes-{seeds.start}-{seeds.stop}.safetensors"
        rng = random.Random(start)
        budgets = []
        for max_crops in rng.choices(list(CROP_BUDGETS), list(CROP_BUDGETS.values()), k=len(seeds)):
            budgets.append((max_crops, NUM_TOKENS if rng.random() < 0.7 else rng.randint(48, 256)))
        if not path.exists():
            shard = encode_scenes(model, processor, seeds, "train", budgets, workers)
            tensors = {name: torch.cat([getattr(image, name) for image in shard]) for name in names}
            tensors["crops"] = torch.tensor([len(image.coords) for image in shard])
            with replacing(path) as file:
                file.write(save(tensors))
        shard = load_file(path)
        crops = shard["crops"].tolist()
        tokens = [int(kept.sum()) for kept in shard["num_tokens"].split(crops)]
        parts = shard["features"].split(tokens), *(shard[name].split(crops) for name in CachedImage.OF_CROPS)
        images += [CachedImage(seed, budget, *image) for seed, budget, image in zip(seeds, budgets, zip(*parts))]
    return images


def scene_rows(images: list[CachedImage], stage: Stage, short_steps: int) -> Dataset:
    """
    The input of `SceneCollator`, in training's order: each part repeats all images that suit it, reshuffled each time,
    and each row has its own seed. A longer run begins like a shorter one.
    """
    everything = range(len(images))
    many = [index for index in everything if images[index].budget[0] >= MANY_CROPS] or everything
    short_steps = min(short_steps, stage.steps)
    rows = []
    for short, pool, steps in ((True, many, short_steps), (False, everything, stage.steps - short_steps)):
        rng, part = random.Random(f"{stage.seed} {short}"), []
        while len(part) < steps * stage.batch_size:
            chosen = rng.sample(pool, len(pool))
            part += [{"image": index, "short": short, "seed": rng.getrandbits(62)} for index in chosen]
        rows += part[: steps * stage.batch_size]
    return Dataset.from_list(rows)


class CachedTower(MCLlavaModel):
    """Takes cached features of the frozen tower in place of pixels: right-aligned, [crops, longest, width]."""

    def encode_crops(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return pixel_values

    def get_image_features(self, *fields, output_hidden_states=None, output_attentions=None, **kwargs):
        # Those of the language model are wanted where the loss of looking asks for attentions: no tower is here.
        return super().get_image_features(*fields, **kwargs)


class LanguageModelTrainee(MCLlavaForConditionalGeneration):
    """The same parameters as the model's own, over a `CachedTower`."""

    _auto_class = None  # its checkpoints are only for resuming: no code is saved with them

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        self.model = CachedTower(config)


class LookingTrainer(Trainer):
    """Adds `looking_loss` to the loss on the answers."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        looks = inputs.pop("looks")
        inputs |= {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        layers = self.accelerator.unwrap_model(model).model.language_model.layers
        loss = loss + looking_loss(layers, outputs.attentions, outputs.hidden_states, **looks)
        return (loss, outputs) if return_outputs else loss


def looking_loss(
    decoder_layers: torch.nn.ModuleList,
    attentions: tuple[torch.Tensor, ...],
    hidden_states: tuple[torch.Tensor, ...],
    layers: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """
    How little the heads look where they should: -log of the attention's share there. And how far the first two numbers
    that the next layers read, behind a thing's name, are from the thing's place.

    Args:
        attentions, hidden_states: the language model's, as transformers returns them.
        layers, rows, positions: int[looks], from where to look.
        targets: bool[looks, length], the positions to look at.
        places: float[looks, 2], of the thing there, (x / width, y / height).
    """
    losses = []
    for layer in (NAMING_LAYER, ANSWERING_LAYER):
        here = layers == layer
        weights = attentions[layer][rows[here], :LOOKING_HEADS, positions[here]].float()
        share = (weights * targets[here, None]).sum(-1)
        losses.append(-(share + 1e-6).log().sum() / max(1, share.numel()))
    here = layers == NAMING_LAYER
    for layer in range(NAMING_LAYER + 1, len(decoder_layers)):
        read = decoder_layers[layer].input_layernorm(hidden_states[layer][rows[here], positions[here]])
        distance = (read[:, :2].float() - places[here]).abs()
        losses.append(PLACE_WEIGHT * distance.sum() / max(1, distance.numel()))
    return sum(losses)


def image_fields(images: list[CachedImage]) -> dict[str, torch.Tensor]:
    """The inputs of a `LanguageModelTrainee` for a batch of images."""
    counts = torch.cat([image.num_tokens for image in images])
    longest = int(counts.max())
    features = torch.zeros(len(counts), longest, images[0].features.shape[1])
    features[torch.arange(longest) >= longest - counts[:, None]] = torch.cat([i.features for i in images]).float()
    return {
        "pixel_values": features,
        "crop_coords": torch.cat([image.coords for image in images]),
        "crop_num_tokens": counts,
        "image_grid_thw": torch.tensor([[len(image.coords), 1, 1] for image in images]),
    }


class Look(NamedTuple):
    """The positions that the language model should attend to from one position of a conversation."""

    layer: int
    position: int
    targets: list[int]  # positions
    place: tuple[float, float]  # of the thing there, (x / width, y / height)


class SceneCollator:
    """
    Fresh conversations about cached images: some questions of all kinds, or a caption, with the loss on the answers.
    They depend on the rows alone: a resumed run draws the same as an uninterrupted one.

    Each conversation also has its attention targets, as the generator knows which crops contain an object. A language
    model is slow to find these among thirty crops by itself:

        visual tokens              question                       answer
        [whole] [1] [2] ... [31]   What does the red sign say?    It says 48H7.
                     ^                                |            |  |  |
                     +--- last token of the crop -----+------------+--+--+

    Short batches show the last token of each crop alone, where the tower has learned to gather it, and hold many
    questions: a step takes half the time. Their positions are spread as if each crop had more tokens, for the heads to
    look as far as in long sequences. The other batches show the tokens of each image's own budget.

    Args:
        captions: share of the conversations that are a caption, in batches that are not short.
        turns: the most questions of one conversation.
    """

    def __init__(self, processor, images: list[CachedImage], captions: float, turns: int):
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.image_token_id
        self.images, self.captions, self.turns = images, captions, turns

    def questions(self, scene: Scene, captions: float, turns: int, rng: random.Random) -> list[SceneQuestion]:
        if rng.random() < captions:
            text, answer = caption(scene, rng)
            return [SceneQuestion("caption", text, answer, answer)]
        return [ask(scene, *rng.choices(list(KIND_WEIGHTS), KIND_WEIGHTS.values()), rng) for _ in range(turns)]

    def conversation(
        self, image: CachedImage, scene: Scene, questions: list[SceneQuestion]
    ) -> tuple[list[int], list[int], list[Look]]:
        """Token ids, labels, and where to look."""
        seen = self.last_tokens_showing(image, scene)
        ids, labels, looks = [], [], []
        for question in questions:
            picture, newline = ("", "\n") if ids else ("<image>" * int(image.num_tokens.sum()) + "\n", "")
            before = f"{newline}<|im_start|>user\n{picture}"
            asked = self.tokenizer(
                f"{before}{question.text}<|im_end|>\n<|im_start|>assistant\n", return_offsets_mapping=True
            )
            if picture:
                first = asked["input_ids"].index(self.image_token_id)
            replied = self.tokenizer.encode(f"{question.answer}<|im_end|>")
            answer_start = len(ids) + len(asked["input_ids"])
            for name, thing in question.named:
                targets = [first + token for token in seen[thing]]
                if not targets:
                    continue
                place = thing.center[0] / scene.width, thing.center[1] / scene.height
                end = len(before) + re.search(rf"\b{name}\b", question.text).end()
                inside = [start < end <= stop for start, stop in asked["offset_mapping"]]
                looks.append(Look(NAMING_LAYER, len(ids) + inside.index(True), targets, place))
                if len(question.named) == 1:
                    # The position that predicts each token of the reply, except its end.
                    positions = range(answer_start - 1, answer_start + len(replied) - 2)
                    looks += [Look(ANSWERING_LAYER, position, targets, place) for position in positions]
            ids += asked["input_ids"] + replied
            labels += [-100] * len(asked["input_ids"]) + replied
        return ids, labels, looks

    def last_tokens_showing(self, image: CachedImage, scene: Scene) -> dict[Thing, list[int]]:
        """Thing -> the last token of each crop in which it and its neighbor can be told, of the image's tokens."""
        last = (image.num_tokens.cumsum(0) - 1).tolist()
        showing = {}
        for group in scene.groups:
            box, glyph = outline(group), min(thing.glyph for thing in group)
            heights = [legible_height(box, glyph, [crop]) for crop in image.boxes.tolist()]
            showing |= dict.fromkeys(group, [token for token, height in zip(last, heights) if height >= READABLE])
        return showing

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rng = random.Random(rows[0]["seed"])
        # The same in all rows, so that few positions are padding.
        short = rows[0]["short"]
        turns = rng.randint((self.turns + 1) // 2 if short else 1, self.turns)
        captions = 0.0 if short else self.captions
        images = [self.images[row["image"]] for row in rows]
        if short:
            images = [last_tokens(image) for image in images]
        drawn = [make_scene(image.seed) for image in images]
        questions = [self.questions(scene, captions, turns, rng) for scene in drawn]
        talks = [self.conversation(*talk) for talk in zip(images, drawn, questions)]
        longest = max(len(ids) for ids, _, _ in talks)
        pad = self.tokenizer.pad_token_id
        looks = [(row, look) for row, (_, _, found) in enumerate(talks) for look in found]
        targets = torch.zeros(len(looks), longest, dtype=torch.bool)
        for index, (_, look) in enumerate(looks):
            targets[index, look.targets] = True
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in talks])
        spacing = rng.choice(SPACINGS) if short else 1
        is_visual = input_ids == self.image_token_id
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(longest) + (spacing - 1) * is_visual.cumsum(-1),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _, _ in talks]),
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels, _ in talks]),
            **image_fields(images),
            "looks": {
                "layers": torch.tensor([look.layer for _, look in looks], dtype=torch.long),
                "rows": torch.tensor([row for row, _ in looks], dtype=torch.long),
                "positions": torch.tensor([look.position for _, look in looks], dtype=torch.long),
                "targets": targets,
                "places": torch.tensor([look.place for _, look in looks]).reshape(-1, 2),
            },
        }


def last_tokens(image: CachedImage) -> CachedImage:
    """The image with one token a crop."""
    last = image.num_tokens.cumsum(0) - 1
    return image._replace(features=image.features[last], num_tokens=torch.ones_like(image.num_tokens))


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


def measure_language_model(model, processor, images: list[CachedImage], split: str) -> dict[str, float]:
    """Percent of right replies for each kind of question, one of each about every image."""
    was_training = model.training
    model.eval()
    rng = random.Random(0)
    accuracies = {}
    for kind in KINDS:
        questions = [ask(make_scene(image.seed, split), kind, rng) for image in images]
        replies = answer_cached(model, processor, images, [question.text for question in questions])
        right = [is_correct(question.key, reply) for question, reply in zip(questions, replies)]
        accuracies[kind] = round(100 * sum(right) / len(right), 1)
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


def train_language_model(
    model, processor, images: list[CachedImage], output: Path, stage: Stage, short_steps: int, num_tested: int
):
    """Train all but the tower on cached images, or resume from the last checkpoint in `output`."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    seeds = range(FIRST_TESTED, FIRST_TESTED + num_tested)
    with_crops = encode_scenes(model, processor, seeds, "test", [(MAX_CROPS, NUM_TOKENS)] * num_tested)
    without = encode_scenes(model, processor, seeds, "test", [(0, NUM_TOKENS)] * num_tested)

    def measured(trainee):
        return {
            "crops": measure_language_model(trainee, processor, with_crops, "test"),
            "whole": measure_language_model(trainee, processor, without, "test"),
            "seen": measure_language_model(trainee, processor, images[:num_tested], "train"),
        }

    whiten_projector(model.model.multi_modal_projector, images)
    trainee = LanguageModelTrainee(model.config)
    trainee.load_state_dict(model.state_dict())
    trainee.set_attn_implementation("eager")  # which gives the weights, and whose backward pass takes less on a CPU
    for layer in trainee.model.language_model.layers:
        layer.compile()  # saves time on a CPU; needs a C++ compiler
    set_trainable(trainee, ("coordinates", "projector", "language_model"))
    trainer = LookingTrainer(
        trainee,
        TrainingArguments(**stage.options(output), train_sampling_strategy="sequential"),
        train_dataset=scene_rows(images, stage, short_steps),
        data_collator=SceneCollator(processor, images, CAPTIONS, TURNS),
        processing_class=processor,
        optimizers=(MuonAndAdamW(trainee, stage.learning_rate, stage.weight_decay), None),
        callbacks=[Report(stage.save_steps, measured), StopIfDiverged()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    model.load_state_dict(trainee.state_dict())


def made_of(recipe: TinyRecipe) -> dict[str, dict]:
    """Folder of a stage -> the settings that its files depend on. More steps are allowed: the stage is continued."""
    values = TypeAdapter(TinyRecipe).dump_python(recipe, mode="json")
    tower, language_model = (
        {f"{stage}.{name}": value for name, value in values[stage].items() if name not in LENGTHS}
        for stage in ("tower", "language_model")
    )
    tower |= {name: values[name] for name in ("tower_width", "tower_layers")}
    materials = recipe.materials()
    tower["photographs, objects and fonts"] = materials and materials.digest()
    images = tower | {f"tower.{name}": values["tower"][name] for name in ("steps", "decay")}
    language_model |= images | {name: values[name] for name in ("width", "layers", "num_images", "short_steps")}
    return {"tower": tower, "images": images, "language_model": language_model}


def check_made_of(folder: Path, wanted: dict):
    """
    Record in a stage's folder the settings that its files depend on.

    Raises:
        ValueError: if its files were made with other settings.
    """
    path = folder / MADE_OF
    if path.exists():
        found = json.loads(path.read_text())
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
    Make `tiny` from scratch, or resume an interrupted call. Returns the model's folder.

    Raises:
        ValueError: if the earlier call had a recipe that this one can't resume.
    """
    output = Path(recipe.output)
    work = output.with_name(output.name + "-work")
    stages = made_of(recipe)
    for name in stages:
        if (work / name).exists():
            check_made_of(work / name, stages[name])
    check_made_of(work / "tower", stages["tower"])
    processor = build_processor()
    vision = vision_config(recipe.tower_width, recipe.tower_layers)
    torch.manual_seed(recipe.language_model.seed)
    model = build_model(processor, vision, recipe.width, recipe.layers)
    pretrained = pretrain_tower(work / "tower", vision, recipe.tower, recipe.workers, recipe.materials()).tower
    model.model.vision_tower.load_state_dict(pretrained.state_dict())
    model.eval().to(pretrained.device)
    check_made_of(work / "images", stages["images"])
    images = cache_scenes(model, processor, work / "images", recipe.num_images, recipe.workers)
    check_made_of(work / "language_model", stages["language_model"])
    train_language_model(
        model,
        processor,
        images,
        work / "language_model",
        recipe.language_model,
        recipe.short_steps,
        recipe.num_tested,
    )
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    return output
