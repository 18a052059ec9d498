"""Where guided zoom looks, which is computed with integers only."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_llava import (
    count_closer,
    explain_no_zoom,
    look_closer,
    pays,
    plan_crops,
    plan_rounds,
    plan_scouts,
    share_evenly,
    split_budget,
    tile,
)


sizes = st.one_of(st.integers(1, 3000), st.integers(1, 20_000))
towers = st.sampled_from([(384, 14), (224, 16), (96, 8), (56, 14), (28, 14)])


def contains(outer, inner) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


@settings(max_examples=300, deadline=None)
@given(
    width=sizes,
    height=sizes,
    most=st.integers(1, 60),
    overlap=st.sampled_from([(0, 1), (1, 8), (1, 5), (1, 4), (2, 5)]),
)
def test_tiles_cover_a_region_and_overlap(width, height, most, overlap):
    boxes = tile((7, 11, 7 + width, 11 + height), most, overlap)
    assert 1 <= len(boxes) <= most and len(set(boxes)) == len(boxes)
    for low, high, start, length in ((0, 2, 7, width), (1, 3, 11, height)):
        spans = sorted({(box[low], box[high]) for box in boxes})
        assert spans[0][0] == start and spans[-1][1] == start + length
        for (left, right), (following, _) in zip(spans, spans[1:]):
            shared = (right - left) * overlap[0] // overlap[1]
            assert right - following >= shared - 1, "rounded to pixels"


@settings(max_examples=300, deadline=None)
@given(
    width=sizes,
    height=sizes,
    zoom=st.integers(1, 10),
    max_crops=st.integers(0, 150),
    num_tokens=st.integers(1, 800),
    tower=towers,
    data=st.data(),
)
def test_neither_knob_is_exceeded_in_any_round(width, height, zoom, max_crops, num_tokens, tower, data):
    side, patch_size = tower
    scouts = plan_scouts(width, height, zoom, max_crops, num_tokens, side, patch_size)
    boxes, tokens = [crop.box for crop in scouts], sum(crop.num_tokens for crop in scouts)
    assert boxes[0] == (0, 0, width, height) and tokens <= num_tokens
    _, _, regions, per_region = split_budget(min(max_crops, num_tokens - 1), zoom)
    rounds, closer = count_closer(width, height, zoom, max_crops, num_tokens, side)
    assert closer == rounds * regions * per_region and (rounds or scouts == plan_crops(
        width, height, max_crops, num_tokens, side, patch_size
    ))  # fmt: skip
    if rounds:
        assert all(min(box[2] - box[0], width) >= min(side, width) for box in boxes), "no scout is enlarged"
    covered = set()
    rounds, regions, per_region = plan_rounds(len(boxes), zoom, max_crops, tokens)
    for _ in range(rounds):
        relevance = data.draw(
            st.lists(st.floats(0, 1, allow_subnormal=False), min_size=len(boxes), max_size=len(boxes))
        )
        added = look_closer(boxes, relevance, covered, regions, per_region, side)
        assert len(added) <= regions * per_region
        boxes += added
    assert len(boxes) - 1 <= min(max_crops, num_tokens - 1) and len(set(boxes)) == len(boxes)
    assert all(contains(boxes[0], box) and box[0] < box[2] and box[1] < box[3] for box in boxes)
    plan = share_evenly(boxes, tokens)
    assert sum(crop.num_tokens for crop in plan) == tokens
    assert all(1 <= crop.num_tokens <= (side // patch_size) ** 2 - 1 for crop in plan)


def test_the_budget_is_divided_as_documented():
    assert split_budget(64, 2) == (2, 28, 3, 6) and split_budget(64, 3) == (3, 28, 2, 6)
    assert split_budget(16, 1) == (1, 10, 1, 6) and split_budget(10, 1) == (1, 6, 1, 4)
    assert split_budget(16, 5)[0] == 1 and split_budget(25, 5)[0] == 3
    assert split_budget(8, 3) == (1, 4, 1, 4) and split_budget(11, 1)[3] == 4 and split_budget(12, 1)[3] == 6
    assert [split_budget(crops, 9)[0] for crops in (17, 18, 23, 24)] == [1, 2, 2, 3]
    assert [split_budget(crops, rounds)[2] for crops, rounds in ((17, 1), (18, 1), (35, 2), (36, 2))] == [1, 2, 1, 2]
    assert split_budget(7, 1) == (0, 7, 0, 0) and split_budget(0, 3) == (0, 0, 0, 0)


def test_the_drawn_tiles():
    boxes = tile((0, 0, 1000, 600), 6, (1, 5))
    assert [box[0] for box in boxes] == [0, 0, 307, 307, 615, 615] and boxes[0] == (0, 0, 385, 385)


def test_the_most_relevant_crops_are_covered_and_things_at_their_seams_lie_whole_in_one():
    scouts = [(0, 0, 1800, 1200), *tile((0, 0, 1800, 1200), 6, (1, 4))]
    relevance = [0.9, 0.01, 0.02, 0.8, 0.01, 0.05, 0.0]
    (region, second), covered = (scouts[3], scouts[5]), set()
    closer = look_closer(scouts, relevance, covered, 1, 6, 96)
    assert covered == {region} and len(closer) == 6
    around = (region[0] - 120, region[1], region[2] + 120, region[3])  # a sixth
    assert all(contains(around, box) for box in closer)
    side = closer[0][2] - closer[0][0]
    thing = side * 2 // 5 - 2
    left, top, right, bottom = around  # what the region's edge cuts is entirely in one, too
    for x in range(left, right - thing, 13):
        for y in range(top, bottom - thing, 17):
            assert any(contains(box, (x, y, x + thing, y + thing)) for box in closer)
    more = look_closer([*scouts, *closer], [*relevance, *[0.0] * 6], covered, 1, 6, 96)
    assert covered == {region, second} and len(more) == 6, "what was covered once is not covered again"
    assert look_closer(scouts, relevance, set(), 2, 6, 96) == closer + more, "two regions in one round"
    few = look_closer(scouts, relevance, set(), 1, 4, 96)
    assert len(few) == 4 and all(contains(region, box) for box in few)
    assert look_closer(scouts, relevance, set(), 1, 6, 5000) == [], "crops that the tower sees in full"


def test_a_region_as_wide_as_the_picture_has_its_margin_above_and_below():
    scouts = [(0, 0, 600, 2400), *tile((0, 0, 600, 2400), 6, (1, 8))]
    assert {box[:1] + box[2:3] for box in scouts} == {(0, 600)}, "one column"
    left, top, right, bottom = region = scouts[3]
    closer = look_closer(scouts, [float(box == region) for box in scouts], set(), 1, 6, 96)
    assert len(closer) == 6
    assert min(box[1] for box in closer) == top - 100 and max(box[3] for box in closer) == bottom + 100  # a sixth


def test_the_gate_asks_for_a_thousandth_of_the_relevance_where_a_closer_look_shows_more():
    scouts = [(0, 0, 1800, 1200), *tile((0, 0, 1800, 1200), 6, (1, 4))]
    large, small = [0.9995, 0.0001, 0.0, 0.0001, 0.0003, 0.0, 0.0], [0.4, 0.0, 0.6, 0.0, 0.0, 0.0, 0.0]
    cut = [0.99, 0.004, 0.0, 0.006, 0.0, 0.0, 0.0]  # no scout shows it whole
    assert not pays(scouts, large, set(), 96)
    assert pays(scouts, small, set(), 96) and pays(scouts, cut, set(), 96)
    assert not pays(scouts, small, {scouts[2]}, 96), "the relevant crop was covered before"
    assert not pays(scouts, small, set(), 5000), "crops that the tower sees in full"
    assert pays(scouts, [999, 1, 0, 0, 0, 0, 0], set(), 96) and not pays(scouts, [1000, 1, 0, 0, 0, 0, 0], set(), 96)
    assert not pays(scouts, [0.0] * 7, set(), 96), "nothing is relevant"


def test_what_a_grid_shows_in_full_is_not_scouted():
    assert count_closer(1024, 768, 2, 100, 728, 384) == (0, 0)
    assert plan_scouts(1024, 768, 2, 100, 728, 384, 14) == plan_crops(1024, 768, 100, 728, 384, 14)
    rounds, closer = count_closer(4240, 2832, 2, 64, 728, 384)
    assert rounds == 2 and closer == 36 and len(plan_scouts(4240, 2832, 2, 64, 728, 384, 14)) <= 64 - closer + 1


@pytest.mark.parametrize(
    ("size", "knobs", "reason"),
    [
        ((4240, 2832), (0, 64, 728), "zoom is 0"),
        ((4240, 2832), (1, 7, 728), "at least 8 and num_tokens of at least 9"),
        ((4240, 2832), (1, 64, 8), "at least 8 and num_tokens of at least 9"),
        ((500, 400), (1, 64, 728), "too small for a grid"),
        ((1024, 768), (1, 100, 728), "shows every pixel already"),
        ((4240, 2832), (1, 64, 728), ""),
    ],
)
def test_why_zoom_changes_nothing(size, knobs, reason):
    found = explain_no_zoom(*size, *knobs, 384)
    assert reason in found and bool(found) == (count_closer(*size, *knobs, 384) == (0, 0)) == bool(reason)


def test_a_small_picture_has_no_scouts_and_odd_knobs_are_refused():
    assert plan_scouts(120, 90, 3, 100, 50, 96, 8) == plan_crops(120, 90, 100, 50, 96, 8)
    for knobs in ((1, -1, 5), (1, 5, 0), (1, 2.0, 5)):
        with pytest.raises(ValueError, match="max_crops|num_tokens"):
            plan_scouts(1000, 900, *knobs, 96, 8)
    with pytest.raises(ValueError, match="4096 are possible"):
        plan_scouts(20_000, 20_000, 1, 10**9, 10**9, 4, 2)
