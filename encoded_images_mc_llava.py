"""Encoded images: the outputs of vision tower and projector, and their file."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate, islice

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .crops_mc_llava import Crop, center_of


UNKNOWN = "unknown"  # the hash of weights that are offloaded to disk


def read_integers(*tensors: torch.Tensor) -> list[list]:
    """The values of tensors of integers as (nested) lists. They are read at once: each read waits for the device."""
    device = tensors[0].device
    flat = torch.cat([tensor.reshape(-1).to(device, torch.int64) for tensor in tensors]).tolist()
    ends = accumulate(tensor.numel() for tensor in tensors)
    parts = (np.array(flat[end - tensor.numel() : end], np.int64) for tensor, end in zip(tensors, ends))
    return [part.reshape(tensor.shape).tolist() for part, tensor in zip(parts, tensors)]


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


def count_placeholders(run_ends: list[list[int]]) -> list[int]:
    """The number of `<image>` tokens in each row, of what `find_run_ends` found."""
    ends = list(accumulate((max(row, default=0) for row in run_ends), max))
    return [end - start for start, end in zip([0, *ends], ends)]


def check_placeholders(run_ends: list[list[int]], tokens_per_image: list[int], may_be_joined: bool = False):
    """See `MCLlavaModel.get_placeholder_mask`."""
    found = [end for row in run_ends for end in row if end]
    image_ends = list(accumulate(tokens_per_image))
    is_split = not (may_be_joined and len(image_ends) == 1) and not set(found) <= set(image_ends)
    if (found[-1] if found else 0) != image_ends[-1] or is_split:
        raise ValueError(
            f"the rows have {count_placeholders(run_ends)} <image> tokens, the images {tokens_per_image} tokens: "
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
            `MCLlavaForConditionalGeneration.hash_encoder`; `UNKNOWN` if guided zoom ran with offloaded weights.

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


def describe_crops(
    plans: list[list[Crop]], sizes: list[tuple[int, int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """The fields of the image processor, and of `EncodedImages`, that describe the crops of images of these sizes."""
    crops = [crop for plan in plans for crop in plan]
    coords = [center_of(crop.box, *size) for plan, size in zip(plans, sizes) for crop in plan]
    return {
        "crop_boxes": torch.tensor([crop.box for crop in crops], device=device),
        "crop_coords": torch.tensor(coords, dtype=torch.float32, device=device),  # whatever dtype is default
        "crop_num_tokens": torch.tensor([crop.num_tokens for crop in crops], device=device),
        "image_grid_thw": torch.tensor([[len(plan), 1, 1] for plan in plans], device=device),
    }


def without_peft(model):
    """The model that PEFT's `PeftModel` wraps, or the model itself. Its `model` may be something else."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_weights(images: list[EncodedImages], model):
    """
    Raise a ValueError if images were encoded with other weights than a model's. Weights offloaded to disk can't be
    compared: a model that has some accepts what it, or another such model, has encoded.
    """
    try:
        weights_hash = model.hash_encoder()
    except ValueError:
        if any(image.weights_hash != UNKNOWN for image in images):
            raise
        return
    if any(image.weights_hash != weights_hash for image in images):
        raise ValueError(
            "the images were encoded with other weights of vision tower, coordinate embedding or projector "
            "(or another dtype or configuration): encode them again with this model"
        )


__all__ = [
    "UNKNOWN",
    "EncodedImages",
    "check_counts",
    "check_placeholders",
    "check_weights",
    "count_image_tokens",
    "count_placeholders",
    "describe_crops",
    "input_device",
    "is_encoded",
    "read_integers",
    "sum_per_image",
    "without_peft",
]
