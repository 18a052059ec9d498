"""Questions about scenes, captions of them, and whether a reply is right: from descriptions, never from pixels."""

import random
import re
from dataclasses import dataclass

from .making import make_scene
from .scene import (
    CHARACTERS,
    COLORS,
    DENIALS,
    DIRECTIONS,
    FILLERS,
    LARGE,
    OBJECTS,
    SHAPES,
    Scene,
    Thing,
    area,
    outline,
)


KINDS = ("ocr", "attribute", "position", "hard")  # of every scene
KINDS_ON_PHOTOGRAPHS = (*KINDS, "object", "existence", "absent")
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


# Of training and of photographs, in addition: benchmarks on drawn scenes keep their wording.
MORE_COLOR_QUESTIONS = ("What is the color of the {0}?", "The {0} has which color?")
MORE_READ_QUESTIONS = (
    "What text is on the {0} sign?",
    "Can you read the {0} sign?",
    "Please read the text of the {0} sign.",
    "The {0} sign says what?",
)
MORE_NEXT_READ_QUESTIONS = ("What text is on the sign beside the {0}?", "Read the text next to the {0}.")
MORE_NEXT_NAME_QUESTIONS = ("Which thing is next to the {0} sign?", "What lies beside the {0} sign?")
MORE_SIDE_QUESTIONS = ("Is the {0} to be found {2} or {3} the {1}?", "Tell me whether the {0} is {2} or {3} the {1}.")
EXISTENCE_QUESTIONS = (
    "{1} there {0}?",
    "{1} there {0} in the picture?",
    "Can you see {0}?",
    "Do you see {0} in the picture?",
    "Does the picture show {0}?",
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


def ask(scene: Scene, kind: str, rng: random.Random, objects: tuple[str, ...] | None = None) -> SceneQuestion:
    """
    A question about a scene, with its answer.

    Args:
        kind: one of `KINDS`: the text of a sign; the color of a thing; where a thing lies as seen from another;
            something about the neighbor of a thing. Or "large", of a scene that has a large thing: what it is. Or, if
            there are `objects`, "object": what is next to a sign; "existence": whether there is a thing; "absent": one
            of the other questions about a thing that is not there.
        objects: the names of the cut-out objects that the scene could have had, for varied wording and for questions
            about absent things; None for a benchmark's questions.

    Raises:
        ValueError: if `kind` is unknown, or the scene has nothing to ask so about, see `can_ask`.
    """
    asking = {"ocr": _ask_text, "attribute": _ask_color, "position": _ask_position, "hard": _ask_neighbor}
    asking["large"] = _ask_largest
    if kind in asking:
        return asking[kind](scene, rng, varied=objects is not None)
    about_objects = {"object": _ask_object, "existence": _ask_existence, "absent": _ask_absent}
    if kind not in about_objects or objects is None:
        raise ValueError(f"kind must be one of {', '.join((*asking, *about_objects))}, got {kind!r}")
    return about_objects[kind](scene, rng, objects)


def can_ask(scene: Scene, kind: str) -> bool:
    """Whether a scene, which may lack some of what drawn scenes have, has what a kind of question is about."""
    needed = {
        "ocr": lambda: any(thing.text for thing in scene.things),
        "attribute": lambda: any(thing.color for thing in scene.things),
        "position": lambda: _far_apart(scene),
        "hard": lambda: _pairs(scene),
        "object": lambda: _pairs(scene),
        "large": lambda: _largest(scene) is not None,
    }
    return kind not in needed or bool(needed[kind]())


def _say(rng: random.Random, usual: tuple[str, ...], more: tuple[str, ...], varied: bool, *names: str) -> str:
    return rng.choice(usual + more if varied else usual).format(*names)


def is_plural(name: str) -> bool:
    return name.endswith("s") and not name.endswith(("ss", "us", "is"))


def with_article(name: str) -> str:
    """
    >>> with_article("orange sign"), with_article("grapes"), with_article("hourglass")
    ('an orange sign', 'grapes', 'an hourglass')
    """
    if is_plural(name):
        return name
    return (
        f"an {name}" if name[0] in "aeiou" and not name.startswith("uni") or name.startswith("hour") else f"a {name}"
    )


def _it_is(name: str) -> str:
    return f"{'They are' if is_plural(name) else 'It is'} {with_article(name)}."


def benchmark_scene(seed: int, kind: str, size: int = 35) -> Scene:
    """The scene of the test split that `benchmark_question` asks about."""
    return make_scene(seed, "test", size, large=kind == "large")


def benchmark_question(seed: int, kind: str, size: int = 35) -> SceneQuestion:
    """The one question of a kind about a scene of the test split that every measurement asks."""
    return ask(benchmark_scene(seed, kind, size), kind, random.Random(f"{kind} {seed}"))


def _largest(scene: Scene) -> Thing | None:
    """The thing whose box fills about a quarter of the picture or more."""
    thing = max(scene.things, key=lambda thing: area(thing.box))
    return thing if area(thing.box) >= 0.9 * LARGE[0] * scene.width * scene.height else None


def _ask_largest(scene: Scene, rng: random.Random, varied: bool) -> SceneQuestion:
    thing = _largest(scene)
    if thing is None:
        raise ValueError("no thing of the scene is large: make it with large=True")
    text = rng.choice(LARGEST_QUESTIONS)
    return SceneQuestion("large", text, _it_is(thing.called), thing.called, (("largest thing", thing),))


def _ask_text(scene: Scene, rng: random.Random, varied: bool) -> SceneQuestion:
    sign = rng.choice([thing for thing in scene.things if thing.text])
    text = _say(rng, READ_QUESTIONS, MORE_READ_QUESTIONS, varied, sign.color)
    return SceneQuestion("ocr", text, f"It says {sign.text}.", sign.text, ((sign.called, sign),))


def _ask_color(scene: Scene, rng: random.Random, varied: bool) -> SceneQuestion:
    signs = [thing for thing in scene.things if thing.text]
    shapes = [thing for thing in scene.things if thing.color and not thing.text]
    if (rng.random() < 0.25 and signs) or not shapes:
        thing = rng.choice(signs)
        name = f"sign {thing.text}"
    else:
        thing = rng.choice(shapes)
        name = thing.name
    text = _say(rng, COLOR_QUESTIONS, MORE_COLOR_QUESTIONS, varied, name)
    return SceneQuestion("attribute", text, f"It is {thing.color}.", thing.color, ((name, thing),))


def _pairs(scene: Scene) -> list[tuple[Thing, Thing]]:
    """Signs and their neighbors."""
    pairs = [tuple(sorted(group, key=lambda thing: not thing.text)) for group in scene.groups if len(group) == 2]
    return [(sign, neighbor) for sign, neighbor in pairs if sign.text]


def _ask_neighbor(scene: Scene, rng: random.Random, varied: bool) -> SceneQuestion:
    sign, shape = rng.choice(_pairs(scene))
    wanted = rng.random()
    if wanted < 0.6:
        text = _say(rng, NEXT_READ_QUESTIONS, MORE_NEXT_READ_QUESTIONS, varied, shape.called)
        return SceneQuestion("hard", text, f"It says {sign.text}.", sign.text, ((shape.called, shape),))
    if wanted < 0.8:
        text = rng.choice(NEXT_COLOR_QUESTIONS).format(shape.name)
        return SceneQuestion("hard", text, f"It is {sign.color}.", sign.color, ((shape.name, shape),))
    return _ask_what_is_next(sign, shape, rng, "hard", varied)


def _ask_what_is_next(sign: Thing, thing: Thing, rng: random.Random, kind: str, varied: bool) -> SceneQuestion:
    text = _say(rng, NEXT_NAME_QUESTIONS, MORE_NEXT_NAME_QUESTIONS, varied, sign.color)
    return SceneQuestion(kind, text, _it_is(thing.called), thing.called, ((sign.called, sign),))


def _ask_object(scene: Scene, rng: random.Random, objects: tuple[str, ...]) -> SceneQuestion:
    """What is next to a sign: a cut-out object if any is."""
    pairs = _pairs(scene)
    sign, thing = rng.choice([pair for pair in pairs if pair[1].picture is not None] or pairs)
    return _ask_what_is_next(sign, thing, rng, "object", varied=True)


def _ask_existence(scene: Scene, rng: random.Random, objects: tuple[str, ...]) -> SceneQuestion:
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        name = thing.called if thing.text else rng.choice((thing.called, thing.name))
        named, key = ((name, thing),), "yes"
    else:
        absent = _absent(scene, rng, objects)
        name, named, key = rng.choice(list(absent.values())), (), "no"
    text = rng.choice(EXISTENCE_QUESTIONS).format(with_article(name), "Are" if is_plural(name) else "Is")
    return SceneQuestion("existence", text, f"{key.capitalize()}.", key, named)


def _absent(scene: Scene, rng: random.Random, objects: tuple[str, ...]) -> dict[str, str]:
    """Names of things that could have been in the scene and aren't: a sign, a shape, a shape's color, an object."""
    called = {thing.called for thing in scene.things} | {thing.name for thing in scene.things}
    colors, names = list(COLORS), [name for name in SHAPES + OBJECTS if name not in called]
    found = {"sign": [f"{color} sign" for color in colors], "shape": names}
    found["colored shape"] = [f"{rng.choice(colors)} {name}" for name in SHAPES + OBJECTS]
    found["object"] = list(objects)
    free = {sort: [name for name in names if name not in called] for sort, names in found.items()}
    return {sort: rng.choice(names) for sort, names in free.items() if names}


def _ask_absent(scene: Scene, rng: random.Random, objects: tuple[str, ...]) -> SceneQuestion:
    absent = _absent(scene, rng, objects)
    sort = rng.choice(("sign", "sign", *(sort for sort in absent if sort != "sign")))
    name = absent[sort]
    if sort == "sign":
        color = name.split()[0]
        asked = rng.choice((READ_QUESTIONS, MORE_READ_QUESTIONS, NEXT_NAME_QUESTIONS))
        text = rng.choice(asked).format(color)
    elif sort == "shape":
        text = rng.choice(rng.choice((COLOR_QUESTIONS + MORE_COLOR_QUESTIONS, NEXT_COLOR_QUESTIONS))).format(name)
    else:
        text = rng.choice(NEXT_READ_QUESTIONS + MORE_NEXT_READ_QUESTIONS).format(name)
    answer = f"There {'are' if is_plural(name) else 'is'} no {name}."
    return SceneQuestion("absent", text, answer, f"no {name}")


def _far_apart(scene: Scene) -> list[tuple[Thing, Thing, int, float]]:
    """Pairs of things, the axis (0 is left to right), and how far the first lies behind the other on it."""
    return [
        (thing, other, axis, distance)
        for thing in scene.things
        for other in scene.things
        for axis, size in enumerate((scene.width, scene.height))
        if abs(distance := (thing.center[axis] - other.center[axis]) / size) >= MIN_DISTANCE
    ]


def _ask_position(scene: Scene, rng: random.Random, varied: bool) -> SceneQuestion:
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
    text = _say(rng, SIDE_QUESTIONS, MORE_SIDE_QUESTIONS, varied, *names, *phrases)
    return SceneQuestion("position", text, answer, key, tuple(zip(names, (thing, other))))


def caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A request and a caption that names all things, groups from left to right."""
    parts = []
    for group in sorted(scene.groups, key=lambda group: outline(group)[0]):
        named = [with_article(t.called) + (f" that says {t.text}" if t.text else "") for t in group]
        parts.append(" next to ".join(named))
    request = rng.choice(("Describe the picture.", "What is in the picture?", "List what you see."))
    text = ", ".join(parts)
    return request, f"{text[0].upper()}{text[1:]}."


def is_correct(key: str, reply: str) -> bool:
    """
    Whether a reply holds a question's key and no other of its sort: a reply that lists all colors is wrong.

    Of a sign's sort are all words in capitals or with a digit except "A" and "I"; of a color's all colors, so that the
    reply may name the thing; of a thing's ("green star") colors and names; of an object's ("tiger") all words but
    fillers. "no white sign" is right where the reply says so and names nothing else. What a reply denies is wrong.

    >>> is_correct("K7", "It says K7."), is_correct("no red sign", "There is no red sign.")
    (True, True)
    """
    words, expected = re.findall(r"\w+", reply), key.split()
    lower = list(map(str.lower, words))
    signs = [word for word in words if (word.isupper() or re.search(r"\d", word)) and word not in ("A", "I")]
    if key in ("yes", "no"):
        return {word for word in lower if word in ("yes", "no")} == {key}
    if expected[0] == "no":
        said = [word for word in lower if word not in FILLERS]
        return said == expected or said == ["no", *expected]
    if DENIALS & set(lower):
        return False
    if set(key) <= set(CHARACTERS):
        return signs == expected
    sorts = (COLORS, sum(DIRECTIONS, ()), (*COLORS, *SHAPES, *OBJECTS), (*COLORS, *SHAPES, *OBJECTS, "sign"))
    sort = next((sort for sort in sorts if set(expected) <= set(sort)), None)
    return [word for word in lower if (word in sort if sort else word not in FILLERS)] == expected
