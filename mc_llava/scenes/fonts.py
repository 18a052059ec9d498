"""The fonts of signs, and how large a text is in them."""

from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

from .scene import CHARACTERS


@lru_cache(maxsize=2048)
def load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont:
    """A font of `FONTS`, or the font of a file, at a size in pixels per em."""
    if name is None:
        return ImageFont.load_default(size)
    if Path(name).is_absolute():
        return ImageFont.truetype(name, size)
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"the font {name} is matplotlib's: pip install matplotlib") from error
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


@cache
def _metrics(name: str | None) -> tuple[float, dict[str, float]]:
    """Height of a capital and the advance of each character with 6 % of tracking, in em."""
    font = load_font(name, 200)
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    return (bottom - top) / 200, {character: font.getlength(character) / 200 + 0.06 for character in CHARACTERS}


def font_size(name: str | None, glyph: float) -> tuple[int, float]:
    """The size in pixels per em, a whole number, whose capitals are closest to `glyph` pixels, and their height."""
    capital, _ = _metrics(name)
    size = max(1, round(glyph / capital))
    return size, size * capital


def text_width(name: str | None, size: int, text: str) -> float:
    _, advances = _metrics(name)
    return size * sum(advances[character] for character in text)
