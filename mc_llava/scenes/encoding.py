"""
What the language model of `tiny` is trained on: scenes behind the frozen tower, under budgets of all kinds.

The patches that the tower keeps of a crop never change. They are computed once for each scene, with the crops of a
grid or of zoom.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from .. import Box, count_closer, look_closer, plan_crops, plan_rounds, plan_scouts, relevance_left
from ..folders import is_whole
from ..journal import replacing
from .drawing import draw_scene
from .materials import Materials
from .photographs import training_scene
from .scene import SIDE, Scene, Thing, legible_height, outline


PATCH_SIZE = 8
SHARD = 500  # images of one file of the cache
DIGESTED = 32  # scenes
# How often the training scenes are cut with each max_crops, in percent, unless they are zoomed into.
CROP_BUDGETS = {0: 4, 2: 4, 4: 5, 8: 10, 16: 16, 32: 40, 64: 12, 100: 9}
ZOOM_BUDGETS = (9, 10, 12, 16, 16, 25, 32, 34, 48, 70)
NUM_TOKENS, FEWEST_TOKENS, MOST_TOKENS = 128, 32, 728
READABLE = 6.5  # pixels of the tower, of a glyph
MISSED = 0.15  # how often a round of zoom looks elsewhere


class Budget(NamedTuple):
    """How a scene is cut: the image processor's knobs, and how many rounds of zoom were made."""

    max_crops: int
    num_tokens: int
    zoom: int = 0
    rounds: int = 0


def draw_budget(rng: random.Random, scene: Scene) -> Budget:
    """A training budget. The smaller the things, the more often it zooms."""
    num_tokens = NUM_TOKENS
    if rng.random() < 0.5:
        num_tokens = round(math.exp(rng.uniform(math.log(FEWEST_TOKENS), math.log(MOST_TOKENS))))
    smallest = min(thing.glyph for thing in scene.things) * SIDE / scene.height
    if rng.random() < (0.8 if smallest < 1.6 else 0.45):
        zoom = rng.choice((2, 3)) if rng.random() < (0.8 if smallest < 0.8 else 0.4) else 1
        # What is asked between the rounds is learned too.
        rounds = zoom if rng.random() < 0.75 else rng.randrange(zoom)
        return Budget(rng.choice(ZOOM_BUDGETS), num_tokens, zoom, rounds)
    (max_crops,) = rng.choices(list(CROP_BUDGETS), CROP_BUDGETS.values())
    return Budget(max_crops, num_tokens)


def plan_boxes(scene: Scene, budget: Budget, rng: random.Random) -> list[Box]:
    """
    The crops of a scene. In place of a model's attention, zoom follows where one or two groups of things lie, and
    sometimes it misses them.
    """
    knobs = scene.width, scene.height, budget.zoom, budget.max_crops, budget.num_tokens
    if budget.zoom == 0:
        plan = plan_crops(scene.width, scene.height, budget.max_crops, budget.num_tokens, SIDE, PATCH_SIZE)
        return [crop.box for crop in plan]
    scouts = plan_scouts(*knobs, SIDE, PATCH_SIZE)
    boxes, num_tokens = [crop.box for crop in scouts], sum(crop.num_tokens for crop in scouts)
    zoom, _ = count_closer(*knobs, SIDE)
    rounds, regions, per_region = plan_rounds(len(boxes), zoom, budget.max_crops, num_tokens)
    sought = rng.sample(scene.groups, min(len(scene.groups), 1 if rng.random() < 0.7 else 2))
    covered: set[Box] = set()
    for _ in range(min(rounds, budget.rounds)):
        outlines = [] if rng.random() < MISSED else [outline(group) for group in sought]
        # The more of a thing a crop shows, and the closer, the more attention it gets; the whole picture where it
        # shows the thing legibly.
        sides = [max(right - left, bottom - top) for left, top, right, bottom in boxes]
        relevance = [
            0.3 * rng.random() + min(sides) / side * sum(_share(found, box) for found in outlines)
            for box, side in zip(boxes, sides)
        ]
        relevance[0] = sum(len(boxes) * (glyph_height(group, boxes[0]) >= READABLE) for group in sought)
        if 2 * relevance_left(boxes, relevance, covered, SIDE) <= sum(relevance):
            break  # what is sought is seen already
        boxes += look_closer(boxes, relevance, covered, regions, per_region, SIDE)
    return boxes


def scenes_digest(materials: Materials | None) -> str:
    """A digest of the first training scenes and their crops: code or settings that make others change it."""
    digest = hashlib.sha256()
    for seed in range(DIGESTED):
        scene, budget = scene_and_budget(seed, materials)
        boxes = plan_boxes(scene, budget, random.Random(scene.background_seed))
        # Not the scene itself, which has paths.
        things = [(thing.called, thing.text, thing.box, thing.corners) for thing in scene.things]
        digest.update(repr((scene.width, scene.height, things, budget, boxes)).encode())
    return digest.hexdigest()[:16]


def scene_and_budget(seed: int, materials: Materials | None) -> tuple[Scene, Budget]:
    """A training scene, and how it is cut."""
    scene = training_scene(seed, materials)
    return scene, draw_budget(random.Random(f"budget {seed}"), scene)


def glyph_height(group: tuple[Thing, ...], box: Box) -> float:
    """How many pixels of the tower the smallest glyph of a group has in a crop; 0 if the crop cuts the group."""
    return legible_height(outline(group), min(thing.glyph for thing in group), [box])


def _share(inner: Box, outer: Box) -> float:
    across = min(inner[2], outer[2]) - max(inner[0], outer[0])
    down = min(inner[3], outer[3]) - max(inner[1], outer[1])
    return max(0, across) * max(0, down) / max(1, (inner[2] - inner[0]) * (inner[3] - inner[1]))


class CachedImage(NamedTuple):
    """A scene's crops behind the frozen tower."""

    scene: Scene
    budget: Budget
    features: torch.Tensor  # float16[tokens, vision_hidden], without coordinates
    boxes: torch.Tensor  # int64[crops, 4]
    coords: torch.Tensor  # float32[crops, 2]
    num_tokens: torch.Tensor  # int64[crops]

    OF_CROPS = ("boxes", "coords", "num_tokens")

    @property
    def last(self) -> torch.Tensor:
        """int64[crops], the last token of each crop among the image's."""
        return self.num_tokens.cumsum(0) - 1


class SceneCrops(torch.utils.data.Dataset):
    """Scenes made into pictures and cut into crops: what the image processor returns for each under its budget."""

    def __init__(self, image_processor, scenes: Sequence[Scene], budgets: Sequence[Budget]):
        self.image_processor, self.scenes, self.budgets = image_processor, scenes, budgets

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        scene, budget = self.scenes[index], self.budgets[index]
        knobs = {"max_crops": budget.max_crops, "num_tokens": budget.num_tokens}
        if budget.zoom:
            knobs = {
                "plans": [plan_boxes(scene, budget, random.Random(scene.background_seed))],
                "num_tokens": budget.num_tokens,
            }
        return dict(self.image_processor(draw_scene(scene), return_tensors="pt", **knobs))


@torch.no_grad()
def encode_scenes(
    model, processor, scenes: Sequence[Scene], budgets: Sequence[Budget], workers: int = 0
) -> list[CachedImage]:
    """Encode the pictures of scenes, each under its budget."""
    device = model.device
    images = []
    crops = SceneCrops(processor.image_processor, scenes, budgets)
    loader = torch.utils.data.DataLoader(crops, batch_size=None, num_workers=workers)
    for scene, budget, inputs in zip(scenes, budgets, loader):
        kept = inputs["crop_num_tokens"]
        with torch.autocast(device.type, torch.bfloat16):
            features = model.model.keep_last(model.model.encode_crops(inputs["pixel_values"].to(device)), kept)
        of_crops = inputs["crop_boxes"], inputs["crop_coords"], kept
        images.append(CachedImage(scene, budget, features.half().cpu(), *of_crops))
    return images


def cache_scenes(
    model, processor, folder: Path, seeds: range, workers: int, materials: Materials | None = None
) -> list[CachedImage]:
    """
    The training scenes of some seeds, each under its own budget. Those that an earlier run left in `folder` are
    reused, unless their files are damaged.
    """
    images, names = [], ("features", *CachedImage.OF_CROPS)
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(seeds), SHARD), desc="Encoding scenes", unit_scale=SHARD, unit="scene"):
        part = seeds[start : start + SHARD]
        path = folder / f"scenes-{part.start}-{part.stop}.safetensors"
        scenes, budgets = zip(*(scene_and_budget(seed, materials) for seed in part))
        if not is_whole(path):
            shard = encode_scenes(model, processor, scenes, budgets, workers)
            tensors = {name: torch.cat([getattr(image, name) for image in shard]) for name in names}
            tensors["crops"] = torch.tensor([len(image.coords) for image in shard])
            with replacing(path) as file:
                file.write(save(tensors))
        shard = load_file(path)
        crops = shard["crops"].tolist()
        tokens = [int(kept.sum()) for kept in shard["num_tokens"].split(crops)]
        parts = shard["features"].split(tokens), *(shard[name].split(crops) for name in CachedImage.OF_CROPS)
        images += [CachedImage(*image) for image in zip(scenes, budgets, *parts)]
    return images


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


def last_tokens(image: CachedImage) -> CachedImage:
    """The image with one token a crop."""
    return image._replace(features=image.features[image.last], num_tokens=torch.ones_like(image.num_tokens))
