"""Scenes: what is promised about their sizes, splits and questions."""

import hashlib
import random
import re

import numpy as np
import pytest

from mc_llava import plan_crops, scenes
from mc_llava.scenes import KINDS, ask, caption, draw_scene, is_correct, make_scene
from mc_llava.scenes import questions as asking
from mc_llava.scenes.drawing import character_centers
from mc_llava.scenes.fonts import load_font
from mc_llava.scenes.making import make_group
from mc_llava.scenes.scene import CHARACTERS, COLORS, OBJECTS, SHAPES, Scene, legible_height, move
from mc_llava.scenes.tower import IGNORED, CropDataset, label_crop, make_crop


SEEDS = range(60)


def crop_boxes(scene, max_crops=scenes.CROPS):
    return [crop.box for crop in plan_crops(scene.width, scene.height, max_crops, 10**6, scenes.SIDE, 8)[1:]]


@pytest.mark.parametrize("split", scenes.SPLITS)
@pytest.mark.parametrize("size, crops, illegible", [(35, 32, 3), (70, 128, 1.5), (140, 600, 0.75)])
def test_glyphs_are_illegible_in_the_whole_image_and_legible_in_a_crop(split, size, crops, illegible):
    for seed in SEEDS if size == 35 else SEEDS[:10]:
        scene = make_scene(seed, split, size)
        shortest, longest = (512, 2048) if size == 35 else (1500, 3200)
        assert shortest <= min(scene.width, scene.height) and max(scene.width, scene.height) <= longest
        for thing in scene.things:
            if thing.text:
                assert thing.glyph * 96 / scene.height < illegible
            # Up to the rounding of a font to whole pixels.
            assert legible_height(thing.box, thing.glyph, crop_boxes(scene, crops)) >= 7.5


def test_the_scenes_of_the_study_stay_the_same():
    found = hashlib.sha256()
    for seed in range(5):
        found.update(draw_scene(make_scene(seed, "test")).tobytes())
        for kind in KINDS:
            question = scenes.benchmark_question(seed, kind)
            found.update(f"{question.text} {question.answer} {question.key}".encode())
    assert found.hexdigest().startswith("24ff1195929074c1"), "docs/study.json was measured on others"


def test_a_large_thing_fills_a_quarter_and_lies_apart():
    for seed in SEEDS:
        scene = scenes.benchmark_scene(seed, "large")
        question = scenes.benchmark_question(seed, "large")
        large, *small = scene.things
        left, top, right, bottom = large.box
        assert 0 <= left and 0 <= top and right <= scene.width and bottom <= scene.height
        assert 0.24 < (right - left) * (bottom - top) / (scene.width * scene.height) < 0.41
        assert question.key == f"{large.color} {large.name}" and "largest" in question.text
        assert is_correct(question.key, question.answer) and not is_correct(question.key, "It is a red sign.")
        assert large.name not in {thing.name for thing in small}
        for thing in small:
            outside = thing.box[2] <= left or thing.box[0] >= right or thing.box[3] <= top or thing.box[1] >= bottom
            assert outside
    with pytest.raises(ValueError, match="no thing of the scene is large: make it with large=True"):
        ask(make_scene(0), "large", random.Random(0))
    with pytest.raises(ValueError, match="size must be one of 35, 70, 140, got 50"):
        make_scene(0, size=50)


def test_legible_height_takes_the_best_crop_that_holds_all_and_its_smaller_scale():
    crops = [(0, 0, 192, 192), (96, 0, 192, 384), (500, 500, 510, 510)]
    assert legible_height((100, 10, 120, 20), 20, crops) == 10
    assert legible_height((100, 300, 120, 320), 20, crops) == 5
    assert legible_height((90, 300, 120, 320), 20, crops) == 0


def test_the_drawn_glyph_is_as_high_as_it_says():
    scene = make_scene(3)
    sign = next(thing for thing in scene.things if thing.text)
    pixels = np.asarray(draw_scene(scene, sign.box)).astype(int)
    ink = np.abs(pixels - pixels[1, 1]).sum(-1) > 150
    rows = np.flatnonzero(ink.any(1))
    assert rows[-1] - rows[0] + 1 == pytest.approx(sign.glyph, abs=0.12 * sign.glyph + 1.5)


def test_a_seed_gives_one_picture_and_a_box_gives_its_part():
    scene = make_scene(5)
    assert scene == make_scene(5) != make_scene(6)
    whole = np.asarray(draw_scene(scene)).astype(int)
    left, top, right, bottom = box = crop_boxes(scene)[7]
    part = np.asarray(draw_scene(scene, box)).astype(int)
    # The background is stretched from a small picture: at a box's edge the filter has nothing to look at beyond it.
    assert np.abs(whole[top:bottom, left:right] - part)[20:-20, 20:-20].max() <= 3


def test_the_splits_share_no_background_font_or_scene():
    train = [make_scene(seed, "train") for seed in SEEDS]
    test = [make_scene(seed, "test") for seed in SEEDS]
    for of in (lambda s: {s.background}, lambda s: {t.font for t in s.things if t.text}, lambda s: {s.groups}):
        assert not set.union(*map(of, train)) & set.union(*map(of, test))
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        make_scene(0, "val")


def test_drawing_the_test_split_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    draw_scene(make_scene(0, "test"))
    load_font.cache_clear()
    with pytest.raises(ValueError, match="pip install matplotlib"):
        load_font("DejaVuSans.ttf", 30)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_answered_from_the_description(kind):
    rng = random.Random(0)
    seen = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        question = ask(scene, kind, rng)
        seen.add(re.sub("|".join((*COLORS, *SHAPES, *OBJECTS)), "*", question.text))
        assert question.kind == kind and is_correct(question.key, question.answer)
        signs = {thing.text: thing for thing in scene.things if thing.text}
        if kind == "ocr":
            assert f"{signs[question.key].color} sign" in question.text
        if kind == "attribute":
            asked = [
                thing for thing in scene.things if (thing.text or thing.name) in question.text.strip("?.").split()
            ]
            assert [thing.color for thing in asked] == [question.key]
        if kind == "hard" and question.key in signs:
            (group,) = [group for group in scene.groups if signs[question.key] in group]
            assert any(thing.called in question.text for thing in group if not thing.text)
    assert len(seen) > 3
    with pytest.raises(ValueError, match="kind must be one of"):
        ask(scene, "easy", rng)


def test_positions_follow_from_the_coordinates():
    rng = random.Random(1)
    for seed in SEEDS:
        scene = make_scene(seed)
        question = ask(scene, "position", rng)
        found = []
        for thing in scene.things:
            for name in (thing.called, f"sign {thing.text}" if thing.text else thing.name):
                found += [(match.start(), thing) for match in re.finditer(rf"the {name}\b", question.text)]
        (_, first), (_, last) = sorted(found, key=lambda entry: entry[0])
        axis = 0 if question.key in ("left", "right") else 1
        size = (scene.width, scene.height)[axis]
        distance = (first.center[axis] - last.center[axis]) / size
        assert abs(distance) >= asking.MIN_DISTANCE
        assert question.key == (("left", "right"), ("above", "below"))[axis][distance > 0]


@pytest.mark.parametrize("kind", KINDS)
def test_questions_tell_what_they_name(kind):
    rng = random.Random(2)
    for seed in SEEDS:
        scene = make_scene(seed)
        question = ask(scene, kind, rng)
        assert len(question.named) == (2 if kind == "position" else 1)
        for name, thing in question.named:
            assert len(re.findall(rf"\b{name}\b", question.text)) == 1 and thing in scene.things
            assert name in (thing.called, thing.name, f"sign {thing.text}")


def test_captions_name_all_things():
    scene = make_scene(2)
    _, text = caption(scene, random.Random(0))
    for thing in scene.things:
        assert (thing.text or thing.name) in text and thing.color in text.lower()


@pytest.mark.parametrize(
    ("key", "reply", "right"),
    [
        ("K7", "It says K7.", True),
        ("K7", "k7", False),
        ("K7", "It says K7 or K9.", False),
        ("K7", "It says K77.", False),
        ("K7", "It says K7 Z.", False),
        ("K7", "It says K7 or k9.", False),
        ("K7", "It says K7/IO5.", False),
        ("K7", "A red sign. I read: K7!", True),
        ("42", "It says 42.", True),
        ("red", "Red.", True),
        ("red", "It is red or blue.", False),
        ("red", "The star is red.", True),
        ("red", "The star is blue.", False),
        ("red", "The sign next to the green star is red.", False),
        ("red", "The sign next to the star is red.", True),
        ("K7", "It says K7.", True),
        ("left", "It is left of the sign.", True),
        ("left", "It is right of the sign.", False),
        ("left", "It is left and right.", False),
        ("left", "To the left-hand side of the red tree.", True),
        ("above", "It is above the sign K7.", True),
        ("green star", "It is a green star.", True),
        ("green star", "It is a star.", False),
        ("green star", "It is a green circle.", False),
    ],
)
def test_a_reply_is_right_if_it_holds_the_key_alone(key, reply, right):
    assert is_correct(key, reply) is right


def test_labels_say_what_a_crop_shows():
    glyph = 16
    (sign, star) = make_group(random.Random(0), glyph, [("red", "K7")], [("star", "blue")], ("DejaVuSans.ttf",))
    if not sign.text:
        sign, star = star, sign
    group = move((sign, star), 40, 60)
    sign = group[0]
    scene = Scene(400, 400, "clouds", 0, (group,))
    red, blue = list(COLORS).index("red"), list(COLORS).index("blue")

    labels = label_crop(scene, (0, 0, 192, 192), side=96, patch_size=8)
    assert labels["sign_texts"][red].tolist() == [1 + CHARACTERS.index("K"), 1 + CHARACTERS.index("7"), 0, 0]
    assert (labels["sign_texts"][[color for color in range(len(COLORS)) if color != red]] == 0).all()
    star_id = SHAPES.index("star")
    assert labels["shape_colors"][star_id] == 1 + blue and labels["sign_neighbors"][red] == 1 + star_id
    for order, (character, (x, y)) in enumerate(zip("K7", character_centers(sign)), start=1):
        patch = int(y / 192 * 12) * 12 + int(x / 192 * 12)
        assert labels["patch_names"][patch] == 1 + CHARACTERS.index(character)
        assert labels["patch_colors"][patch] == 1 + red and labels["patch_orders"][patch] == order
        assert labels["characters"][CHARACTERS.index(character)] == 1
        assert labels["ordered_characters"][order - 1, CHARACTERS.index(character)] == 1
    assert (labels["patch_names"] > 0).sum() == 3 and (labels["patch_orders"] > 0).sum() == 2
    assert labels["characters"].sum() == labels["ordered_characters"].sum() == 2
    assert labels["places"][red] * 192 == pytest.approx(sign.center)
    assert np.isnan(labels["places"]).sum() == 2 * (len(labels["places"]) - 2)

    # Cut by the crop's edge: illegible.
    middle = round(sign.center[0])
    cut = label_crop(scene, (middle, 0, middle + 192, 192), side=96, patch_size=8)
    assert (cut["sign_texts"][red] == IGNORED).all() and (cut["patch_orders"] == IGNORED).sum() == 1
    assert cut["characters"][CHARACTERS.index("7")] == 1 and cut["characters"].sum() == 1
    assert cut["ordered_characters"].sum() == 0
    # Too small to read.
    small = label_crop(scene, (0, 0, 400, 400), side=96, patch_size=8)
    assert (small["sign_texts"][red] == IGNORED).all() and set(small["characters"]) == {0, IGNORED}


def test_crops_are_the_same_for_the_same_number():
    dataset = CropDataset(10, "train", 96, 8)
    first, again, other = dataset[4], dataset[4], dataset[5]
    assert first["pixel_values"].shape == (3, 96, 96) and np.abs(first["pixel_values"]).max() <= 1
    assert all(np.array_equal(first[name], again[name], equal_nan=True) for name in first)
    assert not np.array_equal(first["pixel_values"], other["pixel_values"])
    assert make_crop(4, "train", 96) != make_crop(4, "test", 96)
