"""Cached keys and values of prompts: when they are reused, when they must not be, and what is refused."""

import copy
import threading

import pytest
import torch
from helpers import picture, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from transformers import TextIteratorStreamer
from transformers.cache_utils import DynamicLayer

from mc_llava import GREEDY, MCLlavaForConditionalGeneration, PrefixCache, prefix_cache_mc_llava, zoom_mc_llava
from mc_llava.engine import Engine, ask_about
from mc_llava.prefix_cache_mc_llava import ROOM, SAMPLE, RoomyLayer, Segment, can_keep_prefixes, sampling_step


IMAGES = [picture(200, 120), picture(150, 180, seed=1), picture(50, 40, seed=2)]
KNOBS = {"max_crops": 6, "num_tokens": 50}
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
TOKEN_BYTES = 2 * 2 * 48 * 4  # layers, keys and values, hidden size, float32


@pytest.fixture
def computed(model, monkeypatch):
    """The number of tokens per row in each pass of the language model."""
    layer, lengths = model.model.language_model.layers[0], []
    forward = layer.forward  # a hook would be refused

    def count(hidden_states, *args, **kwargs):
        lengths.append(hidden_states.shape[1])
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", count)
    return lengths


def ask(model, inputs, **options) -> list:
    output = model.generate(**inputs, **{**OPTIONS, **options})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_layer_with_room_equals_one_that_is_copied():
    roomy, copied = RoomyLayer(), DynamicLayer()

    def check_next(tokens: int, rooms: int):
        new = torch.randn(2, len(roomy.keys) if roomy.is_initialized else 2, 3, tokens, 4)
        before = dict(roomy._rooms)
        for layer in (roomy, copied):
            layer.update(*new)
        assert torch.equal(roomy.keys, copied.keys) and torch.equal(roomy.values, copied.values)
        assert sum(room is not before.get(name) for name, room in roomy._rooms.items()) == rooms

    check_next(5, rooms=2)
    check_next(1, rooms=0)
    check_next(ROOM, rooms=2)
    check_next(1, rooms=0)
    for changed in (
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 0, 1])),
        lambda layer: layer.reorder_cache(torch.tensor([2, 1, 0])),
    ):
        changed(roomy)
        changed(copied)
        check_next(1, rooms=2)
    for layer in (roomy, copied):
        layer.crop(-3)
    check_next(2, rooms=0)
    branch, new = copy.deepcopy(roomy), torch.randn(2, 3, 3, 1, 4)
    branch.update(*new)
    check_next(1, rooms=0)
    assert torch.equal(branch.keys[..., -1:, :], new[0]), "a copy shares the room of the original"
    for layer in (roomy, copied):
        layer.reset()
    check_next(1, rooms=2)


def test_the_second_question_computes_only_what_is_new(model, processor, computed):
    kept = PrefixCache()
    first, second = (processor(question, IMAGES[0], **KNOBS) for question in ("What is it?", "Where is the dog?"))
    expected = ask(model, first), ask(model, second)
    computed.clear()
    assert ask(model, first, prefix_cache=kept) == expected[0]
    length = first["input_ids"].shape[1]
    assert computed == [length, 1, 1, 1, 1, 1] and kept.reused == 0
    computed.clear()
    assert ask(model, second, prefix_cache=kept) == expected[1]
    places = zip(first["input_ids"][0], second["input_ids"][0])
    shared = next(place for place, (one, other) in enumerate(places) if one != other)
    assert (computed[0], kept.reused) == (second["input_ids"].shape[1] - shared, shared) and shared > 50
    computed.clear()
    assert ask(model, second, prefix_cache=kept) == expected[1]
    assert computed[0] == 1, "the last token gives the first logits"


def test_a_conversation_that_goes_on_with_what_was_answered(model, processor):
    """The last token of an answer has no keys and values yet: the next turn must compute it."""
    kept, inputs = PrefixCache(), processor("What is it?", IMAGES[0], **KNOBS)
    for text in (" And?", " Why?", " So?"):
        found, expected = (model.generate(**inputs, **OPTIONS, prefix_cache=cache) for cache in (kept, None))
        assert torch.equal(found, expected)
        new = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        ids = torch.cat((expected, new), 1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        known = sum(len(segment.names) for segment in kept._segments.values())
        assert known == expected.shape[1] - 1 and kept.nbytes == known * TOKEN_BYTES


def test_prompts_that_are_not_answered(model, processor, computed):
    first, second = (processor(question, IMAGES[0], **KNOBS) for question in ("What is it?", "Where is the dog?"))
    kept = model.encode_prefix(**first)
    assert kept.nbytes == first["input_ids"].shape[1] * TOKEN_BYTES
    assert model.encode_prefix(kept, **processor("Why?", IMAGES[1], **KNOBS)) is kept
    expected = ask(model, second)
    computed.clear()
    assert ask(model, second, prefix_cache=kept) == expected and computed[0] < 25


def test_logits(model, processor):
    kept = PrefixCache()
    for question in ("What is it?", "Where is the dog?", "What is it?"):
        inputs = processor(question, IMAGES[0], **KNOBS)
        options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
        expected, found = (model.generate(**inputs, **options, prefix_cache=cache) for cache in (None, kept))
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)
        assert torch.equal(found.sequences, expected.sequences)


def embeddings(model, inputs) -> dict:
    """The short form's inputs as embeddings only, as other code may pass them."""
    request = model._expand_prompt(model._read_request(inputs["input_ids"], inputs["image_features"], None, {}))
    embeds = model.model.embed_prompt(request.new_ids, inputs["image_features"])
    return {"inputs_embeds": embeds, "attention_mask": request.attention_mask}


WAYS = {
    "pixels": lambda model, processor, *asked: processor(*asked, **KNOBS),
    "features": lambda model, processor, *asked: features(model, processor(*asked, **KNOBS)),
    "short form": lambda model, processor, *asked: processor(*asked, model, **KNOBS),
    "embeddings": lambda model, processor, *asked: embeddings(model, processor(*asked, model, **KNOBS)),
    "text": lambda model, processor, texts, images: processor([f"{'word ' * 12}{text}" for text in texts]),
}


def features(model, inputs) -> dict:
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {**text, "image_features": model.encode_images(**inputs)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 5}, {"no_repeat_ngram_size": 2}],
    ids=str,
)
def test_every_way_to_ask_gives_the_same_tokens(model, processor, way, options):
    """Also in batches of different lengths, and whatever other prompts have left in the cache."""
    kept = PrefixCache()
    for texts, images in (
        (["What is it?", "And this? Tell me more."], [IMAGES[0], IMAGES[1]]),
        (["Is it blue?", "Where?"], [IMAGES[1], IMAGES[0]]),
        (["What is it?"], [IMAGES[0]]),
        (["Is it?", "Who is it, if anybody?", "Or that?"], [IMAGES[0], IMAGES[0], IMAGES[2]]),
    ):
        inputs = WAYS[way](model, processor, texts, images)
        found = []
        for cache in (None, kept, kept):
            torch.manual_seed(0)
            found.append(model.generate(**inputs, **{**OPTIONS, **options}, prefix_cache=cache).tolist())
        assert found[0] == found[1] == found[2]
    assert kept.reused > 300


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": None, "max_length": 79},
        {"min_length": 80, "max_new_tokens": 20, "eos_token_id": list(range(0, 50000, 2))},
        {"max_new_tokens": 500},
        {"stop_strings": ["e", "a"], "max_new_tokens": 30},
        {"bad_words_ids": [[5], [6, 7]], "suppress_tokens": list(range(20000))},
    ],
    ids=str,
)
def test_lengths_and_what_looks_at_the_prompt(model, processor, options):
    kept = PrefixCache()
    if "stop_strings" in options:
        options = {**options, "tokenizer": processor.tokenizer}
    for question in ("What is it?", "Where is it?", "What is it?"):
        inputs = processor(question, IMAGES[0], **KNOBS)
        assert ask(model, inputs, prefix_cache=kept, **options) == ask(model, inputs, **options)
    assert kept.reused


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_random_prompts(processor, data):
    """Cached equals uncached, and the bounds hold, however much fits."""
    model = small_model(data.draw(st.integers(0, 3)))
    kept = PrefixCache(max_bytes=data.draw(st.sampled_from([0, 1, 40, 70, 100, 10_000])) * TOKEN_BYTES)
    words = st.lists(st.sampled_from(["cat", "dog", "red", "blue"]), min_size=1, max_size=8).map(" ".join)
    for _ in range(data.draw(st.integers(2, 5))):
        texts = data.draw(st.lists(words, min_size=1, max_size=3))
        images = [data.draw(st.lists(st.sampled_from(IMAGES), max_size=2)) for _ in texts]
        inputs = processor(texts, images, max_crops=2, num_tokens=data.draw(st.integers(3, 30)))
        options = {"num_beams": data.draw(st.integers(1, 2)), "eos_token_id": data.draw(st.sampled_from([None, 13]))}
        assert ask(model, inputs, prefix_cache=kept, **options) == ask(model, inputs, **options)
        segments = kept._segments.values()
        assert kept.nbytes == sum(segment.nbytes for segment in segments) <= kept.max_bytes
        assert set(kept._tokens) == {name for segment in segments for name in segment.names}


def change_in_place(weight):
    weight.mul_(1.1)


def change_data(weight):
    weight.data[:1] += 1


def change_in_numpy(weight):
    weight.detach().numpy()[:] += 0.1


def step_fused(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.01, fused=True).step()


def swap(weight):
    weight.data = weight.data * 1.1


def change_a_column(weight):
    weight.detach().numpy()[..., 1] += 2


def change_a_row(weight):
    weight.detach().numpy()[-2] += 2


def step_fused_in_a_column(weight):
    weight.grad = torch.zeros_like(weight)
    weight.grad[..., 1] = 1
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


@pytest.mark.parametrize("change", [change_in_place, change_data, change_in_numpy, step_fused, swap])
@pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj.weight", "layers.1.mlp.fc1.bias", "embed_tokens.weight"])
def test_other_weights(processor, change, name):
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    ask(model, inputs, prefix_cache=kept)
    ask(model, inputs, prefix_cache=kept)
    assert (reused := kept.reused) > 0
    weight = model.model.language_model.get_parameter(name)
    with torch.no_grad():
        change(weight[:1000] if name.startswith("embed") and change in (change_in_numpy,) else weight)
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    assert kept.reused == reused


@pytest.mark.parametrize(
    "shape", [(8, 2560), (192, 192), (2560, 10240), (10240, 2560), (3000, 90, 7), (20_000,), (), (0, 5)]
)
def test_each_row_and_column_of_a_weight_is_sampled(shape):
    places = torch.zeros(shape)
    places.reshape(-1)[:: sampling_step(places.shape)] = 1
    columns = shape[-1] if shape else 1
    assert places.sum() <= 4 * max(SAMPLE, columns, places.numel() // max(1, columns))
    if places.numel():
        places = places.reshape(-1, columns)
        assert places.any(0).all() and places.any(1).all()


@pytest.mark.parametrize("change", [change_a_column, change_a_row, step_fused_in_a_column])
def test_a_row_or_a_column(processor, change, monkeypatch):
    monkeypatch.setattr(prefix_cache_mc_llava, "SAMPLE", 4)
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    ask(model, inputs, prefix_cache=kept)
    change(model.model.language_model.get_parameter("layers.0.self_attn.v_proj.weight"))
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs) and not kept.reused


def test_what_dropout_made_is_not_reused(processor):
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    model.model.language_model.layers[0].train()
    ask(model, inputs, prefix_cache=kept)
    model.eval()
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs) and not kept.reused


def test_another_dtype_and_another_model(processor):
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    for change in (
        lambda: ask(model, inputs, prefix_cache=kept),
        lambda: ask(small_model(1), inputs, prefix_cache=kept),
        lambda: ask(model.bfloat16(), inputs, prefix_cache=kept),
        lambda: ask(model.float(), inputs, prefix_cache=kept),
        lambda: autocast(model, inputs, prefix_cache=kept),
    ):
        change()
        assert kept.reused == 0
    assert autocast(model, inputs, prefix_cache=kept) == autocast(model, inputs) and kept.reused > 0


def test_the_same_weights_in_a_model_that_computes_otherwise(model, processor):
    kept, config = PrefixCache(), copy.deepcopy(model.config)
    config.text_config.rope_parameters["rope_theta"] = 100.0
    other = MCLlavaForConditionalGeneration._from_config(config)
    other.load_state_dict(model.state_dict(), assign=True)
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    weights, same = (each.model.language_model.get_parameter("layers.0.mlp.fc1.weight") for each in (model, other))
    assert weights.data_ptr() == same.data_ptr()
    for each in (model, other.eval()):
        assert ask(each, inputs, prefix_cache=kept) == ask(each, inputs)
    assert kept.reused == 0


def autocast(model, inputs, **options) -> list:
    with torch.autocast("cpu", torch.bfloat16):
        return ask(model, inputs, **options)


def test_adapters(processor):
    peft = pytest.importorskip("peft")
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)

    def tokens(**options):
        return adapted.generate(**inputs, **OPTIONS, **options).tolist()

    def change_nothing():
        pass

    def scale():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.set_scale("default", 0.5)

    for change, is_known in (
        (change_nothing, False),
        (change_nothing, True),
        (scale, False),
        (adapted.merge_adapter, False),
        (adapted.unmerge_adapter, False),
        (adapted.disable_adapter_layers, False),
        (adapted.enable_adapter_layers, None),
    ):
        change()
        reused = kept.reused
        assert tokens(prefix_cache=kept) == tokens()
        assert is_known is None or (kept.reused > reused) == is_known


def test_adapters_by_row(processor):
    """`adapter_names` are passed to layers by hooks, and change none of their states."""
    peft = pytest.importorskip("peft")
    model, kept = small_model(), PrefixCache()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, exclude_modules=".*tower.*")
    adapted = peft.get_peft_model(model, config).eval()
    texts = ["What is it?", "Where is the dog?", "What is it?"]
    inputs = processor(texts, [IMAGES[:1], IMAGES[:1], []], **KNOBS)

    def logits(names, **options):
        options = {**OPTIONS, **options, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(adapted.generate(**inputs, adapter_names=names, **options).logits)

    for beams in (1, 2):
        for names in (["default", "__base__", "default"], ["__base__", "__base__", "default"], ["default"] * 3, None):
            for is_known in (None, True):
                reused = kept.reused
                found = logits(names, num_beams=beams, prefix_cache=kept)
                torch.testing.assert_close(found, logits(names, num_beams=beams), rtol=1e-4, atol=1e-4)
                assert is_known is None or kept.reused > reused


def steer(module, arguments, output):
    return output + 1


def test_hooks_that_may_change_keys_and_values(processor):
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    ask(model, inputs, prefix_cache=kept)
    for register in (model.model.language_model.layers[0].register_forward_hook, register_module_forward_hook):
        hook = register(steer)
        with pytest.raises(ValueError, match=r"the forward hook test_prefix_cache.steer, .*: remove it, or leave"):
            ask(model, inputs, prefix_cache=kept)
        assert not can_keep_prefixes(model)
        hook.remove()
    hook = model.model.register_forward_pre_hook(steer)
    assert not can_keep_prefixes(model)
    hook.remove()
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs) and kept.reused


def test_hooks_of_the_libraries_are_no_reason_to_refuse(processor):
    model, kept = small_model(), PrefixCache()
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    model.enable_input_require_grads()
    prune.identity(model.model.language_model.layers[0].mlp.fc1, "weight")
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    assert kept.reused


def test_another_picture_of_the_same_size_and_other_knobs(model, processor):
    kept = PrefixCache()
    for image, knobs in (
        (IMAGES[0], KNOBS),
        (picture(200, 120, seed=9), KNOBS),
        (IMAGES[0], {**KNOBS, "num_tokens": 40}),
    ):
        inputs = processor("What is it?", image, **knobs)
        assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    assert kept.reused == 2 * 4, "what comes before the picture"
    inputs = processor("What is it?", IMAGES[0], **KNOBS, zoom=1)
    for _ in range(2):
        assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(model, processor, dtype):
    kept, inputs = PrefixCache(), processor(["What is it?", "And this? Tell me more."], IMAGES[:2], **KNOBS)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    assert kept.reused


def test_prompts_are_computed_once_whatever_generation_was_saved(model, processor, monkeypatch):
    saved = copy.deepcopy(model.generation_config)
    saved.update(do_sample=True, num_beams=3, num_return_sequences=2)
    monkeypatch.setattr(model, "generation_config", saved)
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    assert model.encode_prefix(**inputs).nbytes == inputs["input_ids"].shape[1] * TOKEN_BYTES


@pytest.mark.parametrize("max_bytes", [float("inf"), 1e9, 12.5 * TOKEN_BYTES, 12 * TOKEN_BYTES])
def test_a_bound_may_be_a_float(model, processor, max_bytes):
    kept = PrefixCache(max_bytes)
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    assert kept.reused == min(inputs["input_ids"].shape[1] - 1, max_bytes // TOKEN_BYTES)
    assert len(kept._segments) == 1, "what is known is not kept again"


def test_rows_that_begin_after_what_the_others_know(model, processor):
    kept = model.encode_prefix(**processor("!"))
    inputs = processor(["Is there anything else in this long row? Is there?", "What?"])
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs)
    padding = (inputs["attention_mask"] == 0).sum()
    known = len(processor.tokenizer("<|im_start|>user\n")["input_ids"])
    assert kept.reused == known < padding, "the first row's, of which the other one has padding"


def test_what_is_used_least_recently_is_dropped(model, processor):
    red, blue, green = (processor("What is it?", image, **KNOBS) for image in IMAGES)
    ask(model, red, prefix_cache=(kept := PrefixCache()))
    one = kept.nbytes
    kept = PrefixCache(max_bytes=2 * one)
    for inputs in (red, blue, red, green):
        ask(model, inputs, prefix_cache=kept)
    reused = kept.reused
    ask(model, red, prefix_cache=kept)
    assert kept.reused - reused == red["input_ids"].shape[1] - 1, "all but the last token"


def test_what_is_used_last_stays(model, processor):
    first = processor("What is it?", IMAGES[0], **KNOBS)
    ask(model, first, prefix_cache=(kept := PrefixCache()))
    tokens = kept.nbytes // TOKEN_BYTES
    assert tokens == first["input_ids"].shape[1] + OPTIONS["max_new_tokens"] - 1
    kept = PrefixCache(max_bytes=(tokens + 20) * TOKEN_BYTES)
    for question in ("What is it?", f"Where {'are ' * 12}", "And where else, if not there?", "What is it?"):
        reused = kept.reused
        ask(model, processor(question, IMAGES[0], **KNOBS), prefix_cache=kept)
    assert kept.reused - reused >= 55, "the picture is needed by all of them"
    ask(model, processor("What is it?", IMAGES[1], **KNOBS), prefix_cache=kept)
    reused = kept.reused
    ask(model, first, prefix_cache=kept)
    assert kept.reused == reused + 4, "the other picture's prompt took its place, but for the tokens that they share"
    tensors = [part for segment in kept._segments.values() for layer in segment.layers for part in layer]
    assert kept.nbytes == sum(part.untyped_storage().nbytes() for part in tensors), "no part keeps a whole in memory"
    kept.clear()
    assert kept.nbytes == 0 and not kept._tokens


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"use_cache": False},
        {"prefill_chunk_size": 8},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"position_ids": torch.arange(5)[None]},
    ],
    ids=str,
)
def test_what_cant_be_combined(model, processor, options):
    with pytest.raises(ValueError, match=f"prefix_cache can't be combined with {next(iter(options))}.*: leave"):
        model.generate(**processor("Hello"), **OPTIONS, **options, prefix_cache=PrefixCache())
    config = copy.deepcopy(model.generation_config)
    config.update(**{name: value for name, value in options.items() if name != "position_ids"})
    if "position_ids" not in options:
        with pytest.raises(ValueError, match="prefix_cache can't be combined with"):
            model.generate(**processor("Hello"), generation_config=config, prefix_cache=PrefixCache())


def test_another_cache_and_prompts_padded_on_the_right(model, processor):
    cache = model(**processor("Hello")).cache
    with pytest.raises(ValueError, match="can't be combined with (cache|past_key_values): leave"):
        model.generate(**processor("Hello"), cache=cache, prefix_cache=PrefixCache())
    inputs = processor(["Hello", "A longer question"])
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(**right, prefix_cache=PrefixCache())
    for max_bytes in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"max_bytes must be at least 0, got {max_bytes}"):
            PrefixCache(max_bytes)


def test_layers_with_a_sliding_window(processor):
    model = small_model()
    model.config.text_config.sliding_window = 8
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer: leave prefix_cache out"):
        model.generate(**processor("What is it?", IMAGES[0], **KNOBS), prefix_cache=PrefixCache())
    assert Engine(model, processor).prefix_cache is None


def test_offloaded_weights(model, processor, monkeypatch):
    with torch.device("meta"):
        layer = torch.nn.Linear(3, 3)
    monkeypatch.setattr(model.model.language_model, "offloaded", layer, raising=False)
    with pytest.raises(ValueError, match="weights are offloaded.*: leave prefix_cache out"):
        model.generate(**processor("Hello"), prefix_cache=PrefixCache())
    assert not can_keep_prefixes(model)


def test_what_two_threads_keep_at_once_is_dropped_one_by_one(model, processor, monkeypatch):
    kept, inputs = PrefixCache(), processor("What is it?")

    def lag(*args) -> Segment:
        monkeypatch.undo()
        model.encode_prefix(kept, **inputs)  # in another thread
        return Segment(*args)

    monkeypatch.setattr(prefix_cache_mc_llava, "Segment", lag)
    model.encode_prefix(kept, **inputs)
    assert len(kept._segments) == 2
    kept.max_bytes = kept.nbytes // 2
    model.encode_prefix(kept, **processor("?"))
    assert ask(model, inputs, prefix_cache=kept) == ask(model, inputs) and kept.nbytes <= kept.max_bytes


def test_threads_and_streams(model, processor):
    kept, questions = PrefixCache(), [f"What is {word}?" for word in ("it", "red", "that one", "there")]
    inputs = [processor(question, IMAGES[index % 2], **KNOBS) for index, question in enumerate(questions)]
    expected = [processor.decode(ask(model, one)[0]) for one in inputs]
    streamers = [TextIteratorStreamer(processor.tokenizer, skip_prompt=True) for _ in range(3) for _ in inputs]
    threads = [
        threading.Thread(
            target=model.generate, kwargs={**inputs[index % 4], **OPTIONS, "streamer": one, "prefix_cache": kept}
        )
        for index, one in enumerate(streamers)
    ]
    for thread in threads:
        thread.start()
    found = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()
    assert [text.strip() for text in found] == [text.strip() for text in expected * 3]
    assert kept.nbytes == sum(segment.nbytes for segment in kept._segments.values())


class TestEngine:
    def test_later_turns_compute_only_what_is_new(self, model, processor, computed):
        engine, plain = (Engine(model, processor, 4, 50, max_new_tokens=4, prefix_bytes=size) for size in (2**30, 0))
        assert plain.prefix_cache is None
        turns = ask_about([IMAGES[0]], "What?")
        for number in range(3):
            computed.clear()
            (reply,) = engine.answer([turns], **GREEDY)
            passed = max(computed)
            (expected,) = plain.answer([turns], **GREEDY)
            assert reply.text == expected.text and reply.prompt_tokens == expected.prompt_tokens
            assert (passed < 25) == (number > 0), passed
            turns = [*turns, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And?"}]
        computed.clear()
        engine.answer([ask_about([IMAGES[0]], "Why?")], **GREEDY)
        assert max(computed) < 25, "a new conversation about the same picture"

    def test_options_that_it_cant_be_combined_with(self, model, processor):
        engine = Engine(model, processor, max_new_tokens=3)
        (expected,) = engine.answer([ask_about([IMAGES[0]], "What?")], **GREEDY)
        for options in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            (found,) = engine.answer([ask_about([IMAGES[0]], "What?")], **GREEDY, **options)
            assert found.text == expected.text

    def test_a_saved_option_that_it_cant_be_combined_with(self, model, processor, monkeypatch):
        monkeypatch.setattr(model.generation_config, "use_cache", False)
        engine = Engine(model, processor, max_new_tokens=3)
        assert engine.prefix_cache is None and engine.answer([ask_about([IMAGES[0]], "What?")])

    def test_an_answer_reuses_the_last_draft(self, model, processor, monkeypatch):
        engine = Engine(model, processor, 20, 40, max_new_tokens=1, zoom=1)
        asked = [ask_about([picture(400, 300)], "What?")]
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        monkeypatch.setattr(zoom_mc_llava, "SURE", 1e-300)
        monkeypatch.setattr(zoom_mc_llava, "find_ends", lambda *args: range(model.config.text_config.vocab_size))
        (reply,) = engine.answer(asked, **GREEDY)
        assert not any(crop["round"] for crop in reply.looked_at)
        assert engine.prefix_cache.reused == reply.prompt_tokens - 1

    def test_with_zoom(self, model, processor):
        engine, plain = (
            Engine(model, processor, 20, 40, max_new_tokens=4, zoom=1, prefix_bytes=size) for size in (2**30, 0)
        )
        for question in ("What?", "What?", "Where is it?"):
            asked = [ask_about([picture(400, 300)], question)]
            assert engine.answer(asked, **GREEDY)[0].text == plain.answer(asked, **GREEDY)[0].text
        assert engine.feature_cache.hits
