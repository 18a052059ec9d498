import os


# Before the libraries read it: a test that reached for the Hub would pass only where there is a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than the few steps that tests train

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from make_published_checkpoint import write_published_checkpoint
from PIL import Image, ImageFile

from mc_llava import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor, scenes
from mc_llava.convert import convert


ROOT = Path(__file__).parent.parent
SIDE, PATCH = 56, 14  # of the small model: 16 patches a crop


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint in the published layout."""
    return write_published_checkpoint(tmp_path_factory.mktemp("published") / "checkpoint")


@pytest.fixture(scope="session")
def converted(checkpoint, tmp_path_factory) -> Path:
    return convert(str(checkpoint), str(tmp_path_factory.mktemp("converted") / "model"))


class Trial(NamedTuple):
    """`tiny` in a folder made by `convert`, pictures with a question to each, and what is right to answer."""

    folder: Path
    pictures: list[Path]
    questions: list[str]
    keys: list[str]

    def is_right(self, index: int, reply: str) -> bool:
        return scenes.is_correct(self.keys[index], reply)


EXAMPLES = json.loads((ROOT / "examples" / "questions.json").read_text())
NEW_TOKENS = 24  # enough for any answer about a scene


@pytest.fixture(scope="session")
def trial(tmp_path_factory) -> Trial:
    """What everything that users meet is asked about: the first question about each drawn example."""
    first = {example["image"]: example for example in reversed(EXAMPLES)}
    examples = [first[name] for name in sorted(first)]
    return Trial(
        convert("tiny", str(tmp_path_factory.mktemp("trial") / "model")),
        [ROOT / "examples" / example["image"] for example in examples],
        [example["question"] for example in examples],
        [example["key"] for example in examples],
    )


def plain_reply(folder: Path, image, question: str, options: dict | None = None, **knobs) -> str:
    """What `generate` gives for the processor's pixels."""
    model = MCLlavaForConditionalGeneration.from_pretrained(folder)
    processor = MCLlavaProcessor.from_pretrained(folder)
    inputs = processor(question, [image], **knobs)
    output = model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **(options or {})})
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def write_untrained_tiny(folder: Path, layers: int):
    """A random model of `tiny`'s kind with its processor, for what trains one."""
    from mc_llava.scenes import language_model  # needs the extra train, which vLLM's environment lacks

    torch.manual_seed(0)
    processor = language_model.build_processor()
    vision = language_model.vision_config(width=32, layers=layers)
    language_model.build_model(processor, vision, width=32, layers=layers).save_pretrained(folder)
    processor.save_pretrained(folder)


def small_config(**kwargs) -> MCLlavaConfig:
    text = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return MCLlavaConfig(
        text_config={"model_type": "phi", "partial_rotary_factor": 0.4, "max_position_embeddings": 128, **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, **vision},
        **kwargs,
    )


def small_model(seed: int = 0, attn_implementation: str = "sdpa") -> MCLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = MCLlavaForConditionalGeneration._from_config(small_config(), attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:  # wide enough for every input to change the logits
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> MCLlavaForConditionalGeneration:
    return small_model()


@pytest.fixture(scope="session")
def processor(checkpoint) -> MCLlavaProcessor:
    image_processor = MCLlavaImageProcessor(
        size={"height": SIDE, "width": SIDE}, patch_size=PATCH, max_crops=6, num_tokens=20
    )
    return MCLlavaProcessor(image_processor, MCLlavaProcessor.from_pretrained(checkpoint).tokenizer)


@pytest.fixture(autouse=True)
def pillow_as_it_is(monkeypatch):
    """lmms-eval, once imported, has Pillow fill the missing part of cut images with grey everywhere."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(question: str, images: int = 1) -> str:
    """The card's prompt."""
    return "<|im_start|>user\n" + "<image>\n" * images + question + "<|im_end|>\n<|im_start|>assistant\n"
