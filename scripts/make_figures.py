"""
Draw `docs/answers.jpg`, one question about a photograph, asked with more and more crops and with zoom, and
`docs/looks.jpg`, where zoom looked.

    python scripts/make_figures.py

Of the first, each column shows the crops over the photograph, what is asked about as the vision tower gets it in the
sharpest of these crops, and the answer of the command at the top of the column, which this script runs.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mc_llava.loading import load_processor
from mc_llava.scenes import is_correct
from mc_llava.scenes.scene import contains


ROOT = Path(__file__).parent.parent
EXAMPLES = json.loads((ROOT / "examples" / "questions.json").read_text())
(EXAMPLE,) = (example for example in EXAMPLES if "box" in example)
PICTURE = ROOT / "examples" / EXAMPLE["image"]
OPTIONS = ("--max-crops 0", "--max-crops 8", "--max-crops 32", "--max-crops 18 --zoom 2")

# In pixels of the figure, which the README shows at half its size.
WIDTH, GAP = 384, 20  # of a column, and between two columns
TITLE, VIEW, REPLY = 50, 260, 100  # heights
COLORS = ((255, 96, 64), (64, 200, 255), (255, 224, 64), (120, 255, 120))
RIGHT, WRONG, GREY = (0, 120, 40), (190, 30, 30), (80, 80, 80)

Box = tuple[float, float, float, float]  # left, top, right, bottom


def ask(*options) -> dict:
    """The output of `mc-llava ask --json`."""
    command = [sys.executable, "-m", "mc_llava", "ask", PICTURE, EXAMPLE["question"], "--json", *options]
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


def view(picture: Image.Image, box: Box, boxes: list[Box], side: int) -> Image.Image:
    """A box as the tower gets it in the smallest crop that contains it, enlarged to `VIEW` pixels of height."""
    left, top, right, bottom = box
    x0, y0, x1, y1 = min((other for other in boxes if contains(other, box)), key=lambda box: box[2] - box[0])
    across, down = side / (x1 - x0), side / (y1 - y0)
    place = (
        math.floor((left - x0) * across),
        math.floor((top - y0) * down),
        math.ceil((right - x0) * across),
        math.ceil((bottom - y0) * down),
    )
    crop = picture.crop((x0, y0, x1, y1)).resize((side, side), Image.Resampling.BICUBIC)
    return crop.crop(place).resize((round(VIEW * (right - left) / (bottom - top)), VIEW), Image.Resampling.NEAREST)


def draw_column(picture: Image.Image, options: str, processor) -> Image.Image:
    reply = ask(*options.split())
    if looked_at := reply.get("looked_at"):
        boxes = [crop["box"] for crop in looked_at]
    else:
        boxes = processor(picture, max_crops=int(options.split()[1]))["crop_boxes"].tolist()
    grid = draw_frames(picture, boxes)

    column = Image.new("RGB", (WIDTH, TITLE + grid.height + GAP + VIEW + REPLY), "white")
    column.paste(grid, (0, TITLE))
    seen = view(picture, EXAMPLE["box"], boxes, processor.size["height"])
    column.paste(seen, ((WIDTH - seen.width) // 2, TITLE + grid.height + GAP))
    draw = ImageDraw.Draw(column)
    large, small = ImageFont.load_default(size=34), ImageFont.load_default(size=26)
    below = column.height - REPLY
    color = RIGHT if is_correct(EXAMPLE["key"], reply["answer"]) else WRONG
    crops = f"{len(boxes)} crop{'s' if len(boxes) > 1 else ''}, {reply['image_tokens']} tokens"
    draw.text((WIDTH / 2, TITLE / 2), options, "black", small, anchor="mm")
    draw.text((WIDTH / 2, below + 32), reply["answer"], color, large, anchor="mm")
    draw.text((WIDTH / 2, below + 74), crops, GREY, small, anchor="mm")
    return column


def main():
    picture = Image.open(PICTURE).convert("RGB")
    processor = load_processor("tiny").image_processor
    columns = [draw_column(picture, options, processor) for options in OPTIONS]

    figure = Image.new("RGB", (len(columns) * (WIDTH + GAP) - GAP, columns[0].height), "white")
    for index, column in enumerate(columns):
        figure.paste(column, (index * (WIDTH + GAP), 0))
    figure.save(ROOT / "docs" / "answers.jpg", quality=88)
    ask(*OPTIONS[-1].split(), "--show", ROOT / "docs" / "looks.jpg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # without it, --help would write
    main()
