"""Pillow's resizing in tensors: cut crops out of a picture on the device where it is, with the same pixels."""

import math
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image

from .crops_mc_llava import Box


# Pillow's Resample.c computes in integers: a pass multiplies bytes with coefficients of 22 bits after the point, and
# rounds to bytes. Sums stay below 2^53, so that matrices of float64 compute the same integers.
PRECISION = 22
SUPPORT = 2.0  # of the bicubic filter, in pixels of the smaller picture


def cut_on_device(picture: torch.Tensor, boxes: list[Box], side: int) -> torch.Tensor:
    """
    Cut crops out of a picture and resize each to a square with Pillow's bicubic filter.

    It equals `cut_crops` bit for bit. On a CPU, `cut_crops` is faster.

    Args:
        picture: uint8[height, width, 3].
        boxes: left, top, right, bottom of each crop in pixels of the picture.
        side: side of the squares in pixels.

    Returns:
        uint8[crops, side, side, 3].
    """
    crops = []
    for left, top, right, bottom in boxes:
        pixels = picture[top:bottom, left:right]
        tall_first = _pillow_chooses() and _is_tall(right - left, bottom - top, side)
        crops.append(_resize(pixels, (0, 1) if tall_first else (1, 0), side))
    return torch.stack(crops)


def _is_tall(width: int, height: int, side: int) -> bool:
    """Whether a Pillow that chooses resizes the columns of a crop before its rows: found by comparing pixels."""
    return height > max(side, 2 * width - side)


@cache
def _pillow_chooses() -> bool:
    """Whether the installed Pillow chooses the order of the two passes (13.0 does) or resizes rows first."""
    tall = np.random.default_rng(0).integers(0, 2, (64, 16, 3), dtype=np.uint8) * 255
    found = np.asarray(Image.fromarray(tall).resize((24, 24), Image.Resampling.BICUBIC))
    return bool((found == _resize(torch.from_numpy(tall), (0, 1), 24).numpy()).all())


def _resize(pixels: torch.Tensor, axes: tuple[int, int], side: int) -> torch.Tensor:
    """Resize uint8[height, width, 3] to a square, one axis after the other."""
    for axis in axes:
        if pixels.shape[axis] != side:
            pixels = _resize_axis(pixels, axis, side)
    return pixels


def _resize_axis(pixels: torch.Tensor, axis: int, side: int) -> torch.Tensor:
    """Resize one axis of uint8[height, width, channels] to `side`."""
    weights = _weights(pixels.shape[axis], side).to(pixels.device)
    sums = torch.tensordot(weights, pixels.double(), dims=([1], [axis])) + 2 ** (PRECISION - 1)
    resized = (sums / 2**PRECISION).floor().clamp(0, 255).to(torch.uint8)
    return resized.movedim(0, axis)


@lru_cache(maxsize=64)
def _weights(length: int, side: int) -> torch.Tensor:
    """The coefficients of Pillow's `precompute_coeffs` as integers in float64[side, length]."""
    scale = length / side
    stretch = max(scale, 1.0)  # the filter grows with what it shrinks, which is antialiasing
    weights = np.zeros((side, length))
    for index in range(side):
        center = (index + 0.5) * scale
        first = max(0, int(center - SUPPORT * stretch + 0.5))
        last = min(length, int(center + SUPPORT * stretch + 0.5))
        taps = [_bicubic((place - center + 0.5) * (1 / stretch)) for place in range(first, last)]
        total = sum(taps)
        for place, tap in enumerate(taps, first):
            share = tap * (1 / total) * 2**PRECISION
            weights[index, place] = math.trunc(share + (0.5 if share >= 0 else -0.5))
    return torch.from_numpy(weights)


def _bicubic(x: float) -> float:
    """Pillow's bicubic filter: Keys' with a = -0.5."""
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


__all__ = ["cut_on_device"]
