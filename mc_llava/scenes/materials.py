"""
What scenes can be made of besides drawings: a folder of photographs, one of cut-out objects, and fonts.

    photographs/    any pictures, also in subfolders
    objects/        pictures with transparency, named after what they show: tiger.png, tiger-2.webp, polar_bear.png
    fonts/          any; the system's fonts if there is no folder

A number at the end of a name ("tiger-2") is another rendering of the same object; "_" stands for a space.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import load_image, open_image
from .fonts import load_font
from .scene import CHARACTERS, FONTS, RESERVED


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FONT_SUFFIXES = (".ttf", ".otf")
SCIKIT_IMAGES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png")
PHOTOGRAPH_SIDE = 1280  # at most, of photographs in memory
OBJECT_SIDE = 160
MOST_ELONGATED = 20  # longer side over shorter, of objects: scenes have no place for one that is 40 times as long
# In percent, of font families. Those of `FONTS` stay in their splits: Aileron is the font inside Pillow.
TEST_FAMILIES = 20
FIXED_FAMILIES = {"DejaVu": "train", "STIXGeneral": "train", "cmss10": "train", "Aileron": "test"}
# A font draws `CHARACTERS` if they are alike to those of one of these; fonts of symbols and other scripts don't.
USUAL_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif-Italic.ttf")
ALIKE = 0.5  # correlation, mean of all characters


@dataclass(frozen=True)
class Materials:
    """
    Folders of photographs, objects and fonts. Nothing is read before it is used.

    Args:
        photographs: folder of backgrounds, or their paths.
        objects: folder of cut-out objects.
        fonts: folder of fonts; None for those of the system.
    """

    photographs: str | tuple[str, ...]
    objects: str | None = None
    fonts: str | None = None

    @cached_property
    def backgrounds(self) -> tuple[str, ...]:
        """The photographs' paths."""
        if isinstance(self.photographs, tuple):
            return self.photographs
        return tuple(map(str, files_in(self.photographs, SUFFIXES, "photographs")))

    @cached_property
    def renderings(self) -> dict[str, tuple[str, ...]]:
        """
        The objects' names, sorted, and the paths of their renderings.

        Raises:
            ValueError: if there are none, or a name is not of lower-case letters or has one of the `RESERVED` words.
        """
        found: dict[str, list[str]] = {}
        for path in files_in(self.objects, SUFFIXES, "objects") if self.objects else ():
            name = re.sub(r"-\d+$", "", path.stem).replace("_", " ").lower()
            if not re.fullmatch(r"[a-z]+( [a-z]+)*", name):
                raise ValueError(f"{path} can't name an object: use letters alone, and _ for a space")
            if reserved := set(name.split()) & RESERVED:
                words = ", ".join(sorted(reserved))
                raise ValueError(f"{path} can't name an object: replies are checked for {words}, leave it out")
            found.setdefault(name, []).append(str(path))
        return {name: tuple(found[name]) for name in sorted(found)}

    @cached_property
    def families(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Split -> the font files of each family that draws `CHARACTERS`, see `family_split`."""
        found: dict[str, list[str]] = {}
        for path in font_files(self.fonts):
            if (family := family_of(str(path))) is not None:
                found.setdefault(family, []).append(str(path))
        splits = {split: [] for split in FONTS}
        for family in sorted(found):
            splits[family_split(family)].append(tuple(sorted(found[family], key=lambda path: Path(path).name)))
        if missing := [split for split, families in splits.items() if not families]:
            raise ValueError(
                f"{self.fonts or 'the system'} has no font family of the split {missing[0]}, only {sorted(found)}: "
                "add fonts of more families"
            )
        return {split: tuple(families) for split, families in splits.items()}

    def check(self):
        """
        Try all objects, the fonts' families and the beginning of all photographs.

        Raises:
            ValueError: if a file is broken, before hours of work have passed.
        """
        for path in self.backgrounds:
            with opened(path, "photographs"):
                pass
        for path in sum(self.renderings.values(), ()):
            cut_out(path)
        self.families  # noqa: B018

    def digest(self) -> str:
        """Of the names and sizes of all files: what a run that is continued must find again."""
        files = [*self.backgrounds, *sum(self.renderings.values(), ())]
        files += [path for families in self.families.values() for family in families for path in family]
        lines = sorted(f"{Path(path).name} {Path(path).stat().st_size}" for path in files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def files_in(folder: str, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """
    The files of a folder with one of these suffixes, sorted by their paths below it.

    Raises:
        ValueError: if there is no such folder or no such file in it.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise ValueError(f"{what}: there is no folder {folder}; docs/tiny.md says how to fill one, or set {what}=null")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if not found:
        raise ValueError(f"{what}: the folder {folder} has no {', '.join(suffixes)} file")
    return found


def font_files(folder: str | None) -> Iterator[Path]:
    if folder is not None:
        return iter(files_in(folder, FONT_SUFFIXES, "fonts"))
    try:
        from matplotlib import get_data_path
        from matplotlib.font_manager import findSystemFonts
    except ImportError as error:
        raise ValueError("finding the system's fonts needs matplotlib: pip install matplotlib") from error
    found = [*findSystemFonts(), *map(str, Path(get_data_path(), "fonts", "ttf").glob("*.ttf"))]
    return (Path(path) for path in sorted(found) if Path(path).suffix.lower() in FONT_SUFFIXES)


def family_split(family: str) -> str:
    """
    The split of a font family: a fixed one, else by a hash of its name's first word, so that it is the same everywhere
    and "Noto Sans" and "Noto Serif" are not in two.
    """
    word = re.split(r"\W", family)[0]
    share = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 100
    return FIXED_FAMILIES.get(word, "test" if share < TEST_FAMILIES else "train")


@cache
def family_of(path: str) -> str | None:
    """The family of a font file, the first two words of its name; None if it draws other symbols for `CHARACTERS`."""
    try:
        font = ImageFont.truetype(path, 40)
        drawn = glyphs(font)
    except OSError:
        return None
    if len({glyph.tobytes() for glyph in drawn}) < len(drawn) or not all(glyph.any() for glyph in drawn):
        return None
    likeness = max(np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(drawn, usual)]) for usual in usual_glyphs())
    return " ".join(font.getname()[0].split()[:2]) if likeness >= ALIKE else None


def glyphs(font: ImageFont.FreeTypeFont) -> list[np.ndarray]:
    """The ink of each of `CHARACTERS`, stretched to 16 x 16 pixels."""
    drawn = []
    for character in CHARACTERS:
        image = Image.new("L", (80, 80))
        ImageDraw.Draw(image).text((20, 60), character, fill=255, font=font, anchor="ls")
        box = image.getbbox() or (0, 0, 1, 1)
        drawn.append(np.asarray(image.resize((16, 16), Image.Resampling.BOX, box)).ravel().astype(float))
    return drawn


@cache
def usual_glyphs() -> list[list[np.ndarray]]:
    return [glyphs(load_font(name, 40)) for name in USUAL_FONTS]


def materials_of_test(folder: str) -> Materials:
    """
    What the test split is made of: the folders `photographs`, `objects` and `fonts` of a folder, of which the latter
    two may be missing; or, for an empty name, the photographs that scikit-image has.

    Raises:
        ValueError: if there is neither.
    """
    if folder:
        paths = [Path(folder, name) for name in ("photographs", "objects", "fonts")]
        _, objects, fonts = (str(path) if path.is_dir() else None for path in paths)
        return Materials(str(paths[0]), objects, fonts)
    found = importlib.util.find_spec("skimage")
    names = [Path(found.origin).parent / "data" / name for name in SCIKIT_IMAGES] if found else []
    if not names or not all(path.is_file() for path in names):
        raise ValueError(
            "photographs are scikit-image's unless others are given: pip install scikit-image, or pass "
            "--data photographs=FOLDER, with a folder photographs in it"
        )
    return Materials(tuple(map(str, names)))


@contextmanager
def opened(path: str, what: str) -> Iterator[Image.Image]:
    """
    A picture whose header was read, no larger than `load_image` takes.

    Raises:
        ValueError: naming the file, also for what decoding it raises in the `with` block.
    """
    try:
        with open(path, "rb") as file:
            yield open_image(file, path)
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's decoders has its own errors
        raise ValueError(f"cannot read {path} ({error}): remove it from the {what}") from error


@lru_cache(maxsize=128)
def photograph(path: str) -> Image.Image:
    """A photograph of at most `PHOTOGRAPH_SIDE`."""
    image = load_image(path)
    image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.BICUBIC, reducing_gap=2)
    return image


@lru_cache(maxsize=4096)
def cut_out(path: str) -> Image.Image:
    """An object without the transparent margin around it, of at most `OBJECT_SIDE`."""
    with opened(path, "objects") as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        raise ValueError(f"{path} is transparent everywhere: remove it from the objects")
    image = image.crop(box)
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise ValueError(
            f"{path} shows {image.width} x {image.height} pixels, one side may be {MOST_ELONGATED} times the other: "
            "remove it from the objects"
        )
    image.thumbnail((OBJECT_SIDE, OBJECT_SIDE), Image.Resampling.BICUBIC)
    return image
