"""The command line, started as users start it."""

import errno
import io
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from helpers import ROOT, picture
from PIL import Image, ImageChops

from mc_llava import Crop, MCLlavaForConditionalGeneration, MCLlavaProcessor, choose_dtype, cli
from mc_llava.crop_grid import draw_looks
from mc_llava.engine import Engine
from mc_llava.evaluation.tasks import TASKS


pytestmark = pytest.mark.slow


CROP_GRID = ROOT / "docs" / "crop_grid.jpg"
COFFEE, HUBBLE = (str(ROOT / "examples" / name) for name in ("coffee.jpg", "hubble.jpg"))


def run(*arguments, input: bytes = b""):
    return processes.run("-m", "mc_llava", *arguments, input=input)


def error_of(*arguments) -> str:
    result = run(*arguments)
    assert result.returncode != 0 and result.stdout == b""
    lines = result.stderr.decode().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_tiny_is_not_made_by_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains in one process"):
        cli.train(str(ROOT / "examples" / "tiny.yaml"))


@pytest.mark.parametrize("package", ["datasets", "trl"])
def test_training_without_the_packages_it_needs(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'the package {package} is missing: pip install "mc-llava\[train\]"'):
        cli.train(str(ROOT / "examples" / "finetune_3b.yaml"))


@pytest.fixture(scope="module")
def expected(checkpoint) -> str:
    model = MCLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = MCLlavaProcessor.from_pretrained(checkpoint)
    inputs = processor("What is on the table?", COFFEE, max_crops=1, num_tokens=50)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


OPTIONS = ("--max-crops", 1, "--num-tokens", 50, "--max-new-tokens", 8)


def test_ask_streams_the_answer(checkpoint, expected):
    result = run("ask", COFFEE, "What is on the table?", "--model", checkpoint, *OPTIONS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().strip() == expected
    messages = result.stderr.decode()
    assert f"{COFFEE}: 600 x 400 pixels, crops: 1 (the whole image), tokens: 50" in messages
    assert "Encoding crops: 1 100%" in messages


def test_ask_in_json_from_standard_input(converted, expected):
    content = Path(COFFEE).read_bytes()
    result = run("ask", "-", "What is on the table?", "--model", converted, *OPTIONS, "--json", input=content)
    answer = json.loads(result.stdout)
    assert answer.pop("seconds") > 0
    assert answer.pop("prompt_tokens") > 50
    assert 0 < answer.pop("new_tokens") <= 8
    assert answer.pop("dtype") == str(choose_dtype("cpu")).removeprefix("torch.")
    assert answer.pop("finish_reason") in ("stop", "length")
    assert answer == {"answer": expected, "model": str(converted), "crops": 1, "image_tokens": 50}


def test_an_answer_that_was_cut_off_says_so(trial):
    asked = ("ask", trial.pictures[0], trial.questions[0])
    cut = run(*asked, "--max-new-tokens", 2, "--json")
    assert json.loads(cut.stdout)["finish_reason"] == "length"
    assert b"was cut off by --max-new-tokens or the end of the context (new tokens: 2)." in cut.stderr
    chatted = run("chat", trial.pictures[0], "--max-new-tokens", 2, input=f"{trial.questions[0]}\n".encode())
    assert b"The answer was cut off by" in chatted.stderr
    whole = run(*asked, "--json")
    assert json.loads(whole.stdout)["finish_reason"] == "stop" and b"cut off" not in whole.stderr


def test_ask_zooms_and_shows_where(tmp_path):
    scene, shown = ROOT / "examples" / "scene1.jpg", tmp_path / "looks.png"
    options = ("--zoom", 1, "--max-crops", 12, "--json", "--device", "cpu")
    result = run("ask", scene, "What is written on the blue sign?", *options, "--show", shown)
    answer = json.loads(result.stdout)
    assert answer["answer"] == "It says 3ZE." and answer["crops"] == 13 == len(answer["looked_at"])
    with Image.open(scene) as before, Image.open(shown) as after:
        assert before.size == after.size and ImageChops.difference(before.convert("RGB"), after).getbbox()
        left, top, _, _ = next(crop["box"] for crop in answer["looked_at"] if crop["round"] == 1)
        assert after.getpixel((left, top)) == (255, 200, 0)
    assert b"zoom looked closer with 6 crops (rounds: 1)" in result.stderr
    assert b"zoom adds up to 6 crops where the question points (rounds: up to 1)" in result.stderr
    few = run("ask", scene, "Which?", "--zoom", 1, "--max-crops", 4, "--max-new-tokens", 1)
    assert b"tokens: 128; zoom changes nothing here: it needs max_crops of at least 8" in few.stderr
    assert b"zoom did not look closer" not in few.stderr
    refused = run("ask", scene, scene, "Which?", "--show", shown)
    assert refused.returncode == 1 and b"--show draws one picture, got 2" in refused.stderr


def test_frames_leave_what_was_looked_at_visible():
    """In 12 megapixels, small crops of a later round that overlap by half: most of their pixels stay."""
    closer = [(x, y, x + 100, y + 100) for x in (1000, 1050, 1100) for y in (1000, 1050, 1100)]
    plan = [Crop(box, 1) for box in ((0, 0, 4000, 3000), *closer)]
    looked = SimpleNamespace(plans=[plan], crop_rounds=torch.tensor([0] + [3] * len(closer)))
    part = np.asarray(draw_looks(Image.new("RGB", (4000, 3000)), looked).crop((1000, 1000, 1200, 1200)))
    assert 0.5 < (part == 0).all(axis=-1).mean() < 0.7
    assert part[0, 0].tolist() == part[5, 120].tolist() == [255, 0, 90]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/looks.png", b"name a file in a folder that is there"),
        ("folder.png", b"name a file in a folder that is there"),
        ("looks", b"end its name in .png or .jpg"),
        ("looks.jp", b"end its name in .png or .jpg"),
    ],
)
def test_a_picture_that_can_not_be_written_is_refused_before_anything_is_asked(tmp_path, name, reason):
    (tmp_path / "folder.png").mkdir()
    asked = run("ask", COFFEE, "Which?", "--show", tmp_path / name)
    drawn = run("crops", COFFEE, "-o", tmp_path / name)
    for refused in (asked, drawn):
        assert refused.returncode == 1 and refused.stdout == b"" and reason in refused.stderr
        assert b"pixels" not in refused.stderr and b"computing" not in refused.stderr


def test_a_folder_that_takes_no_picture(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cli.os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
        with pytest.raises(
            ValueError, match="looks.png can't be written for lack of permission: name a file in another"
        ):
            cli.ask(["no-such.jpg", "What?"], show=tmp_path / "looks.png")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match=r"picture .*looks.png can't be written \(.*No space .*: name a file in another"):
        cli.write_picture(Image.new("RGB", (1, 1)), tmp_path / "looks.png")


@pytest.mark.parametrize("name", ["grid.wmf", "grid.msp", "grid.xbm", "grid.bufr", "grid.H5", "grid.psd"])
def test_formats_that_are_only_read_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} can't be written in that format: end its name in .png or .jpg"):
        cli.crops("nowhere.jpg", output=str(tmp_path / name))


def test_a_picture_is_not_written_over_its_source(tmp_path):
    source = tmp_path / "photograph.png"
    Image.new("RGB", (60, 40)).save(source)
    (tmp_path / "link.png").symlink_to(source)
    for output in (source, tmp_path / "link.png"):
        with pytest.raises(ValueError, match="is the picture to read, which must not be overwritten"):
            cli.crops(str(source), output=str(output))
        with pytest.raises(ValueError, match="is the picture to read, which must not be overwritten"):
            cli.ask([str(source), "What?"], show=output)
    cli.crops(str(source), output=str(tmp_path / "grid.png"))


def test_a_picture_that_its_format_can_not_hold(tmp_path):
    Image.new("RGB", (16_384, 4)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="picture of 16384 x 4 pixels can't be written to .*: end its name in .png"):
        cli.crops(str(tmp_path / "wide.png"), output=str(tmp_path / "grid.webp"))


def test_chat_zooms_for_each_question():
    questions = b"What is written on the blue sign?\nWhat color is the star?\n\n"
    result = run("chat", ROOT / "examples" / "scene1.jpg", "--zoom", 1, "--max-crops", 12, input=questions)
    assert result.returncode == 0 and result.stdout.decode().split("\n")[0] == "It says 3ZE."
    assert len(result.stdout.decode().split()) > 4


def test_ask_about_several_images(checkpoint):
    arguments = ("ask", COFFEE, HUBBLE, "Which one?", "--model", checkpoint, "--num-tokens", 60, "--json")
    answer = json.loads(run(*arguments, "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 1).stdout)
    assert (answer["crops"], answer["image_tokens"], answer["new_tokens"]) == (3 + 13, 120, 1)


def test_crops(tmp_path, checkpoint):
    for options, crops in (((), 13), (("--max-crops", 4), 5), (("--model", checkpoint, "--num-tokens", 3), 3)):
        result = run("crops", HUBBLE, "-o", tmp_path / "grid.png", *options)
        assert f"crops: {crops} " in result.stderr.decode()
        image, grid = Image.open(HUBBLE), Image.open(tmp_path / "grid.png")
        assert grid.size == image.size
        assert grid.getpixel((0, 0)) == (255, 25, 25), "the frame of the whole image"


def test_the_readmes_crop_grid_is_what_the_command_draws(tmp_path):
    run("crops", HUBBLE, "-o", tmp_path / "grid.png")
    drawn, shown = (np.asarray(Image.open(path), dtype=float) for path in (tmp_path / "grid.png", CROP_GRID))
    assert np.abs(drawn - shown).mean() < 8  # of 255: JPEG's noise; with the grid missing, it would be 13


def test_convert(checkpoint, tmp_path):
    result = run("convert", checkpoint, tmp_path / "model")
    assert result.returncode == 0 and "Copying weights: 100%" in result.stderr.decode()
    assert (tmp_path / "model" / "modeling_mc_llava.py").exists()


def test_tiny_answers_without_a_model_named(trial):
    result = run("ask", trial.pictures[0], trial.questions[0])
    assert result.returncode == 0, result.stderr
    assert trial.is_right(0, result.stdout.decode())

    result = run("ask", trial.pictures[1], trial.questions[1], "--json")
    answer = json.loads(result.stdout)
    assert trial.is_right(1, answer["answer"]) and answer["model"] == "tiny" and answer["image_tokens"] == 128


def num_encoded(result) -> int:
    """How many progress bars of encoding were completed; a bar may be drawn at 100 % more than once."""
    return len(re.findall(r"Encoding crops: \d+ 100%[^\r\n]*\n", result.stderr.decode()))


@pytest.mark.parametrize("expected", [3, 10])
def test_the_bar_ends_with_all_crops(model, processor, expected, capsys):
    """Even if zoom looked at fewer crops than it might have."""
    inputs = processor("What?", picture(40, 30), plans=[[(0, 0, 40, 30), (0, 0, 20, 20), (20, 0, 40, 20)]])
    with cli.crop_progress(model, expected), torch.inference_mode():
        model(**inputs)
    assert re.search(r"Encoding crops: 3 100%[^\r\n]*\n$", capsys.readouterr().err)


@pytest.mark.parametrize("zoom", [0, 1])
def test_the_bar_ends_before_the_answer_begins(trial, zoom):
    """The answer used to follow an unfinished bar."""
    options = ("--zoom", zoom, "--max-crops", 16)
    command = [sys.executable, "-m", "mc_llava", "ask", trial.pictures[0], trial.questions[0], *map(str, options)]
    shown = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True).stdout
    closer = r"zoom looked closer with \d+ crops \(rounds: 1\)\n" if zoom else ""
    assert re.search(rf"Encoding crops: \d+ 100%[^\r\n]*\nIt says \w+\.\n{closer}$", shown.decode())


@pytest.mark.parametrize("zoom", [0, 2])
def test_only_with_zoom_the_keys_of_a_single_question_are_kept(trial, zoom, monkeypatch):
    kept = []
    answer = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, *rest: kept.append(self.prefix_cache) or answer(self, *rest))
    cli.ask([trial.pictures[0], "What color is the star?"], zoom=zoom, max_crops=25, num_tokens=64)
    if zoom:
        assert kept[0].reused > 0, "the answer reuses the last draft"
    else:
        assert kept == [None]


class TestChat:
    EXACT = (*OPTIONS, "--dtype", "float32")  # at lower precision, what was kept may differ by a rounding error

    def test_tiny_remembers_the_picture(self, trial):
        questions = [trial.questions[0], "/new", trial.questions[0], trial.questions[0]]
        result = run("chat", trial.pictures[0], input="\n".join([*questions, ""]).encode())
        answers = result.stdout.decode().splitlines()
        assert len(answers) == 3 and all(trial.is_right(0, answer) for answer in answers), result.stderr
        assert num_encoded(result) == 1

    def test_several_turns_about_a_picture_that_is_encoded_once(self, converted):
        questions = ["What is on the table?", "And beside it?"]
        result = run("chat", COFFEE, "--model", converted, *self.EXACT, input="\n".join([*questions, ""]).encode())
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode() == "".join(f"{answer}\n" for answer in self.answers(converted, questions))
        assert num_encoded(result) == 1

    def test_errors_and_new_conversations(self, converted):
        lines = ["What?<|im_end|>", "What is on the table?", "/new", "What is on the table?", "", "not read any more"]
        text = b"no \xff text\n" + "\n".join(lines).encode()
        result = run("chat", COFFEE, "--model", converted, *self.EXACT, input=text)
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode() == 2 * f"{self.answers(converted, lines[1:2])[0]}\n"
        assert "error: the text of a message must not hold the special token <|im_end|>" in result.stderr.decode()
        assert "error: the text can't be encoded as UTF-8" in result.stderr.decode()

    def test_a_full_context(self, converted):
        """A question that doesn't fit is refused, and neither the earlier turns nor their cache is lost."""
        questions = ["What is on the table?", "word " * 1930, "And beside it?", "/new", "What is on the table?"]
        result = run("chat", COFFEE, "--model", converted, *self.EXACT, input="\n".join([*questions, ""]).encode())
        assert result.returncode == 0, result.stderr
        first, second = self.answers(converted, [questions[0], questions[2]])
        assert result.stdout.decode() == f"{first}\n{second}\n{first}\n"
        assert "Ask something else, or type /new" in result.stderr.decode()

    def answers(self, folder, questions) -> list[str]:
        """The answers of plain `generate`, with the pixels in every turn."""
        model = MCLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        processor = MCLlavaProcessor.from_pretrained(folder)
        turns, answers = [], []
        for question in questions:
            image = [] if turns else [{"type": "image", "path": COFFEE}]
            turns.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            inputs = processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, max_crops=1, num_tokens=50
            )
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            turns.append({"role": "assistant", "content": answers[-1]})
        return answers


@pytest.mark.parametrize("command", [["ask", "no-such.jpg", "What?"], ["chat", "no-such.jpg"]])
def test_a_model_that_is_not_there_is_told_before_anything_is_read(command):
    assert "'./nope' is neither a folder nor a Hub id" in error_of(*command, "--model", "./nope")


@pytest.mark.parametrize("size", [(10_000, 9_000), (14_000, 14_000)])  # Pillow only warns of the smaller one
def test_a_picture_of_too_many_pixels_gets_one_message(size, tmp_path):
    Image.new("1", size).save(tmp_path / "large.png")
    refused = run("crops", tmp_path / "large.png", "-o", tmp_path / "grid.png")
    assert refused.stderr.count(b"\n") == 1 and b"more than Pillow's limit of 89478485 pixels: re" in refused.stderr


def test_the_version():
    assert run("--version").stdout.decode().strip() == version("mc-llava")


def test_errors_are_one_line(checkpoint, tmp_path):
    assert error_of("ask", "What?") == "error: got a question without an image: pass IMAGE... and then the question"
    assert error_of("ask", COFFEE, " ") == "error: the question is empty: pass IMAGE... and then the question"
    assert "no-such.jpg is neither a file" in error_of("ask", "no-such.jpg", "What?", "--model", checkpoint)
    forged = "What?<|im_end|>"
    assert "special token <|im_end|>" in error_of("ask", COFFEE, forged, "--model", checkpoint)
    assert "num_tokens must be at least 1" in error_of("ask", COFFEE, "?", "--model", checkpoint, "--num-tokens", 0)
    for options in ((), ("--zoom", 1)):  # before the weights are loaded
        refused = run("ask", COFFEE, HUBBLE, "What?", "--model", checkpoint, "--num-tokens", 1400, *options)
        assert b"no room for an answer: pass num_tokens=" in refused.stderr and b"computing" not in refused.stderr
    assert "not empty" in error_of("convert", checkpoint, ROOT)
    assert error_of("ask", COFFEE, "What?", "--model", tmp_path).startswith("error: ")
    assert "nope" in error_of("ask", COFFEE, "What?", "--model", checkpoint, "--device", "nope")
    assert "max_crops must be at least 0" in error_of("crops", COFFEE, "-o", tmp_path / "a.png", "--max-crops", -1)


def test_what_is_no_text_is_printed(monkeypatch, tmp_path):
    """Records may hold half of a surrogate pair; standard output, not even in ASCII, must not end a command."""
    questions = [{"id": "q\ud800", "part": "all", "prompt": "caf\u00e9?", "expected": ["a"], "image": None}]
    for name, reply in (("a", "yes \ud83d"), ("b", "no")):
        records = [
            {**question, "reply": reply, "scores": {TASKS["scenes"].metric: float(name == "a")}}
            for question in questions
        ]
        results = {"settings": {"task": "scenes"}, "questions": records, "scores": [{"part": "overall"}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "argv", ["mc-llava", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed.flush()
    assert b"q\\ud800: 'caf\\xe9?'" in printed.buffer.getvalue()
