"""
Cut crops out of a picture, resize them and look up their pixel values: with Pillow and NumPy, or in tensors on any
device with the same results.
"""

import math
import multiprocessing
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image

from .crops_mc_llava import Box
from .threads_mc_llava import in_threads


# Pillow's Resample.c computes in 32-bit integers: a pass multiplies bytes with coefficients of 22 bits after the
# point, and rounds to bytes. Bicubic coefficients sum to less than 1.3 in absolute value, so that no sum overflows.
PRECISION = 22
SUPPORT = 2.0  # of the bicubic filter, in pixels of the smaller picture
MOST_THREADS = 8  # more would only wait for memory
CROPS_PER_LOOK_UP = 16  # bounds the memory of 32-bit indices


def cut_crops(
    picture: Image.Image,
    boxes: list[Box],
    side: int,
    resample: int = Image.Resampling.BICUBIC,
    threads: int | None = None,
) -> np.ndarray:
    """
    Cut crops out of a picture and resize each to a square, whatever its aspect ratio.

    Args:
        picture: an RGB image, as `load_image` returns it.
        boxes: left, top, right, bottom of each crop in pixels of the picture.
        side: side of the squares in pixels.
        resample: one of Pillow's filters. Pillow antialiases when it shrinks a crop.
        threads: how many to use, by default as `count_threads` says.

    Returns:
        uint8[crops, side, side, 3].
    """
    pixels = np.empty((len(boxes), side, side, 3), dtype=np.uint8)

    def keep(index: int, crop: Image.Image):
        pixels[index] = np.asarray(crop)

    cut_each(picture, boxes, side, resample, keep, threads)
    return pixels


def cut_each(
    picture: Image.Image,
    boxes: list[Box],
    side: int,
    resample: int,
    use: Callable[[int, Image.Image], None],
    threads: int | None = None,
):
    """
    Call `use` with the index of each box and its crop, a square of `side` pixels, in any order and from several
    threads. At any time, the pieces that they have cut out have at most twice as many pixels as the picture.
    """
    runs = _find_runs(boxes, side, resample)

    def cut(run: list[int]):
        left, top, right, bottom = _hull(boxes, run)
        # Cut first: with `resize(box=...)` the filter would read pixels beyond the crop's edge.
        is_all = (left, top, right, bottom) == (0, 0, *picture.size)
        piece = picture if is_all else picture.crop((left, top, right, bottom))
        if len(run) == 1:
            return use(run[0], piece.resize((side, side), resample))
        piece = piece.resize((side, bottom - top), resample)
        for index in run:
            crop = piece.crop((0, boxes[index][1] - top, side, boxes[index][3] - top))
            use(index, crop.resize((side, side), resample))

    areas = [_area(hull) for hull in (_hull(boxes, run) for run in runs) if hull != (0, 0, *picture.size)]
    threads = min(threads or count_threads(), len(runs), 2 * picture.width * picture.height // max(areas, default=1))
    in_threads(cut, runs, threads)


def count_threads() -> int:
    """
    The number of threads that a call may use: torch's, or 1 in a process that another one has started, such as a
    DataLoader's worker, because there are others like it.
    """
    return 1 if multiprocessing.parent_process() is not None else min(torch.get_num_threads(), MOST_THREADS)


def _find_runs(boxes: list[Box], side: int, resample: int) -> list[list[int]]:
    """
    The indices of the boxes in groups. A group is a column of overlapping boxes whose rows Pillow resizes before their
    columns, so that they share that pass. Any other box is a group by itself.
    """
    runs, open_runs = [], {}
    for index in sorted(range(len(boxes)), key=lambda index: boxes[index][1]):
        left, top, right, bottom = boxes[index]
        run = open_runs.get((left, right))
        if run is not None and top < max(boxes[other][3] for other in run) and _rows_first(boxes[index], side):
            run.append(index)
            continue
        runs.append([index])
        if resample != Image.Resampling.NEAREST and _rows_first(boxes[index], side):  # NEAREST has no passes
            open_runs[left, right] = runs[-1]
    return runs


def _hull(boxes: list[Box], run: list[int]) -> Box:
    lefts, tops, rights, bottoms = zip(*(boxes[index] for index in run))
    return min(lefts), min(tops), max(rights), max(bottoms)


def _area(box: Box) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def can_cut_on(device: torch.device, resample: int) -> bool:
    """Whether to use `cut_on_device` for this device and filter. On a CPU, `cut_crops` is faster."""
    return device.type not in ("cpu", "meta") and resample == Image.Resampling.BICUBIC


def cut_to(
    device: torch.device,
    picture: Image.Image,
    boxes: list[Box],
    side: int,
    resample: int = Image.Resampling.BICUBIC,
    threads: int | None = None,
) -> torch.Tensor:
    """The same as `cut_crops`, with the crops on a device: uint8[crops, side, side, 3]."""
    if can_cut_on(device, resample):
        return cut_on_device(torch.from_numpy(np.array(picture)).to(device), boxes, side)
    return torch.from_numpy(cut_crops(picture, boxes, side, resample, threads)).to(device)


def cut_on_device(picture: torch.Tensor, boxes: list[Box], side: int) -> torch.Tensor:
    """
    Cut crops out of a picture and resize each to a square with Pillow's bicubic filter, in integers.

    The crops equal those of `cut_crops` bit for bit. Temporary memory is bounded by that of a column of the picture.

    Args:
        picture: uint8[height, width, 3].
        boxes: left, top, right, bottom of each crop in pixels of the picture.
        side: side of the squares in pixels.

    Returns:
        uint8[crops, side, side, 3].
    """
    crops = picture.new_empty((len(boxes), side, side, 3))
    for run in _find_runs(boxes, side, Image.Resampling.BICUBIC):
        left, top, right, bottom = _hull(boxes, run)
        piece = picture[top:bottom, left:right]
        if len(run) == 1:
            for axis in (1, 0) if _rows_first(boxes[run[0]], side) else (0, 1):
                piece = _resize_axis(piece, axis, side)
            crops[run[0]] = piece
            continue
        piece = _resize_axis(piece, 1, side)
        heights = {bottom - top for _, top, _, bottom in (boxes[index] for index in run)}
        for height in heights:
            same = [index for index in run if boxes[index][3] - boxes[index][1] == height]
            resized = _resize_axis(piece, 0, side, [boxes[index][1] - top for index in same], height)
            for index, crop in zip(same, resized.split(side)):
                crops[index] = crop
    return crops


def look_up_bytes(crops: Sequence[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """
    The pixel values of crops: float32[crops, 3, side, side].

    Args:
        crops: uint8[side, side, 3] each, on the device of `values`.
        values: float32[3, 256], what each byte becomes in each channel, see `MCLlavaImageProcessor.values_of_bytes`.
    """
    side = crops[0].shape[0]
    if values.device.type == "cpu":
        found = np.empty((len(crops), 3, side, side), dtype=np.float32)
        for crop, out in zip(crops, found):
            look_up_crop(crop.numpy(), values.numpy(), out)
        return torch.from_numpy(found)
    found = values.new_empty((len(crops), 3, side, side))
    crops = crops if isinstance(crops, torch.Tensor) else torch.stack(crops)
    for channel in range(3):
        looked_up = values[channel].index_select(0, crops[..., channel].flatten().int())
        found[:, channel] = looked_up.view(-1, side, side)
    return found


def look_up_crop(crop: np.ndarray, values: np.ndarray, out: np.ndarray):
    """Write the pixel values of one crop, float32[3, side, side], into `out`."""
    for channel in range(3):  # without the mode, `take` checks each byte and buffers what it writes
        np.take(values[channel], crop[..., channel], out=out[channel], mode="clip")


def _rows_first(box: Box, side: int) -> bool:
    """Whether Pillow resizes the rows of a crop before its columns. Its rules were found by comparing pixels."""
    left, top, right, bottom = box
    if _pillow_chooses():
        return bottom - top <= max(side, 2 * (right - left) - side)
    return bottom - top <= max(side, 100 * (right - left))


@cache
def _pillow_chooses() -> bool:
    """Whether the installed Pillow chooses the order of the two passes (13.0 does) or resizes rows first, mostly."""
    pixels = np.random.default_rng(0).integers(0, 2, (64, 16, 3), dtype=np.uint8) * 255
    tall, bicubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    rows_last = tall.resize((16, 24), bicubic).resize((24, 24), bicubic)
    return tall.resize((24, 24), bicubic).tobytes() == rows_last.tobytes()


def _resize_axis(
    pixels: torch.Tensor, axis: int, side: int, starts: Sequence[int] = (0,), length=None
) -> torch.Tensor:
    """
    Resize spans of one axis of uint8[height, width, channels] to `side` each, and concatenate them.

    Args:
        starts: where each span of `length` begins; by default there is one, the entire axis.
    """
    length = length or pixels.shape[axis]
    starts = torch.tensor(starts, dtype=torch.int32, device=pixels.device)
    places, weights = _taps(length, side, pixels.device)
    shape = [-1 if other == axis else 1 for other in range(3)]
    sums = 2 ** (PRECISION - 1)
    for place, weight in zip(places, weights):
        spans = (starts[:, None] + place).flatten()
        sums = sums + pixels.index_select(axis, spans) * weight.repeat(len(starts)).view(shape)
    return (sums >> PRECISION).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps(length: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The coefficients of Pillow's `precompute_coeffs`, int32[taps, side], and the places of the pixels that they
    multiply. At the edges, where there are fewer, the others are 0.
    """
    scale = length / side
    stretch = max(scale, 1.0)  # the filter grows with what it shrinks, which is antialiasing
    rows = []
    for index in range(side):
        center = (index + 0.5) * scale
        first = max(0, int(center - SUPPORT * stretch + 0.5))
        last = min(length, int(center + SUPPORT * stretch + 0.5))
        taps = [_bicubic((place - center + 0.5) * (1 / stretch)) for place in range(first, last)]
        total = sum(taps)
        shares = [tap * (1 / total) * 2**PRECISION for tap in taps]
        rows.append((first, [math.trunc(share + (0.5 if share >= 0 else -0.5)) for share in shares]))
    most = max(len(shares) for _, shares in rows)
    weights = [shares + [0] * (most - len(shares)) for _, shares in rows]
    places = [[min(first + tap, length - 1) for tap in range(most)] for first, _ in rows]
    return tuple(torch.tensor(each, dtype=torch.int32, device=device).T.contiguous() for each in (places, weights))


def _bicubic(x: float) -> float:
    """Pillow's bicubic filter: Keys' with a = -0.5."""
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


__all__ = [
    "CROPS_PER_LOOK_UP",
    "can_cut_on",
    "cut_crops",
    "cut_each",
    "cut_on_device",
    "cut_to",
    "look_up_bytes",
    "look_up_crop",
]
