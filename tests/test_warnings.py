"""None of our commands and no pipeline makes transformers warn about an old name."""

import json

import pytest
from helpers import ROOT
from processes import Server, run


pytestmark = pytest.mark.slow
SCENE = str(ROOT / "examples" / "scene1.jpg")
QUESTION = "What is written on the blue sign?"
PIPELINE = f"""
import sys
from transformers import pipeline
ask = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
content = [{{"type": "image", "path": {SCENE!r}}}, {{"type": "text", "text": {QUESTION!r}}}]
print(ask(text=[{{"role": "user", "content": content}}], max_crops=4, max_new_tokens=20))
"""
RECIPE = f"""
model: tiny
data: rows.json
images: {ROOT / "examples"}
output: run
train: [projector]
lora: {{r: 4, alpha: 8, dropout: 0.0}}
max_crops: [0, 4]
num_tokens: [20, 40]
max_steps: 1
batch_size: 1
learning_rate: 1.0e-3
dtype: float32
gradient_checkpointing: true
workers: 0
"""


@pytest.fixture(scope="module")
def server() -> Server:
    return Server(PYTHONWARNINGS="default", TRANSFORMERS_VERBOSITY="warning")


def old_names_in(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "deprecat" in line.lower() or "past_key_values" in line]


@pytest.fixture
def warnings_of(server, tmp_path):
    """The lines about old names in the standard error of a process that succeeds."""

    def found(*arguments, stdin="") -> list[str]:
        result = run(*arguments, cwd=tmp_path, input=stdin.encode(), server=server, text=True)
        assert result.returncode == 0 and result.stdout, result.stderr
        return old_names_in(result.stderr)

    return found


def test_imports(server):
    """Commands are forks, which don't repeat warnings from imports."""
    assert [line for line in old_names_in(server.errors()) if "torch.jit" not in line] == []


@pytest.mark.parametrize(
    "command",
    [
        ("ask", SCENE, QUESTION, "--max-crops", "4"),
        ("estimate", SCENE, "--model", "tiny"),
        ("eval", "--tasks", "scenes", "--limit", "2", "--max-crops", "2"),
    ],
    ids=lambda command: command[0],
)
def test_commands(command, warnings_of):
    assert warnings_of("-m", "mc_llava", *command) == []


def test_chat(warnings_of):
    questions = f"{QUESTION}\nWhat color is the star?\n\n"
    assert warnings_of("-m", "mc_llava", "chat", SCENE, "--max-crops", "4", stdin=questions) == []


def test_a_pipeline(trial, warnings_of):
    """On some releases (5.19) each pipeline itself passes `generation_config` with options, which causes a warning."""
    found = warnings_of("-c", PIPELINE, str(trial.folder))
    assert [line for line in found if "Passing `generation_config` together" not in line] == []


def test_training(tmp_path, warnings_of):
    """Warnings about other packages' own code don't count: torch's TorchScript, PEFT's `is_gradient_checkpointing`."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    rows = [{"id": "1", "image": "scene1.jpg", "conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = warnings_of("-m", "mc_llava", "train", "recipe.yaml")
    theirs = ("torch.jit", "`is_gradient_checkpointing`")
    assert [line for line in found if not any(name in line for name in theirs)] == []
