"""
Guided zoom: look at the whole picture and a coarse grid, then more closely where the question points.

    round 0    whole picture, scouts              the image processor's crops
    round 1    a draft of the answer: attention from the prompt's last token to each crop -> the most relevant crops,
               covered by smaller ones; no further rounds if the draft is probable already, see `SURE`, or attention
               goes only to crops of which a closer look would show nothing more, see `pays`
    ...
    answer     all crops of all rounds, in the same number of `<image>` tokens

Every round's prompt has the same ids: the visual tokens are shared out among more crops.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging

from .crops_mc_llava import IMAGE_FIELDS, ZOOM_FIELDS, Box, Crop
from .encoded_images_mc_llava import UNKNOWN, EncodedImages, describe_crops, read_integers, sum_per_image
from .generation_mc_llava import CACHE, GREEDY, find_ends, pad_prompts
from .hashing_mc_llava import adapter_names, describe_encoder, picture_key
from .prefix_cache_mc_llava import PrefixCache, can_keep_prefixes, fill_layer
from .resizing_mc_llava import can_cut_on, cut_crops, cut_on_device, look_up_bytes
from .zoom_plan_mc_llava import look_closer, pays, plan_rounds, share_evenly


if TYPE_CHECKING:  # at run time it would import the loading of images
    from .feature_cache_mc_llava import FeatureCache

logger = logging.get_logger(__name__)
# The least probability of a whole answer, of at most `DRAFT` tokens, after which zoom looks no further. Chosen on
# development scenes, see docs/tiny.md.
SURE, DRAFT = 0.98, 16
DRAFT_OPTIONS = {**GREEDY, "num_return_sequences": 1, "max_new_tokens": DRAFT, "use_cache": True}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # all saved options that a draft has
READ_FIELDS = ("crop_num_tokens", "image_grid_thw", "crop_boxes", "zoom_options")  # integers


@dataclass(frozen=True)
class ZoomedImages(EncodedImages):
    """
    What `zoom` found: encoded images for `generate(image_features=...)`, and where it looked.

    Args:
        crop_rounds: int64[crops], the round in which a crop was looked at: 0 for the whole picture and the scouts.
        crop_relevance: float32[crops], of the last round that asked about a crop: the share of attention that it got
            from the measured heads or, without any, its attention relative to that under a general question. NaN if
            only the answer followed.
    """

    crop_rounds: torch.LongTensor
    crop_relevance: torch.Tensor

    @property
    def looked_at(self) -> list[dict]:
        """For JSON: the image's number, box, round and relevance (None for NaN) of each crop."""
        images = [number for number, crops in enumerate(self.crops_per_image) for _ in range(crops)]
        crops = zip(images, self.crop_boxes.tolist(), self.crop_rounds.tolist(), self.crop_relevance.tolist())
        return [
            {"image": image, "box": box, "round": number, "relevance": None if math.isnan(found) else round(found, 4)}
            for image, box, number, found in crops
        ]


@dataclass
class Looks:
    """What was looked at in the pictures of a call."""

    views: list["View"]
    features: list[torch.Tensor]  # one float[tokens, hidden] per view
    weights_hash: str | None = None  # of `hash_encoder`, if it was needed


@dataclass
class View:
    """The state of one picture between rounds."""

    pixels: torch.Tensor  # uint8[height, width, 3]
    resample: int  # one of Pillow's filters
    row: int  # of the prompt
    rounds: int
    regions: int
    per_region: int
    plan: list[Crop]  # boxes, and the tokens that are shared out among them
    patches: list[torch.Tensor]  # for each crop, float[most tokens that are needed of it, vision_hidden]
    crop_rounds: list[int]
    relevance: list[float]
    features: torch.Tensor | None = None  # float[tokens, hidden], None after crops were added
    key: tuple | None = None  # of the picture in a `FeatureCache`
    covered: set[Box] = field(default_factory=set)

    @property
    def boxes(self) -> list[Box]:
        return [crop.box for crop in self.plan]

    def add(self, boxes: list[Box], number: int):
        """Add the crops of a round. The number of tokens stays the same."""
        self.plan = share_evenly(self.boxes + boxes, sum(crop.num_tokens for crop in self.plan))
        self.crop_rounds += [number] * len(boxes)
        self.relevance += [float("nan")] * len(boxes)
        self.features = None

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self.pixels.shape
        return width, height


class Doubt(StoppingCriteria):
    """
    Stops each greedy answer of a batch as soon as it is less probable than `SURE`. Needs `output_scores=True`.

    Args:
        ends: int[ids], those that end an answer.

    Attributes:
        is_sure: bool[batch], whether an answer has ended and is at least as probable; set by the first call.
    """

    def __init__(self, ends: torch.LongTensor):
        self.ends, self.log_probability, self.has_ended = ends, 0.0, False

    def __call__(self, input_ids: torch.LongTensor, scores: tuple[torch.Tensor, ...], **kwargs) -> torch.BoolTensor:
        new_ids = input_ids[:, -1:].to(scores[-1].device)
        step = scores[-1].float().log_softmax(-1).gather(-1, new_ids).squeeze(-1)
        step = step.masked_fill(torch.as_tensor(self.has_ended, device=step.device), 0)  # padding follows
        self.log_probability = self.log_probability + step
        self.has_ended = torch.isin(new_ids, self.ends.to(step.device)).squeeze(-1) | self.has_ended
        is_unsure = ~(self.log_probability >= math.log(SURE))  # NaN is
        self.is_sure = self.has_ended & ~is_unsure
        return is_unsure.to(input_ids.device)


class MCLlavaZoomMixin:
    """Guided zoom for `MCLlavaForConditionalGeneration`, which provides the model's parts and `generate`'s checks."""

    @torch.no_grad()
    def zoom(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        feature_cache: "FeatureCache | None" = None,
        prefix_cache: PrefixCache | None = None,
        **images,
    ) -> ZoomedImages:
        """
        Look where the questions point, without answering them:

            looked = model.zoom(**processor(question, picture, zoom=2))
            looked.plans, looked.crop_rounds, looked.crop_relevance
            model.generate(**text, image_features=looked)

        Args:
            input_ids, attention_mask: int[batch, length], prompts with one `<image>` per visual token, padded on the
                left.
            feature_cache: a `FeatureCache` of crops. Only crops that it lacks are encoded.
            prefix_cache: a `PrefixCache` for the keys and values of drafts: `generate` with it doesn't compute those
                of the last draft again.
            images: the other fields that the processor returned with `zoom` of at least 1.

        Raises:
            ValueError: if the processor was called without `zoom`, or its fields don't fit each other.
        """
        if attention_mask is None:
            attention_mask = self._mask_padding(input_ids)
        check_fields(images)
        lengths, run_ends, *counts = self._read_prompts(input_ids, attention_mask, images)
        self._check_context(lengths, run_ends, sum_per_image(*counts))
        return self._zoomed_images(self._look(input_ids, attention_mask, images, feature_cache, prefix_cache))

    def _zoomed_images(self, looks: Looks) -> ZoomedImages:
        """What `_look` found, as encoded images."""
        views, features = looks.views, torch.cat(looks.features)
        relevance = [found for view in views for found in view.relevance]
        fields = {
            **describe_crops([view.plan for view in views], [view.size for view in views], features.device),
            "crop_rounds": torch.tensor([n for view in views for n in view.crop_rounds], device=features.device),
            "crop_relevance": torch.tensor(relevance, dtype=torch.float32, device=features.device),
        }
        try:
            weights_hash = looks.weights_hash or self.hash_encoder()
        except ValueError:  # offloaded to disk: no reason to lose the answer
            weights_hash = UNKNOWN
        return ZoomedImages(features, **fields, weights_hash=weights_hash)

    def _look(
        self,
        input_ids,
        attention_mask,
        images: dict,
        feature_cache: "FeatureCache | None" = None,
        prefix_cache: PrefixCache | None = None,
    ) -> Looks:
        """All rounds before the answer."""
        check_fields(images)
        ids, kept, general_ids, *fields = self._read_fields(input_ids, attention_mask, images)
        names = self._adapters_of(ids)
        values, scouts = images["zoom_values"][0].float(), images["pixel_values"]  # `to` casts fields
        views, weights_hash = self._first_views(ids, images, *fields), None
        general = [self._ask_in_general(*row, general_ids) for row in zip(ids, kept)]
        if feature_cache is not None:
            try:
                weights_hash = self._name_pictures(views, values)
            except ValueError:  # offloaded to disk: changes of the weights can't be detected
                feature_cache = None
        self._encode(
            views,
            [view.boxes for view in views],
            lambda chosen: scouts if len(chosen) == len(scouts) else scouts[sorted(chosen)],
            feature_cache,
        )

        def prompts_of(some: list[View]) -> tuple:
            """The rows of views, their ids and mask, and all of their views."""
            # PEFT needs all rows for which it has the names of adapters.
            rows = sorted({view.row for view in some}) if names is None else list(range(len(ids)))
            return rows, input_ids[rows], attention_mask[rows], [view for view in views if view.row in rows]

        active, number = views, 0
        while active := [view for view in active if view.rounds > number]:
            number += 1
            active = self._pick(active, prompts_of, general, prefix_cache)
            active = self._look_closer(active, number, values, feature_cache)
        return Looks(views, self._project(views), weights_hash)

    def _pick(
        self,
        views: list[View],
        prompts_of: Callable,
        general: list[list[int]],
        prefix_cache: PrefixCache | None,
    ) -> list[View]:
        """
        Ask about pictures, and pick those at which a closer look pays. See `_look` for `prompts_of`, and
        `_ask_in_general` for `general`.
        """
        side = self.config.vision_config.image_size
        rows, input_ids, attention_mask, seen = prompts_of(views)
        embeds, known, prompts = self.model.fill_placeholders(input_ids, self._project(seen)), None, None
        if prefix_cache is not None and can_keep_prefixes(self, **DRAFT_OPTIONS):
            known, prompts = prefix_cache.load(self, embeds, attention_mask)
        cache, is_sure = self._draft(embeds, attention_mask, known)
        attention = last_attention(
            self.model.language_model, embeds, attention_mask, relevant_heads(self.config), cache
        )
        attention = _to_images(attention, input_ids, self.config.image_token_id, self._project(seen))
        are_sure = self._set_relevance(seen, attention, is_sure, [general[row] for row in rows])
        sure = {row for row, is_one in zip(rows, are_sure) if is_one}
        picked = [view for view in views if view.row not in sure]
        picked = [view for view in picked if pays(view.boxes, view.relevance, view.covered, side)]
        if prompts is not None:
            for place, row in enumerate(rows):
                if any(view.row == row for view in picked):  # its next prompt has other crops
                    prompts.names[place] = []
            prefix_cache.keep(prompts, cache)
        return picked

    def _read_fields(self, input_ids, attention_mask, images: dict) -> list[list]:
        """
        The ids, the mask, the general question's ids and `READ_FIELDS` as lists, checked. With the relevance of each
        round, they are all that is read from the device.
        """
        values, general_ids = images["zoom_values"], images["zoom_general_ids"]
        differ = torch.stack([(rows != rows[:1]).any() for rows in (values, general_ids.to(values.device))])
        ids, kept, general_ids, *fields, differ = read_integers(
            input_ids, attention_mask, general_ids, *(images[name] for name in READ_FIELDS), differ
        )
        if any(differ) or values.shape[1:] != (3, 256):
            raise ValueError(
                "zoom_values and zoom_general_ids must have equal rows for all images: ask about images that were "
                "prepared with other options one by one"
            )
        num_tokens, _, boxes, _ = fields
        self.model.check_crops(num_tokens, pixel_values=images["pixel_values"], crop_boxes=boxes)
        if not all(row[-1] for row in kept):
            raise ValueError("zoom asks with the last token of each prompt: pad the prompts on the left")
        return [ids, kept, general_ids[0], *fields]

    def _adapters_of(self, ids: list[list[int]]) -> list[str] | None:
        """The adapter that PEFT's `adapter_names` chose for each prompt, or None."""
        names = adapter_names(self.model.language_model)
        if names is not None and len(names) != len(ids):
            raise ValueError(
                f"adapter_names have {len(names)} entries, and zoom asks {len(ids)} prompts, without beams: pass a "
                "name for each prompt and num_beams=1, or call the processor with zoom=0"
            )
        return names

    def _name_pictures(self, views: list[View], values: torch.Tensor) -> str:
        """Set the keys of the views' pictures. Returns the hash of the weights that encode them."""
        made_by, values = describe_encoder(self), values.cpu().numpy().tobytes()
        for view in views:
            pixels = view.pixels.cpu().numpy().tobytes()
            view.key = picture_key(pixels, view.size, view.resample, values, made_by)
        return made_by[0]

    def _first_views(
        self, ids: list, images: dict, num_tokens: list, grid: list, boxes: list, options: list
    ) -> list[View]:
        """The views of the image processor's crops. `READ_FIELDS` and the ids come as lists."""
        crops_per_image = [crops for crops, _, _ in grid]
        budgets = sum_per_image(num_tokens, crops_per_image)
        row_ends = list(accumulate(row.count(self.config.image_token_id) for row in ids))
        rows = [bisect_left(row_ends, end) for end in accumulate(budgets)]
        crops = iter([Crop(tuple(box), count) for box, count in zip(boxes, num_tokens)])
        plans = [list(islice(crops, count)) for count in crops_per_image]
        sizes = [(width, height) for _, _, height, width, _ in options]
        num_bytes = sum(3 * width * height for width, height in sizes)
        fits = all(plans) and [plan[0].box[2:] for plan in plans] == sizes
        if not fits or num_bytes != len(images["zoom_pictures"]):
            raise ValueError("zoom_options and zoom_pictures don't fit the crops: pass what the processor returned")
        pictures = _split_pictures(images["zoom_pictures"], options)
        views = []
        for pixels, plan, row, budget, (zoom, max_crops, _, _, resample) in zip(
            pictures, plans, rows, budgets, options
        ):
            rounds, regions, per_region = plan_rounds(len(plan), zoom, max_crops, budget)
            views.append(
                View(
                    pixels=pixels,
                    resample=resample,
                    row=row,
                    rounds=rounds,
                    regions=regions,
                    per_region=per_region,
                    plan=plan,
                    patches=[],
                    crop_rounds=[0] * len(plan),
                    relevance=[float("nan")] * len(plan),
                )
            )
        return views

    def _look_closer(
        self, views: list[View], number: int, values: torch.Tensor, feature_cache: "FeatureCache | None"
    ) -> list[View]:
        """Encode the crops of round `number`, of all pictures at once. Returns the views that have got some."""
        side = self.config.vision_config.image_size
        added = [
            look_closer(view.boxes, view.relevance, view.covered, view.regions, view.per_region, side)
            for view in views
        ]
        for view, boxes in zip(views, added):
            if boxes:
                view.add(boxes, number)
        if not any(added):
            return []

        def pixels(chosen: set[int]) -> torch.Tensor:
            parts, start = [], 0
            for view, boxes in zip(views, added):
                if own := [box for index, box in enumerate(boxes, start) if index in chosen]:
                    parts.append(_cut(view, own, side))
                start += len(boxes)
            return look_up_bytes(torch.cat(parts).to(values.device), values)

        self._encode(views, added, pixels, feature_cache)
        return [view for view, boxes in zip(views, added) if boxes]

    def _encode(
        self,
        views: list[View],
        added: list[list[Box]],
        pixels: Callable[[set[int]], torch.Tensor],
        feature_cache: "FeatureCache | None",
    ):
        """
        Encode the crops that a round has added to the views, of all pictures at once.

        Args:
            pixels: given indices of crops, counted over all views, returns their float[crops, 3, side, side].
        """
        new = [(view, crop) for view, boxes in zip(views, added) for crop in view.plan[len(view.plan) - len(boxes) :]]
        counts = [crop.num_tokens for _, crop in new]
        if feature_cache is None:
            crops = pixels(set(range(len(new))))
            tokens = self.model.encode_tokens(crops, torch.tensor(counts, device=crops.device), counts).split(counts)
        else:
            keys = [(view.key, crop.box) for view, crop in new]
            tokens = feature_cache.look_up(
                keys, counts, lambda missing: self.model.encode_passes([pixels(set(missing))])
            )
        for (view, _), kept in zip(new, tokens):
            view.patches.append(kept)

    def _project(self, views: list[View]) -> list[torch.Tensor]:
        """One float[tokens, hidden] per view: the last patches of each crop, with its place, projected."""
        for view in views:
            if view.features is not None:
                continue
            kept = torch.cat([patches[-crop.num_tokens :] for patches, crop in zip(view.patches, view.plan)])
            fields = describe_crops([view.plan], [view.size], kept.device)
            placed = self.model.add_positions(kept, fields["crop_coords"], fields["crop_num_tokens"])
            view.features = self.model.multi_modal_projector(placed)
        return [view.features for view in views]

    def _draft(self, inputs_embeds, attention_mask, cache: Cache | None) -> tuple[Cache, torch.Tensor]:
        """
        Begin greedy answers. Returns the keys and values, and for each whether it is a whole answer and probable:
        bool[batch].

        Args:
            cache: keys and values of the prompts' beginnings, or None.
        """
        doubt = Doubt(torch.tensor(find_ends(self, None, {}), dtype=torch.long))
        # Nothing that was saved concerns a draft: it may need a tokenizer, or make any answer probable.
        saved = [name for name in self.generation_config.to_diff_dict() if name not in TOKEN_IDS and name[0] != "_"]
        draft = self.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            stopping_criteria=StoppingCriteriaList([doubt]),
            **dict.fromkeys(saved)
            | DRAFT_OPTIONS
            | {"return_dict_in_generate": True, "output_scores": True, CACHE: cache},
        )
        return draft.cache, doubt.is_sure

    def _set_relevance(
        self, views: list[View], attention: torch.Tensor, is_sure: torch.Tensor, general: list[list[int]]
    ) -> list[bool]:
        """
        Set the relevance of each view's crops.

        Args:
            attention: float32[heads, tokens], from the prompts' last tokens to the visual tokens of all views.
            is_sure: bool[batch].
            general: ids of general prompts about the same images.

        Returns:
            `is_sure`, which is read from the device with the relevance.
        """
        counts = [crop.num_tokens for view in views for crop in view.plan]

        def per_crop(attention: torch.Tensor) -> torch.Tensor:
            return torch.stack([part.sum() for part in attention.mean(0).split(counts)])

        found = per_crop(attention)
        if not self.config.zoom_heads:  # what any question looks at doesn't count (ViCrop, arXiv 2502.17422)
            warn_unmeasured(self.config.name_or_path)
            prompts = pad_prompts(
                [torch.tensor(ids, device=found.device) for ids in general], self.config.pad_token_id
            )
            usual = image_attention(self.model, *prompts, self._project(views), relevant_heads(self.config))
            found = found / per_crop(usual).clamp(min=1e-6)
        read = torch.cat([found, is_sure.to(found)]).tolist()
        found, are_sure = read[: len(counts)], read[len(counts) :]
        if not all(map(math.isfinite, found)):
            raise ValueError("the model's attention is not finite: load it in another dtype, or pass zoom=0")
        for view in views:
            view.relevance, found = found[: len(view.boxes)], found[len(view.boxes) :]
        return [value == 1 for value in are_sure]

    def _ask_in_general(self, ids: list[int], kept: list[int], general_ids: list[int]) -> list[int]:
        """A prompt up to its last `<image>`, followed by a general question; without padding."""
        ids = [id for id, is_kept in zip(ids, kept) if is_kept]
        end = max((place for place, id in enumerate(ids, 1) if id == self.config.image_token_id), default=0)
        return ids[:end] + general_ids


def _split_pictures(pictures: torch.Tensor, options: list) -> list[torch.Tensor]:
    """uint8[height, width, 3] of each of `zoom_pictures`, on the device that cuts its crops."""
    if not all(can_cut_on(pictures.device, resample) for *_, resample in options):
        pictures = pictures.cpu()
    parts = pictures.split([3 * height * width for _, _, height, width, _ in options])
    return [part.view(height, width, 3) for part, (_, _, height, width, _) in zip(parts, options)]


def _cut(view: View, boxes: list[Box], side: int) -> torch.Tensor:
    """uint8[crops, side, side, 3] on the picture's device."""
    if can_cut_on(view.pixels.device, view.resample):
        return cut_on_device(view.pixels, boxes, side)
    picture = Image.fromarray(view.pixels.numpy())
    return torch.from_numpy(cut_crops(picture, boxes, side, view.resample))


def relevant_heads(config) -> list[tuple[int, int]]:
    """
    (layer, head) of the heads that zoom asks: the measured ones, or all of the layer at three quarters of the language
    model's depth.
    """
    if config.zoom_heads:
        return [(entry["layer"], entry["head"]) for entry in config.zoom_heads]
    text = config.text_config
    return [(text.num_hidden_layers * 3 // 4, head) for head in range(text.num_attention_heads)]


def image_attention(
    model, input_ids, attention_mask, features: list[torch.Tensor], heads: list[tuple[int, int]]
) -> torch.Tensor:
    """
    Attention of the prompts' last tokens to the visual tokens of all images: float32[heads, tokens].

    Args:
        model: `MCLlavaModel`.
        input_ids, attention_mask: int[batch, length], prompts with one `<image>` per visual token, padded on the left.
        features: one float[tokens, hidden] per image, in batch order.
        heads: (layer, head), both counted from 0.
    """
    embeds = model.fill_placeholders(input_ids, features)
    found = last_attention(model.language_model, embeds, attention_mask, heads)
    return _to_images(found, input_ids, model.config.image_token_id, features)


def _to_images(
    attention: torch.Tensor, input_ids: torch.LongTensor, image_token_id: int, features: list[torch.Tensor]
) -> torch.Tensor:
    """Of attention to all tokens, float32[batch, heads, length], that to visual ones: float32[heads, tokens]."""
    # The columns of <image>, in order. How many there are is known: a boolean index would read it.
    others = (input_ids != image_token_id).flatten().byte()
    columns = others.argsort(stable=True)[: sum(map(len, features))]
    return attention.transpose(0, 1).flatten(1)[:, columns.to(attention.device)]


def last_attention(
    language_model,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    heads: list[tuple[int, int]],
    cache: Cache | None = None,
) -> torch.Tensor:
    """
    Attention of the last token in some heads: float32[batch, heads, length].

    Only the layers below the deepest of these heads are run, and of each chosen layer only the keys and the last
    token's query are computed, whatever attention the model was loaded with.

    Args:
        inputs_embeds, attention_mask: float[batch, length, hidden] and int[batch, length], padded on the left; None
            without padding.
        heads: (layer, head), both counted from 0.
        cache: keys and values of these tokens, and maybe of others after them. Then only the last token is run.
    """
    kept = torch.ones_like(inputs_embeds[..., 0]).long() if attention_mask is None else attention_mask
    position_ids = (kept.cumsum(-1) - 1).clamp(min=0)
    length, deepest = kept.shape[1], max(layer for layer, _ in heads)
    hidden, before = inputs_embeds, None
    if cache is not None:
        hidden, position_ids = hidden[:, -1:], position_ids[:, -1:]
        before = DynamicCache(config=language_model.config)
        for index, layer in enumerate(cache.layers[:deepest]):
            fill_layer(before.layers[index], layer.keys[:, :, : length - 1], layer.values[:, :, : length - 1])
    mask = create_causal_mask(
        config=language_model.config, inputs_embeds=hidden, attention_mask=attention_mask, **{CACHE: before}
    )
    rotary = language_model.rotary_emb(hidden, position_ids)
    found = {}
    for index, layer in enumerate(language_model.layers[: deepest + 1]):
        if chosen := [head for at, head in heads if at == index]:
            keys = None if cache is None else cache.layers[index].keys[:, :, :length]
            attention = _head_attention(layer, hidden, rotary, kept, chosen, keys).to(inputs_embeds.device)
            found |= {(index, head): attention[:, place] for place, head in enumerate(chosen)}
        if index < deepest:
            options = {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": rotary}
            hidden = layer(hidden, **options, **{CACHE: before})
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return torch.stack([found[head] for head in heads], dim=1)


def _head_attention(
    layer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    heads: list[int],
    keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    For some heads of one of Phi's layers, the last token's attention to all tokens: [batch, heads, length].

    Args:
        hidden, rotary: of all tokens or, with `keys`, of the last one.
        keys: float[batch, heads, length, head_dim], those in a cache.
    """
    attention, norm = layer.self_attn, layer.input_layernorm
    # Layers may be on several devices. The hooks of offloaded ones, whose weights are "meta", move their inputs.
    states = norm(hidden if norm.weight.is_meta else hidden.to(norm.weight.device))
    shape = (*states.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(states[:, -1:]).view(len(states), 1, -1, attention.head_dim).transpose(1, 2)
    cos, sin = (part.unsqueeze(1).to(query.device) for part in rotary)
    if attention.qk_layernorm:
        query = attention.q_layernorm(query)
    query = _rotate(query, cos[:, :, -1:], sin[:, :, -1:])
    if keys is None:
        keys = attention.k_proj(states).view(shape).transpose(1, 2)
        keys = _rotate(attention.k_layernorm(keys) if attention.qk_layernorm else keys, cos, sin)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    # In float32: a float16 product of a few large values overflows.
    scores = (query.float() * attention.scaling @ keys.float().transpose(-1, -2)).squeeze(2)
    scores = scores.masked_fill(attention_mask[:, None].to(scores.device) == 0, -torch.inf).softmax(-1)
    missing = attention.config.num_attention_heads - scores.shape[1]
    if not missing:
        return scores[:, heads]
    # Tensor parallel: each process has its share of the heads.
    first = torch.distributed.get_rank() * scores.shape[1]
    found = torch.zeros_like(scores[:, :1]).repeat(1, len(heads), 1)
    for place, head in enumerate(heads):
        if first <= head < first + scores.shape[1]:
            found[:, place] = scores[:, head - first]
    torch.distributed.all_reduce(found)
    return found


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of the first dimensions of each head."""
    turned, kept = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-high, low], dim=-1) * sin, kept], dim=-1)


def check_fields(images: dict):
    """Raise a ValueError if a field that zoom needs is missing."""
    remedies = {
        IMAGE_FIELDS: "pass all that the processor returned",
        ZOOM_FIELDS: "call the processor with zoom=1 or more",
    }
    for names, remedy in remedies.items():
        if missing := [name for name in names if images.get(name) is None]:
            raise ValueError(f"{', '.join(missing)} are missing: {remedy}")


def refuse_zoom(what: str, fields: dict):
    """Raise a ValueError if there are fields of zoom, and remove those that are None."""
    if any(fields.pop(name, None) is not None for name in ZOOM_FIELDS):
        raise ValueError(
            f"{what} can't zoom: pass the processor's fields to generate or to zoom(), or call it with zoom=0"
        )


def warn_unmeasured(name: str):
    logger.warning_once(
        f"no attention heads were measured for {name or 'this model'}: zoom uses all heads of the layer at three "
        "quarters of its depth. Measure them with `mc-llava zoom-heads`"
    )


__all__ = [
    "DRAFT",
    "MCLlavaZoomMixin",
    "ZoomedImages",
    "image_attention",
    "last_attention",
    "refuse_zoom",
    "relevant_heads",
]
