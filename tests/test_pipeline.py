"""`pipeline("image-text-to-text")`, as the Hub's widget and users call it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import NEW_TOKENS, plain_reply
from PIL import Image
from transformers import TextIteratorStreamer, pipeline

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, load_image


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_old_name")]


@pytest.fixture(scope="module")
def pipe(trial):
    return pipeline("image-text-to-text", model=str(trial.folder), trust_remote_code=True)


def messages(trial, index: int) -> list[dict]:
    content = [{"type": "image", "path": str(trial.pictures[index])}, {"type": "text", "text": trial.questions[index]}]
    return [{"role": "user", "content": content}]


def test_the_folders_configuration_names_the_class(trial):
    """Pipelines and `transformers serve` look it up by name, in a process that has not imported the package."""
    code = """
import sys
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    print(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")[config.model_type])
"""
    command = [sys.executable, "-c", code, trial.folder]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert result.stdout.split() == ["MCLlavaForConditionalGeneration"] * 2, result.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_the_widgets_question(pipe, trial, index):
    for picture in (str(trial.pictures[index]), Image.open(trial.pictures[index])):
        (result,) = pipe(picture, text=trial.questions[index], max_new_tokens=NEW_TOKENS, return_full_text=False)
        assert trial.is_right(index, result["generated_text"])
    (result,) = pipe(str(trial.pictures[index]), text=trial.questions[index], max_new_tokens=NEW_TOKENS)
    assert result["input_text"] == trial.questions[index]
    assert trial.is_right(index, result["generated_text"].removeprefix(trial.questions[index]))


@pytest.mark.parametrize("index", [0, 1])
def test_messages(pipe, trial, index):
    (result,) = pipe(text=messages(trial, index), max_new_tokens=NEW_TOKENS)
    *asked, answer = result["generated_text"]
    assert asked == messages(trial, index) and answer["role"] == "assistant"
    assert trial.is_right(index, answer["content"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches(pipe, trial, batch_size):
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": batch_size, "return_full_text": False}
    order = (0, 1, 0)
    pictures, questions = [str(trial.pictures[index]) for index in order], [trial.questions[index] for index in order]
    pairs = ({"images": picture, "text": question} for picture, question in zip(pictures, questions))
    for results in (
        pipe(text=[messages(trial, index) for index in order], **options),
        pipe(pairs, **options),
        [[result] for result in pipe(pictures, text=questions, **options)],
    ):
        replies = [result[0]["generated_text"] for result in results]
        assert all(trial.is_right(index, reply) for index, reply in zip(order, replies, strict=True))


@pytest.mark.parametrize("knobs", [{"max_crops": 0, "num_tokens": 30}, {"max_crops": 8}])
def test_knobs(pipe, trial, knobs):
    expected = plain_reply(trial.folder, trial.pictures[0], trial.questions[0], **knobs)
    options = {"max_new_tokens": NEW_TOKENS, "return_full_text": False}
    for result in (
        pipe(str(trial.pictures[0]), text=trial.questions[0], **knobs, **options),
        pipe(text=messages(trial, 0), **knobs, **options),
        pipe(text=messages(trial, 0), processor_kwargs=knobs, **options),
    ):
        assert result[0]["generated_text"].strip() == expected
    with pytest.raises(ValueError, match="max_crops must be at least 0"):
        pipe(text=messages(trial, 0), max_crops=-1)


def test_generation_options_and_streaming(pipe, trial):
    options = {"num_beams": 3, "repetition_penalty": 5.0, "max_new_tokens": 6}
    (result,) = pipe(text=messages(trial, 0), generate_kwargs=options, return_full_text=False)
    assert result["generated_text"].strip() == plain_reply(
        trial.folder, trial.pictures[0], trial.questions[0], options
    )

    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {"streamer": streamer, "max_new_tokens": NEW_TOKENS}
    pipe(text=messages(trial, 0), generate_kwargs=options)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 1 and trial.is_right(0, "".join(pieces))


def test_text_before_the_picture(pipe, trial):
    """The order of OpenAI's own examples."""
    for index in (0, 1):
        (message,) = messages(trial, index)
        (result,) = pipe(text=[{**message, "content": message["content"][::-1]}], max_new_tokens=NEW_TOKENS)
        assert trial.is_right(index, result["generated_text"][-1]["content"])


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_saved_pipeline(trial, tmp_path, is_remote):
    """A pipeline saves its parts, not the processor. The code is loaded from the folder, its only source."""
    if is_remote:
        pipe = pipeline("image-text-to-text", model=str(trial.folder), trust_remote_code=True)
    else:
        model = MCLlavaForConditionalGeneration.from_pretrained(trial.folder)
        processor = MCLlavaProcessor.from_pretrained(trial.folder)
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
    pipe.processor.image_processor.max_crops = 3
    options = {"max_new_tokens": NEW_TOKENS, "return_full_text": False}
    expected = pipe(text=messages(trial, 0), **options)
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipe.save_pretrained(folder)
        pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
        assert pipe.processor.image_processor.max_crops == 3
        assert pipe(text=messages(trial, 0), **options) == expected
    local = MCLlavaProcessor.from_pretrained(folder)
    assert local.image_processor.max_crops == 3 and local.chat_template == pipe.processor.chat_template


def test_questions_without_a_picture(pipe):
    (result,) = pipe(text="What is a galaxy?", max_new_tokens=2)
    assert len(result["generated_text"]) > len("What is a galaxy?")


def test_a_picture_that_transformers_would_read_otherwise(pipe, trial, tmp_path):
    """16-bit gray, which the pipeline's loader turns white: in messages, and as docs/usage.md says."""
    grey = np.asarray(Image.open(trial.pictures[0]).convert("L"))
    wide = tmp_path / "wide.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(wide)
    expected = plain_reply(trial.folder, grey, trial.questions[0])
    content = [{"type": "image", "path": str(wide)}, {"type": "text", "text": trial.questions[0]}]
    options = {"max_new_tokens": NEW_TOKENS, "return_full_text": False}
    for result in (
        pipe(text=[{"role": "user", "content": content}], **options),
        pipe(load_image(wide), text=trial.questions[0], **options),
    ):
        assert result[0]["generated_text"].strip() == expected
