"""
Draw the scenes in `examples/`, from the split that `tiny` was not trained on, and write the questions about them.

    python scripts/make_examples.py
"""

import json
from pathlib import Path

from mc_llava import scenes


FOLDER = Path(__file__).parent.parent / "examples"
# File -> the scene's number and the kinds of questions. The longer side of each is at least 1,500 pixels.
EXAMPLES = {"scene1.jpg": (1054, ("ocr", "attribute", "position")), "scene2.jpg": (1024, ("ocr", "attribute", "hard"))}


def main():
    asked = []
    for name, (seed, kinds) in EXAMPLES.items():
        scenes.draw_scene(scenes.make_scene(seed, "test")).save(FOLDER / name, quality=92)
        for kind in kinds:
            question = scenes.benchmark_question(seed, kind)
            asked.append({"image": name, "kind": kind, "question": question.text, "key": question.key})
    (FOLDER / "questions.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
