"""
Conversations about encoded scenes: what the language model of `tiny` learns to say, and where it learns to look.
"""

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

from .encoding import MOST_TOKENS, PATCH_SIZE, READABLE, CachedImage, glyph_height, image_fields, last_tokens
from .questions import SceneQuestion, ask, can_ask, caption
from .scene import SIDE, Thing
from .tower import Stage, label_crop


# How often the kinds of question are tried, reading most of all: it comes last, and not all crops allow it. The last
# kind is only about scenes that have a large thing.
KIND_WEIGHTS = {
    "ocr": 3.5,
    "attribute": 0.6,
    "position": 0.8,
    "hard": 2.2,
    "object": 1.2,
    "existence": 1.2,
    "absent": 1.2,
    "large": 4.0,
}
MANY_CROPS = 8  # at least, of the scenes of the short steps
# How many heads of a layer, the first ones, learn where to look: from a thing's name, and from each word about it.
# Four heads of 32 numbers can pass on all 128 of a crop's token: with two, answers lost characters and their order.
NAMING_LAYER, ANSWERING_LAYER = 1, 2
LOOKING_HEADS = {NAMING_LAYER: 2, ANSWERING_LAYER: 4}
# The targets of a crop that its token must tell the answering layer.
READ = ("sign_texts", "sign_neighbors", "shape_colors", "objects")
TELLABLE = 5.5  # pixels of the tower from which a text or a name can be told: it reads three in five of 5.5 to 6.5
UNTOLD = 0.1  # share of questions that may be about what no crop shows well enough
VISUAL_TOKENS = 8192  # at most, of a batch: with many tokens an image it has fewer images, or a step takes a minute
ALIKE_BATCHES = 16  # of as many batches, those of similar length go together


def scene_rows(images: list[CachedImage], stage: Stage, short_steps: int) -> Dataset:
    """
    The input of `SceneCollator`, in training's order: each part repeats all images that suit it, reshuffled each
    time, and each row has its own seed. A longer run begins like a shorter one. In the second part the images of a
    batch have about as many tokens: a step takes as long as its longest conversation.
    """
    everything = range(len(images))
    many = [index for index in everything if len(images[index].coords) > MANY_CROPS] or everything
    short_steps = min(short_steps, stage.steps)
    rows = []
    for short, pool, steps in ((True, many, short_steps), (False, everything, stage.steps - short_steps)):
        rng, part = random.Random(f"{stage.seed} {short}"), []
        while len(part) < steps * stage.batch_size:
            chosen = rng.sample(pool, len(pool))
            if not short:
                chosen = batches_alike(chosen, [int(images[index].num_tokens.sum()) for index in chosen], stage, rng)
            part += [{"image": index, "short": short, "seed": rng.getrandbits(62)} for index in chosen]
        rows += part[: steps * stage.batch_size]
    return Dataset.from_list(rows)


def batches_alike(chosen: list[int], lengths: list[int], stage: Stage, rng: random.Random) -> list[int]:
    """The same in another order: most batches have images of similar length, and batches of all lengths alternate."""
    order = []
    span = ALIKE_BATCHES * stage.batch_size
    for start in range(0, len(chosen), span):
        part = sorted(range(start, min(start + span, len(chosen))), key=lambda place: lengths[place])
        batches = [part[i : i + stage.batch_size] for i in range(0, len(part), stage.batch_size)]
        rng.shuffle(batches)
        order += sum(batches, [])
    return [chosen[place] for place in order]


class Look(NamedTuple):
    """The positions that the language model should attend to from one position of a conversation."""

    layer: int
    position: int
    targets: list[int]  # positions
    place: tuple[float, float]  # of the thing there, (x / width, y / height)


class SceneCollator:
    """
    Fresh conversations about cached images: some questions of all kinds, or a caption, with the loss on the answers.
    They depend on the rows alone: a resumed run draws the same as an uninterrupted one.

    Each conversation also has the targets of `looking_loss` and `reading_loss`. Four heads look from the prompt's last
    token as well, where zoom asks: at the crops of everything that the question names. Crops that show the thing best
    count where none shows it legibly, as among zoom's scouts. Of an answer that the crops don't show, only the
    first token is learned: that there is such a thing, but not what can't be read.

    Short batches show the last token of each crop alone, where the tower has learned to gather it: a step takes half
    the time. Their positions are spread as if the image had any number of tokens, so that the heads learn to look as
    far as in long sequences. The other batches show the tokens of each image's own budget.

    Args:
        captions: share of the conversations that are a caption, in batches that are not short.
        turns: the most questions of one conversation.
        objects: the names of all cut-out objects, to ask for.
    """

    def __init__(
        self, processor, images: list[CachedImage], captions: float, turns: int, objects: tuple[str, ...] = ()
    ):
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.image_token_id
        self.images, self.captions, self.turns, self.objects = images, captions, turns, objects

    def questions(self, image: CachedImage, captions: float, turns: int, rng: random.Random) -> list[SceneQuestion]:
        scene = image.scene
        if rng.random() < captions:
            text, answer = caption(scene, rng)
            return [SceneQuestion("caption", text, answer, answer)]
        kinds = [kind for kind in KIND_WEIGHTS if can_ask(scene, kind)]
        weights, heights = [KIND_WEIGHTS[kind] for kind in kinds], best_heights(image)
        asked: list[SceneQuestion] = []
        while len(asked) < turns:
            question = ask(scene, *rng.choices(kinds, weights), rng, self.objects)
            if rng.random() < UNTOLD or can_tell(question, heights):
                asked.append(question)
        return asked

    def conversation(
        self, image: CachedImage, questions: list[SceneQuestion]
    ) -> tuple[list[int], list[int], list[Look]]:
        """Token ids, labels, and where to look."""
        seen, heights = last_tokens_showing(image), best_heights(image)
        ids, labels, looks = [], [], []
        for question in questions:
            picture, newline = ("", "\n") if ids else ("<image>" * int(image.num_tokens.sum()) + "\n", "")
            before = f"{newline}<|im_start|>user\n{picture}"
            asked = self.tokenizer(
                f"{before}{question.text}<|im_end|>\n<|im_start|>assistant\n", return_offsets_mapping=True
            )
            if picture:
                first = asked["input_ids"].index(self.image_token_id)
            replied = self.tokenizer.encode(f"{question.answer}<|im_end|>")
            answer_start = len(ids) + len(asked["input_ids"])
            everything = []
            for name, thing in question.named:
                targets = [first + token for token in seen[thing]]
                if not targets:
                    continue
                everything += targets
                place = thing.center[0] / image.scene.width, thing.center[1] / image.scene.height
                end = len(before) + re.search(rf"\b{name}\b", question.text).end()
                inside = [start < end <= stop for start, stop in asked["offset_mapping"]]
                looks.append(Look(NAMING_LAYER, len(ids) + inside.index(True), targets, place))
            if everything:
                # The position that predicts each token of the reply, except its end; about two things, the first.
                spoken = len(replied) - 1 if len(question.named) == 1 else 1
                positions = range(answer_start - 1, answer_start - 1 + spoken)
                looks += [Look(ANSWERING_LAYER, position, sorted(set(everything)), place) for position in positions]
            ids += asked["input_ids"] + replied
            told = can_tell(question, heights)
            # Where no crop tells, the first token still says that there is such a thing.
            known = len(replied) if told else 1
            labels += [-100] * len(asked["input_ids"]) + replied[:known] + [-100] * (len(replied) - known)
        return ids, labels, looks

    def readings(self, images: list[CachedImage], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns:
            rows, positions: int[crops], of the last token of each crop of each image.
            sign_texts and so on: int[crops, ...], what the crop shows, see `label_crop`.
        """
        firsts = (input_ids == self.image_token_id).int().argmax(-1)
        labels = [
            label_crop(image.scene, tuple(box), SIDE, PATCH_SIZE, self.objects)
            for image in images
            for box in image.boxes.tolist()
        ]
        return {
            "rows": torch.arange(len(images)).repeat_interleave(torch.tensor([len(image.boxes) for image in images])),
            "positions": torch.cat([first + image.last for first, image in zip(firsts, images)]),
            **{name: torch.tensor(np.stack([found[name] for found in labels])) for name in READ},
        }

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rng = random.Random(rows[0]["seed"])
        # The same in all rows, so that few positions are padding.
        short = rows[0]["short"]
        turns = rng.randint((self.turns + 1) // 2, self.turns)
        captions = 0.0 if short else self.captions
        images = [self.images[row["image"]] for row in rows]
        if short:
            images = [last_tokens(image) for image in images]
        longest = max(int(image.num_tokens.sum()) for image in images)
        images = images[: max(1, VISUAL_TOKENS // longest)]
        talks = [self.conversation(image, self.questions(image, captions, turns, rng)) for image in images]
        ids, labels, looks = zip(*talks)
        input_ids = _pad(ids, self.tokenizer.pad_token_id)
        spacing = draw_spacing(images, rng) if short else 1
        is_visual = input_ids == self.image_token_id
        return {
            "input_ids": input_ids,
            "position_ids": torch.arange(input_ids.shape[1]) + (spacing - 1) * is_visual.cumsum(-1),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0),
            "labels": _pad(labels, -100),
            **image_fields(images),
            "readings": self.readings(images, input_ids),
            "looks": stack_looks(looks, input_ids.shape[1]),
        }


def _pad(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """int64[rows, length], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def draw_spacing(images: list[CachedImage], rng: random.Random) -> int:
    """How far apart the positions of a short batch's visual tokens are: as if each crop had several."""
    most = max(len(image.coords) for image in images)
    return max(1, round(math.exp(rng.uniform(math.log(most), math.log(MOST_TOKENS))) / most))


def stack_looks(looks: Sequence[list[Look]], length: int) -> dict[str, torch.Tensor]:
    """
    The looks of all rows of a batch as tensors.

    Returns:
        layers, rows, positions: int64[looks].
        targets: bool[looks, length].
        places: float[looks, 2].
    """
    numbered = [(row, look) for row, found in enumerate(looks) for look in found]
    targets = torch.zeros(len(numbered), length, dtype=torch.bool)
    for index, (_, look) in enumerate(numbered):
        targets[index, look.targets] = True
    return {
        "layers": torch.tensor([look.layer for _, look in numbered], dtype=torch.long),
        "rows": torch.tensor([row for row, _ in numbered], dtype=torch.long),
        "positions": torch.tensor([look.position for _, look in numbered], dtype=torch.long),
        "targets": targets,
        "places": torch.tensor([look.place for _, look in numbered]).reshape(-1, 2),
    }


def best_heights(image: CachedImage) -> dict[Thing, float]:
    """How many pixels of the tower the smallest glyph of each thing's group has in the best crop; 0 if all cut it."""
    return {thing: max(heights) for group in image.scene.groups for thing, heights in _heights(image, group)}


def _heights(image: CachedImage, group: tuple[Thing, ...]) -> list[tuple[Thing, list[float]]]:
    heights = [glyph_height(group, crop) for crop in image.boxes.tolist()]
    return [(thing, heights) for thing in group]


def can_tell(question: SceneQuestion, heights: dict[Thing, float]) -> bool:
    """
    Whether a question can be answered from an image's crops: guesses of a color, a place, or whether something is
    there are learned, those of a text or a name are not.
    """
    if question.kind in ("caption", "attribute", "position", "large", "existence", "absent"):
        return True
    return all(heights[thing] >= TELLABLE for _, thing in question.named)


def last_tokens_showing(image: CachedImage) -> dict[Thing, list[int]]:
    """
    Thing -> the last token, of the image's, of each crop in which it and its neighbor can be told; where there is
    none, of those that show them best.
    """
    last = image.last.tolist()
    showing = {}
    for group in image.scene.groups:
        for thing, heights in _heights(image, group):
            enough = min(READABLE, 0.7 * max(heights)) if max(heights) > 0 else math.inf
            showing[thing] = [token for token, height in zip(last, heights) if height >= enough]
    return showing
