"""Turn a file, a URL, an array or a tensor into an RGB picture. Imports neither torch nor transformers."""

import base64
import io
import os
import urllib.request
from http.client import HTTPException

import numpy as np
from PIL import ExifTags, Image, ImageOps


MAX_IMAGE_SIDE = 20_000  # pixels; Pillow's own Image.MAX_IMAGE_PIXELS bounds the area
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
# Formats that Pillow may decode. Its other plugins are rare, and one of them runs a PostScript interpreter.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def load_image(image, input_data_format: str | None = None) -> Image.Image:
    """
    Turn anything that holds a picture into an RGB image with 8 bits per channel.

    Args:
        image: a PIL image in any mode; a path, an http(s) URL, a data URI or base64 text; an open file or the bytes
            of one; a NumPy array or torch tensor, HWC, CHW or HW, with 1, 3 or 4 channels, uint8, uint16 or float in
            [0, 1]. EXIF orientation is applied, transparent pixels are blended with white, 16-bit values are divided
            by 257, and of an animation the first frame is used. An RGB image that is already in memory, such as one
            that this function returned, is returned unchanged and not copied.
        input_data_format: "channels_first" or "channels_last". By default it is inferred from the shape; if both are
            possible, as with (3, 5, 3), NumPy arrays are read as HWC and torch tensors as CHW.

    Raises:
        ValueError: if there is no picture, it is corrupt, or it exceeds `MAX_IMAGE_SIDE`, `Image.MAX_IMAGE_PIXELS`
            or, if it comes from a URL, `MAX_DOWNLOAD_BYTES`.
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
    if hasattr(image, "cpu") and hasattr(image, "detach"):  # a torch tensor, checked without importing torch
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
    """Flatten an image, a batch [B, H, W, C] or [B, C, H, W], or (nested) lists of them into one list."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _read(source: str | os.PathLike, name: str):
    """A binary file for a path, http(s) URL, data URI or base64 text."""
    text = os.fspath(source)
    try:
        if text.lower().startswith(("http://", "https://")):
            return _download(text)
        if os.path.exists(text) and not os.path.isfile(text):  # reading a pipe or a device might never end
            raise ValueError("it is not a regular file: pass one")
        if isinstance(source, os.PathLike) or os.path.exists(text):
            return open(text, "rb")
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error
    header, comma, data = text.partition(",")
    if header.startswith("data:") and not header.endswith(";base64"):
        raise ValueError(f"{name} is a data URI without base64: encode the image as data:image/png;base64,...")
    try:
        return io.BytesIO(base64.b64decode("".join((data if comma else text).split()), validate=True))
    except ValueError:  # binascii.Error, or non-ASCII letters
        raise ValueError(f"{name} is neither a file, an http(s) URL, a data URI nor base64 text of an image") from None


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
    Open an image and read only its header. `load_image` accepts the result.

    Raises:
        ValueError: if the file is in none of `FORMATS`, or has more pixels than Pillow opens.
    """
    Image.init()
    try:
        return Image.open(file, formats=[format for format in FORMATS if format in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error} Resize it first") from None
    except Exception:  # Pillow's plugins raise many kinds of errors for a broken header
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
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # avoid a needless copy
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            array = np.asarray(image)
            if array.min() < 0 or array.max() > 65535:
                raise ValueError("its integers are not all in 0 to 65535")
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
        # Return no file's image: its owner may close it, or seek another frame.
        return image if type(image) is Image.Image and image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # truncated files fail only here, and each of Pillow's decoders has its own errors
        raise ValueError(f"{name} is corrupt or can't be turned into RGB ({error}): save it again") from error


def _from_array(array: np.ndarray, input_data_format: str | None, prefer_first: bool) -> Image.Image:
    name = f"the array of shape {array.shape}"
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise ValueError(f"{name} is not a picture: pass [H, W], [H, W, C] or [C, H, W]")
    else:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, -1))
        if input_data_format is not None:
            if input_data_format not in ("channels_first", "channels_last"):
                raise ValueError(f"input_data_format must be channels_first or channels_last, got {input_data_format}")
            first = input_data_format == "channels_first"
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


__all__ = ["FORMATS", "MAX_IMAGE_SIDE", "flatten_images", "load_image", "open_image"]
