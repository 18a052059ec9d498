"""Quantised language models: which layers are, what they weigh, and how near their answers are."""

import importlib.util

import pytest
import torch
from conftest import picture
from make_published_checkpoint import write_published_checkpoint
from torch import nn

from mc_llava import MCLlavaProcessor
from mc_llava.evaluation import Evaluator, evaluate
from mc_llava.loading import load, load_model


# Phi-2's heads of 80, and widths that fill the quantised kernels' blocks.
SIZES = {
    "text": {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 4, "num_hidden_layers": 2},
    "vision": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2},
}
PACKAGES = {"nf4": "bitsandbytes", "int8": "optimum", "int4": "optimum"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published_checkpoint(tmp_path_factory.mktemp("quantized") / "model", SIZES)


@pytest.fixture(scope="module")
def whole(folder):
    model = load_model(str(folder), "float32", "cpu")
    inputs = MCLlavaProcessor.from_pretrained(folder)("What is it?", picture(640, 400), max_crops=2, num_tokens=30)
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


@pytest.mark.parametrize(("name", "agreement"), [("nf4", 0.97), ("int8", 0.999), ("int4", 0.95)])
def test_the_language_model_alone_is_quantized(folder, whole, name, agreement):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip('what quantises is not here: pip install "mc-llava[quantize]"')
    model, inputs, logits = whole
    small = load_model(str(folder), "float32", "cpu", quantize=name)
    quantized = {path for path, module in small.named_modules() if isinstance(module, nn.Linear)} - {
        path for path, module in small.named_modules() if type(module) is nn.Linear
    }
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path}
    assert quantized == {path for path in layers if path.startswith("model.language_model.")}
    for path in ("model.vision_tower", "model.coord_embed", "model.multi_modal_projector", "lm_head"):
        pairs = zip(model.get_submodule(path).parameters(), small.get_submodule(path).parameters())
        assert all(torch.equal(one, other) for one, other in pairs)
    with torch.no_grad():
        found = small(**inputs).logits
    assert torch.cosine_similarity(found, logits, dim=-1).mean() > agreement
    assert not torch.equal(found, logits)
    output = small.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_an_unknown_name_is_refused(folder):
    with pytest.raises(ValueError, match="quantize must be one of nf4, int8, int4, got 'int2'"):
        load_model(str(folder), quantize="int2")


def test_results_say_how_the_model_was_quantized(folder, tmp_path):
    if importlib.util.find_spec(PACKAGES["int8"]) is None:
        pytest.skip('what quantises is not here: pip install "mc-llava[quantize]"')
    knobs = {"max_crops": 0, "num_tokens": 20, "batch_size": 2, "max_new_tokens": 2}
    for quantize in ("int8", None):
        model, processor, revision = load(str(folder), dtype="float32", device="cpu", quantize=quantize)
        arguments = ("scenes", Evaluator(model, processor, **knobs), tmp_path)
        if quantize:
            results = evaluate(*arguments, model="model", revision=revision, limit=2)
            assert results["settings"]["quantization"]["quant_method"] == "quanto"
        else:
            with pytest.raises(ValueError, match="has quantization .*quanto.*, this run None"):
                evaluate(*arguments, model="model", revision=revision, limit=2)
