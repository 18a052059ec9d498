"""Turn a file, a URL, an array or a tensor into an RGB picture. Imports neither torch nor transformers."""

import base64
import io
import os
import re
import time
import urllib.request
from http.client import HTTPException
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from PIL import Image

from .image_costs_mc_llava import MAX_IMAGE_SIDE, check_dimensions, check_header, check_work, explain_limit
from .image_pixels_mc_llava import array_to_rgb, image_to_rgb


MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
MAX_DOWNLOAD_SECONDS = 300
# Formats that Pillow may decode. Its other plugins are rare, and one of them runs a PostScript interpreter. HEIF needs
# a plugin such as pillow-heif.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def load_image(image, input_data_format: str | None = None) -> Image.Image:
    """
    Turn anything that holds a picture into an RGB image with 8 bits per channel.

    - EXIF orientation is applied. A broken EXIF block counts as none.
    - Transparent pixels are blended with white.
    - Colors with an ICC profile are converted to sRGB. A broken profile counts as none. A profile in the `info` of a
      PIL image describes its pixels, as it does in Pillow; the result has none.
    - Of a file with several frames the first is read. A PIL image gives the frame that it stands at, and stays there.
    - Grey or colors of 16 bits, and grey in mode I, are scaled to 8 bits by their depth. A file may declare it. If it
      doesn't, the depth is the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value: 12-bit X-rays are
      divided by 4095 / 255, and pictures with a value of 16384 or more by 257. To decide yourself, pass uint8 or
      floats.

    Args:
        image: a PIL image in any mode; a path, an http(s) URL, a data URI or base64 text; an open file or the bytes
            of one; a NumPy array or torch tensor, HWC, CHW or HW, with 1, 3 or 4 channels, uint8, uint16 or float in
            [0, 1]. An RGB image that is already in memory, such as one that this function returned, is returned
            unchanged and not copied.
        input_data_format: "channels_first" or "channels_last". By default it is inferred from the shape; if both are
            possible, as with (3, 5, 3), NumPy arrays are read as HWC and torch tensors as CHW.

    Raises:
        ValueError: if there is no picture, it is closed or corrupt, it exceeds `MAX_IMAGE_SIDE`,
            `Image.MAX_IMAGE_PIXELS` or, if it comes from a URL, `MAX_DOWNLOAD_BYTES`, or if its file asks for far more
            work than its size calls for, such as a JPEG of hundreds of scans.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    if isinstance(image, (str, os.PathLike)):
        name = str(image) if len(str(image)) <= 80 else f"{str(image)[:77]}..."
        return _decode(_read(image, name), name)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), f"data of {len(image)} bytes")
    if hasattr(image, "read"):
        name = getattr(image, "name", None) or "the open file"
        return _decode(_read_open(image, name), name)
    if hasattr(image, "cpu") and hasattr(image, "detach"):  # a torch tensor, checked without importing torch
        return _from_tensor(image, input_data_format)
    if isinstance(image, np.ndarray):
        return _from_array(image, input_data_format)
    raise ValueError(
        f"cannot read an image from {type(image).__name__}: "
        "pass a PIL image, a path, a URL, base64 text, a file, bytes, an array or a tensor"
    )


def load_images(images: list, input_data_format: str | None = None) -> list[Image.Image]:
    """Load each with `load_image`; one that comes again, as the same object or path, is loaded once."""
    keys = [image if isinstance(image, (str, os.PathLike)) else id(image) for image in images]
    loaded = {key: load_image(image, input_data_format) for key, image in dict(zip(keys, images)).items()}
    return [loaded[key] for key in keys]


def flatten_images(images) -> list:
    """Flatten an image, a batch [B, H, W, C] or [B, C, H, W], or (nested) lists of them into one list."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if getattr(images, "ndim", 0) != 4:
        return [images]
    return list(images.unbind() if getattr(images, "is_nested", False) else images)


def _read(source: str | os.PathLike, name: str):
    """A binary file for a path, http(s) URL, data URI or base64 text."""
    text = os.fsdecode(source)
    if not text.strip():
        raise ValueError("the path of an image is empty: pass a file, an http(s) URL, a data URI or base64 text")
    try:
        if (url := text.strip()).lower().startswith(("http://", "https://")):
            return _download(_quote(url))
        if os.path.exists(text) and not os.path.isfile(text):  # reading a pipe or a device might never end
            raise ValueError("it is not a regular file: pass one")
        if isinstance(source, os.PathLike) or os.path.exists(text):
            return open(text, "rb")
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error
    header, comma, data = text.partition(",")
    if header[:5].lower() == "data:" and header[-7:].lower() != ";base64":
        raise ValueError(f"{name} is a data URI without base64: encode the image as data:image/png;base64,...")
    try:
        return io.BytesIO(base64.b64decode("".join((data if comma else text).split()), validate=True))
    except ValueError:  # binascii.Error, or non-ASCII letters
        raise ValueError(f"{name} is neither a file, an http(s) URL, a data URI nor base64 text of an image") from None


def _download(url: str) -> io.BytesIO:
    request, content = urllib.request.Request(url, headers={"User-Agent": "mc-llava"}), bytearray()
    end = time.monotonic() + MAX_DOWNLOAD_SECONDS
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response:
        while part := response.read1(2**20):  # as much as has come
            content += part
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"it holds more than {MAX_DOWNLOAD_BYTES} bytes: download and resize it first")
            if time.monotonic() > end:
                raise ValueError(f"it has not come within {MAX_DOWNLOAD_SECONDS} seconds: download it first")
    return io.BytesIO(content)


def _quote(url: str) -> str:
    """A URL as a browser sends what is typed into it: quoted, unless it is already, and with an ASCII host."""
    scheme, host, *rest = urlsplit(url)
    if not host.isascii():
        user, at, host = host.rpartition("@")
        name, colon, port = host.partition(":")
        host = user + at + name.encode("idna").decode() + colon + port
    rest = (re.sub("%(?![0-9A-Fa-f]{2})", "%25", part) for part in rest)
    return urlunsplit([scheme, host, *(quote(part, safe="%/:;,?@&=+$!~*'()[]") for part in rest)])


def _read_open(file, name: str) -> io.BytesIO:
    try:
        content = file.read()
    except MemoryError:
        raise
    except Exception as error:  # a file can be an object of any library
        raise ValueError(f"cannot read {name} ({error}): pass a file that is open for reading") from error
    if not isinstance(content, (bytes, bytearray, memoryview)):
        kind = type(content).__name__
        raise ValueError(f"{name} gives {kind} and not bytes: open it in binary mode, as in open(path, 'rb')")
    return io.BytesIO(bytes(content))


def _decode(file, name: str) -> Image.Image:
    with file:
        return _to_rgb(open_image(file, name), name, is_ours=True)


def open_image(file, name: str) -> Image.Image:
    """
    Open an image and read only its header. `load_image` accepts the result.

    Raises:
        ValueError: if the file can't be read, is in none of `FORMATS`, exceeds `MAX_IMAGE_SIDE` or
            `Image.MAX_IMAGE_PIXELS`, or is an icon with a larger picture inside than icons have: Pillow decodes icons
            when they are opened.
    """
    Image.init()
    try:
        check_header(file, name)
    except OSError as error:  # of a disk, or of what a system shows as files
        raise ValueError(f"cannot read the image {name}: {error}") from error
    try:
        image = _open(file)
    except Image.DecompressionBombError:  # Pillow's message names twice the limit, up to which it only warns
        raise ValueError(f"{name} has {explain_limit()}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds of errors for a broken header
        raise ValueError(f"{name} is not an image that can be read: {_explain(file, error)}") from None
    check_dimensions(*image.size, name)
    return image


def _open(file) -> Image.Image:
    formats = [format for format in FORMATS if format in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except Exception:
        file.seek(0)
        if file.read(12)[4:] not in (b"ftypavif", b"ftypavis"):
            raise
        # Pillow doesn't open an AVIF with a broken EXIF block. Each part of the file has an entry that names its kind.
        file.seek(0)
        hidden = re.sub(rb"(infe.{8}(?:..)?)Exif", rb"\1none", file.read(), flags=re.DOTALL)
        return Image.open(io.BytesIO(hidden), formats=formats)


def _explain(file, error: Exception) -> str:
    """What to do about a file that no decoder took."""
    if "MAX_TEXT_CHUNK" in str(error):
        return "its color profile or a text in it is too large, save it without"
    try:
        file.seek(0)
        head = file.read(12)
    except Exception:  # it is closed
        head = None
    if head == b"":
        is_path = not isinstance(file, io.BytesIO)
        return "the file is empty" if is_path else "it is empty or was read to its end: pass all of its bytes"
    if head is not None and head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis"):
        return "HEIF needs a plugin, such as pillow-heif with its register_heif_opener(): or save it as JPEG"
    return "save it as PNG or JPEG"


def _to_rgb(image: Image.Image, name: str, is_ours: bool = False) -> Image.Image:
    check_dimensions(*image.size, name)
    try:
        check_work(image)
        return image_to_rgb(image, is_ours)
    except MemoryError:
        raise
    except Exception as error:  # truncated files fail only here, and each of Pillow's decoders has its own errors
        if _is_closed(image, error):
            raise ValueError(f"{name} is closed: pass it while it is open, or call its load() before") from error
        raise ValueError(f"{name} is corrupt or can't be turned into RGB ({error}): save it again") from error


def _is_closed(image: Image.Image, error: Exception) -> bool:
    file = getattr(image, "fp", None)
    waits = bool(getattr(image, "tile", None)) and (file is None or getattr(file, "closed", False))
    return waits or "closed image" in str(error)


def _from_tensor(tensor, input_data_format: str | None) -> Image.Image:
    if tensor.is_nested:
        raise ValueError("the nested tensor holds several pictures: pass its tensors one by one")
    name = f"the tensor of shape {tuple(tensor.shape)}"
    if tensor.is_meta:
        raise ValueError(f"{name} is on the device meta and has no values: pass one on another device")
    if tensor.is_quantized:
        raise ValueError(f"{name} is quantized: pass tensor.dequantize()")
    if str(tensor.layout) != "torch.strided":
        raise ValueError(f"{name} has the layout {tensor.layout}: pass tensor.to_dense()")

    def read(rows) -> np.ndarray:
        rows = rows.detach().cpu()
        return (rows.float() if rows.is_floating_point() else rows).numpy(force=True)

    try:
        return _from_rows(tensor.detach(), read, name, input_data_format, prefer_first=True)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{name} can't be read ({error}): pass a dense tensor of uint8 or floats") from error


def _from_array(array: np.ndarray, input_data_format: str | None) -> Image.Image:
    name = f"the array of shape {array.shape}"
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name} is masked: pass array.filled(value)")
    if isinstance(array, np.matrix):
        raise ValueError(f"{name} is a matrix: pass np.asarray(matrix)")
    return _from_rows(array, np.asarray, name, input_data_format, prefer_first=False)


def _from_rows(array, read, name: str, input_data_format: str | None, prefer_first: bool) -> Image.Image:
    """
    Args:
        array: of any library, which knows its shape and can be indexed.
        read: turns a part of it into a NumPy array.
        prefer_first: if the channels may be either axis, the first one is.
    """
    shape = tuple(array.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} is not a picture: pass [H, W], [H, W, C] or [C, H, W]")
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format must be channels_first or channels_last, got {input_data_format}")
    first, last = (len(shape) == 3 and shape[axis] in (1, 3, 4) for axis in (0, -1))
    if len(shape) == 3 and input_data_format is not None:
        first = input_data_format == "channels_first"
    elif len(shape) == 3 and not first and not last:
        raise ValueError(f"{name} has no axis of 1, 3 or 4 channels: pass [H, W, C] or [C, H, W]")
    elif first and last:
        first = prefer_first
    channels = 1 if len(shape) == 2 else shape[0 if first else -1]
    if channels not in (1, 3, 4):
        raise ValueError(f"{name} has {channels} channels: pass 1, 3 or 4")
    height, width = shape[1:] if first else shape[:2]
    check_dimensions(width, height, name)

    def rows(top: int, bottom: int) -> np.ndarray:
        return np.moveaxis(read(array[:, top:bottom]), 0, -1) if first else read(array[top:bottom])

    return array_to_rgb(rows, (width, height), name)


__all__ = ["FORMATS", "MAX_IMAGE_SIDE", "flatten_images", "load_image", "load_images", "open_image"]
