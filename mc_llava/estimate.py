"""The cost of a question about a picture, computed from configurations alone: no weights are loaded."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from . import (
    CROPS_PER_PASS,
    DRAFT,
    MCLlavaConfig,
    MCLlavaForConditionalGeneration,
    check_knob,
    last_attention,
    relevant_heads,
)


@dataclass(frozen=True)
class Estimate:
    """
    FLOPs count a multiplication and an addition as two, and attention as if no position were masked.

    `look_flops` are those of guided zoom's drafts before the answer, `prefill_flops` the answer's, which a
    `PrefixCache` saves if the last draft was about the same crops.
    `activation_bytes` are the crops' pixels (float32, and those of one pass in the model's dtype, too) and the
    largest activations of a pass of the tower or the language model; `cache_bytes` the keys and values of prompt and
    answer.
    """

    crops: int
    image_tokens: int
    prompt_tokens: int
    tower_flops: int
    look_flops: int
    prefill_flops: int
    flops_per_new_token: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes: int


@torch.no_grad()
def estimate(
    config: MCLlavaConfig,
    crops: int,
    image_tokens: int,
    text_tokens: int = 27,
    new_tokens: int = 200,
    dtype: torch.dtype = torch.float16,
    looks: int = 0,
) -> Estimate:
    """
    Cost of one picture's crops and of one question about it.

    FLOPs are counted by torch on the model itself, with tensors that have a shape but no data. Activations follow from
    the widths of the layers, with fused attention.

    Args:
        crops, image_tokens: of the picture, from a plan or an `EncodedImages`.
        text_tokens: of the prompt without the picture; 27 are the card's prompt with a question of four words.
        new_tokens: of the answer.
        looks: rounds of guided zoom. `crops` are those of all rounds.

    Raises:
        ValueError: if prompt and answer don't fit into the context.
    """
    length = image_tokens + text_tokens
    limit = config.text_config.max_position_embeddings
    check_knob("text_tokens", text_tokens, 1)
    check_knob("new_tokens", new_tokens, 1)
    if length + new_tokens > limit:
        raise ValueError(
            f"{image_tokens} image tokens, {text_tokens} of text and {new_tokens} new ones exceed the context of "
            f"{limit}: lower num_tokens or the answer's length"
        )
    with torch.device("meta"):
        model = MCLlavaForConditionalGeneration._from_config(config, dtype=dtype)
        prompt, token = (torch.empty(1, n, config.text_config.hidden_size, dtype=dtype) for n in (length, 1))

    cache = DynamicCache(config=config.text_config)
    prefill_flops = _count_flops(lambda: model(inputs_embeds=prompt, cache=cache, logits_to_keep=1))
    prompt_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    flops_per_new_token = _count_flops(lambda: model(inputs_embeds=token, cache=cache, logits_to_keep=1))
    look_flops = 0
    if looks:
        look_flops = looks * (prefill_flops + min(DRAFT, new_tokens) * flops_per_new_token)
    if looks and not config.zoom_heads:  # also with a general question
        language_model, heads = model.model.language_model, relevant_heads(config)
        look_flops += looks * _count_flops(lambda: last_attention(language_model, prompt, None, heads))
    return Estimate(
        crops=crops,
        image_tokens=image_tokens,
        prompt_tokens=length,
        tower_flops=_tower_flops(model, crops, image_tokens),
        look_flops=look_flops,
        prefill_flops=prefill_flops,
        flops_per_new_token=flops_per_new_token,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        activation_bytes=_activation_bytes(model, crops, length),
        cache_bytes=prompt_bytes * (length + new_tokens) // length,
    )


def _tower_flops(model: MCLlavaForConditionalGeneration, crops: int, image_tokens: int) -> int:
    """FLOPs from crops to what takes the place of `<image>`: vision tower, coordinate embedding and projector."""
    tower, vision = model.model.vision_tower, model.config.vision_config
    with torch.device("meta"):
        pixels = torch.empty(1, vision.num_channels, vision.image_size, vision.image_size, dtype=model.dtype)
        coords = torch.empty(crops, 2, dtype=model.dtype)
        selected = torch.empty(image_tokens, vision.hidden_size, dtype=model.dtype)
    return (
        crops * _count_flops(lambda: tower.encoder(inputs_embeds=tower.embeddings(pixels)))
        + _count_flops(lambda: model.model.coord_embed(coords))
        + _count_flops(lambda: model.model.multi_modal_projector(selected))
    )


def _activation_bytes(model: MCLlavaForConditionalGeneration, crops: int, length: int) -> int:
    """
    Bytes of the crops' pixels and of the largest activations of a pass. During the activation function of an MLP of
    width m, a token of the tower takes 4 hidden + 2 m numbers, one of Phi, whose `gelu_new` consists of several
    operations, 4 hidden + 4 m.

    Args:
        length: the number of the prompt's tokens.
    """
    vision, text, dtype = model.config.vision_config, model.config.text_config, model.dtype
    at_once = min(crops, CROPS_PER_PASS)
    patches = at_once * model.model.vision_tower.embeddings.num_patches
    tower_width = 4 * vision.hidden_size + 2 * vision.intermediate_size
    text_width = 4 * text.hidden_size + 4 * text.intermediate_size
    widest = max(patches * tower_width, length * text_width) * dtype.itemsize
    copied = 0 if dtype == torch.float32 else dtype.itemsize
    return vision.num_channels * vision.image_size**2 * (4 * crops + copied * at_once) + widest


def _count_flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
