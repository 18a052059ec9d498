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
import random
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .. import plan_crops


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
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
OBJECTS = ("house", "tree", "car", "boat", "flag")
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
    """A sign, shape or object. All lengths are pixels of the scene, and a box is left, top, right, bottom."""

    name: str  # "sign", or one of SHAPES and OBJECTS
    color: str
    rgb: tuple[int, int, int]
    box: tuple[int, int, int, int]
    glyph: float  # height of a capital letter; of a shape, its height
    text: str = ""
    font: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def called(self) -> str:
        return f"{self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn. Things of one group lie next to each other; all others lie apart."""

    width: int
    height: int
    background: str
    background_seed: int
    groups: tuple[tuple[Thing, ...], ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(thing for group in self.groups for thing in group)


# Making scenes


def make_scene(seed: int, split: str = "train", size: int = 35, large: bool = False) -> Scene:
    """
    The scene of a seed.

    Args:
        size: one of `SIZES`.
        large: whether a shape or object that fills a quarter of the picture or more comes first.

    Raises:
        ValueError: if `split` is none of `SPLITS`, or `size` none of `SIZES`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))}, got {size!r}")
    shortest, longest = SIZES[size].shortest, SIZES[size].longest
    rng = random.Random(f"{split} {seed}{' large' * large}")
    while True:
        height = rng.randint(shortest, longest)
        width = round(height * rng.uniform(0.6, 1.5))
        if not shortest <= width <= longest:
            continue
        # Half of the pictures have crops that magnify too little for both bounds in their stretched last row or
        # column: things are laid elsewhere, and if no place is found, the next try has another size.
        groups = _lay_out(rng, width, height, split, SIZES[size], large)
        if groups:
            return Scene(width, height, rng.choice(BACKGROUNDS[split]), rng.getrandbits(32), groups)


def _lay_out(
    rng: random.Random, width: int, height: int, split: str, size: Size, large: bool
) -> tuple[tuple[Thing, ...], ...] | None:
    boxes = [crop.box for crop in plan_crops(width, height, size.crops, 10**6, SIDE, 8)[1:]]
    gap = 0.2 * min(boxes[0][2], boxes[0][3])
    casts = _casts(rng)
    groups = [_make_large(rng, width, height, casts)] if large else []
    for signs, shapes in casts:
        for _ in range(60):
            glyph = rng.uniform(0.8, 0.98) * size.illegible * height / SIDE
            group = make_group(rng, glyph, signs, shapes, FONTS[split])
            left, top, right, bottom = outline(group)
            if right >= width or bottom >= height:
                continue
            group = move(group, rng.randint(0, int(width - right)), rng.randint(0, int(height - bottom)))
            apart = all(distance(outline(group), outline(other)) >= gap for other in groups)
            if apart and legible_height(outline(group), min(thing.glyph for thing in group), boxes) >= LEGIBLE:
                groups.append(group)
                break
        else:
            return None
    return tuple(groups)


def _make_large(rng: random.Random, width: int, height: int, casts: list[tuple[list, list]]) -> tuple[Thing]:
    """A shape or object whose box fills a share of `LARGE` of the picture, with a name that no small one has."""
    small = [name for _, shapes in casts for name, _ in shapes]
    name, color = rng.choice([name for name in SHAPES + OBJECTS if name not in small]), rng.choice(list(COLORS))
    area = rng.uniform(*LARGE) * width * height
    shape = _make_shape(rng, min(height - 1, math.sqrt(area / _aspect(name))), name, color)
    right, bottom = min(shape.box[2], width - 1), shape.box[3]
    shape = replace(shape, box=(0, 0, right, bottom))
    return move((shape,), rng.randint(0, width - right), rng.randint(0, height - bottom))


def _casts(rng: random.Random) -> list[tuple[list, list]]:
    """Which things make up the groups: (signs, shapes) with their names, colors and texts. No two are called alike."""
    signs = rng.randint(2, 3)
    colors = rng.sample(list(COLORS), signs)
    texts = set()
    while len(texts) < signs:
        texts.add("".join(rng.choices(CHARACTERS, k=rng.choice((2, 2, 3, 3, 4)))))
    texts = sorted(texts)
    rng.shuffle(texts)
    names = rng.sample(SHAPES + OBJECTS, rng.randint(3, 5))
    shapes = [(name, rng.choice(list(COLORS))) for name in names]
    signs = list(zip(colors, texts))
    # At least two signs have a neighbor and at least one shape stands alone.
    neighbors = rng.randint(2, min(len(signs), len(shapes) - 1))
    return (
        [([sign], [shape]) for sign, shape in zip(signs[:neighbors], shapes)]
        + [([sign], []) for sign in signs[neighbors:]]
        + [([], [shape]) for shape in shapes[neighbors:]]
    )


def make_group(rng: random.Random, glyph: float, signs: list, shapes: list, fonts: tuple) -> tuple[Thing, ...]:
    """
    Things side by side or one above the other, the outline's corner at (0, 0).

    Args:
        glyph: height of the signs' capitals in pixels.
        signs: (color, text) of each.
        shapes: (name, color) of each.
        fonts: names to choose from, as in `FONTS`.
    """
    things = [_make_sign(rng, glyph, color, text, rng.choice(fonts)) for color, text in signs]
    things += [_make_shape(rng, glyph * rng.uniform(1.15, 1.6), name, color) for name, color in shapes]
    rng.shuffle(things)
    down, position, placed = rng.random() < 0.5, 0, []
    widest = max(thing.box[2] for thing in things)
    highest = max(thing.box[3] for thing in things)
    for thing in things:
        _, _, width, height = thing.box
        if down:
            placed += move((thing,), (widest - width) // 2, position)
        else:
            placed += move((thing,), position, (highest - height) // 2)
        position += (height if down else width) + round(glyph * 0.4)
    return tuple(placed)


def _make_sign(rng: random.Random, glyph: float, color: str, text: str, font: str | None) -> Thing:
    size, height = _font_size(font, glyph)
    margin = height * rng.uniform(0.3, 0.55)
    width = _text_width(font, size, text) + 2 * margin
    return Thing(
        "sign", color, _shade(rng, color), (0, 0, round(width), round(height + 2 * margin)), height, text, font
    )


def _make_shape(rng: random.Random, height: float, name: str, color: str) -> Thing:
    box = (0, 0, round(height * _aspect(name)), round(height))
    return Thing(name, color, _shade(rng, color), box, height)


def _aspect(name: str) -> float:
    return 1.6 if name in ("car", "boat") else 1.0


def _shade(rng: random.Random, color: str) -> tuple[int, int, int]:
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLORS[color])


def move(group: tuple[Thing, ...], right: int, down: int) -> tuple[Thing, ...]:
    """The same things, moved."""
    offset = (right, down, right, down)
    return tuple(
        Thing(**{**thing.__dict__, "box": tuple(side + shift for side, shift in zip(thing.box, offset))})
        for thing in group
    )


def outline(group: tuple[Thing, ...]) -> tuple[int, int, int, int]:
    lefts, tops, rights, bottoms = zip(*(thing.box for thing in group))
    return min(lefts), min(tops), max(rights), max(bottoms)


def area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def distance(box: tuple, other: tuple) -> float:
    across = max(box[0] - other[2], other[0] - box[2], 0)
    down = max(box[1] - other[3], other[1] - box[3], 0)
    return math.hypot(across, down)


def legible_height(box: tuple, glyph: float, crops: list[tuple]) -> float:
    """
    How many pixels of the tower a glyph has in the best of the crops that hold all of `box`; 0 if none does.

    The smaller of the two scales counts: a crop that is squashed sideways is no easier to read.
    """
    best = 0.0
    for left, top, right, bottom in crops:
        if left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]:
            best = max(best, glyph * SIDE / max(right - left, bottom - top))
    return best


# Drawing


def draw_scene(scene: Scene, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """
    Draw a scene, or only what lies in `box` (left, top, right, bottom in pixels of the scene).

    Returns:
        An RGB image of the scene's or the box's size.
    """
    left, top, right, bottom = box or (0, 0, scene.width, scene.height)
    ground = _background(scene.background, scene.background_seed)
    scale_x, scale_y = ground.width / scene.width, ground.height / scene.height
    image = ground.resize(
        (right - left, bottom - top),
        Image.Resampling.BILINEAR,
        box=(left * scale_x, top * scale_y, right * scale_x, bottom * scale_y),
    )
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        thing = move((thing,), -left, -top)[0]
        if thing.box[2] > 0 and thing.box[3] > 0 and thing.box[0] < image.width and thing.box[1] < image.height:
            (_draw_sign if thing.text else _draw_shape)(draw, thing)
    return image


def _draw_sign(draw: ImageDraw.ImageDraw, thing: Thing):
    left, top, right, bottom = thing.box
    dark = sum(thing.rgb) < 400 and thing.color != "orange"
    ink = (250, 250, 250) if dark else (10, 10, 10)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=thing.rgb)
    font = load_font(thing.font, _font_size(thing.font, thing.glyph)[0])
    baseline = (top + bottom) / 2 + thing.glyph / 2
    for character, center in zip(thing.text, character_centers(thing)):
        draw.text((center[0], baseline), character, fill=ink, font=font, anchor="ms")


def character_centers(thing: Thing) -> list[tuple[float, float]]:
    """The middle of each of a sign's characters, (x, y) in pixels of the scene."""
    size = _font_size(thing.font, thing.glyph)[0]
    x = thing.center[0] - _text_width(thing.font, size, thing.text) / 2
    centers = []
    for character in thing.text:
        advance = _text_width(thing.font, size, character)
        centers.append((x + advance / 2, thing.center[1]))
        x += advance
    return centers


@lru_cache(maxsize=2048)
def load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    """A font of `FONTS` at a size in pixels per em."""
    if name is None:
        return ImageFont.load_default(size)
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"the font {name} is matplotlib's: pip install matplotlib") from error
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


@cache
def _metrics(name: str | None) -> tuple[float, dict[str, float]]:
    """Height of a capital and the advance of each character with 6 % of tracking, in em."""
    font = load_font(name, 200)
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    return (bottom - top) / 200, {character: font.getlength(character) / 200 + 0.06 for character in CHARACTERS}


def _font_size(name: str | None, glyph: float) -> tuple[int, float]:
    """The size in pixels per em, a whole number, whose capitals are closest to `glyph` pixels, and their height."""
    capital, _ = _metrics(name)
    size = max(1, round(glyph / capital))
    return size, size * capital


def _text_width(name: str | None, size: int, text: str) -> float:
    _, advances = _metrics(name)
    return size * sum(advances[character] for character in text)


POST, GLASS, DARK = (110, 80, 55), (185, 215, 230), (35, 35, 38)


class _Pen:
    """Draws in the color of a thing; points are from (0, 0) to (1, 1) in its box."""

    def __init__(self, draw: ImageDraw.ImageDraw, thing: Thing):
        self.draw, self.thing = draw, thing

    def at(self, points) -> list[tuple[float, float]]:
        left, top, right, bottom = self.thing.box
        return [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]

    def fill(self, *points, rgb=None):
        self.draw.polygon(self.at(points), fill=rgb or self.thing.rgb)

    def disc(self, x, y, across, down, rgb=None):
        corners = self.at([(x - across, y - down), (x + across, y + down)])
        self.draw.ellipse((*corners[0], *corners[1]), fill=rgb or self.thing.rgb)

    def ring(self):
        left, top, right, bottom = self.thing.box
        thickness = max(1, round(0.24 * (bottom - top)))
        self.draw.ellipse((left, top, right - 1, bottom - 1), outline=self.thing.rgb, width=thickness)


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing):
    (_draw_object if thing.name in OBJECTS else _draw_plain)(_Pen(draw, thing))


def _draw_plain(pen: _Pen):
    match pen.thing.name:
        case "circle":
            pen.disc(0.5, 0.5, 0.5, 0.5)
        case "square":
            pen.fill((0, 0), (1, 0), (1, 1), (0, 1))
        case "triangle":
            pen.fill((0.5, 0), (1, 1), (0, 1))
        case "star":
            turns = [math.pi * (2 * i / 10 - 0.5) for i in range(10)]
            radii = [0.55, 0.22] * 5
            pen.fill(*((0.5 + r * math.cos(a), 0.54 + r * math.sin(a)) for r, a in zip(radii, turns)))
        case "diamond":
            pen.fill((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5))
        case "cross":
            pen.fill((0.33, 0), (0.67, 0), (0.67, 1), (0.33, 1))
            pen.fill((0, 0.33), (1, 0.33), (1, 0.67), (0, 0.67))
        case "heart":
            pen.disc(0.26, 0.28, 0.26, 0.28)
            pen.disc(0.74, 0.28, 0.26, 0.28)
            pen.fill((0.03, 0.42), (0.5, 0.3), (0.97, 0.42), (0.5, 1))
        case "ring":
            pen.ring()


def _draw_object(pen: _Pen):
    match pen.thing.name:
        case "house":
            pen.fill((0.5, 0), (1, 0.45), (0, 0.45))
            pen.fill((0.12, 0.45), (0.88, 0.45), (0.88, 1), (0.12, 1))
            pen.fill((0.4, 0.6), (0.6, 0.6), (0.6, 1), (0.4, 1), rgb=DARK)
        case "tree":
            pen.fill((0.42, 0.6), (0.58, 0.6), (0.58, 1), (0.42, 1), rgb=POST)
            pen.disc(0.5, 0.36, 0.4, 0.36)
        case "car":
            pen.fill((0.2, 0.45), (0.32, 0.1), (0.7, 0.1), (0.82, 0.45))
            pen.fill((0.34, 0.42), (0.4, 0.2), (0.62, 0.2), (0.68, 0.42), rgb=GLASS)
            pen.fill((0, 0.42), (1, 0.42), (1, 0.8), (0, 0.8))
            pen.disc(0.24, 0.8, 0.12, 0.2, rgb=DARK)
            pen.disc(0.76, 0.8, 0.12, 0.2, rgb=DARK)
        case "boat":
            pen.fill((0, 0.62), (1, 0.62), (0.8, 1), (0.2, 1))
            pen.fill((0.47, 0), (0.53, 0), (0.53, 0.62), (0.47, 0.62), rgb=POST)
            pen.fill((0.56, 0.05), (0.86, 0.52), (0.56, 0.52), rgb=GLASS)
        case "flag":
            pen.fill((0.08, 0), (0.2, 0), (0.2, 1), (0.08, 1), rgb=POST)
            pen.fill((0.2, 0.02), (1, 0.1), (1, 0.58), (0.2, 0.5))


SMALL = 128  # pixels of a background's side


class _Ground:
    """A background that is being painted, and the random numbers that it follows from."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.image = Image.new("RGB", (SMALL, SMALL), self.muted())
        self.draw = ImageDraw.Draw(self.image)

    def muted(self, low=70, high=190, spread=26) -> tuple[int, ...]:
        grey = self.rng.randint(low, high)
        return tuple(min(225, max(40, grey + self.rng.randint(-spread, spread))) for _ in range(3))

    def noise(self, cells: int, low: int, high: int) -> Image.Image:
        field = Image.frombytes("RGB", (cells, cells), self.rng.randbytes(3 * cells * cells))
        field = field.point([round(low + value * (high - low) / 255) for value in range(256)] * 3)
        return field.resize((SMALL, SMALL), Image.Resampling.BICUBIC)


@lru_cache(maxsize=1024)
def _background(kind: str, seed: int) -> Image.Image:
    """A small, muted picture, to be stretched over the scene. It has none of `COLORS`."""
    ground = _Ground(seed)
    PAINTERS[kind](ground, ground.rng)
    return Image.blend(ground.image, ground.noise(ground.rng.randint(16, 64), 60, 200), 0.12)


def _street(ground: _Ground, rng: random.Random):
    sky, horizon = ground.muted(130, 190), rng.randint(70, 95)
    ground.draw.rectangle((0, 0, SMALL, horizon), fill=sky)
    x = 0
    while x < SMALL:
        across, top = rng.randint(12, 34), rng.randint(8, horizon - 20)
        wall, window = ground.muted(), ground.muted(60, 200)
        ground.draw.rectangle((x, top, x + across, horizon), fill=wall)
        for row in range(top + 4, horizon - 6, 9):
            for column in range(x + 3, x + across - 4, 8):
                ground.draw.rectangle((column, row, column + 3, row + 4), fill=window)
        x += across + rng.randint(0, 4)
    ground.draw.rectangle((0, horizon, SMALL, horizon + 10), fill=ground.muted(110, 180, 8))
    ground.draw.rectangle((0, horizon + 10, SMALL, SMALL), fill=ground.muted(60, 110, 8))


def _bricks(ground: _Ground, rng: random.Random):
    down, across = rng.randint(5, 12), rng.randint(10, 26)
    for row, y in enumerate(range(0, SMALL, down)):
        for x in range(-across * (row % 2) // 2, SMALL, across):
            tone = ground.muted(95, 140, 14)
            ground.draw.rectangle((x, y, x + across - 2, y + down - 2), fill=tone)


def _hills(ground: _Ground, rng: random.Random):
    for level in range(4):
        base, tone = 25 + 28 * level, ground.muted()
        waves = [(rng.uniform(2, 12), rng.uniform(0.02, 0.09), rng.uniform(0, 6)) for _ in range(3)]
        ridge = [(x, base + sum(a * math.sin(f * x + p) for a, f, p in waves)) for x in range(0, SMALL + 4, 4)]
        ground.draw.polygon([*ridge, (SMALL, SMALL), (0, SMALL)], fill=tone)


def _clouds(ground: _Ground, rng: random.Random):
    ground.image = Image.blend(ground.image, ground.noise(rng.randint(3, 12), 60, 200), rng.uniform(0.3, 0.8))


def _stripes(ground: _Ground, rng: random.Random):
    step = rng.randint(6, 24)
    upright = rng.random() < 0.5
    tones = [ground.muted(), ground.muted()]
    for i, start in enumerate(range(0, SMALL, step)):
        band = (start, 0, start + step, SMALL) if upright else (0, start, SMALL, start + step)
        ground.draw.rectangle(band, fill=tones[i % 2])


def _harbor(ground: _Ground, rng: random.Random):
    shore = rng.randint(35, 70)
    ground.draw.rectangle((0, 0, SMALL, shore), fill=ground.muted(130, 190))
    for _ in range(6):
        x, across, top = rng.randint(-10, SMALL), rng.randint(10, 40), rng.randint(shore - 30, shore - 6)
        ground.draw.polygon(
            [(x, shore), (x, top), (x + across // 2, top - 8), (x + across, top), (x + across, shore)],
            fill=ground.muted(),
        )
    ground.draw.rectangle((0, shore, SMALL, SMALL), fill=ground.muted(80, 140, 12))
    for y in range(shore + 3, SMALL, 5):
        x = rng.randint(-20, SMALL)
        ground.draw.line((x, y, x + rng.randint(10, 60), y), fill=ground.muted(110, 170, 10))


def _tiles(ground: _Ground, rng: random.Random):
    step = rng.randint(8, 20)
    for y in range(0, SMALL, step):
        for x in range(0, SMALL, step):
            ground.draw.rectangle((x, y, x + step - 2, y + step - 2), fill=ground.muted(90, 170, 12))


PAINTERS = {
    "street": _street,
    "bricks": _bricks,
    "hills": _hills,
    "clouds": _clouds,
    "stripes": _stripes,
    "harbor": _harbor,
    "tiles": _tiles,
}
