"""Everything `generate` offers, with pixels, with features and with the short form of a prompt."""

import copy
from functools import partial

import pytest
import torch
from helpers import CountReads, counting_crops, picture, prompt, small_model
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    TextStreamer,
    TopKLogitsWarper,
)
from transformers.generation import utils as generation_utils
from transformers.generation.streamers import BaseStreamer

from mc_llava import CACHE, CROPS_PER_PASS, Crop, MCLlavaModel, PrefixCache, SuppressToken


pytestmark = pytest.mark.usefixtures("no_old_name")
IMAGES = [picture(40, 30), picture(200, 60, seed=1), picture(70, 150, seed=2), picture(2000, 300)]
TEXTS = ["What is it?", "And where are they all?", prompt("Two", 2)]
NESTED = [IMAGES[:1], IMAGES[1:2], IMAGES[1:3]]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def new_tokens(model, inputs, **options) -> list:
    output = model.generate(**inputs, **{**GREEDY, **options})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def with_features(model, processor, texts, images):
    """The same images as features: once with expanded ids, once with one <image> per image."""
    inputs = processor(texts, images)
    fields = {name: inputs.pop(name) for name in processor.image_processor.model_input_names}
    with torch.no_grad():
        features = model.get_image_features(**fields).pooler_output
    short = processor(texts, images, model)
    assert all(torch.equal(a, b) for a, b in zip(short["image_features"], features))
    assert (short["input_ids"] == 50297).sum() == len(features) < (inputs["input_ids"] == 50297).sum()
    return {**inputs, "image_features": features}, short


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_batch_equals_one_by_one_and_cached_equals_uncached(processor, seed):
    model = small_model(seed)
    texts, images = [*TEXTS, "No image at all"], [*NESTED, []]
    batch = new_tokens(model, processor(texts, images))
    assert len({tuple(row) for row in batch}) == 4
    assert batch == new_tokens(model, processor(texts, images), use_cache=False)
    for row, text, own in zip(batch, texts, images):
        alone = processor(text, [own])
        assert [row] == new_tokens(model, alone) == new_tokens(model, alone, use_cache=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"cache_implementation": "static", "disable_compile": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": 13},
    ],
    ids=str,
)
def test_features_equal_pixels_in_both_forms(model, processor, options):
    inputs = processor(TEXTS, NESTED)
    torch.manual_seed(0)
    reference = new_tokens(model, inputs, **options)
    for twin in with_features(model, processor, TEXTS, NESTED):
        torch.manual_seed(0)
        assert new_tokens(model, twin, **options) == reference
        assert len(twin["image_features"]) == 4, "beams must not change what the caller holds"


def test_beams_with_several_images_equal_one_by_one(model, processor):
    options = {"num_beams": 4, "num_return_sequences": 2}
    batch = new_tokens(model, processor(TEXTS, NESTED), **options)
    for index, (text, images) in enumerate(zip(TEXTS, NESTED)):
        assert batch[2 * index : 2 * index + 2] == new_tokens(model, processor(text, [images]), **options)


def test_static_cache_equals_dynamic(model, processor):
    inputs = processor(TEXTS, NESTED)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert new_tokens(model, inputs, **options) == new_tokens(model, inputs)


def test_encoder_outputs_of_transformers(model, processor):
    inputs = processor(TEXTS, NESTED)
    reference = new_tokens(model, inputs, num_beams=2)
    encoded = model.get_image_features(**{n: inputs.pop(n) for n in processor.image_processor.model_input_names})
    for _ in range(2):  # the second call sees what the first one left behind
        assert new_tokens(model, inputs, num_beams=2, mm_encoder_outputs={"image": encoded}) == reference


def test_chunked_prefill(model, processor):
    for inputs in (processor(TEXTS[1], IMAGES[1]), processor(TEXTS, NESTED)):
        if hasattr(generation_utils, "_slice_mm_encoder_output"):
            assert new_tokens(model, inputs, prefill_chunk_size=7) == new_tokens(model, inputs)
        else:
            with pytest.raises(ValueError, match="needs transformers 5.23"):
                model.generate(**inputs, prefill_chunk_size=7)


class TestWhoseTokens:
    """The numbers of places and tokens may agree by chance."""

    def calls(self, model, text, fields):
        features = model.get_image_features(**fields, return_dict=True)
        for images in (
            {"image_features": features.pooler_output},
            {"image_features": model.encode_images(**fields)},
            {"mm_encoder_outputs": {"image": features}},
            fields,
        ):
            yield partial(model.generate, **text, **images, **GREEDY)
            yield partial(model, **text, **images)

    def split(self, processor, *arguments, **knobs):
        inputs = processor(*arguments, **knobs)
        return inputs, {name: inputs.pop(name) for name in processor.image_processor.model_input_names}

    def test_one_image_is_not_dealt_out_among_rows(self, model, processor):
        text, _ = self.split(processor, ["a", "b"], IMAGES[:1] * 2, num_tokens=1, max_crops=0)
        _, fields = self.split(processor, "a", IMAGES[0], num_tokens=2, max_crops=0)
        assert (text["input_ids"] == 50297).sum() == fields["crop_num_tokens"].sum() == 2
        for call in self.calls(model, text, fields):
            with pytest.raises(ValueError, match=r"the rows have \[1, 1\] <image> tokens, the images \[2\] tokens"):
                call()

    def test_nor_among_the_places_of_a_row(self, model, processor):
        """Two images of 3 and 5 tokens, and places for 5 and 3."""
        raw = prompt("a", 2)
        plans = [[((0, 0, 40, 30), count)] for count in (3, 5)]
        text, _ = self.split(processor, raw, IMAGES[:1] * 2, plans=[[Crop(*crop) for crop in plan] for plan in plans])
        plans = [[Crop(*crop) for crop in plan] for plan in plans[::-1]]
        _, fields = self.split(processor, raw, IMAGES[:1] * 2, plans=plans)
        for call in self.calls(model, text, fields):
            with pytest.raises(ValueError, match=r"the rows have \[8\] <image> tokens, the images \[5, 3\] tokens"):
                call()

    def test_images_may_touch(self, model, processor):
        raw = prompt("a", 2).replace("<image>\n<image>", "<image><image>")
        inputs = processor(raw, IMAGES[:2])
        features, short = with_features(model, processor, raw, IMAGES[:2])
        assert new_tokens(model, inputs) == new_tokens(model, features) == new_tokens(model, short)


def test_stop_strings_with_a_processor(model, processor):
    """`transformers serve` passes the processor as the tokenizer."""
    letter = processor.tokenizer.convert_tokens_to_ids("a")
    options = {"stop_strings": ["aaa"], "sequence_bias": {(letter,): 1e3}}
    for one in (processor, processor.tokenizer):
        assert new_tokens(model, processor(TEXTS[0], IMAGES[0]), **options, tokenizer=one) == [[letter] * 3]
    assert processor.get_vocab() == processor.tokenizer.get_vocab()


def test_embeddings_alone(model, processor):
    inputs = processor("Why?")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert model.generate(inputs_embeds=embeds, **GREEDY).tolist() == new_tokens(model, inputs)


def test_an_empty_prompt(model):
    ids = torch.zeros(1, 0, dtype=torch.long)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(1, 0, 48)}):
        with pytest.raises(ValueError, match="the prompt is empty: pass at least one token"):
            model.generate(**inputs)


def test_positional_ids(model, processor):
    inputs = processor("Why?")
    assert model.generate(inputs["input_ids"], **GREEDY)[:, inputs["input_ids"].shape[1] :].tolist() == new_tokens(
        model, inputs
    )


def test_the_pad_token_stands_in_for_a_missing_mask(model, processor):
    for inputs in (processor(TEXTS, NESTED), processor(TEXTS, NESTED, model)):
        reference = new_tokens(model, inputs)
        inputs.pop("attention_mask")
        assert new_tokens(model, inputs) == reference


TURN_END = 50295


@pytest.mark.parametrize("ends", [TURN_END, [50256, TURN_END], torch.tensor([50256, TURN_END])], ids=str)
def test_no_mask_is_made_of_the_end_of_a_turn(model, processor, ends):
    """With a pad token that also ends turns, as in many tokenizers, the ends within a conversation are not padding."""
    ids = processor(prompt("Hello", 0) + "Hi.<|im_end|>\n" + prompt("What is it?", 0))["input_ids"]
    assert (ids == TURN_END).sum() == 3
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    for more in (
        {"pad_token_id": TURN_END, "eos_token_id": ends},
        {"generation_config": GenerationConfig(pad_token_id=TURN_END, eos_token_id=ends)},
    ):
        found, expected = (
            model.generate(ids, **options, **more, **mask).logits[0]
            for mask in ({}, {"attention_mask": torch.ones_like(ids)})
        )
        assert torch.equal(found, expected)
    other = ids.clone()
    other[:, 0] = 7
    found, expected = (
        model.generate(other, **options, pad_token_id=7, **mask).logits[0]
        for mask in ({}, {"attention_mask": (other != 7).long()})
    )
    assert torch.equal(found, expected)


def test_dictionaries(model, processor):
    expanded, short = with_features(model, processor, TEXTS, NESTED)
    outputs = [
        model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        for inputs in (processor(TEXTS, NESTED), expanded, short)
    ]
    for output in outputs[1:]:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(output.logits, outputs[0].logits))


class Recorder(BaseStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append("end")


def test_streaming_starts_with_the_prompt_as_given(model, processor):
    for inputs in (processor(TEXTS[1], IMAGES[1]), processor(TEXTS[1], IMAGES[1], model)):
        recorder = Recorder()
        output = model.generate(**inputs, **GREEDY, streamer=recorder)
        assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        assert recorder.ids == [*output[0].tolist(), "end"]


def test_text_streamer(model, processor, capsys):
    inputs = processor(TEXTS[1], IMAGES[1])
    output = model.generate(**inputs, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == processor.decode(output[0, inputs["input_ids"].shape[1] :]).strip()


@pytest.mark.parametrize("name", ["max_length", "min_length"])
def test_length_limits_of_the_short_form(model, processor, name, monkeypatch):
    short = processor(TEXTS[1], IMAGES[1], model)
    for options in ({name: 50}, {"generation_config": GenerationConfig(**{name: 50})}):
        with pytest.raises(ValueError, match=f"{name}=50 can't be counted .* use {name[:3]}_new_tokens"):
            model.generate(**short, **options)
    monkeypatch.setattr(model.generation_config, name, 50)
    with pytest.raises(ValueError, match=f"{name}=50 can't be counted"):
        model.generate(**short)
    assert len(new_tokens(model, short, max_new_tokens=3, min_new_tokens=2)[0]) == 3, "which replaces what was saved"
    monkeypatch.undo()
    inputs = processor(TEXTS[1], IMAGES[1])
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_length=length + 3, do_sample=False, eos_token_id=None)
    assert output.shape[1] == length + 3


@pytest.mark.parametrize(
    "name, neutral, value", [("encoder_no_repeat_ngram_size", 0, 1), ("encoder_repetition_penalty", 1.0, 30.0)]
)
def test_what_looks_at_the_ids_of_the_prompt(model, processor, name, neutral, value):
    inputs, short = processor(TEXTS[1], IMAGES[1]), processor(TEXTS[1], IMAGES[1], model)
    for arguments in (short, {**inputs, "prefix_cache": PrefixCache()}):
        with pytest.raises(ValueError, match=f"can't be combined with .*{name}|{name} can't be combined with one"):
            model.generate(**arguments, **{name: value})
        assert new_tokens(model, arguments, **{name: neutral}) == new_tokens(model, inputs)


def test_positions_of_the_short_form_are_refused(model, processor):
    short = processor(TEXTS[1], IMAGES[1], model)
    with pytest.raises(ValueError, match="position_ids can't be combined with one <image> per image"):
        model.generate(**short, position_ids=torch.arange(5)[None])


def test_healing_is_for_text_alone(model, processor):
    options = {"token_healing": True, "tokenizer": processor.tokenizer}
    for inputs in (processor(TEXTS[1], IMAGES[1]), processor(TEXTS[1], IMAGES[1], model)):
        with pytest.raises(ValueError, match="token_healing can't be combined with images: leave it out"):
            model.generate(**inputs, **options)
    with pytest.raises(ValueError, match="prefix_cache can't be combined with token_healing: leave"):
        model.generate(**processor("Why?"), **options, prefix_cache=PrefixCache())


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit"])
def test_assisted_decoding_is_for_text_alone(model, processor, name):
    option = {name: small_model(5) if name == "assistant_model" else 1}
    for inputs in (processor(TEXTS[1], IMAGES[1]), processor(TEXTS[1], IMAGES[1], model)):
        with pytest.raises(ValueError, match=f"{name} can't be combined with images"):
            model.generate(**inputs, **option)


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_of_text(model, processor, name):
    """The assistant model is always right, so several tokens are new between two checks for the end of the context."""
    option = {name: small_model() if name == "assistant_model" else 5}
    inputs = processor("Why?")
    assert new_tokens(model, inputs, **option) == new_tokens(model, inputs)
    room = 128 - inputs["input_ids"].shape[1]
    assert len(new_tokens(model, inputs, **option, max_new_tokens=500)[0]) == room
    config = GenerationConfig(max_new_tokens=500, do_sample=False, eos_token_id=None, pad_token_id=50298)
    assert model.generate(**inputs, **option, generation_config=config).shape[1] == 128


def test_chunks_of_the_short_form(model, processor):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**processor(TEXTS[1], IMAGES[1], model), prefill_chunk_size=7)


class TestConversationsInACache:
    """The second turn's ids continue the first turn's sequences and cache."""

    def turns(self, model, processor, images):
        first = processor(TEXTS[1], IMAGES[1])
        output = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        second = processor(prompt("And here?", len(images)), images or None)
        ids = torch.cat([output.sequences, second.pop("input_ids")], dim=1)
        second.pop("attention_mask")
        return output.cache, ids, second

    @pytest.mark.parametrize("images", [[], IMAGES[2:3]], ids=["text", "another picture"])
    def test_a_second_turn(self, model, processor, images):
        cache, ids, second = self.turns(model, processor, images)
        options = {**GREEDY, "return_dict_in_generate": False}
        cached = model.generate(ids, cache=cache, **second, **options)
        both = processor(prompt("both", 1 + len(images)), [IMAGES[1], *images])
        pixels = {name: both[name] for name in processor.image_processor.model_input_names}
        assert torch.equal(cached, model.generate(ids, **pixels, **options))

    @pytest.mark.parametrize("has_config", [False, True])
    def test_the_short_form(self, model, processor, has_config):
        """The sequences of a short form lack tokens that are in the cache. An empty cache is falsy."""
        cache = DynamicCache(config=model.config.get_text_config()) if has_config else DynamicCache()
        with pytest.raises(ValueError, match="can't be combined with one <image> per image: pass one <image> per vis"):
            model.generate(**processor(TEXTS[1], IMAGES[1], model), cache=cache)
        with pytest.raises(ValueError, match="prefix_cache can't be combined with (cache|past_key_values): leave"):
            model.generate(**processor(TEXTS[1], IMAGES[1]), cache=cache, prefix_cache=PrefixCache())

    def test_fewer_ids_than_the_cache_holds(self, model, processor):
        cache, ids, _ = self.turns(model, processor, [])
        known = cache.get_seq_length()
        for length in (known, 5):
            with pytest.raises(ValueError, match=f"cache holds {known} tokens and input_ids have {length}: pass the"):
                model.generate(ids[:, :length], cache=cache)
        new, mask = ids[:, known:], torch.ones_like(ids)
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        found = model.generate(new, attention_mask=mask, cache=copy.deepcopy(cache), **options)
        assert torch.equal(found[:, new.shape[1] :], model.generate(ids, cache=cache, **options)[:, ids.shape[1] :])

    def test_a_place_without_an_image(self, model, processor):
        cache, ids, _ = self.turns(model, processor, IMAGES[2:3])
        with pytest.raises(ValueError, match="<image> tokens but got no images"):
            model.generate(ids, cache=cache)


def test_the_image_token_is_never_generated(processor):
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[50297] = 1e4
    inputs = processor(TEXTS[1], IMAGES[1])
    tokens = new_tokens(model, inputs)
    assert 50297 not in tokens[0] and tokens == new_tokens(model, inputs, use_cache=False)


class TestReads:
    """How often our code waits for a value from the device, which `CountReads` counts on a CPU."""

    @staticmethod
    def count(model, inputs, **options) -> list[str]:
        with CountReads() as counted:
            new_tokens(model, inputs, **options)
        return counted.reads

    def test_pixels(self, model, processor):
        """Four at most, however many rows, images, crops, passes and tokens there are."""
        one = self.count(model, processor(TEXTS[0], NESTED[0], max_crops=0), max_new_tokens=1)
        images = [[picture(900, 800), IMAGES[0]], [IMAGES[1]], []]
        many = processor([TEXTS[2], TEXTS[1], "No image"], images, max_crops=45, num_tokens=46)
        assert len(many["pixel_values"]) > 2 * CROPS_PER_PASS
        for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"output_logits": True}):
            assert 1 <= len(self.count(model, many, **options)) == len(one) <= 4

    def test_a_prefix_cache(self, model, processor):
        """As many for one row as for three, including the reads of weights and embeddings."""
        found = []
        for texts, images in ((TEXTS[:1], NESTED[:1]), ([*TEXTS, "No image"], [*NESTED, []])):
            inputs, kept = processor(texts, images, max_crops=3), PrefixCache()
            found += [len(self.count(model, inputs, prefix_cache=kept)) for _ in range(2)]
        assert len(set(found)) == 1 and found[0] <= 6

    def test_features(self, model, processor):
        few = processor(TEXTS[:1], NESTED[:1], max_crops=0)
        many = processor([*TEXTS, "No image"], [*NESTED, []], max_crops=19)
        found = []
        for inputs in (few, many):
            with CountReads() as counted:
                encoded = model.encode_images(**inputs)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            found.append((len(counted.reads), len(self.count(model, text, image_features=encoded))))
        assert found[0] == found[1]

    def test_the_short_form(self, model, processor):
        found = []
        for texts, images in ((TEXTS[:1], NESTED[:1]), ([*TEXTS, "No image"], [*NESTED, []])):
            found.append(len(self.count(model, processor(texts, images, model))))
        assert found[0] == found[1]

    def test_a_forward_pass(self, model, processor):
        inputs = processor(TEXTS, NESTED, max_crops=19)
        with CountReads() as counted, torch.no_grad():
            model(**inputs)
        assert 1 <= len(counted.reads) <= 2
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        images = {name: inputs[name] for name in processor.image_processor.model_input_names}
        features = model.get_image_features(**images, return_dict=True).pooler_output
        with CountReads() as counted, torch.no_grad():
            model(**text, image_features=features)
        assert len(counted.reads) == 1, "places are checked once"

    def test_what_is_counted(self):
        """Each way to read a value is counted, and nothing that reads no value."""
        tensor = torch.arange(4)
        scope = {"__name__": "ours", "tensor": tensor, "torch": torch}
        for code, reads in (
            ("tensor[0].item()", 1),
            ("int(tensor[1]) + bool(tensor[1] > 0)", 2),
            ("tensor.tolist() + tensor.cpu().numpy().tolist()", 2),
            ("tensor[tensor > 1], tensor.nonzero()", 2),
            ("tensor[torch.tensor([1, 2])] + tensor[1:3].sum() * tensor.masked_fill(tensor > 1, 0)[0]", 0),
        ):
            with CountReads() as counted:
                eval(compile(code, "fake_mc_llava.py", "eval"), scope)
            assert len(counted.reads) == reads, code


def test_the_image_token_costs_one_column(monkeypatch):
    """transformers' processor compares all words with the suppressed ones, which takes as long as a small layer."""
    scores = torch.randn(2, 51200)
    before = scores.clone()
    ids = torch.zeros(2, 3)
    with CountReads() as counted:
        found = SuppressToken(7)(ids, scores)
    assert counted.kernels == ["clone", "fill_"] and torch.equal(scores, before)
    assert (found[:, 7] == -torch.inf).all() and torch.equal(found[:, 8:], before[:, 8:])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_states_of_the_language_model(processor, options):
    """transformers' `generate` takes the arguments of `get_image_features` from those of the language model."""
    model = small_model(attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    for inputs in (processor(TEXTS, NESTED), processor(TEXTS[0], IMAGES[0], model), processor("Why?")):
        with counting_crops(model) as crops:
            output = model.generate(**inputs, **GREEDY, **options, **asked)
        assert sum(crops) == len(inputs.get("pixel_values", ())), "the tower is run once, without its states"
        assert [len(step) for step in output.hidden_states] == [3] * 8  # with the embeddings
        assert [len(step) for step in output.attentions] == [2] * 8
    inputs = processor(TEXTS, NESTED)
    found = model.generate(**inputs, **GREEDY, **asked).hidden_states[0]
    expected = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(CACHE != "cache", reason="Phi's keys don't fit the paged cache of older transformers")
def test_continuous_batching_of_text(model, processor):
    config = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default it takes most of the memory
    batch = [processor(text)["input_ids"][0].tolist() for text in ("Why?", "Where is it?")]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "continuous_batching_config": config}
    outputs = model.generate_batch(batch, **options).values()
    alone = [new_tokens(model, {"input_ids": torch.tensor([ids])})[0] for ids in batch]
    assert [output.generated_tokens for output in outputs] == alone
    with pytest.raises(ValueError, match="generate_batch takes no images: remove <image>, or call generate"):
        model.generate_batch([processor("Why?", IMAGES[0])["input_ids"][0].tolist()], **options)


@pytest.mark.parametrize("do_sample", [False, True])
def test_filters_of_the_caller_keep_another_token_than_image(processor, do_sample):
    model = small_model()
    inputs = processor("Why?")
    expected = new_tokens(model, inputs)
    with torch.no_grad():
        model.lm_head.bias[model.config.image_token_id] = 100
    filters = LogitsProcessorList([TopKLogitsWarper(1)])
    assert new_tokens(model, inputs, logits_processor=filters, do_sample=do_sample) == expected


def test_crops_are_cast_pass_by_pass(processor, monkeypatch):
    model = small_model().bfloat16()
    inputs = processor(TEXTS, NESTED, max_crops=19)
    images = {name: inputs[name] for name in processor.image_processor.model_input_names}
    sizes, crops = [], len(inputs["pixel_values"])
    cast = torch.Tensor.to

    def note(tensor, *args, **kwargs):
        if tensor.ndim == 4:
            sizes.append(len(tensor))
        return cast(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", note)
    model.get_image_features(**images, output_hidden_states=True)
    assert sizes and max(sizes) == CROPS_PER_PASS < crops


def test_a_configuration_without_a_pad_token(processor):
    model = small_model()
    inputs = processor("Why?")
    reference = model.generate(**inputs, **GREEDY)
    model.config.pad_token_id = None
    assert torch.equal(model.generate(inputs["input_ids"], **GREEDY), reference)


class TestContext:
    """The small model's context has 128 positions."""

    def test_generation_ends_where_the_context_ends(self, model, processor):
        expanded = processor("What?", IMAGES[1], num_tokens=90)
        length = expanded["input_ids"].shape[1]
        for inputs in (expanded, processor("What?", IMAGES[1], model, num_tokens=90)):
            for options in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}):
                tokens = new_tokens(model, inputs, max_new_tokens=500, **options)
                assert {len(row) for row in tokens} == {128 - length}

    def test_each_row_ends_where_its_own_context_ends(self, model, processor):
        texts, images = ["a", "a"], [[IMAGES[1]], []]
        options = {"max_new_tokens": 200, "eos_token_id": 50295, "pad_token_id": 0}
        batch = new_tokens(model, processor(texts, images, num_tokens=90), **options)
        lengths = []
        for row, text, own in zip(batch, texts, images):
            alone = new_tokens(model, processor(text, [own], num_tokens=90), **options)[0]
            assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {0}
            lengths.append(len(alone))
        assert lengths[0] < lengths[1] <= 128

    def test_so_do_the_rows_beams(self, model, processor):
        texts, images = ["a", "a"], [[IMAGES[1]], []]
        options = {"max_new_tokens": 200, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": 50295}
        batch = new_tokens(model, processor(texts, images, num_tokens=90), **options)
        for index, (text, own) in enumerate(zip(texts, images)):
            alone = new_tokens(model, processor(text, [own], num_tokens=90), **options)
            for row, expected in zip(batch[3 * index : 3 * index + 3], alone, strict=True):
                assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {50298}

    def test_embeddings_count_too(self, model):
        output = model.generate(inputs_embeds=torch.randn(1, 120, 48), **{**GREEDY, "max_new_tokens": 50})
        assert output.shape[1] == 8
        with pytest.raises(ValueError, match="no room for an answer: shorten the text"):
            model.generate(inputs_embeds=torch.randn(1, 128, 48))

    @pytest.mark.parametrize("images", [1, 2])
    def test_a_prompt_that_fills_it_is_refused_before_a_crop_is_encoded(self, model, processor, images, monkeypatch):
        def encode(*args, **kwargs):
            raise AssertionError("a crop was encoded")

        inputs = processor(prompt("What is it?", images), [IMAGES[3]] * images, max_crops=60, num_tokens=130)
        monkeypatch.setattr(MCLlavaModel, "get_image_features", encode)
        with pytest.raises(
            ValueError, match=r"the context 128 \(max_position_embeddings\).* num_tokens=\d+ or"
        ) as error:
            model.generate(**inputs)
        monkeypatch.undo()

        fitting = int(str(error.value).split("num_tokens=")[1].split()[0])
        for num_tokens, fits in ((fitting, True), (fitting + 1, False)):
            inputs = processor(
                prompt("What is it?", images), [IMAGES[3]] * images, max_crops=60, num_tokens=num_tokens
            )
            if fits:
                assert len(new_tokens(model, inputs)[0]) >= 1
            else:
                with pytest.raises(ValueError, match=f"num_tokens={fitting} or less"):
                    model.generate(**inputs)

    def test_the_remedy_for_a_batch_fits_each_row_with_its_own_images(self, model, processor):
        def ask(num_tokens):
            texts, images = ["What is it?", prompt("And these?", 2), "Why?"], [[IMAGES[3]], [IMAGES[3]] * 2, []]
            return model.generate(**processor(texts, images, max_crops=60, num_tokens=num_tokens), max_new_tokens=1)

        with pytest.raises(ValueError, match=r"pass num_tokens=\d+ or less") as error:
            ask(130)
        fitting = int(str(error.value).split("num_tokens=")[1].split()[0])
        ask(fitting)
        with pytest.raises(ValueError, match=f"num_tokens={fitting} or less"):
            ask(fitting + 1)

    def test_the_short_form_is_refused_alike(self, model, processor):
        short = processor("What is it?", IMAGES[3], model, max_crops=60, num_tokens=130)
        with pytest.raises(ValueError, match=r"leaves no room for an answer: pass num_tokens=\d+ or less"):
            model.generate(**short)

    def test_too_much_text(self, model, processor):
        with pytest.raises(ValueError, match="no room for an answer: shorten the text"):
            model.generate(**processor("word " * 200))


def test_a_place_without_an_image_is_refused(model, processor):
    inputs = processor.tokenizer([prompt("What?")], return_tensors="pt")
    with pytest.raises(ValueError, match="the prompt has 1 <image> tokens but got no images"):
        model.generate(**inputs)
