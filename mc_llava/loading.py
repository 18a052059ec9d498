"""A model from a folder or the Hub: how it is loaded, and what its results are known by."""

import hashlib
from functools import partial
from pathlib import Path

import torch

from .configuration_mc_llava import MCLlavaConfig
from .modeling_mc_llava import MCLlavaForConditionalGeneration
from .processing_mc_llava import MCLlavaProcessor


LOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # from a folder


def load_model(
    path: str, dtype: str = "auto", device: str | None = None, revision: str | None = None
) -> MCLlavaForConditionalGeneration:
    """
    A model that is ready to answer, from safetensors alone.

    Args:
        path: a folder or a Hub id.
        dtype: "auto" is as the checkpoint was saved.
        device: an accelerator, if there is one, where None.
        revision: branch, tag or commit of a Hub id.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
    model = MCLlavaForConditionalGeneration.from_pretrained(
        path, dtype=dtype, use_safetensors=True, revision=revision or "main"
    )
    return model.to(device).eval()


def load_processor(path: str, revision: str | None = None) -> MCLlavaProcessor:
    return MCLlavaProcessor.from_pretrained(path, revision=revision or "main")


def identify(path: str, revision: str | None = None) -> str:
    """
    What a model's results are known by: the commit of a Hub id, a digest of a folder's weights, configurations,
    tokenizer and chat template.
    """
    if not Path(path).is_dir():
        config = MCLlavaConfig.from_pretrained(path, revision=revision or "main")
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256()
    for file in sorted(file for suffix in LOADED for file in Path(path).glob(suffix)):
        digest.update(file.name.encode())
        with open(file, "rb") as opened:
            for block in iter(partial(opened.read, 2**20), b""):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def load(
    path: str, revision: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[MCLlavaForConditionalGeneration, MCLlavaProcessor, str]:
    """A model, its processor, and what their results are known by."""
    processor = load_processor(path, revision)
    return load_model(path, dtype, device, revision), processor, identify(path, revision)
