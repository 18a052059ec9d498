"""Cut pictures into the crops that the vision tower reads."""

import math
import operator
import shutil
import sys
from itertools import accumulate
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_mc_llava import add_to_package
from .crops_mc_llava import (
    IMAGE_FIELDS,
    KNOB_MINIMA,
    MAX_CROPS,
    MOST_CROPS,
    NUM_TOKENS,
    PATCH_SIZE,
    SIDE,
    Crop,
    check_knob,
    check_plans,
    make_plans,
    plan_crops,
    refuse_unknown,
)
from .encoded_images_mc_llava import describe_crops
from .image_loading_mc_llava import MAX_IMAGE_SIDE, flatten_images, load_images
from .resizing_mc_llava import CROPS_PER_LOOK_UP, can_cut_on, cut_each, cut_on_device, look_up_bytes, look_up_crop
from .zoom_plan_mc_llava import count_closer, plan_scouts


logger = logging.get_logger(__name__)


# Options of transformers' image processors that would contradict the crops.
FIXED_OPTIONS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": False,
    "do_pad": False,
    "data_format": ChannelDimension.FIRST,
}
# Of a pixel after normalization: float16's largest. The tower makes NaN of much larger ones, which vLLM's cache keeps.
MAX_VALUE = 65504
# Keys of a saved configuration that are not options.
CONFIG_KEYS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}
# The code that a folder of an image processor and a tokenizer needs to load as a processor.
PROCESSOR_FILE = Path(__file__).with_name("processing_mc_llava.py")


def _cut_images(
    images: list[Image.Image], plans: list[list[Crop]], side: int, resample: int, table: np.ndarray
) -> np.ndarray:
    """
    float32[crops, 3, side, side]: the values in `table`, float32[3, 256], of the bytes of all crops. The same image
    object with the same boxes, as in a batch of questions about it, is cut once.
    """
    pixel_values = np.empty((sum(map(len, plans)), 3, side, side), dtype=np.float32)
    starts = accumulate(map(len, plans), initial=0)
    cut: dict[tuple, np.ndarray] = {}  # the values of a picture's crops
    for image, plan, start in zip(images, plans, starts):
        boxes, values = [crop.box for crop in plan], pixel_values[start : start + len(plan)]
        if (known := cut.setdefault((id(image), *boxes), values)) is not values:
            values[:] = known
            continue

        def write(index: int, crop: Image.Image, values: np.ndarray = values):
            look_up_crop(np.asarray(crop), table, values[index])

        cut_each(image, boxes, side, resample, write)
    return pixel_values


def _cut_tensors(
    pictures: list[torch.Tensor], plans: list[list[Crop]], side: int, table: torch.Tensor
) -> torch.Tensor:
    """The same on a device, for pictures uint8[height, width, 3], with the bicubic filter. Each picture is cut."""
    pixel_values = table.new_empty((sum(map(len, plans)), 3, side, side))
    starts = accumulate(map(len, plans), initial=0)
    for picture, plan, start in zip(pictures, plans, starts):
        crops = cut_on_device(picture, [crop.box for crop in plan], side)
        outputs = pixel_values[start : start + len(plan)]
        for part, out in zip(crops.split(CROPS_PER_LOOK_UP), outputs.split(CROPS_PER_LOOK_UP)):
            out.copy_(look_up_bytes(part, table))
    return pixel_values


def _concatenate(pictures: list) -> np.ndarray | torch.Tensor:
    """uint8[bytes]: the pixels of images, or of tensors on their device, one after another."""
    if isinstance(pictures[0], torch.Tensor):
        return torch.cat([picture.flatten() for picture in pictures])
    return np.concatenate([np.asarray(image).reshape(-1) for image in pictures])


def is_number(value) -> bool:
    # A longer integer is infinite as a float.
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_numbers(options: dict):
    """Raise a ValueError for means, deviations, a scale, a size or a filter that would give no pixels or garbage."""
    for name, low in (("image_mean", -math.inf), ("image_std", 0)):
        if (value := options.get(name)) is None:
            continue
        values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * 3
        if len(values) != 3 or not all(is_number(one) and one > low for one in values):
            bound = "" if low < 0 else " above 0"
            raise ValueError(f"{name} must be a finite number{bound}, or three of them, got {value!r:.100}")
    factor = options.get("rescale_factor")
    if factor is not None and not (is_number(factor) and factor > 0):
        raise ValueError(f"rescale_factor must be a finite number above 0, got {factor!r:.100}")
    for name in ("do_rescale", "do_normalize"):
        if not isinstance(options.get(name), (bool, np.bool_, type(None))):
            raise ValueError(f"{name} must be true or false, got {options[name]!r:.100}")
    if (resample := options.get("resample")) is not None:
        try:
            PILImageResampling(operator.index(resample))
        except (ValueError, TypeError):
            known = ", ".join(f"{entry.value} ({entry.name.lower()})" for entry in PILImageResampling)
            raise ValueError(f"resample must be one of Pillow's {known}, got {resample!r:.100}") from None
    if options.get("size") is not None:
        square_side(options["size"])  # or an error


def square_side(size) -> int:
    """The side of a size in any of transformers' forms. Raises a ValueError unless it is that of a square."""
    if isinstance(size, (list, tuple)):
        sides = list(size)
    else:
        sides = [size.get("height"), size.get("width")] if hasattr(size, "get") else [size, size]
    if len(sides) != 2 or sides[0] is None or sides[0] != sides[1]:
        raise ValueError(f"size must have equal height and width, got {size}: the vision tower reads squares")
    if (side := check_knob("size", sides[0], 1)) > MAX_IMAGE_SIDE:
        raise ValueError(f"size must be at most {MAX_IMAGE_SIDE}, got {side}")
    return side


class MCLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_crops (`int`): upper bound of the crops in addition to the whole image, at least 0.
    num_tokens (`int`): upper bound of the visual tokens of one image, at least 1.
    zoom (`int`): rounds of looking closer where the question points, within `max_crops` crops in all; 0 for a grid.
    patch_size (`int`): side of the vision tower's patches in pixels.
    plans (`list`, *optional*): crops to use instead of the usual grid, one plan per image: boxes (left, top, right,
        bottom) in pixels of the picture after its EXIF orientation was applied, among which `num_tokens` are shared,
        or `Crop`s as `MCLlavaImageProcessor.plan` returns them.
    """

    max_crops: int
    num_tokens: int
    zoom: int
    patch_size: int
    plans: list | None


def to_json(value):
    """A saved option with numbers of NumPy and torch as Python's, which JSON can hold."""
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value


class MCLlavaImageProcessor(PilBackend):
    """
    Cuts images into crops and prepares them for the vision tower. It uses Pillow only, so that the pixels do not
    depend on whether torchvision is installed.

    A call takes anything that `load_image` reads, or a (nested) list of it, and the options of
    `MCLlavaImageProcessorKwargs`. With a `device`, as transformers' image processors take it, pictures are sent there
    once and cut there, with the same pixels. It returns, for all crops of all images in order:

    - `pixel_values`, float32 [crops, 3, side, side];
    - `crop_boxes`, int64 [crops, 4]: left, top, right and bottom of each crop in pixels of its picture after the EXIF
      orientation was applied;
    - `crop_coords`, float32 [crops, 2]: the center of each crop as (x / width, y / height);
    - `crop_num_tokens`, int64 [crops]: how many tokens the model keeps of each crop;
    - `image_grid_thw`, int64 [images, 3]: rows [crops of the image, 1, 1]. The name and the format are Qwen2-VL's
      (time, height and width of a grid of patches): serving engines such as vLLM know them, and use the product of
      each row to assign the crops of a batch to its images.

    For example, two pictures of 5 crops and 1 crop, with 100 tokens each:

        pixel_values     [6, 3, 384, 384]
        crop_num_tokens  [20, 20, 20, 20, 20, 100]
        image_grid_thw   [[5, 1, 1], [1, 1, 1]]

    With `zoom`, these are the whole pictures and the crops that scout them, and the model gets what it needs to look
    closer:

    - `zoom_options`, int64 [images, 5]: rows [rounds, max_crops, height, width, resample];
    - `zoom_pictures`, uint8 [bytes]: the pixels of all pictures, one after another, each [height, width, 3];
    - `zoom_values`, float32 [images, 3, 256]: what `pixel_values` hold for each byte in each channel, the same for all
      images. Fields with a row for each image, as all others, can be concatenated to a batch.

    Raises:
        ValueError: if an option is unknown or out of range, an image can't be read, a plan doesn't fit its image, or
            `plans` are passed to the constructor.
    """

    valid_kwargs = MCLlavaImageProcessorKwargs
    model_input_names = list(IMAGE_FIELDS)

    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    size = {"height": SIDE, "width": SIDE}
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    max_crops = MAX_CROPS
    num_tokens = NUM_TOKENS
    zoom = 0
    patch_size = PATCH_SIZE

    def __init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # the published one names files that no longer exist; saving writes ours
        kwargs = {name: to_json(value) for name, value in kwargs.items()}
        self.check_kwargs({name: value for name, value in kwargs.items() if name not in CONFIG_KEYS})
        if kwargs.get("plans") is not None:
            raise ValueError("plans belong to the images of one call and can't be saved: pass them to the call")
        super().__init__(**kwargs)
        # The names that saving writes: what was saved is the same object as before, also in a hash of all of it.
        self.auto_map = {"AutoImageProcessor": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}
        if PROCESSOR_FILE.exists():
            self.auto_map["AutoProcessor"] = f"{PROCESSOR_FILE.stem}.MCLlavaProcessor"

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        known = CONFIG_KEYS | set(cls.valid_kwargs.__annotations__)
        if unknown := sorted(map(str, set(image_processor_dict) - known)):
            logger.warning_once(
                f"the saved image processor has unknown options {', '.join(unknown)}, which are ignored: another "
                "version may know them"
            )
        saved = {name: value for name, value in image_processor_dict.items() if name in known}
        return super().from_dict(saved, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Also saves the code of `MCLlavaProcessor`: a pipeline saves the image processor and the tokenizer, and loads a
        processor.
        """
        files = super().save_pretrained(save_directory)
        if PROCESSOR_FILE.exists():
            for path in (PROCESSOR_FILE, *map(Path, get_relative_import_files(PROCESSOR_FILE))):
                shutil.copyfile(path, Path(save_directory, path.name))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @property
    def option_names(self) -> set[str]:
        """The names of the options that a call takes."""
        return set(self.valid_kwargs.__annotations__)

    def check_kwargs(self, kwargs: dict) -> dict:
        """
        The options in `kwargs`, with the knobs as plain integers, and without those that are None.

        Raises:
            ValueError: if a name is unknown, a knob is out of range or an option contradicts the crops.
        """
        refuse_unknown(kwargs, self.option_names)
        if kwargs.get("plans") is not None:
            if kwargs.get("max_crops") is not None:
                raise ValueError("plans say which crops there are: leave max_crops out")
            if kwargs.get("zoom"):
                raise ValueError("plans say which crops there are: leave zoom out")
            kwargs = {**kwargs, "plans": check_plans(kwargs["plans"])}
        check_numbers(kwargs)
        for name, fixed in FIXED_OPTIONS.items():
            if kwargs.get(name) not in (None, fixed):
                raise ValueError(f"{name} must be {fixed}, got {kwargs[name]}: leave it out")
        knobs = {name: kwargs[name] for name in KNOB_MINIMA if kwargs.get(name) is not None}
        rest = {name: value for name, value in kwargs.items() if name not in KNOB_MINIMA}
        return rest | {name: check_knob(name, value) for name, value in knobs.items()}

    def asks_to_zoom(self, kwargs: dict) -> bool:
        """Whether a call with these options zooms: plans say where the crops are, whatever zoom was saved."""
        given = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        zoom = self.zoom if given.get("zoom") is None else given["zoom"]
        return given.get("plans") is None and check_knob("zoom", zoom) > 0

    def preprocess(self, images, **kwargs) -> BatchFeature:
        try:
            return super().preprocess(images, **self.check_kwargs(kwargs))
        except StrictDataclassError as error:  # the type of an option's value
            raise ValueError(f"an option has a wrong value: {error}") from error

    def _prepare_image_like_inputs(self, images, *, input_data_format=None, **kwargs) -> list[Image.Image]:
        return load_images(flatten_images(images), input_data_format)

    def _preprocess(
        self,
        images: list[Image.Image],
        *,
        size,
        resample,
        max_crops: int,
        num_tokens: int,
        zoom: int,
        patch_size: int,
        return_tensors,
        plans: list | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got an empty list of images: pass at least one")
        check_numbers({"size": size})
        side = size.height
        sizes = [image.size for image in images]
        is_zooming = self.asks_to_zoom({"plans": plans, "zoom": zoom})
        if is_zooming:
            plans = [plan_scouts(*size, zoom, max_crops, num_tokens, side, patch_size) for size in sizes]
        else:
            plans = make_plans(sizes, plans, max_crops, num_tokens, side, patch_size)

        table = self.values_of_bytes(kwargs)
        device = torch.device("cpu" if device is None else device)
        if device.type != "cpu" and return_tensors != "pt":
            raise ValueError(f'tensors on {device} need return_tensors="pt", got {return_tensors!r}')
        if can_cut_on(device, resample):
            distinct = {id(image): image for image in images}
            moved = {key: torch.from_numpy(np.array(image)).to(device) for key, image in distinct.items()}
            images = [moved[id(image)] for image in images]
            pixel_values = _cut_tensors(images, plans, side, torch.from_numpy(table).to(device))
        else:
            pixel_values = _cut_images(images, plans, side, resample, table)
        crops = describe_crops(plans, sizes, torch.device("cpu"))
        data = {"pixel_values": pixel_values, **{name: tensor.numpy() for name, tensor in crops.items()}}
        if is_zooming:
            most = min(max_crops, MOST_CROPS)
            rounds = [count_closer(*size, min(zoom, MOST_CROPS), most, num_tokens, side)[0] for size in sizes]
            rows = [[number, most, height, width, int(resample)] for number, (width, height) in zip(rounds, sizes)]
            data["zoom_options"] = np.array(rows, dtype=np.int64)
            data["zoom_pictures"] = _concatenate(images)
            data["zoom_values"] = np.repeat(table[None], len(images), axis=0)
        inputs = BatchFeature(data, tensor_type=return_tensors)
        if device.type != "cpu":  # the other fields are small
            inputs["pixel_values"] = inputs["pixel_values"].to(device)
        return inputs

    def values_of_bytes(self, options: dict) -> np.ndarray:
        """
        float32[3, 256]: the rescaled and normalized value of each byte of a picture in each channel, in a call with
        these options. It depends on nothing else, so it is computed once and looked up for each pixel.

        Raises:
            ValueError: if an option is invalid, or if the values would be NaN, above `MAX_VALUE` or all the same.
        """
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        options = {name: options.get(name, getattr(self, name)) for name in names}
        check_numbers(options)
        table = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if options["do_rescale"]:
            table = self.rescale(table, options["rescale_factor"])
        if options["do_normalize"]:
            table = self.normalize(table, options["image_mean"], options["image_std"])
        table = table.astype(np.float32).reshape(3, 256)
        is_unset = None in (options["do_rescale"], options["do_normalize"])
        is_in_range = (np.abs(table) <= MAX_VALUE).all()  # NaN is not
        if is_unset or not is_in_range or not np.ptp(table, axis=1).all():
            given = ", ".join(f"{name}={value}" for name, value in options.items())
            raise ValueError(
                f"{given} give the bytes 0 to 255 values that are equal, not finite or beyond "
                f"+-{MAX_VALUE:g}: leave them out"
            )
        return table

    def plans_of(self, sizes: list[tuple[int, int]], options: dict) -> list[list[Crop]]:
        """The crops of images of these sizes (width, height) in a call with these options, without zoom."""
        names = ("max_crops", "num_tokens", "size", "patch_size")
        max_crops, num_tokens, size, patch_size = (options.get(name, getattr(self, name)) for name in names)
        return make_plans(sizes, options.get("plans"), max_crops, num_tokens, square_side(size), patch_size)

    def fill_knobs(
        self, max_crops: int | None = None, num_tokens: int | None = None, zoom: int | None = None
    ) -> dict[str, int]:
        """
        The three knobs, by default with their saved values.

        Raises:
            ValueError: if a knob is out of range.
        """
        given = {"max_crops": max_crops, "num_tokens": num_tokens, "zoom": zoom}
        return {
            name: check_knob(name, getattr(self, name) if value is None else value) for name, value in given.items()
        }

    def plan(
        self,
        width: int,
        height: int,
        max_crops: int | None = None,
        num_tokens: int | None = None,
        zoom: int | None = None,
    ) -> list[Crop]:
        """
        The crops of an image of width x height pixels, by default with the saved knobs: `plan_crops` or, with zoom,
        `plan_scouts`. It needs no pixels.

        Raises:
            ValueError: if a knob is out of range.
        """
        knobs = self.fill_knobs(max_crops, num_tokens, zoom)
        zoom = knobs.pop("zoom")
        tower = {"side": self.size["height"], "patch_size": self.patch_size}
        if zoom:
            return plan_scouts(width, height, zoom, **knobs, **tower)
        return plan_crops(width, height, **knobs, **tower)


MCLlavaImageProcessor.register_for_auto_class()

add_to_package(__name__)

__all__ = ["MCLlavaImageProcessor", "MCLlavaImageProcessorKwargs"]
