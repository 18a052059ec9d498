"""Quantized language models: which layers are quantized, how large they are, and how close the answers are."""

import copy
import importlib.util
import json
import sys

import processes
import pytest
import torch
from helpers import load_handler, picture
from make_published_checkpoint import write_published_checkpoint
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, choose_dtype, loading
from mc_llava.convert import convert
from mc_llava.engine import Engine
from mc_llava.evaluation.running import evaluate
from mc_llava.loading import QUANTIZED, find_device, load, load_model


pytestmark = pytest.mark.slow


# Phi-2's heads of 80, and widths that fill the quantized kernels' blocks.
SIZES = {
    "text": {"hidden_size": 320, "intermediate_size": 1280, "num_attention_heads": 4, "num_hidden_layers": 2},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
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


def test_the_extra_to_install_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r'accelerate.*pip install "mc-llava\[quantize\]"'):
        load_model(str(folder), device="cpu", quantize="nf4")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='what quantises is not here: pip install "mc-llava[quantize]"',
)
class TestFourBits:
    @pytest.mark.parametrize(("asked", "dtype"), [("auto", choose_dtype("cpu")), ("float16", torch.float16)])
    def test_of_a_checkpoint_in_float16(self, folder, whole, asked, dtype):
        _, inputs, logits = whole
        small = load_model(str(folder), asked, "cpu", quantize="nf4")
        assert small.lm_head.weight.dtype is dtype
        layer = small.model.language_model.layers[0].mlp.fc1
        assert layer.weight.dtype is torch.uint8 and layer.compute_dtype is dtype
        with torch.no_grad():
            found = small(**copy.copy(inputs).to(dtype)).logits.float()
        assert torch.cosine_similarity(found, logits, dim=-1).mean() > 0.97

    def test_what_was_saved_is_loaded_in_its_own_precision(self, folder, whole, tmp_path, monkeypatch):
        _, inputs, _ = whole
        saved = str(tmp_path / "saved")
        load_model(str(folder), "float32", "cpu", quantize="nf4").save_pretrained(saved)
        monkeypatch.setattr(loading, "choose_dtype", lambda device: torch.bfloat16)
        small = load_model(saved, device="cpu")
        expected = load_model(str(folder), "float32", "cpu", quantize="nf4")
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(small.generate(**inputs, **options), expected.generate(**inputs, **options))
        with pytest.raises(ValueError, match="in torch.float32, got torch.bfloat16: leave dtype out"):
            load_model(saved, "bfloat16", "cpu")
        for name in QUANTIZED:
            with pytest.raises(ValueError, match="saved with quantized weights, got quantize .*: leave quantize out"):
                load_model(saved, device="cpu", quantize=name)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # this CPU would choose one of them
    def test_the_handler_answers_in_the_precision_that_was_saved(self, folder, tmp_path, dtype):
        convert(str(folder), tmp_path / "saved")
        for weights in (tmp_path / "saved").glob("*.safetensors*"):
            weights.unlink()
        load_model(str(folder), dtype, "cpu", quantize="nf4").save_pretrained(tmp_path / "saved")
        handler = load_handler(tmp_path / "saved").EndpointHandler(str(tmp_path / "saved"))
        assert handler.model.dtype == getattr(torch, dtype)
        request = {"inputs": {"image": picture(64, 48), "question": "What?"}}
        assert handler({**request, "parameters": {"max_new_tokens": 1, "max_crops": 2}})

    def test_the_hash_of_the_weights_calls_no_hooks_and_no_adapters(self, folder):
        """PEFT refuses a single row when each row of a batch has its own adapter."""
        peft = pytest.importorskip("peft", reason='pip install "mc-llava[train]" to test adapters')
        config = BitsAndBytesConfig(load_in_4bit=True)
        small = MCLlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config).eval()
        adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=r".*vision_tower.*fc1")).eval()
        layer = small.get_submodule("model.vision_tower.encoder.layers.0.mlp.fc1")
        calls = []
        for module in (layer, layer.base_layer):
            module.register_forward_hook(lambda *args: calls.append(args))
        with adapted._enable_peft_forward_hooks(adapter_names=["default", "__base__"]):
            assert small.hash_encoder()
        assert not calls

    def test_by_command(self, folder, tmp_path):
        picture(640, 400).save(tmp_path / "a.png")
        command = ["-m", "mc_llava", "ask", tmp_path / "a.png", "What is it?", "--model", folder]
        command += ["--quantize", "nf4", "--dtype", "float32", "--device", "cpu", "--json"]
        command += ["--max-crops", "2", "--num-tokens", "30", "--max-new-tokens", "3"]
        result = processes.run(*command, text=True)
        assert result.returncode == 0, result.stderr
        processor = MCLlavaProcessor.from_pretrained(folder)
        inputs = processor("What is it?", picture(640, 400), max_crops=2, num_tokens=30)
        output = load_model(str(folder), "float32", "cpu", quantize="nf4").generate(**inputs, max_new_tokens=3)
        reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert json.loads(result.stdout)["answer"] == reply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("package", "config", "agreement"),
    [
        ("bitsandbytes", BitsAndBytesConfig(load_in_4bit=True), 0.95),
        ("bitsandbytes", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.97),
        ("bitsandbytes", BitsAndBytesConfig(load_in_8bit=True), 0.999),
        ("optimum", QuantoConfig(weights="int8"), 0.999),
        ("optimum", QuantoConfig(weights="int4"), 0.95),
    ],
    ids=["fp4", "nf4", "bnb8", "int8", "int4"],
)
def test_all_that_a_users_own_configuration_quantizes_still_knows_where_crops_lie(
    folder, whole, package, config, agreement, dtype
):
    if importlib.util.find_spec(package) is None:
        pytest.skip('what quantises is not here: pip install "mc-llava[quantize]"')
    model, inputs, _ = whole
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    small = MCLlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()
    assert type(small.model.multi_modal_projector.linear_1) is not nn.Linear
    given, weights_hash = [], small.hash_encoder()
    small.model.coord_embed[0].register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    with torch.no_grad():
        (found,), (expected,) = (
            m.get_image_features(**images, return_dict=True).pooler_output for m in (small, model)
        )
    assert given[0].dtype.is_floating_point
    torch.testing.assert_close(given[0].float(), inputs["crop_coords"], atol=2e-3, rtol=0)
    assert torch.cosine_similarity(found.float(), expected, dim=-1).mean() > agreement
    encoded = small.encode_images(**inputs)
    with torch.no_grad():
        (again,) = small.get_image_features(**images, return_dict=True).pooler_output
    assert torch.equal(again, found), "the hash of the weights changes none"
    options = {"max_new_tokens": 3, "do_sample": False}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(small.generate(**inputs, **options), small.generate(**text, image_features=encoded, **options))
    assert encoded.weights_hash == small.hash_encoder() == weights_hash, (
        "the first pass of the weights changes no hash"
    )


@pytest.mark.parametrize(
    ("name", "quantizer", "package"),
    [("nf4", "bnb_4bit.is_bitsandbytes", "bitsandbytes"), ("int8", "quanto.is_optimum_quanto", "optimum-quanto")],
)
def test_a_missing_package_is_named(folder, monkeypatch, name, quantizer, package):
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{quantizer}_available", lambda: False)
    with pytest.raises(ValueError, match=rf'{package}.*pip install "mc-llava\[quantize\]"'):
        load_model(str(folder), "float32", "cpu", quantize=name)


def test_a_device_that_is_not_there_is_refused(folder):
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"no device '{name}' here: choose from .*cpu"):
            load_model(str(folder), device=name)
    assert find_device("cpu") == "cpu"
    if not torch.accelerator.is_available():
        assert find_device() == "cpu"


def test_an_unknown_name_is_refused(folder):
    with pytest.raises(ValueError, match="quantize must be one of nf4, int8, int4, got 'int2'"):
        load_model(str(folder), quantize="int2")


def test_results_say_how_the_model_was_quantized(folder, tmp_path):
    if importlib.util.find_spec(PACKAGES["int8"]) is None:
        pytest.skip('what quantises is not here: pip install "mc-llava[quantize]"')
    knobs = {"max_crops": 0, "num_tokens": 20, "batch_size": 2, "max_new_tokens": 2}
    for quantize in ("int8", None):
        model, processor, revision = load(str(folder), dtype="float32", device="cpu", quantize=quantize)
        arguments = ("scenes", Engine(model, processor, **knobs), tmp_path)
        if quantize:
            results = evaluate(*arguments, model="model", revision=revision, limit=2)
            assert results["settings"]["quantization"]["quant_method"] == "quanto"
        else:
            with pytest.raises(ValueError, match="has quantization .*quanto.*, this run None"):
                evaluate(*arguments, model="model", revision=revision, limit=2)
