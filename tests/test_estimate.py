"""The estimate, compared with what torch counts and measures on models with weights."""

import weakref

import pytest
import torch
from helpers import ROOT, picture, small_config, small_model
from test_cli import HUBBLE, error_of, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mc_llava import MCLlavaConfig, MCLlavaImageProcessor, cli
from mc_llava.estimate import estimate


pytestmark = pytest.mark.usefixtures("no_old_name")


class PeakMemory(TorchDispatchMode):
    """The peak of the bytes of all tensors that were created and are still alive."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakKeyDictionary({tensor.untyped_storage(): 0 for tensor in known})

    def free(self, nbytes: int):
        self.live -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self.seen:
                storage = leaf.untyped_storage()
                self.seen[storage] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return result


@pytest.fixture(scope="module")
def inputs(processor):
    return processor("What is it?", picture(600, 500), max_crops=40, num_tokens=60)


def estimate_of(inputs, **options):
    crops, image_tokens = len(inputs["pixel_values"]), int(inputs["crop_num_tokens"].sum())
    assert crops > 16, "more than one pass"
    text_tokens = int((inputs["input_ids"] != 50297).sum())
    return estimate(small_config(), crops, image_tokens, text_tokens, new_tokens=8, dtype=torch.float32, **options)


@torch.no_grad()
def test_flops_and_weights_are_those_of_the_model(processor, inputs):
    model = small_model(attn_implementation="eager")  # torch does not count its fused attention on a CPU
    ours = estimate_of(inputs)
    assert (ours.crops, ours.image_tokens) == (36, 50)
    assert ours.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    images = {name: inputs[name] for name in processor.image_processor.model_input_names}
    with FlopCounterMode(display=False) as counter:
        features = model.get_image_features(**images).pooler_output
    assert ours.tower_flops == counter.get_total_flops()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with FlopCounterMode(display=False) as counter:
        output = model(**text, image_features=features, logits_to_keep=1)
    assert ours.prefill_flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=text["input_ids"][:, -1:], cache=output.cache)
    assert ours.flops_per_new_token == counter.get_total_flops()


@torch.no_grad()
def test_the_cache_is_that_of_prompt_and_answer(model, processor, inputs):
    output = model.generate(
        **inputs, max_new_tokens=9, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )  # the ninth token is not fed to the model
    measured = sum(tensor.nbytes for layer in output.cache.layers for tensor in (layer.keys, layer.values))
    assert estimate_of(inputs).cache_bytes == measured


@torch.no_grad()
def test_activations_are_what_is_alive_at_most(processor, inputs):
    model = small_model()
    images = {name: inputs[name] for name in processor.image_processor.model_input_names}
    known = [*model.parameters(), *model.buffers(), *images.values()]
    with PeakMemory(*known) as memory:
        model.get_image_features(**images)
    pixels = images["pixel_values"].nbytes
    assert estimate_of(inputs).activation_bytes == pytest.approx(pixels + memory.peak, rel=0.1)


def test_crops_beyond_a_pass_take_their_float32_pixels_alone():
    config = MCLlavaConfig.from_pretrained(ROOT / "tiny")
    sizes = [estimate(config, crops, 64, dtype=torch.bfloat16).activation_bytes for crops in (16, 32, 48)]
    side = config.vision_config.image_size
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 16 * 3 * side**2 * 4


@pytest.mark.slow
def test_the_published_sizes():
    """The published model: 0.67 TFLOP a crop, 4.0 TFLOP of prefill for 780 tokens, 6.4 GB in float16."""
    plan = MCLlavaImageProcessor().plan(4240, 2832)
    ours = estimate(MCLlavaConfig(), len(plan), sum(crop.num_tokens for crop in plan), text_tokens=52)
    assert (ours.image_tokens, ours.prompt_tokens) == (728, 780)
    assert ours.tower_flops / len(plan) == pytest.approx(0.67e12, rel=0.02)
    assert ours.prefill_flops == pytest.approx(4.0e12, rel=0.04)
    assert ours.weight_bytes == pytest.approx(6.4e9, rel=0.01)
    assert ours.cache_bytes == 980 * 2 * 32 * 2560 * 2


def test_what_does_not_fit_is_refused():
    for options in ({"text_tokens": 1300}, {"new_tokens": 1300}):
        with pytest.raises(ValueError, match="exceed the context of 2048: lower num_tokens or"):
            estimate(MCLlavaConfig(), crops=1, image_tokens=728, **options)
    for name in ("text_tokens", "new_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            estimate(MCLlavaConfig(), crops=1, image_tokens=728, **{name: 0})


def test_small_costs_are_not_rounded_to_nothing(capsys):
    cli.estimate(HUBBLE, model="tiny", dtype="bfloat16")
    text = capsys.readouterr().out
    for line in ("each new token     6.3 MFLOP", "weights              8.55 MB"):
        assert line in text, text


@pytest.mark.slow
def test_the_command(converted):
    result = run("estimate", HUBBLE, "--max-crops", 4, "--num-tokens", 300, "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    text = result.stdout.decode()
    for line in ("crops                      5", "image tokens             300", "vision tower", "6.41 GB"):
        assert line in text, text
    small = run("estimate", ROOT / "examples" / "coffee.jpg", "--model", converted).stdout.decode()
    assert "crops                      3" in small and "6.41 GB" not in small
    assert "exceed the context of 2048" in error_of("estimate", HUBBLE, "--num-tokens", 2000)


def test_a_folder_without_a_configuration_is_not_taken_for_the_3b(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no config.json, model.safetensors: pass a whole model folder"):
        cli.estimate(HUBBLE, model=str(tmp_path))


def test_guided_zoom_costs_its_crops_and_its_looks():
    config = MCLlavaConfig.from_pretrained(ROOT / "tiny")
    grid, zoomed = estimate(config, 16, 64), estimate(config, 16, 64, looks=2)
    assert (grid.look_flops, grid.tower_flops, grid.prefill_flops) == (0, zoomed.tower_flops, zoomed.prefill_flops)
    drafts = 2 * (grid.prefill_flops + 16 * grid.flops_per_new_token)
    assert zoomed.look_flops == drafts
    short = estimate(config, 16, 64, new_tokens=3, looks=2)
    assert short.look_flops == 2 * (grid.prefill_flops + 3 * grid.flops_per_new_token), "no draft is longer"
    config.zoom_heads = None  # also a general question, up to the fifth layer's heads
    general = estimate(config, 16, 64, looks=2).look_flops - drafts
    assert 2 * 0.6 < general / grid.prefill_flops < 2 * 0.75
