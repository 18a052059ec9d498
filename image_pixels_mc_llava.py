"""
Turn pixels of every kind into RGB with 8 bits per channel, in horizontal bands: some kinds take many bytes a pixel on
the way, which would be gigabytes for a whole picture. Imports neither torch nor transformers.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageChops

from .image_costs_mc_llava import check_exif


BAND_PIXELS, LEAST_BAND_PIXELS, BANDS = 2**19, 2**15, 32  # a picture has at least so many bands, if they aren't small
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey that cameras, X-ray detectors and microscopes give
MAX_PROFILE_BYTES = 2**22  # of an ICC profile; those of printers have about 2 MB
PROFILE_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
PROFILE_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
SAME_COLOR = 2  # of 255: a profile that moves no color further counts as sRGB
# What turns a picture upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # they make columns of rows
FROM_THE_END = [UPRIGHT[orientation] for orientation in (3, 4, 6, 7)]  # they put the last row, or column, first
# The rows from one number to another: [rows, width] or [rows, width, channels], or an image of them.
Rows = Callable[[int, int], np.ndarray]
Band = Callable[[int, int], Image.Image]


def image_to_rgb(image: Image.Image, is_ours: bool = False) -> Image.Image:
    """
    An image as RGB, upright, in sRGB and on white: itself if it is that already and no file's, otherwise a new image
    without `info`, so that nothing is applied to it twice.

    Args:
        is_ours: whether the caller has no other use for the image.
    """
    _drop_broken_exif(image)
    image.load()
    upright, profile = find_orientation(image), find_profile(image)
    if image.mode != "RGB" or image.has_transparency_data or profile is not None:
        return _paint(image.size, _bands_of(image), profile, upright)
    if upright is not None:
        picture = image.transpose(upright)
        picture.info = {}
        return picture
    if type(image) is Image.Image:
        return image
    # As Pillow's `copy`, which a caller's image needs: it can be changed, or moved to another frame. Pixels that are
    # mapped from a file are read-only.
    picture = image._new(image.im) if is_ours and not image.readonly else image.copy()
    picture.info = {}
    return picture


def array_to_rgb(read: Rows, size: tuple[int, int], name: str) -> Image.Image:
    """An RGB image of (width, height) whose rows `read` gives in 1, 3 or 4 channels. Errors call them `name`."""
    dtype = read(0, 1).dtype
    if dtype == np.uint8:
        return _paint(size, lambda top, bottom: _to_image(read(top, bottom)))
    if dtype.kind == "u" and dtype.itemsize == 2:  # of either byte order
        table = _depth_table(_limits(read, size)[1])
        return _paint(size, lambda top, bottom: _to_image(table[read(top, bottom)]))
    if not np.issubdtype(dtype, np.floating):
        raise ValueError(f"{name} has dtype {dtype}: pass uint8, uint16 or floats in 0 to 1")
    return _paint(size, _bands_of_floats(read, size, name))


def find_orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright. A broken EXIF block says nothing."""
    try:
        _check_exif(image)
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many types for broken data
        return None


def _check_exif(image: Image.Image):
    """`check_exif` of what `getexif` would read."""
    exif, written = image.info.get("exif"), image.info.get("Raw profile type exif")
    if exif is None and isinstance(written, str):  # by ImageMagick, in hexadecimal digits
        exif = bytes.fromhex("".join(written.split("\n")[3:]))
    if isinstance(exif, bytes):
        check_exif(exif, "EXIF")


def _drop_broken_exif(image: Image.Image):
    """Pillow's TIFF files read all of it when they are loaded, and fail with it."""
    if hasattr(image, "tag_v2"):
        find_orientation(image)  # what is broken is read once, and not again
        if not isinstance(image.info.get("xmp", b""), (str, bytes)):
            del image.info["xmp"]
        exif = image.getexif()
        for group in set(exif) & {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop}:
            try:
                exif.get_ifd(group)
            except MemoryError:
                raise
            except Exception:
                del exif[group]


def find_profile(image: Image.Image) -> Callable[[Image.Image], Image.Image] | None:
    """
    What turns pixels into sRGB, by the image's ICC profile. None if there is no profile, it is sRGB's, it is broken or
    of another color space than the image, or this build of Pillow has no LittleCMS.
    """
    data = image.info.get("icc_profile")
    # Each "multi-process element" of a profile is computed for each pixel, and there may be any number of them.
    if not isinstance(data, bytes) or len(data) > MAX_PROFILE_BYTES or b"mpet" in data:
        return None
    mode = PROFILE_SPACES.get(data[16:20])
    is_grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
    fits = {"RGB": image.mode not in ("CMYK", "LAB", "F"), "L": is_grey, "CMYK": image.mode == "CMYK"}
    if data[12:16] not in PROFILE_CLASSES or not fits.get(mode):
        return None
    sample = _color_sample(mode)
    try:
        from PIL import ImageCms

        source, target = ImageCms.ImageCmsProfile(io.BytesIO(data)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
        changed = ImageCms.applyTransform(sample, transform)
    except MemoryError:
        raise
    except Exception:  # of a broken profile, or without LittleCMS
        return None
    difference = ImageChops.difference(sample.convert("RGB"), changed)
    if mode != "CMYK" and max(high for _, high in difference.getextrema()) <= SAME_COLOR:
        return None

    def convert(band: Image.Image) -> Image.Image:
        colors = ImageCms.applyTransform(band.convert(mode), transform)
        if band.mode == "RGBA":
            colors.putalpha(band.getchannel("A"))
        return colors

    return convert


def _color_sample(mode: str) -> Image.Image:
    """All greys and evenly spread colors."""
    greys = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(greys[None])
    colors = np.stack(np.meshgrid(*[greys[::17]] * 3), axis=-1).reshape(1, -1, 3)
    colors = np.concatenate([colors, np.repeat(greys, 3).reshape(1, -1, 3)], axis=1)
    return Image.fromarray(colors).convert(mode)


def _spans(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The first row of each band and the one after its last."""
    width, height = size
    rows = max(1, min(BAND_PIXELS, max(LEAST_BAND_PIXELS, width * height // BANDS)) // width)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _paint(
    size: tuple[int, int], band: Band, profile: Callable | None = None, upright: Image.Transpose | None = None
) -> Image.Image:
    """
    The picture of all bands. Each band is turned upright by itself: the whole picture would be in memory twice.

    Args:
        size: the picture's size before it is turned.
    """
    picture = Image.new("RGB", size[::-1] if upright in SIDEWAYS else size)
    for top, bottom in _spans(size):
        part = band(top, bottom)
        if part.mode == "La":
            part = part.convert("LA")
        if part.has_transparency_data:
            part = part.convert("RGBA")
        if profile is not None:
            part = profile(part)
        if part.mode == "RGBA":
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        part = part.convert("RGB")
        start = size[1] - bottom if upright in FROM_THE_END else top
        picture.paste(
            part if upright is None else part.transpose(upright), (start, 0) if upright in SIDEWAYS else (0, start)
        )
    return picture


def _bands_of(image: Image.Image) -> Band:
    """The bands of an image, with grey of more than 8 bits reduced to 8."""

    def cut(top: int, bottom: int) -> Image.Image:
        return image.crop((0, top, image.width, bottom))

    def read(top: int, bottom: int) -> np.ndarray:
        return np.asarray(cut(top, bottom))

    if image.mode == "F":
        return _bands_of_floats(read, image.size, "it")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return cut
    low, high = map(int, _limits(read, image.size))
    if low < 0 or high > 65535:
        raise ValueError(f"its integers are from {low} to {high}, allowed are 0 to 65535: scale them")
    maximum, white_is_zero = _declared_depth(image)
    table = _depth_table(max(high, maximum))
    table = 255 - table if white_is_zero else table
    transparent = image.info.get("transparency")

    def band(top: int, bottom: int) -> Image.Image:
        values = read(top, bottom)
        grey = _to_image(table[values])
        if isinstance(transparent, int):
            grey.putalpha(_to_image(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey

    return band


def _bands_of_floats(read: Rows, size: tuple[int, int], name: str) -> Band:
    low, high = map(float, _limits(read, size))
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"{name} has floats from {low} to {high}, allowed are 0 to 1: scale them, or pass uint8")
    return lambda top, bottom: _to_image(np.rint(read(top, bottom) * 255).astype(np.uint8))


def _declared_depth(image: Image.Image) -> tuple[int, bool]:
    """The largest value that a file of wide grey says it may have, at least 0, and whether 0 is white."""
    if image.format in ("PPM", "JPEG2000"):  # Pillow has stretched what they declare
        return 65535, False
    tags = getattr(image, "tag_v2", {})
    bits, maximum = (tags.get(tag) for tag in (ExifTags.Base.BitsPerSample, 281))  # MaxSampleValue
    bits, maximum = (value[0] if isinstance(value, tuple) and value else value for value in (bits, maximum))
    bits, maximum = (value if isinstance(value, int) else 0 for value in (bits, maximum))
    declared = max(maximum, 2**bits - 1 if 8 < bits < 16 else 0)
    return min(declared, 65535), tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _depth_table(maximum: int) -> np.ndarray:
    """The 8 bits of each 16-bit value, whose depth is the smallest of `DEPTHS` that holds `maximum`."""
    white = 2 ** next(bits for bits in DEPTHS if maximum < 2**bits) - 1
    return np.rint(np.arange(2**16).clip(max=white) / (white / 255)).astype(np.uint8)


def _limits(read: Rows, size: tuple[int, int]) -> tuple:
    """The smallest and the largest value, or NaN if there is one."""
    lows, highs = zip(*((rows.min(), rows.max()) for rows in (read(*span) for span in _spans(size))))
    return np.min(lows), np.max(highs)


def _to_image(pixels: np.ndarray) -> Image.Image:
    """The image of uint8 pixels, [rows, width] or [rows, width, 1, 3 or 4]."""
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels))


__all__ = []
