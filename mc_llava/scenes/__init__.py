"""
Drawn scenes: everything here exists only to make and to measure `tiny`, the small checkpoint that is bundled.

Scenes are street-like pictures with small signs, shapes and objects, with questions whose answers need the crops. A
`Scene` is a plain description; `draw_scene` alone turns it into pixels and `ask` alone into questions, so that
answers never depend on pixels. Everything follows from a seed. The two splits share nothing that a model could
memorize: their seeds, backgrounds and font families differ.

    scene.py            what scenes are made of, how they are laid out and drawn
    questions.py        questions, captions, and whether a reply is right
    tower.py            trains the vision tower on single crops
    language_model.py   builds `tiny` and trains all but the tower, on whole scenes
    study.py            measures how crops and tokens affect accuracy
    zoom_study.py       measures guided zoom against a grid

The first two need only Pillow and are exported here; import the others, which need torch, by their names.
"""

from .drawing import draw_scene
from .making import make_scene
from .materials import Materials
from .photographs import make_photograph_scene
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
]
