"""Training that begins with a checkpoint's weights in place of random ones."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .. import MCLlavaConfig, MCLlavaForConditionalGeneration
from ..loading import load_model, load_processor


LAYERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {"vision_config": (*LAYERS, "patch_size", "image_size"), "text_config": LAYERS}


class Start(NamedTuple):
    """A checkpoint to begin with."""

    model: MCLlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase


def load_start(folder: str, config: MCLlavaConfig) -> Start:
    """
    Raises:
        ValueError: if there is no such folder, or its model has other sizes than `config`. The language model may have
            fewer layers.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"start: there is no folder {folder}; docs/tiny.md says what to put there, or set start=null")
    model = load_model(folder, "float32", "cpu")
    for part, names in SIZES.items():
        for name in names:
            found, wanted = getattr(getattr(model.config, part), name), getattr(getattr(config, part), name)
            if found != wanted and not (part == "text_config" and name == "num_hidden_layers" and found < wanted):
                raise ValueError(
                    f"{folder} has {name} {found} in its {part}, the recipe {wanted}: set start to another folder"
                )
    return Start(model, load_processor(folder).tokenizer)


@torch.no_grad()
def copy_weights(start: Start, model: MCLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
    """
    Copy all weights into a model whose tokenizer may have other tokens. One that `start` does not have begins as the
    mean of those that `start` writes it with, and a layer that it does not have as one that adds nothing.
    """
    known, vocabulary = start.tokenizer.get_vocab(), tokenizer.get_vocab()
    ids = [
        [known[token]]
        if token in known
        else start.tokenizer.encode(tokenizer.convert_tokens_to_string([token]), add_special_tokens=False)
        for token in sorted(vocabulary, key=vocabulary.get)
    ]
    weights = model.state_dict()
    by_token = {
        id(parameter)
        for module in (start.model.get_input_embeddings(), start.model.get_output_embeddings())
        for parameter in module.parameters()
    }
    for name, parameter in start.model.named_parameters():
        if id(parameter) in by_token:
            weights[name].copy_(torch.stack([parameter[written].mean(0) for written in ids]))
        else:
            weights[name].copy_(parameter)
    for layer in model.model.language_model.layers[len(start.model.model.language_model.layers) :]:
        for added in (layer.self_attn.dense, layer.mlp.fc2):
            torch.nn.init.zeros_(added.weight)
            torch.nn.init.zeros_(added.bias)
