"""
Draw the scenes in `examples/`, from the split that `tiny` was not trained on, and write the questions about them.

    scripts/fetch_materials.sh data
    python scripts/make_examples.py data
"""

import argparse
import json
from pathlib import Path

from mc_llava import scenes
from mc_llava.scenes.scene import outline


FOLDER = Path(__file__).parent.parent / "examples"
# File -> the scene's number and the kinds of questions. The longer side of each is at least 1,500 pixels.
EXAMPLES = {"scene1.jpg": (1054, ("ocr", "attribute", "position")), "scene2.jpg": (1024, ("ocr", "attribute", "hard"))}
PHOTOGRAPHS = {"cup.jpg": (9, ("ocr", "object", "position", "existence", "absent"))}


def main(data: Path):
    asked = []
    # The test split's fonts, and objects and a photograph whose licenses allow it.
    materials = scenes.Materials((str(FOLDER / "coffee.jpg"),), str(data / "examples/objects"), str(data / "fonts"))
    for name, (seed, kinds) in {**PHOTOGRAPHS, **EXAMPLES}.items():
        for kind in kinds:
            if name in PHOTOGRAPHS:
                scene, question = scenes.photograph_question(seed, kind, materials)
            else:
                scene, question = scenes.make_scene(seed, "test"), scenes.benchmark_question(seed, kind)
            asked.append({"image": name, "kind": kind, "question": question.text, "key": question.key})
            if kind == "object":  # what make_figures.py enlarges
                (_, sign) = question.named[0]
                asked[-1]["box"] = outline(next(group for group in scene.groups if sign in group))
        scenes.draw_scene(scene).save(FOLDER / name, quality=92)
    (FOLDER / "questions.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that fetch_materials.sh fills")
    main(parser.parse_args().data)
