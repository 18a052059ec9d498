"""
The benchmarks' questions: where each data set is, what its columns are called, its prompts, and its scores.

A `Task` turns a data set in its usual format into `Question`s and knows nothing of the model that answers them. The
formats are those of lmms-eval's data sets on the Hub and of the V*-bench repository, and the same things as local
folders and parquet files.
"""

import glob
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from .. import scenes
from .metrics import find_letter, gqa_accuracy, textvqa_accuracy, vqav2_accuracy


# The instructions of LLaVA's evaluation, which follow the question. TextVQA is asked without OCR tokens here.
SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "\nAnswer with the option's letter from the given choices directly."

VSTAR_PARTS = ("direct_attributes", "relative_position", "OCR", "GPT4V-hard")
VSTAR_OVERALL = VSTAR_PARTS[:2]  # the benchmark's own 191 questions
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NUM_SCENES = 500
PHOTOGRAPH_KINDS = (*scenes.KINDS_ON_PHOTOGRAPHS, "large")


@dataclass(frozen=True)
class Choice:
    """The options of a multiple choice question, to be scored by their likelihood after `question` alone."""

    question: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Question:
    """
    Args:
        id: unique within the data set.
        prompt: what the model is asked, including the task's instruction; None if a row has no question, which
            then fails.
        image: whatever `load_image` reads.
        expected: the answer that `Task.score` compares a reply with.
        part: the row of the results that it counts in.
        choice: set for multiple choice.
    """

    id: str
    prompt: str | None
    image: Any
    expected: Any
    part: str
    choice: Choice | None = None


@dataclass(frozen=True)
class Task:
    """
    Args:
        data: a Hub id; empty for questions that are generated.
        read: from a source (a Hub id, folder or file) to the number of its questions, if it is known beforehand,
            and the questions.
        instruction: what follows the question in a prompt.
        metric: the name of the score, which is from 0 to 1.
        score: from a question and a reply.
        overall: the parts that make up the overall score; empty for all.
    """

    data: str
    read: Callable[[str], tuple[int | None, Iterable[Question]]]
    instruction: str
    metric: str
    score: Callable[[Question, str], float]
    overall: tuple[str, ...] = ()


# Data sets of rows


def load_rows(
    source: str, split: str, columns: tuple[str, ...], config: str | None = None
) -> tuple[int | None, Iterator[dict]]:
    """
    The rows of a data set, images as the files' bytes. A Hub id is streamed: preparing it would download all splits.

    Args:
        source: a parquet file; a folder of them as on the Hub (`data/validation-00000-of-00003.parquet`, in a folder
            of the configuration's name if it has one); a folder by `save_to_disk`; or a Hub id.
        columns: the columns that each row must have.

    Returns:
        The number of rows, None if unknown, and the rows.

    Raises:
        ValueError: if there is no such data set, it has no rows, or it lacks a file or a column.
    """
    try:
        import datasets
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError('reading data sets needs the package datasets: pip install "mc-llava[eval]"') from error
    path = Path(source)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)
            rows = rows[split] if isinstance(rows, dict) else rows
            count = len(rows)
        elif path.exists():
            sizes = {file: ParquetFile(file).metadata.num_rows for file in _find_parquet(path, split, config)}
            count, files = sum(sizes.values()), [file for file in sizes if sizes[file]]  # datasets reads no empty one
            if not count:
                raise ValueError(f"the data {source} hold no questions: pass others")
            rows = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=True)
        elif source.startswith((".", "/", "~")) or path.suffix == ".parquet":
            raise FileNotFoundError("no such file or folder")  # don't send a mistyped path to the Hub
        else:
            rows = datasets.load_dataset(source, config, split=split, streaming=True)
            count = rows.info.splits[split].num_examples if rows.info.splits else None
    except (OSError, KeyError, HFValidationError, ArrowException) as error:
        raise ValueError(f"cannot read the data set {source} ({error}): check the path, or the network") from error
    return count, _without_decoding(rows, source, columns)


def _find_parquet(path: Path, split: str, config: str | None) -> list[Path]:
    """The file, or those of a split in a folder as on the Hub."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.glob(f"**/{split}-*.parquet")) if config in (None, file.parent.name)]
    if not files:
        name = f"{config}/{split}" if config else f"data/{split}"
        raise ValueError(f"the folder {path} has no {name}-*.parquet: pass a copy of the Hub's data set")
    _check_shards(files)
    return files


def _check_shards(files: list[Path]):
    """Raise a ValueError if a file is missing, as after an interrupted download: scores would be those of a part."""
    found = {}
    for file in files:
        if match := re.match(r"(.*)-(\d{5})-of-(\d{5})", file.name):
            name, index, total = match.groups()
            found.setdefault((file.parent, name, total), set()).add(int(index))
    for (folder, name, total), indices in found.items():
        if missing := sorted({*range(int(total))} - indices):
            raise ValueError(
                f"{folder} lacks {name}-{missing[0]:05}-of-{total}.parquet: download it again, or pass a single file"
            )


def _without_decoding(rows, source: str, columns: tuple[str, ...]) -> Iterator[dict]:
    import datasets

    # One corrupt image is one failed question, not the end of the data set; and `load_image` has limits.
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    for row in rows:
        if missing := [name for name in columns if name not in row]:
            raise ValueError(
                f"the data set {source} has no column {missing[0]!r}, only {list(row)}: is it another data set?"
            )
        yield row


def image_bytes(cell: Any) -> bytes | None:
    """The file in an image column's cell. Paths and URLs in a data set are not followed: they read as no image."""
    content = cell.get("bytes") if isinstance(cell, dict) else None
    return content if isinstance(content, bytes) else None


def with_instruction(question: Any, instruction: str) -> str | None:
    return question + instruction if isinstance(question, str) else None


def _read_vqa(
    source: str,
    *,
    split: str,
    instruction: str,
    part: str | None = None,
) -> tuple[int | None, Iterator[Question]]:
    """TextVQA, VQAv2 and VizWiz: one image, and what ten people answered, as strings or as VQAv2's records."""
    columns = ("question_id", "question", "image", "answers", *([part] if part else []))
    count, rows = load_rows(source, split, columns)

    def questions():
        for row in rows:
            answers = row["answers"] or []
            if isinstance(answers, list):  # anything else fails when it is scored
                answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
            yield Question(
                id=str(row["question_id"]),
                prompt=with_instruction(row["question"], instruction),
                image=image_bytes(row["image"]),
                expected=answers,
                part=str(row[part]) if part else "all",
            )

    return count, questions()


def _read_gqa(source: str) -> tuple[int | None, Iterator[Question]]:
    """Questions and images are in two configurations; rows that contain their image are read too."""
    config = "testdev_balanced_{}"
    columns = ("id", "imageId", "question", "answer")
    count, rows = load_rows(source, "testdev", columns, config.format("instructions"))

    def questions():
        images = None
        for row in rows:
            if "image" not in row and images is None:
                if Path(source).is_file():
                    raise ValueError(f"{source} has no images: pass the folder with {config.format('images')} too")
                _, pictures = load_rows(source, "testdev", ("id", "image"), config.format("images"))
                images = {picture["id"]: image_bytes(picture["image"]) for picture in pictures}
            yield Question(
                id=str(row["id"]),
                prompt=with_instruction(row["question"], SHORT),
                image=image_bytes(row["image"]) if "image" in row else images.get(row["imageId"]),
                expected=row["answer"],
                part="all",
            )

    return count, questions()


# V*-bench


def _read_vstar(source: str) -> tuple[int | None, Iterable[Question]]:
    """The repository's folders, with an annotation next to each image, or rows in lmms-eval's format."""
    folder = Path(source)
    if source == TASKS["vstar"].data and not folder.exists():
        try:
            folder = Path(snapshot_download(source, repo_type="dataset"))
        except OSError as error:
            raise ValueError(f"cannot download {source}: pass --data vstar=FOLDER, a copy of it") from error
    if not any((folder / part).is_dir() for part in VSTAR_PARTS):
        columns = ("question_id", "image", "text", "category", "label")
        count, rows = load_rows(source, "test", columns)
        return count, map(_vstar_row, rows)

    published, questions = _read_published(folder / "test_questions.jsonl"), []
    for part in VSTAR_PARTS:
        for path in sorted((folder / part).glob("*.json")):
            neighbors = path.parent.glob(f"{glob.escape(path.stem)}.*")
            images = [file for file in neighbors if file.suffix.lower() in IMAGE_SUFFIXES]
            if len(images) != 1:
                raise ValueError(f"{path} has {len(images)} images next to it, expected 1: download V*-bench again")
            id = images[0].relative_to(folder).as_posix()
            with _naming(path):
                choice = _vstar_choice(json.loads(path.read_text(encoding="utf-8-sig")))
            text, label = published.get(id) or _ask_for_letter(choice, id)
            questions.append(Question(id, _with_letter_instruction(text), images[0], label, part, choice))
    if missing := sorted(published.keys() - {question.id for question in questions}):
        raise ValueError(
            f"{source} lacks {len(missing)} of the pictures in test_questions.jsonl, the first is {missing[0]}: "
            "download V*-bench again"
        )
    return len(questions), questions


def _read_published(path: Path) -> dict[str, tuple[str, str]]:
    """Image -> V*-bench's question with lettered options, and the right letter. Empty if there is no such file."""
    if not path.exists():
        return {}
    with _naming(path):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a string may hold U+2028
        entries = map(json.loads, filter(str.strip, lines))
        published = {entry["image"]: (entry["text"], entry["label"]) for entry in entries}
        if not all(map(is_text, chain(published, *published.values()))):
            raise ValueError("image, text and label must be strings")
    return published


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise a ValueError that names a file of V*-bench if its contents are damaged."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error!r}): download V*-bench again") from error


def _vstar_choice(annotation: dict) -> Choice:
    options = annotation["options"]
    if not isinstance(options, list) or not options or not all(map(is_text, [annotation["question"], *options])):
        raise ValueError("it must have a question and a list of options")
    return Choice(annotation["question"], tuple(options), right=0)  # the annotations put the right one first


def _ask_for_letter(choice: Choice, id: str) -> tuple[str, str]:
    """The question with its options, and the right letter: OCR and GPT4V-hard have no published order."""
    options = choice.options
    order = random.Random(id).sample(range(len(options)), len(options))  # depends on the image alone
    letters = [f"({chr(65 + place)}) {options[index]}" for place, index in enumerate(order)]
    return "\n".join([choice.question, *letters]), chr(65 + order.index(0))


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _vstar_row(row: dict) -> Question:
    text = row["text"] if is_text(row["text"]) else ""
    label = str(row["label"] or "").strip().upper()
    # Spaces at the end are removed here: a pattern would look for their end from each of them.
    options = re.findall(r"\(([A-Z])\)\s*((?:(?!\([A-Z]\)).)*)", text)
    options = {letter: option.rstrip() for letter, option in options}
    choice = None
    if label in options:
        choice = Choice(text.split("(A)")[0].strip(), tuple(options.values()), list(options).index(label))
    id, prompt = str(row["question_id"]), _with_letter_instruction(text)
    return Question(id, prompt, image_bytes(row["image"]), label, str(row["category"]), choice)


def _with_letter_instruction(text: str) -> str:
    return text if text.endswith(LETTER) else text + LETTER


def _score_letter(question: Question, reply: str) -> float:
    if question.choice is None:
        raise ValueError(f"the label {question.expected!r} is none of the options in {question.prompt!r:.200}")
    letters = "".join(chr(65 + index) for index in range(len(question.choice.options)))
    return float(find_letter(reply, letters) == question.expected)


# Scenes


def _read_scenes(source: str, size: int, kinds: tuple[str, ...]) -> tuple[int, Iterator[Question]]:
    """A question of each kind about each scene of the test split."""
    if source:
        raise ValueError(f"scenes are made, not read, got the data {source!r}: leave --data out for them")

    def questions():
        for seed in range(NUM_SCENES):
            image = scenes.draw_scene(scenes.benchmark_scene(seed, kinds[0], size))
            for kind in kinds:
                question = scenes.benchmark_question(seed, kind, size)
                yield Question(f"{kind}-{seed}", question.text, image, question.key, kind)

    return NUM_SCENES * len(kinds), questions()


def _read_photographs(source: str) -> tuple[int, Iterator[Question]]:
    """A question of each kind about each scene on a photograph, and about one with a large thing."""
    kinds = PHOTOGRAPH_KINDS
    materials = scenes.materials_of_test(source)
    materials.check()

    def questions():
        for seed in range(NUM_SCENES):
            drawn = None
            for kind in kinds:
                scene, question = scenes.photograph_question(seed, kind, materials)
                if scene != drawn:
                    drawn, image = scene, scenes.draw_scene(scene)
                yield Question(f"{kind}-{seed}", question.text, image, question.key, kind)

    return NUM_SCENES * len(kinds), questions()


def _scenes_task(size: int = 35, kinds: tuple[str, ...] = scenes.KINDS) -> Task:
    return Task("", partial(_read_scenes, size=size, kinds=kinds), "", "accuracy", _score_scene)


def _score_scene(question: Question, reply: str) -> float:
    return float(scenes.is_correct(question.expected, reply))


TASKS = {
    "textvqa": Task(
        "lmms-lab/textvqa",
        partial(_read_vqa, split="validation", instruction=SHORT),
        SHORT,
        "vqa_accuracy",
        lambda question, reply: textvqa_accuracy(reply, question.expected),
    ),
    "gqa": Task(
        "lmms-lab/GQA",
        _read_gqa,
        SHORT,
        "accuracy",
        lambda question, reply: gqa_accuracy(reply, question.expected),
    ),
    "vqav2": Task(
        "lmms-lab/VQAv2",
        partial(_read_vqa, split="validation", instruction=SHORT, part="answer_type"),
        SHORT,
        "vqa_accuracy",
        # vqaEval.py counts "Yes." as wrong if all people said "yes"; if they differ, it normalizes the rest.
        lambda question, reply: vqav2_accuracy(reply.strip().lower().removesuffix("."), question.expected),
    ),
    "vizwiz": Task(
        "lmms-lab/VizWiz-VQA",
        partial(_read_vqa, split="val", instruction=UNANSWERABLE + SHORT, part="category"),
        UNANSWERABLE + SHORT,
        "vqa_accuracy",
        lambda question, reply: textvqa_accuracy(reply, question.expected),
    ),
    "vstar": Task("craigwu/vstar_bench", _read_vstar, LETTER, "letter", _score_letter, VSTAR_OVERALL),
    "scenes": _scenes_task(),
    "scenes70": _scenes_task(size=70),
    "scenes140": _scenes_task(size=140),
    "large": _scenes_task(kinds=("large",)),
    "photographs": Task("", _read_photographs, "", "accuracy", _score_scene),
}
