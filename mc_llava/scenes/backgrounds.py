"""The drawn backgrounds of scenes."""

import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw


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
def background(kind: str, seed: int) -> Image.Image:
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
