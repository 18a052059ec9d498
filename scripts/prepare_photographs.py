"""
Write the folders of photographs for `mc-llava train examples/tiny.yaml`: see docs/tiny.md for where they come from.

    prepare_photographs.py OUTPUT FOLDER...    the FOLDERs are unpacked packages of wallpapers

OUTPUT/photographs is what is trained on, OUTPUT/test/photographs what isn't.
"""

import argparse
from pathlib import Path

from PIL import Image


SIDE = 1600  # pixels, of the longer side
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Transparent ones, ones of a single color, and the same ones again.
LEFT_OUT = {
    "Arc-Colors-Transparent-Wallpaper", "Elephants_3840x2160", "Elephants_5640x3172", "Float-into-MATE",
    "GreenTraditional", "Gulp", "MATE-Stripes-Dark", "MATE-Stripes-Light", "Silk", "Spring", "Waves", "symbolic-d",
    "symbolic-l", "vnc-d", "vnc-l",
}  # fmt: skip
TEST = {
    "Bridge_by_Sander_Klootwijk", "ColorfulCups", "EveningGlow", "Storm", "Wine_by_Jakkub_Mede",
    "friends_by_Aitzol_Berasategi", "life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi",
}  # fmt: skip


def wallpapers(folders: list[Path]) -> dict[str, Path]:
    """The largest version of each wallpaper by its name. Plasma's are in NAME/contents/images/WIDTHxHEIGHT.jpg."""
    largest: dict[str, tuple[int, Path]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or path.stem == "screenshot":
                continue
            name = path.stem
            if path.parts[-3] == "contents":
                name = path.parts[-4] + ("-dark" if path.parts[-2] == "images_dark" else "")
            with Image.open(path) as image:
                pixels = image.width * image.height
            if name not in LEFT_OUT and pixels > largest.get(name, (0, path))[0]:
                largest[name] = pixels, path
    return {name: path for name, (_, path) in largest.items()}


def main(output: Path, folders: list[Path]):
    for name, path in wallpapers(folders).items():
        folder = output / ("test/photographs" if name in TEST else "photographs")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(folder / f"{name}.jpg", quality=92)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
