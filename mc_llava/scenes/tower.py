"""
The vision tower of `tiny`: the counterpart of the 3B model's pretrained SigLIP.

Captions alone leave a small tower on a plateau for a long time. Here every crop gives dense targets, on two heads that
are dropped afterwards:

- the patch head says for each patch which character, shape or object has its center there, and in which color: this
  breaks the plateau;
- the gather head says from the mean of the last K patches alone what the whole crop contains. The language model will
  see only those: with 32 crops and 128 tokens, K is 3.
"""

import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from transformers import AutoModel, PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments

from .. import Box
from ..journal import RUN_AGAIN, storing
from ..training import StopIfDiverged, checked, last_checkpoint
from .drawing import character_centers, draw_scene
from .making import make_group
from .materials import Materials
from .scene import (
    BACKGROUNDS,
    CHARACTERS,
    COLORS,
    FONTS,
    OBJECTS,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    distance,
    move,
    outline,
)


COLOR_IDS = {name: index for index, name in enumerate(COLORS)}
NAMES = SHAPES + OBJECTS
NAME_IDS = {name: index for index, name in enumerate(NAMES)}
LONGEST_SIGN = 4
IGNORED = -100
# The patch head reads before these last blocks, the gather head after them: what the last block recognizes can no
# longer be gathered.
GATHERING_LAYERS = 2
# How often the gather head reads from the last 1, 3, 8 and 24 patches.
GATHERED = (1, 3, 3, 3, 8, 24)


def patch_targets(objects: tuple[str, ...]) -> dict[str, tuple[int, float]]:
    """The targets of a patch, see `label_crop`: name -> number of classes, and the weight of class 0, nothing."""
    return {
        "patch_names": (1 + len(CHARACTERS) + len(NAMES) + len(objects), 0.05),
        "patch_colors": (1 + len(COLORS), 0.05),
        "patch_orders": (1 + LONGEST_SIGN, 0.05),
    }


def crop_targets(objects: tuple[str, ...]) -> dict[str, tuple[tuple[int, ...], int, float]]:
    """The targets of a crop: name -> shape, number of classes and the weight of class 0."""
    return {
        "sign_texts": ((len(COLORS), LONGEST_SIGN), 1 + len(CHARACTERS), 0.03),
        "sign_neighbors": ((len(COLORS),), 1 + len(NAMES) + len(objects), 0.1),
        "shape_colors": ((len(NAMES),), 1 + len(COLORS), 0.1),
        "objects": ((len(objects),), 2, 0.02),
        # Steps on the way to `sign_texts`: no color has to be bound to these.
        "characters": ((len(CHARACTERS),), 2, 0.1),
        "ordered_characters": ((LONGEST_SIGN, len(CHARACTERS)), 2, 0.05),
    }


def make_crop(seed: int, split: str, side: int, materials: Materials | None = None) -> tuple[Scene, Box]:
    """
    A scene and the box of a crop in which some of its things lie, whole or cut by the edge.

    It costs a twentieth of a full scene: nothing outside the crop is drawn. Glyphs are 7 to 15 pixels of the tower
    high in half of the crops, as in the usual grids, up to 40 in a third, as in those that zoom cuts, and hardly
    legible in the others, as in its scouts.
    """
    rng = random.Random(f"crop {split} {seed}")
    # Pixels of the scene to one of the tower. Zoom cuts crops that are smaller than the tower's side; those of large
    # pictures look like ones of twice the tower's side, which take less time.
    scale = rng.uniform(1.3, 2.2) if rng.random() < 0.6 else math.exp(rng.uniform(math.log(0.6), math.log(2.2)))
    width = height = round(side * scale)
    if rng.random() < 0.3:  # the last column or row of a grid is stretched
        stretch = rng.uniform(1, 1.5)
        width, height = (round(width * stretch), height) if rng.random() < 0.5 else (width, round(height * stretch))
    photographed = materials is not None and rng.random() < 0.7
    real = photographed and rng.random() < 0.8
    cast = _CropCast(rng, split, materials, photographed, real)
    # A large crop shows all of a small photograph, the others a part.
    spread = rng.choice((1, 4, 4)) if photographed else 4
    left, top = (side * rng.randint(0, spread - 1) for side in (width, height))
    groups = []
    size = _glyph(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 3))):
        group = cast.group(scale, size, width)
        _, _, right, bottom = outline(group)
        # Of two groups in three all lies inside, else at least a quarter.
        over = 0.0 if rng.random() < 0.67 else 0.75
        for _ in range(20):
            x = left + rng.uniform(-right * over, max(0, width - right * (1 - over)))
            y = top + rng.uniform(-bottom * over, max(0, height - bottom * (1 - over)))
            moved = move(group, round(x), round(y))
            boxes = [outline(other) for other in groups]
            if all(distance(outline(moved), box) > scale * 0.5 * min(size, 15) for box in boxes):
                groups.append(moved)
                break
        if rng.random() < 0.4:
            size = _glyph(rng)
    background = rng.choice(materials.backgrounds if photographed else BACKGROUNDS[split])
    camera = rng.getrandbits(32) if rng.random() < (0.85 if photographed else 0.25) else None
    # Few drawn backgrounds, for they are kept; of photographs any part.
    seed = rng.getrandbits(32 if photographed else 7)
    scene = Scene(spread * width, spread * height, background, seed, tuple(groups), camera)
    return scene, (left, top, left + width, top + height)


def _glyph(rng: random.Random) -> float:
    """Pixels of the tower."""
    chance = rng.random()
    if chance < 0.52:
        return rng.uniform(7, 15)
    return rng.uniform(3.5, 7) if chance < 0.65 else math.exp(rng.uniform(math.log(13), math.log(40)))


class _CropCast:
    """What the groups of one crop are made of: no two signs have one color, no two other things one name."""

    def __init__(self, rng: random.Random, split: str, materials: Materials | None, photographed: bool, real: bool):
        self.rng, self.real = rng, real
        self.colors, self.names = rng.sample(list(COLORS), len(COLORS)), rng.sample(NAMES, len(NAMES))
        self.renderings = materials.renderings if materials else {}
        self.objects = rng.sample(list(self.renderings), min(4, len(self.renderings)))
        # In photographs of the test split all fonts are the split's own.
        self.fonts = FONTS[split]
        if materials and (photographed and split == "test" or rng.random() < 0.75):
            self.fonts = rng.choice(materials.families[split])

    def group(self, scale: float, size: float, width: int) -> tuple[Thing, ...]:
        """Things of which a glyph has `size` pixels of the tower, `scale` of the scene each."""
        rng, chance = self.rng, self.rng.random()
        longest = max(2, min(LONGEST_SIGN, int(width / scale / size / 0.9)))
        # Long signs are the hardest to put together.
        text = "".join(rng.choices(CHARACTERS, k=max(rng.randint(2, longest), rng.randint(2, longest))))
        signs = [(self.colors.pop(), text)] if chance < 0.7 else []
        shapes, objects = [], []
        if chance < 0.5 or not signs:
            if self.objects and rng.random() < 0.65:
                name = self.objects.pop()
                objects = [(name, rng.choice(self.renderings[name]))]
            else:
                shapes = [(self.names.pop(), rng.choice(list(COLORS)))]
        # In a crop of few pixels not all heights are possible.
        return make_group(rng, max(4, scale * size), signs, shapes, self.fonts, objects, self.real)


def label_crop(
    scene: Scene, box: Box, side: int, patch_size: int, objects: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """
    The labels of a crop. 0 is nothing; `IGNORED` is undecidable: things cut by the edge or too small. `objects` are
    the names of all cut-out objects; they have no color.

    Returns:
        patch_names: int[patches], 1 + the character, or 1 + len(CHARACTERS) + the shape or object, centred in it.
        patch_colors: int[patches], 1 + the color of that plate or shape.
        patch_orders: int[patches], the character's number in its sign, from 1: without it no text can be put together.
        sign_texts: int[colors, LONGEST_SIGN], 1 + the characters of the sign of each color.
        sign_neighbors: int[colors], 1 + the shape or object next to that sign.
        shape_colors: int[names], 1 + the color of each shape.
        objects: int[objects], 1 where the crop shows it.
        characters: int[characters], 1 where the crop shows it.
        ordered_characters: int[LONGEST_SIGN, characters], 1 where some sign that is not cut has it there.
        places: float[colors + names + objects, 2], where the things lie, from 0 to 1; NaN where they don't.
    """
    labels = CropLabels(box, side, patch_size, objects)
    for group in scene.groups:
        shape = next((thing for thing in group if not thing.text), None)
        for thing in group:
            if thing.text:
                labels.add_sign(thing, shape)
            else:
                labels.add_shape(thing)
    return labels.arrays


class CropLabels:
    """The labels of one crop, filled in thing by thing: see `label_crop`."""

    def __init__(self, box: Box, side: int, patch_size: int, objects: tuple[str, ...]):
        self.left, self.top, self.right, self.bottom = box
        self.grid = side // patch_size
        self.scale = side / max(self.right - self.left, self.bottom - self.top)  # pixels of the tower per scene's
        self.name_ids = NAME_IDS | {name: len(NAMES) + index for index, name in enumerate(objects)}
        self.arrays = {name: np.zeros(self.grid**2, np.int64) for name in patch_targets(objects)}
        self.arrays |= {name: np.zeros(shape, np.int64) for name, (shape, _, _) in crop_targets(objects).items()}
        self.arrays["places"] = np.full((len(COLORS) + len(self.name_ids), 2), np.nan, np.float32)

    def add_shape(self, shape: Thing):
        index, shown, small = self.name_ids[shape.name], self.shown(shape), self.is_small(shape)
        self.note_place(len(COLORS) + index, shape)
        self.note_patch(shape.center, IGNORED if small else 1 + len(CHARACTERS) + index, shape.color, order=0)
        if shown > 0.25:
            unclear = small or shown < 0.7
            if shape.picture is not None:
                self.arrays["objects"][index - len(NAMES)] = IGNORED if unclear else 1
            else:
                self.arrays["shape_colors"][index] = IGNORED if unclear else 1 + COLOR_IDS[shape.color]

    def add_sign(self, sign: Thing, neighbor: Thing | None):
        color, shown, small = COLOR_IDS[sign.color], self.shown(sign), self.is_small(sign)
        legible = self.is_uncut(sign) and not small
        self.note_place(color, sign)
        self.note_characters(sign)
        if shown > 0.02:
            text = [1 + CHARACTERS.index(character) for character in sign.text]
            padded = text + [0] * (LONGEST_SIGN - len(text))
            self.arrays["sign_texts"][color] = padded if legible else IGNORED
            if neighbor is not None:
                clear = shown > 0.7 and self.shown(neighbor) > 0.7 and not small
                self.arrays["sign_neighbors"][color] = 1 + self.name_ids[neighbor.name] if clear else IGNORED

    def note_characters(self, sign: Thing):
        uncut, small = self.is_uncut(sign), self.is_small(sign)
        found = IGNORED if small else 1
        for order, (character, center) in enumerate(zip(sign.text, character_centers(sign))):
            index = CHARACTERS.index(character)
            name = IGNORED if small else 1 + index
            self.note_patch(center, name, sign.color, 1 + order if uncut and not small else IGNORED)
            # A character that another sign shows clearly stays found.
            if self.patch_at(center) is not None and self.arrays["characters"][index] != 1:
                self.arrays["characters"][index] = found
            if uncut and self.arrays["ordered_characters"][order, index] != 1:
                self.arrays["ordered_characters"][order, index] = found

    def note_place(self, index: int, thing: Thing):
        if self.shown(thing) > 0.6:
            self.arrays["places"][index] = self.relative(thing.center)

    def note_patch(self, point: tuple[float, float], name: int, color: str, order: int):
        """The thing centered in a patch. If two are centered in one patch, neither can be identified."""
        patch = self.patch_at(point)
        if patch is not None:
            taken = self.arrays["patch_names"][patch] != 0
            self.arrays["patch_names"][patch] = IGNORED if taken else name
            self.arrays["patch_colors"][patch] = 1 + COLOR_IDS[color] if color else IGNORED
            self.arrays["patch_orders"][patch] = IGNORED if taken else order

    def relative(self, point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] - self.left) / (self.right - self.left), (point[1] - self.top) / (self.bottom - self.top)

    def patch_at(self, point: tuple[float, float]) -> int | None:
        """The number of the patch that holds a point of the scene; None outside the crop."""
        x, y = self.relative(point)
        return int(y * self.grid) * self.grid + int(x * self.grid) if 0 <= x < 1 and 0 <= y < 1 else None

    def shown(self, thing: Thing) -> float:
        """The share of the thing's area that lies in the crop."""
        left, top, right, bottom = thing.box
        across = min(self.right, right) - max(self.left, left)
        down = min(self.bottom, bottom) - max(self.top, top)
        return max(0, across) * max(0, down) / ((right - left) * (bottom - top))

    def is_small(self, thing: Thing) -> bool:
        return thing.glyph * self.scale < (5 if thing.text else 9 if thing.picture else 4)

    def is_uncut(self, sign: Thing) -> bool:
        """Whether the whole text is in the crop; the plate's margin may be cut."""
        left, top, right, bottom = sign.box
        margin = sign.glyph / 4
        across = left + margin >= self.left and right - margin <= self.right
        return across and top + margin >= self.top and bottom - margin <= self.bottom


class CropDataset(torch.utils.data.Dataset):
    """Crops that are drawn and labelled on demand; number i is always the same."""

    def __init__(
        self,
        size: int,
        split: str,
        side: int,
        patch_size: int,
        first: int = 0,
        materials: Materials | None = None,
        objects: tuple[str, ...] = (),
    ):
        self.size, self.split, self.side, self.patch_size, self.first = size, split, side, patch_size, first
        self.materials, self.objects = materials, objects

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        scene, box = make_crop(self.first + index, self.split, self.side, self.materials)
        image = draw_scene(scene, box).resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        return {"pixel_values": pixels} | label_crop(scene, box, self.side, self.patch_size, self.objects)


def _weighted_loss(logits: torch.Tensor, targets: torch.Tensor, nothing: float, ends: bool = False) -> torch.Tensor:
    """
    Mean cross-entropy in which the frequent class 0 counts less.

    With `ends` it counts in full if the last dimension has any other class: a text's end matters as its characters do.
    """
    something = targets > 0
    if ends:
        something = something.any(-1, keepdim=True).expand_as(targets)
    losses = nn.functional.cross_entropy(
        logits.float().movedim(-1, 1), targets, reduction="none", ignore_index=IGNORED
    )
    weights = torch.where(something, 1.0, nothing) * (targets != IGNORED)
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def num_logits(targets: dict[str, tuple[tuple[int, ...], int, float]]) -> list[int]:
    """How many a head needs for each of some targets of a crop."""
    return [math.prod(shape) * classes for shape, classes, _ in targets.values()]


def split_logits(
    logits: torch.Tensor, targets: dict[str, tuple[tuple[int, ...], int, float]]
) -> dict[str, torch.Tensor]:
    """[crops, sum of `num_logits`] -> name -> [crops, *shape, classes]."""
    parts = zip(targets.items(), logits.split(num_logits(targets), -1))
    return {name: part.unflatten(-1, (*shape, classes)) for (name, (shape, classes, _)), part in parts}


def crop_loss(
    logits: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    targets: dict[str, tuple[tuple[int, ...], int, float]],
) -> torch.Tensor:
    """The sum over the targets of a crop: cross-entropy against those labels of `label_crop`."""
    losses = [
        _weighted_loss(logits[name], labels[name], nothing, ends=name == "sign_texts")
        for name, (shape, _, nothing) in targets.items()
        if shape[0]
    ]
    return torch.stack(losses).sum()


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """
    Sines and cosines of each patch's column and row: float[grid * grid, width], with mean square 1/2.

    SigLIP's own random start is a tenth of the patch embeddings and doesn't show which patches are near: after 160
    thousand crops the tower knew seven characters in ten, but not which of them came first.
    """
    turns = 20.0 ** -torch.linspace(0, 1, width // 4)  # wavelengths from 6 to 126 patches
    angles = torch.arange(grid)[:, None] * turns
    line = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


class TowerForPretraining(nn.Module):
    """A SigLIP tower with the two heads. It reads the last block before `post_layernorm`, as MC-LLaVA does."""

    def __init__(self, vision_config: PreTrainedConfig, objects: tuple[str, ...] = ()):
        super().__init__()
        self.patch_targets, self.crop_targets = patch_targets(objects), crop_targets(objects)
        width = vision_config.hidden_size
        # The backward pass of fused attention takes half of a step on a CPU, and this one a tenth.
        attention = "sdpa" if torch.cuda.is_available() else "eager"
        self.tower = AutoModel.from_config(vision_config, attn_implementation=attention)
        with torch.no_grad():
            grid = vision_config.image_size // vision_config.patch_size
            self.tower.embeddings.position_embedding.weight.copy_(sine_positions(grid, width))
        self.patch_norm, self.gather_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patch_head = nn.Linear(width, sum(classes for classes, _ in self.patch_targets.values()))
        self.num_read, num_places = sum(num_logits(self.crop_targets)), len(COLORS) + len(NAMES) + len(objects)
        self.gather_head = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, self.num_read + 2 * num_places)
        )

    def encode(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches before the last `GATHERING_LAYERS` blocks and after them: [crops, patches, width] each."""
        hidden_states = self.tower.embeddings(pixel_values)
        layers = self.tower.encoder.layers
        for layer in layers[:-GATHERING_LAYERS]:
            hidden_states = layer(hidden_states, attention_mask=None)
        read = hidden_states
        for layer in layers[-GATHERING_LAYERS:]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return read, hidden_states

    def read(self, early: torch.Tensor, late: torch.Tensor, gathered: int) -> dict[str, torch.Tensor]:
        """Logits of all targets: [crops, ..., classes]; `places` are [crops, colors + names + objects, 2]."""
        sizes = [classes for classes, _ in self.patch_targets.values()]
        patch_logits = self.patch_head(self.patch_norm(early)).split(sizes, -1)
        logits = dict(zip(self.patch_targets, patch_logits))
        last = self.gather_norm(late[:, -gathered:]).mean(1)
        gathered_logits = self.gather_head(last)
        logits |= split_logits(gathered_logits[..., : self.num_read], self.crop_targets)
        logits["places"] = gathered_logits[..., self.num_read :].unflatten(-1, (-1, 2)).float()
        return logits

    def forward(self, pixel_values: torch.Tensor, **targets: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.read(*self.encode(pixel_values), random.choice(GATHERED))
        losses = [
            _weighted_loss(logits[name], targets[name], nothing) for name, (_, nothing) in self.patch_targets.items()
        ]
        losses.append(crop_loss(logits, targets, self.crop_targets))
        known = ~targets["places"].isnan()
        errors = (logits["places"] - targets["places"].nan_to_num()).abs() * known
        losses.append(4 * errors.sum() / known.sum().clamp(min=1))
        return {"loss": torch.stack(losses).sum()}


@torch.no_grad()
def measure_tower(model: TowerForPretraining, dataset: CropDataset, gathered: int = 3, batch_size: int = 128) -> dict:
    """
    Accuracies in percent, over targets that are visible.

    Returns:
        characters, orders: of the patch head.
        texts, signs, neighbors, shapes: of the gather head, `texts` for single characters, `signs` for whole signs.
        places: its mean error in percent of the crop's side.
    """
    was_training = model.training
    model.eval()
    measured = ("characters", "orders", "texts", "signs", "neighbors", "shapes", "objects", "places")
    right = {name: [] for name in measured}
    for batch in torch.utils.data.DataLoader(dataset, batch_size):
        device = model.patch_head.weight.device
        with torch.autocast(device.type, torch.bfloat16):
            logits = model.read(*model.encode(batch["pixel_values"].to(device)), gathered)
        logits = {name: values.float().cpu() for name, values in logits.items()}
        hits = {name: logits[name].argmax(-1) == batch[name] for name in logits if name != "places"}
        names = batch["patch_names"]
        right["characters"] += hits["patch_names"][(names > 0) & (names <= len(CHARACTERS))].tolist()
        right["orders"] += hits["patch_orders"][batch["patch_orders"] > 0].tolist()
        right["texts"] += hits["sign_texts"][batch["sign_texts"] > 0].tolist()
        right["signs"] += hits["sign_texts"].all(-1)[batch["sign_texts"][..., 0] > 0].tolist()
        right["neighbors"] += hits["sign_neighbors"][batch["sign_neighbors"] > 0].tolist()
        right["shapes"] += hits["shape_colors"][batch["shape_colors"] > 0].tolist()
        right["objects"] += hits["objects"][batch["objects"] > 0].tolist()
        right["places"] += (logits["places"] - batch["places"]).abs()[~batch["places"].isnan()].tolist()
    model.train(was_training)
    return {name: round(100 * sum(values) / max(1, len(values)), 1) for name, values in right.items()}


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the blocks' matrices, AdamW for all else, and one learning rate: Muon's is scaled to AdamW's steps."""

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float):
        learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in learning if ".layers." in name and parameter.ndim == 2]
        rest = [parameter for name, parameter in learning if not (".layers." in name and parameter.ndim == 2)]
        super().__init__(matrices + rest, {"lr": learning_rate})
        self.parts = {
            "muon": torch.optim.Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(rest, learning_rate, (0.9, 0.98), weight_decay=weight_decay),
        }
        self._link()

    def _link(self):
        # Schedulers write the learning rate into these.
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict):
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._link()


@checked
class Stage:
    """
    How long and how fast a stage of `tiny` learns: a warm-up, a constant rate, a cosine decay in the last steps.

    Raises:
        ValueError: if warm-up and decay overlap. The rate would never reach `learning_rate`, and would jump.
    """

    steps: PositiveInt
    decay: NonNegativeInt
    learning_rate: PositiveFloat
    batch_size: PositiveInt
    warmup: NonNegativeInt = 200
    weight_decay: NonNegativeFloat = 0.05
    save_steps: PositiveInt = 250
    seed: NonNegativeInt = 0

    def __post_init__(self):
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} together exceed the {self.steps} steps: lower them, or "
                "take more steps"
            )

    def options(self, output: Path) -> dict:
        """For `TrainingArguments`."""
        return {
            "output_dir": str(output),
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": self.decay},
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "logging_steps": 10,
            "report_to": ["tensorboard"],
            "remove_unused_columns": False,
        }


class Report(TrainerCallback):
    """Prints the result of `measure` at regular steps, and appends it to `accuracy.jsonl` in the stage's folder."""

    def __init__(self, every: int, measure):
        self.every, self.measure, self.start = every, measure, time.time()

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            entry = {"step": state.global_step, "seconds": round(time.time() - self.start)} | self.measure(model)
            print(entry, flush=True)
            with open(Path(args.output_dir, "accuracy.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def pretrain_tower(
    output: Path,
    vision_config: PreTrainedConfig,
    stage: Stage,
    workers: int = 1,
    materials: Materials | None = None,
    start: dict[str, torch.Tensor] | None = None,
) -> TowerForPretraining:
    """
    Train a tower, or resume from the last checkpoint in `output`.

    It is measured on crops that are not trained on: of the training split, of drawn scenes of the test split, and of
    photographs with the test split's fonts.

    Args:
        start: the weights of a tower to begin with; None for random ones.

    Returns:
        The trained tower, with its heads.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")
    torch.manual_seed(stage.seed)
    torch.set_flush_denormal(True)  # without it steps take longer and longer on a CPU
    objects = tuple(materials.renderings) if materials else ()
    model = TowerForPretraining(vision_config, objects)
    if start is not None:
        model.tower.load_state_dict(start)
    for layer in model.tower.encoder.layers:
        layer.compile()  # saves a quarter of a step's time on a CPU; needs a C++ compiler
    side, patch_size = vision_config.image_size, vision_config.patch_size

    def crops(size: int, split: str, first: int, materials: Materials | None) -> CropDataset:
        return CropDataset(size, split, side, patch_size, first, materials, objects)

    seen = {split: crops(384, split, 10**9, materials if split == "train" else None) for split in SPLITS}
    if materials:
        seen["photographs"] = crops(384, "test", 10**9 + 1000, materials)

    def measured(tower):
        return {name: measure_tower(tower, crops) for name, crops in seen.items()}

    trainer = Trainer(
        model,
        TrainingArguments(
            **stage.options(output), dataloader_num_workers=workers, train_sampling_strategy="sequential"
        ),
        # One epoch of exactly as many crops as the steps take: none is seen twice, a longer run continues in the same
        # order, and a finished run that is started again takes no further step.
        train_dataset=crops(stage.steps * stage.batch_size, "train", 0, materials),
        optimizers=(MuonAndAdamW(model, stage.learning_rate, stage.weight_decay), None),
        callbacks=[Report(stage.save_steps, measured), StopIfDiverged()],
    )
    with storing(output, RUN_AGAIN):
        trainer.train(resume_from_checkpoint=last_checkpoint(output))
    return model
