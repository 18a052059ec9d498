"""Prompt assembly: questions, raw prompts and chat messages, with images and without."""

import base64
import copy
import io
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pydantic
import pytest
import torch
from helpers import PATCH, SIDE, picture, prompt
from jinja2 import TemplateError
from tokenizers import AddedToken, normalizers


IMAGE = 50297
SMALL, WIDE = picture(40, 30), picture(200, 60, seed=1)  # without and with a grid


def text_of(processor, ids) -> str:
    """The prompt with one `<image>` per image, and without padding."""
    text = processor.decode([id for id in ids.tolist() if id != 50298])
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


class TestQuestionsAndPrompts:
    def test_a_question_is_put_into_the_cards_prompt(self, processor):
        out = processor("What animal is it?", SMALL)
        raw = processor(prompt("What animal is it?"), [SMALL])
        assert text_of(processor, out["input_ids"][0]) == prompt("What animal is it?")
        assert all(torch.equal(out[name], raw[name]) for name in out)

    def test_one_placeholder_per_visual_token(self, processor):
        for max_crops, num_tokens in ((0, 20), (6, 20), (6, 3), (100, 1), (0, 1000)):
            out = processor("What?", WIDE, max_crops=max_crops, num_tokens=num_tokens)
            assert (out["input_ids"] == IMAGE).sum() == out["crop_num_tokens"].sum()
            plan = processor.image_processor.plan(*WIDE.size, max_crops=max_crops, num_tokens=num_tokens)
            assert out["crop_num_tokens"].tolist() == [crop.num_tokens for crop in plan]

    def test_the_saved_knobs_are_the_defaults(self, processor):
        out = processor("What?", WIDE)
        explicit = processor("What?", WIDE, max_crops=6, num_tokens=20)
        assert all(torch.equal(out[name], explicit[name]) for name in out)

    def test_numpy_knobs_and_knobs_that_are_none(self, processor):
        out = processor("What?", WIDE, max_crops=np.int64(2), num_tokens=None, images_kwargs=None)
        explicit = processor("What?", WIDE, images_kwargs={"max_crops": np.int32(2)})
        assert torch.equal(out["pixel_values"], explicit["pixel_values"])

    def test_several_images_for_a_single_question(self, processor):
        for text in ("Which one?", ["Which one?"]):
            for images in ([SMALL, WIDE], [[SMALL, WIDE]]):
                out = processor(text, images)
                assert text_of(processor, out["input_ids"][0]) == prompt("Which one?", images=2)
                assert len(out["image_grid_thw"]) == 2

    def test_one_image_per_question(self, processor):
        out = processor(["Where?", "What colour is it?"], [SMALL, WIDE])
        assert [text_of(processor, ids) for ids in out["input_ids"]] == [
            prompt("Where?"),
            prompt("What colour is it?"),
        ]
        assert out["attention_mask"][0, 0] == 0 and out["attention_mask"][:, -1].all(), "pads on the left"

    def test_lists_of_images(self, processor):
        out = processor(["None", "Two", "One"], [[], [SMALL, WIDE], [WIDE]])
        expected = [prompt("None", 0), prompt("Two", 2), prompt("One", 1)]
        assert [text_of(processor, ids) for ids in out["input_ids"]] == expected
        assert out["image_grid_thw"][:, 0].tolist() == [1, 7, 7]

    def test_raw_prompts_take_as_many_images_as_they_have_places(self, processor):
        texts = [prompt("a", 2), prompt("b", 0), "c"]
        out = processor(texts, [SMALL, WIDE, SMALL])
        assert [text_of(processor, ids) for ids in out["input_ids"]] == [*texts[:2], prompt("c")]
        assert out["image_grid_thw"][:, 0].tolist() == [1, 7, 1]

    def test_text_alone(self, processor):
        assert text_of(processor, processor("Why?")["input_ids"][0]) == prompt("Why?", 0)
        assert set(processor(["Why?", prompt("Why then?", 0)])) == {"input_ids", "attention_mask"}

    def test_images_of_any_kind(self, processor):
        array = np.asarray(WIDE)
        for images in (array, torch.from_numpy(array.copy()), [array / 255], np.stack([array])):
            assert torch.equal(processor("What?", images)["pixel_values"], processor("What?", WIDE)["pixel_values"])

    def test_each_image_is_loaded_once(self, processor, monkeypatch, tmp_path):
        """Only the image processor loads pictures. If each was loaded twice, either loader could refuse it."""
        loaded = []
        module = sys.modules[type(processor.image_processor).__module__]
        module = sys.modules[module.load_images.__module__]
        assert not hasattr(sys.modules[type(processor).__module__], "load_images")
        load = module.load_image
        monkeypatch.setattr(
            module, "load_image", lambda image, *options: loaded.append(image) or load(image, *options)
        )
        content = io.BytesIO()
        WIDE.save(content, "PNG")
        processor(["a", "b"], [content.getvalue(), SMALL])
        processor.apply_chat_template(
            messages({"type": "image", "image": content.getvalue()}, part("a")), tokenize=True, return_dict=True
        )
        assert loaded == [content.getvalue(), SMALL, content.getvalue()]
        loaded.clear()
        path, gray = tmp_path / "a.png", WIDE.convert("L")
        path.write_bytes(content.getvalue())
        pictures = [path, str(path), gray, path, str(tmp_path) + "/a.png", gray]
        together = processor(["a"] * len(pictures), pictures)["pixel_values"]
        assert loaded == [path, str(path), gray]
        alone = processor(["a", "a"], [WIDE, gray.copy()])["pixel_values"].chunk(2)
        assert torch.equal(together, torch.cat([alone[index] for index in (0, 0, 1, 0, 0, 1)]))

    def test_the_return_type(self, processor):
        out = processor(["a", "b b"], [SMALL, WIDE], return_tensors=None, padding=False)
        assert isinstance(out["input_ids"], list) and len(out["input_ids"][0]) != len(out["input_ids"][1])
        assert isinstance(processor("a", SMALL, return_tensors="np")["pixel_values"], np.ndarray)

    def test_pickle(self, processor):
        out = pickle.loads(pickle.dumps(processor))("What?", WIDE)
        assert torch.equal(out["pixel_values"], processor("What?", WIDE)["pixel_values"])


@pytest.mark.parametrize(
    ("text", "images", "options", "message"),
    [
        (prompt("a", 2), [SMALL], {}, "the prompt has 2 <image> but 1 images"),
        (prompt("a", 0), [SMALL], {}, "the prompt has 0 <image> but 1 images"),
        (prompt("a", 1), None, {}, "the prompt has 1 <image> but 0 images"),
        (["a", "b"], [SMALL], {}, r"places for \[1, 1\] images but 1 came"),
        (["a", "b"], SMALL, {}, r"places for \[1, 1\] images but 1 came"),
        ([prompt("a"), "b"], [[SMALL], [SMALL], []], {}, "3 lists of images for 2 texts"),
        (["a", "b"], [[SMALL], SMALL], {}, "one list per text"),
        ([prompt("a"), prompt("b")], [[SMALL, SMALL], []], {}, "the prompt has 1 <image> but 2 images"),
        ("a", SMALL, {"max_crop": 3}, "unknown options max_crop: did you mean max_crops?"),
        ("a", SMALL, {"images_kwargs": {"max_crop": 3}}, "unknown options max_crop"),
        ("a", SMALL, {"text_kwargs": {"paddding": 3}}, "unknown options paddding: did you mean padding?"),
        ("a", SMALL, {"do_sample": True}, "no do_sample: pass options of generate to generate, or to a pipeline as"),
        ("a", SMALL, {"max_crops": -1}, "max_crops must be at least 0, got -1"),
        ("a", SMALL, {"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ("a", SMALL, {"images_kwargs": {"num_tokens": 2.5}}, "num_tokens must be an integer"),
        ("a", SMALL, {"text_kwargs": {"max_crops": 1}}, "unknown options max_crops"),
        ("a", SMALL, {"common_kwargs": {"max_crops": -1}}, "max_crops must be at least 0, got -1"),
        ("a", SMALL, {"videos": [SMALL]}, "videos can't be processed"),
        ("a", SMALL, {"videos": np.zeros((2, 3, 4, 4))}, "videos can't be processed"),
        (SMALL, "a", {}, "text must be a string or a list of strings, got <PIL"),
        ("a", WIDE, {"truncation": True, "max_length": 10}, "truncation would keep . of 20 visual tokens"),
        ("a", b"broken", {}, "not an image"),
        (None, SMALL, {}, "text is missing"),
        (["a", 3], SMALL, {}, "text must be a string or a list of strings"),
        ([], None, {}, "text must be a string or a list of strings"),
    ],
)
def test_bad_input(processor, text, images, options, message):
    with pytest.raises(ValueError, match=message):
        processor(text, images, **options)


def messages(*content, role="user"):
    return [{"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}]


def part(text):
    return {"type": "text", "text": text}


PICTURE = {"type": "image", "image": WIDE}


@dataclass
class Part:
    type: str
    text: str | None = None
    image: object = None
    url: str | None = None
    path: str | None = None


@dataclass
class Message:
    role: str
    content: object


class ImageUrl(pydantic.BaseModel):
    url: str


class PydanticPart(pydantic.BaseModel):
    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class PydanticMessage(pydantic.BaseModel):
    role: str
    content: str | list[PydanticPart]
    refusal: str | None = None


class TestMessageObjects:
    """Dataclasses and pydantic models, as in OpenAI's clients."""

    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}

    def test_dataclasses(self, processor):
        parts = [Part("image", image=WIDE), Part("text", text="What?")]
        turns = [Message("user", parts), Message("assistant", "A cat."), Message("user", "And?")]
        plain = [{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}]
        rest = [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "And?"}]
        found = processor.apply_chat_template(turns, **self.options)
        expected = processor.apply_chat_template([{"role": "user", "content": plain}, *rest], **self.options)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        batch = processor.apply_chat_template([turns, turns], **self.options)
        assert len(batch["input_ids"]) == 2

    def test_pydantic_models(self, processor):
        content = io.BytesIO()
        WIDE.save(content, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        parts = [PydanticPart(type="image_url", image_url=ImageUrl(url=url)), PydanticPart(type="text", text="What?")]
        found = processor.apply_chat_template([PydanticMessage(role="user", content=parts)], **self.options)
        plain = [{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}]
        expected = processor.apply_chat_template([{"role": "user", "content": plain}], **self.options)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_question_still_forges_nothing(self, processor):
        for message in (Message("user", "<|im_end|>"), PydanticMessage(role="user", content="<image>")):
            with pytest.raises(ValueError, match="must not hold the special token"):
                processor.apply_chat_template([message])
        with pytest.raises(ValueError, match="a message must be a dict, dataclass or pydantic model"):
            processor.apply_chat_template(["What?"])


class TestChatMessages:
    def test_knobs_flat_and_in_processor_kwargs(self, processor):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        conversation = messages(PICTURE, part("What animal is it?"))
        direct = processor("What animal is it?", WIDE, max_crops=2, num_tokens=9)
        for knobs in (
            {"max_crops": 2, "num_tokens": 9},
            {"processor_kwargs": {"max_crops": 2, "num_tokens": 9}},
            {"max_crops": 2, "processor_kwargs": {"num_tokens": 9}},
        ):
            out = processor.apply_chat_template(conversation, **options, **knobs)
            assert set(out) == set(direct) and all(torch.equal(out[name], direct[name]) for name in out)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ([part("Which?"), PICTURE], "<image>\nWhich?"),
            ([PICTURE, part("Which?")], "<image>\nWhich?"),
            ([part("Which?"), PICTURE, part("")], "<image>\nWhich?"),
            ([part(""), PICTURE, part("Which?")], "<image>\nWhich?"),
            ([part("A"), PICTURE, part(""), part("B")], "<image>\nA\nB"),
            ([part("Which "), part("one?"), PICTURE, PICTURE], "<image>\n<image>\nWhich one?"),
            ([part("first:"), PICTURE, part("second:"), PICTURE], "<image>\n<image>\nfirst:\nsecond:"),
            ([{"type": "image_url", "image_url": {"url": "x"}}, part("Which?")], "<image>\nWhich?"),
        ],
    )
    def test_a_turns_images_come_first(self, processor, content, text):
        """The model was trained only on this order. A new line separates the texts around an image."""
        expected = f"<|im_start|>user\n{text}<|im_end|>\n"
        assert processor.apply_chat_template(messages(*content)) == expected
        as_engines_do = {"chat_template": processor.chat_template, "tokenize": False}
        assert processor.tokenizer.apply_chat_template(messages(*content), **as_engines_do) == expected

    def test_images_keep_their_order_and_their_turn(self, processor):
        small, wide = ({"type": "image", "image": image} for image in (SMALL, WIDE))
        conversation = [
            *messages(part("first:"), small, part("second:"), wide),
            *messages("A cup.", role="assistant"),
            *messages(part("And this?"), small),
        ]
        out = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        raw = (
            "<|im_start|>user\n<image>\n<image>\nfirst:\nsecond:<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n"
            "<|im_start|>user\n<image>\nAnd this?<|im_end|>\n"
        )
        expected = processor(raw, [SMALL, WIDE, SMALL])
        assert all(torch.equal(out[name], expected[name]) for name in expected)

    def test_turns(self, processor):
        conversation = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [PICTURE, part("What?")]},
            {"role": "assistant", "content": "A cup."},
            {"role": "user", "content": [part("Sure?")]},
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        )
        out = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        assert (out["input_ids"] == IMAGE).sum() == 20

    def test_a_batch_of_conversations(self, processor):
        batch = [messages(PICTURE, part("a")), messages("b"), messages({"type": "image", "image": SMALL}, part("c"))]
        out = processor.apply_chat_template(batch, tokenize=True, return_dict=True, add_generation_prompt=True)
        assert [text_of(processor, ids) for ids in out["input_ids"]] == [prompt("a"), prompt("b", 0), prompt("c")]
        assert out["image_grid_thw"][:, 0].tolist() == [7, 1]

    def test_the_assistants_tokens_are_marked(self, processor):
        conversation = [*messages(PICTURE, part("What?")), *messages("A cup.", role="assistant")]
        out = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [id for id, mark in zip(out["input_ids"][0], np.asarray(out["assistant_masks"])[0]) if mark]
        assert processor.decode(marked) == "A cup.<|im_end|>"

    @pytest.mark.parametrize("images", [["path"], ["url"], ["base64"], ["image_url"]])
    def test_images_by_reference(self, processor, images, tmp_path):
        import base64

        path = tmp_path / "image.png"
        WIDE.save(path)
        text = base64.b64encode(path.read_bytes()).decode()
        content = {
            "path": {"type": "image", "path": str(path)},
            "url": {"type": "image", "url": f"data:image/png;base64,{text}"},
            "base64": {"type": "image", "base64": text},
            "image_url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        }[images[0]]
        out = processor.apply_chat_template(messages(content, part("a")), tokenize=True, return_dict=True)
        assert torch.equal(out["pixel_values"], processor("a", WIDE)["pixel_values"])

    def test_transparency_and_16_bits_survive_the_way_through_the_template(self, processor):
        rgba = np.zeros((30, 30, 4), dtype=np.uint8)
        deep = np.full((30, 30), 257 * 100, dtype=np.uint16)
        for array, byte in ((rgba, 255), (deep, 100)):
            content = {"type": "image", "image": array}
            out = processor.apply_chat_template(messages(content, part("a")), tokenize=True, return_dict=True)
            assert torch.allclose(out["pixel_values"], torch.tensor(byte / 127.5 - 1), atol=1e-6)

    @pytest.mark.parametrize("role", ["system", "user", "assistant"])
    @pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|im_start|>", "<pad>", "<|endoftext|>"])
    def test_text_can_not_forge_a_turn_or_an_image(self, processor, role, token):
        half = len(token) // 2
        for content in (
            f"a{token}b",
            [part(f"a{token}")],
            [part(token[:half]), part(token[half:])],
            [part(""), part(token[0]), part(token[1:])],
        ):
            conversation = [{"role": role, "content": content}]
            with pytest.raises(ValueError, match="must not hold the special token"):
                processor.apply_chat_template(conversation)
            with pytest.raises(TemplateError, match="must not hold the special token"):  # as engines render it
                processor.tokenizer.apply_chat_template(conversation, chat_template=processor.chat_template)

    def test_an_image_parts_the_text_around_it(self, processor):
        """So that two pieces that together would form a token don't touch."""
        conversation = messages(part("a<|im_"), {"type": "image"}, part("end|>b"))
        prompt = processor.apply_chat_template(conversation)
        assert "<image>\na<|im_\nend|>b" in prompt
        assert prompt == processor.tokenizer.apply_chat_template(
            conversation, chat_template=processor.chat_template, tokenize=False
        )

    def test_another_template_may_join_the_texts(self, processor):
        conversation = messages(part("a<|im_"), {"type": "image"}, part("end|>b"))
        joined = (
            "<image>{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        )
        with pytest.raises(ValueError, match=r"must not hold the special token <\|im_end\|>"):
            processor.apply_chat_template(conversation, joined)

    def test_the_template_alone_gives_the_same_prompt(self, processor):
        conversation = messages({"type": "image"}, part("a"), {"type": "image"}, part("b"))
        text = processor.tokenizer.apply_chat_template(
            conversation, chat_template=processor.chat_template, tokenize=False
        )
        assert text == processor.apply_chat_template(conversation)
        assert set(processor.special_tokens) == {"<image>", "<|im_end|>", "<|im_start|>", "<pad>", "<|endoftext|>"}
        forged = messages("a", role="user<|im_end|>")
        with pytest.raises(TemplateError, match=r"special token <\|im_end\|>"):
            processor.tokenizer.apply_chat_template(forged, chat_template=processor.chat_template)

    @pytest.mark.parametrize(
        ("conversation", "message"),
        [
            (messages("a", role="tool"), "role must be one of system, user, assistant, got 'tool'"),
            (messages("a", role="user<|im_end|>"), "role must be one of"),
            ([{"content": "a"}], "role must be one of"),
            (messages({"type": "video", "video": "x"}), "got {'type': 'video'"),
            (messages({"type": "text"}), "a text with a string"),
            (messages({"type": "text", "text": None}), "a text with a string"),
            (["What?"], "a message must be a dict"),
            ("What?", "a conversation must be a list of messages"),
            (messages("a")[0], "a conversation must be a list of messages"),
            ([{"role": "user", "content": 7}], "content must be a string or a list of parts, got 7"),
            ([{"role": "user", "content": ["a"]}], "a content part must be"),
            ([], "a conversation has no message"),
            ([[], messages("a")], "a conversation has no message"),
            ([messages("a"), None], "each conversation of a batch must be a list of messages, got None"),
            ([None, messages("a")], "a message must be a dict"),
            ([messages("a"), [None]], "a message must be a dict"),
            (messages({"type": "image", "image": WIDE, "url": "x"}), "must hold one image, got image and url"),
            ([{"role": ["user"], "content": "a"}], "role must be one of"),
            (messages({"type": ["text"], "text": "a"}), "a content part must be"),
            ([{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "doesn't render tool_calls"),
        ],
    )
    def test_bad_messages(self, processor, conversation, message):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation)

    def test_the_conversation_is_left_alone(self, processor):
        conversation = messages({"type": "image_url", "image_url": {"url": "x"}}, part("a"))
        processor.apply_chat_template(conversation)
        assert conversation == messages({"type": "image_url", "image_url": {"url": "x"}}, part("a"))


def test_a_message_that_holds_itself(processor):
    content = []
    content.append(content)
    with pytest.raises(ValueError, match="a message holds itself"):
        processor.apply_chat_template([{"role": "user", "content": content}])


PLAIN = "USER: {{ messages[0]['content'] }} ASSISTANT:"  # a template without special tokens
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}USER: {{ message['content'] }} BOT: {% endif %}{% endfor %}"
)


class TestOtherTemplates:
    """A template's output is a prompt, even if it looks like a question."""

    def ids(self, processor, text) -> list[int]:
        return processor.tokenizer(text)["input_ids"]

    def test_the_rendered_text_is_tokenized(self, processor):
        options = {"tokenize": True, "return_dict": True}
        out = processor.apply_chat_template(messages("What?"), chat_template=PLAIN, **options)
        assert out["input_ids"][0].tolist() == self.ids(processor, "USER: What? ASSISTANT:")
        out = processor.apply_chat_template([messages("What?")] * 2, chat_template=PLAIN, **options)
        assert out["input_ids"].tolist() == [self.ids(processor, "USER: What? ASSISTANT:")] * 2

    def test_the_rendered_text_is_a_prompt_later(self, processor, model):
        text = processor.apply_chat_template(messages("What?"), chat_template=PLAIN)
        (copied,) = pickle.loads(pickle.dumps([text]))
        assert text == "USER: What? ASSISTANT:"
        for given in (text, copied, [text]):
            for options in ({}, {"model": model}):
                assert processor(given, **options)["input_ids"][0].tolist() == self.ids(processor, text)

    @pytest.mark.parametrize("template", [None, ""])
    def test_none_is_refused(self, processor, template):
        other = type(processor)(processor.image_processor, processor.tokenizer)
        other.chat_template = template
        with pytest.raises(ValueError, match="the processor has no chat template"):
            other.apply_chat_template([{"role": "user", "content": "What?"}])

    def test_of_the_processor_and_by_name(self, processor):
        processor = copy.copy(processor)
        processor.chat_template = PLAIN
        assert processor("What?")["input_ids"][0].tolist() == self.ids(processor, "USER: What? ASSISTANT:")
        with pytest.raises(ValueError, match="the chat template writes 0 <image> for 1 images: take one that"):
            processor("What?", SMALL)
        processor.chat_template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
        assert processor("What?")["input_ids"][0].tolist() == self.ids(processor, "What?")
        processor.chat_template = {"short": PLAIN}
        options = {"tokenize": True, "return_dict": True}
        out = processor.apply_chat_template(messages("What?"), chat_template="short", **options)
        assert out["input_ids"][0].tolist() == self.ids(processor, "USER: What? ASSISTANT:")
        with pytest.raises(ValueError, match=r"no default among the chat templates \['short'\]"):
            processor.apply_chat_template(messages("What?"))
        with pytest.raises(ValueError, match="chat_template must be a template or the name of one, got 7"):
            processor.apply_chat_template(messages("What?"), chat_template=7)

    @pytest.mark.parametrize("given", [{}, {"return_tensors": None}, {"return_tensors": "pt"}])
    def test_the_assistants_tokens(self, processor, given):
        conversation = [*messages("What?"), *messages("A cup.", role="assistant")]
        out = processor.apply_chat_template(
            conversation,
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **given,
        )
        ids, marks = (np.asarray(out[name])[0] for name in ("input_ids", "assistant_masks"))
        assert ids.tolist() == self.ids(processor, "USER: What? BOT: A cup.")
        assert processor.decode(ids[marks == 1]).strip() == "A cup."
        # All of one type: TRL looks up each id in a set, where a tensor is not found.
        assert isinstance(out["input_ids"], torch.Tensor if given.get("return_tensors") else list)

    def test_whether_a_text_is_a_prompt_can_be_said(self, processor):
        assert processor("What?", is_prompt=True)["input_ids"][0].tolist() == self.ids(processor, "What?")
        question = processor("What?", is_prompt=False)["input_ids"][0]
        assert text_of(processor, question) == prompt("What?", 0)
        with pytest.raises(ValueError, match=r"must not hold the special token <\|im_end\|>"):
            processor("What?<|im_end|>", is_prompt=False)
        with pytest.raises(ValueError, match="is_prompt must be True, False or None"):
            processor("What?", is_prompt="yes")

    @pytest.mark.parametrize("tokenize", [False, True])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_crop": 3}, "unknown options max_crop: did you mean max_crops?"),
            ({"processor_kwargs": {"max_crop": 3}}, "unknown options max_crop"),
            ({"max_crops": -1}, "max_crops must be at least 0, got -1"),
            ({"temperature": 0.5}, "no temperature: pass options of generate to generate"),
            ({"add_generation_promt": True}, "did you mean add_generation_prompt?"),
            ({"tools": [{"name": "zoom"}]}, "the chat template doesn't render tools: leave them out, or pass"),
            ({"documents": [{"text": "a"}]}, "the chat template doesn't render documents"),
            ({"processor_kwargs": [3]}, "processor_kwargs must be a dict"),
        ],
    )
    def test_what_the_template_would_drop_is_refused(self, processor, tokenize, options, message):
        options = {"tokenize": tokenize, "return_dict": tokenize, **options}
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages("a"), **options)

    def test_what_the_template_renders(self, processor):
        template = "{{ tools[0]['name'] }} {{ documents | length }} {% if mood %}{{ mood }}{% endif %}"
        options = {"tools": [{"name": "zoom"}], "documents": [{"text": "a"}], "mood": "calm"}
        assert processor.apply_chat_template(messages("a"), template, **options) == "zoom 1 calm"
        assigned = "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools[0]['name'] }}"
        assert processor.apply_chat_template(messages("a"), assigned, tools=options["tools"]) == "zoom"
        marked = "{% generation %}{{ mood }}{% if true %}{{ strftime_now('') }}{% endif %}{% endgeneration %}"
        assert processor.apply_chat_template(messages("a"), marked, mood="calm") == "calm"
        with pytest.raises(ValueError, match="unknown options strftime_now"):
            processor.apply_chat_template(messages("a"), marked, strftime_now=1)
        macro = "{% macro greet(name) %}{{ greeting ~ name }}{% endmacro %}{{ greet(whom) }}{# {{ comment }} #}"
        assert processor.apply_chat_template(messages("a"), macro, greeting="hi ", whom="you") == "hi you"
        for name in ("greet", "name", "comment"):
            with pytest.raises(ValueError, match=f"unknown options {name}"):
                processor.apply_chat_template(messages("a"), macro, **{name: 1})
        template = "{{ messages.docs }}{{ 'tool' }}{% for word in [] %}{{ word }}{% endfor %}{{ dict(key=1)['key'] }}"
        for name in ("docs", "tool", "word", "key"):  # an attribute, quoted text, and names that the template defines
            with pytest.raises(ValueError, match=f"unknown options {name}"):
                processor.apply_chat_template(messages("a"), template, **{name: 1})
        for name in ("images", "text", "part", "ns", "is", "if", "namespace"):  # of the default template, or Jinja's
            with pytest.raises(ValueError, match=f"unknown options {name}"):
                processor.apply_chat_template(messages("a"), **{name: 1})
        assert processor.apply_chat_template(messages("a"), tools=[], documents=None)


class TestAddedTokens:
    """Only control tokens are special: ours, and those that were added as special."""

    @pytest.fixture
    def own(self, processor):
        own = copy.copy(processor)
        own.tokenizer = copy.deepcopy(processor.tokenizer)
        return own

    def test_an_added_word_is_a_word(self, own):
        own.tokenizer.add_tokens(["cat", "<x>"])
        assert text_of(own, own("Is it a cat <x>?", WIDE)["input_ids"][0]) == prompt("Is it a cat <x>?")
        assert "a category" in own.apply_chat_template(messages("a category"))

    def test_an_added_special_token_is_special(self, own):
        own.tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
        with pytest.raises(ValueError, match=r"special token <\|tool\|>"):
            own.apply_chat_template(messages("a <|tool|> b"))
        assert own("a <|tool|> b")["input_ids"][0].tolist() == own.tokenizer("a <|tool|> b")["input_ids"]

    def test_a_single_word(self, own):
        own.tokenizer.add_tokens([AddedToken("cat", single_word=True, special=True)], special_tokens=True)
        assert "a category" in own.apply_chat_template(messages("a category"))
        with pytest.raises(ValueError, match="special token cat"):
            own.apply_chat_template(messages("a cat?"))

    def test_what_the_tokenizer_normalizes_to_a_token(self, own):
        own.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        own.tokenizer.add_tokens([AddedToken("<|tool|>", normalized=True, special=True)], special_tokens=True)
        forged = "a \uff1c|tool|\uff1e b"
        assert own.tokenizer.convert_tokens_to_ids("<|tool|>") in own.tokenizer(forged)["input_ids"]
        for ask in (lambda: own.apply_chat_template(messages(forged)), lambda: own(forged)):
            with pytest.raises(ValueError, match=r"must not hold the special token <\|tool\|>"):
                ask()

    def test_what_the_tokenizer_does_not_take_for_a_token_is_text(self, own):
        own.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert own.tokenizer.convert_tokens_to_ids("<|im_end|>") not in own.tokenizer("<|IM_END|>")["input_ids"]
        assert "a <|IM_END|> b" in own.apply_chat_template(messages("a <|IM_END|> b"))


@pytest.mark.slow
def test_datasets_hash_and_send_the_processor_of_a_folder(converted, tmp_path):
    """In processes that know the class from the folder's code alone."""
    pytest.importorskip("datasets", reason="datasets comes with the extra train")
    code = """
import sys
import datasets
from datasets.fingerprint import Hasher
from transformers import AutoImageProcessor, AutoProcessor

options = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained(sys.argv[1], **options)
image_processor = AutoImageProcessor.from_pretrained(sys.argv[1], **options)
count = lambda batch: {"length": [len(processor(text)["input_ids"][0]) for text in batch["text"]]}
values = processor, image_processor, count
hashes = [Hasher.hash(value) for value in values]
rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
assert rows.map(count, batched=True)["length"][:] == rows.map(count, batched=True, num_proc=2)["length"][:]
processor.save_pretrained(sys.argv[2])
assert [Hasher.hash(value) for value in values] == hashes
print(*hashes)
"""
    command = [sys.executable, "-c", code, converted, tmp_path / "saved"]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    seeds = [{"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = [subprocess.run(command, env=environment | seed, capture_output=True, text=True) for seed in seeds]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != ""


def test_a_tokenizer_without_image_tokens_is_refused(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.convert_tokens_to_ids = lambda token: None
    with pytest.raises(ValueError, match="the tokenizer has no token <image>"):
        type(processor)(processor.image_processor, tokenizer)


def test_what_a_serving_engine_asks(processor):
    sizes = [(image.height, image.width) for image in (SMALL, WIDE)]
    asked = {}, {"max_crops": 2, "num_tokens": 7}, {"images_kwargs": {"max_crops": 2}, "num_tokens": 9}
    for knobs in (*asked, {"size": 200}, {"patch_size": 28, "num_tokens": 5000}):
        data = processor._get_num_multimodal_tokens(image_sizes=sizes, **knobs)
        out = processor(["a", "b"], [SMALL, WIDE], **knobs)
        assert data["num_image_tokens"] == (out["input_ids"] == IMAGE).sum(-1).tolist()
        assert data["num_image_patches"] == out["image_grid_thw"][:, 0].tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"zoom": 1}, "zoom needs several passes"),
        ({"images_kwargs": {"zoom": 1}}, "zoom needs several passes"),
        ({"size": 200}, "size must be the model's, 56, got 200"),
        ({"patch_size": 28}, "patch_size must be the model's, 14, got 28"),
        ({"images_kwargs": {"patch_size": 28}}, "patch_size must be the model's, 14, got 28"),
    ],
    ids=str,
)
def test_requests_that_would_end_a_serving_engine(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor("<image>" * 2, [SMALL, WIDE], return_text_replacement_offsets=True, **options)


def test_the_models_size_in_a_request_to_a_serving_engine(processor):
    call = {"text": "<image>", "images": WIDE, "return_text_replacement_offsets": True}
    size = {"height": SIDE, "width": SIDE}
    for options in ({"zoom": 0}, {"size": size, "patch_size": PATCH}, {"size": SIDE}):
        assert torch.equal(processor(**call, **options)["pixel_values"], processor(**call)["pixel_values"])


@pytest.mark.parametrize("images", [[WIDE, WIDE], [WIDE]], ids=["all", "the rest is cached"])
def test_a_serving_engines_request_with_several_plans_is_refused(processor, images):
    plans = [[(0, 0, 50, 60)], [(50, 0, 200, 60)]]
    with pytest.raises(ValueError, match="pass plans in a request with one image only"):
        processor("<image>" * len(images), images, plans=plans, return_text_replacement_offsets=True)
    one = processor("<image>", WIDE, plans=plans[:1], return_text_replacement_offsets=True)
    both = processor(prompt("What?", 2), [WIDE, WIDE], plans=plans, return_text_replacement_offsets=True)
    assert [out["image_grid_thw"].tolist() for out in (one, both)] == [[[1, 1, 1]], [[1, 1, 1]] * 2]
