"""
Puts a task's questions to a model and writes what it said: `TASK.json`, a record per question and the scores.

While a task runs, its journal is `TASK.partial.jsonl`. Batches depend on the data set and the batch size alone, so
that an interrupted run ends in the same file as an uninterrupted one, unless the engine has a prefix cache, or float
rounding decides about a picture that recurs: its features were in the cache, or are encoded with others'.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .. import GREEDY, check_knob
from ..ahead import Ahead
from ..engine import Engine, answer_all, ask_about, count_bytes
from ..journal import append, check_settings, lock, resume, versions, write_json
from ..loading import identify_code
from .results import is_record, metric_names, read_results, summarize
from .tasks import TASKS, Question, Task


# The code that results depend on, in addition to the model's.
CODE = (
    "engine.py",
    "evaluation/running.py",
    "evaluation/results.py",
    "evaluation/metrics.py",
    "evaluation/tasks.py",
    "scenes/backgrounds.py",
    "scenes/camera.py",
    "scenes/drawing.py",
    "scenes/fonts.py",
    "scenes/making.py",
    "scenes/materials.py",
    "scenes/photographs.py",
    "scenes/questions.py",
    "scenes/scene.py",
)


def evaluate(
    task_name: str,
    engine: Engine,
    output: str | os.PathLike,
    *,
    model: str,
    revision: str,
    data: str | None = None,
    limit: int | None = None,
    task: Task | None = None,
) -> dict:
    """
    Put a task's questions to a model, or resume an interrupted run, and write `output`/TASK.json.

    Args:
        model, revision: the model's name and revision in the results file.
        data: a Hub id, a folder or a file; by default the task's own Hub id.
        limit: ask only the first questions.
        task: the task itself, by default the one of `TASKS` with this name.

    Returns:
        The contents of the file.

    Raises:
        ValueError: if the task or its data don't exist, if `output` has results of other settings or questions, or if
            another run writes it.
    """
    if task is None:
        if task_name not in TASKS:
            raise ValueError(f"there is no task {task_name!r}: choose from {', '.join(TASKS)}")
        task = TASKS[task_name]
    if limit is not None:
        check_knob("limit", limit, 1)
    settings = {
        "task": task_name,
        "model": model,
        "revision": revision,
        "data": task.data if data is None else str(data),
        "limit": limit,
        **describe_engine(engine),
        "instruction": task.instruction,
        "versions": versions(),
        "code": identify_code(*CODE),
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with lock(output / f"{task_name}.json"):
        return _evaluate(task, engine, output, settings)


def describe_engine(engine: Engine) -> dict:
    """All of an engine that its replies depend on, except for the model's weights."""
    quantization = getattr(engine.model.config, "quantization_config", None)
    return {
        **engine.knobs,
        "batch_size": engine.batch_size,
        "max_new_tokens": engine.max_new_tokens,
        "prefix_cache": engine.prefix_cache is not None,
        "generation": engine.model.generation_config.to_diff_dict(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "quantization": quantization and quantization.to_dict(),
        "device": engine.model.device.type,
    }


def _evaluate(task: Task, engine: Engine, output: Path, settings: dict) -> dict:
    task_name, limit = settings["task"], settings["limit"]
    final, unfinished = output / f"{task_name}.json", output / f"{task_name}.partial.jsonl"
    if final.exists():
        results = read_results(final)
        check_settings(results["settings"], settings, final)
        # Questions made here are made again and compared; data on the Hub is not downloaded again for this.
        if not settings["data"] or Path(settings["data"]).exists():
            check_questions(results["questions"], islice(task.read(settings["data"])[1], limit), final)
        unfinished.unlink(missing_ok=True)  # left if a run was killed between the last two lines below
        return results

    records = _answer_rest(task, engine, unfinished, settings)
    results = {"settings": settings, **summarize(task, records), "questions": records}
    write_json(final, results)
    unfinished.unlink()
    return results


def _answer_rest(task: Task, engine: Engine, unfinished: Path, settings: dict) -> list[dict]:
    """The records of all questions: those in the journal of an interrupted run, and the others, which are asked."""
    limit = settings["limit"]
    count, questions = task.read(settings["data"])

    def check(index: int, record: dict):
        if not is_record(record, metric_names(task)):
            raise ValueError(f"record {index} has no scores, or malformed ones")

    records = resume(unfinished, settings, engine.batch_size, check)
    questions = islice(questions, limit)
    total = count if limit is None or (count is not None and count < limit) else limit
    with tqdm(total=total, initial=len(records), unit="question", desc=settings["task"]) as progress:
        check_questions(records, islice(questions, len(records)), unfinished)
        seen = {record["id"] for record in records}
        with closing(batches_ahead(engine, questions)) as batches:
            for batch, prepared in batches:
                for question in batch:
                    if question.id in seen:
                        raise ValueError(f"the data {settings['data']} hold question {question.id} twice: remove one")
                    seen.add(question.id)
                answered = answer_questions(engine, task, batch, prepared.results())
                append(unfinished, answered)
                records += answered
                progress.update(len(batch))
    if not records:
        raise ValueError(f"the data {settings['data']} hold no questions: pass others")
    return records


def check_questions(records: list[dict], questions: Iterable[Question], path: Path):
    for record, question in zip_longest(records, questions):
        if record is None or question is None or not identify_question(question).items() <= record.items():
            raise ValueError(f"{path} was made of other data: choose another output, or remove it")


def identify_question(question: Question) -> dict:
    """
    The fields that identify a question's record; `image` is a digest of the file, or of drawn pixels, and None if it
    can't be read.
    """
    image = question.image
    if isinstance(image, Path):
        try:
            image = image.read_bytes() if image.is_file() else None  # a pipe or a device might never end
        except OSError:  # which fails the question, too
            image = None
    elif isinstance(image, Image.Image):
        image = image.tobytes()
    return {
        "id": question.id,
        "part": question.part,
        "prompt": question.prompt,
        "expected": as_json(question.expected),
        "image": image and hashlib.sha256(image).hexdigest()[:16],
    }


def as_json(expected: Any) -> Any:
    """As a results file gives it back; the text of what it can't hold, such as bytes, with which a question fails."""
    try:
        return json.loads(json.dumps(expected, allow_nan=False))  # NaN would differ from itself in a resumed run
    except (TypeError, ValueError):
        return repr(expected)


def batches_ahead(engine: Engine, questions: Iterator[Question]) -> Iterator[tuple[list[Question], Ahead]]:
    """Batches of questions with their images, which threads prepare while the previous batch is answered."""

    def prepare(question: Question) -> list:
        try:
            return engine.prepare([question.image])
        except ValueError:  # the same error fails the question when it is asked
            return [question.image]

    def begin() -> tuple[list[Question], Ahead]:
        batch = list(islice(questions, engine.batch_size))
        return batch, Ahead(prepare, batch, count_bytes)

    current, following, error = begin(), ([], None), None
    while current[0]:
        try:
            following = begin()
        except Exception as failure:  # of the data: the current batch is answered first
            following, error = ([], None), failure
        try:
            yield current
        except GeneratorExit:
            for _, prepared in (current, following):
                if prepared is not None:
                    prepared.stop()
            raise
        if error is not None:
            raise error
        current = following


def answer_questions(engine: Engine, task: Task, questions: list[Question], images: list[list]) -> list[dict]:
    """
    A record of each question, in their order. One that fails has its error and scores 0: see `answer_all`.

    Args:
        images: of each question, as the question has them or as `Engine.prepare` returns them.
    """
    wrong = dict.fromkeys(metric_names(task), 0.0)
    start = time.perf_counter()
    records = answer_all(
        partial(_answer_together, engine, task),
        list(zip(questions, images)),
        lambda asked, reason: {**identify_question(asked[0]), "failed": reason, "scores": wrong},
    )
    seconds = round((time.perf_counter() - start) / len(questions), 4)
    return [{**record, "seconds": seconds} for record in records]


def _answer_together(engine: Engine, task: Task, asked: list[tuple[Question, list]]) -> list[dict]:
    conversations = [ask_about(images, question.prompt) for question, images in asked]
    records = []
    for (question, _), reply in zip(asked, engine.answer(conversations, **GREEDY)):
        record = {
            **identify_question(question),
            "reply": reply.text,
            "scores": {task.metric: task.score(question, reply.text)},
            "crops": reply.crops,
            "tokens": reply.image_tokens,
        }
        if reply.looked_at:
            record["looked_at"] = reply.looked_at
        if choice := question.choice:
            likelihoods = engine.likelihoods(ask_about(reply.images, choice.question), choice.options)
            sums = [likelihood.log_probability for likelihood in likelihoods]
            per_token = [likelihood.log_probability / likelihood.num_tokens for likelihood in likelihoods]
            record["options"] = [
                {"text": text, "log_likelihood": likelihood.log_probability, "tokens": likelihood.num_tokens}
                for text, likelihood in zip(choice.options, likelihoods)
            ]
            record["scores"] |= {
                "likelihood": is_best(sums, choice.right),
                "likelihood_per_token": is_best(per_token, choice.right),
            }
        records.append(record)
    return records


def is_best(values: list[float], right: int) -> float:
    """1 if the right option's value is above all others. A tie is wrong: V*-bench's right option is always first."""
    return float(all(value < values[right] for index, value in enumerate(values) if index != right))
