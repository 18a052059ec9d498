"""The crop plan, which is computed with integers only."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_llava import MOST_CROPS, check_plan, plan_crops


sizes = st.one_of(st.integers(1, 3000), st.integers(1, 20_000))


@settings(max_examples=400, deadline=None)
@given(
    width=sizes,
    height=sizes,
    max_crops=st.integers(0, 150),
    num_tokens=st.integers(1, 1500),
    tower=st.sampled_from([(384, 14), (224, 16), (96, 12), (56, 14)]),
)
def test_both_knobs_are_bounds_and_nothing_of_the_image_is_lost(width, height, max_crops, num_tokens, tower):
    side, patch_size = tower
    plan = plan_crops(width, height, max_crops, num_tokens, side, patch_size)

    whole, grid = plan[0], plan[1:]
    assert whole.box == (0, 0, width, height)
    assert len(grid) <= min(max_crops, num_tokens - 1)
    for crop in grid:
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height

    if grid:
        # A grid is a product of columns and rows, so it covers the image if its columns and its rows do.
        for start, end, length in ((0, 2, width), (1, 3, height)):
            spans = sorted({(crop.box[start], crop.box[end]) for crop in grid})
            assert spans[0][0] == 0 and spans[-1][1] == length
            assert all(following[0] <= span[1] for span, following in zip(spans, spans[1:]))
        assert len({crop.box[::2] for crop in grid}) * len({crop.box[1::2] for crop in grid}) == len(grid)

    crops, selectable = len(plan), (side // patch_size) ** 2 - 1
    shares = [num_tokens // crops] * (crops - 1) + [num_tokens - num_tokens // crops * (crops - 1)]
    assert [crop.num_tokens for crop in plan] == [min(share, selectable) for share in shares]
    assert all(crop.num_tokens >= 1 for crop in plan)
    assert sum(crop.num_tokens for crop in plan) <= num_tokens


def test_the_example_of_the_docstring():
    plan = plan_crops(1000, 700, 100, 728, 384, 14)
    assert [crop.box for crop in plan[1:4]] == [(0, 0, 384, 384), (0, 192, 384, 700), (192, 0, 576, 384)]
    assert [crop.num_tokens for crop in plan] == [80] * 8 + [88]


def test_a_width_that_the_columns_fill_exactly():
    assert [crop.box for crop in plan_crops(768, 384, 100, 728, 384, 14)[1:]] == [
        (0, 0, 384, 384),
        (192, 0, 576, 384),
        (384, 0, 768, 384),
    ]


@pytest.mark.parametrize(
    ("width", "height", "max_crops"), [(1700, 410, 3), (1920, 1080, 1), (300, 20_000, 10), (20_000, 1, 7)]
)
def test_where_the_published_code_broke_its_bound(width, height, max_crops):
    assert len(plan_crops(width, height, max_crops, 728, 384, 14)) <= max_crops + 1


@pytest.mark.parametrize(("width", "height", "crops"), [(576, 576, 1), (577, 576, 5), (384, 576, 1), (384, 577, 3)])
def test_up_to_one_and_a_half_sides_there_is_only_the_whole_image(width, height, crops):
    assert len(plan_crops(width, height, 100, 728, 384, 14)) == crops


def test_one_crop_beside_the_whole_image_would_be_the_whole_image_again():
    assert len(plan_crops(2000, 1500, 1, 728, 384, 14)) == 1


def test_numpy_integers_are_integers():
    assert plan_crops(1000, 700, np.int64(10), np.int32(728), 384, 14) == plan_crops(1000, 700, 10, 728, 384, 14)


@pytest.mark.parametrize(
    ("max_crops", "num_tokens", "message"),
    [
        (-1, 728, "max_crops must be at least 0, got -1"),
        (10, 0, "num_tokens must be at least 1, got 0"),
        (2.0, 728, "max_crops must be an integer of at least 0, got 2.0"),
        (True, 728, "max_crops must be an integer of at least 0, got True"),
        (10, "7", "num_tokens must be an integer of at least 1, got '7'"),
    ],
)
def test_knobs_out_of_range(max_crops, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        plan_crops(1000, 700, max_crops, num_tokens, 384, 14)


@pytest.mark.parametrize("max_crops", [5000, 10**9, 10**18])
def test_no_knobs_give_more_crops_than_any_model_takes(max_crops):
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"\d+ crops of one image, at most {MOST_CROPS} are"):
        plan_crops(20_000, 20_000, max_crops, max_crops, 4, 2)
    with pytest.raises(ValueError, match=f"at most {MOST_CROPS} are possible"):
        check_plan([(0, 0, 5, 5)] * (MOST_CROPS + 1), 20, 20, 10**9, 4, 2)
    assert time.monotonic() - start < 1
    assert len(plan_crops(500, 400, max_crops, max_crops, 384, 14)) == 1, "large knobs alone are no fault"
    most = plan_crops(20_000, 20_000, MOST_CROPS - 1, 10**9, 4, 2)
    assert 3900 < len(most) <= MOST_CROPS and check_plan(most, 20_000, 20_000, 10**9, 4, 2) == most
    with pytest.raises(ValueError, match="1000000 pixels a side"):
        plan_crops(10**9, 1, 5, 5, 4, 2)
    assert time.monotonic() - start < 3
