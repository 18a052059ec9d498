"""Small files that would take much time or memory."""

import io
import struct
import subprocess
import sys
import time
import zlib

import pytest
from helpers import ROOT, picture
from PIL import Image
from test_images import P3, icc_profile

from mc_llava import load_image
from mc_llava.image_loading_mc_llava import open_image


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read_segments(jpeg: bytes) -> tuple[bytes, list[bytes], list[bytes]]:
    """The bytes before the first scan, and for each scan its header with Huffman tables, and its data."""
    position, start, pending, headers, scans = 2, jpeg[:2], b"", [], []
    while (marker := jpeg[position + 1]) != 0xD9:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        segment, position = jpeg[position:end], end
        if marker == 0xDA:
            while not (jpeg[end] == 0xFF and jpeg[end + 1] not in (0, *range(0xD0, 0xD8))):
                end += 1
            headers.append(pending + segment)
            scans.append(jpeg[position:end])
            position, pending = end, b""
        elif marker == 0xC4:
            pending += segment
        else:
            start += segment
    return start, headers, scans


def jpeg_of_scans(image: Image.Image, count: int, format: str = "JPEG", **options) -> bytes:
    """A JPEG, or the first frame of an MPO, that repeats its second scan."""
    start, headers, scans = read_segments(encode(image, format, progressive=True, **options))
    parts = [header + scan for header, scan in zip(headers, scans)]
    header = headers[1][headers[1].index(b"\xff\xda") :]
    return b"".join([start, *parts[:2], *[header + scans[1]] * (count - len(parts)), *parts[2:], b"\xff\xd9"])


def arithmetic_jpeg(side: int, count: int) -> bytes:
    """A gray progressive JPEG with arithmetic coding and this many scans."""

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 255, marker, len(content) + 2) + content

    scans = [(0, 0), *[(1, 63)] * (count - 1)]
    return b"".join(
        [
            b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xCA, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0)),
            *[segment(0xDA, bytes([1, 1, 0, low, high, 0])) + bytes(range(9, 99)) for low, high in scans],
            b"\xff\xd9",
        ]
    )


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def icon_of(content: bytes, count: int = 1) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 6 + 16 * count)
    return struct.pack("<HHH", 0, 1, count) + entry * count + content


def tiff_of(tags: dict[int, int | bytes], content: bytes = b"") -> bytes:
    """A TIFF whose content starts at 1000. A tag of bytes holds 32-bit numbers."""
    entries, extra, position = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        numbers = value if isinstance(value, bytes) else struct.pack("<I", value)
        entries += struct.pack("<HHI", tag, 4, len(numbers) // 4)
        if len(numbers) > 4:
            entries += struct.pack("<I", position + len(extra))
            extra += numbers
        else:
            entries += numbers
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra
    return head.ljust(1000, b"\0") + content


GREY_TIFF = {258: 8, 259: 8, 262: 1, 277: 1}
HUGE = (9400, 9400)


def huge_tile() -> bytes:
    return tiff_of(
        {**GREY_TIFF, 256: 16, 257: 16, 322: 40000, 323: 40000, 324: 1000, 325: 30}, zlib.compress(b"a" * 99)
    )


def tiles_beyond_the_edge() -> bytes:
    content = zlib.compress(bytes(30000 * 16))
    offsets, lengths = struct.pack("<600I", *[6000] * 600), struct.pack("<600I", *[len(content)] * 600)
    tags = {**GREY_TIFF, 256: 16, 257: 9600, 322: 30000, 323: 16, 324: offsets, 325: lengths}
    return tiff_of(tags).ljust(6000, b"\0") + content


def strips_of_one_jpeg() -> bytes:
    """50 strips that share one JPEG of 90 scans, and a separate strip for each scan above the limit."""
    content = jpeg_of_scans(Image.new("L", (4000, 80)), 90)
    offsets, lengths = struct.pack("<50I", *[2000] * 50), struct.pack("<50I", *[len(content)] * 50)
    tags = {**GREY_TIFF, 259: 7, 256: 4000, 257: 16000, 278: 320, 273: offsets, 279: lengths}
    return tiff_of(tags).ljust(2000, b"\0") + content


def more_strips_than_rows() -> bytes:
    return tiff_of({**GREY_TIFF, 259: 1, 256: 9, 257: 100, 278: 1, 273: struct.pack("<9000I", *[8] * 9000), 279: 9})


def jpeg2000(patch, **options) -> bytes:
    """A small file whose header says 9000 x 9000, patched further: `patch` gets where the coding style starts."""
    content = bytearray(encode(Image.new("L", (512, 512)), "JPEG2000", no_jp2=True, **options))
    content[8:16] = struct.pack(">II", 9000, 9000)
    patch(content, content.index(b"\xff\x52"))
    return bytes(content)


def layers(content: bytearray, style: int):
    content[style + 6 : style + 8] = b"\xff\xff"


def tiny_blocks(content: bytearray, style: int):
    content[style + 10 : style + 12] = b"\0\0"


def tiny_precincts(content: bytearray, style: int):
    content[style + 14 : style + 20] = bytes(6)


def rle_bitmap(code: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, *HUGE, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(code), 0, 0, 14 + len(head)) + head + code


def tags_of_one_place(count: int, size: int) -> bytes:
    """Values that Pillow before 13 copies `count` times, and an orientation of 6: a TIFF, or another file's EXIF."""
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    entries += b"".join(struct.pack("<HHII", 1000 + index, 7, size, 20_000) for index in range(count))
    return (b"II*\0" + struct.pack("<IH", 8, count + 1) + entries + bytes(4)).ljust(20_000, b"\0") + bytes(size)


def jpeg_with_exif(exif: bytes, size: int) -> bytes:
    """In segments of `size` bytes."""
    parts = (exif[start : start + size] for start in range(0, len(exif), size))
    segments = (b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part for part in parts)
    jpeg = encode(picture(8, 8), "JPEG")
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with further chunks before its pixels, or behind them."""
    png = encode(picture(8, 8), "PNG")
    place = len(png) - 12 if behind else 33
    return png[:place] + b"".join(chunks) + png[place:]


def gif_with(*blocks: bytes) -> bytes:
    gif = encode(picture(8, 8), "GIF")
    place = 13 + (3 << (gif[10] & 7) + 1)  # behind the palette
    return gif[:place] + b"".join(blocks) + gif[place:]


def many_strips() -> bytes:
    count = 2**20 + 1
    return tiff_of({**GREY_TIFF, 256: 8, 257: 8, 278: 1, 273: bytes(4 * count), 279: 8})


INFLATED = zlib.compress(bytes(2**20 - 99), 9)
COSTLY = {
    "JPEG of tiny EXIF segments": (lambda: jpeg_with_exif(bytes(900), 1), "more than .* segments, or 64 with EXIF"),
    "JPEG of comments": (
        lambda: (jpeg := encode(picture(8, 8), "JPEG"))[:2] + b"\xff\xfe\0\2" * 200_000 + jpeg[2:],
        "more than 4096 segments",
    ),
    "TIFF of tags in one place": (lambda: tags_of_one_place(1500, 900_000), "tags of [0-9]* bytes and more, in"),
    "JPEG of tags in one place": (
        lambda: jpeg_with_exif(tags_of_one_place(1500, 900_000), 65_000),
        "tags of [0-9]* bytes and more, in",
    ),
    "AVIF of tags in one place": (
        lambda: encode(picture(8, 8), "AVIF") + tags_of_one_place(1500, 900_000),
        "tags of [0-9]* bytes and more, in",
    ),
    "TIFF of a million strips": (many_strips, "tags of more than 1048576 numbers"),
    "PNG of texts behind its pixels": (
        lambda: png_with(*[chunk(b"iCCP", b"a\0\0" + INFLATED)] * 900, behind=True),
        "a PNG of 900 compressed texts, 64 are allowed",
    ),
    "PNG of empty chunks behind its pixels": (
        lambda: png_with(*[chunk(b"abCd", b"")] * 80_000, behind=True),
        "more than 4096 chunks besides its pixels",
    ),
    "JPEG with two signatures of EXIF": (
        lambda: jpeg_with_exif(b"Exif\0\0" + tags_of_one_place(1500, 900_000), 65_000),
        "tags of [0-9]* bytes and more, in",
    ),
    "JPEG whose index has tags in one place": (
        lambda: (
            (jpeg := encode(picture(8, 8), "JPEG"))[:2]
            + (b"\xff\xe2" + struct.pack(">H", 2 + 4 + 60_000) + b"MPF\0" + tags_of_one_place(1500, 40_000))
            + jpeg[2:]
        ),
        "tags of [0-9]* bytes and more, in",
    ),
    "JPEG of markers without a length": (
        lambda: encode(picture(8, 8), "JPEG")[:2] + b"\xff\xd8" * 400_000,
        "more than 4096 segments",
    ),
    "GIF of a long comment": (
        lambda: gif_with(b"!\xfe" + (b"\xff" + bytes(255)) * 3900 + b"\0" + b"!\xfe\0" * 300),
        "a GIF of more than 4096 blocks of comments",
    ),
    "JPEG of 300 scans": (lambda: jpeg_of_scans(picture(64, 48), 300), "JPEG of more than 100 scans"),
    "JPEG of 30 scans": (lambda: jpeg_of_scans(Image.new("L", HUGE), 30), "JPEG of more than 22 scans"),
    "MPO of 300 scans": (
        lambda: jpeg_of_scans(picture(64, 48), 300, "MPO", save_all=True, append_images=[picture(64, 48)]),
        "JPEG of more than 100 scans",
    ),
    "TIFF of JPEG scans": (strips_of_one_jpeg, "TIFF of 4500 JPEG scans"),
    "TIFF of a huge tile": (huge_tile, "TIFF of 16 x 16 pixels in tiles of 40000 x 40000"),
    "TIFF of tiles beyond its edge": (tiles_beyond_the_edge, "TIFF of 16 x 9600 pixels in tiles of 30000 x 16"),
    "TIFF of needless strips": (more_strips_than_rows, "9000 strips or tiles, 414 are allowed"),
    "JPEG 2000 of layers": (lambda: jpeg2000(layers, tile_size=(64, 64)), "JPEG 2000 of .* packets .* too many"),
    "JPEG 2000 of tiny blocks": (lambda: jpeg2000(tiny_blocks), "JPEG 2000 of .* blocks, too many"),
    "JPEG 2000 of tiny precincts": (
        lambda: jpeg2000(tiny_precincts, precinct_size=(128, 128), codeblock_size=(64, 64)),
        "JPEG 2000 of .* packets .* too many",
    ),
    "JPEG 2000 of channels": (
        lambda: encode(Image.new("RGB", (9, 9)), "JPEG2000").replace(b"\0\0\0\0\0\3\7", b"\0\0\0\0\x20\0\7", 1),
        "channels|not an image",
    ),
    "RLE bitmap of line ends": (lambda: rle_bitmap(b"\1\0\0\0" * 9400 + b"\0\1"), "run-length encoded"),
    "PPM of comments": (lambda: b"P2\n9400 9400\n255\n" + b"#\n" * 400_000, "400000 comments, 10000 are allowed"),
    "icon of a large PNG": (lambda: icon_of(encode(Image.new("1", HUGE), "PNG")), "icon of 9400 x 9400 .* 1024"),
    "icon of a larger PNG": (lambda: icon_of(encode(Image.new("1", (14000, 14000)), "PNG")), "too large|1024"),
    "icon of a large bitmap": (lambda: icon_of(encode(Image.new("1", HUGE), "DIB")[:1000]), "icon of 9400 x 9400"),
    "icon with two headers": (
        lambda: icon_of(
            (png := encode(Image.new("1", HUGE), "PNG"))[:8]
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 1, 0, 0, 0, 0))
            + png[8:]
        ),
        "icon of 9400 x 9400",
    ),
    "icon behind five megabytes of text": (
        lambda: icon_of(
            (png := encode(Image.new("1", HUGE), "PNG"))[:33] + chunk(b"tEXt", b"a\0" + bytes(5 * 2**20)) + png[33:]
        ),
        "icon of 9400",
    ),
    "PNG of compressed texts": (
        lambda: (
            (png := encode(Image.new("1", (16, 16)), "PNG"))[:33]
            + chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(2**20), 9)) * 900
            + png[33:]
        ),
        "a PNG of 900 compressed texts, 64 are allowed",
    ),
    "TIFF of one JPEG of many scans": (
        lambda: tiff_of(
            {
                **GREY_TIFF,
                259: 7,
                256: 16,
                257: 16,
                278: 16,
                273: 1000,
                279: len(content := jpeg_of_scans(Image.new("L", (16, 16)), 150)),
            },
            content,
        ),
        "TIFF of 150 JPEG scans",
    ),
    # 21 scans took 10 seconds.
    "large JPEG with arithmetic coding": (
        lambda: arithmetic_jpeg(9400, 5),
        "more than 22 scans, .* arithmetic coding counts as 5",
    ),
    "JPEG with arithmetic coding": (lambda: arithmetic_jpeg(640, 21), "more than 100 scans"),
    "TIFF of JPEG with arithmetic coding": (
        lambda: tiff_of(
            {**GREY_TIFF, 259: 7, 256: 64, 257: 64, 278: 64, 273: 1000, 279: len(content := arithmetic_jpeg(64, 21))},
            content,
        ),
        "TIFF of 21 JPEG scans",
    ),
    # For each, the decoder searches all earlier ones.
    "AVIF of parts": (
        lambda: (
            box(b"ftyp", b"avif\0\0\0\0")
            + box(b"meta", bytes(4) + box(b"iloc", b"\2\0\0\0\0\0" + struct.pack(">I", 90_000) + bytes(900_000)))
        ),
        "lists of 900018 bytes, 262144 are allowed",
    ),
    "AVIF of frames": (
        lambda: (
            box(b"ftyp", b"avis\0\0\0\0")
            + box(b"moov", box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", box(b"stsc", bytes(480_000)))))))
        ),
        "lists of 480008 bytes",
    ),
    "AVIF of a million bytes of boxes": (
        lambda: box(b"ftyp", b"avif\0\0\0\0") + box(b"free", b"") * 2**18,
        "more than 262144 boxes",
    ),
    "many icons": (lambda: icon_of(encode(Image.new("1", (16, 16)), "PNG"), 9000), "9000 icons, 256 are allowed"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_no_encoder_writes_is_refused_before_it_is_decoded(name):
    make, message = COSTLY[name]
    content = make()
    assert len(content) <= 1_000_000 or "five megabytes" in name or "a million" in name
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_image(content)
    assert time.process_time() - start < 1
    if not any(
        word in name
        for word in ("icon", "channels", "texts", "EXIF", "comment", "tags", "million", "empty", "length", "AVIF")
    ):
        with pytest.raises(ValueError, match=message):
            load_image(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("count", [2, 1500])
@pytest.mark.parametrize("kind", ["PNG", "signatures", "WEBP", "ImageMagick"])
def test_exif_of_tags_in_one_place_counts_as_none(kind, count):
    exif = tags_of_one_place(count, 300_000)
    if kind == "ImageMagick":
        text = b"\nexif\n%8d\n" % len(exif) + (b"Exif\0\0" + exif).hex().encode()
        raw = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
        content = encode(picture(8, 4), "PNG")
        content = content[:33] + raw + content[33:]
    else:
        exif = b"Exif\0\0" * 2 + exif if kind == "signatures" else exif
        content = encode(picture(8, 4), "PNG" if kind == "signatures" else kind, exif=exif)
    assert load_image(content).size == ((4, 8) if count == 2 else (8, 4))


def test_the_texts_of_icons_are_not_inflated():
    """Of 14 icons, each with 63 megabytes of text, Pillow opens one."""
    png = encode(Image.new("1", (16, 16)), "PNG")
    texts = b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2**20 - 99), 9)) for i in range(63))
    icon, count = png[:33] + texts + png[33:], 14
    entries = [
        struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(icon), 6 + 16 * count + index * len(icon))
        for index in range(count)
    ]
    content = struct.pack("<HHH", 0, 1, count) + b"".join(entries) + icon * count
    assert len(content) < 1_000_000
    start = time.process_time()
    assert load_image(content).size == (16, 16)
    assert time.process_time() - start < 1


def test_the_check_of_a_jpeg_2000_is_linear():
    style = b"\xff\x52\0\x0c\1\0\0\1\0\5\0\0\0\0"  # once for each, the rest of the file was copied
    start = time.process_time()
    load_image(encode(Image.new("RGB", (16, 16)), "JPEG2000", no_jp2=True) + style * 280_000)
    assert time.process_time() - start < 3


def test_icons_are_refused_when_they_are_opened():
    with pytest.raises(ValueError, match="a file is an icon of 9400 x 9400"):
        open_image(io.BytesIO(icon_of(encode(Image.new("1", HUGE), "PNG"))), "a file")


ORDINARY = {
    "progressive JPEG": lambda: encode(picture(640, 480), "JPEG", progressive=True),
    "progressive CMYK": lambda: encode(picture(640, 480).convert("CMYK"), "JPEG", progressive=True),
    "JPEG of 60 scans": lambda: jpeg_of_scans(picture(640, 480), 60),
    "JPEG with arithmetic coding": lambda: arithmetic_jpeg(640, 20),
    "JPEG with a preview of 90 scans": lambda: encode(
        picture(64, 48), "JPEG", comment=jpeg_of_scans(picture(16, 16), 90)
    ),
    "JPEG with restarts": lambda: encode(picture(640, 480), "JPEG", progressive=True, restart_marker_blocks=1),
    "JPEG before others": lambda: encode(picture(64, 48), "JPEG") + jpeg_of_scans(picture(64, 48), 300),
    "TIFF of JPEG strips": lambda: encode(picture(640, 4800), "TIFF", compression="jpeg", strip_size=640 * 8 * 3),
    "TIFF of a strip per row": lambda: encode(picture(40, 4800), "TIFF", strip_size=1),
    "JPEG 2000": lambda: encode(picture(640, 480), "JPEG2000", quality_layers=[20, 10, 5], tile_size=(64, 64)),
    "JPEG 2000 of precincts": lambda: encode(
        picture(640, 480), "JPEG2000", precinct_size=(128, 128), codeblock_size=(32, 32)
    ),
    "GIF of a long XMP": lambda: gif_with(b"!\xff\x0bXMP DataXMP" + (b"\x3c" + b"<" * 60) * 9000 + b"\0"),
    "PNG of a chunk for each row": lambda: png_with(*[chunk(b"IDAT", b"")] * 9000),
    "icon": lambda: encode(picture(256, 256), "ICO"),
    "icon of bitmaps": lambda: encode(picture(256, 256), "ICO", bitmap_format="bmp"),
    "large icon": lambda: icon_of(encode(picture(512, 512), "PNG")),
    "plain PPM": lambda: b"P2\n# made by hand\n3 2\n255\n1 2 3 # four follows\n4 5 6\n",
}


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
@pytest.mark.parametrize("name", ORDINARY)
def test_what_encoders_write_is_read(name):
    content = ORDINARY[name]()
    with Image.open(io.BytesIO(content)) as image:
        expected = image.convert("RGBA").convert("RGB") if image.mode == "I" else image.convert("RGB")
    assert load_image(content).tobytes() == expected.tobytes()


def test_the_position_in_the_file_stays(tmp_path):
    """For callers that load an image piece by piece, as its owner may."""
    for format in ("JPEG", "TIFF", "JPEG2000"):
        with Image.open(io.BytesIO(encode(picture(64, 48), format))) as image:
            from mc_llava.image_costs_mc_llava import check_work

            position = image.fp.tell()
            check_work(image)
            assert image.fp.tell() == position


MEMORY = """
import io, sys, warnings
from PIL import Image
from mc_llava import load_image

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak(function):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

side = 4000
def encode(mode, format, side=side, **options):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, format, **options)
    return file.getvalue()

load_image(Image.new("RGBA", (9, 9)))
exif = Image.Exif()
exif[0x0112] = 6
profile = bytes.fromhex(sys.argv[1])
for mode, format, options in (
    ("I", "TIFF", {}), ("I", "TIFF", {"compression": "tiff_lzw"}), ("F", "TIFF", {}), ("I;16", "PNG", {}),
    ("I;16", "PNG", {"transparency": 5}), ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 0}),
    ("L", "PNG", {"transparency": 0}), ("1", "PNG", {}), ("RGB", "WEBP", {"lossless": True}), ("CMYK", "JPEG", {}),
    ("RGBA", "WEBP", {"lossless": True}), ("RGB", "JPEG", {"exif": exif}), ("LAB", "TIFF", {}), ("L", "GIF", {}),
    ("RGB", "JPEG", {"progressive": True}), ("RGB", "BMP", {}), ("L", "PPM", {}), ("RGB", "PNG", {}),
    ("RGBA", "PNG", {"exif": exif}), ("CMYK", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "TIFF", {}),
    ("RGB", "JPEG2000", {"tile_size": (512, 512)}), ("RGB", "JPEG", {"icc_profile": profile}),
    ("RGB", "JPEG", {"icc_profile": profile, "exif": exif}),
):
    content = encode(mode, format, **options)
    decoder = peak(lambda: Image.open(io.BytesIO(content)).load())
    whole = peak(lambda: load_image(content))
    print(mode, format, *options, 0 if whole <= decoder + side**2 else whole / side**2, sep=",")

for mode in ("I", "F", "RGBA"):
    content = encode(mode, "TIFF", side=1100, compression="tiff_lzw")
    print(mode, "small", peak(lambda: load_image(content)) / 1100**2, sep=",")

import numpy as np
import torch
for kind in ("uint8", "uint16", "float16", "float32", "float64"):
    for channels in (1, 3, 4):
        array = np.zeros((side, side, channels), dtype=kind)
        print(kind, channels, peak(lambda: load_image(array)) / side**2, sep=",")
for kind in (torch.bfloat16, torch.float64):
    tensor = torch.zeros(3, side, side, dtype=kind)
    print(kind, peak(lambda: load_image(tensor)) / side**2, sep=",")
"""


@pytest.mark.slow
def test_memory_is_at_most_three_times_the_pictures_or_the_decoders():
    """Pillow's WebP decoder takes 16 bytes a pixel, five times as much as the picture."""
    profile = icc_profile("RGB ", 2.2, P3).hex()
    run = subprocess.run([sys.executable, "-c", MEMORY, profile], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    rows = [line.split(",") for line in run.stdout.split()]
    assert len(rows) == 46
    assert [row for row in rows if float(row[-1]) > 3 * 3] == []
