"""Which attention heads of a model look at what a question asks about: measured on pictures whose boxes are known."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from . import Box, MCLlavaForConditionalGeneration, MCLlavaProcessor, image_attention
from .evaluation.metrics import wilson_interval
from .journal import replacing
from .scenes import ask, draw_scene, make_scene
from .scenes.scene import contains


MAX_CROPS = 13  # a round of zoom then starts from 7 scouts
FIRST_SCENE = 1_000_000  # of the test split; training and the study see others
KINDS = ("ocr", "attribute", "hard")  # their questions name one thing


class Example(NamedTuple):
    """A picture, a question, and the box of the thing that the question names."""

    picture: Image.Image
    question: str
    box: Box


class Head(NamedTuple):
    """
    How often a head's most attended scout shows the whole thing that is asked about, out of `questions`.

    `low` and `high` bound the 95 % interval, widened for the number of heads that are compared; `chance` is the rate
    of a scout that is picked at random.
    """

    layer: int
    head: int
    rate: float
    low: float
    high: float
    chance: float
    questions: int


def scene_examples(number: int) -> Iterable[Example]:
    """Questions about drawn scenes that neither training nor the study sees."""
    for index in range(number):
        seed, kind = FIRST_SCENE + index, KINDS[index % len(KINDS)]
        scene = make_scene(seed, "test")
        question = ask(scene, kind, random.Random(f"{kind} {seed}"))
        yield Example(draw_scene(scene), question.text, question.named[0][1].box)


@torch.no_grad()
def measure_heads(
    model: MCLlavaForConditionalGeneration, processor: MCLlavaProcessor, examples: Iterable[Example]
) -> list[Head]:
    """
    Measure every head of the language model, best first.

    Raises:
        ValueError: if no example can be used: pictures without scouts, or things that no scout shows whole.
    """
    text = model.config.text_config
    heads = [(layer, head) for layer in range(text.num_hidden_layers) for head in range(text.num_attention_heads)]
    hits, chance, questions = torch.zeros(len(heads)), 0.0, 0
    for example in examples:
        inputs = processor(example.question, example.picture, zoom=1, max_crops=MAX_CROPS).to(model.device)
        shows = torch.tensor([contains(box, example.box) for box in inputs["crop_boxes"].tolist()[1:]])
        if not shows.any():
            continue
        images = {name: inputs[name] for name in processor.image_processor.model_input_names}
        features = model.get_image_features(**images, return_dict=True).pooler_output
        prompt = inputs["input_ids"], inputs["attention_mask"]
        attention = image_attention(model.model, *prompt, features, heads).cpu()
        per_crop = torch.stack(
            [part.sum(-1) for part in attention.split(inputs["crop_num_tokens"].tolist(), dim=1)], dim=1
        )
        hits += shows[per_crop[:, 1:].argmax(1)]
        chance += float(shows.float().mean())
        questions += 1
    if not questions:
        raise ValueError("no picture could be used: pass larger ones, whose things are small")
    z = NormalDist().inv_cdf(1 - 0.025 / len(heads))
    found = []
    for (layer, head), count in zip(heads, hits.tolist()):
        low, high = wilson_interval(count, questions, z)
        found.append(Head(layer, head, count / questions, low, high, chance / questions, questions))
    return sorted(found, key=lambda entry: (-entry.rate, entry.layer, entry.head))


def choose_heads(measured: list[Head], most: int) -> list[Head]:
    """The best heads, at most `most`, without any that could be as good by chance."""
    return [head for head in measured if head.low > head.chance][:most]


def find_config(folder: Path) -> Path:
    """
    A model folder's `config.json`.

    Raises:
        ValueError: if there is no such file: the folder may be a Hub id.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass a local model folder")
    return path


def write_heads(path: Path, chosen: list[Head]):
    """Write heads into the `config.json` that `find_config` found."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rounded = [{name: round(value, 3) for name, value in head._asdict().items()} for head in chosen]
    with replacing(path) as file:
        file.write((json.dumps({**config, "zoom_heads": rounded or None}, indent=2) + "\n").encode())


def head_table(measured: list[Head], chosen: list[Head]) -> str:
    """The measured heads as a table, the chosen ones marked."""
    lines = ["layer  head   rate   interval       chance"]
    for head in measured:
        mark, interval = " *" if head in chosen else "", f"{head.low:.3f}-{head.high:.3f}"
        lines.append(f"{head.layer:5}  {head.head:4}  {head.rate:.3f}   {interval}   {head.chance:.3f}{mark}")
    return "\n".join(lines)


def measure(model: MCLlavaForConditionalGeneration, processor: MCLlavaProcessor, number: int) -> list[Head]:
    """`measure_heads` on drawn scenes, with a progress bar."""
    return measure_heads(model, processor, tqdm(scene_examples(number), total=number, desc="Scenes"))
