"""The study, with a random model and a few scenes."""

import json
import sys
from pathlib import Path

import matplotlib
import processes
import pytest
import torch
from helpers import picture, write_untrained_tiny
from PIL import Image

from mc_llava import MCLlavaConfig, MCLlavaImageProcessor, scenes
from mc_llava.estimate import estimate
from mc_llava.evaluation import running
from mc_llava.evaluation.tasks import PHOTOGRAPH_KINDS
from mc_llava.scenes import study, zoom_study
from mc_llava.scenes.study import Setting, Study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "model"
    write_untrained_tiny(folder, layers=1)
    return folder


@pytest.mark.slow
def test_every_setting_is_measured_drawn_and_found_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SETTINGS", (Setting(0, 128), Setting(2, 128), Setting(32, 40)))
    found = study.run_study(Study(str(folder), tmp_path / "work", 2), tmp_path / "docs")
    assert json.loads((tmp_path / "docs" / "study.json").read_text()) == found
    assert [(row["max_crops"], row["num_tokens"]) for row in found["settings"]] == [(0, 128), (2, 128), (32, 40)]
    whole, few, _ = found["settings"]
    assert whole["crops"] == 1 and 1 < few["crops"] <= 3 and whole["gflops"] < few["gflops"]
    for row in (*(row["accuracy"] for row in found["settings"]), found["blind"]):
        assert set(row) - {"all"} == set(scenes.KINDS)
        assert all(
            row[kind]["questions"] == 2 and 0 <= row[kind]["low"] <= row[kind]["score"] for kind in scenes.KINDS
        )
    assert whole["accuracy"]["all"]["questions"] == 2 * len(scenes.KINDS)
    for name in ("study_crops.png", "study_tokens.png", "study_kinds.png"):
        with Image.open(tmp_path / "docs" / name) as figure:
            assert figure.width > 500
    table = study.markdown(found).splitlines()
    assert [line.split("|")[1:3] for line in table[2:6]] == [
        [" 0 ", " 0 "],
        [" 0 ", " 2 "],
        *[[f" {name} ", " "] for name in ("blind", "majority")],
    ]
    score = found["settings"][2]["accuracy"]["all"]["score"]
    assert table[7] == "| `max_crops` \\ `num_tokens` | 40 | 128 |" and table[-1] == f"| 32 | {score:.1f} |  |"

    def refuse(*args, **kwargs):
        raise AssertionError("what was asked before is asked again")

    monkeypatch.setattr(running, "answer_questions", refuse)
    assert study.run_study(Study(str(folder), tmp_path / "work", 2), tmp_path / "docs") == found


@pytest.mark.slow
def test_zoom_is_measured_against_the_grid(folder, tmp_path, monkeypatch):
    settings = [Setting(8, 40, zoom, task) for zoom in (0, 1) for task in ("scenes", "scenes70")]
    monkeypatch.setattr(zoom_study, "SETTINGS", settings)
    measured = Study(str(folder), tmp_path / "work", 2)
    found = zoom_study.run_zoom_study(measured, tmp_path)
    assert json.loads((tmp_path / "study_zoom.json").read_text()) == found
    assert [(row["size"], row["zoom"]) for row in found["settings"]] == [(35, 0), (70, 0), (35, 1), (70, 1)]
    for row in found["settings"]:
        kinds = {*scenes.KINDS, *(["large"] if row["size"] == 35 else [])}
        assert set(row["accuracy"]) == {*kinds, "all"} and row["accuracy"]["all"]["questions"] == 2 * len(kinds)
        assert ("inside" in row) == bool(row["zoom"]) and row["crops"] <= 9
    uniform, zoomed = found["settings"][1::2]
    assert zoomed["gflops"] > uniform["gflops"], "the look costs something"
    with Image.open(tmp_path / "study_zoom.png") as figure:
        assert figure.width > 500
    table = zoom_study.markdown(found).splitlines()
    assert len(table) == 6 and table[2].startswith("| 1/35 | 0 | 8 | 40 | ") and table[2].endswith(" |  |")


@pytest.mark.slow
def test_photographs_are_measured_by_kind(folder, tmp_path, monkeypatch):
    (tmp_path / "pictures" / "photographs").mkdir(parents=True)
    picture(90, 60).resize((900, 600)).save(tmp_path / "pictures" / "photographs" / "photo.jpg")
    (tmp_path / "pictures" / "fonts").symlink_to(Path(matplotlib.get_data_path(), "fonts", "ttf"))
    monkeypatch.setattr(study, "SETTINGS", [Setting(0, 128), Setting(8, 40, zoom=1)])
    measured = Study(str(folder), tmp_path / "work", 1, str(tmp_path / "pictures"))
    found = study.run_study(measured, tmp_path, "photographs")
    assert json.loads((tmp_path / "study_photographs.json").read_text()) == found
    for row in found["settings"]:
        assert set(row["accuracy"]) == {*PHOTOGRAPH_KINDS, "all"} and row["accuracy"]["all"]["questions"] == 8
    whole, zoomed = found["settings"]
    assert whole["crops"] == 1 < zoomed["crops"] and (whole["zoom"], zoomed["zoom"]) == (0, 1)
    assert len({found["gflops"] for found in whole["accuracy"].values()}) == 1
    records = [
        {"part": kind, "scores": {"accuracy": 1}, "crops": crops, "tokens": 40}
        for kind, crops in (("ocr", 9), ("large", 1))
    ]
    row = measured.measure(Setting(8, 40, zoom=1), records)
    costs = [row["accuracy"][kind]["gflops"] for kind in ("large", "all", "ocr")]
    assert costs == sorted(set(costs)) and row["gflops"] == costs[1] == pytest.approx(sum(costs[::2]) / 2, abs=1e-3)
    table = study.markdown(found).splitlines()
    assert table[2].startswith("| 0 | 0 | 128 | 1 | ") and "existence | absent | large | GFLOPs" in table[0]
    assert table[3].startswith("| 1 | 8 | 40 | ") and len(table) == 10, "zoom is not in the second table"
    assert (tmp_path / "study_photographs_crops.png").exists()


def test_a_named_thing_is_inside_if_a_closer_crop_holds_all_of_it():
    ((_, sign),) = scenes.benchmark_question(3, "ocr").named
    left, top, right, bottom = sign.box
    record = {"id": "ocr-3", "looked_at": [{"box": [0, 0, 9999, 9999], "round": 0}]}
    assert zoom_study.is_inside(record, 35) == 0
    record["looked_at"].append({"box": [left + 1, top, right, bottom], "round": 1})
    assert zoom_study.is_inside(record, 35) == 0
    record["looked_at"].append({"box": [left, top, right, bottom], "round": 2})
    assert zoom_study.is_inside(record, 35) == 1 and zoom_study.is_inside(record, 70) == 0
    whole, *_ = record["looked_at"]
    scout = {"box": [left - 9, top, right, bottom], "round": 0}
    assert zoom_study.is_inside({**record, "looked_at": [whole, scout]}, 35) == 1, "it didn't look closer"
    record["looked_at"][2]["box"] = [0, 0, 9, 9]
    assert zoom_study.is_inside({**record, "looked_at": [whole, scout, *record["looked_at"][1:]]}, 35) == 0


@pytest.mark.slow
def test_the_command_prints_the_table_of_all_settings(folder, tmp_path):
    options = ("--part", "grid", "--model", folder, "--num-scenes", 1)
    places = ("--work", tmp_path / "work", "--output", tmp_path / "docs")
    result = processes.run("-m", "mc_llava", "study", *options, *places, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "docs" / "study.json").read_text())
    assert len(found["settings"]) == len(study.SETTINGS) and result.stdout == study.markdown(found) + "\n"


def test_pictures_are_drawn_once_and_their_questions_are_in_different_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BATCH_SIZE", 2)
    drawn, draw = [], scenes.draw_scene
    monkeypatch.setattr(scenes, "draw_scene", lambda scene: drawn.append(scene) or draw(scene))
    measured = Study(str(folder), tmp_path / "work", 3)
    records = measured.ask(Setting(2, 40))
    kinds = [f"{kind}-{seed}" for seeds in ((0, 1), (2,)) for kind in scenes.KINDS for seed in seeds]
    assert [record["id"] for record in records] == kinds
    engines, engine = [], Study.engine
    monkeypatch.setattr(Study, "engine", lambda *arguments: engines.append(engine(*arguments)) or engines[-1])
    more = measured.ask(Setting(4, 40))
    assert engines[0].prefix_cache.reused > 300, "of 3 * 40 tokens, three times"
    assert len(drawn) == 3 and [record["id"] for record in more] == kinds
    alone = running.evaluate("scenes", engine(measured, Setting(4, 40)), tmp_path, model="", revision="", limit=12)
    replies = {record["id"]: record["reply"] for record in alone["questions"]}
    assert replies == {record["id"]: record["reply"] for record in more}


def test_with_zoom_the_questions_about_a_picture_are_in_one_batch_and_cut_it_once(folder, tmp_path, monkeypatch):
    cut, module = [], sys.modules[MCLlavaImageProcessor.__module__]
    cut_each = module.cut_each
    monkeypatch.setattr(module, "cut_each", lambda image, *args: cut.append(image) or cut_each(image, *args))
    records = Study(str(folder), tmp_path / "work", 2).ask(Setting(10, 40, zoom=1))
    assert [record["id"] for record in records] == [f"{kind}-{seed}" for seed in range(2) for kind in scenes.KINDS]
    assert len(cut) == 2


def test_too_many_scenes_and_failed_questions_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_scenes must be at most 500, got 501"):
        Study(str(folder), tmp_path / "work", num_scenes=501)
    answer, question = running.Engine.answer, scenes.benchmark_question(0, "hard").text

    def fail(engine, conversations, **options):
        if any(question == part.get("text") for (turn,) in conversations for part in turn["content"]):
            raise ValueError("no such luck")
        return answer(engine, conversations, **options)

    monkeypatch.setattr(running.Engine, "answer", fail)
    with pytest.raises(ValueError, match="the question hard-0 failed: no such luck.*remove .*crops-0-tokens-728"):
        study.run_study(Study(str(folder), tmp_path / "work", 1), tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_commonest_answer_and_the_accuracies():
    keys = dict.fromkeys(scenes.KINDS, ("red", "red", "K7", "K8"))
    keys["position"] = ("left", "right", "right", "above")
    found = study.majority([{"part": kind, "expected": key} for kind in keys for key in keys[kind]])
    assert found["ocr"] == {"answer": "red", "score": 50.0}
    assert found["position"] == {"answer": "right or above", "score": 75.0}
    (found,) = study.accuracies([("ocr", 1.0)] * 3 + [("ocr", 0.0)]).values()
    assert found == {"score": 75.0, "low": 30.1, "high": 95.4, "questions": 4}


def test_flops_of_each_question(folder):
    config = MCLlavaConfig.from_pretrained(folder)
    costs = []
    for crops, tokens in ((9, 64), (7, 60), (9, 64)):
        cost = estimate(config, crops, tokens, new_tokens=8, dtype=torch.bfloat16)
        costs.append(cost.tower_flops + cost.prefill_flops + 8 * cost.flops_per_new_token)
    records = [{"crops": crops, "tokens": tokens} for crops, tokens in ((9, 64), (7, 60), (9, 64))]
    assert study.flops_of(config, records) == costs


def test_looks_count(folder):
    config = MCLlavaConfig.from_pretrained(folder)
    scout = {"round": 0, "relevance": 0.5, "box": [0, 0, 400, 300]}
    closer = {"round": 1, "relevance": None, "box": [0, 0, 100, 100]}
    assert study.count_looks([scout, closer]) == 1 and study.count_looks([scout]) == 1
    assert study.count_looks([scout, {**closer, "relevance": 0.1}, {"round": 2, "relevance": None}]) == 2
    assert study.count_looks([{**scout, "relevance": None}]) == 0, "a picture without a grid"
    record = {"crops": 9, "tokens": 64}
    cost = estimate(config, 9, 64, new_tokens=8, dtype=torch.bfloat16, looks=1)
    grid, closer, drafted = study.flops_of(
        config, [{**record, "looked_at": found} for found in ([], [scout, closer], [scout])]
    )
    assert closer - grid == cost.look_flops > 0
    assert closer - drafted == cost.prefill_flops > 0, "what the answer reuses of a draft"
