"""
How `tiny` is made: its tokenizer and sizes, the features of its frozen tower, and its language model.

The tower comes from `pretraining`. Once it is frozen, the patches it keeps of a crop never change: they are computed
once, and the language model, the projector and the coordinate embedding train on them many times faster.
"""

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PhiConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from trl import SFTConfig, SFTTrainer

from . import scenes
from .configuration_mc_llava import MCLlavaConfig
from .image_processing_mc_llava import MCLlavaImageProcessor
from .modeling_mc_llava import MCLlavaForConditionalGeneration, MCLlavaModel
from .pretraining import MuonAndAdamW, Report, Stage, pretrain_tower
from .processing_mc_llava import MCLlavaProcessor
from .training import checked, last_checkpoint, set_trainable


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<pad>"]
VOCABULARY = 512  # at most
PATCH_SIZE = 8
MAX_CROPS, NUM_TOKENS = 32, 128
# How often the training scenes are cut with each max_crops, in percent.
CROP_BUDGETS = {0: 4, 2: 4, 4: 6, 8: 10, 16: 16, 32: 48, 64: 12}

SHARD = 500  # images of one file of the cache
TURNS = 8  # at most, of one conversation
CAPTIONS = 0.1  # share of the conversations that are a caption
FEW_CROPS = (1, 2, 4, 8)  # that half of the batches show, beside the whole picture
READABLE = 6.5  # pixels of the tower, of a glyph
FIRST_TESTED = 10**6  # the first scenes of the test split are the study's
MADE_OF = "recipe.json"
LENGTHS = ("steps", "decay", "save_steps")  # of a stage, which may change while it is made


@checked
class TinyRecipe:
    """
    How `tiny` is made. A call with the same `output` goes on where an earlier one stopped; see `check_made_of`.

    Args:
        output: the folder of the model; the stages leave their checkpoints beside it, in `output`-work.
        tower: the vision tower's stage, on single crops.
        language_model: the stage of all else, on whole scenes.
        num_images: how many scenes are encoded for the language model.
        num_tested: how many scenes, of those never trained on, are asked about along the way.
        tower_width, tower_layers, width, layers: sizes of the SigLIP and of the Phi architecture.
        workers: processes that draw.
    """

    output: str
    tower: Stage
    language_model: Stage
    num_images: PositiveInt
    num_tested: PositiveInt = 200
    tower_width: PositiveInt = 128
    tower_layers: PositiveInt = 6
    width: PositiveInt = 192
    layers: PositiveInt = 4
    workers: NonNegativeInt = 1


def build_processor() -> MCLlavaProcessor:
    """A byte-level BPE of what is asked and said about scenes. The signs' characters stay single."""
    rng = random.Random(0)
    texts = ["user\nassistant\nsystem\n"] * 100
    for seed in range(300):
        scene, said = scenes.make_scene(seed), []
        said += scenes.caption(scene, rng)
        for kind in scenes.KINDS:
            question = scenes.ask(scene, kind, rng)
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
        size={"height": scenes.SIDE, "width": scenes.SIDE},
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
        image_size=scenes.SIDE,
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
    coords: torch.Tensor  # float32[crops, 2]
    num_tokens: torch.Tensor  # int64[crops]

    TENSORS = ("features", "coords", "num_tokens")


class SceneCrops(torch.utils.data.Dataset):
    """Scenes drawn and cut into crops: what the image processor returns for each of `seeds` under its budget."""

    def __init__(self, image_processor, seeds, split: str, budgets):
        self.image_processor, self.seeds, self.split, self.budgets = image_processor, seeds, split, budgets

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = scenes.draw_scene(scenes.make_scene(self.seeds[index], self.split))
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
            features = model.model._encode_crops(inputs["pixel_values"].to(device), kept.to(device))
        images.append(CachedImage(seed, budget, features.half().cpu(), inputs["crop_coords"], kept))
    return images


def cache_scenes(model, processor, folder: Path, count: int, workers: int) -> list[CachedImage]:
    """
    The first `count` training scenes, each under a budget drawn from `CROP_BUDGETS`. What lies in `folder` from an
    earlier run is taken from there.
    """
    images = []
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, count, SHARD), desc="Encoding scenes", unit_scale=SHARD, unit="scene"):
        seeds = range(start, min(start + SHARD, count))
        path = folder / f"{seeds.start}-{seeds.stop}.safetensors"
        rng = random.Random(start)
        budgets = []
        for max_crops in rng.choices(list(CROP_BUDGETS), list(CROP_BUDGETS.values()), k=len(seeds)):
            budgets.append((max_crops, NUM_TOKENS if rng.random() < 0.7 else rng.randint(48, 256)))
        if not path.exists():
            shard = encode_scenes(model, processor, seeds, "train", budgets, workers)
            tensors = {name: torch.cat([getattr(image, name) for image in shard]) for name in CachedImage.TENSORS}
            tensors["crops"] = torch.tensor([len(image.coords) for image in shard])
            partial = path.with_suffix(".part")
            save_file(tensors, partial)
            partial.rename(path)  # an interrupted run leaves no half of a shard
        shard = load_file(path)
        crops = shard["crops"].tolist()
        tokens = [int(kept.sum()) for kept in shard["num_tokens"].split(crops)]
        parts = shard["features"].split(tokens), shard["coords"].split(crops), shard["num_tokens"].split(crops)
        images += [CachedImage(seed, budget, *image) for seed, budget, image in zip(seeds, budgets, zip(*parts))]
    return images


def scene_rows(num_images: int, count: int, seed: int) -> Dataset:
    """
    What `SceneCollator` takes, in training's order: all images in turn, shuffled each time around, each row with a
    seed of its own. More rows begin as fewer do.
    """
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        rows += [{"image": image, "seed": rng.getrandbits(62)} for image in rng.sample(range(num_images), num_images)]
    return Dataset.from_list(rows[:count])


class CachedTower(MCLlavaModel):
    """Takes the features that its frozen tower gave before for pixels: right-aligned, [crops, longest, width]."""

    def _encode_crops(self, pixel_values: torch.Tensor, num_tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        longest = pixel_values.shape[1]
        return pixel_values[torch.arange(longest, device=pixel_values.device) >= longest - num_tokens[:, None]]


class LanguageModelTrainee(MCLlavaForConditionalGeneration):
    """The same parameters as the model's own, over a `CachedTower`."""

    _auto_class = None  # its checkpoints are for resuming alone: no code goes along

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        self.model = CachedTower(config)


def image_fields(images: list[CachedImage]) -> dict[str, torch.Tensor]:
    """What a `LanguageModelTrainee` takes for a batch of images."""
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


def show_few(
    image: CachedImage, scene: scenes.Scene, boxes: list[tuple], count: int, rng: random.Random
) -> tuple[CachedImage, scenes.Scene]:
    """
    The whole picture and `count` of its crops, one of which shows a group of things, and what of the scene they show.
    An image whose crops magnify too little for any group stays as it is.

    Args:
        boxes: of the image's crops, of which the first is the whole.
    """
    shown = [
        (group, crop)
        for group in scene.groups
        for crop in range(1, len(boxes))
        if scenes.legible_height(scenes.outline(group), min(t.glyph for t in group), [boxes[crop]]) >= READABLE
    ]
    if not shown:
        return image, scene
    _, crop = rng.choice(shown)
    crops = sorted({0, crop, *rng.sample(range(1, len(boxes)), min(count, len(boxes)) - 1)})
    groups = tuple(group for group in scene.groups if any((group, crop) in shown for crop in crops))
    features = image.features.split(image.num_tokens.tolist())
    image = image._replace(
        features=torch.cat([features[crop] for crop in crops]),
        coords=image.coords[crops],
        num_tokens=image.num_tokens[crops],
    )
    return image, replace(scene, groups=groups)


class SceneCollator:
    """
    Fresh conversations about cached images: a caption, or some questions of all kinds, with the loss on the answers.
    They follow from the rows alone: a run that is resumed draws what one that was not stopped does.

    Every second batch shows a few crops only: reading is learned there in fewer steps than among many.

    Args:
        captions: share of conversations that are a caption.
        turns: the most questions of one conversation.
    """

    def __init__(self, processor, images: list[CachedImage], captions: float, turns: int):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.images, self.captions, self.turns = images, captions, turns

    def conversation(
        self, image: CachedImage, scene: scenes.Scene, turns: int, rng: random.Random
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels."""
        if rng.random() < self.captions:
            said = [scenes.caption(scene, rng)]
        else:
            kinds = scenes.askable(scene)
            questions = [scenes.ask(scene, rng.choice(kinds), rng) for _ in range(turns)]
            said = [(question.text, question.answer) for question in questions]
        ids, labels = [], []
        for index, (text, answer) in enumerate(said):
            picture = "<image>" * int(image.num_tokens.sum()) + "\n" if index == 0 else ""
            newline = "\n" if index else ""
            asked = self.tokenizer.encode(
                f"{newline}<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"
            )
            replied = self.tokenizer.encode(f"{answer}<|im_end|>")
            ids += asked + replied
            labels += [-100] * len(asked) + replied
        return ids, labels

    def boxes(self, image: CachedImage, scene: scenes.Scene) -> list[tuple]:
        max_crops, num_tokens = image.budget
        plan = self.image_processor.plan(scene.width, scene.height, max_crops=max_crops, num_tokens=num_tokens)
        return [crop.box for crop in plan]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rng = random.Random(rows[0]["seed"])
        # The same in all rows, so that few positions are padding.
        turns, few = rng.randint(1, self.turns), rng.choice(FEW_CROPS) if rng.random() < 0.5 else None
        shown = [(self.images[row["image"]], scenes.make_scene(self.images[row["image"]].seed)) for row in rows]
        if few is not None:
            shown = [show_few(image, scene, self.boxes(image, scene), few, rng) for image, scene in shown]
        images = [image for image, _ in shown]
        encoded = [self.conversation(image, scene, turns, rng) for image, scene in shown]
        longest = max(len(ids) for ids, _ in encoded)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in encoded]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in encoded]),
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in encoded]),
            **image_fields(images),
        }


@torch.no_grad()
def answer(model, processor, images: list[CachedImage], questions: list[str], batch_size: int = 64) -> list[str]:
    """Greedy replies of a `LanguageModelTrainee`."""
    replies = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        prompts = [
            "<|im_start|>user\n"
            + "<image>" * int(image.num_tokens.sum())
            + f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
            for image, question in zip(batch, questions[start:])
        ]
        inputs = processor.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = {name: value.to(model.device) for name, value in (dict(inputs) | image_fields(batch)).items()}
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        replies += processor.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return replies


def measure(model, processor, images: list[CachedImage], split: str) -> dict[str, float]:
    """Percent of right replies for each kind of question, one of each about every image."""
    was_training = model.training
    model.eval()
    rng = random.Random(0)
    accuracies = {}
    for kind in scenes.KINDS:
        questions = [scenes.ask(scenes.make_scene(image.seed, split), kind, rng) for image in images]
        replies = answer(model, processor, images, [question.text for question in questions])
        right = [scenes.is_correct(question, reply) for question, reply in zip(questions, replies)]
        accuracies[kind] = round(100 * sum(right) / len(right), 1)
    model.train(was_training)
    return accuracies


def train_language_model(model, processor, images: list[CachedImage], output: Path, stage: Stage, num_tested: int):
    """Train all but the tower on cached images, or go on from the last checkpoint in `output`."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    seeds = range(FIRST_TESTED, FIRST_TESTED + num_tested)
    with_crops = encode_scenes(model, processor, seeds, "test", [(MAX_CROPS, NUM_TOKENS)] * num_tested)
    without = encode_scenes(model, processor, seeds, "test", [(0, NUM_TOKENS)] * num_tested)

    def measured(trainee):
        return {
            "crops": measure(trainee, processor, with_crops, "test"),
            "whole": measure(trainee, processor, without, "test"),
            "seen": measure(trainee, processor, images[:num_tested], "train"),
        }

    trainee = LanguageModelTrainee(model.config)
    trainee.load_state_dict(model.state_dict())
    for layer in trainee.model.language_model.layers:
        layer.compile()  # a third less time a step on a CPU
    set_trainable(trainee, ("coordinates", "projector", "language_model"))
    # See `training.train`: a run could not go on from checkpoints under the published names.
    trainee.save_pretrained = functools.partial(trainee.save_pretrained, save_original_format=False)
    trainer = SFTTrainer(
        trainee,
        SFTConfig(
            **stage.options(output),
            max_length=None,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        ),
        train_dataset=scene_rows(len(images), stage.steps * stage.batch_size, stage.seed),
        data_collator=SceneCollator(processor, images, CAPTIONS, TURNS),
        processing_class=processor,
        optimizers=(MuonAndAdamW(trainee, stage.learning_rate, stage.weight_decay), None),
        callbacks=[Report(stage.save_steps, measured)],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    model.load_state_dict(trainee.state_dict())


def made_of(recipe: TinyRecipe) -> dict[str, dict]:
    """Folder of a stage -> what its files follow from. A stage may take more steps: it goes on."""
    values = TypeAdapter(TinyRecipe).dump_python(recipe, mode="json")
    tower, language_model = (
        {f"{stage}.{name}": value for name, value in values[stage].items() if name not in LENGTHS}
        for stage in ("tower", "language_model")
    )
    tower |= {name: values[name] for name in ("tower_width", "tower_layers")}
    images = tower | {f"tower.{name}": values["tower"][name] for name in ("steps", "decay")}
    language_model |= images | {name: values[name] for name in ("width", "layers", "num_images")}
    return {"tower": tower, "images": images, "language_model": language_model}


def check_made_of(folder: Path, wanted: dict):
    """
    Note in a stage's folder what its files are made of.

    Raises:
        ValueError: if it holds what is made of something else.
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
    path.write_text(json.dumps(wanted, indent=1) + "\n")


def train_tiny(recipe: TinyRecipe) -> Path:
    """
    Make `tiny` from nothing, or go on where an interrupted call stopped. Returns the model's folder.

    Raises:
        ValueError: if the earlier call had a recipe whose results can't be gone on from.
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
    pretrained = pretrain_tower(work / "tower", vision, recipe.tower, recipe.workers).tower
    model.model.vision_tower.load_state_dict(pretrained.state_dict())
    model.eval().to(pretrained.device)
    check_made_of(work / "images", stages["images"])
    images = cache_scenes(model, processor, work / "images", recipe.num_images, recipe.workers)
    check_made_of(work / "language_model", stages["language_model"])
    train_language_model(model, processor, images, work / "language_model", recipe.language_model, recipe.num_tested)
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
    return output
