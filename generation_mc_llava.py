"""`generate` for prompts with images: checks of its options, the end of the context, and prompts in short form."""

import inspect
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .crops_mc_llava import IMAGE_FIELDS, ZOOM_FIELDS
from .encoded_images_mc_llava import check_counts, check_placeholders, count_placeholders, read_integers, sum_per_image
from .prefix_cache_mc_llava import PrefixCache, refuse_prefixes


if TYPE_CHECKING:  # at run time it would import the loading of images
    from .feature_cache_mc_llava import FeatureCache

# The installed transformers' name for the keys and values of earlier tokens, `cache` since 5.24. Callers may use
# either name; calls to transformers use this one.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


# Options of `generate` for reproducible answers, whatever the checkpoint's defaults are.
GREEDY = {"do_sample": False, "num_beams": 1}
# Options that look at the ids of the prompt, with the values that change nothing. transformers ignores them if it gets
# embeddings, as with the short form and with a `PrefixCache`.
ABOUT_PROMPT_IDS = {"encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1}
# Options of `generate` that can't be combined with a `PrefixCache`: other caches and other ways to fill them, outputs
# for all tokens of the prompt, some of which are not computed again, and what needs or changes its ids.
NOT_WITH_PREFIXES = (
    *CACHE_NAMES,
    "cache_implementation",
    "prefill_chunk_size",
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "token_healing",
    *ABOUT_PROMPT_IDS,
)


def one_cache(cache, past_key_values):
    """
    The cache, passed under either of its names, or None.

    Raises:
        ValueError: if it was passed under both names, or is a tuple, as in old releases of transformers.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names for the same argument: pass only one")
    found = past_key_values if cache is None else cache
    if isinstance(found, (tuple, list)):
        raise ValueError(f"a cache can't be a {type(found).__name__}: pass a DynamicCache or another Cache")
    return found


def is_set(name: str, value) -> bool:
    """Whether the value of an option changes anything. An empty cache does, although it is falsy."""
    is_neutral = name in ABOUT_PROMPT_IDS and value == ABOUT_PROMPT_IDS[name]
    return value is not None and value is not False and not is_neutral


def find_option(model, name: str, generation_config, options: dict):
    """The value of an option of `generate`: the call's, or else a given or the saved configuration's, or None."""
    if name in options:
        return options[name]
    given = [getattr(config, name, None) for config in (generation_config, model.generation_config)]
    return next((value for value in given if value is not None), None)


def find_ends(model, generation_config, options: dict) -> list[int]:
    """The ids that end an answer. transformers takes one, several, a tensor of them, or None."""
    ends = find_option(model, "eos_token_id", generation_config, options)
    ends = ends.tolist() if isinstance(ends, torch.Tensor) else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def check_cache(cache: Cache, input_ids: torch.LongTensor) -> int:
    """The number of tokens in a cache. Raises a ValueError unless `input_ids`, which start with them, have more."""
    known, length = int(cache.get_seq_length()), input_ids.shape[1]
    if 0 < known >= length:
        raise ValueError(
            f"the cache holds {known} tokens and input_ids have {length}: pass the input_ids of all turns with one "
            "<image> per visual token, or only new ones and an attention_mask for all"
        )
    return known


def check_images(encoded: dict[str, ModelOutput] | None, kwargs: dict):
    """
    Raise a ValueError if images come both as pixels and encoded, as pixels without their counts, or with `zoom` where
    there is nothing to look at.

    Args:
        encoded: the encoded images, or None.
        kwargs: the other arguments of `generate`.
    """
    if kwargs.get("zoom_options") is not None and (encoded or kwargs.get(CACHE) is not None):
        other = "image features" if encoded else "a cache"
        raise ValueError(f"zoom can't be combined with {other}: call the processor with zoom=0")
    if kwargs.get("pixel_values") is not None:
        if encoded:
            raise ValueError("pass either pixel_values or image features, not both")
        check_counts(kwargs.get("crop_num_tokens"), kwargs.get("image_grid_thw"))


@dataclass(frozen=True)
class GenerationRequest:
    """
    The arguments of a call to `generate`.

    Args:
        input_ids: int[batch, length] as passed, or None.
        new_ids: int[batch, new], the ids that are not in a cache, or zeros if embeddings were passed. None without a
            prompt.
        attention_mask: int[batch, all], including tokens in a cache.
        encoded: the encoded images in the form that transformers passes around, or None.
        tokens_per_image: the number of visual tokens of each image, whether passed as pixels or encoded.
        lengths: the number of tokens of each row, including those in a cache, without padding.
        run_ends: where `new_ids` have `<image>` tokens, see `find_run_ends`.
        is_short: whether `input_ids` have one `<image>` per image instead of one per visual token. `_expand_prompt`
            replaces `new_ids`, `attention_mask`, `lengths` and `run_ends` by those of the long form.
    """

    input_ids: torch.LongTensor | None
    new_ids: torch.LongTensor | None
    attention_mask: torch.Tensor | None
    encoded: dict[str, ModelOutput] | None
    tokens_per_image: list[int]
    lengths: list[int]
    run_ends: list[list[int]]
    is_short: bool

    @property
    def prompt_length(self) -> int:
        """The number of columns of the returned sequences that hold the prompt."""
        return 0 if self.input_ids is None else self.input_ids.shape[1]


def check_context(config, lengths: list[int], image_tokens: list[int], images: list[int]):
    """
    Check that prompts leave room for an answer, whether or not their images are encoded already.

    Args:
        config: `MCLlavaConfig`.
        lengths, image_tokens, images: of each prompt, the number of all tokens, of those of images, and of images.

    Raises:
        ValueError: if one doesn't, with the largest `num_tokens` with which all would.
    """
    limit = config.text_config.max_position_embeddings
    fitting = [
        (limit - 1 - (length - in_row)) // count if count else 0
        for length, in_row, count in zip(lengths, image_tokens, images)
        if length >= limit
    ]
    if fitting:
        remedy = f"pass num_tokens={min(fitting)} or less" if min(fitting) > 0 else "shorten the text"
        raise ValueError(
            f"the prompt has {max(lengths)} tokens, the context {limit} "
            f"(max_position_embeddings), which leaves no room for an answer: {remedy}"
        )


class ContextEnd(StoppingCriteria):
    """Stops each row when its prompt and new tokens fill the language model's context."""

    def __init__(self, prompt_length: int, room: torch.LongTensor):
        self.prompt_length = prompt_length  # columns of the sequences that hold the prompt
        self.room = room  # int[batch], in tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        room = self.room.to(input_ids.device)
        room = room.repeat_interleave(len(input_ids) // len(room))  # beams and return sequences
        return input_ids.shape[1] - self.prompt_length >= room


def pad_prompts(rows: list[torch.LongTensor], pad_token_id: int | None) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and mask of prompts of several lengths, padded on the left: int64[batch, length] each."""
    masks = [torch.ones_like(row) for row in rows]
    return (
        pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0, padding_side="left"),
        pad_sequence(masks, batch_first=True, padding_side="left"),
    )


class SuppressToken(LogitsProcessor):
    """
    Sets the logit of one token to -inf, so that it is never generated. transformers' `SuppressTokensLogitsProcessor`
    compares the whole vocabulary at each step, which takes as long as a small layer.
    """

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()  # `output_logits` returns this tensor
        scores[:, self.token_id] = -torch.inf
        return scores


class MCLlavaGenerationMixin(GenerationMixin):
    """`generate` for `MCLlavaForConditionalGeneration`, which provides the parameters and the forward pass."""

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, *, subfolder="", **kwargs):
        # For a subfolder of a local folder, transformers would read the parent folder's generation_config.json.
        if path is not None and os.path.isdir(path):
            path, subfolder = os.path.join(path, subfolder), ""
        super().adjust_generation_fn(
            generation_config, from_auto_class, from_pipeline, path, subfolder=subfolder, **kwargs
        )
        # The published generation_config.json names no token: generation would run past <|im_end|>.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        image_features=None,
        feature_cache: "FeatureCache | None" = None,
        prefix_cache: PrefixCache | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """
        Generate token ids with transformers' `generate`, with these differences:

        - Images may be passed as pixels, in the fields of the processor, or encoded, as `image_features`. With
          `image_features`, the prompt has one `<image>` per visual token or, in the short form, one per image. In the
          short form, sequences and streamers start with the prompt as passed, and lengths are limited by
          `max_new_tokens` and `min_new_tokens`, not by `max_length` and `min_length`.
        - A prompt that fills the context is rejected before any crop is encoded, and each row ends when it fills the
          context.
        - `<image>` is never generated.

        Args:
            inputs: int[batch, length], the prompts, padded on the left; also accepted as `input_ids`.
            image_features: what `encode_images` or `get_image_features(...).pooler_output` returns, or one
                float[images, tokens, hidden] tensor.
            feature_cache: for guided zoom, a `FeatureCache` of crops. Only crops that it lacks are encoded.
            prefix_cache: a `PrefixCache`. The keys and values that it holds for the beginnings of the prompts are
                reused, and new ones are stored in it.
            generation_config, logits_processor, stopping_criteria, kwargs: as in transformers. Keys and values of
                earlier turns may be passed as `cache` or as `past_key_values`, in all releases of transformers.

        Returns:
            int[batch, length + new], the prompts and the new tokens, or a `ModelOutput` with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: if the prompt leaves no room for an answer, if images don't match the `<image>` tokens or were
                encoded with other weights, or if an option can't be combined with images or with the short form.
        """
        if kwargs.get("tokenizer") is not None:  # for stop strings; `transformers serve` passes the processor
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        if prefix_cache is not None:
            self._refuse_with_prefixes(generation_config, kwargs)
        request = self._prepare_request(inputs, image_features, generation_config, kwargs)

        has_prompt = request.new_ids is not None
        is_kept = has_prompt and prefix_cache is not None
        looked = self._pass_on_images(request, feature_cache, prefix_cache, kwargs)
        if is_kept:
            prompts, repeats = self._load_prefixes(prefix_cache, request, generation_config, kwargs)
        if has_prompt:
            kwargs["attention_mask"] = request.attention_mask
            stopping_criteria = self._end_at_context(request, stopping_criteria, generation_config, kwargs)
        output = super().generate(
            request.input_ids,
            generation_config,
            # First: if a caller's filter, such as top-k of 1, kept only <image>, no token would be left.
            LogitsProcessorList([SuppressToken(self.config.image_token_id), *(logits_processor or [])]),
            stopping_criteria,
            **kwargs,
        )

        if is_kept:
            sequences = output.sequences if isinstance(output, ModelOutput) else output
            # Beams move between rows, so that only the prompts are known to be in their own rows.
            new_embeds = self.get_input_embeddings()(sequences[:, request.prompt_length :]) if repeats == 1 else None
            prefix_cache.keep(prompts, kwargs[CACHE], new_embeds, repeats)
        return self._add_fields(output, looked) if isinstance(output, ModelOutput) else output

    def generate_batch(self, inputs, *args, **kwargs):
        """
        transformers' continuous batching of prompts without images.

        Raises:
            ValueError: if a prompt has `<image>` tokens: there is no way to pass images.
        """
        if any(self.config.image_token_id in ids for ids in inputs):
            raise ValueError("generate_batch takes no images: remove <image>, or call generate")
        return super().generate_batch(inputs, *args, **kwargs)

    def encode_prefix(self, prefix_cache: PrefixCache | None = None, **inputs) -> PrefixCache:
        """
        Compute the keys and values of prompts without answering them, for later prompts with the same beginning:

            kept = model.encode_prefix(**processor("What is it?", picture))
            model.generate(**processor("Where is it?", picture), prefix_cache=kept)

        Args:
            prefix_cache: the cache to fill, by default a new `PrefixCache`.
            inputs: the prompts and their images, as `generate` takes them.

        Returns:
            The cache.

        Raises:
            ValueError: as `generate` does.
        """
        kept = PrefixCache() if prefix_cache is None else prefix_cache
        self.generate(**inputs, **GREEDY, num_return_sequences=1, max_new_tokens=1, prefix_cache=kept)
        return kept

    def _prepare_request(self, inputs, image_features, generation_config, kwargs: dict) -> GenerationRequest:
        """Read and check the arguments, and expand a prompt in short form."""
        request = self._read_request(inputs, image_features, generation_config, kwargs)
        if request.tokens_per_image:
            self._refuse_options(request.is_short, generation_config, kwargs)
        if request.is_short:
            request = self._expand_prompt(request)
        if request.new_ids is not None:
            self._check_context(request.lengths, request.run_ends, request.tokens_per_image)
        return request

    def _read_request(
        self, input_ids: torch.LongTensor | None, image_features, generation_config, kwargs: dict
    ) -> GenerationRequest:
        """Collect the arguments, and remove from `kwargs` those that transformers must not get under their names."""
        if input_ids is None:
            input_ids = kwargs.pop("input_ids", None)
        cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            kwargs[CACHE] = cache
        encoded = self._encoder_outputs(image_features, kwargs.pop("mm_encoder_outputs", None))
        tokens_per_image = [len(features) for features in encoded["image"].pooler_output] if encoded else []
        check_images(encoded, kwargs)
        has_images = tokens_per_image or kwargs.get("pixel_values") is not None
        if has_images and kwargs.get("inputs_embeds") is not None:
            raise ValueError("images need input_ids, not inputs_embeds: their <image> tokens are found by id")

        new_ids, attention_mask = self._read_ids(input_ids, cache, generation_config, kwargs)
        lengths, run_ends, counts = [], [], []
        if new_ids is not None:
            lengths, run_ends, *counts = self._read_prompts(new_ids, attention_mask, kwargs)
        if counts:
            tokens_per_image = sum_per_image(*counts)
        placeholders = sum(count_placeholders(run_ends))
        if placeholders and not tokens_per_image:
            raise ValueError(
                f"the prompt has {placeholders} <image> tokens but got no images: pass them, or remove <image>"
            )
        if tokens_per_image and not placeholders and cache is not None:
            raise ValueError(
                "the cache holds the images of earlier turns, and the new input_ids have no <image> token: pass "
                "input_ids and attention_mask with the cache, without images"
            )
        is_short = encoded is not None and placeholders == len(tokens_per_image) != sum(tokens_per_image)
        return GenerationRequest(
            input_ids, new_ids, attention_mask, encoded, tokens_per_image, lengths, run_ends, is_short
        )

    def _read_ids(
        self, input_ids: torch.LongTensor | None, cache: Cache | None, generation_config, kwargs: dict
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
        """`new_ids` and `attention_mask` of a `GenerationRequest`."""
        embeds, attention_mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        new_ids = input_ids
        if embeds is not None:
            new_ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            if attention_mask is None:
                attention_mask = torch.ones_like(new_ids)
        elif input_ids is not None:
            if attention_mask is None:
                attention_mask = self._mask_padding(input_ids, generation_config, kwargs)
            # A cache holds the images of earlier turns: only ids that are not in it have placeholders.
            if cache is not None and attention_mask.shape == input_ids.shape:
                new_ids = input_ids[:, check_cache(cache, input_ids) :]
        if new_ids is not None and not new_ids.numel():
            raise ValueError("the prompt is empty: pass at least one token in each row")
        return new_ids, attention_mask

    def _read_prompts(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, images: dict | None = None):
        """
        The lengths of the rows, `find_run_ends`, and with images in pixels also the number of tokens of each crop and
        of crops of each image. They are read from the device at once.
        """
        tensors = [attention_mask.sum(-1), self.model.find_run_ends(input_ids)]
        if images and images.get("pixel_values") is not None:
            tensors += [images["crop_num_tokens"], images["image_grid_thw"][:, 0]]
        return read_integers(*tensors)

    def _mask_padding(
        self, input_ids: torch.LongTensor, generation_config=None, kwargs: dict | None = None
    ) -> torch.LongTensor:
        """
        The attention mask of prompts that came without one: int64[batch, length], 0 for padding. As in transformers,
        nothing is taken for padding if the pad token also ends a turn.
        """
        pad = find_option(self, "pad_token_id", generation_config, kwargs or {})
        pad = self.config.pad_token_id if pad is None else pad
        if pad is None or pad in find_ends(self, generation_config, kwargs or {}):
            return torch.ones_like(input_ids, dtype=torch.long)
        return (input_ids != pad).long()

    def _pass_on_images(
        self,
        request: GenerationRequest,
        feature_cache: "FeatureCache | None",
        prefix_cache: PrefixCache | None,
        kwargs: dict,
    ):
        """
        Put the images into `kwargs` in the form in which transformers' `generate` takes them. Returns the `Looks` of
        guided zoom, or None without it. For a prefix cache, pixels are encoded here rather than in the forward pass.
        """
        zoom = {name: value for name in ZOOM_FIELDS if (value := kwargs.pop(name, None)) is not None}
        if zoom:
            images = {name: kwargs.pop(name, None) for name in IMAGE_FIELDS}
            prompts = request.new_ids, request.attention_mask
            looked = self._look(*prompts, {**images, **zoom}, feature_cache, prefix_cache)
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=looked.features)}
            return looked
        if feature_cache is not None and kwargs.get("pixel_values") is not None:
            raise ValueError(
                "feature_cache needs the pictures, which the processor returns only with zoom: pass feature_cache and "
                "the model to the processor instead, or call it with zoom"
            )
        if request.is_short:
            # Given both, transformers keeps input_ids in the sequences and feeds the embeddings to the model.
            kwargs["inputs_embeds"] = self.model.fill_placeholders(
                request.new_ids, request.encoded["image"].pooler_output
            )
        elif request.encoded:
            kwargs["mm_encoder_outputs"] = request.encoded
        elif request.tokens_per_image and prefix_cache is not None:
            images = {name: kwargs.pop(name, None) for name in IMAGE_FIELDS}
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**images, return_dict=True)}

    def _load_prefixes(self, prefix_cache: PrefixCache, request: GenerationRequest, generation_config, kwargs: dict):
        """
        Put the prompts' embeddings, by which the cache identifies tokens, and its keys and values into `kwargs`.
        Returns the `Prompts`, and the number of rows that each of them will have.
        """
        encoded = kwargs.pop("mm_encoder_outputs", None)
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = (
                self.model.fill_placeholders(request.new_ids, encoded["image"].pooler_output)
                if encoded
                else self.get_input_embeddings()(request.new_ids)
            )
        cache, prompts = prefix_cache.load(self, kwargs["inputs_embeds"], request.attention_mask)
        names = ("num_beams", "num_return_sequences")
        repeats = max(find_option(self, name, generation_config, kwargs) or 1 for name in names)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        kwargs[CACHE] = cache
        return prompts, repeats

    def _add_fields(self, output: ModelOutput, looked) -> ModelOutput:
        """
        The output with its keys and values as `cache` in all releases of transformers, and with the `zoomed_images` of
        guided zoom.
        """
        if CACHE != "cache":
            output.cache = output.get(CACHE)
        if looked is not None:
            output.zoomed_images = self._zoomed_images(looked)
        return output

    def _end_at_context(
        self, request: GenerationRequest, stopping_criteria, generation_config, kwargs: dict
    ) -> StoppingCriteriaList:
        """The stopping criteria with one more, which ends each row where the context ends."""
        context = self.config.text_config.max_position_embeddings
        # Assisted decoding accepts several tokens between two checks of a criterion.
        max_new_tokens = find_option(self, "max_new_tokens", generation_config, kwargs)
        if max_new_tokens is not None and max_new_tokens > (most := context - min(request.lengths)):
            kwargs["max_new_tokens"] = most
        room = context - request.attention_mask.sum(-1)
        return StoppingCriteriaList([*(stopping_criteria or []), ContextEnd(request.prompt_length, room)])

    def _refuse_with_prefixes(self, generation_config, kwargs: dict):
        """Raise a ValueError for what can't be combined with a prefix cache."""
        refuse_prefixes(self)
        value = partial(find_option, self, generation_config=generation_config, options=kwargs)
        refused = [name for name in NOT_WITH_PREFIXES if is_set(name, value(name))]
        if value("use_cache") is False:
            refused.append("use_cache=False")
        if refused:
            raise ValueError(f"prefix_cache can't be combined with {', '.join(refused)}: leave one of them out")

    def _refuse_options(self, is_short: bool, generation_config, kwargs: dict):
        """Raise a ValueError for options that would silently give wrong results."""
        value = partial(find_option, self, generation_config=generation_config, options=kwargs)
        # Drafts would ignore the images, or consist of <image> tokens; healing decodes the prompt without them.
        for name in ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "token_healing"):
            if is_set(name, value(name)):
                raise ValueError(f"{name} can't be combined with images: leave it out")
        if value("prefill_chunk_size") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            # Older releases drop the images.
            raise ValueError("prefill_chunk_size with images needs transformers 5.23: upgrade or leave it out")
        if not is_short:
            return
        # These refer to the prompt as passed, while the model gets the expanded one.
        for name in ("max_length", "min_length"):
            length = value(name)
            if length and value(f"{name[:3]}_new_tokens") is None:  # which takes precedence
                raise ValueError(
                    f"{name}={length} can't be counted with one <image> per image: use {name[:3]}_new_tokens instead"
                )
        for name in (CACHE, "position_ids", "prefill_chunk_size", *ABOUT_PROMPT_IDS):
            if is_set(name, value(name)):
                raise ValueError(
                    f"{name} can't be combined with one <image> per image: pass one <image> per visual token"
                )

    def _expand_prompt(self, request: GenerationRequest) -> GenerationRequest:
        """
        The request with one `<image>` per visual token instead of one per image, padded on the left. For images of 3
        and 2 tokens:

            <pad>  a  <image>  b        a  <image> <image> <image>  b
              c    d  <image>  e        c     d    <image> <image>  e
        """
        ids, kept = request.input_ids, request.attention_mask.bool()
        counts = torch.tensor(request.tokens_per_image, device=ids.device)
        repeats = kept.long().masked_scatter(kept & (ids == self.config.image_token_id), counts)
        (lengths,) = read_integers(repeats.sum(-1))
        ids = ids.flatten().repeat_interleave(repeats.flatten(), output_size=sum(lengths))
        new_ids, attention_mask = pad_prompts(list(ids.split(lengths)), self.config.pad_token_id)
        lengths, run_ends = self._read_prompts(new_ids, attention_mask)
        return replace(request, new_ids=new_ids, attention_mask=attention_mask, lengths=lengths, run_ends=run_ends)

    def _check_context(self, lengths: list[int], run_ends: list[list[int]], tokens_per_image: list[int]):
        """Raise a ValueError if images don't match the `<image>` tokens, or a row has no room for an answer."""
        image_tokens = [0] * len(lengths)
        if tokens_per_image:
            check_placeholders(run_ends, tokens_per_image)
            image_tokens = count_placeholders(run_ends)
        ends = list(accumulate(tokens_per_image))
        start, images = 0, []
        for in_row in image_tokens:
            images.append(sum(start < end <= start + in_row for end in ends))
            start += in_row
        check_context(self.config, lengths, image_tokens, images)


__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "GREEDY",
    "NOT_WITH_PREFIXES",
    "ContextEnd",
    "GenerationRequest",
    "MCLlavaGenerationMixin",
    "SuppressToken",
    "check_context",
    "find_ends",
    "find_option",
    "one_cache",
    "pad_prompts",
]
