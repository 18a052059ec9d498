"""The engine: conversations in, replies out, with what was encoded for them."""

import threading
from dataclasses import dataclass

import pytest
import torch
from helpers import PATCH, SIDE, counting_crops, picture, small_config, small_model
from transformers import AutoModel, AutoProcessor, GenerationConfig

from mc_llava import (
    GREEDY,
    Crop,
    EncodedImages,
    FeatureCache,
    MCLlavaForConditionalGeneration,
    MCLlavaImageProcessor,
    feature_cache_mc_llava,
)
from mc_llava.engine import Engine, ask_about


WIDE, SMALL = picture(200, 120), picture(50, 40, seed=1)


@pytest.fixture
def engine(model, processor) -> Engine:
    return Engine(model, processor, max_crops=4, num_tokens=18, max_new_tokens=6)


@pytest.fixture
def passes(model):
    """How many crops passed through the vision tower."""
    with counting_crops(model) as crops:
        yield crops


def plain(model, processor, images, question) -> tuple[str, int]:
    """The reply of `generate` to the processor's output, and the length of the prompt."""
    inputs = processor(question, images or None, max_crops=4, num_tokens=18)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True).strip(), inputs["input_ids"].shape[1]


def test_replies_are_those_of_generate(engine, model, processor):
    asked = [([WIDE], "What is it?"), ([WIDE, SMALL], "What differs?"), ([], "Why?")]
    replies = engine.answer([ask_about(images, question) for images, question in asked], **GREEDY)
    for (images, question), reply in zip(asked, replies, strict=True):
        assert (reply.text, reply.prompt_tokens) == plain(model, processor, images, question)
        plans = [processor.image_processor.plan(*image.size, 4, 18) for image in images]
        assert [image.plans[0] for image in reply.images] == plans
        assert reply.crops == sum(map(len, plans))
        assert reply.image_tokens == sum(crop.num_tokens for plan in plans for crop in plan)


@pytest.mark.parametrize("zoom", (0, 1))
def test_a_batch_is_padded_without_the_tokenizer(engine, monkeypatch, zoom):
    """A fast tokenizer keeps the option to pad, which a call in another thread would change."""
    kind, called = type(engine.processor.tokenizer), []
    call = kind.__call__

    def note(self, *args, **options):
        called.append(options)
        return call(self, *args, **options)

    monkeypatch.setattr(kind, "__call__", note)
    engine.knobs["zoom"] = zoom
    engine.answer([ask_about([SMALL], "Why?"), ask_about([], "What is it, and where is it?")], **GREEDY)
    assert called and not any(options.get("padding") for options in called)


def test_pictures_of_a_call_share_passes(model, processor, passes):
    images = [picture(200, 120, seed) for seed in range(7)]  # of 4 crops each
    together = Engine(model, processor, max_crops=4, num_tokens=18).encode(images)
    assert passes == [16, 12]
    passes.clear()
    alone = Engine(model, processor, max_crops=4, num_tokens=18)
    for image, encoded in zip(images, together):
        torch.testing.assert_close(encoded.features, alone.encode([image])[0].features)
    assert passes == [4] * 7


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_configuration_that_prefixes_do_not_fit(engine, model, monkeypatch, how):
    asked = [ask_about([], "What is it?")]
    expected = engine.answer(asked, **GREEDY)
    config = GenerationConfig(**{**model.generation_config.to_dict(), **how})
    assert engine.answer(asked, **GREEDY, generation_config=config)[0].text == expected[0].text
    monkeypatch.setattr(model, "generation_config", config)
    assert engine.answer(asked, **GREEDY)[0].text == expected[0].text


class TestPreparedImages:
    def test_they_stand_for_their_images(self, engine, passes):
        asked = [([WIDE], "What is it?"), ([WIDE, SMALL], "What differs?"), ([WIDE], "And this?")]
        expected = engine.answer([ask_about(*each) for each in asked], **GREEDY)
        crops = sum(passes)
        passes.clear()
        other = Engine(engine.model, engine.processor, max_crops=4, num_tokens=18, max_new_tokens=6)
        prepared = [(other.prepare(images), question) for images, question in asked]
        replies = other.answer([ask_about(*each) for each in prepared], **GREEDY)
        assert [reply.text for reply in replies] == [reply.text for reply in expected]
        assert sum(passes) == crops, "each picture is encoded once"

    def test_equal_pictures_are_cut_once_and_encoded_ones_not_at_all(self, engine, monkeypatch):
        cut, cut_to = [], feature_cache_mc_llava.cut_to

        def count(device, picture, boxes, *args, **options):
            cut.append(len(boxes))
            return cut_to(device, picture, boxes, *args, **options)

        monkeypatch.setattr(feature_cache_mc_llava, "cut_to", count)
        prepared = [engine.prepare([WIDE.copy()]) for _ in range(3)]
        assert cut == [4] and prepared[0][0] is prepared[2][0]
        engine.encode(prepared[0])
        assert cut == [4]
        del prepared
        engine.encode(engine.prepare([WIDE]))
        assert cut == [4]
        engine.feature_cache = FeatureCache(0)
        engine.encode(engine.prepare([WIDE]))
        assert cut == [4, 4]

    def test_crops_that_are_too_many_wait(self, engine, monkeypatch):
        monkeypatch.setattr(feature_cache_mc_llava, "MOST_CUT_AHEAD", 3 * 3 * SIDE**2)
        (image,) = engine.prepare([WIDE])
        assert image.nbytes == 4 * 200 * 120
        torch.testing.assert_close(engine.encode([image])[0].features, engine.encode([WIDE])[0].features)

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
    def test_what_finds_no_memory_is_cut_when_it_is_encoded(self, engine, monkeypatch, error):
        def fail(*arguments, **options):
            raise error("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(feature_cache_mc_llava, "cut_to", fail)
            (prepared,) = engine.prepare([WIDE])
        torch.testing.assert_close(engine.encode([prepared])[0].features, engine.encode([WIDE])[0].features)

    def test_one_cache_for_towers_of_two_sizes(self, model, processor):
        config = small_config()
        config.vision_config.image_size = 2 * SIDE
        larger = MCLlavaForConditionalGeneration._from_config(config).eval()
        cuts_larger = MCLlavaImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE}, patch_size=PATCH)
        kept, plans = FeatureCache(), [[Crop((0, 0, 90, 90), 4)]]
        prepared = kept.prepare(model, processor.image_processor, [WIDE], plans=plans)
        (found,) = kept.encode(larger, cuts_larger, [WIDE], plans=plans)
        (expected,) = FeatureCache().encode(larger, cuts_larger, [WIDE], plans=plans)
        assert torch.equal(found.features, expected.features) and prepared

    @pytest.mark.parametrize(
        "options",
        [
            {"do_normalize": False},
            {"max_crops": 0},
            {"num_tokens": 30},
            {"resample": 0},
            {"plans": [[Crop((0, 0, 90, 90), 4)]], "max_crops": None},
        ],
    )
    def test_other_options_are_refused(self, engine, options):
        cache, image_processor = engine.feature_cache, engine.processor.image_processor
        prepared = cache.prepare(engine.model, image_processor, [WIDE], max_crops=4)
        assert cache.encode(engine.model, image_processor, prepared, max_crops=4)
        with pytest.raises(ValueError, match="were prepared with other options: pass `encode` those of `prepare`"):
            cache.encode(engine.model, image_processor, prepared, **{"max_crops": 4, **options})

    def test_zoom_cuts_later(self, engine):
        engine.knobs["zoom"] = 1
        assert engine.prepare([WIDE]) == [WIDE]

    def test_errors_are_those_of_encoding(self, engine):
        with pytest.raises(ValueError, match="cannot read an image from NoneType"):
            engine.prepare([None])
        engine.knobs["num_tokens"] = 0
        with pytest.raises(ValueError, match="num_tokens must be at least 1"):
            engine.prepare([WIDE])


def test_why_an_answer_ended(engine, model, processor, monkeypatch):
    (cut,) = engine.answer([ask_about([SMALL], "What is it?")], max_new_tokens=4, eos_token_id=None)
    assert (cut.new_tokens, cut.finish_reason) == (4, "length")
    second = model.generate(
        **processor("What is it?", SMALL, max_crops=4, num_tokens=18), max_new_tokens=4, eos_token_id=None
    )[0, -3].item()
    for ends in (second, [second, 50295]):  # one end token, or several
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        asked = [ask_about([SMALL], "What is it?"), ask_about([WIDE], "And this?")]
        stopped, other = engine.answer(asked, max_new_tokens=9, **GREEDY)
        assert (stopped.new_tokens, stopped.finish_reason) == (2, "stop"), "padding is not counted"
        assert other.new_tokens > 2


def test_the_ends_that_a_call_names(engine, model, processor, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    asked = [ask_about([SMALL], "What is it?")]
    ids = model.generate(**processor("What is it?", SMALL, max_crops=4, num_tokens=18), max_new_tokens=4, **GREEDY)
    first, second = ids[0, -4:-2].tolist()
    config = GenerationConfig(**{**model.generation_config.to_dict(), "max_new_tokens": 3})
    for options, new_tokens, reason in (
        ({"eos_token_id": second}, 1 + (first != second), "stop"),
        ({"eos_token_id": torch.tensor([second])}, 1 + (first != second), "stop"),
        ({"stopping_criteria": [lambda ids, scores, **kwargs: torch.ones(len(ids), dtype=torch.bool)]}, 1, "stop"),
        ({}, 6, "length"),  # the engine's bound
        ({"generation_config": config}, 3, "length"),
        ({"generation_config": config, "max_new_tokens": 2}, 2, "length"),
    ):
        (reply,) = engine.answer(asked, **GREEDY, **options)
        assert (reply.new_tokens, reply.finish_reason) == (new_tokens, reason), options


@pytest.mark.parametrize("saved", [True, False])
def test_each_conversation_has_one_reply_whatever_a_configuration_says(engine, model, monkeypatch, saved):
    asked = [ask_about([SMALL], "What is it?"), ask_about([WIDE], "And this?")]
    expected = engine.answer(asked, **GREEDY)
    several = {"num_return_sequences": 2, "num_beams": 2, "return_dict_in_generate": True}
    config = GenerationConfig(**{**model.generation_config.to_dict(), **several})
    if saved:
        monkeypatch.setattr(model, "generation_config", config)
    replies = engine.answer(asked, num_beams=1, **({} if saved else {"generation_config": config}))
    assert [(reply.text, reply.crops) for reply in replies] == [(reply.text, reply.crops) for reply in expected]


def test_messages_may_be_objects(engine):
    @dataclass
    class Part:
        type: str
        text: str | None = None
        image: object = None

    @dataclass
    class Message:
        role: str
        content: list

    plain = ask_about([SMALL], "Which color?")
    objects = [Message("user", [Part("image", image=SMALL), Part("text", text="Which color?")])]
    engine.check(objects)
    assert engine.answer([objects], **GREEDY)[0].text == engine.answer([plain], **GREEDY)[0].text
    assert engine.likelihoods(objects, ("red", "blue")) == engine.likelihoods(plain, ("red", "blue"))
    found, expected = (engine.look([asked], zoom=1) for asked in (objects, plain))
    assert [image.looked_at for image in found] == [image.looked_at for image in expected] != []


def test_images_that_recur_pass_the_tower_once(engine, passes):
    encoded = engine.encode([WIDE, SMALL])
    crops = sum(len(image.crop_boxes) for image in encoded)
    assert sum(passes) == crops
    replies = engine.answer([ask_about([WIDE], "What?"), ask_about(encoded[1:], "What?")], **GREEDY)
    engine.likelihoods(ask_about(encoded, "Which?"), ("a", "b"))
    assert sum(passes) == crops and isinstance(replies[0].images[0], EncodedImages)
    assert replies[1].images[0] is encoded[1], "what is encoded is not encoded again"


def test_a_plan_of_ones_own(engine, passes):
    (encoded,) = engine.encode([WIDE], plans=[[(0, 0, 200, 120), (100, 20, 180, 90)]])
    assert sum(passes) == 2 and encoded.crop_boxes.tolist()[1] == [100, 20, 180, 90]
    (other,) = engine.encode([WIDE], num_tokens=9, max_crops=0)
    assert other.tokens_per_image == [9]
    (reply,) = engine.answer([ask_about([encoded], "What?")])
    assert reply.images[0] is encoded and reply.image_tokens == 18


def test_the_knobs_hold_for_boxes(engine):
    boxes = [(0, 0, 200, 120), (100, 20, 180, 90)]
    assert engine.encode([WIDE], [boxes])[0].tokens_per_image == [18]
    assert engine.encode([WIDE], [boxes], num_tokens=7)[0].tokens_per_image == [7]
    for wrong in ({"max_crops": 3}, {"nonsense": 7}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            engine.encode([WIDE], [boxes], **wrong)


def test_what_is_refused_is_not_encoded(engine, passes):
    for question in ("a<image>", "<|im_end|>", "word " * 3000):
        for ask in (lambda turns: engine.answer([turns]), lambda turns: engine.likelihoods(turns, ("a",))):
            with pytest.raises(ValueError, match="special token|shorten the text"):
                ask(ask_about([WIDE], question))
    with pytest.raises(ValueError, match="role must be one of"):
        engine.answer([[{"role": "robot", "content": ask_about([WIDE], "What?")[0]["content"]}]])
    assert passes == []


def test_a_chat_template_without_places_for_images(engine, passes, monkeypatch):
    monkeypatch.setattr(engine.processor, "chat_template", "USER: {{ messages[0]['content'] }} ASSISTANT:")
    with pytest.raises(ValueError, match="the chat template writes 0 <image> for 1 images: take one that"):
        engine.answer([ask_about([picture(60, 60)], "a")])
    assert not passes


def test_images_of_other_weights_or_of_several_are_refused(engine, model, processor):
    (foreign,) = Engine(small_model(1), processor).encode([WIDE])
    with pytest.raises(ValueError, match="encoded with other weights"):
        engine.answer([ask_about([foreign], "What?")])
    several = model.encode_images(**processor("Both?", [[WIDE, SMALL]]))
    with pytest.raises(ValueError, match="an image part must hold one image"):
        engine.answer([ask_about([several], "What?")])


def test_images_that_remote_code_encoded(converted):
    remote = AutoModel.from_pretrained(converted, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    encoded = remote.encode_images(**processor.image_processor(SMALL, return_tensors="pt"))
    (reply,) = Engine(remote, processor).answer([ask_about([encoded], "What?")], max_new_tokens=3)
    assert reply.images[0] is encoded


def test_a_conversation_goes_on(engine):
    (first,) = engine.answer([ask_about([SMALL], "What is it?")], **GREEDY)
    turns = [*ask_about([SMALL], "What is it?"), {"role": "assistant", "content": "A cat."}]
    (second,) = engine.answer([[*turns, {"role": "user", "content": "What color?"}]], **GREEDY)
    assert second.prompt_tokens > first.prompt_tokens and second.crops == first.crops


def test_pieces_are_the_answer(engine):
    conversation = ask_about([SMALL], "What is it?")
    (reply,) = engine.answer([conversation], **GREEDY)
    pieces = list(engine.stream(conversation, **GREEDY))
    assert "".join(pieces).strip() == reply.text


def test_who_stops_listening_stops_the_generation(engine, model, monkeypatch):
    steps, threads = [], threading.active_count()
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    pieces = engine.stream(ask_about([SMALL], "What is it?"), max_new_tokens=60, eos_token_id=None, **GREEDY)
    next(pieces)
    pieces.close()
    hook.remove()
    assert len(steps) < 60 and threading.active_count() == threads


def test_errors_reach_who_listens(engine):
    with pytest.raises(ValueError, match="must not hold the special token"):
        list(engine.stream(ask_about([SMALL], "<|im_end|>")))
    with pytest.raises(ValueError, match="cannot read an image from int"):
        engine.answer([ask_about([3], "What?")])
    for content, message in (
        ([{"type": "image", "path": "a.png"}], "an image part must be"),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}], "an image part must be"),
        ([{"type": "audio"}], "a content part must be a text"),
        (["What?"], "a content part must be a text"),
        (3, "content must be a string or a list"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.answer([[{"role": "user", "content": content}]])
    assert engine.answer([]) == []
    for conversations in ("hi", ask_about([SMALL], "What?")):
        with pytest.raises(ValueError, match="must be a list of messages"):
            engine.answer(conversations)
    for option in ("num_return_sequences", "return_dict_in_generate"):
        with pytest.raises(ValueError, match=f"{option}: each conversation has one reply"):
            engine.answer([ask_about([], "What?")], **{option: 2})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Engine(engine.model, engine.processor, batch_size=0)
    with pytest.raises(ValueError, match="max_crops must be at least 0"):
        Engine(engine.model, engine.processor, max_crops=-1)


def test_likelihoods_in_batches_are_those_of_one_row(engine, model, processor):
    answers, conversation = ("red", "blue", "red and blue"), ask_about([SMALL], "Which color?")
    together = engine.likelihoods(conversation, answers)
    single = Engine(model, processor, max_crops=4, num_tokens=18, batch_size=1)
    assert [one.num_tokens for one in together] == [
        len(processor.tokenizer(f"{answer}<|im_end|>")["input_ids"]) for answer in answers
    ]
    sums = [
        torch.tensor([one.log_probability for one in found])
        for found in (together, single.likelihoods(conversation, answers))
    ]
    assert torch.allclose(*sums, atol=1e-3) and (sums[0] < 0).all()


def test_likelihoods_of_no_answers_are_refused(engine, passes):
    with pytest.raises(ValueError, match="answers are empty: pass at least one"):
        engine.likelihoods(ask_about([WIDE], "Which?"), ())
    assert passes == []


@pytest.mark.parametrize("images", [1, 2])
def test_a_prompt_that_fills_the_context_is_refused_before_a_crop_is_encoded(engine, passes, images):
    engine.knobs |= {"num_tokens": 130, "max_crops": 60}
    pictures = [picture(600, 400, seed) for seed in range(images)]
    asked = ask_about(pictures, "What is it?")
    for ask in (lambda: engine.answer([asked]), lambda: engine.likelihoods(asked, ("a",))):
        with pytest.raises(ValueError, match=r"context 128 .*no room for an answer: pass num_tokens=\d+ or") as error:
            ask()
    assert passes == []
    engine.knobs["num_tokens"] = int(str(error.value).split("num_tokens=")[1].split()[0])
    (reply,) = engine.answer([asked])
    assert reply.prompt_tokens < 128
    (encoded,) = engine.encode(pictures[:1])
    passes.clear()
    with pytest.raises(ValueError, match="no room for an answer"):  # encoded ones count as well
        engine.answer([ask_about([encoded] * (images + 1), "What is it?")])
    assert passes == []


def test_a_text_must_leave_room_for_an_answer(engine, processor, monkeypatch):
    conversation = ask_about([], "What is it?")
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    length = len(processor.tokenizer(prompt)["input_ids"])
    monkeypatch.setattr(engine.model.config.text_config, "max_position_embeddings", length + 1)
    engine.check(conversation)
    monkeypatch.setattr(engine.model.config.text_config, "max_position_embeddings", length)
    with pytest.raises(ValueError, match=f"the text has {length} tokens, the context {length}"):
        engine.check(conversation)
