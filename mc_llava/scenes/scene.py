"""
A scene as a plain description, and the picture of it.

What a scene is drawn from:

- signs: a plate in one of `COLORS` with 2 to 4 of `CHARACTERS`;
- one of each of some `SHAPES` and `OBJECTS` in one of `COLORS`, alone or next to a sign (a group);
- `BACKGROUNDS` and `FONTS` of the split.

The crop plan determines how small things are. For a picture of height H, a tower of side 96 and 32 crops:

    in the whole image     glyph * 96 / H           below 3 pixels: illegible
    in a crop of side c    glyph * 96 / c           at least 8 pixels: legible

so glyphs are about H / 35 pixels high, and since c is about H / 3, the crops magnify three to five times. `SIZES` has
pictures with smaller glyphs, which need more crops. A scene may also have one large thing.
"""

import math
from dataclasses import dataclass, replace

from .. import Box


# Without I and O, as on license plates: some fonts draw them like 1 and 0.
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
COLORS = {
    "red": (212, 32, 38),
    "orange": (245, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "purple": (135, 45, 165),
    "white": (246, 246, 246),
    "black": (20, 20, 22),
}
# What else is called so: plain screen colors, and those of paint.
SHADES = {
    "red": ((255, 0, 0), (180, 25, 30)),
    "orange": ((255, 165, 0), (255, 125, 10)),
    "yellow": ((255, 255, 0), (245, 200, 20)),
    "green": ((0, 128, 0), (0, 190, 60)),
    "blue": ((0, 0, 255), (20, 90, 190)),
    "purple": ((128, 0, 128), (150, 70, 200)),
    "white": ((255, 255, 255), (228, 230, 232)),
    "black": ((0, 0, 0), (42, 42, 46)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
OBJECTS = ("house", "tree", "car", "boat", "flag")
DIRECTIONS = (("left", "right"), ("above", "below"))  # along x and along y
# Words that a reply about an object may have in addition to its name.
FILLERS = set(
    "a an the it is its they are there this that i can see you in of picture image photo thing object".split()
)
DENIALS = {"no", "not", "none", "nothing", "nobody"}
# Words that tell whether a reply is right, so that no cut-out object may have one in its name.
RESERVED = {"sign", "yes", *COLORS, *SHAPES, *OBJECTS, *sum(DIRECTIONS, ()), *FILLERS, *DENIALS}
BACKGROUNDS = {"train": ("street", "bricks", "hills", "clouds", "stripes"), "test": ("harbor", "tiles")}
# Matplotlib's files; None is the font inside Pillow: drawing the test split needs only Pillow.
FONTS = {
    "train": (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSansMono.ttf",
        "DejaVuSansMono-Bold.ttf",
        "DejaVuSerif.ttf",
        "DejaVuSerif-Bold.ttf",
        "STIXGeneralBol.ttf",
        "cmss10.ttf",
    ),
    "test": (None,),
}
SPLITS = tuple(FONTS)

SIDE = 96  # of the tower that the sizes are made for, in pixels
LEGIBLE = 8.0  # pixels of the tower, of a glyph


@dataclass(frozen=True)
class Size:
    """How small the glyphs of a scene are: illegible in the whole picture, legible in some of a grid's crops."""

    crops: int  # of the grid
    illegible: float  # pixels of the tower
    shortest: int  # side of a scene, in pixels
    longest: int


# The height of a picture divided by that of its glyphs, about.
SIZES = {35: Size(32, 3.0, 512, 2048), 70: Size(128, 1.5, 1500, 3200), 140: Size(600, 0.75, 1500, 3200)}
CROPS = SIZES[35].crops
LARGE = (0.25, 0.4)  # the share of the picture that a large thing's box fills


@dataclass(frozen=True)
class Thing:
    """
    A sign, shape or object. All lengths are pixels of the scene, and a box is left, top, right, bottom.

    What a camera sees at an angle has `corners`: of its flat rectangle the left upper, right upper, right lower and
    left lower one, (x, y) each. They lie in the box.
    """

    name: str  # "sign", or one of SHAPES and OBJECTS, or of the cut-out objects
    color: str  # empty for a cut-out object
    rgb: tuple[int, int, int]
    box: Box
    glyph: float  # height of a capital letter; of all else, its height
    text: str = ""
    font: str | None = None
    picture: str | None = None  # file of a cut-out object
    corners: tuple[tuple[float, float], ...] | None = None

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def called(self) -> str:
        return f"{self.color} {self.name}".strip()


@dataclass(frozen=True)
class Scene:
    """
    A picture to be drawn. Things of one group lie next to each other; all others lie apart.

    The background is one of `BACKGROUNDS`, or the path of a photograph.
    """

    width: int
    height: int
    background: str
    background_seed: int
    groups: tuple[tuple[Thing, ...], ...]
    camera: int | None = None  # seed of what the camera does to the picture

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(thing for group in self.groups for thing in group)


def move(group: tuple[Thing, ...], right: int, down: int) -> tuple[Thing, ...]:
    """The same things, moved."""
    offset = (right, down, right, down)
    moved = []
    for thing in group:
        changes = {"box": tuple(side + shift for side, shift in zip(thing.box, offset))}
        if thing.corners is not None:
            changes["corners"] = tuple((x + right, y + down) for x, y in thing.corners)
        moved.append(replace(thing, **changes))
    return tuple(moved)


def outline(group: tuple[Thing, ...]) -> Box:
    lefts, tops, rights, bottoms = zip(*(thing.box for thing in group))
    return min(lefts), min(tops), max(rights), max(bottoms)


def area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def contains(outer: Box, inner: Box) -> bool:
    """Whether a box holds all of another."""
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def distance(box: Box, other: Box) -> float:
    across = max(box[0] - other[2], other[0] - box[2], 0)
    down = max(box[1] - other[3], other[1] - box[3], 0)
    return math.hypot(across, down)


def legible_height(box: Box, glyph: float, crops: list[Box]) -> float:
    """
    How many pixels of the tower a glyph has in the best of the crops that hold all of `box`; 0 if none does.

    The smaller of the two scales counts: a crop that is squashed sideways is no easier to read.
    """
    best = 0.0
    for crop in crops:
        if contains(crop, box):
            left, top, right, bottom = crop
            best = max(best, glyph * SIDE / max(right - left, bottom - top))
    return best
