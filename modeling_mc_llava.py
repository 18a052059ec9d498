"""MC-LLaVA: SigLIP encodes crops; a few patch tokens of each, plus its position, are projected to Phi's embeddings.

pixel_values [crops, 3, side, side]
  -> vision tower, last block               [crops, patches, vision_hidden]
  -> the last crop_num_tokens[i] patches    [tokens, vision_hidden]
  -> + coord_embed(crop_coords)             [tokens, vision_hidden]
  -> projector                              [tokens, hidden], in place of <image> in the prompt
"""

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, modeling_utils
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_mc_llava import MCLlavaConfig, add_to_package
from .encoded_images_mc_llava import (
    EncodedImages,
    check_counts,
    check_placeholders,
    check_weights,
    is_encoded,
    read_integers,
    sum_per_image,
)
from .generation_mc_llava import CACHE, CACHE_NAMES, MCLlavaGenerationMixin, one_cache
from .hashing_mc_llava import adapter_names, adapter_states, hash_tensors
from .precision_mc_llava import warn_of_float16
from .zoom_mc_llava import MCLlavaZoomMixin, refuse_zoom


# One thread at a time replaces transformers' function, see `one_copy`. All copies of this code share the lock:
# otherwise one could restore the replacement of another.
_opening = vars(modeling_utils).setdefault("_mc_llava_opening", RLock())
# Crops that the vision tower encodes at once. This bounds its memory, whatever max_crops is.
CROPS_PER_PASS = 16
# Names in the published checkpoint -> in the model. `save_pretrained` writes the published ones, `from_pretrained` and
# `load_state_dict` read both.
PUBLISHED_NAMES = {
    "vision_model.vision_tower.": "model.vision_tower.",
    "vision_model.coord_embed.": "model.coord_embed.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@dataclass
class MCLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `MCLlavaModel`. `image_outputs` is the output of `get_image_features`, or None without images."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MCLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of `MCLlavaForConditionalGeneration`. `image_outputs` is the output of `get_image_features`, or None without
    images.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


if CACHE != "cache":  # so that code for 5.24 and later runs on older releases
    for output_class in (MCLlavaModelOutputWithPast, MCLlavaCausalLMOutputWithPast):
        output_class.cache = property(
            lambda output: getattr(output, CACHE),
            lambda output, value: setattr(output, CACHE, value),
        )


class MCLlavaCoordinateEmbedding(nn.Sequential):
    """
    Maps the center of a crop to a vector that is added to each of its tokens: float[crops, 2] to
    float[crops, vision_hidden].

    Casts the coordinates to the dtype of its biases, because the caller can't: PEFT wraps a trained copy, which may
    have another dtype. Biases are never quantized, whereas the weights may be integers or packed into bytes. torch's
    own quantized layers, whose `bias` is a method, take float32.
    """

    def forward(self, coords: torch.Tensor) -> torch.Tensor:
        return super().forward(coords.to(getattr(self[0].bias, "dtype", torch.float32)))


class MCLlavaMultiModalProjector(nn.Module):
    """
    Maps the tower's outputs to the language model's width: float[..., vision_hidden] to float[..., hidden].

    Casts them to the dtype of its weights, see `MCLlavaCoordinateEmbedding`, unless these are quantized: such layers
    take any dtype and return the same.
    """

    def __init__(self, config: MCLlavaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = getattr(getattr(self.linear_1, "weight", None), "dtype", torch.uint8)
        if dtype.is_floating_point and dtype.itemsize > 1:
            hidden_states = hidden_states.to(dtype)
        return self.linear_2(self.act(self.linear_1(hidden_states)))


def rename_published(module: "MCLlavaPreTrainedModel", state_dict: dict, prefix: str, *args):
    """
    Hook before `load_state_dict`: gives tensors with `PUBLISHED_NAMES` the model's names, and drops the unused head.

    `save_pretrained` writes published names. What reads them without `from_pretrained`, as transformers' `Trainer`
    does when it resumes, would otherwise find no weight and keep those in memory.
    """
    is_whole = hasattr(module, "lm_head")
    for name in [name for name in state_dict if name.startswith(prefix)]:
        published = name.removeprefix(prefix)
        start = next((start for start in PUBLISHED_NAMES if published.startswith(start)), None)
        if start is None:
            continue
        ours = PUBLISHED_NAMES[start] + published.removeprefix(start).removeprefix("vision_model.")
        ours = prefix + (ours if is_whole else ours.removeprefix("model."))
        unused = any(re.search(pattern, name) for pattern in module._keys_to_ignore_on_load_unexpected)
        if unused:
            del state_dict[name]
        elif ours not in state_dict:
            state_dict[ours] = state_dict.pop(name)


def read_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """
    The `state_dict` of a module, which does not change: on a CPU, bitsandbytes' 4-bit layers reorder their weights
    when they are asked for their state, and lose the order of the scales (bitsandbytes 0.50).

    Their first pass on a CPU may have reordered the weights already, rounded the scales and cast the biases. The
    layers of the copy make such a pass, so that the weights are the same before and after it.
    """
    if not any(map(has_4_bits, module.modules())):
        return module.state_dict()
    module = copy.deepcopy(module).eval()  # in training there is no such pass
    for layer in filter(has_4_bits, module.modules()):
        if layer.weight.device.type == "cpu":
            dtype = torch.float32 if layer.bias is None else layer.bias.dtype
            with torch.no_grad():
                layer.forward(torch.zeros(1, layer.in_features, dtype=dtype))  # without users' hooks
    return module.state_dict()


def has_4_bits(layer: nn.Module) -> bool:
    """Whether this is a layer of bitsandbytes with weights of 4 bits, and not one of PEFT's that wraps it."""
    return getattr(layer._parameters.get("weight"), "quant_state", None) is not None


@contextmanager
def one_copy(dtype: torch.dtype | str | dict | None):
    """
    Make `from_pretrained` read a file tensor by tensor if its weights have another dtype.

    By default it maps files into memory, where the pages of all tensors would stay, in addition to their copies in
    `dtype`, until the last one is loaded. transformers reads files on Windows, for a similar reason, and has no option
    for it elsewhere.
    """
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    # In the deprecated dictionary of submodels, "" is the model, whose dtype transformers takes for all.
    dtype = dtype.get("", torch.get_default_dtype()) if isinstance(dtype, dict) else dtype
    wanted = names.get(getattr(torch, dtype, None) if isinstance(dtype, str) else dtype)
    # None is the file's: mapped weights are read when they are used, and shared by processes.
    if wanted is None or not hasattr(modeling_utils, "safe_open"):
        yield
        return
    with _opening:
        plain_open = modeling_utils.safe_open

        def open_file(path, **options):
            file = plain_open(path, **options)
            if all(file.get_slice(name).get_dtype() == wanted for name in file.keys()):
                return file
            try:
                return plain_open(path, **{**options, "backend": "pread"})
            except TypeError:  # an older safetensors
                return file

        modeling_utils.safe_open = open_file
        try:
            yield
        finally:
            modeling_utils.safe_open = plain_open


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # cat would copy a single one, too


class MCLlavaPreTrainedModel(PreTrainedModel):
    """Tells transformers how both models are loaded and what they support."""

    config: MCLlavaConfig
    config_class = MCLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # decoding only: a prefill with images reads its inputs' values
    # SigLIP's pooling head, which is in the published checkpoint but not used.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.(vision_model\.)?head\."]

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(rename_published)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but weights that are loaded in another dtype than the file's are in memory only once."""
        with one_copy(kwargs.get("dtype", kwargs.get("torch_dtype"))):
            return super().from_pretrained(*args, **kwargs)


class MCLlavaModel(MCLlavaPreTrainedModel):
    """
    Vision tower, coordinate embedding, projector and language model, without the head.

    `forward` takes input_ids int[batch, length] with one `<image>` per visual token and the image processor's fields,
    and returns hidden states float[batch, length, hidden]. It raises a ValueError if the images don't match the
    `<image>` tokens.
    """

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        if getattr(config, "quantization_config", None) is not None:
            # All quantizers leave these alone. bitsandbytes can't pack rows of two weights for a CPU, and coordinates
            # in 8 bits would lose the place of a crop.
            self._keep_in_fp32_modules = ["coord_embed", "model.coord_embed"]
        hidden_size = config.vision_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.coord_embed = MCLlavaCoordinateEmbedding(
            nn.Linear(2, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.multi_modal_projector = MCLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @property
    def encoder_parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The modules that make features of crops."""
        return self.vision_tower, self.coord_embed, self.multi_modal_projector

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        crop_boxes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encode the crops of all images of a batch, `CROPS_PER_PASS` at a time.

        Args:
            pixel_values: float[crops, 3, side, side].
            crop_coords: float[crops, 2], centers of the crops as (x / width, y / height).
            crop_num_tokens: int[crops], the number of tokens to keep of each crop, from 1 to its patches but one.
            image_grid_thw: int[images, 3] with rows [crops of the image, 1, 1].
            crop_boxes: int[crops, 4], not used: the model gets the positions as `crop_coords`.
            output_hidden_states, output_attentions: also return the hidden states or attentions of the vision tower's
                layers, for all patches of all crops. This takes a second pass and much memory.

        Returns:
            `pooler_output`: a list with one float[tokens, hidden] per image, the projected tokens.
            `last_hidden_state`: float[all tokens, vision_hidden], the input of the projector.
            `hidden_states`, `attentions`: if requested, per layer float[crops, patches, vision_hidden] and
            float[crops, heads, patches, patches].

        Raises:
            ValueError: if the four fields don't describe the same crops, there are none, or `crop_num_tokens` are out
                of range.
        """
        refuse_zoom("get_image_features", kwargs)
        # Not in the signature: `generate` moves every argument that it names from the language model's call here.
        output_hidden_states, output_attentions = (
            bool(kwargs.pop(name, None)) for name in ("output_hidden_states", "output_attentions")
        )
        check_counts(crop_num_tokens, image_grid_thw)
        counts, crops_per_image = read_integers(crop_num_tokens, image_grid_thw[:, 0])
        tokens_per_image = sum_per_image(counts, crops_per_image)
        self.check_crops(counts, pixel_values=pixel_values, crop_coords=crop_coords)

        warn_of_float16(self.vision_tower.dtype, pixel_values.device)
        hidden_states = self.encode_tokens(pixel_values, crop_num_tokens, counts, **kwargs)
        hidden_states = self.add_positions(hidden_states, crop_coords, crop_num_tokens)
        image_features = self.multi_modal_projector(hidden_states)
        recorded = {}
        if output_hidden_states or output_attentions:
            recorded = self._record_tower(pixel_values.split(CROPS_PER_PASS), output_hidden_states, output_attentions)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=list(image_features.split(tokens_per_image)), **recorded
        )

    def check_crops(self, counts: list[int], **fields):
        """
        Raise a ValueError if fields with a row for each crop differ in length, there are no crops, or a crop has fewer
        patches than tokens to keep. Nothing is read from the device.

        Args:
            counts: the values of `crop_num_tokens`.
            fields: the other fields by name.
        """
        lengths = [0 if field is None else len(field) for field in fields.values()]
        if set(lengths) != {len(counts)}:
            raise ValueError(
                f"{', '.join(fields)} and crop_num_tokens describe {', '.join(map(str, lengths))} and {len(counts)} "
                "crops: pass what the processor returned"
            )
        if not counts:
            raise ValueError("there are no crops to encode: pass at least one image")
        patches = self.vision_tower.embeddings.num_patches
        low, high = min(counts), max(counts)
        if low < 1 or high >= patches:
            raise ValueError(
                f"crop_num_tokens must lie between 1 and {patches - 1} (patches of a crop, without the first), "
                f"got {low} to {high}: use the processor of this model, with patch_size "
                f"{self.config.vision_config.patch_size}"
            )

    def encode_tokens(
        self,
        pixel_values: torch.Tensor,
        crop_num_tokens: torch.LongTensor,
        counts: list[int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        The tokens that are kept of crops, `CROPS_PER_PASS` at a time: float[tokens, vision_hidden].

        Args:
            counts: the values of `crop_num_tokens`. If they were read here, each pass would wait for the one before.
        """
        # Parameters may be on several devices or on disk: move data to the device of other data, not to theirs.
        passes = zip(pixel_values.split(CROPS_PER_PASS), crop_num_tokens.split(CROPS_PER_PASS))
        dtype, starts = self.vision_tower.dtype, range(0, len(counts), CROPS_PER_PASS)
        totals = [sum(counts[start : start + CROPS_PER_PASS]) for start in starts]
        return torch.cat(
            [
                self.keep_last(self.encode_crops(pixels.to(dtype), **kwargs), kept, total)
                for (pixels, kept), total in zip(passes, totals)
            ]
        )

    def encode_passes(self, parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """
        All patches of crops, in order, pass by pass: float[crops, patches, vision_hidden].

        Args:
            parts: float[crops, 3, side, side] each, of any sizes. Each pass has `CROPS_PER_PASS` crops of them.
        """
        held, free = [], CROPS_PER_PASS
        for part in parts:
            while len(part):
                held.append(part[:free])
                part, free = part[free:], free - len(held[-1])
                if not free:
                    yield self.encode_crops(_join(held).to(self.vision_tower.dtype))
                    held, free = [], CROPS_PER_PASS
        if held:
            yield self.encode_crops(_join(held).to(self.vision_tower.dtype))

    def add_positions(
        self, hidden_states: torch.Tensor, crop_coords: torch.Tensor, crop_num_tokens: torch.LongTensor
    ) -> torch.Tensor:
        """Add to each token float[tokens, vision_hidden] the embedding of its crop's center float[crops, 2]."""
        positions = self.coord_embed(crop_coords).to(hidden_states)
        return hidden_states + positions.repeat_interleave(
            crop_num_tokens.to(hidden_states.device), dim=0, output_size=len(hidden_states)
        )

    def encode_crops(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Encode crops float[crops, 3, side, side] to float[crops, patches, vision_hidden]: all patches, after the
        tower's last block and before `post_layernorm`.

        Raises:
            ValueError: if the crops don't have the size that the tower reads.
        """
        side = self.config.vision_config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values are {list(pixel_values.shape)}, the vision tower reads [crops, 3, {side}, {side}]: "
                f"use the processor of this model, whose size is {side}"
            )
        embeddings = self.vision_tower.embeddings(pixel_values)
        return self.vision_tower.encoder(inputs_embeds=embeddings, **kwargs).last_hidden_state

    @staticmethod
    def keep_last(hidden_states: torch.Tensor, num_tokens: torch.LongTensor, total: int | None = None) -> torch.Tensor:
        """
        Select the last `num_tokens[i]` patches of each crop i: float[crops, patches, ...] to float[tokens, ...].

        Args:
            total: the sum of `num_tokens`. By default it is read from the device, which waits for it.
        """
        device, patches = hidden_states.device, hidden_states.shape[1]
        num_tokens = num_tokens.to(device)
        total = int(num_tokens.sum()) if total is None else total
        ends = patches * torch.arange(1, 1 + len(num_tokens), device=device)
        # From a token's place among those that are kept to its place among all patches.
        shifts = (ends - num_tokens.cumsum(0)).repeat_interleave(num_tokens, output_size=total)
        return hidden_states.flatten(0, 1)[torch.arange(total, device=device) + shifts]

    def _record_tower(self, passes: tuple[torch.Tensor, ...], hidden_states: bool, attentions: bool) -> dict:
        """
        The hidden states and attentions of the tower's layers, as recorded by transformers' forward pass. The language
        model doesn't use them: whether the last hidden state is taken before or after the last norm has changed
        between releases.
        """
        outputs = [
            self.vision_tower(
                pixels.to(self.vision_tower.dtype),
                output_hidden_states=hidden_states,
                output_attentions=attentions,
                return_dict=True,
            )
            for pixels in passes
        ]
        wanted = [name for name, asked in (("hidden_states", hidden_states), ("attentions", attentions)) if asked]
        return {name: tuple(map(torch.cat, zip(*(getattr(output, name) for output in outputs)))) for name in wanted}

    def embed_prompt(
        self, input_ids: torch.LongTensor | None, image_features: list[torch.Tensor], may_be_joined: bool = False
    ) -> torch.Tensor:
        """
        Embed an expanded prompt, with the images' features in place of `<image>`: float[batch, length, hidden].

        Args:
            input_ids: int[batch, length] with one `<image>` per visual token.
            image_features: one float[tokens, hidden] per image, in batch order.
            may_be_joined: see `get_placeholder_mask`.

        Raises:
            ValueError: as `get_placeholder_mask` does.
        """
        self.get_placeholder_mask(input_ids, [len(features) for features in image_features], may_be_joined)
        return self.fill_placeholders(input_ids, image_features)

    def fill_placeholders(self, input_ids: torch.LongTensor, image_features: list[torch.Tensor]) -> torch.Tensor:
        """`embed_prompt` without the check, which reads from the device: images must match the `<image>` tokens."""
        embeds = self.get_input_embeddings()(input_ids)
        mask = (input_ids == self.config.image_token_id).to(embeds.device)
        features = torch.cat(list(image_features)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(mask.unsqueeze(-1), features)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, tokens_per_image: list[int], may_be_joined: bool = False
    ) -> torch.BoolTensor:
        """
        The positions of `<image>` tokens: bool[batch, length].

        Args:
            tokens_per_image: the number of tokens of each image, in batch order.
            may_be_joined: whether a single image may be all of them: a chunked prefill of transformers joins the
                features of all images and rows. Then only the sum is checked.

        Raises:
            ValueError: if `input_ids` are None, or a run of `<image>` tokens ends within an image: it would get a part
                of it, and another run, or another row, the rest.
        """
        if input_ids is None:
            raise ValueError("images need input_ids: their <image> tokens are found by id")
        (run_ends,) = read_integers(self.find_run_ends(input_ids))
        check_placeholders(run_ends, tokens_per_image, may_be_joined)
        return input_ids == self.config.image_token_id

    def find_run_ends(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """
        At the last token of each run of `<image>`, the number of `<image>` tokens up to it, counted over all rows:
        int64[batch, length], 0 elsewhere. A run of two and one of three in two rows: [[0, 0, 2, 0], [0, 0, 0, 5]].
        """
        mask = input_ids == self.config.image_token_id
        follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        return (mask & ~follows) * mask.flatten().cumsum(0).view_as(mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        crop_boxes: torch.LongTensor | None = None,
        cache: Cache | None = None,
        may_be_joined: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MCLlavaModelOutputWithPast:
        """
        See `MCLlavaForConditionalGeneration.forward` and, for `may_be_joined` of `mm_encoder_outputs`,
        `get_placeholder_mask`.
        """
        refuse_zoom("a forward pass", kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        # A chunked prefill passes only the features of encoded images.
        may_be_joined = may_be_joined and encoded is not None and encoded.last_hidden_state is None
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("pass either pixel_values or image features, not both")
            asked = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
            encoded = self.get_image_features(
                pixel_values, crop_coords, crop_num_tokens, image_grid_thw, crop_boxes, return_dict=True, **asked
            )

        cache = one_cache(cache, past_key_values)
        if encoded is not None:
            inputs_embeds = self.embed_prompt(input_ids, encoded.pooler_output, may_be_joined)
        elif inputs_embeds is None:
            self._refuse_places_without_images(input_ids, cache)
            inputs_embeds = self.get_input_embeddings()(input_ids)

        warn_of_float16(inputs_embeds.dtype, inputs_embeds.device)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **{**kwargs, CACHE: cache},
        )
        return MCLlavaModelOutputWithPast(**outputs, image_outputs=encoded)

    def _refuse_places_without_images(self, input_ids: torch.LongTensor, cache: Cache | None):
        """Raise a ValueError if prompts have `<image>` tokens, in a call that got no images."""
        # Skip this check while decoding: reading an id waits for the device. The cache of `generate_batch`, which has
        # made it already, has no length: it holds several prompts.
        is_empty = cache is None or (hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0)
        if torch.compiler.is_compiling() or input_ids.shape[1] == 1 or not is_empty:
            return
        if placeholders := int((input_ids == self.config.image_token_id).sum()):
            raise ValueError(f"the prompts have {placeholders} <image> tokens but got no images: pass the images")


class MCLlavaForConditionalGeneration(MCLlavaPreTrainedModel, MCLlavaGenerationMixin, MCLlavaZoomMixin):
    """
    MC-LLaVA: `MCLlavaModel` with the language model's head, which answers questions about images.

    `forward` takes the processor's fields and returns logits float[batch, length, vocabulary] and, with labels, a
    loss; `generate` generates answers; `encode_images` encodes images once for many questions.
    """

    # transformers adds the language model's plan. The vision tower is small and is replicated on every device.
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        self.model = MCLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        crop_boxes: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See `MCLlavaModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values, crop_coords, crop_num_tokens, image_grid_thw, crop_boxes, **kwargs
        )

    @torch.no_grad()
    def encode_images(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        crop_boxes: torch.LongTensor | None = None,
        **text_inputs,
    ) -> EncodedImages:
        """
        Encode images once for many questions:

            encoded = model.encode_images(**inputs)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            model.generate(**text, image_features=encoded)

        It accepts everything that the processor or the image processor returns, and ignores text inputs.

        Raises:
            ValueError: as `get_image_features` does, if `crop_boxes` are missing, or if weights are offloaded to disk.
        """
        refuse_zoom("encode_images", text_inputs)
        if crop_boxes is None:
            raise ValueError("crop_boxes are missing: pass all that the processor returned")
        features = self.get_image_features(
            pixel_values, crop_coords, crop_num_tokens, image_grid_thw, return_dict=True
        ).pooler_output
        crops = crop_boxes, crop_coords, crop_num_tokens, image_grid_thw
        return EncodedImages(torch.cat(features), *crops, self.hash_encoder())

    def hash_encoder(self) -> str:
        """
        A hash of everything that `EncodedImages` depend on: the weights of vision tower, coordinate embedding and
        projector, what the configuration says of how they compute, and which of PEFT's adapters in them are active,
        with which factor.

        It is computed at each call, because there is no reliable way to tell that weights have changed.

        Raises:
            ValueError: if weights are offloaded to disk.
        """
        parts = self.model.encoder_parts
        weights = hash_tensors(tensor for part in parts for tensor in read_weights(part).values())
        adapters = [(adapter_names(part), adapter_states(part)) for part in parts]
        tower = self.config.vision_config  # all that the shapes of its weights leave open
        computes = (
            tower.hidden_act,
            tower.num_attention_heads,
            tower.layer_norm_eps,
            self.config.projector_hidden_act,
        )
        return hashlib.sha256(f"{weights} {adapters} {computes}".encode()).hexdigest()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_features: EncodedImages | list[torch.Tensor] | torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        crop_boxes: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MCLlavaCausalLMOutputWithPast:
        r"""
        Compute the logits float[batch, length, vocabulary] and, with labels, the loss.

        Args:
            input_ids: int[batch, length] with one `<image>` per visual token.
            pixel_values, crop_boxes, crop_coords, crop_num_tokens, image_grid_thw: the images, as the processor
                returns them.
            cache, past_key_values: keys and values of earlier tokens, under either name.
            image_features: encoded images: what `encode_images` or `get_image_features(...).pooler_output` returns, or
                one float[images, tokens, hidden] tensor.
            labels: int[batch, length], -100 for positions that the loss ignores.
            logits_to_keep: compute only the last `logits_to_keep` logits, or those at these positions; 0 for all.
            mm_encoder_outputs: encoded images in the form that transformers passes around: `{"image": ...}`.

        Raises:
            ValueError: if images don't match the `<image>` tokens in the prompt, or were encoded with other weights.
        """
        mm_encoder_outputs = self._encoder_outputs(image_features, mm_encoder_outputs)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            crop_coords=crop_coords,
            crop_num_tokens=crop_num_tokens,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            crop_boxes=crop_boxes,
            mm_encoder_outputs=mm_encoder_outputs,
            may_be_joined=image_features is None,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return MCLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE: outputs.cache},
        )

    def _encoder_outputs(
        self, image_features: EncodedImages | list[torch.Tensor] | torch.Tensor | None, mm_encoder_outputs: dict | None
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """The encoded images in transformers' form. The object is new because beam search changes it in place."""
        if image_features is None:
            if unknown := sorted(set(mm_encoder_outputs or {}) - {"image"}):
                raise ValueError(f"mm_encoder_outputs hold {unknown}, the model reads only 'image': remove them")
            return {name: copy.copy(output) for name, output in (mm_encoder_outputs or {}).items()} or None
        if mm_encoder_outputs:
            raise ValueError("pass either image_features or mm_encoder_outputs, not both")
        given = [image_features] if is_encoded(image_features) else list(image_features)
        if encoded := [entry for entry in given if is_encoded(entry)]:
            check_weights(encoded, self)
        image_features = [
            features for entry in given for features in (entry.split() if is_encoded(entry) else [entry])
        ]
        hidden_size = self.config.text_config.hidden_size
        for features in image_features:
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != hidden_size:
                raise ValueError(
                    f"image_features must be a [tokens, {hidden_size}] tensor for each image, got {shape}: "
                    "pass a list of what get_image_features returns, or one [images, tokens, hidden] tensor"
                )
        return {"image": BaseModelOutputWithPooling(pooler_output=image_features)} if image_features else None


class MCLlavaAutoModel(MCLlavaPreTrainedModel):
    """
    The class that `AutoModel` finds. It is never instantiated: the published card calls `AutoModel.from_pretrained`
    and then `generate`, which needs the head; vLLM calls `AutoModel.from_config` and adds its own head.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return MCLlavaForConditionalGeneration.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return MCLlavaModel._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        # Under a different name: as AutoModel it would replace this class in every folder that it saves.
        MCLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


# transformers itself drops SigLIP's inner `vision_model.`.
register_checkpoint_conversion_mapping(
    MCLlavaConfig.model_type,
    [WeightRenaming("^" + re.escape(published), ours) for published, ours in PUBLISHED_NAMES.items()],
    overwrite=True,
)

# Saved models then include this code.
MCLlavaAutoModel.register_for_auto_class()
MCLlavaModel.register_for_auto_class("AutoModel")

add_to_package(__name__)

__all__ = [
    "CROPS_PER_PASS",
    "MCLlavaAutoModel",
    "MCLlavaForConditionalGeneration",
    "MCLlavaModel",
    "MCLlavaPreTrainedModel",
]
