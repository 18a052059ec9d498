"""Questions about scenes, captions of them, and whether a reply is right: from descriptions, never from pixels."""

import random
import re
from dataclasses import dataclass

from .scene import CHARACTERS, COLORS, LARGE, OBJECTS, SHAPES, Scene, Thing, area, make_scene, outline


KINDS = ("ocr", "attribute", "position", "hard")  # of every scene
DIRECTIONS = (("left", "right"), ("above", "below"))  # along x and along y
MIN_DISTANCE = 0.15  # at least, of things compared by position, as a share of the picture

COLOR_QUESTIONS = ("What color is the {0}?", "Which color does the {0} have?", "Tell me the color of the {0}.")
READ_QUESTIONS = (
    "What does the {0} sign say?",
    "What is written on the {0} sign?",
    "Read the {0} sign.",
    "Which characters are on the {0} sign?",
)
NEXT_READ_QUESTIONS = (
    "What is written on the sign next to the {0}?",
    "What does the sign next to the {0} say?",
    "Read the sign beside the {0}.",
)
NEXT_COLOR_QUESTIONS = ("What color is the sign next to the {0}?", "Which color does the sign beside the {0} have?")
NEXT_NAME_QUESTIONS = ("What is next to the {0} sign?", "What can be seen beside the {0} sign?")
LARGEST_QUESTIONS = (
    "What is the largest thing?",
    "What is the largest thing in the picture?",
    "Name the largest thing.",
)
SIDE_QUESTIONS = (
    "Is the {0} {2} or {3} the {1}?",
    "Where is the {0}, {2} or {3} the {1}?",
    "Does the {0} lie {2} or {3} the {1}?",
)


@dataclass(frozen=True)
class SceneQuestion:
    """
    `key` is what a right reply must hold: the sign's text, a color, a direction or a name. `named` are the things that
    the text names, each with the words that name it.
    """

    kind: str
    text: str
    answer: str
    key: str
    named: tuple[tuple[str, Thing], ...] = ()


def ask(scene: Scene, kind: str, rng: random.Random) -> SceneQuestion:
    """
    A question about a scene, with its answer.

    Args:
        kind: one of `KINDS`: the text of a sign; the color of a thing; where a thing lies as seen from another;
            something about the neighbor of a thing. Or "large", for a scene with a large thing: what it is.

    Raises:
        ValueError: if `kind` is unknown, or asks for a large thing and there is none.
    """
    asking = {
        "ocr": _ask_text,
        "attribute": _ask_color,
        "position": _ask_position,
        "hard": _ask_neighbor,
        "large": _ask_largest,
    }
    if kind not in asking:
        raise ValueError(f"kind must be one of {', '.join(asking)}, got {kind!r}")
    return asking[kind](scene, rng)


def benchmark_scene(seed: int, kind: str, size: int = 35) -> Scene:
    """The scene of the test split that `benchmark_question` asks about."""
    return make_scene(seed, "test", size, large=kind == "large")


def benchmark_question(seed: int, kind: str, size: int = 35) -> SceneQuestion:
    """The one question of a kind about a scene of the test split that every measurement asks."""
    return ask(benchmark_scene(seed, kind, size), kind, random.Random(f"{kind} {seed}"))


def _ask_largest(scene: Scene, rng: random.Random) -> SceneQuestion:
    thing = max(scene.things, key=lambda thing: area(thing.box))
    if area(thing.box) < 0.9 * LARGE[0] * scene.width * scene.height:
        raise ValueError("no thing of the scene is large: make it with large=True")
    article = "an" if thing.color == "orange" else "a"
    answer = f"It is {article} {thing.called}."
    return SceneQuestion("large", rng.choice(LARGEST_QUESTIONS), answer, thing.called, (("largest thing", thing),))


def _ask_text(scene: Scene, rng: random.Random) -> SceneQuestion:
    sign = rng.choice([thing for thing in scene.things if thing.text])
    text = rng.choice(READ_QUESTIONS).format(sign.color)
    return SceneQuestion("ocr", text, f"It says {sign.text}.", sign.text, ((sign.called, sign),))


def _ask_color(scene: Scene, rng: random.Random) -> SceneQuestion:
    signs = [thing for thing in scene.things if thing.text]
    shapes = [thing for thing in scene.things if not thing.text]
    if (rng.random() < 0.25 and signs) or not shapes:
        thing = rng.choice(signs)
        name = f"sign {thing.text}"
    else:
        thing = rng.choice(shapes)
        name = thing.name
    text = rng.choice(COLOR_QUESTIONS).format(name)
    return SceneQuestion("attribute", text, f"It is {thing.color}.", thing.color, ((name, thing),))


def _ask_neighbor(scene: Scene, rng: random.Random) -> SceneQuestion:
    pairs = [sorted(group, key=lambda thing: not thing.text) for group in scene.groups if len(group) == 2]
    sign, shape = rng.choice(pairs)
    wanted = rng.random()
    if wanted < 0.6:
        text = rng.choice(NEXT_READ_QUESTIONS).format(shape.called)
        return SceneQuestion("hard", text, f"It says {sign.text}.", sign.text, ((shape.called, shape),))
    if wanted < 0.8:
        text = rng.choice(NEXT_COLOR_QUESTIONS).format(shape.name)
        return SceneQuestion("hard", text, f"It is {sign.color}.", sign.color, ((shape.name, shape),))
    text = rng.choice(NEXT_NAME_QUESTIONS).format(sign.color)
    article = "an" if shape.color == "orange" else "a"
    return SceneQuestion("hard", text, f"It is {article} {shape.called}.", shape.called, ((sign.called, sign),))


def _far_apart(scene: Scene) -> list[tuple[Thing, Thing, int, float]]:
    """Pairs of things, the axis (0 is left to right), and how far the first lies behind the other on it."""
    return [
        (thing, other, axis, distance)
        for thing in scene.things
        for other in scene.things
        for axis, size in enumerate((scene.width, scene.height))
        if abs(distance := (thing.center[axis] - other.center[axis]) / size) >= MIN_DISTANCE
    ]


def _ask_position(scene: Scene, rng: random.Random) -> SceneQuestion:
    def called(thing):
        if not thing.text:
            return rng.choice((thing.called, thing.name))
        return rng.choice((thing.called, thing.called, f"sign {thing.text}"))

    thing, other, axis, distance = rng.choice(_far_apart(scene))
    key = DIRECTIONS[axis][distance > 0]
    phrases = ["left of", "right of"] if axis == 0 else list(DIRECTIONS[axis])
    answer = f"It is {phrases[distance > 0]} the {other.name}."
    rng.shuffle(phrases)
    phrases[0] = phrases[0].removesuffix(" of")
    names = called(thing), called(other)
    text = rng.choice(SIDE_QUESTIONS).format(*names, *phrases)
    return SceneQuestion("position", text, answer, key, tuple(zip(names, (thing, other))))


def caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A request and a caption that names all things, groups from left to right."""
    parts = []
    for group in sorted(scene.groups, key=lambda group: outline(group)[0]):
        named = [f"a {t.called} that says {t.text}" if t.text else f"a {t.called}" for t in group]
        parts.append(" next to ".join(named))
    request = rng.choice(("Describe the picture.", "What is in the picture?", "List what you see."))
    text = ", ".join(parts).replace("a orange", "an orange")
    return request, f"{text[0].upper()}{text[1:]}."


def is_correct(key: str, reply: str) -> bool:
    """
    Whether a reply holds a question's key and no other of its sort: a reply that lists all colors is wrong.

    Of a sign's sort are all words in capitals or with a digit except "A" and "I"; of a color's all colors, so that the
    reply may name the thing; of a thing's ("green star") colors and names.

    >>> is_correct("K7", "It says K7.")
    True
    """
    words, expected = re.findall(r"\w+", reply), key.split()
    if set(key) <= set(CHARACTERS):
        signs = [word for word in words if word.isupper() or re.search(r"\d", word)]
        return [word for word in signs if word not in ("A", "I")] == expected
    sorts = (COLORS, sum(DIRECTIONS, ()), (*COLORS, *SHAPES, *OBJECTS))
    sort = next(sort for sort in sorts if set(expected) <= set(sort))
    return [word for word in map(str.lower, words) if word in sort] == expected
