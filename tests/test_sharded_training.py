"""`mc-llava train` in two processes, with DDP and FSDP2, gives the same losses and weights as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import ROOT, picture, write_untrained_tiny

from mc_llava import MCLlavaForConditionalGeneration


pytestmark = pytest.mark.slow


pytest.importorskip("trl", reason='what trains is not here: pip install "mc-llava[train]"')


STEPS = 20
SIZES = [(300, 200), (160, 120), (500, 300), (90, 60), (420, 420), (260, 610)]
WORKER = ROOT / "tests" / "training_worker.py"
ACCELERATE = ["--num_processes", "2", "--num_machines", "1", "--num_cpu_threads_per_process", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Sixteen rows, of which six have an image: many batches of two have none."""
    folder = tmp_path_factory.mktemp("sharded")
    write_untrained_tiny(folder / "model", layers=2)
    rows = []
    for index in range(16):
        answer = {"from": "gpt", "value": f"It says K{index % 5}."}
        rows.append({"id": str(index), "conversations": [{"from": "human", "value": "What does it say?"}, answer]})
        if index < len(SIZES):
            picture(*SIZES[index], seed=index).save(folder / f"{index}.png")
            rows[-1]["image"] = f"{index}.png"
            rows[-1]["conversations"][0]["value"] = "<image>\nWhat does it say?"
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.json"),
        "images": str(folder),
        "train": ["tower", "coordinates", "projector", "language_model"],
        "max_crops": [20, 20],
        "num_tokens": [40, 40],
        "log_steps": 1,
        "learning_rate": 1e-3,
        "workers": 0,
        "bf16": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def launch(way: str, arguments: list[str], environment: dict[str, str]):
    """Run the worker in two processes, or in one. accelerate's own launcher is used only once, because it is slow."""
    if way == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", *ACCELERATE, "--multi_gpu", *arguments]
        results = [subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=1200)]
    elif way == "one":
        results = [processes.run(*arguments, env=environment)]
    else:
        if way != "ddp":  # accelerate is configured by variables
            options = [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", *arguments]
            environment |= prepare_multi_gpu_env(launch_command_parser().parse_args(options))
        results = processes.run_ranks(2, *arguments, env=environment)
    for result in results:
        assert result.returncode == 0, "\n".join(each.stderr[-6000:].decode(errors="replace") for each in results)


def start(
    way: str, recipe: Path, name: str = "", *overrides: str, steps: int = STEPS
) -> tuple[list[float], list[dict], dict[str, torch.Tensor]]:
    """Losses of the steps, what each process saw, and the weights that were saved."""
    output, seen = recipe.parent / (name or way), recipe.parent / f"{name or way}.seen"
    count = 1 if way == "one" else 2
    settings = (f"output={output}", f"batch_size={4 // count}", f"max_steps={steps}", f"save_steps={steps}")
    environment = {"PYTHONPATH": str(ROOT), "SEEN": str(seen), "SHARD_ON_A_CPU": str(int(way == "fsdp"))}
    launch(way, [str(WORKER), "train", str(recipe), *settings, *overrides], {**os.environ, **environment})
    history = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    return (
        [entry["loss"] for entry in history if "loss" in entry],
        [json.loads(Path(f"{seen}.{rank}").read_text()) for rank in range(count)],
        MCLlavaForConditionalGeneration.from_pretrained(output).state_dict(),
    )


@pytest.fixture(scope="module")
def one(recipe):
    losses, _, weights = start("one", recipe)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    return losses, weights


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(recipe, one, way):
    losses, seen, weights = start(way, recipe)
    assert [rank["sharded"] for rank in seen] == [way == "fsdp"] * 2
    images = list(zip(*(rank["images"] for rank in seen)))
    assert (0, 0) in images and any(0 in pair and sum(pair) for pair in images)
    passes = [tuple(-(-crops // 16) for crops in pair) for pair in zip(*(rank["crops"] for rank in seen))]
    assert any(first != second for first, second in passes)  # of the vision tower
    assert losses == pytest.approx(one[0], abs=1e-4)
    for name, weight in one[1].items():
        if not name.endswith("k_proj.bias"):  # whose gradient is rounding error alone, which Adam amplifies
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)


def test_accelerate_launches_ddp(recipe, one):
    losses, seen, _ = start("accelerate", recipe, steps=2)
    assert [rank["sharded"] for rank in seen] == [False, False]
    assert losses == pytest.approx(one[0][:2], abs=1e-4)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_recipe_of_the_3b(recipe, way):
    """Adapters on frozen layers in bfloat16, through which gradients flow back to the projector with checkpointing."""
    settings = yaml.safe_load((ROOT / "examples" / "finetune_3b.yaml").read_text())
    overrides = [f"{name}={settings[name]}" for name in ("train", "lora", "dtype", "gradient_checkpointing")]
    name = f"{way}.3b"
    losses, seen, weights = start(way, recipe, name, *overrides, "accumulation=2", "bf16=true", steps=2)
    assert [rank["sharded"] for rank in seen] == [way == "fsdp"] * 2 and len(losses) == 2
    before = MCLlavaForConditionalGeneration.from_pretrained(recipe.parent / "model", dtype=torch.bfloat16)
    changed = {
        key.split(".")[1] for key, weight in before.state_dict().items() if not torch.equal(weights[key], weight)
    }
    assert changed == {"coord_embed", "multi_modal_projector", "language_model"}
    assert (recipe.parent / name / "adapter" / "adapter_model.safetensors").exists()


def test_where_accelerate_would_not_shard_training_is_refused(recipe):
    with pytest.raises(AssertionError, match="FSDP was asked for, accelerate would train with MULTI_CPU"):
        start("refused", recipe)
