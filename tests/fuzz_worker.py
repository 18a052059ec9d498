"""
Runs damaged pictures and strange arrays through `load_image`: python tests/fuzz_worker.py SEED COUNT [FIRST]

Each input depends only on the seed and its number, so FIRST repeats a single one. This runs in its own process,
because a decoder that crashes or never ends should fail a test, not end the test run.
"""

import copy
import faulthandler
import io
import itertools
import json
import pickle
import random
import struct
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from mc_llava import load_image


MAX_PIXELS = 2**22  # that headers may ask for
MAX_SECONDS = 2  # of one input
MAX_BYTES = 400 * 2**20  # of memory, for all inputs together
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Of a display, of gray, and of a printer whose tables are missing.
PROFILES = [SRGB, SRGB.replace(b"rXYZ", b"gXYZ"), *(SRGB[:16] + space + SRGB[20:] for space in (b"GRAY", b"CMYK"))]
NUMBERS = [0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 1000, 4096, 32767, 32768, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 50, zip=True)
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    info.add_text("Raw profile type exif", "\nexif\n40\n" + exif(3).hex())
    return info


COMMON = [{}, {"exif": exif(6)}, {"icc_profile": SRGB[:16] + b"RGB " + SRGB[20:]}, {"icc_profile": SRGB[:200]}]
OPTIONS = {
    "AVIF": [*COMMON, {"speed": 10}, {"subsampling": "4:0:0"}, {"save_all": True}],
    "BMP": [{}],
    "GIF": [{}, {"transparency": 3}, {"comment": b"hello"}, {"interlace": 1}, {"save_all": True, "duration": 5}],
    "ICO": [{}, {"bitmap_format": "bmp"}, {"sizes": [(16, 16), (8, 8)]}],
    "JPEG": [
        *COMMON, {"progressive": True}, {"quality": 5}, {"subsampling": 2}, {"restart_marker_blocks": 1},
        {"comment": b"hello"}, {"optimize": True, "progressive": True}, {"xmp": b'tiff:Orientation="8"'},
    ],
    "JPEG2000": [
        {}, {"no_jp2": True}, {"tile_size": (8, 8)}, {"irreversible": True}, {"quality_layers": [9, 3]},
        {"num_resolutions": 2}, {"progression": "RPCL"}, {"precinct_size": (32, 32), "codeblock_size": (8, 8)},
        {"signed": True}, {"mct": 0},
    ],
    "MPO": [{}, {"save_all": True}],
    "PNG": [
        *COMMON, {"transparency": 3}, {"pnginfo": png_text()}, {"save_all": True}, {"bits": 4},
        {"save_all": True, "default_image": True, "disposal": 2, "blend": 1},
    ],
    "PPM": [{}],
    "TGA": [{}, {"compression": "tga_rle"}, {"orientation": 1}],
    "TIFF": [
        *COMMON, {"save_all": True}, {"strip_size": 64}, {"big_tiff": True}, {"tiffinfo": {281: 4095}},
        {"tiffinfo": {262: 0}},
        *({"compression": name} for name in (
            "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "webp", "zstd",
            "lzma",
        )),
    ],
    "WEBP": [*COMMON, {"lossless": True}, {"save_all": True}, {"quality": 5}, {"exif": b"Exif\0\0broken"}],
}  # fmt: skip
BY_HAND = [
    b"P1\n# comment\n5 2\n1 0 1 0 1\n0 1 0 1 0",
    b"P2 3 2 15\n1 2 3 4 5 15",
    b"P3\n2 1\n255\n1 2 3 # four\n4 5 6",
    b"P5 3 2 1000\n" + bytes(range(12)),
    b"P6 3 2 100\n" + bytes(range(18)),
    b"Pf 2 2 -1.0\n" + struct.pack("<4f", 0, 0.5, 1, 0.25),
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 90, 0, 0, 62, 40, 8, 4, 1, 8, 1, 0, 0, 0, 2, 0)
    + bytes(8) + b"\3\1\5\0\0\0\0\3\1\0\1\0\5\1\0\0\0\2\0\1\x08\1\0\1",
    b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6) + b"\x21\xfe\1a\0\x2c"
    + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\2\5\x84\x8f\xa9\xcb\x05\0\x3b",
]  # fmt: skip


def draw(chance: random.Random, mode: str) -> Image.Image:
    size = chance.choice([1, 3, 16, 60]), chance.choice([1, 8, 50])
    if chance.random() < 0.5:
        image = Image.frombytes("RGBA", size, chance.randbytes(4 * size[0] * size[1]))
    else:
        image = Image.linear_gradient("L").resize(size).convert("RGBA")
    if mode in ("I", "I;16", "I;16B"):
        values = (np.asarray(image.convert("L")).astype(np.uint16) * chance.choice([1, 16, 257])).astype("<u2")
        image = Image.fromarray(values)
        return image if mode == "I;16" else image.convert("I").convert(mode)
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")) / np.float32(255))
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


def make_corpus(seed: int) -> list[tuple[str, bytes]]:
    """Pictures in every format, mode and option that Pillow writes."""
    chance, corpus = random.Random(seed), [("by hand", content) for content in BY_HAND]
    for format, mode in itertools.product(OPTIONS, MODES):
        for options in OPTIONS[format]:
            image, file = draw(chance, mode), io.BytesIO()
            if options.get("save_all"):
                options = {**options, "append_images": [image.copy(), image.copy()]}
            try:
                image.save(file, format, **options)
            except Exception:  # not every format has every mode
                continue
            corpus.append((f"{format} {mode} {sorted(options)}", file.getvalue()))
    return corpus


def damage(chance: random.Random, content: bytes, others: list[tuple[str, bytes]]) -> bytes:
    if not content:
        return content
    data, length = bytearray(content), len(content)
    power = chance.choice([1, 1, 4])  # the start of a file matters most
    places = [int(length * chance.random() ** power) for _ in range(40)]
    first, last = sorted(places[:2])
    kind = chance.choice(["flip", "flip", "number", "number", "number", "cut", "insert", "drop", "repeat", "splice"])
    if kind == "flip":
        for place in places[: chance.choice([1, 2, 8, 40])]:
            data[place] ^= 1 << chance.randrange(8)
    elif kind == "number":
        for place in places[: chance.choice([1, 1, 2, 4])]:
            code = chance.choice(["<B", "<H", ">H", "<I", ">I"])
            number = struct.pack(code, chance.choice(NUMBERS) & (2 ** (8 * struct.calcsize(code)) - 1))
            data[place : place + len(number)] = number
    elif kind == "cut":
        del data[places[0] :]
    elif kind == "insert":
        data[places[0] : places[0]] = chance.randbytes(chance.choice([1, 4, 100]))
    elif kind == "drop":
        del data[first:last]
    elif kind == "repeat":
        data[last:last] = data[first:last] * chance.choice([1, 3, 50])
    else:
        other = chance.choice(others)[1]
        data[first:last] = other[chance.randrange(len(other)) :][: chance.choice([4, 100, 5000])]
    if data.startswith(b"\x89PNG") and chance.random() < 0.8:
        data = mend_checksums(data)
    return bytes(data[:200_000])


def mend_checksums(png: bytearray) -> bytearray:
    """Otherwise Pillow would skip the damaged chunks."""
    position = 8
    while position + 12 <= len(png):
        end = position + 8 + int.from_bytes(png[position : position + 4], "big")
        if end + 4 > len(png):
            break
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[position + 4 : end]))
        position = end + 4
    return png


def draw_array(chance: random.Random) -> np.ndarray:
    shape = tuple(chance.choice([0, 1, 1, 2, 3, 3, 4, 4, 5, 9]) for _ in range(chance.randrange(5)))
    kind = chance.choice(
        ["u1", "u1", "u2", ">u2", "f2", "f4", "f8", ">f4", "g", "i4", "?", "O", "U2", "c8", "M8[s]", "V3"]
    )
    array = np.frombuffer(chance.randbytes(16 * max(1, int(np.prod(shape)))), dtype="u1")[: int(np.prod(shape))]
    array = (array / 255 if kind in ("f2", "f4", "f8", ">f4", "g") and chance.random() < 0.8 else array).reshape(shape)
    array = np.zeros(shape, kind) if kind in ("M8[s]", "V3") else array.astype(kind)
    wrap = chance.choice([None] * 6 + [np.ma.masked_array, np.matrix, np.asfortranarray, lambda array: array[::-1]])
    try:
        return array if wrap is None else wrap(array)
    except (ValueError, IndexError):  # a matrix has two axes
        return array


def draw_image(chance: random.Random, corpus: list[tuple[str, bytes]]) -> Image.Image:
    """An image in memory whose metadata is damaged."""
    image = draw(chance, chance.choice(MODES))
    notes = {
        "transparency": chance.choice([0, 3, 255, -1, 10**9, b"\0\x80", bytes(256), (1, 2, 3), (1,), "x", None, 0.5]),
        "icc_profile": damage(chance, chance.choice(PROFILES), corpus),
        "exif": damage(chance, exif(chance.randrange(10)), corpus),
        "xmp": damage(chance, b'<x tiff:Orientation="6"/>', corpus),
    }
    image.info = {name: value for name, value in notes.items() if chance.random() < 0.4}
    return image


def check(source, chance: random.Random) -> bool:
    """Whether it is loaded as a picture. Raises AssertionError, or an error that `load_image` must not raise."""
    try:
        picture = load_image(source)
    except ValueError as error:
        assert type(error) is ValueError and str(error), repr(error)
        return False
    assert type(picture) is Image.Image and picture.mode == "RGB", picture
    assert picture is source or picture.info == {}, picture.info
    assert load_image(picture) is picture
    if isinstance(source, bytes):
        with Image.open(io.BytesIO(source)) as opened:
            assert sorted(picture.size) == sorted(opened.size), (picture.size, opened.size)
            # Pillow's copies forget what a file declares about 16-bit gray, and the transparency of a palette of RGBA.
            whole = opened.mode[0] != "I" and getattr(opened.palette, "mode", "RGB") == "RGB"
            way = chance.choice([None, copy.deepcopy, copy.copy]) if whole else None
            assert load_image(way(opened) if way else opened).tobytes() == picture.tobytes(), (
                "an open file gives another picture"
            )
    else:
        width, height = picture.size
        assert {width, height} <= set(source.size if isinstance(source, Image.Image) else source.shape)
    return True


def memory() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def main(seed: int, count: int, first: int = 0):
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    corpus, slowest, read, unread = make_corpus(seed), (0.0, None), 0, []
    for name, content in corpus:
        try:
            load_image(content)
        except ValueError:  # of bits that only some readers know
            unread.append(name)
    assert len(unread) < len(corpus) / 20, unread
    before = memory()
    for number in range(first, first + count):
        chance = random.Random(f"{seed} {number}")
        name, source = chance.choice(corpus)
        kind = chance.random()
        if kind < 0.05:
            name, source = "array", draw_array(chance)
        elif kind < 0.15:
            name, source = "image", draw_image(chance, corpus)
        else:
            for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
                source = damage(chance, source, corpus)
        faulthandler.dump_traceback_later(60, exit=True)
        start = time.process_time()
        try:
            read += check(source, chance)
            seconds = time.process_time() - start
            assert seconds < MAX_SECONDS, f"it took {seconds:.1f} s"
            assert memory() - before < MAX_BYTES, f"memory grew by {(memory() - before) >> 20} MiB"
        except BaseException as error:
            path = Path(tempfile.gettempdir(), f"mc-llava-fuzz-{seed}-{number}")
            path.write_bytes(source if isinstance(source, bytes) else pickle.dumps(source))
            print(f"{type(error).__name__}: {error}\nseed {seed}, number {number}: {name}, {path}", flush=True)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (seconds, number), key=lambda entry: entry[0])
    grown = (memory() - before) >> 20
    print(json.dumps({"inputs": count, "pictures": read, "slowest": slowest, "mebibytes": grown}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
