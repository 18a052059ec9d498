"""Where the crops of an image are and how many tokens each of them gives. Integers only: no pixels, no tensors."""

import operator
from difflib import get_close_matches
from typing import NamedTuple


# The published model's values: SigLIP so400m reads 384 x 384 pixels in patches of 14 x 14.
SIDE, PATCH_SIZE = 384, 14
MAX_CROPS, NUM_TOKENS = 100, 728
# Crops of one image, however large the knobs are: each needs a token of the context, and at side 384 their pixels take
# 7 GB.
MOST_CROPS = 4096
MAX_SIDE = 10**6  # of an image, in pixels; far more than are decoded
# The smallest value of each of the image processor's knobs.
KNOB_MINIMA = {"max_crops": 0, "num_tokens": 1, "zoom": 0, "patch_size": 1}
# The fields in which the model gets images from the image processor, and those that guided zoom needs as well. The
# last one, of text, is the processor's.
IMAGE_FIELDS = ("pixel_values", "crop_boxes", "crop_coords", "crop_num_tokens", "image_grid_thw")
ZOOM_FIELDS = ("zoom_options", "zoom_pictures", "zoom_values", "zoom_general_ids")


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the picture


class Crop(NamedTuple):
    """A box in pixels of the picture after its EXIF orientation was applied, and how many of its tokens are kept."""

    box: Box
    num_tokens: int


def center_of(box: Box, width: int, height: int) -> tuple[float, float]:
    """The center of a box in an image of width x height pixels, as (x / width, y / height)."""
    left, top, right, bottom = box
    return (left + right) / 2 / width, (top + bottom) / 2 / height


def plan_crops(width: int, height: int, max_crops: int, num_tokens: int, side: int, patch_size: int) -> list[Crop]:
    r"""
    Lay an overlapping grid of crops over an image and share `num_tokens` tokens among them.

    Both knobs are upper bounds. In addition to the whole image there are at most `max_crops` crops, and at most
    `num_tokens - 1`; all crops together give at most `num_tokens` tokens.

    A base side c starts at `side` and grows in steps of 10 until a grid with stride s = c // 2 has few enough crops.
    Column i spans [i * s, i * s + c]; the last one extends to the right edge. Rows likewise. For 1000 x 700 pixels,
    side 384 and at least 8 crops, c = 384 and s = 192, and the grid has 4 columns and 2 rows:

        0    192   384   576   768   1000
        |--- 1, 2 ---|     |              |          crop 0 is the whole image; then columns from left
              |--- 3, 4 ---|              |          to right, and in each the crops from top to bottom
                    |--- 5, 6 ---|        |
                          |---- 7, 8 -----|

    Args:
        width, height: size of the image in pixels.
        max_crops: upper bound of the crops in addition to the whole image, at least 0.
        num_tokens: upper bound of the image's tokens, at least 1.
        side: side of the square that the vision tower reads, in pixels; also the smallest base side.
        patch_size: side of one of the tower's patches, in pixels.

    Returns:
        The crops in the order of their tokens, the whole image first.

    Raises:
        ValueError: if a knob or a side is out of range, `side` has fewer than two patches, or there are more than
            `MOST_CROPS` crops, the whole image included.
    """
    check_sides(width, height)
    max_crops = check_knob("max_crops", max_crops)
    num_tokens = check_knob("num_tokens", num_tokens)

    max_tokens_per_crop(side, patch_size)  # or `side` is too small
    base, columns, rows = plan_grid(width, height, min(max_crops, num_tokens - 1), side)
    stride = base // 2
    check_crop_count(columns * rows + (columns * rows > 1))
    boxes = [(0, 0, width, height)]
    if columns * rows > 1:
        for column in range(columns):
            for row in range(rows):
                left, top = column * stride, row * stride
                right = width if column == columns - 1 else left + base
                bottom = height if row == rows - 1 else top + base
                boxes.append((left, top, right, bottom))
    return share_tokens(boxes, num_tokens, side, patch_size)


def plan_grid(width: int, height: int, limit: int, side: int) -> tuple[int, int, int]:
    """
    The base side, columns and rows of the grid of at most `limit` crops; one of each if there is none. With a base of
    `side`, the crops show every pixel of the image.
    """
    columns = rows = 1
    base = side
    if limit > 0 and max(width, height) > side + side // 2:
        base = side - 10
        columns = rows = limit + 1
        while columns * rows > limit:
            base += 10
            stride = base // 2
            columns = max(1, (width - base) // stride + 1)
            rows = max(1, (height - base) // stride + 1)
    return base, columns, rows


def share_tokens(boxes: list[Box], num_tokens: int, side: int, patch_size: int) -> list[Crop]:
    """
    Share at most `num_tokens` tokens among crops with these boxes.

    Each of M crops gives num_tokens // M tokens and the last one the rest, but none more than `max_tokens_per_crop`.
    With 728 tokens and side 384, each of 9 crops gives 80 and the last one 88.

    Raises:
        ValueError: if there are more boxes than tokens, or `side` has fewer than two patches.
    """
    most = max_tokens_per_crop(side, patch_size)
    if len(boxes) > num_tokens:
        raise ValueError(f"{len(boxes)} crops need a token each, num_tokens is {num_tokens}: raise it, or pass fewer")
    share = num_tokens // len(boxes)
    shares = [share] * (len(boxes) - 1) + [num_tokens - share * (len(boxes) - 1)]
    return [Crop(box, min(share, most)) for box, share in zip(boxes, shares)]


def max_tokens_per_crop(side: int, patch_size: int) -> int:
    """
    All of a crop's patches but one.

    The published model drops the first patch of every crop (as if SigLIP had a class token), and its weights were
    trained that way.

    Raises:
        ValueError: if `side` has fewer than two patches.
    """
    most = (check_knob("size", side, 1) // check_knob("patch_size", patch_size)) ** 2 - 1
    if most < 1:
        raise ValueError(
            f"size {side} must hold at least 2 x 2 patches, got patch_size {patch_size}: lower it or raise size"
        )
    return most


def check_plan(plan, width: int, height: int, num_tokens: int, side: int, patch_size: int) -> list[Crop]:
    """
    Check a caller's plan for an image of width x height pixels and return it as a list of `Crop`.

    Args:
        plan: `Crop`s (box and tokens, as `plan_crops` returns them), or boxes alone (left, top, right, bottom), among
            which `num_tokens` tokens are shared. Boxes may overlap, differ in size and lie anywhere in the image.
            Lists, arrays and tensors are accepted.

    Raises:
        ValueError: if the plan is empty, mixes the two forms or has more than `MOST_CROPS` crops, a number is not an
            integer, a box is empty or extends beyond the image, or a crop can't give its number of tokens.
    """
    plan = plan.tolist() if hasattr(plan, "tolist") else plan
    entries = list(plan) if isinstance(plan, (list, tuple)) else [plan]
    check_crop_count(len(entries))
    entries = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in entries]
    lengths = {len(entry) if isinstance(entry, (list, tuple)) else 0 for entry in entries}
    if lengths not in ({2}, {4}):
        raise ValueError(
            "a plan must be a list of boxes (left, top, right, bottom), or of crops (box, tokens), and hold at least "
            f"one, got {entries!r:.200}"
        )
    boxes = [_check_box(entry[0] if lengths == {2} else entry, width, height) for entry in entries]
    if lengths == {4}:
        return share_tokens(boxes, check_knob("num_tokens", num_tokens), side, patch_size)
    most = max_tokens_per_crop(side, patch_size)
    crops = [Crop(box, check_knob("a crop's tokens", entry[1], 1)) for box, entry in zip(boxes, entries)]
    if (largest := max(crop.num_tokens for crop in crops)) > most:
        raise ValueError(f"a crop gives at most {most} tokens, the plan asks for {largest}: lower it")
    return crops


def check_plans(plans, num_images: int | None = None) -> list:
    """
    `plans` as a list.

    Raises:
        ValueError: if it is not a list with a list, an array or a tensor for each image, or not of `num_images`.
    """
    is_list = isinstance(plans, (list, tuple))
    if not is_list or not all(isinstance(plan, (list, tuple)) or hasattr(plan, "tolist") for plan in plans):
        raise ValueError(f"plans must be a list with a plan for each image, each a list of boxes, got {plans!r:.200}")
    if num_images is not None and len(plans) != num_images:
        raise ValueError(f"got {len(plans)} plans for {num_images} images: pass a plan for each image, in order")
    return list(plans)


def make_plans(
    sizes: list[tuple[int, int]],
    plans: list | None,
    max_crops: int,
    num_tokens: int,
    side: int,
    patch_size: int,
) -> list[list[Crop]]:
    """
    The plan of each image, given the images' sizes (width, height): the one in `plans`, or by default the usual grid.

    Raises:
        ValueError: as `check_plan` and `plan_crops` do, or if the numbers of plans and images differ.
    """
    if plans is None:
        return [plan_crops(*size, max_crops, num_tokens, side, patch_size) for size in sizes]
    plans = check_plans(plans, len(sizes))
    return [check_plan(plan, *size, num_tokens, side, patch_size) for size, plan in zip(sizes, plans)]


def check_sides(width: int, height: int):
    """Raise a ValueError unless an image has 1 to `MAX_SIDE` pixels a side."""
    if max(check_knob("width", width, 1), check_knob("height", height, 1)) > MAX_SIDE:
        raise ValueError(f"an image may have {MAX_SIDE} pixels a side, got {width} x {height}: resize it")


def check_crop_count(crops: int):
    """Raise a ValueError if an image would have more than `MOST_CROPS` crops."""
    if crops > MOST_CROPS:
        raise ValueError(f"{crops} crops of one image, at most {MOST_CROPS} are possible: lower the knobs")


def _check_box(box, width: int, height: int) -> Box:
    if hasattr(box, "tolist"):
        box = box.tolist()
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise ValueError(f"a box must be four integers (left, top, right, bottom), got {box!r:.100}")
    left, top, right, bottom = (_to_integer("a box's edge", edge) for edge in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the box {(left, top, right, bottom)} is empty or extends beyond the {width} x {height} pixels of its "
            "picture: pass 0 <= left < right <= width and 0 <= top < bottom <= height"
        )
    return left, top, right, bottom


def check_knob(name: str, value: int, minimum: int | None = None) -> int:
    """
    `value` as an int.

    Raises:
        ValueError: if it is not an integer, or below `minimum`, by default that in `KNOB_MINIMA`.
    """
    minimum = KNOB_MINIMA[name] if minimum is None else minimum
    value = _to_integer(name, value, f" of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def _to_integer(name: str, value, bound: str = "") -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # accepts NumPy's integers, rejects 2.0
    except TypeError:
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}") from None


def refuse_unknown(names, known: set[str]):
    """Raise a ValueError if any of `names` is unknown, and suggest the most similar known ones."""
    if unknown := sorted(set(names) - known):
        hints = [hint for name in unknown for hint in get_close_matches(name, known, n=1)]
        remedy = f"did you mean {', '.join(hints)}?" if hints else "leave them out"
        raise ValueError(f"unknown options {', '.join(unknown)}: {remedy}")


__all__ = [
    "Box",
    "Crop",
    "IMAGE_FIELDS",
    "KNOB_MINIMA",
    "MAX_CROPS",
    "MAX_SIDE",
    "MOST_CROPS",
    "NUM_TOKENS",
    "PATCH_SIZE",
    "SIDE",
    "ZOOM_FIELDS",
    "center_of",
    "check_knob",
    "check_crop_count",
    "check_plan",
    "check_plans",
    "check_sides",
    "make_plans",
    "max_tokens_per_crop",
    "plan_crops",
    "plan_grid",
    "refuse_unknown",
    "share_tokens",
]
