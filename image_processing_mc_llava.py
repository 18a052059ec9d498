"""From pictures to crops: the crop plan (integers only), image loading, and the image processor.

`plan_crops` alone knows where the crops of an image lie and how many tokens each of them gives. `load_image` alone
knows how a file, a download, an array or a tensor becomes an RGB picture.
"""

import base64
import io
import operator
import os
import urllib.request
from difflib import get_close_matches
from http.client import HTTPException
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs


MAX_IMAGE_SIDE = 20_000  # pixels; Pillow's own Image.MAX_IMAGE_PIXELS bounds the area
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
# What Pillow may decode: its other plugins are rare, and one of them hands files to a PostScript interpreter.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


class Crop(NamedTuple):
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image
    num_tokens: int


def plan_crops(width: int, height: int, max_crops: int, num_tokens: int, side: int, patch_size: int) -> list[Crop]:
    r"""
    Lay an overlapping grid of crops over an image and share `num_tokens` tokens out among them.

    Both knobs are upper bounds: there are at most `max_crops` crops, and at most `num_tokens - 1`, beside the whole
    image, and the crops together give at most `num_tokens` tokens.

    A base side c, at first `side`, grows in steps of 10 until a grid with stride s = c // 2 has few enough crops.
    Column i spans [i * s, i * s + c]; the last one reaches to the right edge. Rows likewise. For 1000 x 700 pixels,
    side 384 and at least 8 crops, c = 384 and s = 192, and the grid has 4 columns and 2 rows:

        0    192   384   576   768   1000
        |--- 1, 2 ---|     |              |          crop 0 is the whole image; then columns from left
              |--- 3, 4 ---|              |          to right, and in each the crops from top to bottom
                    |--- 5, 6 ---|        |
                          |---- 7, 8 -----|

    With M crops in all, each gives K = num_tokens // M tokens and the last one what remains, but a crop can't give
    more than all its patches but one: the published model drops the first patch of every crop (as if SigLIP had a
    class token), and its weights were trained so. Here 728 // 9 = 80 tokens for crops 0 to 7 and 88 for crop 8.

    Args:
        width, height: size of the image in pixels.
        max_crops: upper bound of the crops beside the whole image, at least 0.
        num_tokens: upper bound of the image's tokens, at least 1.
        side: side of the square that the vision tower reads, in pixels; also the smallest base side.
        patch_size: side of one of the tower's patches, in pixels.

    Returns:
        The crops in the order of their tokens, the whole image first.

    Raises:
        ValueError: if a knob is out of range, or `side` has fewer than two patches.
    """
    selectable_patches = (side // patch_size) ** 2 - 1
    if selectable_patches < 1:
        raise ValueError(
            f"size {side} must hold at least 2 x 2 patches, got patch_size {patch_size}: take a smaller one"
        )
    max_crops = check_knob("max_crops", max_crops, minimum=0)
    num_tokens = check_knob("num_tokens", num_tokens, minimum=1)

    columns = rows = 1
    limit = min(max_crops, num_tokens - 1)
    if limit > 0 and max(width, height) > side + side // 2:
        base = side - 10
        columns = rows = limit + 1
        while columns * rows > limit:
            base += 10
            stride = base // 2
            columns = max(1, (width - base) // stride + 1)
            rows = max(1, (height - base) // stride + 1)

    boxes = [(0, 0, width, height)]
    if columns * rows > 1:
        for column in range(columns):
            for row in range(rows):
                left, top = column * stride, row * stride
                right = width if column == columns - 1 else left + base
                bottom = height if row == rows - 1 else top + base
                boxes.append((left, top, right, bottom))

    share = num_tokens // len(boxes)
    shares = [share] * (len(boxes) - 1) + [num_tokens - share * (len(boxes) - 1)]
    return [Crop(box, min(share, selectable_patches)) for box, share in zip(boxes, shares)]


def check_knob(name: str, value: int, minimum: int) -> int:
    """`value` as an int; ValueError where it is not an integer, or below `minimum`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)  # takes NumPy's integers, refuses 2.0
    except TypeError:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}") from None
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def refuse_unknown(names, known: set[str]):
    """ValueError for names that are not known, with the likeliest of those that are."""
    if unknown := sorted(set(names) - known):
        hints = [hint for name in unknown for hint in get_close_matches(name, known, n=1)]
        remedy = f"did you mean {', '.join(hints)}?" if hints else "leave them out"
        raise ValueError(f"unknown options {', '.join(unknown)}: {remedy}")


def load_image(image, input_data_format: str | None = None) -> Image.Image:
    """
    Turn anything that shows a picture into an RGB image with 8 bits a channel.

    Args:
        image: a PIL image in any mode; a path, an http(s) URL, a data URI or base64 text; an open file or the bytes
            of one; a NumPy array or torch tensor, HWC, CHW or HW, with 1, 3 or 4 channels, uint8, uint16 or float in
            [0, 1]. EXIF orientation is applied, transparency is laid over white, 16 bits of grey or of an array are
            divided by 257, and an animation shows its first frame.
        input_data_format: "channels_first" or "channels_last". Left out, a shape that could be either, such as
            (3, 5, 3), is read as NumPy arrays usually are (HWC) or torch tensors usually are (CHW).

    Raises:
        ValueError: if there is no picture, it is corrupt, or it is larger than `MAX_IMAGE_SIDE`,
            `Image.MAX_IMAGE_PIXELS` or, where it comes from a URL, `MAX_DOWNLOAD_BYTES`.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "image")
    if isinstance(image, (str, os.PathLike)):
        name = str(image) if len(str(image)) <= 80 else f"{str(image)[:77]}..."
        return _decode(_read(image, name), name)
    if isinstance(image, (bytes, bytearray)):
        return _decode(io.BytesIO(image), f"{len(image)} bytes")
    if hasattr(image, "read"):
        return _decode(io.BytesIO(image.read()), getattr(image, "name", None) or "the open file")
    if hasattr(image, "cpu") and hasattr(image, "detach"):  # a torch tensor, without importing torch for it
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        return _from_array(image, input_data_format, prefer_first=True)
    if isinstance(image, np.ndarray):
        return _from_array(image, input_data_format, prefer_first=False)
    raise ValueError(
        f"cannot read an image from {type(image).__name__}: "
        "pass a PIL image, a path, a URL, base64 text, a file, bytes, an array or a tensor"
    )


def flatten_images(images) -> list:
    """One flat list of an image, a batch [B, H, W, C] or [B, C, H, W], or (nested) lists of them."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _read(source: str | os.PathLike, name: str):
    """A binary file for a path, http(s) URL, data URI or base64 text."""
    text = os.fspath(source)
    try:
        if text.lower().startswith(("http://", "https://")):
            return _download(text)
        if os.path.exists(text) and not os.path.isfile(text):  # a pipe or a device could be read for ever
            raise ValueError("it is no regular file: pass one")
        if isinstance(source, os.PathLike) or os.path.exists(text):
            return open(text, "rb")
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error
    header, comma, data = text.partition(",")
    if header.startswith("data:") and not header.endswith(";base64"):
        raise ValueError(f"{name} is a data URI without base64: encode the image as data:image/png;base64,...")
    try:
        return io.BytesIO(base64.b64decode("".join((data if comma else text).split()), validate=True))
    except ValueError:  # binascii's, or for letters that are no ASCII
        raise ValueError(f"{name} is no file, no http(s) URL, no data URI and no base64 text of an image") from None


def _download(url: str) -> io.BytesIO:
    request = urllib.request.Request(url, headers={"User-Agent": "mc-llava"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        content = response.read(MAX_DOWNLOAD_BYTES + 1)
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"it holds more than {MAX_DOWNLOAD_BYTES} bytes: download and resize it first")
    return io.BytesIO(content)


def _decode(file, name: str) -> Image.Image:
    with file:
        return _to_rgb(open_image(file, name), name)


def open_image(file, name: str) -> Image.Image:
    """
    An image of which no more than the header has been read: `load_image` takes it.

    Raises:
        ValueError: if the file is none of `FORMATS`, or has more pixels than Pillow opens.
    """
    Image.init()
    try:
        return Image.open(file, formats=[format for format in FORMATS if format in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error} Resize it first") from None
    except Exception:  # Pillow's plugins raise whatever a broken header makes them stumble over
        raise ValueError(f"{name} is not an image that can be read: save it as PNG or JPEG") from None


def _check_size(width: int, height: int, name: str):
    if width < 1 or height < 1:
        raise ValueError(f"{name} has {width} x {height} pixels: an image needs at least 1 x 1")
    if max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels, a side may have {MAX_IMAGE_SIDE}: resize it first")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than Pillow's limit of {Image.MAX_IMAGE_PIXELS}: resize it "
            "first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(*image.size, name)
    try:
        if (frame := image.tell()) != 0:
            image.seek(0)
            first = image.copy()
            image.seek(frame)
            image = first
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            array = np.asarray(image)
            if array.min() < 0 or array.max() > 65535:
                raise ValueError("its integers lie outside of 0 to 65535")
            opaque = np.where(array == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
            grey = _from_array(array.astype(np.uint16), None, prefer_first=False)
            return Image.composite(grey, Image.new("RGB", grey.size, "white"), Image.fromarray(opaque))
        if image.mode == "F":
            return _from_array(np.asarray(image), None, prefer_first=False)
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # a truncated file shows only here, and each of Pillow's decoders has its own errors
        raise ValueError(f"{name} is corrupt or can't be turned into RGB ({error}): save it again") from error


def _from_array(array: np.ndarray, input_data_format: str | None, prefer_first: bool) -> Image.Image:
    name = f"the array of shape {array.shape}"
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise ValueError(f"{name} is no picture: pass [H, W], [H, W, C] or [C, H, W]")
    else:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, -1))
        if input_data_format is not None:
            first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        elif not first and not last:
            raise ValueError(f"{name} has no axis of 1, 3 or 4 channels: pass [H, W, C] or [C, H, W]")
        elif first and last:
            first = prefer_first
        if first:
            array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name} has {array.shape[-1]} channels: pass 1, 3 or 4")
    _check_size(array.shape[1], array.shape[0], name)

    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"{name} has floats from {low} to {high}, allowed are 0 to 1: scale them, or pass uint8")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {array.dtype}: pass uint8, uint16 or floats in 0 to 1")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[-1]]
    array = array[..., 0] if mode == "L" else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)


KNOB_MINIMA = {"max_crops": 0, "num_tokens": 1, "patch_size": 1}
# Options of transformers' image processors that would contradict the crops.
FIXED_OPTIONS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": False,
    "do_pad": False,
    "data_format": ChannelDimension.FIRST,
}
# What a saved configuration holds besides options.
CONFIG_KEYS = {"image_processor_type", "processor_class", "feature_extractor_type"}


class MCLlavaImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_crops (`int`): upper bound of the crops beside the whole image, at least 0.
    num_tokens (`int`): upper bound of the visual tokens of one image, at least 1.
    patch_size (`int`): side of the vision tower's patches in pixels.
    """

    max_crops: int
    num_tokens: int
    patch_size: int


class MCLlavaImageProcessor(PilBackend):
    """
    Cuts images into crops and prepares them for the vision tower, with Pillow alone: whether torchvision is installed
    does not change a pixel.

    A call returns, for all crops of all images in order:

    - `pixel_values`, float32 [crops, 3, side, side];
    - `crop_coords`, float32 [crops, 2]: the centre of each crop as (x / width, y / height);
    - `crop_num_tokens`, int64 [crops]: how many tokens the model keeps of each crop;
    - `image_grid_thw`, int64 [images, 3]: rows [crops of the image, 1, 1].
    """

    valid_kwargs = MCLlavaImageProcessorKwargs
    model_input_names = ["pixel_values", "crop_coords", "crop_num_tokens", "image_grid_thw"]

    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    size = {"height": 384, "width": 384}
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    max_crops = 100
    num_tokens = 728
    patch_size = 14

    def __init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # the published one names files that are gone; saving writes it anew
        self.check_kwargs({name: value for name, value in kwargs.items() if name not in CONFIG_KEYS})
        super().__init__(**kwargs)

    @property
    def option_names(self) -> set[str]:
        return set(self.valid_kwargs.__annotations__)

    def check_kwargs(self, kwargs: dict) -> dict:
        """
        The options in `kwargs`, with the knobs as plain integers, or left out where they are None.

        Raises:
            ValueError: if a name is unknown, a knob is out of range or an option asks for what crops can't have.
        """
        refuse_unknown(kwargs, self.option_names)
        for name, fixed in FIXED_OPTIONS.items():
            if kwargs.get(name) not in (None, fixed):
                raise ValueError(f"{name} must be {fixed}, got {kwargs[name]}: leave it out")
        knobs = {name: kwargs[name] for name in KNOB_MINIMA if kwargs.get(name) is not None}
        rest = {name: value for name, value in kwargs.items() if name not in KNOB_MINIMA}
        return rest | {name: check_knob(name, value, KNOB_MINIMA[name]) for name, value in knobs.items()}

    def preprocess(self, images, **kwargs) -> BatchFeature:
        return super().preprocess(images, **self.check_kwargs(kwargs))

    def _prepare_image_like_inputs(self, images, *, input_data_format=None, **kwargs) -> list[Image.Image]:
        return [load_image(image, input_data_format) for image in flatten_images(images)]

    def _preprocess(
        self,
        images: list[Image.Image],
        *,
        size,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        max_crops: int,
        num_tokens: int,
        patch_size: int,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("got an empty list of images: pass at least one")
        if size.height is None or size.height != size.width:
            raise ValueError(f"size must have equal height and width, got {size}: the vision tower reads squares")
        side = size.height
        plans = [plan_crops(*image.size, max_crops, num_tokens, side, patch_size) for image in images]

        # Rescaling and normalising depend on the channel and the byte alone: work them out for the 256 bytes, look
        # the pixels up.
        table = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if do_rescale:
            table = self.rescale(table, rescale_factor)
        if do_normalize:
            table = self.normalize(table, image_mean, image_std)
        table = table.astype(np.float32).reshape(3, 256)

        pixel_values = np.empty((sum(map(len, plans)), 3, side, side), dtype=np.float32)
        coords = []
        for image, plan in zip(images, plans):
            for crop in plan:
                # `resize(box=...)` would let the filter see beyond the crop's edge: cut first.
                pixels = np.asarray(image.crop(crop.box).resize((side, side), resample))
                for channel in range(3):
                    np.take(table[channel], pixels[..., channel], out=pixel_values[len(coords), channel])
                left, top, right, bottom = crop.box
                coords.append(((left + right) / 2 / image.width, (top + bottom) / 2 / image.height))
        data = {
            "pixel_values": pixel_values,
            "crop_coords": np.array(coords, dtype=np.float32),
            "crop_num_tokens": np.array([crop.num_tokens for plan in plans for crop in plan], dtype=np.int64),
            "image_grid_thw": np.array([[len(plan), 1, 1] for plan in plans], dtype=np.int64),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def plan(self, width: int, height: int, max_crops: int | None = None, num_tokens: int | None = None) -> list[Crop]:
        """`plan_crops` for an image of this size, with the saved knobs where none are given. No pixel is touched."""
        return plan_crops(
            width,
            height,
            self.max_crops if max_crops is None else max_crops,
            self.num_tokens if num_tokens is None else num_tokens,
            self.size["height"],
            self.patch_size,
        )


MCLlavaImageProcessor.register_for_auto_class()

__all__ = ["MCLlavaImageProcessor", "MCLlavaImageProcessorKwargs"]
