"""
Write a folder of cut-out objects for `mc-llava train examples/tiny.yaml`: see docs/tiny.md for where they come from.

    prepare_objects.py FOLDER SET...    a SET is an unpacked package of Fluent's webp files or of an Iconify set

Every rendering of an object is a file: tiger.png, tiger-2.png, ... Needs resvg-py and Pillow.
"""

import argparse
import io
import json
from pathlib import Path

import resvg_py  # pyright: ignore[reportMissingImports]
from PIL import Image


SIDE = 160  # pixels, of the longer side
# No two that are alike at 12 pixels (a moon and a banana, a lion and a tiger), no people, no flags.
OBJECTS = {
    "tiger": "🐯", "panda": "🐼", "frog": "🐸", "pig": "🐷", "koala": "🐨", "fox": "🦊", "rabbit": "🐰",
    "monkey": "🐵", "cow": "🐮", "chick": "🐤", "penguin": "🐧", "owl": "🦉", "elephant": "🐘",
    "giraffe": "🦒", "zebra": "🦓", "camel": "🐫", "flamingo": "🦩", "parrot": "🦜", "swan": "🦢",
    "turtle": "🐢", "snake": "🐍", "crocodile": "🐊", "whale": "🐳", "octopus": "🐙", "crab": "🦀",
    "fish": "🐠", "butterfly": "🦋", "snail": "🐌", "bee": "🐝", "ladybug": "🐞", "spider": "🕷", "dog": "🐶",
    "horse": "🐎", "apple": "🍎", "banana": "🍌", "grapes": "🍇", "watermelon": "🍉", "strawberry": "🍓",
    "pineapple": "🍍", "lemon": "🍋", "cherries": "🍒", "pear": "🍐", "avocado": "🥑", "carrot": "🥕",
    "corn": "🌽", "eggplant": "🍆", "mushroom": "🍄", "pizza": "🍕", "hamburger": "🍔", "hotdog": "🌭",
    "fries": "🍟", "donut": "🍩", "cookie": "🍪", "cake": "🎂", "icecream": "🍦", "pretzel": "🥨",
    "croissant": "🥐", "cheese": "🧀", "taco": "🌮", "umbrella": "☂", "balloon": "🎈", "gift": "🎁",
    "key": "🔑", "lock": "🔒", "bell": "🔔", "clock": "⏰", "camera": "📷", "telephone": "☎", "laptop": "💻",
    "book": "📕", "pencil": "✏", "scissors": "✂", "hammer": "🔨", "guitar": "🎸", "trumpet": "🎺",
    "drum": "🥁", "piano": "🎹", "microphone": "🎤", "crown": "👑", "hat": "🎩", "glasses": "👓", "shoe": "👟",
    "glove": "🧤", "shirt": "👕", "backpack": "🎒", "bulb": "💡", "candle": "🕯", "chair": "🪑",
    "toilet": "🚽", "door": "🚪", "anchor": "⚓", "rocket": "🚀", "airplane": "✈", "helicopter": "🚁",
    "bicycle": "🚲", "tractor": "🚜", "bus": "🚌", "train": "🚂", "truck": "🚚", "scooter": "🛴", "tent": "⛺",
    "castle": "🏰", "basketball": "🏀", "target": "🎯", "trophy": "🏆", "dice": "🎲", "puzzle": "🧩",
    "robot": "🤖", "ghost": "👻", "alien": "👽", "snowman": "⛄", "pumpkin": "🎃", "sun": "☀",
    "rainbow": "🌈", "cloud": "☁", "fire": "🔥", "snowflake": "❄", "cactus": "🌵", "palm": "🌴",
    "sunflower": "🌻", "magnet": "🧲", "globe": "🌍", "mailbox": "📫", "hourglass": "⌛", "microscope": "🔬",
    "ladder": "🪜", "broom": "🧹", "volcano": "🌋",
}  # fmt: skip


def webp(package: Path, codes: str) -> Image.Image | None:
    """Fluent's shaded rendering, assets/1f42f.webp."""
    files = [package / "assets" / f"{name}.webp" for name in (codes, f"{codes}-fe0f")]
    return next((Image.open(file) for file in files if file.exists()), None)


def svg(icons: dict, name: str) -> Image.Image | None:
    """A rendering of an Iconify set."""
    aliases = icons.get("aliases", {})
    names = (name, name.replace("-", ""), aliases.get(name, {}).get("parent"))
    name = next((name for name in names if name in icons["icons"]), None)
    if name is None:
        return None
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=2 * SIDE))))


def main(folder: Path, packages: list[Path]):
    folder.mkdir(parents=True, exist_ok=True)
    counts, called = dict.fromkeys(OBJECTS, 0), {}  # not every set says which character is called what
    for package in packages:
        before = sum(counts.values())
        if is_iconify := (package / "icons.json").exists():
            icons = json.loads((package / "icons.json").read_text())
            called = called | json.loads((package / "chars.json").read_text())
        for name, character in OBJECTS.items():
            codes = "-".join(f"{ord(part):04x}" for part in character)
            emoji = called.get(codes) or called.get(f"{codes}-fe0f", name)
            image = svg(icons, emoji) if is_iconify else webp(package, codes)
            if image is None:
                continue
            image = image.convert("RGBA")
            image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            counts[name] += 1
            number = "" if counts[name] == 1 else f"-{counts[name]}"
            image.save(folder / f"{name}{number}.png")
        print(f"{package}: {sum(counts.values()) - before} of {len(OBJECTS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("packages", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
