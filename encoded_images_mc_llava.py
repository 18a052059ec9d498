"""Encoded images: the outputs of vision tower and projector, their file, and a cache of the most recently used."""

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain, islice, zip_longest
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .crops_mc_llava import Box, Crop, center_of, check_plans
from .image_loading_mc_llava import load_image
from .image_processing_mc_llava import check_size, look_up_bytes
from .resizing_mc_llava import cut_to


# Of `hash_tensors`: an odd number; the 64-bit words that fit a core's cache; the bytes that are stacked on a device.
MULTIPLIER = 0x5851F42D4C957F2D
BLOCK = 2**15
STACK_BYTES = 256 * 2**20


def read_integers(*tensors: torch.Tensor) -> list[list]:
    """The values of tensors of integers as (nested) lists. They are read at once: each read waits for the device."""
    device = tensors[0].device
    flat = torch.cat([tensor.reshape(-1).to(device, torch.int64) for tensor in tensors]).tolist()
    ends = accumulate(tensor.numel() for tensor in tensors)
    return [_nest(flat[end - tensor.numel() : end], tensor.shape) for tensor, end in zip(tensors, ends)]


def _nest(values: list[int], shape: torch.Size) -> list:
    if len(shape) == 1:
        return values
    step = shape[1:].numel()
    return [_nest(values[row * step : (row + 1) * step], shape[1:]) for row in range(shape[0])]


def check_counts(crop_num_tokens: torch.LongTensor | None, image_grid_thw: torch.LongTensor | None):
    """Raise a ValueError if one of the fields that tell the numbers of tokens and crops is missing."""
    if crop_num_tokens is None or image_grid_thw is None:
        raise ValueError("pixel_values need crop_num_tokens and image_grid_thw: pass all that the processor returned")


def sum_per_image(crop_num_tokens: list[int], crops_per_image: list[int]) -> list[int]:
    """The number of tokens of each image: see `count_image_tokens`, which reads these lists."""
    if sum(crops_per_image) != len(crop_num_tokens):
        raise ValueError(
            f"image_grid_thw has {sum(crops_per_image)} crops, crop_num_tokens {len(crop_num_tokens)}: "
            "pass what the processor returned"
        )
    counts = iter(crop_num_tokens)
    return [sum(islice(counts, crops)) for crops in crops_per_image]  # no sum wraps around


def count_image_tokens(crop_num_tokens: torch.LongTensor | None, image_grid_thw: torch.LongTensor | None) -> list[int]:
    """
    The number of tokens of each image: the sum over its crops.

    Args:
        crop_num_tokens, image_grid_thw: int64[crops] and int64[images, 3], as the image processor returns them.

    Raises:
        ValueError: if one of them is None, or they disagree on the number of crops.
    """
    check_counts(crop_num_tokens, image_grid_thw)
    return sum_per_image(*read_integers(crop_num_tokens, image_grid_thw[:, 0]))


def count_places(run_ends: list[list[int]]) -> list[int]:
    """The number of `<image>` tokens in each row, of what `find_run_ends` found."""
    ends = list(accumulate((max(row, default=0) for row in run_ends), max))
    return [end - start for start, end in zip([0, *ends], ends)]


def check_places(run_ends: list[list[int]], tokens_per_image: list[int], is_chunk: bool = False):
    """See `MCLlavaModel.get_placeholder_mask`."""
    found = [end for row in run_ends for end in row if end]
    image_ends = list(accumulate(tokens_per_image))
    is_split = not (is_chunk and len(image_ends) == 1) and not set(found) <= set(image_ends)
    if (found[-1] if found else 0) != image_ends[-1] or is_split:
        raise ValueError(
            f"the rows have {count_places(run_ends)} <image> tokens, the images {tokens_per_image} tokens: "
            "use the processor's input_ids with its images, unshortened"
        )


@dataclass(frozen=True)
class EncodedImages:
    """
    Images encoded by the vision tower and the projector, for any number of questions.

    `encode_images` returns it; `generate` and `forward` take it as `image_features`.

    Args:
        features: float[tokens, hidden], the visual tokens of all images, concatenated.
        crop_boxes, crop_coords, crop_num_tokens, image_grid_thw: the crops that the features were computed from, as
            the image processor returns them: int64[crops, 4], float[crops, 2], int64[crops] and int64[images, 3].
        weights_hash: hash of the weights that computed the features, see
            `MCLlavaForConditionalGeneration.hash_encoder`.

    Raises:
        ValueError: if the features or the coordinates are not finite floats, a coordinate is not in 0 to 1, a box is
            empty, a row of `image_grid_thw` is not [crops, 1, 1], the counts are not int64 of at least 1, or the
            shapes don't match.
    """

    features: torch.Tensor
    crop_boxes: torch.LongTensor
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
        if (self.image_grid_thw[:, 1:] != 1).any():
            raise ValueError("image_grid_thw must have rows [crops, 1, 1]: encode the images again")
        for name in ("features", "crop_coords"):
            floats = getattr(self, name)
            if not floats.is_floating_point() or not floats.isfinite().all():
                raise ValueError(f"{name} must be finite floats: encode the images again, in another dtype if need be")
        tokens, crops = sum(self.tokens_per_image), len(self.crop_num_tokens)
        shapes = {name: list(getattr(self, name).shape) for name in ("features", "crop_boxes", "crop_coords")}
        if shapes != {
            "features": [tokens, *shapes["features"][1:2]],
            "crop_boxes": [crops, 4],
            "crop_coords": [crops, 2],
        }:
            raise ValueError(f"{crops} crops with {tokens} tokens don't fit {shapes}: encode the images again")
        if len(shapes["features"]) != 2:
            raise ValueError(f"features must be [tokens, hidden], got {shapes['features']}: encode the images again")
        if self.crop_coords.min() < 0 or self.crop_coords.max() > 1:
            raise ValueError("crop_coords must lie in 0 to 1: encode the images again")
        edges = self.crop_boxes
        if edges.dtype != torch.int64 or edges.min() < 0 or not (edges[:, :2] < edges[:, 2:]).all():
            raise ValueError(
                "crop_boxes must be int64, with 0 <= left < right and 0 <= top < bottom: encode the images again"
            )

    @property
    def plans(self) -> list[list[Crop]]:
        """The crop plan of each image, to draw it or to pass it to another call."""
        crops = [
            Crop(tuple(box), tokens) for box, tokens in zip(self.crop_boxes.tolist(), self.crop_num_tokens.tolist())
        ]
        ends = list(accumulate(self.crops_per_image))
        return [crops[start:end] for start, end in zip([0, *ends], ends)]

    @property
    def crops_per_image(self) -> list[int]:
        """The number of crops of each image."""
        return self.image_grid_thw[:, 0].tolist()

    @property
    def tokens_per_image(self) -> list[int]:
        """The number of visual tokens of each image."""
        return count_image_tokens(self.crop_num_tokens, self.image_grid_thw)

    def split(self) -> list[torch.Tensor]:
        """One float[tokens, hidden] per image."""
        return list(self.features.split(self.tokens_per_image))

    def unbind(self) -> "list[EncodedImages]":
        """One of these per image."""
        ends = zip(accumulate(self.tokens_per_image), accumulate(self.crops_per_image), range(1, 1 + len(self.plans)))
        starts, found = (0, 0, 0), []
        for last in ends:
            spans = {"features": slice(starts[0], last[0]), "image_grid_thw": slice(starts[2], last[2])}
            crops = slice(starts[1], last[1])
            parts = {name: tensor[spans.get(name, crops)] for name, tensor in self._tensors().items()}
            found.append(replace(self, **parts))
            starts = last
        return found

    def to(self, device: str | torch.device) -> "EncodedImages":
        """The same images on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def clone(self) -> "EncodedImages":
        """A copy that shares no memory with this one."""
        return self._map(torch.clone)

    def save(self, path: str | os.PathLike):
        """Write a safetensors file, with `weights_hash` in its header."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, path, metadata={"format": "pt", "weights_hash": self.weights_hash})

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "EncodedImages":
        """
        Read what `save` wrote.

        Raises:
            ValueError: if the file can't be read, or was not written by `save`.
        """
        names = [field.name for field in fields(cls) if field.name != "weights_hash"]
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in names}
                return cls(**tensors, weights_hash=file.metadata()["weights_hash"])
        except ValueError as error:
            raise ValueError(f"{path} holds no encoded images: {error}") from error
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} holds no encoded images ({error}): pass a file that save() wrote") from error

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "EncodedImages":
        return replace(self, **{name: function(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def is_encoded(value) -> bool:
    """
    Whether a value is an `EncodedImages`. Each copy of the code that transformers loads defines the class again, so
    isinstance can't be used.
    """
    return hasattr(value, "weights_hash")


def input_device(model) -> torch.device:
    """Where a model's inputs go. Offloaded weights are on "meta"; their hooks move inputs."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def check_processor(model, image_processor, options: dict | None = None):
    """Raise a ValueError unless an image processor, with a call's options, cuts crops for the model's vision tower."""
    options = {"size": image_processor.size, "patch_size": image_processor.patch_size, **(options or {})}
    tower, side = model.config.vision_config, check_size(options["size"])
    found = {"size": (side, side), "patch_size": options["patch_size"]}
    wanted = {"size": (tower.image_size, tower.image_size), "patch_size": tower.patch_size}
    if found != wanted:
        raise ValueError(f"the image processor has {found}, the model {wanted}: use the processor of this model")


def check_weights(images: list[EncodedImages], weights_hash: str):
    """Raise a ValueError if images were encoded with weights of another hash."""
    if any(image.weights_hash != weights_hash for image in images):
        raise ValueError(
            "the images were encoded with other weights of vision tower, coordinate embedding or projector "
            "(or another dtype): encode them again with this model"
        )


def hash_tensors(tensors) -> str:
    """
    A hash of the bits, dtypes and shapes of tensors, the same on every device.

    Each tensor's 64-bit words are mixed with their positions and summed on the tensor's device: copying a vision tower
    from a GPU for a hash on the CPU would take longer than encoding a picture. The sums of a device are read at once.

    Raises:
        ValueError: if a tensor is on the meta device, as weights offloaded to disk are.
    """
    tensors = [tensor.detach() for tensor in tensors]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("weights offloaded to disk can't be hashed: load the vision tower to a device")
    places = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    sums = {}
    for device, found in places.items():
        octets = [tensors[place].contiguous().reshape(-1).view(torch.uint8) for place in found]
        sums |= zip(found, sum_in_blocks(octets) if device.type == "cpu" else sum_stacked(octets))
    digest = hashlib.sha256()
    for place, tensor in enumerate(tensors):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}{sums[place]}".encode())
    return digest.hexdigest()


def sum_in_blocks(octets: list[torch.Tensor]) -> list[int]:
    """
    The sum of each tensor's mixed words, for a processor: in blocks that stay in a core's cache. Each thread has
    tensors of its own, because threads that share a block would wait for each other at every operator.
    """
    threads = min(torch.get_num_threads(), len(octets))
    shares = [range(first, len(octets), threads) for first in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(_sum_share, [[octets[place] for place in share] for share in shares]))
    found = dict(zip(chain(*shares), torch.cat(sums).tolist()))
    return [found[place] for place in range(len(octets))]


def _sum_share(octets: list[torch.Tensor]) -> torch.LongTensor:
    """`sum_in_blocks` in one thread. The first blocks of all tensors come first, because they have the same keys."""
    keys = _keys(BLOCK, "cpu")
    buffers = torch.empty_like(keys), torch.empty_like(keys)  # new memory would take longer than what is done in it
    step = (2 * BLOCK * MULTIPLIER + 2**63) % 2**64 - 2**63  # as int64
    sums, order = [], []
    for blocks in zip_longest(*(_to_words(tensor).split(BLOCK) for tensor in octets)):
        for place, block in enumerate(blocks):
            if block is not None:
                own, *spare = (tensor[: len(block)] for tensor in (keys, *buffers))
                sums.append(torch.dot(_mix(block, own, *spare), own))
                order.append(place)
        keys += step
    return keys.new_zeros(len(octets)).index_add_(0, torch.tensor(order, device="cpu"), torch.stack(sums))


def sum_stacked(octets: list[torch.Tensor]) -> list[int]:
    """The sum of each tensor's mixed words, for a device that waits for commands: tensors of a size are stacked."""
    sizes = {}
    for place, tensor in enumerate(octets):
        if len(tensor):
            sizes.setdefault(len(tensor), []).append(place)
    if not sizes:
        return [0] * len(octets)
    keys = _keys(-(-max(sizes) // 8), octets[0].device)
    parts, order = [], []
    for size, places in sizes.items():
        at_once = max(1, STACK_BYTES // size)
        for start in range(0, len(places), at_once):
            chosen = places[start : start + at_once]
            words = _to_words(torch.stack([octets[place] for place in chosen]))
            own = keys[: words.shape[-1]]
            parts.append((_mix(words, own) * own).sum(-1))
            order += chosen
    sums = dict(zip(order, torch.cat(parts).tolist()))
    return [sums.get(place, 0) for place in range(len(octets))]


def _to_words(octets: torch.Tensor) -> torch.Tensor:
    """uint8[..., bytes] as int64[..., words], padded with zeros."""
    if missing := -octets.shape[-1] % 8:
        octets = nn.functional.pad(octets, (0, missing))
    elif octets.storage_offset() % 8:  # a view must start at a word
        octets = octets.clone()
    return octets.view(torch.int64)


def _keys(count: int, device: str | torch.device) -> torch.Tensor:
    return (2 * torch.arange(count, device=device) + 1) * MULTIPLIER  # int64 wraps around


def _mix(
    words: torch.Tensor, keys: torch.Tensor, mixed: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> torch.Tensor:
    """Words that depend on all bits of each word and its key. `mixed` and `high` are memory to compute in."""
    mixed = torch.bitwise_xor(words, keys, out=mixed)
    mixed *= MULTIPLIER
    mixed ^= torch.bitwise_right_shift(mixed, 32, out=high)
    return mixed


@dataclass
class _KeptCrop:
    """The last patches of a crop, of which the last `asked` were asked for: float[at least asked, vision_hidden]."""

    patches: torch.Tensor
    asked: int


class FeatureCache:
    """
    Keeps what the vision tower made of the most recently used crops. The processor takes it as `feature_cache`, and so
    do `generate` and `zoom` for guided zoom.

    A crop is known by its picture's pixels, its box, how its pixels are made (`resample`, rescaling, normalization),
    the weights that encode it and the dtype that they compute in. Another question, another round of zoom or other
    knobs thus encode only crops that are new. Threads may share a cache.

    All patches of a crop are kept, to serve any `num_tokens`. When the cache is full, the least recently used crops
    are cut down to the patches that were asked for, and dropped once that is not enough.

    Args:
        max_bytes: upper bound of the patches' size in bytes. They stay on the device that computed them.

    Attributes:
        nbytes: size of the patches in the cache, in bytes.
        hits, misses: how often all crops of a picture were found in the cache, and how often some had to be encoded.
            Each round of zoom counts.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int = 256 * 2**20):
        if not max_bytes >= 0:  # of NaN, no comparison is true
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.nbytes = self.hits = self.misses = 0
        self._crops = OrderedDict()  # the least recently used first
        self._uncut = OrderedDict()  # keys of those with patches that nobody asked for, in the same order
        self._prepared = WeakValueDictionary()
        self._made_by = ()  # what the last call of `encode` found: crops are known by it
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._crops)

    def encode(
        self, model, image_processor, images: list, plans: list | None = None, **options
    ) -> list[EncodedImages]:
        """
        Encode images, as far as the cache doesn't have their crops.

        Args:
            model: `MCLlavaForConditionalGeneration`.
            image_processor: `MCLlavaImageProcessor`.
            images: anything that `load_image` reads, or what `prepare` returned. Crops of all of them share passes of
                the vision tower.
            plans, options: arguments of the image processor's call.

        Returns:
            One `EncodedImages` per image, in order, with features float[tokens, hidden] on the model's device.

        Raises:
            ValueError: as `load_image`, the image processor and `get_image_features` do, if the numbers of plans and
                images differ, or if weights are offloaded to disk.
        """
        if not images:
            return []  # and no weights are read for it
        prepared = self._prepare(model, image_processor, images, plans, options)
        device, made_by = input_device(model), describe_encoder(model)
        self._made_by = made_by
        crops = [(image, crop) for image in prepared for crop in image.plan]

        def encode(missing: list[int]) -> Iterator[torch.Tensor]:
            parts = {}
            for index in missing:
                image, crop = crops[index]
                parts.setdefault(image, []).append(crop.box)
            pixels = (part for image, boxes in parts.items() for part in image.pixels(boxes, device))
            return model.model.encode_each(_one_ahead(pixels))

        with torch.no_grad():
            keys = [((*image.name, *made_by), crop.box) for image, crop in crops]
            patches = iter(self.look_up(keys, [crop.num_tokens for _, crop in crops], encode))
            return [
                self._project(model, image, torch.cat([next(patches) for _ in image.plan]), made_by)
                for image in prepared
            ]

    def prepare(
        self, model, image_processor, images: list, plans: list | None = None, **options
    ) -> "list[PreparedImage]":
        """
        Do what `encode` does without the model: load images, and cut the crops that the cache lacks. `encode` then
        takes them as its images. Another thread can thus prepare images while the model works.

        Args, raises: as `encode`, whose options must be the same.
        """
        prepared, device = self._prepare(model, image_processor, images, plans, options), input_device(model)
        for image in prepared:
            keys = {crop.box: ((*image.name, *self._made_by), crop.box) for crop in image.plan}
            with self._lock:
                new = [box for box, key in keys.items() if key not in self._crops]
            image.cut_ahead(new, device)
        return prepared

    def _prepare(self, model, image_processor, images: list, plans, options: dict) -> "list[PreparedImage]":
        """The images as they are before they are cut. Equal ones are one object, to be cut once."""
        if plans is not None:
            plans = check_plans(plans, len(images))
        if image_processor.asks_to_zoom({**options, "plans": plans}):
            raise ValueError("zoom needs the question, and features are of the picture alone: pass zoom=0, or plans")
        given = {"plans": plans, **{name: value for name, value in options.items() if value is not None}}
        options = image_processor.check_kwargs(given)
        check_processor(model, image_processor, options)
        loaded = [
            image if is_prepared(image) else load_image(image, options.get("input_data_format")) for image in images
        ]
        sizes = [image.picture.size if is_prepared(image) else image.size for image in loaded]
        found, values = [], image_processor.values_of_bytes(options)
        side = check_size(options.get("size", image_processor.size))
        for image, plan in zip(loaded, image_processor.plans_of(sizes, options)):
            if not is_prepared(image):
                image = PreparedImage(image, plan, side, options.get("resample", image_processor.resample), values)
                with self._lock:
                    image = self._prepared.setdefault((image.name, tuple(plan)), image)
            found.append(image)
        return found

    def _project(self, model, image: "PreparedImage", patches: torch.Tensor, made_by: tuple) -> EncodedImages:
        """One picture's features, of the patches of its crops: each is projected alone."""
        fields = {
            "crop_boxes": [crop.box for crop in image.plan],
            "crop_coords": [center_of(crop.box, *image.picture.size) for crop in image.plan],
            "crop_num_tokens": [crop.num_tokens for crop in image.plan],
            "image_grid_thw": [[len(image.plan), 1, 1]],
        }
        fields = {name: torch.tensor(values, device=patches.device) for name, values in fields.items()}
        placed = model.model.add_positions(patches, fields["crop_coords"], fields["crop_num_tokens"])
        return EncodedImages(model.model.multi_modal_projector(placed), **fields, weights_hash=made_by[0])

    def look_up(
        self, keys: list[tuple], counts: list[int], encode: Callable[[list[int]], Iterable[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """
        The last `counts[i]` patches of each crop i: float[counts[i], vision_hidden]. They must not be changed.

        Args:
            keys: (what `picture_key` returns, box) of each crop.
            counts: how many patches are asked for of each.
            encode: given the numbers of crops that are new, in order, returns all patches of one after another.
        """
        asked, of_picture = {}, Counter()
        for key, count in zip(keys, counts):
            asked[key] = max(count, asked.get(key, 0))
        for (picture, _), count in asked.items():
            of_picture[picture] += count
        found = {key: self._get(key, count) for key, count in asked.items()}
        missing = [key for key, patches in found.items() if patches is None]
        with self._lock:
            pictures, incomplete = {key[0] for key in keys}, {key[0] for key in missing}
            self.misses += len(incomplete)
            self.hits += len(pictures) - len(incomplete)
        if missing:
            numbers = {key: index for index, key in reversed(list(enumerate(keys)))}
            for key, patches in zip(missing, encode([numbers[key] for key in missing]), strict=True):
                found[key] = patches[-asked[key] :].clone()  # the others' memory is free after the pass
                row = patches[0].nbytes
                # What is too large for the cache must not empty it.
                if of_picture[key[0]] * row <= self.max_bytes:
                    self._put(key, _KeptCrop(patches[1:].clone(), asked[key]))
        return [found[key][-count:] for key, count in zip(keys, counts)]

    def _get(self, key: tuple, count: int) -> torch.Tensor | None:
        with self._lock:
            kept = self._crops.get(key)
            if kept is None or len(kept.patches) < count:
                return None
            self._crops.move_to_end(key)
            if key in self._uncut:
                self._uncut.move_to_end(key)
            kept.asked = max(kept.asked, count)
            return kept.patches

    def _put(self, key: tuple, crop: _KeptCrop):
        with self._lock:
            if (old := self._crops.pop(key, None)) is not None:  # with fewer patches, or of a faster thread
                self.nbytes -= old.patches.nbytes
                self._uncut.pop(key, None)
                crop.asked = max(crop.asked, old.asked)
            self._crops[key] = crop
            self._uncut[key] = None
            self.nbytes += crop.patches.nbytes
            while self.nbytes > self.max_bytes:
                if self._uncut:
                    key, _ = self._uncut.popitem(last=False)
                    kept = self._crops[key]
                    self.nbytes -= kept.patches.nbytes
                    kept.patches = kept.patches[-kept.asked :].clone()
                    self.nbytes += kept.patches.nbytes
                else:
                    _, dropped = self._crops.popitem(last=False)
                    self.nbytes -= dropped.patches.nbytes


def _one_ahead(parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same parts, of which a thread makes the next one while the model works on the last."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, parts, None)
        while (part := following.result()) is not None:
            following = pool.submit(next, parts, None)
            yield part


class PreparedImage:
    """
    A picture before the model encodes it, see `FeatureCache.prepare`.

    Args:
        picture: as `load_image` returns it.
        plan: its crops.
        side, resample: of the crops in pixels, and the filter that resizes them.
        values: float32[3, 256], what each byte becomes in each channel.

    Attributes:
        name: what a `FeatureCache` knows the picture by, but for the weights.
    """

    def __init__(self, picture: Image.Image, plan: list[Crop], side: int, resample: int, values: np.ndarray):
        self.picture, self.plan, self.side, self.resample, self.values = picture, plan, side, resample, values
        self.name = picture_key(picture.tobytes(), picture.size, resample, values.tobytes(), ())
        self._cut, self._lock = {}, Lock()

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes: Pillow's four for each pixel, and the crops."""
        return 4 * self.picture.width * self.picture.height + 3 * self.side**2 * len(self._cut)

    def cut_ahead(self, boxes: list[Box], device: torch.device):
        """Cut crops, and keep them for the next call of `pixels`; not if they are too many to be kept."""
        with self._lock:
            new = [box for box in boxes if box not in self._cut]
            if new and 3 * self.side**2 * (len(self._cut) + len(new)) <= MOST_CUT_AHEAD:
                self._cut |= zip(new, cut_to(device, self.picture, new, self.side, self.resample))

    def pixels(self, boxes: list[Box], device: torch.device) -> Iterator[torch.Tensor]:
        """float32[up to 16, 3, side, side] of the crops, one part after another."""
        with self._lock:
            kept = {box: self._cut.pop(box) for box in boxes if box in self._cut}
        if new := [box for box in boxes if box not in kept]:
            kept |= zip(new, cut_to(device, self.picture, new, self.side, self.resample))
        values = torch.from_numpy(self.values).to(device)
        for start in range(0, len(boxes), 16):
            yield look_up_bytes([kept.pop(box) for box in boxes[start : start + 16]], values)


def is_prepared(value) -> bool:
    """Whether a value is a `PreparedImage`, of any copy of the code, as `is_encoded`."""
    return hasattr(value, "cut_ahead")


MOST_CUT_AHEAD = 128 * 2**20  # bytes of a picture's crops


def describe_encoder(model) -> tuple[str, str]:
    """The hash of the weights that encode crops, and the dtype that they compute in, autocast's included."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return model.hash_encoder(), str(dtype)


def picture_key(pixels: bytes, size: tuple[int, int], resample: int | None, values: bytes, made_by: tuple) -> tuple:
    """
    What a `FeatureCache` knows a picture's crops by, beside their boxes.

    Args:
        pixels, size: of the RGB picture, with its width and height.
        resample: the filter by which crops are resized.
        values: float32[3, 256], what each byte becomes in each channel.
        made_by: what `describe_encoder` returns.
    """
    resample = None if resample is None else int(resample)
    return (hashlib.sha256(pixels).hexdigest(), size, resample, hashlib.sha256(values).hexdigest(), *made_by)


__all__ = [
    "EncodedImages",
    "FeatureCache",
    "PreparedImage",
    "check_counts",
    "check_places",
    "check_processor",
    "check_weights",
    "count_image_tokens",
    "count_places",
    "hash_tensors",
    "input_device",
    "is_encoded",
    "is_prepared",
    "read_integers",
    "sum_per_image",
]
