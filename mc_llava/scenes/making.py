"""Makes scenes: which things are in them, how large they are and where they lie."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .. import Box, plan_crops
from .camera import seen_at_an_angle
from .fonts import font_size, text_width
from .materials import cut_out
from .scene import (
    BACKGROUNDS,
    CHARACTERS,
    COLORS,
    FONTS,
    LARGE,
    LEGIBLE,
    OBJECTS,
    SHADES,
    SHAPES,
    SIDE,
    SIZES,
    SPLITS,
    Scene,
    Size,
    Thing,
    distance,
    legible_height,
    move,
    outline,
)


# Of a cut-out object, over that of a sign's capitals. At 1.7 to 2.6, about 17 pixels of the tower, half of the objects
# in a style that was never trained on were taken for others.
OBJECT_HEIGHTS = 2.6, 3.6


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
    casts = _casts(rng)
    groups = [_make_large(rng, width, height, casts)] if large else []

    def made(signs: list, shapes: list) -> tuple[Thing, ...]:
        return make_group(rng, small_glyph(rng, height, size), signs, shapes, FONTS[split])

    makers = [partial(made, *cast) for cast in casts]
    return place(rng, width, height, makers, legible_crops(width, height, size), groups)


def small_glyph(rng: random.Random, height: int, size: Size) -> float:
    return rng.uniform(0.8, 0.98) * size.illegible * height / SIDE


def legible_crops(width: int, height: int, size: Size) -> list[Box]:
    """The boxes of the grid in which glyphs of a size can be read."""
    return [crop.box for crop in plan_crops(width, height, size.crops, 10**6, SIDE, 8)[1:]]


def place(
    rng: random.Random,
    width: int,
    height: int,
    makers: list[Callable[[], tuple[Thing, ...]]],
    crops: list[Box],
    groups: list[tuple[Thing, ...]],
    optional: int = 0,
) -> tuple[tuple[Thing, ...], ...] | None:
    """
    Make groups and lay them apart from each other, where some crop shows them legibly.

    Args:
        makers: each makes a group, another one at every call.
        groups: have their places already.
        optional: how many of the last makers' groups may be left out if there is no place.

    Returns:
        All groups; None if there is no place for one.
    """
    gap = 0.2 * min(crops[0][2], crops[0][3])
    for number, make in enumerate(makers):
        for _ in range(60):
            group = make()
            left, top, right, bottom = outline(group)
            if right >= width or bottom >= height:
                continue
            group = move(group, rng.randint(0, int(width - right)), rng.randint(0, int(height - bottom)))
            apart = all(distance(outline(group), outline(other)) >= gap for other in groups)
            if apart and legible_height(outline(group), min(thing.glyph for thing in group), crops) >= LEGIBLE:
                groups.append(group)
                break
        else:
            if number < len(makers) - optional:
                return None
    return tuple(groups)


def _make_large(rng: random.Random, width: int, height: int, casts: list[tuple[list, list]]) -> tuple[Thing]:
    """A shape or object whose box fills a share of `LARGE` of the picture, with a name that no small one has."""
    small = [name for _, shapes in casts for name, _ in shapes]
    name, color = rng.choice([name for name in SHAPES + OBJECTS if name not in small]), rng.choice(list(COLORS))
    area = rng.uniform(*LARGE) * width * height
    shape = make_shape(rng, min(height - 1, math.sqrt(area / _aspect(name))), name, color, real=False)
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


def make_group(
    rng: random.Random,
    glyph: float,
    signs: list,
    shapes: list,
    fonts: tuple,
    objects: list = (),
    real: bool = False,
) -> tuple[Thing, ...]:
    """
    Things side by side or one above the other, the outline's corner at (0, 0).

    Args:
        glyph: height of the signs' capitals in pixels.
        signs: (color, text) of each.
        shapes: (name, color) of each.
        fonts: names to choose from, as in `FONTS`.
        objects: (name, file) of each cut-out object.
        real: seen at an angle, in shades that people choose; cut-out objects always are.
    """
    things = [make_sign(rng, glyph, color, text, rng.choice(fonts), real) for color, text in signs]
    things += [make_shape(rng, glyph * rng.uniform(1.15, 1.6), name, color, real) for name, color in shapes]
    things += [make_object(glyph * rng.uniform(*OBJECT_HEIGHTS), name, path) for name, path in objects]
    things = [seen_at_an_angle(rng, thing) if real or thing.picture else thing for thing in things]
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


def make_sign(rng: random.Random, glyph: float, color: str, text: str, font: str | None, real: bool) -> Thing:
    size, height = font_size(font, glyph)
    margin = height * rng.uniform(0.3, 0.55)
    width = text_width(font, size, text) + 2 * margin
    box = (0, 0, round(width), round(height + 2 * margin))
    return Thing("sign", color, _shade(rng, color, real), box, height, text, font)


def make_shape(rng: random.Random, height: float, name: str, color: str, real: bool) -> Thing:
    box = (0, 0, round(height * _aspect(name)), round(height))
    return Thing(name, color, _shade(rng, color, real), box, height)


def _aspect(name: str) -> float:
    return 1.6 if name in ("car", "boat") else 1.0


def make_object(side: float, name: str, path: str) -> Thing:
    across, down = cut_out(path).size
    scale = side / max(across, down)
    width, height = max(1, round(across * scale)), max(1, round(down * scale))
    return Thing(name, "", (0, 0, 0), (0, 0, width, height), math.sqrt(width * height), picture=path)


def _shade(rng: random.Random, color: str, real: bool = False) -> tuple[int, int, int]:
    usual, spread = (rng.choice((COLORS[color], *SHADES[color])), 20) if real else (COLORS[color], 12)
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in usual)
