"""Scenes on photographs, from folders that are filled here."""

import math
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers import picture
from PIL import Image, ImageDraw

from mc_llava import plan_crops, scenes
from mc_llava.evaluation.tasks import TASKS
from mc_llava.scenes import KINDS_ON_PHOTOGRAPHS, Materials, ask, draw_scene, is_correct, make_photograph_scene
from mc_llava.scenes import materials as reading
from mc_llava.scenes import questions as asking
from mc_llava.scenes.camera import flat_size, from_flat, photographed, seen_at_an_angle
from mc_llava.scenes.drawing import character_centers
from mc_llava.scenes.making import make_group
from mc_llava.scenes.photographs import SIZES_ON_PHOTOGRAPHS, training_scene
from mc_llava.scenes.scene import COLORS, LARGE, SHAPES, Scene, area, legible_height, move
from mc_llava.scenes.tower import IGNORED, NAMES, CropDataset, label_crop, make_crop


FONTS = str(Path(matplotlib.get_data_path(), "fonts", "ttf"))
OBJECTS = ("apple", "grapes", "hourglass", "polar bear", "tiger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("materials")
    (folder / "photographs" / "more").mkdir(parents=True)
    (folder / "objects").mkdir()
    picture(90, 60).resize((900, 600)).save(folder / "photographs" / "wide.jpg")
    picture(60, 90, seed=1).resize((600, 900)).save(folder / "photographs" / "more" / "high.PNG")
    for index, name in enumerate(("apple", "grapes", "hourglass", "polar_bear", "tiger", "tiger-2")):
        image = Image.new("RGBA", (100, 80))
        # No photograph here contains magenta.
        ImageDraw.Draw(image).ellipse((20, 10, 79, 49), fill=(250, 0, 250 - index, 255))
        image.save(folder / "objects" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def materials(folder) -> Materials:
    return Materials(str(folder / "photographs"), str(folder / "objects"), FONTS)


class TestFolders:
    def test_names_are_those_of_files_and_numbers_are_renderings(self, materials):
        assert tuple(materials.renderings) == OBJECTS
        assert [Path(path).name for path in materials.renderings["tiger"]] == ["tiger-2.png", "tiger.png"]
        assert [Path(path).name for path in materials.backgrounds] == ["high.PNG", "wide.jpg"]
        # The transparent margin doesn't count.
        assert reading.cut_out(materials.renderings["apple"][0]).size == (60, 40)

    @pytest.mark.parametrize(
        "name",
        ["star", "red apple", "tiger cat!", "sign", "3d", "can", "photo_frame", "right arrow", "no entry"],
    )
    def test_names_by_which_replies_could_not_be_checked_are_refused(self, folder, tmp_path, name):
        Image.new("RGBA", (9, 9), "red").save(tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match=f"{name}.png can't name an object"):
            Materials(str(folder), str(tmp_path)).renderings  # noqa: B018

    def test_what_is_missing_is_named(self, folder, tmp_path):
        with pytest.raises(ValueError, match="photographs: there is no folder nowhere; .* or set photographs=null"):
            Materials("nowhere").backgrounds  # noqa: B018
        with pytest.raises(ValueError, match="objects: the folder .* has no .jpg, .jpeg, .png, .webp file"):
            Materials(str(folder), str(tmp_path)).renderings  # noqa: B018
        Image.new("RGBA", (9, 9)).save(tmp_path / "ghost.png")
        with pytest.raises(ValueError, match="ghost.png is transparent everywhere"):
            reading.cut_out(str(tmp_path / "ghost.png"))
        (tmp_path / "broken.ttf").write_bytes(b"no font")
        with pytest.raises(ValueError, match="has no font family of the split train"):
            Materials(str(folder), None, str(tmp_path)).families  # noqa: B018

    @pytest.mark.parametrize("what", ["photographs", "objects"])
    def test_broken_files_are_found_at_the_start(self, folder, tmp_path, what):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        folders = {"photographs": str(folder / "photographs"), "objects": str(folder / "objects")}
        Materials(**folders, fonts=FONTS).check()
        with pytest.raises(ValueError, match=rf"cannot read .*broken.png .*: remove it from the {what}"):
            Materials(**{**folders, what: str(tmp_path)}, fonts=FONTS).check()

    @pytest.mark.parametrize("what", ["photographs", "objects"])
    @pytest.mark.parametrize("side", [10_000, 19_000])  # Pillow only warns of the smaller one
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_files_that_are_too_large_are_found_at_the_start(self, folder, tmp_path, what, side):
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        folders = {"photographs": str(folder / "photographs"), "objects": str(folder / "objects")}
        with pytest.raises(ValueError, match=rf"cannot read .*bomb.png .* limit of .*: remove it from the {what}"):
            Materials(**{**folders, what: str(tmp_path)}, fonts=FONTS).check()

    @pytest.mark.parametrize("size", [(201, 10), (10, 201)])
    def test_objects_that_no_scene_has_a_place_for_are_refused(self, tmp_path, size):
        image = Image.new("RGBA", (300, 300))
        image.paste("red", (20, 20, 20 + size[0], 20 + size[1]))
        image.save(tmp_path / "snake.png")
        with pytest.raises(
            ValueError, match="snake.png shows .* pixels, one side may be 20 times the other: remove it"
        ):
            reading.cut_out(str(tmp_path / "snake.png"))

    def test_photographs_are_read_as_everywhere(self, tmp_path):
        image = Image.new("RGB", (300, 200), "red")
        exif = image.getexif()
        exif[0x0112] = 6  # turned by a quarter
        image.save(tmp_path / "turned.jpg", exif=exif)
        Image.new("RGBA", (30, 20)).save(tmp_path / "transparent.png")
        assert reading.photograph(str(tmp_path / "turned.jpg")).size == (200, 300)
        assert reading.photograph(str(tmp_path / "transparent.png")).getpixel((3, 3)) == (255, 255, 255)
        Image.new("RGB", (3000, 100)).save(tmp_path / "wide.png")
        assert reading.photograph(str(tmp_path / "wide.png")).size == (1280, 43)

    def test_families_are_split_by_their_first_word(self, materials):
        split = {
            reading.family_of(path): split for split, found in materials.families.items() for path in sum(found, ())
        }
        assert split["DejaVu Sans"] == split["DejaVu Serif"] == "train" and "test" in split.values()
        assert reading.family_split("Aileron") == "test"
        assert reading.family_split("Noto Sans") == reading.family_split("Noto-Serif") == "test"
        assert reading.family_split("Lato") == "train"
        # Symbol fonts draw other things in place of letters.
        assert reading.family_of(str(Path(FONTS, "cmsy10.ttf"))) is None
        assert reading.family_of(str(Path(FONTS, "STIXSizOneSymReg.ttf"))) is None

    def test_the_digest_follows_the_files(self, folder, materials, tmp_path):
        other = Materials(str(folder / "photographs"), None, FONTS)
        assert materials.digest() != other.digest() == Materials(str(folder / "photographs"), None, FONTS).digest()


class TestScenes:
    @pytest.mark.parametrize("size", [12, 35, 70])
    def test_things_lie_apart_and_are_legible_in_a_crop_and_not_in_the_whole(self, materials, size):
        for seed in range(8):
            scene = make_photograph_scene(seed, "train", materials, size)
            assert scene == make_photograph_scene(seed, "train", materials, size)
            crops = plan_crops(scene.width, scene.height, SIZES_ON_PHOTOGRAPHS[size].crops, 10**6, 96, 8)
            for thing in scene.things:
                left, top, right, bottom = thing.box
                assert 0 <= left < right <= scene.width and 0 <= top < bottom <= scene.height
                assert legible_height(thing.box, thing.glyph, [crop.box for crop in crops]) >= 7.5
                if thing.text and size >= 35:
                    assert thing.glyph * 96 / scene.height < 3
            called = [thing.called for thing in scene.things]
            assert len(set(called)) == len(called) and len({t.name for t in scene.things if not t.text}) == sum(
                not thing.text for thing in scene.things
            )
        with pytest.raises(ValueError, match="size must be one of 12, 20, 35, 70, 140, got 50"):
            make_photograph_scene(0, "train", materials, 50)

    def test_the_splits_share_no_font(self, materials):
        fonts = {
            split: {
                t.font for seed in range(12) for t in make_photograph_scene(seed, split, materials).things if t.text
            }
            for split in scenes.SPLITS
        }
        assert len(fonts["train"]) > 3 and fonts["test"] and not fonts["train"] & fonts["test"]

    def test_a_large_thing_fills_about_a_quarter(self, materials):
        kinds = set()
        for seed in range(24):
            scene = make_photograph_scene(seed, "train", materials, large=True)
            large = scene.things[0]
            share = area(large.box) / (scene.width * scene.height)
            assert share == max(area(thing.box) for thing in scene.things) / (scene.width * scene.height)
            if asking.can_ask(scene, "large"):
                kinds.add("sign" if large.text else "object" if large.picture else "shape")
                assert 0.9 * LARGE[0] <= share < 1.25 * LARGE[1]
                question = ask(scene, "large", random.Random(0), OBJECTS)
                assert question.key == large.called and is_correct(question.key, question.answer)
        assert kinds == {"sign", "object", "shape"}

    def test_the_background_is_a_part_of_the_photograph(self, materials):
        photograph = materials.backgrounds[1]
        scene = Scene(300, 200, photograph, 5, ())
        whole = np.asarray(draw_scene(scene)).astype(int)
        part = np.asarray(draw_scene(scene, (100, 50, 200, 150))).astype(int)
        assert np.abs(whole[50:150, 100:200] - part)[10:-10, 10:-10].max() <= 40
        assert np.abs(whole[50:150, 100:200] - part).mean() < 4

    def test_a_drawn_object_lies_in_its_box_and_fills_it(self, materials):
        group = make_group(random.Random(1), 40, [], [], (), [("tiger", materials.renderings["tiger"][0])])
        (tiger,) = move(group, 50, 60)
        scene = Scene(300, 300, materials.backgrounds[0], 1, ((tiger,),))
        bare = np.asarray(draw_scene(Scene(300, 300, materials.backgrounds[0], 1, ()))).astype(int)
        rows, columns = np.nonzero(np.abs(np.asarray(draw_scene(scene)).astype(int) - bare).sum(-1) > 60)
        left, top, right, bottom = tiger.box
        assert left - 1 <= columns.min() and columns.max() <= right and top - 1 <= rows.min() and rows.max() <= bottom
        assert columns.max() - columns.min() > 0.8 * (right - left) and rows.max() - rows.min() > 0.8 * (bottom - top)


class TestCamera:
    def test_the_characters_of_a_turned_sign_are_where_they_are_drawn(self, materials):
        rng = random.Random(3)
        for _ in range(5):
            (sign,) = make_group(rng, 40, [("white", "H4")], [], ("DejaVuSans-Bold.ttf",), real=True)
            (sign,) = move((sign,), 30, 40)
            assert sign.corners is not None
            scene = Scene(sign.box[2] + 40, sign.box[3] + 40, "clouds", 1, ((sign,),))
            pixels = np.asarray(draw_scene(scene).convert("L")).astype(int)
            for x, y in character_centers(sign):
                # Ink and plate are near the middle of a character.
                around = pixels[round(y) - 14 : round(y) + 15, round(x) - 14 : round(x) + 15]
                assert around.min() < 110 and around.max() > 190

    def test_corners_lie_in_the_box_and_the_flat_size_is_kept(self):
        rng = random.Random(0)
        (star,) = make_group(rng, 40, [], [("star", "blue")], ())
        for _ in range(20):
            seen = seen_at_an_angle(rng, star)
            assert all(0 <= x <= seen.box[2] and 0 <= y <= seen.box[3] for x, y in seen.corners)
            assert flat_size(seen) == pytest.approx(star.box[2:], rel=0.13)
            assert math.dist(from_flat(seen, 0, 0), seen.corners[0]) < 1e-6
            assert math.dist(from_flat(seen, 1, 1), seen.corners[2]) < 1e-6

    def test_a_seed_gives_one_photograph_of_a_picture_that_is_like_it(self):
        image = picture(16, 16).resize((700, 520))
        for seed in range(12):
            seen = photographed(image, seed)
            assert seen.size == image.size and seen.tobytes() == photographed(image, seed).tobytes()
            ratio = np.corrcoef(np.asarray(seen).ravel()[::7], np.asarray(image).ravel()[::7])[0, 1]
            assert ratio > 0.95


class TestQuestions:
    def test_all_kinds_are_answered_from_the_description(self, materials):
        rng, yes, kinds = random.Random(0), [], set()
        for seed in range(60):
            scene = training_scene(seed, materials)
            called = {t.called for t in scene.things} | {t.name for t in scene.things}
            for kind in filter(lambda kind: asking.can_ask(scene, kind), (*KINDS_ON_PHOTOGRAPHS, "large")):
                question = ask(scene, kind, rng, OBJECTS)
                kinds.add(kind)
                assert question.kind == kind and is_correct(question.key, question.answer), question
                for name, thing in question.named:
                    assert len(re.findall(rf"\b{name}\b", question.text)) == 1 and thing in scene.things
                if kind == "existence":
                    yes.append(question.key == "yes")
                    name = re.search(r"(?:there|see|show) (.*?)(?: in the picture)?\?", question.text)[1]
                    assert (re.sub(r"^an? ", "", name) in called) == yes[-1]
                if kind == "absent":
                    assert question.key.removeprefix("no ") in question.text or question.key.endswith(" sign")
                    assert question.key.removeprefix("no ") not in called and not question.named
                if kind == "object" and any(pair[1].picture for pair in asking._pairs(scene)):
                    assert question.key in OBJECTS
        assert kinds == {*KINDS_ON_PHOTOGRAPHS, "large"} and 0.35 < sum(yes) / len(yes) < 0.65

    def test_kinds_that_a_scene_has_nothing_for_are_not_asked(self, materials):
        group = make_group(random.Random(1), 40, [], [], (), [("tiger", materials.renderings["tiger"][0])])
        scene = Scene(300, 300, "clouds", 1, (group,))
        can = {kind for kind in (*KINDS_ON_PHOTOGRAPHS, "large") if asking.can_ask(scene, kind)}
        assert can == {"existence", "absent"}
        with pytest.raises(ValueError, match="kind must be one of .*, got 'object'"):
            ask(scene, "object", random.Random(0))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("tiger", "a tiger"),
            ("apple", "an apple"),
            ("orange sign", "an orange sign"),
            ("hourglass", "an hourglass"),
            ("unicorn", "a unicorn"),
            ("grapes", "grapes"),
            ("octopus", "an octopus"),
            ("bus", "a bus"),
        ],
    )
    def test_articles(self, name, expected):
        assert asking.with_article(name) == expected

    @pytest.mark.parametrize(
        ("key", "reply", "right"),
        [
            ("yes", "Yes.", True),
            ("yes", "Yes, there is a tiger.", True),
            ("yes", "No.", False),
            ("yes", "Yes and no.", False),
            ("yes", "There is a tiger.", False),
            ("no", "No, there is no tiger.", True),
            ("no", "Yes.", False),
            ("no white sign", "There is no white sign.", True),
            ("no white sign", "No, there is no white sign.", True),
            ("no white sign", "There is a white sign.", False),
            ("no white sign", "It says K7.", False),
            ("no white sign", "There is no white sign, it says K7.", False),
            ("no white sign", "There is no red sign.", False),
            ("no white sign", "There is no white sign but a red sign.", False),
            ("no grapes", "There are no grapes.", True),
            ("no tiger", "There is no tiger.", True),
            ("no tiger", "There is no lion.", False),
            ("tiger", "It is a tiger.", True),
            ("tiger", "A tiger.", True),
            ("tiger", "It is a tiger or a lion.", False),
            ("tiger", "It is a green star.", False),
            ("tiger", "There is no tiger.", False),
            ("grapes", "They are grapes.", True),
            ("polar bear", "It is a polar bear.", True),
            ("polar bear", "It is a bear.", False),
            ("red sign", "It is a red sign.", True),
            ("red sign", "It is a red star.", False),
            ("red sign", "It is a blue sign.", False),
            ("red", "There is no red star.", False),
            ("K7", "There is no sign K7.", False),
            ("left", "It is not left of the tree.", False),
            ("green star", "There is no green star.", False),
        ],
    )
    def test_a_reply_is_right_if_it_says_that_alone(self, key, reply, right):
        assert is_correct(key, reply) is right


class TestCrops:
    def test_labels_of_objects(self, materials):
        (tiger,) = make_group(random.Random(0), 20, [], [], (), [("tiger", materials.renderings["tiger"][0])])
        (tiger,) = move((tiger,), 40, 60)
        scene = Scene(400, 400, "clouds", 0, ((tiger,),))
        index, number = OBJECTS.index("tiger"), len(SHAPES) + 5 + OBJECTS.index("tiger")
        labels = label_crop(scene, (0, 0, 192, 192), 96, 8, OBJECTS)
        assert labels["objects"][index] == 1 == labels["objects"].sum()
        (patch,) = np.flatnonzero(labels["patch_names"])
        assert labels["patch_names"][patch] == 1 + 34 + number and len(NAMES) + index == number
        assert (patch // 12, patch % 12) == (int(tiger.center[1] / 16), int(tiger.center[0] / 16))
        assert labels["patch_colors"][patch] == IGNORED and (labels["shape_colors"] == 0).all()
        assert labels["places"][len(COLORS) + number] * 192 == pytest.approx(tiger.center)
        # Cut in half, or too small to be told from others.
        middle = round(tiger.center[0])
        assert label_crop(scene, (middle, 0, middle + 192, 192), 96, 8, OBJECTS)["objects"][index] == IGNORED
        assert label_crop(scene, (0, 0, 720, 720), 96, 8, OBJECTS)["objects"][index] == IGNORED

    def test_a_sign_with_an_object_next_to_it(self, materials):
        group = make_group(
            random.Random(0),
            20,
            [("red", "K7")],
            [],
            ("DejaVuSans.ttf",),
            [("apple", materials.renderings["apple"][0])],
        )
        labels = label_crop(Scene(400, 400, "clouds", 0, (group,)), (0, 0, 192, 192), 96, 8, OBJECTS)
        assert labels["sign_neighbors"].tolist() == [1 + len(NAMES) + OBJECTS.index("apple")] + [0] * 7

    def test_their_sizes_are_those_of_grids_and_of_zoom(self, materials):
        glyphs, named, photographs = [], 0, 0
        for seed in range(300):
            scene, (left, top, right, bottom) = make_crop(seed, "train", 96, materials)
            glyphs += [96 * thing.glyph / max(right - left, bottom - top) for thing in scene.things if thing.text]
            named += any(thing.picture for thing in scene.things)
            photographs += scene.background in materials.backgrounds
        assert min(glyphs) < 5 and 30 < max(glyphs) < 45
        assert 0.4 < np.mean(np.array(glyphs) < 15) < 0.85 and named > 60 and 170 < photographs < 250

    def test_number_i_is_always_the_same(self, materials):
        first, again = (CropDataset(9, "train", 96, 8, 0, materials, OBJECTS)[4] for _ in range(2))
        assert all(np.array_equal(first[name], again[name], equal_nan=True) for name in first)
        assert first["objects"].shape == (len(OBJECTS),) and np.abs(first["pixel_values"]).max() <= 1


class TestTask:
    def test_questions_of_all_kinds_about_given_photographs(self, folder, materials):
        (fonts := folder / "fonts").mkdir(exist_ok=True)
        for path in map(Path, (*materials.families["train"][0], *materials.families["test"][0])):
            (fonts / path.name).write_bytes(path.read_bytes())
        count, questions = TASKS["photographs"].read(str(folder))
        first = [question for question, _ in zip(questions, range(8))]
        assert count == 8 * 500 and [question.part for question in first] == [*KINDS_ON_PHOTOGRAPHS, "large"]
        assert first[0].image is first[6].image is not first[7].image
        _, again = TASKS["photographs"].read(str(folder))
        assert [(q.id, q.prompt, q.expected) for q, _ in zip(again, range(8))] == [
            (q.id, q.prompt, q.expected) for q in first
        ]
        for question in first:
            assert TASKS["photographs"].score(question, "no idea") in (0, float(question.expected == "no"))

    def test_what_is_missing_is_said_before_the_first_question(self, monkeypatch, tmp_path):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install scikit-image, or pass --data photographs=FOLDER"):
            TASKS["photographs"].read("")
        with pytest.raises(ValueError, match="photographs: there is no folder"):
            TASKS["photographs"].read(str(tmp_path))
