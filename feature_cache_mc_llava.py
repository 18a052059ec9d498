"""A cache of the vision tower's outputs by picture, box and weights."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
import torch
from PIL import Image

from .crops_mc_llava import Box, Crop, check_plans
from .encoded_images_mc_llava import EncodedImages, describe_crops, input_device, without_peft
from .hashing_mc_llava import describe_encoder, picture_key
from .image_loading_mc_llava import load_images
from .image_processing_mc_llava import square_side
from .resizing_mc_llava import CROPS_PER_LOOK_UP, cut_to, look_up_bytes
from .threads_mc_llava import one_ahead


MOST_CUT_AHEAD = 128 * 2**20  # bytes of a picture's crops that are cut before they are encoded


def check_processor(model, image_processor, options: dict | None = None):
    """Raise a ValueError unless an image processor, with a call's options, cuts crops for the model's vision tower."""
    options = {"size": image_processor.size, "patch_size": image_processor.patch_size, **(options or {})}
    tower, side = model.config.vision_config, square_side(options["size"])
    found = {"size": (side, side), "patch_size": options["patch_size"]}
    wanted = {"size": (tower.image_size, tower.image_size), "patch_size": tower.patch_size}
    if found != wanted:
        raise ValueError(f"the image processor has {found}, the model {wanted}: use the processor of this model")


@dataclass
class _KeptCrop:
    """The last patches of a crop, float[patches, vision_hidden], and the largest number that a call has asked for."""

    patches: torch.Tensor
    asked: int


class FeatureCache:
    """
    Keeps the vision tower's outputs for the most recently used crops. Pass it to the processor as `feature_cache` or,
    for guided zoom, to `generate` and `zoom`.

    A crop is identified by its picture's pixels, its box, how its pixels are made (`resample`, rescaling,
    normalization), the weights that encode it, and the dtype and the device that they compute in. With another
    question, another round of zoom or other knobs, only new crops are encoded. Threads may share a cache.

    All patches of a crop are kept, to serve any `num_tokens`. When the cache is full, the least recently used crops
    are first reduced to the patches that were asked for, and then dropped.

    Args:
        max_bytes: upper bound of the size of all patches in bytes. They stay on the device that computed them.
        all_patches: whether to keep all patches of a crop or only those that were asked for. Without the others, more
            pictures fit, but a crop is encoded again if a later call asks for more of its tokens.

    Attributes:
        nbytes: size of the patches in the cache, in bytes.
        hits, misses: how often all crops of a picture were found in the cache, and how often some had to be encoded.
            Each round of zoom counts separately.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, all_patches: bool = True):
        if not max_bytes >= 0:  # NaN, too
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes, self.all_patches = max_bytes, all_patches
        self.nbytes = self.hits = self.misses = 0
        self._crops = OrderedDict()  # the least recently used first
        self._uncut = OrderedDict()  # keys of those that still have all patches, in the same order
        self._prepared = WeakValueDictionary()
        self._made_by = ()  # `describe_encoder` in the last call of `encode`, a part of the keys
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._crops)

    def encode(
        self, model, image_processor, images: list, plans: list | None = None, **options
    ) -> list[EncodedImages]:
        """
        Encode images. Only crops that the cache lacks pass the vision tower.

        Args:
            model: `MCLlavaForConditionalGeneration`, or PEFT's wrapper of one.
            image_processor: `MCLlavaImageProcessor`, or an `MCLlavaProcessor` with one.
            images: anything that `load_image` reads, or what `prepare` returned. Their crops share passes of the
                vision tower.
            plans, options: arguments of the image processor's call.

        Returns:
            One `EncodedImages` per image, in order, with features float[tokens, hidden] on the model's device.

        Raises:
            ValueError: as `load_image`, the image processor and `get_image_features` do, if the numbers of plans and
                images differ, or if weights are offloaded to disk.
        """
        if not isinstance(images, (list, tuple)):
            raise ValueError(f"images must be a list, got {type(images).__name__}: pass [image]")
        if not images:
            return []  # without reading weights for their hash
        model = without_peft(model)
        prepared = self._prepare(model, image_processor, images, plans, options)
        device, made_by = input_device(model), describe_encoder(model)
        self._made_by = made_by
        crops = [(image, crop) for image in prepared for crop in image.plan]

        def encode(missing: list[int]) -> Iterator[torch.Tensor]:
            boxes = {}
            for index in missing:
                image, crop = crops[index]
                boxes.setdefault(image, []).append(crop.box)
            return model.model.encode_passes(one_ahead(_look_up_pixels(boxes, device)))

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
        Do the part of `encode` that needs no model: load images, and cut the crops that the cache lacks. Another
        thread can do this while the model works.

        Arguments and errors are those of `encode`, which takes the result as `images`, with the same options.
        """
        prepared, device = self._prepare(model, image_processor, images, plans, options), input_device(model)
        for image, given in zip(prepared, images):
            if image.picture is given:  # the caller may change it before its crops are cut
                image.picture = given.copy()
            keys = {crop.box: ((*image.name, *self._made_by), crop.box) for crop in image.plan}
            with self._lock:
                new = [box for box, key in keys.items() if key not in self._crops]
            with suppress(MemoryError, torch.OutOfMemoryError):  # then `encode` cuts, when other threads may be done
                image.cut_ahead(new, device)
        return prepared

    def _prepare(self, model, image_processor, images: list, plans, options: dict) -> "list[PreparedImage]":
        """The images before they are cut. Equal images become one object, so that they are cut once."""
        image_processor = getattr(image_processor, "image_processor", image_processor)
        if plans is not None:
            plans = check_plans(plans, len(images))
        if image_processor.asks_to_zoom({**options, "plans": plans}):
            raise ValueError("zoom needs the question, and features are of the picture alone: pass zoom=0, or plans")
        given = {"plans": plans, **{name: value for name, value in options.items() if value is not None}}
        options = image_processor.check_kwargs(given)
        check_processor(model, image_processor, options)
        loaded = load_unprepared(images, options.get("input_data_format"))
        sizes = [image.picture.size if is_prepared(image) else image.size for image in loaded]
        found, values = [], image_processor.values_of_bytes(options)
        side = square_side(options.get("size", image_processor.size))
        resample = options.get("resample", image_processor.resample)
        for image, plan in zip(loaded, image_processor.plans_of(sizes, options)):
            if is_prepared(image):
                image.check(plan, side, resample, values)
            else:
                image = PreparedImage(image, plan, side, resample, values)
                with self._lock:
                    image = self._prepared.setdefault((image.name, side, tuple(plan)), image)
            found.append(image)
        return found

    def _project(self, model, image: "PreparedImage", patches: torch.Tensor, made_by: tuple) -> EncodedImages:
        """The features of one picture, from the patches of all its crops."""
        fields = describe_crops([image.plan], [image.picture.size], patches.device)
        placed = model.model.add_positions(patches, fields["crop_coords"], fields["crop_num_tokens"])
        return EncodedImages(model.model.multi_modal_projector(placed), **fields, weights_hash=made_by[0])

    def look_up(
        self, keys: list[tuple], counts: list[int], encode: Callable[[list[int]], Iterable[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """
        The last `counts[i]` patches of each crop i: float[counts[i], vision_hidden]. They must not be changed.

        Args:
            keys: (what `picture_key` returns, box) of each crop.
            counts: how many patches are asked for of each crop.
            encode: given the indices of new crops, returns all patches of these, in order, in parts of
                float[crops, patches, vision_hidden].
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
            passes = encode([numbers[key] for key in missing])
            each = _split_passes(passes, [asked[key] for key in missing])
            for key, (last, patches) in zip(missing, each, strict=True):
                found[key] = last
                row = last.nbytes // len(last)
                # What is too large for the cache must not empty it.
                if of_picture[key[0]] * row <= self.max_bytes:
                    kept = patches[1:].clone() if self.all_patches else last
                    self._put(key, _KeptCrop(kept, asked[key]))
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
            if (old := self._crops.pop(key, None)) is not None:  # with fewer patches, or from a faster thread
                self.nbytes -= old.patches.nbytes
                self._uncut.pop(key, None)
                crop.asked = max(crop.asked, old.asked)
                if len(old.patches) > len(crop.patches):
                    crop.patches = old.patches
            self._crops[key] = crop
            if self.all_patches:
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


def _split_passes(passes: Iterable[torch.Tensor], counts: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    For each crop i, a copy of its last `counts[i]` patches, and a view of all its patches, which keeps the whole pass
    in memory.

    One operator copies all crops with equal counts: after each operator, this thread may have to wait for Python's
    global interpreter lock.
    """
    counts = iter(counts)
    for patches in passes:
        stop = 0
        each = zip(islice(counts, len(patches)), patches, strict=True)
        for count, group in groupby(each, key=itemgetter(0)):
            views = [view for _, view in group]
            start, stop = stop, stop + len(views)
            yield from zip(torch.unbind_copy(patches[start:stop, -count:]), views)


def _look_up_pixels(boxes: "dict[PreparedImage, list[Box]]", device: torch.device) -> Iterator[torch.Tensor]:
    """The pixel values of crops of pictures, in parts of float32[up to `CROPS_PER_LOOK_UP`, 3, side, side]."""
    values = torch.from_numpy(next(iter(boxes)).values).to(device)  # the same for all
    crops = (crop for image in boxes for crop in image.cut(boxes[image], device))
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    while True:
        with torch.cuda.stream(stream):  # of the caller: another thread, which makes later parts, has its own
            part = list(islice(crops, CROPS_PER_LOOK_UP))
            pixels = look_up_bytes(part, values) if part else None
        if pixels is None:
            return
        yield pixels


class PreparedImage:
    """
    A picture before the model encodes it, see `FeatureCache.prepare`.

    Args:
        picture: as `load_image` returns it.
        plan: its crops.
        side, resample: of the crops in pixels, and the filter that resizes them.
        values: float32[3, 256], what each byte becomes in each channel.

    Attributes:
        name: the part of the picture's key in a `FeatureCache` that doesn't depend on the weights.
    """

    def __init__(self, picture: Image.Image, plan: list[Crop], side: int, resample: int, values: np.ndarray):
        self.picture, self.plan, self.side, self.resample, self.values = picture, plan, side, resample, values
        self.name = picture_key(picture.tobytes(), picture.size, resample, values.tobytes(), ())
        self._cut, self._lock = {}, Lock()

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes: four per pixel of the picture, as in Pillow, and the crops that are cut."""
        return 4 * self.picture.width * self.picture.height + 3 * self.side**2 * len(self._cut)

    def check(self, plan: list[Crop], side: int, resample: int, values: np.ndarray):
        """Raise a ValueError unless this was made with these arguments."""
        if (self.plan, self.side, self.resample) != (plan, side, resample) or not np.array_equal(self.values, values):
            raise ValueError("images were prepared with other options: pass `encode` those of `prepare`")

    def cut_ahead(self, boxes: list[Box], device: torch.device):
        """
        Cut crops and keep them for the next call of `cut`, unless they take more than `MOST_CUT_AHEAD`.

        In this thread alone: others like it prepare other pictures, and the model's must not wait for them.
        """
        with self._lock:
            new = [box for box in boxes if box not in self._cut]
            if new and 3 * self.side**2 * (len(self._cut) + len(new)) <= MOST_CUT_AHEAD:
                self._cut |= zip(new, cut_to(device, self.picture, new, self.side, self.resample, threads=1))

    def cut(self, boxes: list[Box], device: torch.device) -> Iterator[torch.Tensor]:
        """The crops, uint8[side, side, 3] each."""
        with self._lock:
            kept = {box: self._cut.pop(box) for box in boxes if box in self._cut}
        if new := [box for box in boxes if box not in kept]:
            kept |= zip(new, cut_to(device, self.picture, new, self.side, self.resample))
        for box in boxes:
            yield kept.pop(box)


def is_prepared(value) -> bool:
    """Whether a value is a `PreparedImage` of any copy of the code, see `is_encoded`."""
    return hasattr(value, "cut_ahead")


def load_unprepared(images: list, input_data_format: str | None = None) -> list:
    """The images loaded, except those that `FeatureCache.prepare` returned."""
    loaded = iter(load_images([image for image in images if not is_prepared(image)], input_data_format))
    return [image if is_prepared(image) else next(loaded) for image in images]


__all__ = ["FeatureCache", "PreparedImage", "check_processor", "is_prepared", "load_unprepared"]
