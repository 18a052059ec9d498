"""
Draw `docs/answers.jpg`, one question, asked with more and more crops, and `docs/looks.jpg`, where zoom looks for it.

    python scripts/make_figures.py

Of the first, each column shows the crops over the scene, the sign as the vision tower gets it in the sharpest of these
crops, and the answer of the command at the top of the column, which this script runs.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mc_llava import scenes
from mc_llava.loading import load_processor


ROOT = Path(__file__).parent.parent
PICTURE, SCENE, SIGN = ROOT / "examples" / "scene1.jpg", 1054, "blue"
QUESTION, ANSWER = "What is written on the blue sign?", "3ZE"
MAX_CROPS = (0, 4, 8, 32)

# In pixels of the figure, which the README shows at half its size.
WIDTH, GAP = 384, 20  # of a column, and between two columns
TITLE, VIEW, REPLY = 50, 200, 100  # heights
COLORS = ((255, 96, 64), (64, 200, 255), (255, 224, 64), (120, 255, 120))
RIGHT, WRONG, GREY = (0, 120, 40), (190, 30, 30), (80, 80, 80)

Box = tuple[float, float, float, float]  # left, top, right, bottom


def ask(max_crops: int, *options) -> dict:
    """The output of `mc-llava ask --json`."""
    command = [sys.executable, "-m", "mc_llava", "ask", PICTURE, QUESTION, "--max-crops", str(max_crops), "--json"]
    command += options
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def draw_frames(picture: Image.Image, boxes: list[Box]) -> Image.Image:
    """The picture, `WIDTH` pixels wide, with thin frames. Neighbors overlap, so their insets differ."""
    scale = WIDTH / picture.width
    small = picture.resize((WIDTH, round(picture.height * scale)), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    for index, box in enumerate(boxes):
        left, top, right, bottom = (value * scale for value in box)
        inset = 3 * (index % 4)
        corners = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
        draw.rectangle(corners, outline=COLORS[index % 4], width=2)
    return small


def view(box: Box, boxes: list[Box], pixels) -> Image.Image:
    """
    A box as the tower gets it in the smallest crop that contains it, enlarged.

    Args:
        box: in pixels of the picture.
        boxes: the boxes of the crops.
        pixels: float[crops, 3, side, side] in [-1, 1].
    """
    left, top, right, bottom = box
    holding = [
        index
        for index, (x0, y0, x1, y1) in enumerate(boxes)
        if x0 <= left and y0 <= top and x1 >= right and y1 >= bottom
    ]
    index = min(holding, key=lambda index: boxes[index][2] - boxes[index][0])
    x0, y0, x1, y1 = boxes[index]
    side = pixels.shape[-1]
    across, down = side / (x1 - x0), side / (y1 - y0)
    place = (
        math.floor((left - x0) * across),
        math.floor((top - y0) * down),
        math.ceil((right - x0) * across),
        math.ceil((bottom - y0) * down),
    )
    crop = Image.fromarray(((pixels[index].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    return crop.crop(place).resize((WIDTH, VIEW), Image.Resampling.NEAREST)


def draw_column(picture: Image.Image, max_crops: int, processor, sign: Box) -> Image.Image:
    reply = ask(max_crops)
    inputs = processor(picture, max_crops=max_crops, return_tensors="pt")
    boxes = inputs["crop_boxes"].tolist()
    grid = draw_frames(picture, boxes)

    column = Image.new("RGB", (WIDTH, TITLE + grid.height + GAP + VIEW + REPLY), "white")
    column.paste(grid, (0, TITLE))
    column.paste(view(sign, boxes, inputs["pixel_values"]), (0, TITLE + grid.height + GAP))
    draw = ImageDraw.Draw(column)
    large, small = ImageFont.load_default(size=34), ImageFont.load_default(size=26)
    below = column.height - REPLY
    color = RIGHT if ANSWER in reply["answer"] else WRONG
    crops = f"{len(boxes)} crop{'s' if len(boxes) > 1 else ''}, {reply['image_tokens']} tokens"
    draw.text((WIDTH / 2, TITLE / 2), f"--max-crops {max_crops}", "black", large, anchor="mm")
    draw.text((WIDTH / 2, below + 32), reply["answer"], color, large, anchor="mm")
    draw.text((WIDTH / 2, below + 74), crops, GREY, small, anchor="mm")
    return column


def main():
    picture = Image.open(PICTURE).convert("RGB")
    processor = load_processor("tiny").image_processor
    things = scenes.make_scene(SCENE, "test").things
    (sign,) = (thing.box for thing in things if (thing.name, thing.color) == ("sign", SIGN))
    columns = [draw_column(picture, max_crops, processor, sign) for max_crops in MAX_CROPS]

    figure = Image.new("RGB", (len(columns) * (WIDTH + GAP) - GAP, columns[0].height), "white")
    for index, column in enumerate(columns):
        figure.paste(column, (index * (WIDTH + GAP), 0))
    figure.save(ROOT / "docs" / "answers.jpg", quality=88)
    ask(16, "--zoom", "1", "--show", ROOT / "docs" / "looks.jpg")


if __name__ == "__main__":
    main()
