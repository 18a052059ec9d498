"""Guided zoom in the model: rounds, batches, what can't be combined, and where it looked."""

import copy
import math
import warnings

import pytest
import torch
from helpers import ROOT, CountReads, counting_crops, picture, prompt, small_model
from PIL import Image
from transformers.pipelines.base import pad_collate_fn

from mc_llava import (
    ZOOM_FIELDS,
    FeatureCache,
    MCLlavaForConditionalGeneration,
    MCLlavaProcessor,
    PrefixCache,
    ZoomedImages,
    can_keep_prefixes,
    check_plan,
    image_attention,
    last_attention,
    scenes,
    zoom_mc_llava,
)


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
KNOBS = {"zoom": 2, "max_crops": 24, "num_tokens": 40}
IMAGES = [picture(400, 300), picture(300, 420, seed=1), picture(80, 60, seed=2)]
TEXTS = [prompt("What is it?", 2), "And here?", "No picture at all"]
NESTED = [IMAGES[:2], IMAGES[2:], []]
HEADS = [{"layer": 0, "head": 1}, {"layer": 1, "head": 2}]


@pytest.fixture(scope="module")
def zooming() -> MCLlavaForConditionalGeneration:
    model = small_model(5, "eager")
    model.config.zoom_heads = HEADS
    return model


def new_tokens(model, inputs, **options) -> list:
    return model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :].tolist()


def test_without_zoom_nothing_changes(zooming, processor):
    plain = processor(TEXTS[:2], NESTED[:2], max_crops=6)
    assert not [name for name in plain if name.startswith("zoom")]
    explicit = processor(TEXTS[:2], NESTED[:2], max_crops=6, zoom=0)
    assert plain.keys() == explicit.keys() and all(torch.equal(plain[name], explicit[name]) for name in plain)


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_equals_one_by_one(processor, seed):
    model = small_model(seed, "eager")
    model.config.zoom_heads = HEADS if seed % 2 else None
    batch = new_tokens(model, processor(TEXTS, NESTED, **KNOBS))
    for row, text, own in zip(batch, TEXTS, NESTED):
        assert [row] == new_tokens(model, processor(text, [own], **KNOBS))
    looked = model.zoom(**processor(TEXTS, NESTED, **KNOBS)).unbind()
    alone = [image for text, own in zip(TEXTS, NESTED) if own for image in
             model.zoom(**processor(text, [own], **KNOBS)).unbind()]  # fmt: skip
    for one, other in zip(looked, alone, strict=True):
        assert torch.equal(one.crop_boxes, other.crop_boxes)
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [HEADS, None], ids=["measured", "unmeasured"])
def test_a_pipelines_batch_equals_one_by_one(zooming, processor, heads, monkeypatch):
    """A pipeline prepares the pictures one by one, and concatenates the fields."""
    monkeypatch.setattr(zooming.config, "zoom_heads", heads)
    singles = [processor(text, [own], **KNOBS) for text, own in zip(("What?", *TEXTS[:2]), (IMAGES[1:2], *NESTED))]
    batch = pad_collate_fn(processor.tokenizer, processor.image_processor)([dict(one) for one in singles])
    cache = FeatureCache()
    expected = [image for one in singles for image in zooming.zoom(**one, feature_cache=cache).unbind()]
    misses = cache.misses
    looked = zooming.zoom(**batch, feature_cache=cache).unbind()
    assert cache.misses == misses
    for one, other in zip(looked, expected, strict=True):
        assert torch.equal(one.crop_boxes, other.crop_boxes)
        torch.testing.assert_close(one.crop_relevance, other.crop_relevance, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert new_tokens(zooming, batch) == [row for one in singles for row in new_tokens(zooming, one)]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 5}, {"use_cache": False}],
    ids=str,
)
def test_generate_looks_and_answers_as_zoom_and_generate_do(zooming, processor, options):
    inputs = processor(TEXTS, NESTED, **KNOBS)
    looked = zooming.zoom(**inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    expected = new_tokens(zooming, {**text, "image_features": looked}, **options)
    torch.manual_seed(0)
    assert new_tokens(zooming, inputs, **options) == expected


@pytest.fixture
def passes(zooming):
    """How many crops passed through the vision tower."""
    with counting_crops(zooming) as crops:
        yield crops


def test_another_question_encodes_only_crops_that_are_new(zooming, processor, passes):
    cache, seen = FeatureCache(), set()
    questions = ("What is it?", "What is it?", "Where is the red sign?", "And the other one?")
    for question in questions:
        for knobs in (KNOBS, {**KNOBS, "num_tokens": 30}, {**KNOBS, "zoom": 1}):
            inputs = processor([question, question], [IMAGES[:1], IMAGES[1:2]], **knobs)
            expected = zooming.zoom(**inputs)
            before = sum(passes)
            looked = zooming.zoom(**inputs, feature_cache=cache)
            boxes = {(image, *box) for image, plan in enumerate(looked.plans) for box, _ in plan}
            assert sum(passes) - before == len(boxes - seen)
            seen |= boxes
            assert looked.plans == expected.plans and looked.weights_hash == expected.weights_hash
            torch.testing.assert_close(looked.features, expected.features, rtol=1e-4, atol=1e-4)
            assert new_tokens(zooming, inputs, feature_cache=cache) == new_tokens(zooming, inputs)
    (whole, _) = cache.encode(zooming, processor.image_processor, IMAGES[:2], max_crops=0, num_tokens=15)
    assert cache.misses and len(whole.features) == 15
    before = sum(passes)
    cache.encode(zooming, processor.image_processor, IMAGES[:2], max_crops=0, num_tokens=10)
    assert sum(passes) == before, "the whole picture is a crop of every plan"


def test_the_cache_tells_pictures_filters_and_weights_apart(processor):
    model, cache = small_model(), FeatureCache()
    other = IMAGES[0].copy()
    other.putpixel((399, 299), (1, 2, 3))
    for image, options in (
        (IMAGES[0], {}),
        (other, {}),
        (IMAGES[0], {"resample": 0}),
        (IMAGES[0], {"image_std": 0.4}),
    ):
        inputs = processor("What?", image, **KNOBS, **options)
        expected = model.zoom(**inputs)
        torch.testing.assert_close(model.zoom(**inputs, feature_cache=cache).features, expected.features)
    misses = cache.misses
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight *= 1.5
    inputs = processor("What?", IMAGES[0], **KNOBS)
    looked = model.zoom(**inputs, feature_cache=cache)
    assert cache.misses > misses and looked.weights_hash == model.hash_encoder()
    torch.testing.assert_close(looked.features, model.zoom(**inputs).features)


def test_features_are_projected_and_weights_hashed_once(zooming, processor, monkeypatch):
    projections, hashes, hash_encoder = [], [], zooming.hash_encoder
    monkeypatch.setattr(zooming, "hash_encoder", lambda: hashes.append(1) or hash_encoder())
    hook = zooming.model.multi_modal_projector.register_forward_hook(lambda *_: projections.append(1))
    inputs = processor("What is it?", IMAGES[0], **KNOBS)
    options = {**GREEDY, "return_dict_in_generate": True}
    zooming.generate(**inputs, **options)
    assert (len(projections), len(hashes)) == (3, 1), "one for each of two looks, and one for the answer"
    zooming.generate(**inputs, **options, feature_cache=FeatureCache())
    assert (len(projections), len(hashes)) == (6, 2)
    zooming.generate(**inputs, **GREEDY)
    assert (len(projections), len(hashes)) == (9, 2)
    hook.remove()


def test_a_feature_cache_without_zoom_goes_to_the_processor(zooming, processor):
    with pytest.raises(ValueError, match="pass feature_cache and the model to the processor"):
        zooming.generate(**processor("What?", IMAGES[0]), feature_cache=FeatureCache())


@pytest.mark.parametrize("heads", [HEADS, None], ids=["measured", "unmeasured"])
def test_the_device_is_read_twice_more_a_round(zooming, processor, heads, monkeypatch):
    monkeypatch.setattr(zooming.config, "zoom_heads", heads)
    reads = {}
    for texts, images in ((TEXTS[1], IMAGES[:1]), (TEXTS[:2], [IMAGES[:2], IMAGES[1:2]])):
        for rounds in (1, 2):
            inputs = processor(texts, images, **{**KNOBS, "zoom": rounds})
            with CountReads() as counted:
                looked = zooming.generate(**inputs, **GREEDY, return_dict_in_generate=True).zoomed_images
            assert looked.crop_rounds.max() == rounds
            # The features that were looked at are checked when they are returned.
            counted = [read for read in counted.reads if not read.startswith("encoded_images_mc_llava")]
            reads.setdefault(rounds, set()).add(len(counted))
    assert [len(counts) for counts in reads.values()] == [1, 1]
    assert reads[2] == {reads[1].pop() + 2}, "the prompt of a draft, and what it looks at and whether it is probable"


def contains(outer, inner) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


@pytest.mark.parametrize("zoom", [1, 2])
def test_where_it_looked(zooming, processor, zoom):
    inputs = processor(TEXTS, NESTED, **{**KNOBS, "zoom": zoom})
    output = zooming.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    looked = output.zoomed_images
    assert isinstance(looked, ZoomedImages) and looked.tokens_per_image == [40, 40, 15]
    first, second, small = looked.unbind()
    assert len(small.crop_boxes) == 1, "a picture without a grid has nothing to zoom into"
    for one, image in ((first, IMAGES[0]), (second, IMAGES[1])):
        rounds, relevance = one.crop_rounds.tolist(), one.crop_relevance.tolist()
        assert rounds == sorted(rounds) and set(rounds) == set(range(zoom + 1)) and len(rounds) <= 25
        assert [math.isnan(found) for found in relevance] == [number == zoom for number in rounds]
        (plan,) = one.plans
        assert check_plan([crop.box for crop in plan], *image.size, 40, 56, 14)
        if zoom == 1:  # of two regions
            scouts = [index for index, number in enumerate(rounds) if number == 0 and index]
            best = [plan[index].box for index in sorted(scouts, key=relevance.__getitem__)[-2:]]
            margins = [(right - left) // 6 for left, _, right, _ in best]
            regions = [(left - m, top, right + m, bottom) for m, (left, top, right, bottom) in zip(margins, best)]
            closer = [crop.box for crop, number in zip(plan, rounds) if number]
            assert all(any(contains(region, box) for region in regions) for box in closer)
            assert all(any(contains(region, box) for box in closer) for region in regions)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(zooming.generate(**text, image_features=looked, **GREEDY), output.sequences)


@pytest.mark.parametrize("heads", [HEADS, None], ids=["measured", "unmeasured"])
def test_adapters_by_row(processor, heads):
    """Also for rows without zoom: those without a picture, or with one that has no scouts."""
    peft = pytest.importorskip("peft")
    model = small_model(5, "eager")
    model.config.zoom_heads = heads
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, exclude_modules=".*tower.*")
    adapted = peft.get_peft_model(model, config).eval()
    texts, images, names = [*TEXTS, "And now?"], [*NESTED, IMAGES[:1]], ["default", "__base__", "default", "__base__"]
    batch = new_tokens(adapted, inputs := processor(texts, images, **KNOBS), adapter_names=names)
    for row, text, own, name in zip(batch, texts, images, names):
        assert [row] == new_tokens(adapted, processor(text, [own], **KNOBS), adapter_names=[name])
    assert batch != new_tokens(adapted, inputs)
    with pytest.raises(ValueError, match="adapter_names have 8 entries, and zoom asks 4 prompts, without beams: pass"):
        adapted.generate(**inputs, adapter_names=names, num_beams=2)


def test_the_cache_tells_adapters_of_a_call_apart(processor):
    """PEFT takes `adapter_names` to be those of crops if there are as many crops as rows."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=".*tower.*fc2", init_lora_weights=False)
    adapted, cache = peft.get_peft_model(small_model(), config).eval(), FeatureCache()
    inputs = processor(TEXTS[1], IMAGES[2], **KNOBS)
    assert len(inputs["pixel_values"]) == 1
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    for names in (["default"], ["__base__"], None):
        expected, found = (
            adapted.generate(**inputs, **options, adapter_names=names, feature_cache=kept).logits[0]
            for kept in (None, cache)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_closer_look_must_pay(zooming, processor, monkeypatch):
    """If attention goes to a whole picture, it gets no further crops, and its scouts are still reported."""
    asked = []

    def to_images(attention, input_ids, image_token_id, features):
        asked.append([len(of_image) for of_image in features])
        found = torch.full((attention.shape[1], sum(asked[-1])), 1e-5)
        found[:, : asked[-1][0] // 20] = 1.0  # some of the tokens of the first picture's whole
        return found

    monkeypatch.setattr(zoom_mc_llava, "_to_images", to_images)
    inputs = processor(TEXTS[0], IMAGES[:2], **KNOBS)
    first, second = zooming.zoom(**inputs).unbind()
    scouts = inputs["image_grid_thw"][:, 0].tolist()
    assert len(first.crop_boxes) == scouts[0] and not first.crop_rounds.any()
    assert first.crop_relevance.isfinite().all()
    assert len(second.crop_boxes) > scouts[1] and set(second.crop_rounds.tolist()) == {0, 1, 2}
    assert len(asked) == 2
    alone = zooming.zoom(**processor(TEXTS[1], IMAGES[:1], **KNOBS))
    assert len(alone.crop_boxes) == scouts[0] and len(asked) == 3, "no second round without a picture to look at"


def test_relevance_with_a_hook_on_a_layer(zooming, processor, monkeypatch):
    """As of steering vectors. It is seen whether or not zoom was used before."""
    monkeypatch.setattr(zoom_mc_llava, "pays", lambda *args: False)
    inputs = processor(TEXTS[0], IMAGES[:2], **KNOBS)
    plain = zooming.zoom(**inputs)
    hook = zooming.model.language_model.layers[0].register_forward_hook(lambda layer, args, output: output.sin())
    try:
        looked = zooming.zoom(**inputs)
        prompt = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            features = [image.features for image in looked.unbind()]
            expected = image_attention(zooming.model, *prompt, features, [(0, 1), (1, 2)]).mean(0)
    finally:
        hook.remove()
    parts = expected.split(inputs["crop_num_tokens"].tolist())
    torch.testing.assert_close(looked.crop_relevance, torch.stack([part.sum() for part in parts]))
    assert not torch.allclose(looked.crop_relevance, plain.crop_relevance, rtol=0.1)


def test_it_looks_no_further_once_an_answer_is_probable(zooming, processor, monkeypatch):
    texts, images = ["<image> What is it", "<image> And here"], [IMAGES[:1], IMAGES[1:2]]
    inputs, drafts, generate = processor(texts, images, **KNOBS), [], zooming.generate
    monkeypatch.setattr(zooming, "generate", lambda **options: drafts.append(generate(**options)) or drafts[-1])
    expected = zooming.zoom(**inputs).unbind()
    first, second = drafts[0].sequences[:, 0].tolist()
    assert first != second and drafts[0].sequences.shape[1] == 1, "it is not drafted to its end"
    monkeypatch.setattr(zooming.generation_config, "eos_token_id", first)
    assert [image.plans for image in zooming.zoom(**inputs).unbind()] == [image.plans for image in expected]
    monkeypatch.setattr(zoom_mc_llava, "SURE", 1e-300)
    sure, unsure = zooming.zoom(**inputs).unbind()
    assert not sure.crop_rounds.any() and sure.crop_relevance.isfinite().all()
    assert sure.plans[0] != expected[0].plans[0] and unsure.plans == expected[1].plans
    for text, own, found in zip(texts, images, (sure, unsure)):
        assert zooming.zoom(**processor(text, own, **KNOBS)).plans == found.plans
    assert len(drafts[-1].sequences[0]) == zoom_mc_llava.DRAFT, "an answer that doesn't end is not sure"


def test_an_answer_reuses_the_last_draft(zooming, processor, monkeypatch):
    inputs, kept = processor("<image> What is it", IMAGES[:1], **KNOBS), PrefixCache()
    monkeypatch.setattr(zoom_mc_llava, "SURE", 1e-300)
    about_scouts = {name: value for name, value in inputs.items() if name not in ZOOM_FIELDS}
    first = zooming.generate(**about_scouts, max_new_tokens=1)[0, -1].item()
    monkeypatch.setattr(zooming.generation_config, "eos_token_id", first)
    expected = zooming.generate(**inputs, max_new_tokens=4)
    assert torch.equal(zooming.generate(**inputs, max_new_tokens=4, prefix_cache=kept), expected)
    assert kept.reused == inputs["input_ids"].shape[1] - 1
    text, kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}, PrefixCache()
    looked = zooming.zoom(**inputs, prefix_cache=kept)
    assert not looked.crop_rounds.any() and not kept.reused
    found = zooming.generate(**text, image_features=looked, max_new_tokens=4, prefix_cache=kept)
    assert torch.equal(found, expected) and kept.reused == inputs["input_ids"].shape[1] - 1
    monkeypatch.setattr(zoom_mc_llava, "SURE", 2)
    kept = PrefixCache()
    assert zooming.zoom(**inputs, prefix_cache=kept).crop_rounds.max() == 2 and not kept.nbytes, "no draft is of use"


@pytest.mark.parametrize(
    "saved",
    [
        {"stop_strings": ["a"]},
        {"guidance_scale": 2.0},
        {"min_new_tokens": 99},
        {"num_return_sequences": 2, "do_sample": True},
        {"max_length": 200},
        {"prefill_chunk_size": 8},
        {"forced_eos_token_id": 7, "eos_token_id": 7, "sequence_bias": [[[9], 99.0]]},
        {"token_healing": True},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_saved_options_do_not_concern_a_draft(zooming, processor, saved, monkeypatch, caplog):
    inputs = processor(TEXTS[:2], NESTED[:2], **KNOBS)
    expected = zooming.zoom(**inputs)
    for name, value in saved.items():
        monkeypatch.setattr(zooming.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zooming.zoom(**inputs).plans == expected.plans
    assert not caplog.records
    if "stop_strings" in saved:
        zooming.generate(**inputs, max_new_tokens=2, tokenizer=processor.tokenizer)


def test_how_probable_a_draft_is():
    doubt, end = zoom_mc_llava.Doubt(torch.tensor([7, 8])), 7

    def step(*rows) -> list[bool]:
        """Whether each row's answer stops after its token, (id, probability)."""
        scores = torch.full((len(rows), 10), -1e4)
        for row, (token, probability) in enumerate(rows):
            scores[row, [token, 0]] = torch.tensor([probability, 1 - probability]).log() + row
        return doubt(torch.tensor([[5, token] for token, _ in rows]), (None, scores)).tolist()

    assert step((1, 0.99), (1, 0.99), (8, 0.99), (1, 0.97)) == [False, False, False, True]
    assert step((end, 0.995), (end, 0.98), (1, 0.6), (end, 1.0)) == [False, True, False, True]
    assert doubt.is_sure.tolist() == [True, False, True, False]
    assert not doubt(torch.tensor([[5, 1]] * 4), (torch.zeros(4, 10),))[[0, 2]].any(), "what follows the end"
    assert doubt.is_sure.tolist() == [True, False, True, False]
    broken = zoom_mc_llava.Doubt(torch.tensor([0]))
    assert broken(torch.tensor([[5, 0]]), (torch.full((1, 10), torch.nan),)).all() and not broken.is_sure.any()


def test_padding_is_seen_without_a_mask(zooming, processor):
    inputs = processor(TEXTS[:2], NESTED[:2], **KNOBS)
    expected = zooming.zoom(**inputs)
    del inputs["attention_mask"]
    assert torch.equal(zooming.zoom(**inputs).crop_relevance.nan_to_num(), expected.crop_relevance.nan_to_num())


def test_a_crop_is_not_relevant_for_having_one_token_more(processor):
    """Without measured heads, relevance is a ratio, of about 1 on average, whether a crop has two tokens or three."""
    grey, by_tokens = Image.new("RGB", (400, 300), "grey"), {3: [], 2: []}
    for seed in range(20):
        inputs = processor("What is it?", grey, zoom=1, max_crops=17, num_tokens=25)
        views = (model := small_model(seed))._look(inputs["input_ids"], inputs["attention_mask"], inputs).views
        scouts = inputs["crop_num_tokens"].tolist()
        for tokens, found in zip(scouts[1:], views[0].relevance[1:]):
            by_tokens[tokens].append(found)
        assert model.config.zoom_heads is None
    three, two = (sum(found) / len(found) for found in by_tokens.values())
    assert 0.8 < three / two < 1.25, "by their sums it would be 1.5"


def test_a_template_of_ones_own(zooming, processor):
    template = "USER: <image>{{ messages[0]['content'][1]['text'] }} ASSISTANT:"
    content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": KNOBS}
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, chat_template=template, **options)
    looked = zooming.zoom(**inputs)
    assert looked.tokens_per_image == [40] and set(looked.crop_rounds.tolist()) == {0, 1, 2}


def test_boxes_that_were_found_are_a_plan_for_the_next_call(zooming, processor):
    looked = zooming.zoom(**processor(TEXTS[:2], NESTED[:2], **KNOBS))
    again = processor(TEXTS[:2], NESTED[:2], plans=looked.plans)
    text = {name: again[name] for name in ("input_ids", "attention_mask")}
    assert new_tokens(zooming, again) == new_tokens(zooming, {**text, "image_features": looked})


def test_the_saved_zoom_and_zoomed_images(zooming, processor, tmp_path):
    looked = zooming.zoom(**processor(TEXTS[0], [NESTED[0]], **KNOBS))
    looked.save(tmp_path / "looked.safetensors")
    again = ZoomedImages.load(tmp_path / "looked.safetensors")
    assert torch.equal(again.crop_rounds, looked.crop_rounds) and again.plans == looked.plans
    processor.save_pretrained(tmp_path)
    saved = MCLlavaProcessor.from_pretrained(tmp_path)
    for name, value in KNOBS.items():
        setattr(saved.image_processor, name, value)
    saved.save_pretrained(tmp_path)
    saved = MCLlavaProcessor.from_pretrained(tmp_path)
    assert saved.image_processor.zoom == 2
    assert new_tokens(zooming, saved(TEXTS, NESTED)) == new_tokens(zooming, processor(TEXTS, NESTED, **KNOBS))
    assert "zoom_options" not in saved(TEXTS[1], IMAGES[0], zoom=0)
    assert "zoom_options" not in saved(TEXTS[1], IMAGES[0], plans=[[(0, 0, 50, 50)]])


@pytest.mark.parametrize(
    "options",
    [{"resample": 0}, {"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.1, 0.5, 0.9]}],
    ids=str,
)
def test_later_crops_have_the_pixels_of_the_first(zooming, processor, options):
    """Other options of the image processor hold in all rounds."""
    looked = zooming.zoom(**processor(TEXTS[1], IMAGES[0], **KNOBS, **options))
    again = processor(TEXTS[1], IMAGES[0], plans=looked.plans, **options)
    images = {name: again[name] for name in processor.image_processor.model_input_names}
    (expected,) = zooming.get_image_features(**images).pooler_output
    torch.testing.assert_close(looked.features, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_the_language_model(zooming, processor):
    inputs = processor(TEXTS, NESTED, max_crops=4)
    images = {name: inputs[name] for name in processor.image_processor.model_input_names}
    embeds = zooming.model.embed_prompt(inputs["input_ids"], zooming.get_image_features(**images).pooler_output)
    mask = inputs["attention_mask"]
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    with torch.no_grad():
        expected = zooming.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            output_attentions=True,
        ).attentions
        for attention in ("eager", "sdpa"):
            zooming.set_attn_implementation(attention)
            options = {"max_new_tokens": 3, "return_dict_in_generate": True, "eos_token_id": None}
            answers = zooming.generate(inputs_embeds=embeds, attention_mask=mask, **options)
            for cache in (None, answers.cache):  # of prompts and answers
                found = last_attention(zooming.model.language_model, embeds, mask, heads, cache)
                for place, (layer, head) in enumerate(heads):
                    torch.testing.assert_close(found[:, place], expected[layer][:, head, -1], rtol=1e-4, atol=1e-5)
    zooming.set_attn_implementation("eager")


def test_attention_without_a_mask(zooming, processor):
    inputs = processor(TEXTS[1], IMAGES[2])
    images = {name: inputs[name] for name in processor.image_processor.model_input_names}
    embeds = zooming.model.embed_prompt(inputs["input_ids"], zooming.get_image_features(**images).pooler_output)
    answer = zooming.generate(inputs_embeds=embeds, **GREEDY, return_dict_in_generate=True)
    with torch.no_grad():
        expected, found = (
            last_attention(zooming.model.language_model, embeds, None, [(0, 1), (1, 2)], cache)
            for cache in (None, answer.cache)  # of the prompt and the answer
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_measured_heads_says_so_once(processor, caplog):
    model = small_model(1)
    from mc_llava import zoom_mc_llava

    zoom_mc_llava.logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            model.zoom(**processor(TEXTS[1], IMAGES[0], **KNOBS))
    assert sum("no attention heads were measured" in record.message for record in caplog.records) == 1


def test_another_default_dtype(zooming, processor):
    """Coordinates that were rounded to bfloat16 would move crops."""
    inputs, cache = processor(TEXTS[:2], NESTED[:2], **KNOBS), FeatureCache()
    expected = zooming.zoom(**inputs)
    (image,) = FeatureCache().encode(zooming, processor.image_processor, IMAGES[:1], max_crops=20)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [zooming.zoom(**inputs), zooming.zoom(**inputs, feature_cache=cache)]
        (again,) = cache.encode(zooming, processor.image_processor, IMAGES[:1], max_crops=20)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in ((found[0], expected), (found[1], expected), (again, image)):
        assert one.crop_coords.dtype == torch.float32 and torch.equal(one.crop_coords, other.crop_coords)
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0].crop_relevance, expected.crop_relevance, equal_nan=True)


class TestRefused:
    def test_forward(self, zooming, processor):
        with pytest.raises(ValueError, match="a forward pass can't zoom"):
            zooming(**processor(TEXTS[1], IMAGES[0], **KNOBS))

    def test_the_processor_that_encodes(self, zooming, processor):
        with pytest.raises(ValueError, match="leave model out, or pass zoom=0"):
            processor(TEXTS[1], IMAGES[0], zooming, **KNOBS)

    def test_features_without_a_question(self, zooming, processor):
        for encode in (FeatureCache(2**20).encode, FeatureCache(2**20).prepare):
            with pytest.raises(ValueError, match="zoom needs the question, .*: pass zoom=0, or plans"):
                encode(zooming, processor, IMAGES[:1], **KNOBS)

    def test_plans(self, processor):
        with pytest.raises(ValueError, match="leave zoom out"):
            processor(TEXTS[1], IMAGES[0], zoom=1, plans=[[(0, 0, 50, 50)]])

    def test_features_and_a_cache(self, zooming, processor):
        inputs = processor(TEXTS[1], IMAGES[0], **KNOBS)
        looked = zooming.zoom(**inputs)
        text = {name: inputs[name] for name in inputs if name not in processor.image_processor.model_input_names}
        with pytest.raises(ValueError, match="zoom can't be combined with image features"):
            zooming.generate(**text, image_features=looked)
        with pytest.raises(ValueError, match="zoom can't be combined with a cache"):
            cache = zooming(**processor("Hello", None)).cache
            zooming.generate(**inputs, cache=cache)

    @pytest.mark.parametrize("zoom", [-1, 1.0, "2", True])
    def test_odd_rounds(self, processor, zoom):
        with pytest.raises(ValueError, match="zoom must be"):
            processor(TEXTS[1], IMAGES[0], zoom=zoom)

    @pytest.mark.parametrize("zoom", [None, -1, 1.0, "2", True])
    def test_odd_rounds_that_were_saved(self, zooming, processor, zoom):
        processor = copy.deepcopy(processor)
        processor.image_processor.zoom = zoom
        for call in (
            lambda: processor(TEXTS[1], IMAGES[0]),
            lambda: processor.image_processor(IMAGES[0]),
            lambda: processor(TEXTS[1], IMAGES[0], zooming),
            lambda: processor._get_num_multimodal_tokens([(300, 400)]),
        ):
            with pytest.raises(ValueError, match="zoom must be"):
                call()

    @pytest.mark.parametrize("knobs", [{"zoom": 10**30, "max_crops": 20}, {"zoom": 1, "max_crops": 10**30}], ids=str)
    def test_huge_knobs_are_no_fault(self, zooming, processor, knobs):
        assert max(zooming.zoom(**processor(TEXTS[1], IMAGES[0], num_tokens=20, **knobs)).crops_per_image) <= 20

    def test_fields_that_do_not_fit(self, zooming, processor):
        inputs = processor(TEXTS[1], IMAGES[0], **KNOBS)
        options, crops, none = inputs["zoom_options"], inputs["image_grid_thw"], torch.tensor([[0, 1, 1]])
        for changes in (
            {"zoom_pictures": inputs["zoom_pictures"][:-1]},
            {"zoom_options": torch.cat([options, options])},
            {"zoom_options": options[:, [0, 1, 3, 2, 4]]},
            {"zoom_options": options[:0]},
            {"image_grid_thw": torch.cat([none, crops])},
            {"image_grid_thw": torch.cat([crops, none])},
        ):
            with pytest.raises(ValueError, match="don't fit the crops: pass what the processor returned"):
                zooming.zoom(**{**inputs, **changes})

    @pytest.mark.parametrize("cached", [False, True])
    def test_crops_that_do_not_fit(self, zooming, processor, cached):
        inputs = processor(TEXTS[1], IMAGES[0], **KNOBS)
        pixels, (whole, *others) = inputs["pixel_values"], inputs["crop_num_tokens"].tolist()
        counts = torch.tensor([whole + 9, *others[:-1], others[-1] - 9])
        other_number = "describe {}, {crops} and {crops} crops: pass what the processor returned"
        for changes, message in (
            ({"pixel_values": pixels[1:]}, other_number.format(len(pixels) - 1, crops=len(pixels))),
            ({"pixel_values": torch.cat([pixels, pixels])}, other_number.format(2 * len(pixels), crops=len(pixels))),
            ({"crop_num_tokens": counts}, r"crop_num_tokens must lie between 1 and 15 .*, got -\d to \d+: use the"),
            ({"pixel_values": None}, "pixel_values are missing: pass all that the processor returned"),
            ({"crop_boxes": None}, "crop_boxes are missing: pass all that the processor returned"),
        ):
            cache = FeatureCache() if cached else None
            with pytest.raises(ValueError, match=message):
                zooming.zoom(**{**inputs, **changes}, feature_cache=cache)
            if changes.get("pixel_values", pixels) is not None:
                with pytest.raises(ValueError, match=message):
                    zooming.generate(**{**inputs, **changes}, feature_cache=cache)

    def test_a_processor_with_smaller_patches(self, zooming, processor):
        processor = copy.deepcopy(processor)
        processor.image_processor.patch_size = 7
        inputs = processor(TEXTS[1], IMAGES[0], **{**KNOBS, "max_crops": 8, "num_tokens": 100})
        with pytest.raises(ValueError, match=r"between 1 and 15 .*, got \d+ to \d+: use the processor of this model"):
            zooming.zoom(**inputs)

    def test_pictures_that_were_prepared_otherwise(self, zooming, processor):
        inputs = processor(TEXTS[:2], NESTED[:2], **KNOBS)
        assert len(inputs["zoom_values"]) == len(inputs["zoom_general_ids"]) == len(inputs["zoom_options"]) == 3
        for name in ("zoom_values", "zoom_general_ids"):
            changed = inputs[name].clone()
            changed[1, -1:] += 1
            for rows in (changed, inputs[name][0]):
                with pytest.raises(ValueError, match="must have equal rows for all images: ask about images"):
                    zooming.zoom(**{**inputs, name: rows})

    def test_padding_on_the_right(self, zooming, processor):
        inputs = processor(TEXTS[:2], NESTED[:2], **KNOBS, padding_side="right")
        with pytest.raises(ValueError, match="pad the prompts on the left"):
            zooming.zoom(**inputs)

    def test_a_prompt_that_fills_the_context(self, zooming, processor):
        inputs = processor("What? " * 100, IMAGES[0], **KNOBS)
        with pytest.raises(ValueError, match="leaves no room for an answer"):
            zooming.zoom(**inputs)

    def test_features_of_the_scouts_alone(self, zooming, processor):
        inputs = processor(TEXTS[1], IMAGES[0], **KNOBS)
        with pytest.raises(ValueError, match="encode_images can't zoom"):
            zooming.encode_images(**inputs)
        images = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
        with pytest.raises(ValueError, match="get_image_features can't zoom"):
            zooming.get_image_features(**images)

    def test_attention_that_is_not_finite(self, processor):
        model = small_model(2)
        with torch.no_grad():
            model.model.language_model.layers[1].self_attn.k_proj.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="attention is not finite: load it in another dtype"):
            model.zoom(**processor(TEXTS[1], IMAGES[0], **KNOBS))

    def test_a_call_without_zooms_fields(self, zooming, processor):
        with pytest.raises(ValueError, match="call the processor with zoom=1 or more"):
            zooming.zoom(**processor(TEXTS[1], IMAGES[0]))

    def test_serving_engines(self, processor):
        with pytest.raises(ValueError, match="zoom needs several passes"):
            processor._get_num_multimodal_tokens([(300, 400)], zoom=1)

    @pytest.mark.parametrize("entry", [{"layer": 2, "head": 0}, {"layer": 0, "head": 3}, {"layer": 0}, {}])
    def test_heads_that_the_model_does_not_have(self, zooming, entry):
        with pytest.raises(ValueError, match="zoom_heads must have a"):
            type(zooming.config)(**{**zooming.config.to_dict(), "zoom_heads": [entry]})


@pytest.mark.slow
def test_tiny_sees_more_with_zoom_than_with_a_grid_of_its_cost():
    model = MCLlavaForConditionalGeneration.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    processor = MCLlavaProcessor.from_pretrained(ROOT / "tiny")
    right = {"grid": 0, "zoom": 0}
    for seed in range(16):
        question, picture = scenes.benchmark_question(seed, "ocr"), scenes.draw_scene(scenes.make_scene(seed, "test"))
        for name, knobs in (("grid", {"max_crops": 8}), ("zoom", {"max_crops": 9, "num_tokens": 40, "zoom": 1})):
            inputs = processor(question.text, picture, **knobs)
            output = model.generate(**inputs, max_new_tokens=24)
            reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right[name] += scenes.is_correct(question.key, reply)
    assert right["zoom"] >= right["grid"] + 3, right


@pytest.mark.parametrize("part", ["vision_tower", "coord_embed", "multi_modal_projector", "language_model"])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_parts(processor, tmp_path, part, place):
    from accelerate import cpu_offload

    small_model().save_pretrained(tmp_path / "model", save_original_format=False)
    inputs = processor(TEXTS[1], IMAGES[0], **KNOBS)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    device_map = {f"model.{name}": "cpu" for name in ("vision_tower", "coord_embed", "multi_modal_projector")}
    device_map |= {"model.language_model": "cpu", "lm_head": "cpu"}
    whole, offloaded = (
        MCLlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32, **more)
        for more in ({}, {"device_map": {**device_map, f"model.{part}": "disk"}, "offload_folder": tmp_path / "disk"})
    )
    if place == "cpu":  # in main memory, from which weights are moved to the device for each pass
        offloaded = MCLlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
        cpu_offload(offloaded.get_submodule(f"model.{part}"), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.get_submodule(f"model.{part}").parameters()} == {"meta"}
    expected = new_tokens(whole, inputs)
    assert new_tokens(offloaded, inputs) == new_tokens(offloaded, inputs, feature_cache=FeatureCache()) == expected
    looked = offloaded.zoom(**inputs)
    assert new_tokens(offloaded, {**text, "image_features": looked}) == expected
    if part == "language_model":
        assert not can_keep_prefixes(offloaded)
    else:
        assert looked.weights_hash == "unknown" and can_keep_prefixes(offloaded)
        assert new_tokens(offloaded, inputs, prefix_cache=PrefixCache()) == expected
        with pytest.raises(ValueError, match="other weights of vision tower"):
            whole.generate(**text, image_features=looked)
        with pytest.raises(ValueError, match="offloaded to disk can't be hashed: load the vision tower"):
            offloaded.generate(**text, image_features=whole.zoom(**inputs))
