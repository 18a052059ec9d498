"""Makes scenes on photographs, with the objects and fonts of folders, and the mixture that `tiny` is trained on."""

import math
import random
from dataclasses import replace
from functools import lru_cache, partial

from .camera import seen_at_an_angle
from .making import legible_crops, make_group, make_object, make_scene, make_shape, make_sign, place, small_glyph
from .materials import Materials
from .questions import SceneQuestion, ask
from .scene import CHARACTERS, COLORS, FONTS, LARGE, OBJECTS, SHAPES, SIZES, SPLITS, Scene, Size, Thing, move


# Of training: also glyphs that few crops show legibly, or the whole picture; and smaller ones in smaller pictures.
SIZES_ON_PHOTOGRAPHS = {
    12: Size(8, 9.0, 512, 2048),
    20: Size(16, 5.0, 512, 2048),
    35: SIZES[35],
    70: Size(128, 1.5, 1500, 2400),
    140: Size(600, 0.75, 1500, 2400),
}
# How often `training_scene` has each size, in percent, and a large thing.
SIZE_WEIGHTS = {12: 15, 20: 17, 35: 48, 70: 15, 140: 5}
DRAWN_SIZE_WEIGHTS = {35: 85, 70: 15}
LARGE_SHARE = 0.12
PHOTOGRAPH_SHARE = 0.65


def make_photograph_scene(seed: int, split: str, materials: Materials, size: int = 35, large: bool = False) -> Scene:
    """
    The scene of a seed on a photograph.

    Args:
        split: whose fonts are used. Photographs and objects are those of the folders.
        size: one of `SIZES_ON_PHOTOGRAPHS`. Scenes of 12 and 20 may lack some groups.
        large: whether a large thing comes first: a shape, an object or a sign.

    Raises:
        ValueError: if `split` is none of `SPLITS`, or `size` none of `SIZES_ON_PHOTOGRAPHS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if size not in SIZES_ON_PHOTOGRAPHS:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES_ON_PHOTOGRAPHS))}, got {size!r}")
    sides, rng = SIZES_ON_PHOTOGRAPHS[size], random.Random(f"photograph {split} {seed} {size}{' large' * large}")
    while True:
        height = rng.randint(sides.shortest, sides.longest)
        width = round(height * rng.uniform(0.6, 1.7))
        if not sides.shortest <= width <= sides.longest:
            continue
        cast = _Cast(rng, split, materials)
        groups = [cast.large(width, height)] if large else []
        makers = [partial(cast.group, height, sides, *made) for made in cast.groups()]
        # The first groups have a sign and its neighbor.
        optional = len(makers) - 2 if size < 35 else 0
        if groups := place(rng, width, height, makers, legible_crops(width, height, sides), groups, optional):
            camera = rng.getrandbits(32) if rng.random() < 0.85 else None
            return Scene(width, height, rng.choice(materials.backgrounds), rng.getrandbits(32), groups, camera)


class _Cast:
    """The things of one scene, no two of which are called alike."""

    def __init__(self, rng: random.Random, split: str, materials: Materials):
        self.rng, self.real = rng, rng.random() < 0.8
        self.families, self.usual = materials.families[split], FONTS[split] if split == "train" else ()
        self.renderings = materials.renderings
        self.colors = rng.sample(list(COLORS), 4)
        self.shapes = rng.sample(SHAPES + OBJECTS, 4)
        self.objects = rng.sample(list(self.renderings), min(4, len(self.renderings)))
        self.texts: set[str] = set()

    def sign(self, longest: int = 4) -> tuple[str, str]:
        text = ""
        while not text or text in self.texts:
            text = "".join(self.rng.choices(CHARACTERS, k=min(longest, self.rng.choice((2, 2, 3, 3, 4)))))
        self.texts.add(text)
        return self.colors.pop(), text

    def shape(self) -> tuple[str, str]:
        return self.shapes.pop(), self.rng.choice(list(COLORS))

    def object(self) -> tuple[str, str]:
        name = self.objects.pop()
        return name, self.rng.choice(self.renderings[name])

    def groups(self) -> list[tuple[list, list, list]]:
        """Signs, shapes and objects of each group: signs with a neighbor first."""
        neighbors = [([], [self.object()]) if self.objects else ([self.shape()], []), ([self.shape()], [])]
        self.rng.shuffle(neighbors)
        found = [([self.sign()], *neighbor) for neighbor in neighbors]
        found += [([], [self.shape()], [])]
        found += [([], [], [self.object()]) for _ in self.objects[:1]]
        found += [([self.sign()], [], [])] if self.rng.random() < 0.5 else []
        found += [([], [], [self.object()]) for _ in self.objects[:1] if self.rng.random() < 0.4]
        return found

    def group(self, height: int, size: Size, signs: list, shapes: list, objects: list) -> tuple[Thing, ...]:
        glyph = small_glyph(self.rng, height, size)
        return make_group(self.rng, glyph, signs, shapes, (self.font(),), objects, self.real)

    def font(self) -> str | None:
        usual = self.usual if self.rng.random() < 0.25 else ()
        return self.rng.choice(usual or self.rng.choice(self.families))

    def large(self, width: int, height: int) -> tuple[Thing]:
        """A thing whose box fills a share of `LARGE` of the picture."""
        rng, kind, area = self.rng, self.rng.random(), self.rng.uniform(*LARGE) * width * height
        if self.objects and kind < 0.5:
            thing = make_object(100, *self.object())
        elif kind < 0.75:
            thing = make_shape(rng, 100, *self.shape(), real=self.real)
        else:
            thing = make_sign(rng, 100, *self.sign(longest=3), self.font(), real=self.real)
        # As large as that area and the picture allow.
        _, _, across, down = thing.box
        scale = min(math.sqrt(area / (across * down)), 0.96 * width / across, 0.96 * height / down)
        thing = replace(thing, box=(0, 0, round(across * scale), round(down * scale)), glyph=thing.glyph * scale)
        if self.real or thing.picture:
            thing = seen_at_an_angle(rng, thing, gentle=True)
        right, bottom = min(thing.box[2], width), min(thing.box[3], height)
        return move((thing,), rng.randint(0, width - right), rng.randint(0, height - bottom))


def photograph_question(seed: int, kind: str, materials: Materials) -> tuple[Scene, SceneQuestion]:
    """The one scene on a photograph and question of a kind that every measurement asks."""
    scene = make_photograph_scene(seed, "test", materials, large=kind == "large")
    rng = random.Random(f"photograph {kind} {seed}")
    return scene, ask(scene, kind, rng, tuple(materials.renderings))


@lru_cache(maxsize=1 << 15)
def training_scene(seed: int, materials: Materials | None) -> Scene:
    """A scene of the training split: drawn ones, and with materials also ones on photographs, of all sizes."""
    rng = random.Random(f"training {seed}")
    large = rng.random() < LARGE_SHARE
    if materials is not None and rng.random() < PHOTOGRAPH_SHARE:
        (size,) = rng.choices(list(SIZE_WEIGHTS), SIZE_WEIGHTS.values())
        return make_photograph_scene(seed, "train", materials, size, large)
    (size,) = rng.choices(list(DRAWN_SIZE_WEIGHTS), DRAWN_SIZE_WEIGHTS.values())
    return make_scene(seed, "train", size, large)
