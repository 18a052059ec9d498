"""
Scenes, drawn or on photographs: everything here exists only to make and to measure `tiny`, the small checkpoint that
is bundled.

Scenes are street-like pictures with small signs, shapes and objects, with questions whose answers need the crops. A
`Scene` is a plain description; `draw_scene` alone turns it into pixels and `ask` alone into questions, so that
answers never depend on pixels. Everything follows from a seed. The two splits share nothing that a model could
memorize: their seeds, backgrounds and font families differ.

    scene.py            what scenes are made of
    making.py           lays drawn scenes out, with fonts.py
    photographs.py      lays scenes on photographs out, with what materials.py finds in folders
    drawing.py          turns scenes into pixels, with backgrounds.py and camera.py
    questions.py        questions, captions, and whether a reply is right
    warm_start.py       begins with a checkpoint's weights
    tower.py            trains the vision tower on single crops
    encoding.py         whole scenes behind the tower, under budgets of all kinds
    conversations.py    what is asked and said about them, and where to look
    trainee.py          the language model while it learns, and its auxiliary losses
    language_model.py   builds `tiny` and trains all but the tower
    study.py            measures how crops, tokens and zoom affect accuracy, on drawn scenes and on photographs
    zoom_study.py       measures guided zoom against a grid, for smaller signs and large things

What makes scenes and questions needs only Pillow and NumPy and is exported here; import the others, which need
torch, by their names.
"""

from .drawing import draw_scene
from .making import make_scene
from .materials import Materials, materials_of_test
from .photographs import make_photograph_scene, photograph_question
from .questions import (
    KINDS,
    KINDS_ON_PHOTOGRAPHS,
    SceneQuestion,
    ask,
    benchmark_question,
    benchmark_scene,
    caption,
    is_correct,
)
from .scene import CROPS, SIDE, SIZES, SPLITS, Scene, Thing


__all__ = [
    "CROPS",
    "KINDS",
    "KINDS_ON_PHOTOGRAPHS",
    "SIDE",
    "Materials",
    "SIZES",
    "SPLITS",
    "Scene",
    "SceneQuestion",
    "Thing",
    "ask",
    "benchmark_question",
    "benchmark_scene",
    "caption",
    "draw_scene",
    "is_correct",
    "make_photograph_scene",
    "make_scene",
    "materials_of_test",
    "photograph_question",
]
