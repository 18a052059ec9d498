"""Crops that are cut in tensors have Pillow's pixels."""

import numpy as np
import torch
from helpers import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_llava import cut_crops, cut_on_device


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    side=st.sampled_from([1, 7, 56, 96, 384]),
    seed=st.integers(0, 2**16),
    is_harsh=st.booleans(),
    data=st.data(),
)
def test_every_bit_is_pillows(width, height, side, seed, is_harsh, data):
    image = picture(width, height, seed)
    if is_harsh:  # black and white: the filter overshoots, and each pass clips
        image = image.point(lambda value: 255 * (value > 127))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    boxes = [(0, 0, width, height), (left, top, right, bottom)]
    found = cut_on_device(torch.from_numpy(np.array(image)), boxes, side)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), cut_crops(image, boxes, side))
