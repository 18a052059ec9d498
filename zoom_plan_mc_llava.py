"""Where guided zoom looks: at a coarse grid first, then more closely where a question points. Integers only."""

from .crops_mc_llava import (
    Box,
    Crop,
    check_crop_count,
    check_knob,
    check_sides,
    max_tokens_per_crop,
    plan_crops,
    plan_grid,
)


# A round covers a region with 2 x 2 crops, or with 3 x 2 that also cover a margin of a sixth of its width on the left
# and on the right, into which a sign at its edge may extend. Signs are wider than they are tall, so scouts, which
# overlap, rarely cut one at the top or the bottom; a thing that is taller may be cut there. The crops overlap so much
# that a thing at a seam lies whole in one of them. All of it was chosen on development scenes, like how
# `split_budget` divides crops; see docs/tiny.md.
FEW, MANY = 4, 6
OVERLAP = (2, 5)
MARGINS = {FEW: (0, 1), MANY: (1, 6)}
SCOUT_OVERLAP = (1, 8)
LEAST_SCOUTS = 6  # before 3 x 2 crops are affordable
WORTH_A_LOOK = (1, 1000)  # the least part of the relevance for which a closer look pays


def split_budget(max_crops: int, rounds: int) -> tuple[int, int, int, int]:
    """
    Divide `max_crops` crops among scouts and rounds of looking closer.

    Each round covers one region with `MANY` crops, or several as long as all rounds together take at most two thirds
    of the crops; the remaining crops scout. 64 crops are 28 scouts and 2 rounds of 3 regions, or 28 scouts and 3
    rounds of 2.

    Returns:
        rounds (fewer if the crops don't suffice), scouts, regions per round, crops per region. With fewer than 12
        crops there is one round of `FEW`, with fewer than 8 there is none.
    """
    if rounds < 1 or max_crops < 2 * FEW:
        return 0, max_crops, 0, 0
    if max_crops < LEAST_SCOUTS + MANY:
        return 1, max_crops - FEW, 1, FEW
    rounds = min(rounds, (max_crops - LEAST_SCOUTS) // MANY)
    regions = max(1, 2 * max_crops // (3 * rounds * MANY))
    return rounds, max_crops - rounds * regions * MANY, regions, MANY


def plan_rounds(crops: int, zoom: int, max_crops: int, num_tokens: int) -> tuple[int, int, int]:
    """
    How a picture with these scouts is looked at: as `split_budget` says, but in no more rounds than the knobs have
    room for. `num_tokens`, which the scouts got, may be fewer than were asked for.

    Args:
        crops: the whole picture and its scouts.

    Returns:
        rounds, regions per round, crops per region.
    """
    rounds, _, regions, per_region = split_budget(min(max_crops, num_tokens - 1), zoom)
    room = min(max_crops + 1, num_tokens) - crops
    return min(rounds, room // max(1, regions * per_region)), regions, per_region


def count_closer(width: int, height: int, zoom: int, max_crops: int, num_tokens: int, side: int) -> tuple[int, int]:
    """
    How often zoom looks closer at a picture of this size, and at how many crops at most in all.

    Both are 0 if `explain_no_zoom` has a reason.
    """
    if explain_no_zoom(width, height, zoom, max_crops, num_tokens, side):
        return 0, 0
    rounds, _, regions, per_region = split_budget(min(max_crops, num_tokens - 1), zoom)
    return rounds, rounds * regions * per_region


def explain_no_zoom(width: int, height: int, zoom: int, max_crops: int, num_tokens: int, side: int) -> str:
    """Why zoom never looks closer at a picture of this size; empty if it may."""
    limit = min(max_crops, num_tokens - 1)
    base, columns, rows = plan_grid(width, height, limit, side)
    if zoom < 1:
        return "zoom is 0"
    if split_budget(limit, zoom)[0] < 1:
        return f"it needs max_crops of at least {2 * FEW} and num_tokens of at least {2 * FEW + 1}"
    if columns * rows == 1:
        return "the picture is too small for a grid"
    return "the grid shows every pixel already; lower max_crops to zoom" if base == side else ""


def tile(region: Box, most: int, overlap: tuple[int, int], least: int = 1) -> list[Box]:
    r"""
    Cover a region with at most `most` square crops, as small as possible but with a side of at least `least`, of which
    neighbors overlap by at least `overlap` (a fraction) of their side. A region of 1000 x 600 with at most 6 crops and
    a fifth:

        0      307  385      615 692    1000
        |---- 1, 2 ----|                         crops from top to bottom, in columns from left to right
               |---- 3, 4 ----|
                          |---- 5, 6 ----|

    Returns:
        The crops' boxes. A region that is narrower than a crop's side limits its crops.
    """
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    part, whole = overlap

    def side_for(length: int, count: int) -> int:  # count * side - (count - 1) * overlap * side >= length
        return -(-length * whole // (whole + (count - 1) * (whole - part)))

    grids = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    side, _, columns, rows = min(
        (max(side_for(width, columns), side_for(height, rows), least), columns * rows, columns, rows)
        for columns, rows in grids
    )
    boxes = []
    for x in _spread(width, side, columns):
        for y in _spread(height, side, rows):
            boxes.append((left + x, top + y, left + min(x + side, width), top + min(y + side, height)))
    return list(dict.fromkeys(boxes))


def _spread(length: int, side: int, count: int) -> list[int]:
    """The starts of `count` intervals of a side, spread evenly over a length."""
    room = max(0, length - side)
    return [room * index // max(1, count - 1) for index in range(count)]


def plan_scouts(
    width: int, height: int, zoom: int, max_crops: int, num_tokens: int, side: int, patch_size: int
) -> list[Crop]:
    """
    The whole picture and the crops that scout it. See `plan_crops` for the arguments.

    Returns:
        The crops in the order of their tokens, the whole picture first: its usual grid if there is nothing to look
        closer at, see `count_closer`.

    Raises:
        ValueError: if a knob or a side is out of range, or there are more than `MOST_CROPS` scouts.
    """
    check_sides(width, height)
    max_crops, num_tokens = check_knob("max_crops", max_crops), check_knob("num_tokens", num_tokens)
    most = max_tokens_per_crop(side, patch_size)
    rounds, closer = count_closer(width, height, zoom, max_crops, num_tokens, side)
    if not rounds:
        return plan_crops(width, height, max_crops, num_tokens, side, patch_size)
    scouts = min(max_crops, num_tokens - 1) - closer
    check_crop_count(scouts + 1)
    boxes = [(0, 0, width, height)]
    boxes = list(dict.fromkeys(boxes + tile(boxes[0], scouts, SCOUT_OVERLAP, least=side)))
    return share_evenly(boxes, min(num_tokens, len(boxes) * most))


def share_evenly(boxes: list[Box], num_tokens: int) -> list[Crop]:
    """
    Share exactly `num_tokens` tokens among crops with these boxes. If they don't divide, the first ones get one more.

    However many crops a picture gets, the number of its tokens in the prompt stays the same.
    """
    share, more = divmod(num_tokens, len(boxes))
    return [Crop(box, share + (index < more)) for index, box in enumerate(boxes)]


def _widen(region: Box, margin: tuple[int, int], whole: Box) -> Box:
    """
    A region and a margin on its left and right, a fraction of its width, as far as the whole picture goes. If the
    region is as wide as the picture, scouts can cut a thing only above and below: then the margin is there.
    """
    part, of = margin
    left, top, right, bottom = region
    if (left, right) == (whole[0], whole[2]):
        down = (bottom - top) * part // of
        return left, max(top - down, whole[1]), right, min(bottom + down, whole[3])
    across = (right - left) * part // of
    return max(left - across, whole[0]), top, min(right + across, whole[2]), bottom


def can_be_closer(boxes: list[Box], covered: set[Box], side: int) -> list[bool]:
    """
    For each crop, the whole picture first, whether a closer look would show more. It would not for the whole picture,
    which the scouts cover, for a crop that was covered before, or for one of at most the tower's `side` in pixels.
    """
    return [
        index > 0 and box not in covered and max(box[2] - box[0], box[3] - box[1]) > side
        for index, box in enumerate(boxes)
    ]


def relevance_left(boxes: list[Box], relevance: list[float], covered: set[Box], side: int) -> float:
    """How much of the relevance lies on crops of which a closer look would show more. See `look_closer`."""
    return sum(found for found, is_closer in zip(relevance, can_be_closer(boxes, covered, side)) if is_closer)


def pays(boxes: list[Box], relevance: list[float], covered: set[Box], side: int) -> bool:
    """
    The gate: whether at least `WORTH_A_LOOK` of the relevance lies on crops of which a closer look would show more.

    That is little, because heads may attend elsewhere. If every scout cuts a sign, nearly all of their attention goes
    to the whole picture, although the sign is illegible there. If the question is about something large, all of it
    does. Crops of earlier rounds count as well, even if they show a thing legibly: the next round looks closer still.
    The arguments are those of `look_closer`.
    """
    part, of = WORTH_A_LOOK
    found = relevance_left(boxes, relevance, covered, side)
    return found > 0 and of * found >= part * sum(relevance)


def look_closer(
    boxes: list[Box], relevance: list[float], covered: set[Box], regions: int, per_region: int, side: int
) -> list[Box]:
    r"""
    Cover the most relevant crops with crops of about half their side.

        scouts, the most relevant one marked          closer
        +-----+-----+-----+
        |     |  7  |  1  |
        +-----+=====+-----+                            +--+--+--+
        |  0  # 80  #  2  |      -->                   +--+--+--+     3 x 2 crops of the marked one
        +-----+=====+-----+                            +--+--+--+     and a margin on its left and right

    Args:
        boxes: all crops so far, the whole picture first.
        relevance: of each of them.
        covered: boxes that were covered before; what is covered now is added.
        regions: how many crops to cover.
        per_region: crops for each, `FEW` or `MANY`.
        side: the tower's side in pixels.

    Returns:
        The new boxes, in the order of their regions' relevance, none twice and none that is in `boxes`.
    """
    closer = can_be_closer(boxes, covered, side)
    left = [(-found, box) for box, found, is_closer in zip(boxes, relevance, closer) if is_closer]
    known, new = set(boxes), []
    for _, region in sorted(left)[:regions]:
        covered.add(region)
        for box in tile(_widen(region, MARGINS[per_region], whole=boxes[0]), per_region, OVERLAP):
            if box not in known:
                known.add(box)
                new.append(box)
    return new


__all__ = [
    "count_closer",
    "explain_no_zoom",
    "look_closer",
    "pays",
    "plan_rounds",
    "plan_scouts",
    "relevance_left",
    "share_evenly",
    "split_budget",
    "tile",
]
