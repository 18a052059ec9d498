"""Two processes with half of the language model each, started as torchrun does."""

import pytest
import torch
from helpers import ROOT, picture
from processes import run_ranks
from safetensors.torch import load_file, save_file

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("knobs", [{"max_crops": 2, "num_tokens": 30}, {"max_crops": 8, "num_tokens": 30, "zoom": 1}])
def test_two_processes_give_what_one_gives(converted, tmp_path, knobs):
    assert len(list(converted.glob("*.safetensors"))) > 1  # each process reads its share of each shard
    processor = MCLlavaProcessor.from_pretrained(converted)
    inputs = processor(
        text=["What is it?", "What differs between these two?", "What is a galaxy?"],
        images=[[picture(640, 400)], [picture(90, 60, seed=1), picture(700, 700, seed=2)], []],
        **knobs,
    )
    model = MCLlavaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)
    with torch.no_grad():
        logits = model.zoom(**inputs).crop_boxes if "zoom" in knobs else model(**inputs, logits_to_keep=1).logits
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    save_file(dict(inputs), tmp_path / "inputs.safetensors")
    worker = ROOT / "tests" / "tensor_parallel_worker.py"
    results = run_ranks(2, worker, converted, tmp_path / "inputs.safetensors", tmp_path / "out")
    for result in results:
        assert result.returncode == 0, "\n".join(each.stderr[-4000:].decode(errors="replace") for each in results)
    for rank in range(2):
        found = load_file(tmp_path / f"out.{rank}")
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["tokens"], tokens)
