"""Turns scenes into pixels."""

import math
import random
from dataclasses import replace

from PIL import Image, ImageDraw

from .. import Box
from . import camera, materials
from .backgrounds import PAINTERS, background
from .fonts import font_size, load_font, text_width
from .scene import OBJECTS, Scene, Thing, move


def draw_scene(scene: Scene, box: Box | None = None) -> Image.Image:
    """
    Draw a scene, or only what lies in `box` (left, top, right, bottom in pixels of the scene).

    Returns:
        An RGB image of the scene's or the box's size.
    """
    left, top, right, bottom = box = box or (0, 0, scene.width, scene.height)
    image = _draw_background(scene, box)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        thing = move((thing,), -left, -top)[0]
        if thing.box[2] > 0 and thing.box[3] > 0 and thing.box[0] < image.width and thing.box[1] < image.height:
            if thing.corners is not None:
                camera.paste_flat(image, thing, _flat_picture(thing))
            else:
                (_draw_sign if thing.text else _draw_shape)(draw, thing)
    return image if scene.camera is None else camera.photographed(image, scene.camera)


def _draw_background(scene: Scene, box: Box) -> Image.Image:
    left, top, right, bottom = box
    size, resampling = (right - left, bottom - top), Image.Resampling.BILINEAR
    if scene.background in PAINTERS:
        ground = background(scene.background, scene.background_seed)
        x, y, across, down = 0.0, 0.0, ground.width, ground.height
    else:
        # A part of the photograph with the scene's proportions, at least a quarter of the largest there is.
        ground, rng = materials.photograph(scene.background), random.Random(scene.background_seed)
        scale = min(ground.width / scene.width, ground.height / scene.height) * rng.uniform(0.5, 1.0)
        across, down = scale * scene.width, scale * scene.height
        x, y = rng.uniform(0, ground.width - across), rng.uniform(0, ground.height - down)
    scale_x, scale_y = across / scene.width, down / scene.height
    part = (x + left * scale_x, y + top * scale_y, x + right * scale_x, y + bottom * scale_y)
    part = (*part[:2], min(part[2], ground.width), min(part[3], ground.height))
    return ground.resize(size, resampling, box=part, reducing_gap=None if scene.background in PAINTERS else 1.5)


def _flat_picture(thing: Thing) -> Image.Image:
    """A thing before the camera sees it at an angle: RGBA, of twice its size if it is small."""
    width, height = camera.flat_size(thing)
    if thing.picture is not None:
        return materials.cut_out(thing.picture).resize((width, height), Image.Resampling.BILINEAR)
    factor = 2 if thing.glyph < 30 else 1
    image = Image.new("RGBA", (width * factor, height * factor), (*thing.rgb, 0))
    flat = replace(thing, box=(0, 0, *image.size), glyph=thing.glyph * factor, corners=None)
    draw = ImageDraw.Draw(image)
    if thing.text:
        _draw_plate(draw, flat)
    else:
        _draw_shape(draw, flat)
    return image


def _draw_sign(draw: ImageDraw.ImageDraw, thing: Thing):
    left, top, right, bottom = thing.box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=thing.rgb)
    _draw_text(draw, thing, INK[_is_dark(thing)][0])


def _draw_plate(draw: ImageDraw.ImageDraw, thing: Thing):
    """A sign whose corners may be round, with a line around and ink in other colors: all follow from the sign."""
    rng = random.Random(f"{thing.text} {thing.rgb}")
    _, _, right, bottom = thing.box
    ink = rng.choice(INK[_is_dark(thing)]) if rng.random() < 0.3 else INK[_is_dark(thing)][0]
    line = max(1, round(0.08 * thing.glyph)) if rng.random() < 0.25 else 0
    radius = rng.uniform(0.1, 0.3) * bottom if rng.random() < 0.35 else 0
    draw.rounded_rectangle((0, 0, right - 1, bottom - 1), radius, fill=thing.rgb, outline=ink, width=line)
    _draw_text(draw, thing, ink)


def _is_dark(thing: Thing) -> bool:
    return sum(thing.rgb) < 400 and thing.color != "orange"


# On bright plates and on dark ones, the usual one first.
INK = (((10, 10, 10), (90, 10, 20), (10, 20, 90), (20, 60, 30)), ((250, 250, 250), (250, 240, 200), (200, 235, 250)))


def _draw_text(draw: ImageDraw.ImageDraw, thing: Thing, ink: tuple[int, int, int]):
    _, top, _, bottom = thing.box
    font = load_font(thing.font, font_size(thing.font, thing.glyph)[0])
    baseline = (top + bottom) / 2 + thing.glyph / 2
    for character, center in zip(thing.text, character_centers(thing)):
        draw.text((center[0], baseline), character, fill=ink, font=font, anchor="ms")


def character_centers(thing: Thing) -> list[tuple[float, float]]:
    """The middle of each of a sign's characters, (x, y) in pixels of the scene."""
    size = font_size(thing.font, thing.glyph)[0]
    x = (0.0 if thing.corners else thing.center[0]) - text_width(thing.font, size, thing.text) / 2
    middles = []
    for character in thing.text:
        advance = text_width(thing.font, size, character)
        middles.append(x + advance / 2)
        x += advance
    if thing.corners:
        width, _ = camera.flat_size(thing)
        return [camera.from_flat(thing, 0.5 + middle / width, 0.5) for middle in middles]
    return [(middle, thing.center[1]) for middle in middles]


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
