"""Images as they come: files, arrays and tensors of every kind, and broken ones."""

import base64
import contextlib
import copy
import io
import itertools
import os
import pickle
import signal
import struct
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from helpers import ROOT, picture
from PIL import Image, ImageCms, ImageFile, ImageOps, ImageSequence, TiffImagePlugin

from mc_llava import MCLlavaImageProcessor, flatten_images, image_loading_mc_llava, image_pixels_mc_llava, load_image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def same(image, reference) -> bool:
    image = load_image(image)
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(reference))


def test_sources(tmp_path):
    image = picture(7, 5)
    content = encode(image)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    uris = [f"{start},{text}" for start in ("data:image/png;base64", "data:;base64", "DATA:image/png;BASE64")]
    for source in (image, path, str(path), content, bytearray(content), text, *uris):
        assert same(source, image)


def test_modes():
    grey = picture(6, 4).convert("L")
    assert same(encode(grey), grey.convert("RGB"))
    palette = picture(6, 4).quantize(8)
    assert same(encode(palette), palette.convert("RGB"))
    bits = picture(6, 4).convert("1")
    assert same(encode(bits), bits.convert("RGB"))
    cmyk = picture(6, 4).convert("CMYK")
    assert same(encode(cmyk, "TIFF"), cmyk.convert("RGB"))


def test_alpha_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 255, 51
    expected = [[[255, 255, 255], [0, 0, 0], [204, 204, 204]]]
    image = Image.fromarray(rgba)
    assert same(encode(image), expected)
    assert same(rgba, expected)
    assert same(torch.from_numpy(rgba).movedim(-1, 0), expected)
    assert same(encode(image.convert("LA")), expected)
    assert load_image(image.convert("LA").convert("La")).getpixel((0, 0)) == (255, 255, 255)

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert same(encode(palette, transparency=0), [[[255, 255, 255], [0, 0, 255]]])


def test_16_bits_are_divided_by_257():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, axis=-1)
    assert same(encode(Image.fromarray(values)), expected)
    assert same(values, expected)
    assert same(Image.fromarray(values.astype(np.int32)), expected)
    assert same(values.astype(">u2"), expected)
    expected[0, 2] = 255
    assert same(encode(Image.fromarray(values), transparency=128 * 257), expected)
    with pytest.raises(ValueError, match="0 to 65535"):
        load_image(Image.fromarray(values.astype(np.int32) + 1))


@pytest.mark.parametrize(
    ("bits", "divisor"),
    [(1, 1), (8, 1), (9, 1023 / 255), (10, 1023 / 255), (12, 4095 / 255), (14, 16383 / 255), (15, 257)],
)
def test_wide_grey_has_the_depth_of_its_largest_value(bits, divisor):
    values = np.linspace(0, 2**bits - 1, 3000).astype(np.uint16).reshape(30, 100)
    expected = np.repeat(np.rint(values / divisor)[..., None], 3, axis=-1)
    image = Image.fromarray(values)
    for source in (values, values[..., None], torch.from_numpy(values), image, image.convert("I")):
        assert same(source, expected)
    for source in (encode(image), encode(image, "TIFF"), encode(image.convert("I"), "TIFF")):
        assert same(source, expected)
    assert same(np.stack([values] * 3, axis=-1), expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_one_more_than_a_depths_largest_value_needs_the_next_depth(bits):
    values = np.array([[2**bits, 0]], dtype=np.uint16)
    white = {8: 1023, 10: 4095, 12: 16383, 14: 65535}[bits]
    assert load_image(values).getpixel((0, 0)) == (round(2**bits / (white / 255)),) * 3


def test_a_file_may_declare_the_depth_of_its_grey():
    dark = np.full((4, 5), 200, dtype=np.uint16)
    assert load_image(encode(Image.fromarray(dark), "TIFF", tiffinfo={281: 4095})).getpixel((0, 0)) == (12, 12, 12)
    assert load_image(encode(Image.fromarray(dark), "TIFF", tiffinfo={281: 65535})).getpixel((0, 0)) == (1, 1, 1)
    # Pillow stretches what these declare to 16 bits.
    assert load_image(b"P5 1 1 4095 " + bytes([0, 200])).getpixel((0, 0)) == (12, 12, 12)
    assert load_image(b"P5 1 1 65535 " + bytes([0, 200])).getpixel((0, 0)) == (1, 1, 1)
    assert load_image(encode(Image.fromarray(dark), "JPEG2000")).getpixel((0, 0)) == (1, 1, 1)


def test_white_may_be_zero():
    values = np.array([[0, 65535]], dtype="<u2")
    tiff = encode(Image.fromarray(values), "TIFF")
    assert same(
        tiff.replace(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1]), bytes([6, 1, 3, 0, 1, 0, 0, 0, 0])), [[[255] * 3, [0] * 3]]
    )


FRAME_FORMATS = ["GIF", "PNG", "TIFF", "WEBP", "AVIF", "MPO"]


@pytest.mark.parametrize("format", FRAME_FORMATS)
def test_a_file_shows_its_first_frame_and_an_image_the_one_it_stands_at(format):
    colors = ["red", "lime", "blue"]
    content = encode(Image.new("RGB", (16, 16), colors[0]), format, save_all=True, append_images=[
        Image.new("RGB", (16, 16), color) for color in colors[1:]
    ])  # fmt: skip
    main = [max(range(3), key=Image.new("RGB", (1, 1), color).getpixel((0, 0)).__getitem__) for color in colors]

    def channel(image) -> int:
        pixel = load_image(image).getpixel((8, 8))
        assert max(pixel) > 230
        return pixel.index(max(pixel))

    assert channel(content) == channel(io.BytesIO(content)) == main[0]
    with Image.open(io.BytesIO(content)) as image:
        assert [(channel(frame), frame.tell()) for frame in ImageSequence.Iterator(image)] == list(zip(main, range(3)))
        image.seek(2)
        assert (channel(image), channel(image), image.tell()) == (main[2], main[2], 2)
        image.seek(1)  # and it can still go anywhere
        assert channel(image) == main[1]


COPIES = {
    "pickle": lambda image: pickle.loads(pickle.dumps(image)),
    "copy": copy.copy,
    "deepcopy": lambda image: copy.deepcopy([{"image": image}])[0]["image"],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("format", [format for format in image_loading_mc_llava.FORMATS if format != "HEIF"])
def test_images_that_were_copied_or_crossed_a_process(format, way):
    image = picture(32, 32).convert({"GIF": "P"}.get(format, "RGB"))
    options = {"exif": exif(6)} if format in ("AVIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP") else {}
    content = encode(image, format, **options)
    opened = Image.open(io.BytesIO(content))
    assert type(opened) is not Image.Image
    assert same(COPIES[way](opened), load_image(content))


def test_a_frame_that_was_copied():
    frames = [picture(6, 4, seed) for seed in range(3)]
    image = Image.open(io.BytesIO(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])))
    image.seek(2)
    for way in COPIES.values():
        assert same(way(image), frames[2])


def test_images_from_the_worker_of_a_data_loader():
    images = [Image.open(io.BytesIO(encode(picture(9, 7), format))) for format in ("PNG", "TIFF", "GIF")]
    expected = [load_image(image).tobytes() for image in images]
    loader = torch.utils.data.DataLoader(images, batch_size=None, num_workers=1)
    assert [load_image(image).tobytes() for image in loader] == expected


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["AVIF", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(format, orientation):
    options = {"exif": exif(orientation)}
    if format == "TIFF":
        options |= {"compression": "tiff_lzw"}
    if format == "JPEG2000":  # in which Pillow writes none
        options = {}
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 10))
    content = encode(image, format, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    once = load_image(content)
    assert same(once, upright)
    assert same(Image.open(io.BytesIO(content)), upright)
    assert load_image(once) is once
    assert same(pickle.loads(pickle.dumps(Image.open(io.BytesIO(content)))), upright)
    assert same(Image.open(io.BytesIO(content)).convert("RGB"), upright)


BROKEN_EXIF = {
    "no TIFF header": b"Exif\0\0garbage that is no TIFF",
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "bad offset": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "empty": b"Exif\0\0",
    "text for a number": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    "no such orientation": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP"])
def test_broken_exif_is_no_orientation(format, block):
    image = picture(20, 10)
    expected = load_image(encode(image, format))
    content = encode(image, format, exif=block)
    once = load_image(content)
    assert same(once, expected)
    assert load_image(once) is once
    opened = Image.open(io.BytesIO(content))
    assert same(opened, expected)
    assert same(opened, expected)
    assert same(opened.convert("RGB"), expected)
    assert same(opened.copy(), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "tags",
    [
        {34665: (4, 12345678), 34853: (4, 87654321)},
        {34665: (9, -1)},
        {34853: (9, -5)},
        {700: (4, 7)},
        {700: (3, (1, 2))},
    ],
    ids=["behind the end", "negative", "negative GPS", "XMP of a number", "XMP of numbers"],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_broken_exif_in_a_tiff(tags, orientation):
    image, directory = picture(20, 10), TiffImagePlugin.ImageFileDirectory_v2()
    directory[274] = orientation
    for tag, (kind, value) in tags.items():
        directory.tagtype[tag] = kind
        directory[tag] = value
    content = encode(image, "TIFF", tiffinfo=directory)
    upright = image.rotate(-90, expand=True) if orientation == 6 else image
    assert same(content, upright)
    opened = Image.open(io.BytesIO(content))
    assert same(opened, upright)
    assert same(opened, upright)


def test_broken_exif_in_an_avif():
    block = exif(6)
    block[271] = "a camera"
    content = encode(picture(20, 10), "AVIF", exif=block)
    broken = content.replace(b"II*\0", b"XXXX").replace(b"MM\0*", b"XXXX")
    assert broken != content
    assert same(broken, load_image(content))  # whose container has the orientation, too
    with pytest.raises(ValueError, match="not an image that can be read: save it as PNG"):
        load_image(broken[:100])


def icc_profile(space: str, gamma: float, primaries=None, white=(0.9642, 1.0, 0.8249)) -> bytes:
    """A profile of a display or of gray: XYZ of red, green and blue relative to white at D50."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + b"".join(map(number, white))}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, xyz in zip((b"r", b"g", b"b"), primaries):
            tags[name + b"XYZ"] = b"XYZ " + bytes(4) + b"".join(map(number, xyz))
            tags[name + b"TRC"] = curve
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space.encode(), b"XYZ ")
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + body


SRGB = np.array([(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)])
P3 = np.array([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])
ADOBE = np.array([(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)])
PROPHOTO = np.array([(0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249)])
PROFILES = {"P3": (P3, 2.2), "Adobe": (ADOBE, 2.2), "ProPhoto": (PROPHOTO, 1.8)}


def to_srgb(pixels: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    light = np.clip((pixels / 255) ** gamma @ primaries @ np.linalg.inv(SRGB), 0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", PROFILES)
def test_colors_are_converted_to_srgb_once(name):
    primaries, gamma = PROFILES[name]
    profile = icc_profile("RGB ", gamma, primaries)
    image = picture(50, 40)
    expected = to_srgb(np.asarray(image), primaries, gamma)
    assert np.abs(expected - np.asarray(image)).mean() > 3

    def distance(source, reference=expected) -> float:
        return np.abs(np.asarray(load_image(source)) - reference).max()

    contents = [encode(image, format, icc_profile=profile) for format in ("PNG", "TIFF")]
    contents.append(encode(image, "WEBP", lossless=True, icc_profile=profile))
    for content in contents:
        assert distance(content) < 2.5
        assert distance(Image.open(io.BytesIO(content))) < 2.5
        assert distance(Image.open(io.BytesIO(content)).convert("RGB")) < 2.5  # still described by its info
        once = load_image(content)
        assert load_image(once) is once
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha = np.asarray(image)[..., 3:] / 255
    assert distance(encode(image, icc_profile=profile), expected * alpha + 255 * (1 - alpha)) < 3.5
    palette = image.convert("RGB").quantize(16)
    expected = to_srgb(np.asarray(palette.convert("RGB")), primaries, gamma)
    assert distance(encode(palette, icc_profile=profile), expected) < 2.5


def test_grey_and_print_colors_are_converted():
    grey = Image.linear_gradient("L")
    expected = to_srgb(np.asarray(grey.convert("RGB")), SRGB, 1.6)
    for image in (grey, grey.convert("LA"), Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)):
        found = np.asarray(load_image(encode(image, icc_profile=icc_profile("GRAY", 1.6))))
        assert np.abs(found - expected).max() < 2.5
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert load_image(encode(cmyk, "TIFF")).getpixel((0, 0)) == (0, 255, 255)
    red, green, blue = load_image(encode(cmyk, "TIFF", icc_profile=printer_profile())).getpixel((0, 0))
    assert red < 60 and 100 < green < 200 and blue > 150  # the ink, not the light
    assert load_image(encode(cmyk, "JPEG", icc_profile=printer_profile())).getpixel((0, 0))[1] < 200


def printer_profile() -> bytes:
    """Cyan ink is Lab 55, -37, -50; the other inks darken."""
    clut = b""
    for c, m, y, k in itertools.product((0, 1), repeat=4):
        light = max(0, 100 - 45 * c - 30 * m - 10 * y - 90 * k)
        clut += bytes([round(light * 2.55), 128 - 37 * c * (not k), 128 - 50 * c * (not k)])
    ramp = bytes(range(256))
    matrix = b"".join(struct.pack(">i", 65536 * one) for one in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + clut + ramp * 3
    head = struct.pack(">I4sI4s4s4s", 144 + len(table), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile at all",
        b"",
        icc_profile("RGB ", 2.2, P3)[:200],
        icc_profile("RGB ", 2.2, P3)[:140] + bytes(400),
        icc_profile("GRAY", 1.0),
        printer_profile(),
        icc_profile("RGB ", 2.2, P3).replace(b"mntr", b"link"),
        icc_profile("RGB ", 2.2, P3) + b"mpet",
        icc_profile("RGB ", 2.2, P3) + bytes(2**22),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    ],
    ids=["sRGB", "text", "empty", "cut", "zeros", "grey", "CMYK", "link", "elements", "huge", "LAB"],
)
def test_profiles_that_change_nothing(profile):
    image = picture(20, 10)
    assert same(encode(image, "TIFF", icc_profile=profile), image)
    if len(profile) < 2**20:  # Pillow refuses larger ones in a PNG
        assert same(encode(image, icc_profile=profile), image)
    image.info["icc_profile"] = profile
    assert load_image(image) is image


def test_profiles_without_littlecms(monkeypatch):
    content = encode(picture(20, 10), icc_profile=icc_profile("RGB ", 2.2, P3))
    assert not same(content, picture(20, 10))
    monkeypatch.delattr(PIL, "ImageCms")
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    assert same(content, picture(20, 10))


def test_the_result_says_nothing_that_was_applied():
    content = encode(picture(20, 10), exif=exif(6), icc_profile=icc_profile("RGB ", 2.2, P3))
    assert load_image(content).info == {}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_upright_one_by_one(monkeypatch, mode, orientation):
    monkeypatch.setattr(image_pixels_mc_llava, "BAND_PIXELS", 40)  # bands of 5 rows, the last one of 3
    image = picture(8, 13).convert(mode)
    content = encode(image, "TIFF", exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert same(content, upright)


def test_a_picture_and_its_file_are_changed_apart(tmp_path):
    image = picture(20, 10)
    image.save(tmp_path / "image.png")
    image.save(tmp_path / "image.bmp")  # whose pixels Pillow maps from the file
    for change, other in ((0, 1), (1, 0)):
        with Image.open(tmp_path / "image.png") as file:
            both = [file, load_image(file)]
            assert type(both[1]) is Image.Image
            both[change].paste("red", (0, 0, 5, 5))
            assert both[change].tobytes() != image.tobytes() == both[other].tobytes()
    file = Image.open(tmp_path / "image.png")
    loaded = load_image(file)
    loaded.load()[0, 0] = file.load()[1, 1] = (1, 2, 3)
    assert loaded.getpixel((1, 1)) == image.getpixel((1, 1)) and file.getpixel((0, 0)) == image.getpixel((0, 0))
    file.frombytes(bytes(3 * 20 * 10))
    file.close()
    loaded.putpixel((0, 0), image.getpixel((0, 0)))
    assert loaded.tobytes() == image.tobytes()
    for name in ("image.png", "image.bmp"):
        loaded = load_image(tmp_path / name)
        loaded.load()[0, 0] = (1, 2, 3)
        assert loaded.getpixel((0, 0)) == (1, 2, 3) != load_image(tmp_path / name).getpixel((0, 0))


def test_a_picture_stays_when_its_file_shows_another_frame():
    for format in ("MPO", "TIFF", "PNG"):
        content = encode(picture(20, 10, 1), format, save_all=True, append_images=[picture(20, 10, 2)])
        with Image.open(io.BytesIO(content)) as file:
            loaded = load_image(file)
            before = loaded.tobytes()
            file.seek(1)
            assert load_image(file).tobytes() != before == loaded.tobytes()


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "tensor", "bfloat16"])
def test_arrays_and_tensors(kind, channels_first):
    pixels = np.asarray(picture(7, 5)) // 255 * 255  # black and white, which bfloat16 keeps
    array = np.moveaxis(pixels, -1, 0) if channels_first else pixels
    if kind in ("float32", "float64"):
        array = (array / 255).astype(kind)
    elif kind == "tensor":
        array = torch.from_numpy(np.ascontiguousarray(array))
    elif kind == "bfloat16":
        array = (torch.from_numpy(np.ascontiguousarray(array)) / 255).bfloat16().requires_grad_()
    assert same(array, pixels)


def test_floats_are_rounded_not_cut_off():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert same((values / 255).astype(np.float32), np.repeat(values[..., None], 3, axis=-1))


def test_a_shape_that_could_be_either_way():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert same(pixels, pixels)  # NumPy: [H, W, C]
    assert same(torch.from_numpy(pixels), np.moveaxis(pixels, 0, -1))  # torch: [C, H, W]
    assert load_image(pixels, "channels_first").size == (3, 5)
    assert load_image(np.zeros((1, 1, 3), dtype=np.uint8)).size == (1, 1)


def test_a_png_with_a_huge_color_profile_is_told_what_to_leave_out():
    """Pillow inflates no more than a megabyte of it."""
    with pytest.raises(ValueError, match="its color profile or a text in it is too large, save it without"):
        load_image(encode(picture(7, 5), icc_profile=bytes(2 * 10**6)))


def test_a_url_is_read_up_to_a_limit(monkeypatch):
    image = picture(7, 5)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/other.png" else 200)
            self.end_headers()
            if self.path == "/slow.png":  # a byte from time to time, without end
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"a")
                        time.sleep(0.05)
            self.wfile.write(encode(image))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert same(f"{url}/image.png", image)
        assert same(f"{url}/image.png".replace("http", "HTTP"), image)
        with pytest.raises(ValueError, match="404"):
            load_image(f"{url}/other.png")
        monkeypatch.setattr(image_loading_mc_llava, "MAX_DOWNLOAD_SECONDS", 0.3)
        with pytest.raises(ValueError, match="has not come within 0.3 seconds: download it first"):
            load_image(f"{url}/slow.png")
        monkeypatch.setattr(image_loading_mc_llava, "MAX_DOWNLOAD_BYTES", 10)
        with pytest.raises(ValueError, match="more than 10 bytes"):
            load_image(f"{url}/image.png")
        server.shutdown()


@pytest.mark.parametrize(
    ("pasted", "sent"),
    [
        ("/a b.png", "/a%20b.png"),
        ("/Übung ñ/日本.png?q=ä b&x=1", "/%C3%9Cbung%20%C3%B1/%E6%97%A5%E6%9C%AC.png?q=%C3%A4%20b&x=1"),
        ("/a%20b%C3%9C.png", "/a%20b%C3%9C.png"),
        ("/100%.png?a=%zz", "/100%25.png?a=%25zz"),
        ("/a+b,c;d@e:f(g)[h]'!$&*~.png?a=1/2?3", "/a+b,c;d@e:f(g)[h]'!$&*~.png?a=1/2?3"),
        ("/a.png#part ü", "/a.png"),
        ("/a.png \n", "/a.png"),
        ('/a|b\\c^d`e{f}"<g>.png', "/a%7Cb%5Cc%5Ed%60e%7Bf%7D%22%3Cg%3E.png"),
    ],
)
def test_urls_are_sent_as_a_browser_does(pasted, sent):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encode(picture(7, 5)))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        assert same(f" http://127.0.0.1:{server.server_port}{pasted}", picture(7, 5))
        assert asked == [sent]
        server.shutdown()


def test_hosts_with_umlauts(monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, request.host))
        return io.BytesIO(encode(picture(7, 5)))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for url in ("https://bücher.example:8080/ä.png", "https://xn--bcher-kva.example/a.png", "http://[::1]:80/a b.png"):
        assert same(url, picture(7, 5))
    assert asked == [
        ("https://xn--bcher-kva.example:8080/%C3%A4.png", "xn--bcher-kva.example:8080"),
        ("https://xn--bcher-kva.example/a.png", "xn--bcher-kva.example"),
        ("http://[::1]:80/a%20b.png", "[::1]:80"),
    ]


def test_a_pipe_a_device_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the image was still being read after 10 seconds"))
    signal.alarm(10)
    try:
        for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
            for source in (path, str(path)):
                with pytest.raises(ValueError, match="not a regular file"):
                    load_image(source)
    finally:
        signal.alarm(0)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="there is no /proc")
def test_a_file_whose_bytes_can_not_be_read():
    """Like a file on a broken disk, whose first page can never be read."""
    with pytest.raises(ValueError, match="cannot read the image /proc/self/mem: .*Input/output error"):
        load_image("/proc/self/mem")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no-such-file.png", "no-such-file.png is neither a file, an http"),
        ("data:image/png,abc", "without base64"),
        ("no-such-fïle.png", "no-such-fïle.png is neither a file, an http"),
        ("http://exa mple.com/x.png", "cannot read the image http://exa mple"),
        ("http://localhost:abc/", "cannot read the image http://localhost:abc/"),
        ("http://[::1/", r"cannot read the image http://\[::1/"),
        (b"", "data of 0 bytes is not an image"),
        (b"not an image", "not an image"),
        (encode(picture(64, 64))[:-2000], "corrupt"),
        (encode(picture(64, 64), "JPEG")[:-500], "corrupt"),
        (np.zeros((5, 5, 2), dtype=np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "at least 1 x 1"),
        (np.zeros((2, 2, 2, 3), dtype=np.uint8), r"pass \[H, W\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "dtype int64"),
        (np.full((4, 4, 3), 1.5), "floats from 1.5 to 1.5, allowed are 0 to 1"),
        (np.full((4, 4, 3), np.nan), "floats from nan"),
        (np.zeros((1, 20_001), dtype=np.uint8), "20001 x 1 pixels, a side may have 20000"),
        (object(), "cannot read an image from object"),
        (None, "cannot read an image from NoneType"),
    ],
)
def test_broken_images(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


@pytest.mark.parametrize("name", ["_open", "image_to_rgb"])
def test_too_little_memory_is_not_a_broken_picture(monkeypatch, name):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(image_loading_mc_llava, name, fail)
    with pytest.raises(MemoryError):
        load_image(encode(picture(9, 9)))


def test_a_decompression_bomb(monkeypatch):
    content = encode(Image.new("1", (2000, 2000)))
    # Pillow itself warns of the first and refuses the second.
    for limit in (3_000_000, 1000):
        message = (
            f"(has|2000 x 2000 pixels,) more than Pillow's limit of {limit} pixels: resize it first, or raise PIL"
        )
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            warnings.simplefilter("ignore")
            load_image(content)


class OpenFile:
    """Whatever has a `read`."""

    def __init__(self, content):
        self.content = content

    def read(self):
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "the open file gives str and not bytes: open it in binary mode"),
        (5, "gives int and not bytes"),
        (None, "gives NoneType and not bytes"),
        ([1, 2], "gives list and not bytes"),
        (OSError("the network is down"), r"cannot read the open file \(the network is down\)"),
        (RuntimeError("no"), r"cannot read the open file \(no\): pass a file that is open for reading"),
        (b"", "it is empty or was read to its end"),
    ],
)
def test_open_files_that_give_no_picture(content, message):
    with pytest.raises(ValueError, match=message):
        load_image(OpenFile(content))


def test_empty_files_and_paths(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match="empty.jpg is not an image that can be read: the file is empty$"):
        load_image(tmp_path / "empty.jpg")
    for path in ("", " "):
        with pytest.raises(ValueError, match="the path of an image is empty: pass a file"):
            load_image(path)


def test_files_opened_for_something_else(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(picture(7, 5)))
    with open(path) as file, pytest.raises(ValueError, match="image.png"):
        load_image(file)
    with open(path, "ab") as file, pytest.raises(ValueError, match="open for reading"):
        load_image(file)
    with open(path, "rb") as file:
        file.read()
        with pytest.raises(ValueError, match="read to its end"):
            load_image(file)
    with pytest.raises(ValueError, match="closed file.*open for reading"):
        load_image(file)
    assert same(OpenFile(bytearray(path.read_bytes())), picture(7, 5))
    assert same(memoryview(path.read_bytes()), picture(7, 5))
    assert same(os.fsencode(path).decode(), picture(7, 5))


class BytesPath:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fsencode(self.path)


def test_a_path_of_bytes(tmp_path):
    (tmp_path / "image.png").write_bytes(encode(picture(7, 5)))
    os.PathLike.register(BytesPath)
    assert same(BytesPath(tmp_path / "image.png"), picture(7, 5))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "AVIF", "MPO", "BMP"])
def test_a_closed_image_says_that_it_is_closed(tmp_path, format):
    path = tmp_path / "image"
    path.write_bytes(encode(picture(20, 10), format))
    image = Image.open(path)
    image.close()
    with pytest.raises(ValueError, match="the image is closed: pass it while it is open"):
        load_image(image)
    with open(path, "rb") as file:
        image = Image.open(file)
    if format not in ("WEBP", "AVIF"):  # whose decoders have read the whole file
        with pytest.raises(ValueError, match="the image is closed: pass it while it is open"):
            load_image(image)
    with Image.open(path) as image:
        image.load()
    assert same(image, load_image(path))


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_pixels():
    for tensor, message in (
        (torch.rand(3, 8, 8).to_sparse(), "to_dense"),
        (torch.rand(8, 8).to_sparse_csr(), "to_dense"),
        (torch.rand(8, 8).to_sparse_csc(), "to_dense"),
        (torch.rand(3, 8, 8, device="meta"), "no values"),
        (torch.quantize_per_tensor(torch.rand(3, 8, 8), 0.1, 0, torch.quint8), "dequantize"),
        (torch.nested.nested_tensor([torch.rand(8, 8), torch.rand(4, 8)]), "one by one"),
        (torch.nested.nested_tensor([torch.rand(8, 8), torch.rand(4, 8)], layout=torch.jagged), "one by one"),
        (torch.rand(3, 8, 8) > 0.5, "dtype bool"),
        (torch.rand(3, 8, 8, dtype=torch.complex64), "dtype complex64"),
        (torch.tensor(0.5), "not a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image(tensor)
    assert load_image(torch.rand(3, 8, 8).to(torch.float8_e4m3fn)).size == (8, 8)
    assert load_image(torch.nn.Parameter(torch.rand(3, 8, 8))).size == (8, 8)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_arrays_without_pixels():
    values = np.zeros((8, 8), dtype=np.uint8)
    for array, message in (
        (np.matrix(values), r"np.asarray\(matrix\)"),
        (np.ma.masked_array(values, mask=values == 0), r"filled\(value\)"),
        (values.astype(object), "dtype object: pass uint8"),
        (values.astype(bool), "dtype bool: pass uint8"),
        (values.astype("U1"), "dtype <U1"),
        (values.astype(complex), "dtype complex128"),
        (np.zeros((8, 8), dtype=[("r", "u1")]), "dtype"),
        (values.astype("M8[s]"), "dtype datetime64"),
        (np.array(3, dtype=np.uint8), "not a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image(array)


class HEICFile(ImageFile.ImageFile):
    """Like pillow-heif's plugin, but the content is a PNG."""

    format = "HEIF"

    def _open(self):
        self.fp.seek(12)
        image = Image.open(io.BytesIO(self.fp.read()))
        image.load()
        self._mode, self._size, self.im, self.tile = image.mode, image.size, image.im, []


def test_heic_with_and_without_a_plugin(monkeypatch, tmp_path):
    content = b"\0\0\0\x18ftypheic" + encode(picture(7, 5))
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ValueError, match="not an image that can be read: HEIF .* pillow-heif"):
        load_image(content)
    monkeypatch.setitem(Image.OPEN, "HEIF", (HEICFile, lambda prefix: prefix[4:12] == b"ftypheic"))
    assert same(content, picture(7, 5))


def test_files_stay_open_for_their_owner(tmp_path):
    path = tmp_path / "image.png"
    picture(7, 5).save(path)
    with open(path, "rb") as file:
        assert same(file, picture(7, 5))
        file.seek(0)
        assert len(file.read()) == path.stat().st_size


def test_base64_in_lines():
    assert same(base64.encodebytes(encode(picture(40, 30))).decode(), picture(40, 30))


def test_what_is_no_picture_format_stays_closed(tmp_path):
    """An EPS file would go to a PostScript interpreter."""
    path = tmp_path / "image.eps"
    picture(7, 5).save(path)
    with pytest.raises(ValueError, match="not an image that can be read: save it as PNG or JPEG"):
        load_image(path)


def test_flat_lists():
    image = picture(3, 2)
    batch = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert flatten_images(image) == [image]
    assert flatten_images([image, [image, (image,)]]) == [image] * 3
    assert len(flatten_images(batch)) == 2
    assert len(flatten_images([image, torch.zeros(3, 3, 4, 4)])) == 4


@pytest.mark.filterwarnings("ignore")
def test_flat_lists_of_tensors_of_every_layout():
    batch = torch.rand(2, 3, 4, 4)
    for kind in (batch.to_sparse(), batch.to("meta"), torch.quantize_per_tensor(batch, 0.1, 0, torch.quint8)):
        assert [image.shape for image in flatten_images(kind)] == [(3, 4, 4)] * 2
    ragged = torch.nested.nested_tensor([torch.rand(3, 8, width) for width in (4, 8)])
    assert [load_image(image).size for image in flatten_images(ragged)] == [(4, 8), (8, 8)]


class TestImageProcessor:
    processor = MCLlavaImageProcessor()

    @pytest.mark.parametrize("size", [(1, 1), (1, 2000), (577, 576)])
    def test_the_tensors(self, size):
        images = [picture(*size), picture(640, 400)]
        out = self.processor(images, return_tensors="pt", max_crops=4, num_tokens=50)
        crops = out["image_grid_thw"][:, 0].tolist()
        assert out["image_grid_thw"].tolist() == [[count, 1, 1] for count in crops]
        assert out["pixel_values"].shape == (sum(crops), 3, 384, 384)
        assert out["crop_coords"].shape == (sum(crops), 2)
        assert out["crop_num_tokens"].shape == (sum(crops),)
        dtypes = [out[name].dtype for name in self.processor.model_input_names]
        assert dtypes == [torch.float32, torch.int64, torch.float32, torch.int64, torch.int64]
        assert out["crop_coords"][0].tolist() == [0.5, 0.5]
        for image, count in zip(images, crops):
            assert len(self.processor.plan(*image.size, max_crops=4, num_tokens=50)) == count

    def test_an_image_does_not_depend_on_its_neighbours(self):
        images = [picture(700, 300), picture(50, 60, seed=1), picture(400, 900, seed=2)]
        together = self.processor(images, return_tensors="pt")
        alone = [self.processor(image, return_tensors="pt") for image in images]
        for name in self.processor.model_input_names:
            assert torch.equal(together[name], torch.cat([out[name] for out in alone]))

    def test_a_picture_that_comes_again_is_cut_once_for_each_plan(self, monkeypatch):
        cut, module = [], sys.modules[MCLlavaImageProcessor.__module__]
        cut_each = module.cut_each
        monkeypatch.setattr(module, "cut_each", lambda image, *args: cut.append(image) or cut_each(image, *args))
        wide, tall = picture(1500, 900), picture(700, 1200)
        images = [wide, tall, wide, wide, wide]
        plans = [None, None, None, [(0, 0, 400, 400)], [(100, 0, 400, 400)]]
        plans = [plan or self.processor.plan(*image.size, max_crops=5) for image, plan in zip(images, plans)]
        together = self.processor(images, plans=plans, return_tensors="pt")["pixel_values"]
        assert cut == [wide, tall, wide, wide]
        alone = [
            self.processor(image, plans=[plan], return_tensors="pt")["pixel_values"]
            for image, plan in zip(images, plans)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)

    def test_pixels_are_those_of_pillow_and_siglip(self):
        image = picture(500, 300)
        expected = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC)) / 255
        expected = (np.moveaxis(expected, -1, 0) - 0.5) / 0.5
        assert np.abs(self.processor(image)["pixel_values"][0] - expected).max() < 1e-6

    def test_options_of_transformers(self):
        image = picture(30, 20)
        raw = self.processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
        normalized = self.processor(image, image_mean=[0.0, 0.1, 0.2], image_std=[1.0, 2.0, 3.0])["pixel_values"]
        assert raw.max() == 255
        mean, std = np.array([0, 0.1, 0.2])[:, None, None], np.array([1, 2, 3])[:, None, None]
        assert np.abs(normalized[0] - (raw[0] / 255 - mean) / std).max() < 1e-6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_crop": 3}, "unknown options max_crop: did you mean max_crops?"),
            ({"banana": 3}, "unknown options banana: leave them out"),
            ({"max_crops": -1}, "max_crops must be at least 0, got -1"),
            ({"do_resize": False}, "do_resize must be True, got False"),
            ({"do_center_crop": True}, "do_center_crop must be False"),
            ({"size": {"height": 30, "width": 20}}, "equal height and width"),
            ({"size": 1}, "size 1 must hold at least 2 x 2 patches, got patch_size 14"),
            ({"size": 1, "zoom": 1}, "size 1 must hold at least 2 x 2 patches, got patch_size 14"),
            ({"size": {"height": 20, "width": 20}}, "size 20 must hold at least 2 x 2 patches, got patch_size 14"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.processor(picture(9, 9), **options)
        if "size" not in options:
            with pytest.raises(ValueError, match=message):
                MCLlavaImageProcessor(**options)

    def test_an_option_of_a_wrong_type(self):
        with pytest.raises(ValueError, match="an option has a wrong value: .*'input_data_format'"):
            self.processor(picture(9, 9), input_data_format=5)

    def test_no_images(self):
        with pytest.raises(ValueError, match="empty list"):
            self.processor([])

    def test_photographs(self):
        for path in (ROOT / "examples").glob("*.jpg"):
            assert len(self.processor(path)["pixel_values"]) == len(self.processor.plan(*Image.open(path).size))
