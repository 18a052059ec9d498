"""What a camera does to a scene: things are seen at an angle, and pictures have blur, noise and JPEG's artifacts."""

import io
import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .scene import Thing


TURN = 9.0  # degrees at most, that a thing is turned by
SKEW = 0.06  # of its sides at most, that a corner is moved by


def seen_at_an_angle(rng: random.Random, thing: Thing, gentle: bool = False) -> Thing:
    """A thing at (0, 0), turned a little and in perspective; its box, again at (0, 0), holds all of it."""
    _, _, width, height = thing.box
    angle = math.radians(rng.uniform(-TURN, TURN) * (0.3 if gentle else 1))
    corners = []
    for x, y in ((0, 0), (width, 0), (width, height), (0, height)):
        x += rng.uniform(-SKEW, SKEW) * min(width, height)
        y += rng.uniform(-SKEW, SKEW) * min(width, height)
        corners.append((x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)))
    left, top = (min(axis) for axis in zip(*corners))
    corners = tuple((x - left, y - top) for x, y in corners)
    right, bottom = (math.ceil(max(axis)) for axis in zip(*corners))
    return replace(thing, box=(0, 0, right, bottom), corners=corners)


def flat_size(thing: Thing) -> tuple[int, int]:
    """Width and height of the rectangle whose corners a camera sees."""
    corners = thing.corners
    across = (math.dist(corners[0], corners[1]) + math.dist(corners[3], corners[2])) / 2
    down = (math.dist(corners[0], corners[3]) + math.dist(corners[1], corners[2])) / 2
    return max(1, round(across)), max(1, round(down))


def from_flat(thing: Thing, x: float, y: float) -> tuple[float, float]:
    """Where the camera sees a point of the flat rectangle, (0, 0) to (1, 1)."""
    (a, b), (c, d), (e, f), (g, h) = thing.corners
    upper, lower = (a + x * (c - a), b + x * (d - b)), (g + x * (e - g), h + x * (f - h))
    return upper[0] + y * (lower[0] - upper[0]), upper[1] + y * (lower[1] - upper[1])


def paste_flat(image: Image.Image, thing: Thing, flat: Image.Image):
    """Paste the flat RGBA picture of a thing where the camera sees it. Only what lies in the image is computed."""
    left, top = max(0, thing.box[0]), max(0, thing.box[1])
    right, bottom = min(image.width, thing.box[2] + 1), min(image.height, thing.box[3] + 1)
    if right <= left or bottom <= top:
        return
    seen = [(x - left, y - top) for x, y in thing.corners]
    corners = ((0, 0), (flat.width, 0), (flat.width, flat.height), (0, flat.height))
    part = flat.transform(
        (right - left, bottom - top),
        Image.Transform.PERSPECTIVE,
        perspective(seen, corners),
        Image.Resampling.BICUBIC,
    )
    image.paste(part, (left, top), part)


def perspective(seen, corners) -> list[float]:
    """The eight numbers by which Pillow finds the point of the flat picture for a point that is seen."""
    rows, values = [], []
    for (x, y), (u, v) in zip(seen, corners):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.linalg.solve(np.array(rows, float), np.array(values, float)).tolist()


@cache
def noise_field() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((512, 512, 3)).astype(np.float32)


def photographed(image: Image.Image, seed: int) -> Image.Image:
    """The picture as a camera would save it: blur, exposure, contrast, a cast of color, noise, JPEG."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    gamma, gain = math.exp(rng.uniform(-0.22, 0.22)), rng.uniform(0.85, 1.08)
    curves = []
    for _ in range(3):
        cast = gain * rng.uniform(0.96, 1.04)
        curves += np.minimum(255, 255 * cast * (np.arange(256) / 255) ** gamma).round().astype(int).tolist()
    image = image.point(curves)
    if rng.random() < 0.5:
        image = with_noise(image, rng.uniform(1.5, 8), rng)
    if rng.random() < 0.3:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(45, 92))
        image = Image.open(file).convert("RGB")
    return image


def with_noise(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    field = noise_field()
    across, down = -(-image.width // len(field)), -(-image.height // len(field))
    shift = rng.randrange(len(field)), rng.randrange(len(field))
    if across == down == 1:
        rows = (np.arange(image.height) + shift[0]) % len(field)
        start = min(shift[1], len(field) - image.width)
        noise = field[rows, start : start + image.width]
    else:
        noise = np.tile(np.roll(field, shift, (0, 1)), (down + 1, across + 1, 1))[: image.height, : image.width]
    pixels = np.asarray(image).astype(np.float32) + strength * noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
