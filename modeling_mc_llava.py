"""MC-LLaVA: crops through SigLIP, a few patch tokens of each plus where it lies, projected into Phi's embeddings.

pixel_values [crops, 3, side, side]
  -> vision tower, last block               [crops, patches, vision_hidden]
  -> the last crop_num_tokens[i] patches    [tokens, vision_hidden]
  -> + coord_embed(crop_coords)             [tokens, vision_hidden]
  -> projector                              [tokens, hidden], in place of <image> in the prompt
"""

import copy
import hashlib
import os
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    utils,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_mc_llava import MCLlavaConfig


# Crops that go through the vision tower at once: its memory is bounded by this, not by max_crops.
CROPS_PER_PASS = 16


def count_image_tokens(crop_num_tokens: torch.LongTensor | None, image_grid_thw: torch.LongTensor | None) -> list[int]:
    """How many tokens each image has: the sum over its crops."""
    if crop_num_tokens is None or image_grid_thw is None:
        raise ValueError("pixel_values need crop_num_tokens and image_grid_thw: pass all that the processor returned")
    crops_per_image = image_grid_thw[:, 0].tolist()
    if sum(crops_per_image) != len(crop_num_tokens):
        raise ValueError(
            f"image_grid_thw has {sum(crops_per_image)} crops, crop_num_tokens {len(crop_num_tokens)}: "
            "pass what the processor returned"
        )
    return [int(crops.sum()) for crops in crop_num_tokens.split(crops_per_image)]


@dataclass(frozen=True)
class EncodedImages:
    """
    Images that passed the vision tower and the projector, to be asked about any number of times.

    Made by `encode_images`; `generate` and `forward` take it as `image_features`.

    Args:
        features: float[tokens, hidden], the visual tokens of all images one after another.
        crop_coords, crop_num_tokens, image_grid_thw: the crops that they came from, as the processor returns them.
        weights_hash: of the weights that made them, see `MCLlavaForConditionalGeneration.hash_encoder`.

    Raises:
        ValueError: if the features are not finite floats, or not as many as the crops give tokens.
    """

    features: torch.Tensor
    crop_coords: torch.Tensor
    crop_num_tokens: torch.LongTensor
    image_grid_thw: torch.LongTensor
    weights_hash: str

    def __post_init__(self):
        for name, shape in (("crop_num_tokens", ()), ("image_grid_thw", (3,))):
            counts = getattr(self, name)
            is_valid = counts.dtype == torch.int64 and counts.ndim == len(shape) + 1 and counts.shape[1:] == shape
            if not is_valid or not len(counts) or counts.min() < 1:
                raise ValueError(
                    f"{name} must be int64 counts of at least 1, got {counts.dtype} {list(counts.shape)}: "
                    "encode the images again"
                )
        if not self.features.is_floating_point() or not self.features.isfinite().all():
            raise ValueError("features must be finite floats: encode the images again, in another dtype if need be")
        tokens, crops = sum(self.tokens_per_image), len(self.crop_num_tokens)
        if self.features.ndim != 2 or len(self.features) != tokens or tuple(self.crop_coords.shape) != (crops, 2):
            raise ValueError(
                f"{crops} crops with {tokens} tokens don't fit features {list(self.features.shape)} and crop_coords "
                f"{list(self.crop_coords.shape)}: encode the images again"
            )

    @property
    def tokens_per_image(self) -> list[int]:
        return count_image_tokens(self.crop_num_tokens, self.image_grid_thw)

    def split(self) -> list[torch.Tensor]:
        """One float[tokens, hidden] per image."""
        return list(self.features.split(self.tokens_per_image))

    def to(self, device: str | torch.device) -> "EncodedImages":
        """The same images on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def save(self, path: str | os.PathLike):
        """Write a safetensors file; what made the features stands in its header."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, metadata={"format": "pt", "weights_hash": self.weights_hash})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "EncodedImages":
        """
        Read what `save` wrote.

        Raises:
            ValueError: if the file is no safetensors file, or not one of encoded images.
        """
        names = [field.name for field in fields(cls) if field.name != "weights_hash"]
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in names}
                return cls(**tensors, weights_hash=file.metadata()["weights_hash"])
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} holds no encoded images ({error}): pass a file that save() wrote") from error

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def hash_tensors(tensors) -> str:
    """
    A hash of the bits, dtypes and shapes of tensors, the same on every device.

    Each tensor's 64-bit words are mixed with their places and summed up where they lie: copying a vision tower from a
    GPU for a hash on the CPU would take longer than encoding a picture.

    Raises:
        ValueError: if a tensor has no data here, as where weights wait on a disk.
    """
    odd = 0x5851F42D4C957F2D
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor.is_meta:
            raise ValueError("weights that wait on a disk can't be hashed: load the vision tower to a device")
        octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = nn.functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64)
        keys = (2 * torch.arange(len(words), device=words.device) + 1) * odd  # int64 wraps around
        mixed = (words ^ keys) * odd
        mixed ^= mixed >> 32
        digest.update(f"{tensor.dtype}{list(tensor.shape)}{(mixed * keys).sum().item()}".encode())
    return digest.hexdigest()


class MCLlavaCoordinateEmbedding(nn.Sequential):
    """Takes coordinates in any precision. PEFT puts a trained copy, which may have another one, in a wrapper."""

    def forward(self, coords: torch.Tensor) -> torch.Tensor:
        return super().forward(coords.to(self[0].weight.dtype))


class MCLlavaMultiModalProjector(nn.Module):
    def __init__(self, config: MCLlavaConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(hidden_states)))


class MCLlavaPreTrainedModel(PreTrainedModel):
    config: MCLlavaConfig
    config_class = MCLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # of decoding: a prefill with images looks at its inputs' values
    # SigLIP's pooling head, which the published checkpoint carries and nobody reads.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.(vision_model\.)?head\."]


class MCLlavaModel(MCLlavaPreTrainedModel):
    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        hidden_size = config.vision_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.coord_embed = MCLlavaCoordinateEmbedding(
            nn.Linear(2, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.multi_modal_projector = MCLlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Encode the crops of all images of a batch, `CROPS_PER_PASS` at a time.

        Args:
            pixel_values: float[crops, 3, side, side].
            crop_coords: float[crops, 2], centres of the crops as (x / width, y / height).
            crop_num_tokens: int[crops], tokens to keep of each crop, from 1 to its patches but one.
            image_grid_thw: int[images, 3] with rows [crops of the image, 1, 1].

        Returns:
            `pooler_output`: a list with one float[tokens, hidden] per image, the projected tokens.
            `last_hidden_state`: float[all tokens, vision_hidden], coordinates added, before the projector.

        Raises:
            ValueError: if the four fields don't describe the same crops, or there are none.
        """
        tokens_per_image = count_image_tokens(crop_num_tokens, image_grid_thw)
        if crop_coords is None or not len(pixel_values) == len(crop_coords) == len(crop_num_tokens):
            raise ValueError(
                f"pixel_values, crop_coords and crop_num_tokens describe {len(pixel_values)}, "
                f"{0 if crop_coords is None else len(crop_coords)} and {len(crop_num_tokens)} crops: "
                "pass what the processor returned"
            )
        if not len(pixel_values):
            raise ValueError("there are no crops to encode: pass at least one image")
        patches = self.vision_tower.embeddings.num_patches
        low, high = int(crop_num_tokens.min()), int(crop_num_tokens.max())
        if low < 1 or high >= patches:
            raise ValueError(
                f"crop_num_tokens must lie between 1 and {patches - 1} (patches of a crop, without the first), "
                f"got {low} to {high}"
            )

        # Parameters may be spread over devices or wait on a disk: data moves by its own device, never by theirs.
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        chunks = zip(pixel_values.split(CROPS_PER_PASS), crop_num_tokens.split(CROPS_PER_PASS))
        hidden_states = torch.cat([self._encode_crops(pixels, kept, **kwargs) for pixels, kept in chunks])
        positions = self.coord_embed(crop_coords).to(hidden_states.device)
        hidden_states = hidden_states + positions.repeat_interleave(
            crop_num_tokens.to(hidden_states.device), dim=0, output_size=len(hidden_states)
        )
        image_features = self.multi_modal_projector(hidden_states)

        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=list(image_features.split(tokens_per_image))
        )

    def _encode_crops(self, pixel_values: torch.Tensor, num_tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        """The last `num_tokens[i]` patches of crop i, after the last block and before `post_layernorm`."""
        hidden_states = self.vision_tower.embeddings(pixel_values)
        hidden_states = self.vision_tower.encoder(inputs_embeds=hidden_states, **kwargs).last_hidden_state
        patches = hidden_states.shape[1]
        first_kept = patches - num_tokens.to(hidden_states.device)
        return hidden_states[torch.arange(patches, device=hidden_states.device) >= first_kept[:, None]]

    def embed_prompt(self, input_ids: torch.LongTensor | None, image_features: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings of an expanded prompt with the images' tokens in their places: float[batch, length, hidden]."""
        mask = self.get_placeholder_mask(input_ids, [len(features) for features in image_features])
        embeds = self.get_input_embeddings()(input_ids)
        features = torch.cat(list(image_features)).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(mask.to(embeds.device).unsqueeze(-1), features)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, tokens_per_image: list[int]
    ) -> torch.BoolTensor:
        """
        Where the image tokens stand: bool[batch, length].

        Raises:
            ValueError: if the `<image>`s of some row are not as many as the tokens of its images, in batch order.
        """
        if input_ids is None:
            raise ValueError("images need input_ids: their places are found by the id of <image>")
        mask = input_ids == self.config.image_token_id
        row_ends, image_ends = mask.sum(-1).cumsum(0).tolist(), list(accumulate(tokens_per_image))
        # A chunked prefill hands over the tokens of all images and rows as those of a single one.
        is_split = len(image_ends) > 1 and not set(row_ends) <= {0, *image_ends}
        if row_ends[-1] != image_ends[-1] or is_split:
            raise ValueError(
                f"the rows have {mask.sum(-1).tolist()} <image> tokens, the images {tokens_per_image} tokens: "
                "use the processor's input_ids with its images, unshortened"
            )
        return mask

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("pass either pixel_values or image features, not both")
            encoded = self.get_image_features(
                pixel_values, crop_coords, crop_num_tokens, image_grid_thw, return_dict=True
            )

        if encoded is not None:
            inputs_embeds = self.embed_prompt(input_ids, encoded.pooler_output)
        elif inputs_embeds is None:
            if not torch.compiler.is_compiling() and (
                past_key_values is None or past_key_values.get_seq_length() == 0
            ):
                if places := int((input_ids == self.config.image_token_id).sum()):
                    raise ValueError(f"the prompts have {places} <image> tokens but no image came: pass the images")
            inputs_embeds = self.get_input_embeddings()(input_ids)

        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class ContextEnd(StoppingCriteria):
    """Stops each row where its prompt and new tokens fill the language model's context."""

    def __init__(self, prompt_length: int, room: torch.LongTensor):
        self.prompt_length = prompt_length  # columns of the sequences that are not new
        self.room = room  # int[batch]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        room = self.room.to(input_ids.device)
        room = room.repeat_interleave(len(input_ids) // len(room))  # beams and return sequences
        return input_ids.shape[1] - self.prompt_length >= room


class MCLlavaForConditionalGeneration(MCLlavaPreTrainedModel, GenerationMixin):
    # The language model's own plan is collected; the vision tower is small and stays whole on every device.
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MCLlavaConfig):
        super().__init__(config)
        self.model = MCLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *, subfolder="", **kwargs):
        # transformers reads a local folder's own generation_config.json in the place of its subfolder's.
        if path is not None and os.path.isdir(path):
            path, subfolder = os.path.join(path, subfolder), ""
        super().adjust_generation_fn(
            generation_config, from_auto_class, from_pipeline, path, subfolder=subfolder, **kwargs
        )
        # The published generation_config.json names no token: generation would run past <|im_end|>.
        self.generation_config._from_model_config = False
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See `MCLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, crop_coords, crop_num_tokens, image_grid_thw, **kwargs)

    @torch.no_grad()
    def encode_images(
        self,
        pixel_values: torch.Tensor,
        crop_coords: torch.Tensor | None = None,
        crop_num_tokens: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **text_inputs,
    ) -> EncodedImages:
        """
        Encode images once, to ask about them many times:

            encoded = model.encode_images(**inputs)
            text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            model.generate(**text, image_features=encoded)

        Takes all that the processor or the image processor returned, and reads its four image fields.

        Raises:
            ValueError: as `get_image_features`, and if weights wait on a disk.
        """
        features = self.get_image_features(
            pixel_values, crop_coords, crop_num_tokens, image_grid_thw, return_dict=True
        ).pooler_output
        return EncodedImages(torch.cat(features), crop_coords, crop_num_tokens, image_grid_thw, self.hash_encoder())

    def hash_encoder(self) -> str:
        """
        A hash of what `EncodedImages` depend on: the weights of vision tower, coordinate embedding and projector, and
        which of PEFT's adapters in them are on.

        It is worked out at each call, as nothing tells reliably that weights have been trained in between.
        """
        parts = (self.model.vision_tower, self.model.coord_embed, self.model.multi_modal_projector)
        weights = hash_tensors(tensor for part in parts for tensor in part.state_dict().values())
        adapters = [
            (module.disable_adapters, module.active_adapters)
            for part in parts
            for module in part.modules()
            if isinstance(getattr(module, "disable_adapters", None), bool)  # a method where none was added
        ]
        return hashlib.sha256(f"{weights} {adapters}".encode()).hexdigest()

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutputWithPast:
        r"""
        Args:
            input_ids: int[batch, length] with one `<image>` per visual token.
            pixel_values, crop_coords, crop_num_tokens, image_grid_thw: the images, as the processor returns them.
            image_features: the images, encoded: what `encode_images` or `get_image_features(...).pooler_output` gives,
                or one float[images, tokens, hidden] tensor.
            labels: int[batch, length], -100 where there is nothing to learn.
            logits_to_keep: how many logits to compute, counted from the end; 0 for all.
            mm_encoder_outputs: the images, encoded, as transformers hands them around: `{"image": ...}`.

        Raises:
            ValueError: if images and their places in the prompt don't match, or were encoded with other weights.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            crop_coords=crop_coords,
            crop_num_tokens=crop_num_tokens,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=self._encoder_outputs(image_features, mm_encoder_outputs),
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _encoder_outputs(
        self, image_features: EncodedImages | list[torch.Tensor] | torch.Tensor | None, mm_encoder_outputs: dict | None
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """The encoded images in transformers' form, in a new object, as beams change theirs in place."""
        if image_features is None:
            if unknown := sorted(set(mm_encoder_outputs or {}) - {"image"}):
                raise ValueError(f"mm_encoder_outputs hold {unknown}, the model reads 'image' alone: remove them")
            return {name: copy.copy(output) for name, output in (mm_encoder_outputs or {}).items()} or None
        if mm_encoder_outputs:
            raise ValueError("pass either image_features or mm_encoder_outputs, not both")
        # Each copy of this file that transformers loads has an EncodedImages of its own: ask for what it can do.
        if hasattr(image_features, "weights_hash"):
            if image_features.weights_hash != self.hash_encoder():
                raise ValueError(
                    "the images were encoded with other weights of vision tower, coordinate embedding or projector "
                    "(or another dtype): encode them again with this model"
                )
            image_features = image_features.split()
        image_features = list(image_features)
        hidden_size = self.config.text_config.hidden_size
        for features in image_features:
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != hidden_size:
                raise ValueError(
                    f"image_features must be a [tokens, {hidden_size}] tensor for each image, got {shape}: "
                    "pass a list of what get_image_features returns, or one [images, tokens, hidden] tensor"
                )
        return {"image": BaseModelOutputWithPooling(pooler_output=image_features)} if image_features else None

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        *,
        image_features=None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """
        As transformers' own, and besides:

        - `image_features` takes encoded images. The prompt then has one `<image>` per visual token or, in short, one
          per image; in the short form sequences and streamers start with the prompt as given, and `max_new_tokens`
          and `min_new_tokens` count.
        - A prompt that fills the context is refused before a crop is encoded, and each row ends where it fills it.
        - `<image>` is never generated.

        Raises:
            ValueError: if the prompt leaves no room for an answer, if images and their places don't match or were
                encoded with other weights, or if an option can't go with images or with the short form.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        inputs_embeds, attention_mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        encoded = self._encoder_outputs(image_features, kwargs.pop("mm_encoder_outputs", None))
        if kwargs.get("pixel_values") is not None:
            if encoded:
                raise ValueError("pass either pixel_values or image features, not both")
            tokens_per_image = count_image_tokens(kwargs.get("crop_num_tokens"), kwargs.get("image_grid_thw"))
        else:
            tokens_per_image = [len(features) for features in encoded["image"].pooler_output] if encoded else []

        if inputs_embeds is not None:
            if tokens_per_image:
                raise ValueError("images need input_ids, not inputs_embeds: their places are found by <image>'s id")
            if attention_mask is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long)
            self._check_context(inputs_embeds.new_zeros(inputs_embeds.shape[:2]), attention_mask, [])
        elif input_ids is not None:
            if attention_mask is None:
                pad_token_id = -1 if self.config.pad_token_id is None else self.config.pad_token_id
                attention_mask = (input_ids != pad_token_id).long()
            # A cache holds the images of earlier turns: only what it hasn't seen has places to fill.
            new_ids = input_ids
            if (cache := kwargs.get("past_key_values")) is not None and attention_mask.shape == input_ids.shape:
                new_ids = input_ids[:, int(cache.get_seq_length()) :]
            places = int((new_ids == self.config.image_token_id).sum())
            if places and not tokens_per_image:
                raise ValueError(f"the prompt has {places} <image> tokens but no image came: pass one, or remove them")
            is_short = bool(encoded) and places == len(tokens_per_image) != sum(tokens_per_image)
            if tokens_per_image:
                self._refuse_options(is_short, generation_config, kwargs)
            if is_short:
                new_ids, attention_mask = self._expand_prompt(input_ids, attention_mask, tokens_per_image)
            self._check_context(new_ids, attention_mask, tokens_per_image)
            if is_short:
                # Given both, transformers keeps input_ids in the sequences and feeds the embeddings to the model.
                kwargs["inputs_embeds"] = self.model.embed_prompt(new_ids, encoded["image"].pooler_output)
            elif encoded:
                kwargs["mm_encoder_outputs"] = encoded
            kwargs["attention_mask"] = attention_mask

        if attention_mask is not None:
            prompt_length = 0 if input_ids is None else input_ids.shape[1]
            room = self.config.text_config.max_position_embeddings - attention_mask.sum(-1)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), ContextEnd(prompt_length, room)])
            if kwargs.get("max_new_tokens") is not None:  # assisted decoding accepts several tokens between two checks
                kwargs["max_new_tokens"] = min(kwargs["max_new_tokens"], int(room.max()))
        never = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.lm_head.bias.device)
        return super().generate(
            input_ids,
            generation_config,
            LogitsProcessorList([*(logits_processor or []), never]),
            stopping_criteria,
            **kwargs,
        )

    def _refuse_options(self, is_short: bool, generation_config, kwargs: dict):
        """ValueError for options that would go wrong without a word."""

        def value(name):
            configs = (generation_config, self.generation_config)
            given = [kwargs.get(name), *(getattr(config, name, None) for config in configs if config is not None)]
            return next((value for value in given if value), None)

        for name in ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"):
            if value(name) is not None:  # drafts would be made without the images, or of <image> tokens
                raise ValueError(f"{name} can't go with images: leave it out")
        chunk_size = value("prefill_chunk_size")
        if chunk_size and not hasattr(utils, "_slice_mm_encoder_output"):  # older releases leave the images out of it
            raise ValueError("prefill_chunk_size with images needs transformers 5.23: upgrade or leave it out")
        if not is_short:
            return
        # These look at the prompt as given, while the model sees the expanded one.
        for name in ("max_length", "min_length"):
            if length := value(name):
                raise ValueError(
                    f"{name}={length} can't be counted with one <image> per image: use {name[:3]}_new_tokens instead"
                )
        for name in ("past_key_values", "prefill_chunk_size"):
            if value(name) is not None:
                raise ValueError(f"{name} can't go with one <image> per image: pass one <image> per visual token")

    def _expand_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, tokens_per_image: list[int]
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        From one `<image>` per image to one per visual token, padded on the left anew. Images of 3 and 2 tokens:

            <pad>  a  <image>  b        a  <image> <image> <image>  b
              c    d  <image>  e        c     d    <image> <image>  e
        """
        counts = iter(tokens_per_image)
        rows = []
        for ids, kept in zip(input_ids, attention_mask.bool()):
            ids = ids[kept]
            repeats = [next(counts) if place else 1 for place in (ids == self.config.image_token_id).tolist()]
            rows.append(ids.repeat_interleave(torch.tensor(repeats, device=ids.device)))
        masks = [torch.ones_like(row) for row in rows]
        pad_token_id = self.config.pad_token_id or 0
        return (
            pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side="left"),
            pad_sequence(masks, batch_first=True, padding_side="left"),
        )

    def _check_context(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, tokens_per_image: list[int]):
        """ValueError if images don't fit their places, or a row has no room for an answer."""
        image_tokens = [0] * len(input_ids)
        if tokens_per_image:
            image_tokens = self.model.get_placeholder_mask(input_ids, tokens_per_image).sum(-1).tolist()
        limit = self.config.text_config.max_position_embeddings
        ends = list(accumulate(tokens_per_image))
        start, fitting = 0, []
        for length, in_row in zip(attention_mask.sum(-1).tolist(), image_tokens):
            images = sum(start < end <= start + in_row for end in ends)
            start += in_row
            if length >= limit:
                fitting.append((limit - 1 - (length - in_row)) // images if images else 0)
        if fitting:
            remedy = f"pass num_tokens={min(fitting)} or less" if min(fitting) > 0 else "shorten the text"
            raise ValueError(
                f"the prompt has {int(attention_mask.sum(-1).max())} tokens, the context {limit} "
                f"(max_position_embeddings), which leaves no room for an answer: {remedy}"
            )


class MCLlavaAutoModel(MCLlavaPreTrainedModel):
    """
    What `AutoModel` finds; never an object. The published card calls `AutoModel.from_pretrained` and then `generate`;
    vLLM calls `AutoModel.from_config` for the model without its head, and brings its own.
    """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return MCLlavaForConditionalGeneration.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return MCLlavaModel._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        # Under a name of its own: as AutoModel it would take this class's place in every folder that it saves.
        MCLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")


# The names in the published checkpoint. transformers itself drops SigLIP's inner `vision_model.`.
register_checkpoint_conversion_mapping(
    MCLlavaConfig.model_type,
    [
        WeightRenaming(r"^vision_model\.vision_tower\.", "model.vision_tower."),
        WeightRenaming(r"^vision_model\.coord_embed\.", "model.coord_embed."),
        WeightRenaming(r"^multi_modal_projector\.", "model.multi_modal_projector."),
        WeightRenaming(r"^language_model\.model\.", "model.language_model."),
        WeightRenaming(r"^language_model\.lm_head\.", "lm_head."),
    ],
    overwrite=True,
)

# So that whatever is saved takes this code along.
MCLlavaAutoModel.register_for_auto_class()
MCLlavaModel.register_for_auto_class("AutoModel")

__all__ = [
    "EncodedImages",
    "MCLlavaAutoModel",
    "MCLlavaForConditionalGeneration",
    "MCLlavaModel",
    "MCLlavaPreTrainedModel",
]
