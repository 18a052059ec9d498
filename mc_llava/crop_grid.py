"""The crop grid as a picture."""

import colorsys

from PIL import Image, ImageDraw, ImageFont

from . import Crop


def draw_crop_grid(image: Image.Image, plan: list[Crop]) -> Image.Image:
    """
    A copy of an RGB image with the crops of its plan as numbered frames, each with its number of tokens.

    Neighbors overlap by half, so frames are alternately inset and differ in color. Crop 0, the whole image, is the
    frame around everything.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    line = max(2, max(image.size) // 300)
    font = ImageFont.load_default(size=max(12, max(image.size) // 45))
    for index, crop in enumerate(plan):
        color = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(index * 0.381966 % 1, 0.9, 1))
        inset = line * (1 + index % 4) if index else 0
        left, top, right, bottom = crop.box
        # In an image of a few pixels, inset frames would meet: leave them where they are.
        inset = max(0, min(inset, (right - left) // 2 - line, (bottom - top) // 2 - line))
        draw.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=color, width=line)
        if index or len(plan) == 1:
            draw.text(
                ((left + right) / 2, (top + bottom) / 2),
                f"{index}\n{crop.num_tokens} tokens",
                fill=color,
                font=font,
                anchor="mm",
                align="center",
                stroke_width=line,
                stroke_fill="black",
            )
    return image


SCOUT, CLOSER = (150, 150, 150), ((255, 200, 0), (255, 90, 0), (255, 0, 90))  # the rounds, from the first to the third


def draw_looks(image: Image.Image, encoded) -> Image.Image:
    """
    A copy of an RGB image with the crops of an `EncodedImages` of this image.

    Of guided zoom's `ZoomedImages`, scouts are thin gray frames and the crops of later rounds bold ones, one color a
    round. The smaller a crop, the thinner its frame, so that what was looked at stays visible. Other crops are drawn
    as their grid.
    """
    (plan,) = encoded.plans
    if not hasattr(encoded, "crop_rounds"):
        return draw_crop_grid(image, plan)
    image = image.copy()
    draw = ImageDraw.Draw(image)
    thin = max(1, max(image.size) // 800)
    for crop, number in zip(plan, encoded.crop_rounds.tolist()):
        color = CLOSER[min(number, len(CLOSER)) - 1] if number else SCOUT
        left, top, right, bottom = crop.box
        width = max(thin + 1, min((right - left) // 30, (bottom - top) // 30, 5 * thin)) if number else thin
        # Each corner may coincide with the one before it: a crop of one pixel.
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=width)
    return image
