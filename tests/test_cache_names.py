"""Keys and values of earlier tokens: `cache` since transformers 5.24, `past_key_values` before."""

import copy
import traceback

import pytest
import torch
from helpers import picture, prompt
from torch.utils._python_dispatch import TorchDispatchMode

from mc_llava import CACHE


IMAGE = picture(200, 60, seed=1)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
NAMES = ("cache", "past_key_values")


@pytest.fixture
def kept(model, processor):
    """The first turn's ids and cache, and the ids of the second turn."""
    output = model.generate(**processor(prompt("What?"), IMAGE), **GREEDY, return_dict_in_generate=True)
    question = processor(prompt("And here?", 0))["input_ids"]
    return output.cache, torch.cat([output.sequences, question], dim=1)


def test_outputs_have_it(model, processor):
    with torch.no_grad():
        output = model(**processor("Why?"), use_cache=True)
        inner = model.model(**processor("Why?"), use_cache=True)
    generated = model.generate(**processor("Why?"), **GREEDY, return_dict_in_generate=True)
    for found in (output, inner, generated):
        assert found.cache is not None and found.cache is found[CACHE] and found.cache is getattr(found, CACHE)
    assert model(**processor("Why?"), use_cache=False).cache is None


def test_outputs_take_it(model, processor):
    output = model(**processor("Why?"), use_cache=True)
    output.cache = None
    assert output.cache is None and getattr(output, CACHE) is None


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_either(model, processor, kept, name):
    cache, ids = kept
    expected = model.generate(ids, **{n: processor(prompt("What?"), IMAGE)[n] for n in IMAGE_FIELDS}, **GREEDY)
    assert torch.equal(model.generate(ids, **{name: copy.deepcopy(cache)}, **GREEDY), expected)


IMAGE_FIELDS = ("pixel_values", "crop_boxes", "crop_coords", "crop_num_tokens", "image_grid_thw")


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_either(model, kept, name):
    cache, ids = kept
    length = cache.get_seq_length()
    with torch.no_grad():
        (expected,) = {model(ids[:, length:], **{CACHE: copy.deepcopy(cache)}).logits}
        assert torch.equal(model(ids[:, length:], **{name: copy.deepcopy(cache)}).logits, expected)
        hidden = model.model(ids[:, length:], **{name: copy.deepcopy(cache)}).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)


def test_both_at_once_are_refused(model, kept):
    cache, ids = kept
    both = dict.fromkeys(NAMES, cache)
    with pytest.raises(ValueError, match="two names for the same argument"):
        model.generate(ids, **both)
    with pytest.raises(ValueError, match="two names for the same argument"):
        model(ids, **both)


@pytest.mark.parametrize("name", NAMES)
def test_a_tuple_of_old_releases_is_refused(model, kept, name):
    cache, ids = kept
    old = {name: tuple((layer.keys, layer.values) for layer in cache.layers)}
    for call in (model.generate, model, model.model):
        with pytest.raises(ValueError, match="a cache can't be a tuple: pass a DynamicCache"):
            call(ids, **old)


@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_processors_output_and_a_cache_are_refused(model, processor, kept, name):
    cache, ids = kept
    pixels = {field: processor(prompt("What?"), IMAGE)[field] for field in IMAGE_FIELDS}
    with pytest.raises(ValueError, match="pass input_ids and attention_mask with the cache, without images"):
        model.generate(ids, **pixels, **{name: cache})


class Reads(TorchDispatchMode):
    """Counts values that our model's code reads from a device while a token is computed."""

    def __init__(self):
        super().__init__()
        self.ours = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            self.ours += any(frame.filename.endswith("modeling_mc_llava.py") for frame in frames)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_no_decoded_token_is_waited_for(model, processor, implementation, monkeypatch):
    """The forward pass reads no value from a device after the prompt."""
    inputs, counts = processor("What?", IMAGE), []
    tolist = torch.Tensor.tolist
    for tokens in (2, 9):
        with Reads() as reads:
            # On a CPU, `tolist` is not dispatched as an operation.
            monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (reads_in(reads), tolist(tensor))[1])
            options = {**GREEDY, "max_new_tokens": tokens, "cache_implementation": implementation}
            model.generate(**inputs, **options)
        counts.append(reads.ours)
    assert counts[0] == counts[1] > 0


def reads_in(reads: Reads):
    reads.ours += any(frame.filename.endswith("modeling_mc_llava.py") for frame in traceback.extract_stack())


@pytest.mark.skipif(CACHE != "cache", reason="this release of transformers has no other name")
def test_where_the_old_name_is_refused(model, processor, no_old_name):
    """It is refused in the same way in the tests of the model, of generation and of what builds on them."""
    output = model(**processor("Why?"), use_cache=True)
    with pytest.raises(AttributeError, match="an output has no attribute past_key_values"):
        output.past_key_values  # noqa: B018
    with pytest.raises(TypeError, match="an output got an unexpected keyword argument"):
        type(output)(past_key_values=output.cache)
    with pytest.raises(TypeError, match="got an unexpected keyword argument"):
        model.model.language_model(torch.tensor([[5]]), past_key_values=output.cache)
