import os
import tempfile


# Before the libraries read it: a test that reached for the Hub would pass only where there is a network.
os.environ["HF_HUB_OFFLINE"] = "1"
_assets = tempfile.TemporaryDirectory()  # removed at the end
os.environ["HF_ASSETS_CACHE"] = _assets.name  # digests of model folders stay out of the user's cache
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than the few steps that tests train

from pathlib import Path

import no_old_names  # before transformers is imported
import pytest
from helpers import EXAMPLES, PATCH, ROOT, SIDE, Trial, small_model
from make_published_checkpoint import write_published_checkpoint
from PIL import ImageFile

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor
from mc_llava.convert import convert


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint in the published layout."""
    return write_published_checkpoint(tmp_path_factory.mktemp("published") / "checkpoint")


@pytest.fixture(scope="session")
def converted(checkpoint, tmp_path_factory) -> Path:
    return convert(str(checkpoint), str(tmp_path_factory.mktemp("converted") / "model"))


@pytest.fixture(scope="session")
def trial(tmp_path_factory) -> Trial:
    """The first question about each drawn example, which is asked through everything that users meet."""
    first = {example["image"]: example for example in reversed(EXAMPLES)}
    examples = [first[name] for name in sorted(first)]
    return Trial(
        convert("tiny", str(tmp_path_factory.mktemp("trial") / "model")),
        [ROOT / "examples" / example["image"] for example in examples],
        [example["question"] for example in examples],
        [example["key"] for example in examples],
    )


@pytest.fixture(scope="session")
def model() -> MCLlavaForConditionalGeneration:
    return small_model()


@pytest.fixture(scope="session")
def processor(checkpoint) -> MCLlavaProcessor:
    image_processor = MCLlavaImageProcessor(
        size={"height": SIDE, "width": SIDE}, patch_size=PATCH, max_crops=6, num_tokens=20
    )
    return MCLlavaProcessor(image_processor, MCLlavaProcessor.from_pretrained(checkpoint).tokenizer)


@pytest.fixture
def no_old_name(monkeypatch):
    """transformers without the name `past_key_values`."""
    monkeypatch.setattr(no_old_names, "refused", True)


@pytest.fixture(autouse=True)
def pillow_as_it_is(monkeypatch):
    """Once imported, lmms-eval makes Pillow fill the missing part of truncated images with gray, everywhere."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
