"""Runs that are killed at random moments and started again, and runs whose disk is full: nothing is lost or torn."""

import json
import os
import random
import secrets
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, picture, write_untrained_tiny
from processes import Process
from safetensors.torch import load_file

from mc_llava.training import last_checkpoint


pytestmark = pytest.mark.slow
pytest.importorskip("trl", reason='what trains is not here: pip install "mc-llava[train]"')

KILLS = 20
ROWS = 24
STEPS = 6


def run(words, kill_after=None, limit=None) -> tuple[int, str]:
    """Run a command, and kill it after this many seconds if it still runs. Returns its exit status and output."""
    process = Process("-m", "mc_llava", *words, largest=limit)
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    result = process.wait()
    return result.returncode, (result.stdout + result.stderr).decode(errors="replace")


@pytest.fixture
def rng():
    seed = int(os.environ.get("FUZZ_SEED") or secrets.randbelow(10**6))
    print(f"FUZZ_SEED={seed} repeats this")
    return random.Random(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, pictures, questions about them, and rows to train on."""
    folder = tmp_path_factory.mktemp("kills")
    write_untrained_tiny(folder / "model", layers=1)
    (folder / "photos").mkdir()
    questions, rows = [], []
    for index in range(ROWS):
        name = f"{index}.png"
        picture(60 + 5 * index, 90, seed=index).save(folder / "photos" / name)
        questions.append({"id": f"q{index}", "image": f"photos/{name}", "question": f"What is number {index}?"})
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is number {index % 5}."}]
        rows.append({"id": str(index), "image": name, "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.json"),
        "images": str(folder / "photos"),
        "train": ["coordinates", "projector", "language_model"],
        "max_crops": [0, 4],
        "num_tokens": [8, 16],
        "max_steps": STEPS,
        "save_steps": 1,
        "log_steps": 1,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "workers": 0,
        "bf16": False,
        "resume": True,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def batch(folder, output):
    numbers = ("--batch-size", 2, "--max-new-tokens", 8, "--max-crops", 2, "--num-tokens", 16, "--device", "cpu")
    return ["batch", folder / "rows.jsonl", "-o", output, "--model", folder / "model", *numbers]


def train(folder, output):
    return ["train", folder / "recipe.yaml", f"output={output}"]


def evaluate(folder, output):
    numbers = ("--limit", 6, "--batch-size", 1, "--max-crops", 0, "--num-tokens", 16, "--device", "cpu")
    return ["eval", "--model", folder / "model", "--tasks", "scenes", "--output", output, *numbers]


def records_of(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def losses(output: Path) -> dict[int, float]:
    history = json.loads(Path(last_checkpoint(output), "trainer_state.json").read_text())["log_history"]
    found = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), "every step once"
    return dict(found)


def check_batch(output: Path, whole: Path):
    assert records_of(output) == records_of(whole)
    assert not output.with_name(output.name + ".partial").exists()


def check_training(output: Path, whole: Path):
    assert losses(output) == pytest.approx(losses(whole), rel=1e-4)
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, whole))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


def remove(output: Path):
    shutil.rmtree(output) if output.is_dir() else output.unlink()


@pytest.mark.parametrize(
    ("command", "name", "check"),
    [(batch, "out.jsonl", check_batch), (train, "run", check_training)],
    ids=["batch", "training"],
)
def test_kills_at_random_moments(folder, tmp_path, rng, command, name, check):
    whole, output = tmp_path / f"whole-{name}", tmp_path / name
    begin = time.monotonic()
    assert run(command(folder, whole))[0] == 0
    seconds = time.monotonic() - begin
    kills = finished = 0
    while kills < KILLS:
        status, said = run(command(folder, output), kill_after=rng.uniform(0, 1.1 * seconds))
        if status == -signal.SIGKILL:
            kills += 1
            continue
        assert status == 0, said
        check(output, whole)
        remove(output)
        finished += 1
    status, said = run(command(folder, output))
    assert status == 0, said
    check(output, whole)
    print(f"{kills} kills, {finished + 1} runs that finished, {seconds:.1f} s without a kill")
    status, said = run(command(folder, output))  # a run that has finished
    assert status == 0, said
    check(output, whole)


class TestFullDisk:
    def fails(self, words, limit, name):
        status, said = run(words, limit=limit)
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 1 and line.startswith("error: cannot write ") and name in line, said
        assert "free some space and" in line, said
        assert "Traceback" not in said

    def test_of_a_batch(self, folder, tmp_path):
        whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
        assert run(batch(folder, whole))[0] == 0
        for limit in (500, 4000, 7000):
            self.fails(batch(folder, output), limit, "out.jsonl")
            assert not output.exists()
        journal = output.with_name("out.jsonl.partial").read_bytes().split(b"\n")[:-1]  # the rest is torn
        kept = [json.loads(line) for line in journal[1:]]
        assert 4 < len(kept) < ROWS
        assert [record["row"] for record in kept] == list(range(len(kept)))
        status, said = run(batch(folder, output))
        assert status == 0, said
        assert f"{len(kept) // 2 * 2}/{ROWS}" in said, "what was answered is not asked again"
        check_batch(output, whole)

    def test_of_an_evaluation(self, folder, tmp_path):
        assert run(evaluate(folder, tmp_path / "whole"))[0] == 0
        half = (tmp_path / "whole" / "scenes.json").stat().st_size // 2
        self.fails(evaluate(folder, tmp_path / "run"), half, "scenes")
        status, said = run(evaluate(folder, tmp_path / "run"))
        assert status == 0, said
        one, other = (json.loads((tmp_path / name / "scenes.json").read_text()) for name in ("whole", "run"))
        for results in (one, other):
            for timed in (results, *results["questions"]):
                del timed["seconds"]
        assert one == other

    @pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
    def test_of_training(self, folder, tmp_path, file):
        whole, output = tmp_path / "whole", tmp_path / "run"
        assert run(train(folder, whole))[0] == 0
        limit = Path(last_checkpoint(whole), file).stat().st_size - 1000
        self.fails(train(folder, output), limit, "run")
        assert last_checkpoint(output) is None
        assert run([*train(folder, output), "save_steps=2"])[0] == 0
        shutil.rmtree(Path(output, f"checkpoint-{STEPS}"))
        Path(output, "model.safetensors").unlink()
        self.fails(train(folder, output), limit, "run")
        assert last_checkpoint(output) == str(output / f"checkpoint-{STEPS - 2}")
        status, said = run(train(folder, output))
        assert status == 0, said
        check_training(output, whole)

    def test_of_the_stages_of_tiny(self, tmp_path):
        recipe, output = ROOT / "examples" / "tiny.yaml", tmp_path / "tiny"
        values = ["start", "photographs", "objects", "fonts"]
        words = ["train", recipe, f"output={output}", "earlier=[]", *(f"{name}=null" for name in values)]
        words += ["tower_width=32", "tower_layers=3", "width=256", "layers=3", "workers=0"]
        words += ["num_images=2", "num_tested=1", "short_steps=0", "averaged=0"]
        stage = "{steps: 1, decay: 0, warmup: 0, learning_rate: 1.0e-3, batch_size: 1}"
        words += [f"tower={stage}", f"language_model={stage}"]
        for limit, name in ((200_000, "tower"), (4_000_000, "language_model-1")):
            status, said = run(words, limit=limit)
            assert status == 1 and "Traceback" not in said
            assert f"error: cannot write {output}-work/{name} (" in said and "free some space and" in said, said
            assert not output.exists()

    def test_of_a_conversion(self, tmp_path):
        target = tmp_path / "folder" / "model"
        target.parent.mkdir()
        self.fails(["convert", "tiny", target], 1_000_000, str(target))
        assert not list(target.parent.iterdir())
        assert run(["convert", "tiny", target])[0] == 0
