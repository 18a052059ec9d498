"""
Bound what a picture's file may cost. The checks read headers only and come before anything is decoded: a file of a
megabyte can ask for minutes of work, and Pillow's decoders can't be stopped. Imports neither torch nor transformers.
"""

import bisect
import io
import re
import struct
from collections.abc import Iterator
from itertools import takewhile

from PIL import ExifTags, Image


MAX_IMAGE_SIDE = 20_000  # pixels; Pillow's own Image.MAX_IMAGE_PIXELS bounds the area
MAX_SCANS = 100  # of a JPEG; encoders write at most about 20
MAX_SCAN_PIXELS = 2 * 10**9  # scans of a JPEG times its pixels
ARITHMETIC = (0xC9, 0xCA)  # markers of JPEGs with arithmetic coding
ARITHMETIC_COST = 5  # of one of their scans, in other scans
MAX_ICON_SIDE = 1024  # of an ICO; the format itself ends at 256
MAX_ICONS = 256
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"zTXt", b"iTXt", b"iCCP")
MAX_TEXTS = 64  # of a PNG
PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
MAX_CHUNKS = 4096  # of a PNG besides those with pixels, of a JPEG before them, and of a GIF's comments
MAX_PIECES = 2**18  # of a PNG or a JPEG, and of what a GIF has before its pixels
MAX_EXIFS = 64  # segments of a JPEG; Pillow copies those before for each
MAX_PLACES = 8  # of an AVIF that look like EXIF
AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
AVIF_FOLDERS = {b"meta": 4, b"iprp": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}  # bytes to skip
AVIF_LISTS = (b"iloc", b"iinf", b"iref", b"ipma", b"grpl", b"stco", b"co64", b"stsc", b"stsz", b"stts", b"stss")
MAX_LIST_BYTES = 2**18  # of an AVIF's lists of parts and frames, some of which the decoder searches for each entry
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")  # Pillow takes wrong ones, too
VALUE_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1)) | {16: 8}  # of each type of a TIFF's values
BYTE_KINDS = (1, 2, 7)  # which Pillow does not convert
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)  # that a directory may name
SHARED_BYTES = 2**20  # that tags may have in addition to the file's; encoders let few of them share their values
MAX_TAGS = 2**16  # of a directory, as in any TIFF but a BigTIFF
MAX_NUMBERS = 2**20  # of all tags; a picture of 20,000 x 4,000 pixels in tiles of 16 x 16 has 625,000
MAX_TILE_PIXELS = 2**24  # that a TIFF's tiles may have beyond the picture's edges
MAX_PYTHON_PIXELS = 2**24  # of a run-length encoded BMP, which Pillow decodes in Python
MAX_COMMENTS = 10_000  # of a PPM in decimal numbers; Pillow copies the rest of the file for each
MAX_PACKETS = 2**24  # of a JPEG 2000
MAX_BLOCKS = 2**21  # of a JPEG 2000


def check_dimensions(width: int, height: int, name: str):
    if width < 1 or height < 1:
        raise ValueError(f"{name} has {width} x {height} pixels: an image needs at least 1 x 1")
    if max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels, a side may have {MAX_IMAGE_SIDE}: resize it first")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels, {explain_limit()}")


def explain_limit() -> str:
    """How to go on with a picture of more pixels than Pillow allows."""
    limit = f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels"
    return f"{limit}: resize it first, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


def check_header(file, name: str):
    """
    Check what `Image.open` would spend on an ICO, of which it decodes a picture, on a PNG, whose text it inflates, on
    a GIF, whose comments it joins, on the lists of an AVIF, and on the tags of a TIFF, or of the EXIF in a JPEG or an
    AVIF. Other formats pass.

    Raises:
        ValueError: if there are too many icons, texts, comments, parts or tags, or an icon is larger than icons are.
    """
    file.seek(0)
    head = file.read(12)
    if head.startswith(PNG_SIGNATURE):
        _check_png(file, name)
    elif head.startswith(b"\xff\xd8"):
        _check_segments(file, name)
    elif head.startswith(b"GIF8"):
        _check_gif(file, name)
    elif head[:4] in TIFF_SIGNATURES:
        check_tags(file, name)
    elif head[4:8] == b"ftyp" and head[8:] in AVIF_BRANDS:
        _check_avif(file, name)
    elif head.startswith(b"\0\0\1\0"):
        _check_icons(file, name)
    file.seek(0)


def _check_icons(file, name: str):
    file.seek(4)
    count = int.from_bytes(file.read(2), "little")
    if count > MAX_ICONS:
        raise ValueError(f"{name} has {count} icons, {MAX_ICONS} are allowed: save one of them as PNG")
    entries = file.read(16 * count)
    for (offset,) in set(struct.iter_unpack("<12xI", entries[: len(entries) // 16 * 16])):
        file.seek(offset)
        width, height = _icon_size(file, name)
        if max(width, height // 2) > MAX_ICON_SIDE:  # a bitmap's height counts its mask as well
            raise ValueError(
                f"{name} is an icon of {width} x {height} pixels, a side may have {MAX_ICON_SIDE}: save it as PNG"
            )


def _icon_size(file, name: str) -> tuple[int, int]:
    """Width and height of the PNG or bitmap at the file's position, 0 if there is none. Nothing is inflated."""
    head = file.read(16)
    if head.startswith(PNG_SIGNATURE):
        file.seek(8 - len(head), io.SEEK_CUR)
        chunks = takewhile(lambda chunk: chunk[0] not in PNG_PIXELS, _png_chunks(file, name))
        headers = [struct.unpack_from(">II", start) for kind, start in chunks if kind == b"IHDR"]
        return max(headers, key=max, default=(0, 0))  # Pillow takes the last one
    if len(head) < 16:
        return 0, 0
    sides = struct.unpack_from("<HH" if head.startswith(b"\x0c\0\0\0") else "<ii", head, 4)
    return abs(sides[0]), abs(sides[1])


def _check_png(file, name: str):
    file.seek(len(PNG_SIGNATURE))
    texts = sum(kind in PNG_TEXTS for kind, _ in _png_chunks(file, name))
    if texts > MAX_TEXTS:
        raise ValueError(f"{name} is a PNG of {texts} compressed texts, {MAX_TEXTS} are allowed: save it again")


def _png_chunks(file, name: str) -> Iterator[tuple[bytes, bytes]]:
    """The kind and the first 8 bytes of each chunk of a PNG, whose signature has been read."""
    others = pieces = 0
    while len(head := file.read(16)) >= 8 and (kind := head[4:8]) != b"IEND":
        length = int.from_bytes(head[:4], "big")
        pieces += 1
        others += kind not in PNG_PIXELS
        if others > MAX_CHUNKS or pieces > MAX_PIECES:
            raise ValueError(
                f"{name} is a PNG of more than {MAX_CHUNKS} chunks besides its pixels, or {MAX_PIECES} in all: "
                "save it again"
            )
        yield kind, head[8:].ljust(8, b"\0")
        file.seek(length + 12 - len(head), io.SEEK_CUR)  # also over its checksum


def _check_gif(file, name: str):
    comments = 0
    for blocks, label in enumerate(_gif_blocks(file), 1):
        comments += label == b"\xfe"
        if comments > MAX_CHUNKS or blocks > MAX_PIECES:
            raise ValueError(
                f"{name} is a GIF of more than {MAX_CHUNKS} blocks of comments, or {MAX_PIECES} before its pixels: "
                "save it again"
            )


def _gif_blocks(file) -> Iterator[bytes]:
    """The label of each extension before a GIF's pixels, once more for each of its blocks; empty for other bytes."""
    file.seek(10)
    flags = file.read(3).ljust(1, b"\0")[0]
    file.seek(3 << (flags & 7) + 1 if flags & 128 else 0, io.SEEK_CUR)  # its palette
    while (kind := file.read(1)) not in (b"", b";", b","):  # its end, a picture
        label = file.read(1) if kind == b"!" else b""
        yield label
        while label and (length := file.read(1)) not in (b"", b"\0"):
            file.seek(length[0], io.SEEK_CUR)
            yield label


def _check_avif(file, name: str):
    """The lists that an AVIF's decoder searches, and whatever looks like EXIF after its brand."""
    total = sum(length for kind, length in _avif_boxes(file, name) if kind in AVIF_LISTS)
    if total > MAX_LIST_BYTES:
        raise ValueError(
            f"{name} is an AVIF with lists of {total} bytes, {MAX_LIST_BYTES} are allowed: save it as PNG"
        )
    start = file.seek(12)
    signatures = re.finditer(b"|".join(map(re.escape, TIFF_SIGNATURES)), file.read())
    for number, found in enumerate(signatures, 1):
        if number > MAX_PLACES:
            raise ValueError(f"{name} has EXIF in more than {MAX_PLACES} places: save it again")
        check_tags(file, name, start + found.start())


def _avif_boxes(file, name: str) -> Iterator[tuple[bytes, int]]:
    """The kind and the length of each box of an AVIF, and of the boxes in `AVIF_FOLDERS`."""
    pieces, spans = 0, [(0, file.seek(0, io.SEEK_END))]
    for start, end in spans:  # grows meanwhile
        while end - start >= 8:
            file.seek(start)
            head = file.read(16)
            length, kind, size = int.from_bytes(head[:4], "big"), head[4:8], 8
            if length == 1:
                length, size = int.from_bytes(head[8:], "big"), 16
            length = end - start if length == 0 else length  # up to the end
            if not size <= length <= end - start:  # the decoder refuses it
                break
            pieces += 1
            if pieces > MAX_PIECES:
                raise ValueError(f"{name} is an AVIF of more than {MAX_PIECES} boxes: save it as PNG")
            yield kind, length
            if kind in AVIF_FOLDERS:
                spans.append((start + size + AVIF_FOLDERS[kind], start + length))
            start += length


def _check_segments(file, name: str):
    """What a JPEG has before its pixels: Pillow joins its EXIF, and reads an index of pictures."""
    file.seek(0)
    exif, indices, others = [], [], 0
    for marker, length in _jpeg_segments(file):
        if marker == 0xDA:  # pixels
            break
        start = file.read(min(length, 6))
        if marker == 0xE1 and start == b"Exif\0\0":
            exif.append(file.read(length - 6))
        elif marker == 0xE2 and start.startswith(b"MPF\0"):
            indices.append(start[4:] + file.read(length - len(start)))
        else:
            others += 1
        if others > MAX_CHUNKS or len(exif) + len(indices) > MAX_EXIFS:
            raise ValueError(
                f"{name} is a JPEG of more than {MAX_CHUNKS} segments, or {MAX_EXIFS} with EXIF: save it again"
            )
    for content in (b"".join(exif), *indices):
        check_exif(content, name)


def check_exif(content: bytes, name: str):
    """`check_tags` of EXIF, with its signature or without it. Pillow takes any number of signatures."""
    check_tags(io.BytesIO(re.sub(rb"^(Exif\0\0)+", b"", content)), name)


def check_tags(file, name: str, base: int = 0):
    """
    Check how much Pillow reads as a TIFF's tags. Before Pillow 13, it copies the values of each, which may all lie in
    the same place.

    Args:
        base: where the TIFF begins, which may be a part of another file. Other content passes.

    Raises:
        ValueError: if the values have more bytes than the file, or there are more numbers than any picture has.
    """
    size = file.seek(0, io.SEEK_END) - base
    file.seek(base)
    head = file.read(16).ljust(16, b"\0")
    if head[:4] not in TIFF_SIGNATURES:
        return
    order, is_big = "little" if head.startswith(b"II") else "big", head[2] == 43  # as Pillow tells them
    entry = struct.Struct(("<" if order == "little" else ">") + ("HHQQ" if is_big else "HHII"))
    at = 8 if is_big else 4  # bytes that hold a place, or a tag's value itself
    total, numbers, starts = 0, 0, [int.from_bytes(head[at : 2 * at], order)]
    for start in starts:  # grows meanwhile
        file.seek(base + min(start, size))
        count = int.from_bytes(file.read(8 if is_big else 2), order)
        if count > MAX_TAGS:
            raise ValueError(f"{name} has {count} tags in a directory, {MAX_TAGS} are allowed: save it again")
        entries = file.read(count * entry.size)
        for tag, kind, values, place in entry.iter_unpack(entries[: len(entries) // entry.size * entry.size]):
            length = values * VALUE_BYTES.get(kind, 0)
            if length > at and place + length > size:  # Pillow reads no further
                break
            total, numbers = total + length, numbers + (0 if kind in BYTE_KINDS else values)
            if total > size + SHARED_BYTES:
                raise ValueError(f"{name} has tags of {total} bytes and more, in {size} bytes: save it again")
            if numbers > MAX_NUMBERS:
                raise ValueError(f"{name} has tags of more than {MAX_NUMBERS} numbers: save it again")
            if tag in DIRECTORIES and len(starts) <= len(DIRECTORIES):
                starts.append(place)


def check_work(image: Image.Image):
    """
    Check an open image that has not been decoded yet. The position in its file stays the same.

    Raises:
        ValueError: if decoding it would take more work than any picture that an encoder writes.
    """
    tiles, file = getattr(image, "tile", None), getattr(image, "fp", None)
    if not tiles or file is None or getattr(file, "closed", False):
        return  # decoded already, or closed
    if len(tiles) > (allowed := 4 * image.height + image.width * image.height // 64):
        raise ValueError(f"it has {len(tiles)} strips or tiles, {allowed} are allowed at its size")
    check = {
        "jpeg": _check_jpeg,
        "jpeg2k": _check_jpeg2000,
        "libtiff": _check_tiff,
        "bmp_rle": _check_rle,
        "ppm_plain": _check_plain_ppm,
    }.get(tiles[0][0])
    if check is not None:
        position = file.tell()
        try:
            check(image, file)
        finally:
            file.seek(position)


def _check_jpeg(image: Image.Image, file):
    allowed = min(MAX_SCANS, MAX_SCAN_PIXELS // (image.width * image.height))
    file.seek(image.tile[0][2])  # of the frame in an MPO
    if _count_scans(file, allowed + 1) > allowed:
        raise ValueError(
            f"it is a JPEG of more than {allowed} scans, which are allowed at its size; one with arithmetic coding "
            f"counts as {ARITHMETIC_COST}"
        )


def _count_scans(file, enough: int) -> int:
    """The number of scans of a JPEG as libjpeg finds them, weighted by their cost; at most `enough`."""
    scans, cost = 0, 1
    for number, (marker, _) in enumerate(_jpeg_segments(file)):
        cost = ARITHMETIC_COST if marker in ARITHMETIC else cost
        scans += cost * (marker == 0xDA)
        if scans >= enough or number > MAX_PIECES:
            return enough
    return scans


def _jpeg_segments(file) -> Iterator[tuple[int, int]]:
    """Marker and length of each segment of a JPEG at the file's position, with the file at the segment's contents."""
    file.seek(2, io.SEEK_CUR)
    while (marker := _next_marker(file)) not in (None, 0xD9):
        length = b"\0\2" if marker in (0x01, 0xD8) else file.read(2)  # they have no length
        if len(length) < 2:
            return
        position, length = file.tell(), max(int.from_bytes(length, "big") - 2, 0)
        yield marker, length
        file.seek(position + length)


def _next_marker(file) -> int | None:
    """Skip to the next marker and return it. Fill bytes, escaped bytes of 255 and restart markers don't count."""
    size = 64  # most markers follow the one before
    while chunk := file.read(size):
        if found := re.search(rb"\xff[^\x00\xff\xd0-\xd7]", chunk):
            file.seek(found.end() - len(chunk), io.SEEK_CUR)
            return chunk[found.end() - 1]
        if chunk.endswith(b"\xff") and len(chunk) > 1:
            file.seek(-1, io.SEEK_CUR)
        size = 2**16
    return None


def _check_tiff(image: Image.Image, file):
    tags = image.tag_v2
    width, height = tags[256], tags[257]  # before its orientation is applied
    if 322 in tags and 323 in tags:
        part, offsets, lengths = tags[322] * tags[323], tags.get(324, ()), tags.get(325, ())
        if -(-width // tags[322]) * -(-height // tags[323]) * part > 4 * width * height + MAX_TILE_PIXELS:
            raise ValueError(f"it is a TIFF of {width} x {height} pixels in tiles of {tags[322]} x {tags[323]}")
    else:
        part, offsets, lengths = width * min(tags.get(278, height), height), tags.get(273, ()), tags.get(279, ())
    if tags.get(259) not in (6, 7):  # no JPEG inside
        return
    starts, cost = _find(b"\xff\xda", file), ARITHMETIC_COST if _find(rb"\xff[\xc9\xca]", file) else 1
    scans = [
        bisect.bisect_left(starts, offset + length) - bisect.bisect_left(starts, offset)
        for offset, length in zip(offsets, lengths)
    ] or [len(starts)]
    if max(scans) * cost > MAX_SCANS or sum(scans) * part * cost > MAX_SCAN_PIXELS:
        raise ValueError(f"it is a TIFF of {sum(scans)} JPEG scans, too many for its size")


def _find(what: bytes, file) -> list[int]:
    """The places of a sequence of two bytes in a file."""
    file.seek(0)
    position, places, last = 0, [], b""
    while chunk := file.read(2**20):
        places += [position - len(last) + found.start() for found in re.finditer(what, last + chunk)]
        position, last = position + len(chunk), chunk[-1:]
    return places


def _check_jpeg2000(image: Image.Image, file):
    """
    Check how many packets and blocks the headers announce. Each tile may have its own header, and a header can't be
    told from other bytes that look like one, so all of them count.
    """
    file.seek(0)
    data = file.read()
    tiles = channels = 1
    for found in re.finditer(rb"\xff\x4f\xff\x51.{38}", data, re.S):
        right, bottom, left, top, width, height, x, y, count = struct.unpack_from(">8IH", found.group(), 8)
        check_dimensions(right - left, bottom - top, "it")
        tiles = max(tiles, -(-(right - x) // max(width, 1)) * -(-(bottom - y) // max(height, 1)))
        channels = max(channels, count)
    if channels > 4:
        raise ValueError(f"it is a JPEG 2000 of {channels} channels, 4 are allowed")
    pixels, packets, blocks = image.width * image.height, 0, 0
    # Coding styles: flags, layers, levels, the sides of blocks, and after them of precincts, all as exponents of 2.
    for found in re.finditer(rb"\xff\x52\x00[\x0c-\x2d](.)[\x00-\x04](..)[\x00\x01]([\x00-\x20]).{4}", data, re.S):
        flags, layers, levels = (int.from_bytes(group, "big") for group in found.groups())
        sizes = data[found.end() : found.end() + levels + 1] if flags & 1 else b"\xff"
        precinct = 2 ** min(((size & 15) + (size >> 4) for size in sizes), default=0)
        packets = max(packets, layers * channels * (tiles * (levels + 1) + 2 * pixels // precinct))
    style = rb"\xff(?:\x52\x00[\x0c-\x2d].[\x00-\x04]..[\x00\x01]|\x53\x00[\x09-\x2b]..)([\x00-\x20])([\x00-\x08]{2})"
    for found in re.finditer(style, data, re.S):  # a component may have its own
        levels, sides = found.group(1)[0], sum(found.group(2))
        blocks = max(blocks, channels * max(pixels >> (sides + 4), tiles * (3 * levels + 1)))
    if packets > MAX_PACKETS or blocks > MAX_BLOCKS:
        raise ValueError(f"it is a JPEG 2000 of {packets} packets and {blocks} blocks, too many for its size")


def _check_rle(image: Image.Image, file):
    if image.width * image.height > MAX_PYTHON_PIXELS:
        raise ValueError(f"it is run-length encoded, for which {MAX_PYTHON_PIXELS} pixels are allowed")


def _check_plain_ppm(image: Image.Image, file):
    comments = 0
    while chunk := file.read(2**16):
        comments += chunk.count(b"#")
    if comments > MAX_COMMENTS:
        raise ValueError(f"it has {comments} comments, {MAX_COMMENTS} are allowed")


__all__ = []
