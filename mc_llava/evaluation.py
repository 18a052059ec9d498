"""
A model against a benchmark: batches, likelihoods, files that survive a kill, and two results side by side.

While a task runs, its folder holds `TASK.partial.jsonl`: the settings, then a record per question, written batch by
batch. Batches depend on the data set and the batch size alone, so that a run that was stopped ends in the same file as
one that was not; that file is `TASK.json`.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .image_processing_mc_llava import check_knob, load_image
from .journal import append, check_settings, lock, resume, versions, write_json
from .loading import identify_code
from .metrics import bootstrap_interval, mcnemar, wilson_interval
from .modeling_mc_llava import MCLlavaForConditionalGeneration
from .processing_mc_llava import FeatureCache, MCLlavaProcessor
from .tasks import TASKS, Question, Task


# Beside the model's: the code that results depend on.
CODE = ("evaluation.py", "tasks.py", "metrics.py", "scenes/questions.py", "scenes/scene.py")
Asked = TypeVar("Asked")


# Asking


def user_turn(question: str, num_images: int) -> list[dict]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


class Likelihood(NamedTuple):
    """
    Of an answer's tokens, the end of its turn among them: without it "red" could never be less likely than "red and
    blue".
    """

    log_probability: float  # the sum over the tokens, natural
    num_tokens: int
    is_greedy: bool  # whether each token is the likeliest


class Evaluator:
    """
    A model that answers questions about images, many at a time. Images that follow each other are encoded once.

    Args:
        max_crops, num_tokens: as the processor was saved where None.
        batch_size: rows of a forward pass.
        max_new_tokens: upper bound of a reply's tokens.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: MCLlavaForConditionalGeneration,
        processor: MCLlavaProcessor,
        max_crops: int | None = None,
        num_tokens: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 32,
    ):
        self.model, self.processor, self.feature_cache = model.eval(), processor, FeatureCache()
        self.knobs = fill_knobs(processor, max_crops, num_tokens)
        self.batch_size = check_knob("batch_size", batch_size, 1)
        self.max_new_tokens = check_knob("max_new_tokens", max_new_tokens, 1)

    def encode(self, images: list) -> list[torch.Tensor]:
        """One float[tokens, hidden] per RGB image."""
        return self.feature_cache.encode(self.model, self.processor.image_processor, images, **self.knobs)

    def expand(self, prompt: str, features: list[torch.Tensor]) -> str:
        """The prompt with one `<image>` per visual token."""
        image_token = self.processor.image_token
        first, *rest = prompt.split(image_token)
        return first + "".join(image_token * len(tokens) + text for tokens, text in zip(features, rest, strict=True))

    def generate(self, questions: list[str], features: list[list[torch.Tensor]], **options) -> list[str]:
        """
        Replies to questions.

        Args:
            features: of each question its encoded images.
            options: for `generate`, beside the defaults: greedy, and `max_new_tokens` of this object.
        """
        prompts = []
        for question, images in zip(questions, features):
            turn = user_turn(question, len(images))
            prompts.append(self.expand(self.processor.apply_chat_template(turn, add_generation_prompt=True), images))
        inputs = self.processor.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, **options}
        output = self.model.generate(**inputs, image_features=[*chain(*features)], **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [reply.strip() for reply in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]

    def option_likelihoods(
        self, question: str, options: tuple[str, ...], features: list[torch.Tensor]
    ) -> list[Likelihood]:
        """
        How likely each option is as the whole answer to a question about encoded images.

        Raises:
            ValueError: if an option doesn't fit into the context, or its likelihood is no finite number.
        """
        turn = user_turn(question, len(features))
        prompt = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        rows, lengths = [], []
        for option in options:
            whole = self.processor.apply_chat_template([*turn, {"role": "assistant", "content": option}]).rstrip("\n")
            if not whole.startswith(prompt):
                raise ValueError("the chat template writes another prompt before an answer: use the published one")
            prompt_ids, option_ids = (
                self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (self.expand(prompt, features), whole.removeprefix(prompt))
            )
            rows.append(torch.tensor(prompt_ids + option_ids))
            lengths.append(len(option_ids))
        limit = self.model.config.text_config.max_position_embeddings
        if (longest := max(map(len, rows))) > limit:
            raise ValueError(f"question and option have {longest} tokens, the context {limit}: lower num_tokens")

        likelihoods = []
        for start in range(0, len(rows), self.batch_size):
            end = start + self.batch_size
            likelihoods += self._row_likelihoods(rows[start:end], lengths[start:end], features)
        for option, likelihood in zip(options, likelihoods):
            if not math.isfinite(likelihood.log_probability):
                raise ValueError(
                    f"the log probability of {option!r} is {likelihood.log_probability}: try the dtype float32"
                )
        return likelihoods

    def _row_likelihoods(self, rows: list[torch.Tensor], lengths: list[int], features: list) -> list[Likelihood]:
        """Of the last `lengths[i]` tokens of row i."""
        padding = self.processor.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        kept = max(lengths) + 1  # padded on the left, all options end in the last column
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(self.model.device),
                image_features=features * len(rows),
                logits_to_keep=kept,
            ).logits
        log_probabilities = logits[:, :-1].float().log_softmax(-1)
        targets = input_ids[:, -kept + 1 :].to(log_probabilities.device)
        scores = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        is_greedy = log_probabilities.argmax(-1) == targets
        return [
            Likelihood(float(row[-length:].sum()), length, bool(greedy[-length:].all()))
            for row, greedy, length in zip(scores, is_greedy, lengths)
        ]

    def answer(self, task: Task, questions: list[Question]) -> list[dict]:
        """A record of each question, in their order. One that fails has its error and scores 0: see `answer_all`."""
        wrong = dict.fromkeys(metric_names(task), 0.0)
        start = time.perf_counter()
        records = answer_all(
            partial(self._answer, task),
            questions,
            lambda question, reason: {**describe(question), "failed": reason, "scores": wrong},
        )
        seconds = round((time.perf_counter() - start) / len(questions), 4)
        return [{**record, "seconds": seconds} for record in records]

    def _answer(self, task: Task, questions: list[Question]) -> list[dict]:
        images = [load_image(question.image) for question in questions]
        features = [[encoded] for encoded in self.encode(images)]
        replies = self.generate([question.prompt for question in questions], features)
        records = []
        for question, image, encoded, reply in zip(questions, images, features, replies):
            plan = self.processor.image_processor.plan(*image.size, **self.knobs)
            record = {
                **describe(question),
                "reply": reply,
                "scores": {task.metric: task.score(question, reply)},
                "crops": len(plan),
                "tokens": sum(crop.num_tokens for crop in plan),
            }
            if choice := question.choice:
                likelihoods = self.option_likelihoods(choice.question, choice.options, encoded)
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


def fill_knobs(processor: MCLlavaProcessor, max_crops: int | None, num_tokens: int | None) -> dict[str, int]:
    """The knobs, as the processor was saved where None."""
    saved = processor.image_processor
    return {
        "max_crops": check_knob("max_crops", saved.max_crops if max_crops is None else max_crops, 0),
        "num_tokens": check_knob("num_tokens", saved.num_tokens if num_tokens is None else num_tokens, 1),
    }


def answer_all(
    answer: Callable[[list[Asked]], list[dict]], batch: list[Asked], fail: Callable[[Asked, str], dict]
) -> list[dict]:
    """
    The records that `answer` makes of a batch.

    A batch that fails is asked again one by one: what fails then has the record that `fail` makes of it and the error.

    Raises:
        OSError, RuntimeError: of the machine, not of what was asked, and so no wrong answer: a lost device or network,
            too little memory for a single question. A run goes on from there when it is started again.
    """
    try:
        return answer(batch)
    except (ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) and len(batch) == 1:
            raise
        failure = str(error)
    # Only now, without the error, is the failed batch's memory free.
    if len(batch) == 1:
        return [fail(batch[0], failure)]
    return [record for asked in batch for record in answer_all(answer, [asked], fail)]


def describe(question: Question) -> dict:
    """What a record must have for it to be this question's; `image` is a digest of the file, or of drawn pixels."""
    image = question.image
    if isinstance(image, Path):
        image = image.read_bytes()
    elif isinstance(image, Image.Image):
        image = image.tobytes()
    return {
        "id": question.id,
        "part": question.part,
        "prompt": question.prompt,
        "expected": question.expected,
        "image": image and hashlib.sha256(image).hexdigest()[:16],
    }


def is_best(values: list[float], right: int) -> float:
    """1 if the right one's value is above all others. A tie is no choice: V*-bench's right option is always first."""
    return float(all(value < values[right] for index, value in enumerate(values) if index != right))


def metric_names(task: Task) -> list[str]:
    return [task.metric, *(["likelihood", "likelihood_per_token"] if task.metric == "letter" else [])]


# Running


def evaluate(
    task_name: str,
    evaluator: Evaluator,
    output: str | os.PathLike,
    *,
    model: str,
    revision: str,
    data: str | None = None,
    limit: int | None = None,
) -> dict:
    """
    Put a task's questions to a model, or go on with those that a stopped run left, and write `output`/TASK.json.

    Args:
        model, revision: what the results file calls the model.
        data: a Hub id, a folder or a file; the task's own Hub id where None.
        limit: ask the first questions only.

    Returns:
        What the file holds.

    Raises:
        ValueError: if the task or its data are not there, or if `output` holds results of other settings or questions
            or is another run's.
    """
    if task_name not in TASKS:
        raise ValueError(f"there is no task {task_name!r}: choose from {', '.join(TASKS)}")
    task = TASKS[task_name]
    if limit is not None:
        check_knob("limit", limit, 1)
    quantization = getattr(evaluator.model.config, "quantization_config", None)
    settings = {
        "task": task_name,
        "model": model,
        "revision": revision,
        "data": task.data if data is None else str(data),
        "limit": limit,
        **evaluator.knobs,
        "batch_size": evaluator.batch_size,
        "max_new_tokens": evaluator.max_new_tokens,
        "generation": evaluator.model.generation_config.to_diff_dict(),
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),
        "quantization": quantization and quantization.to_dict(),
        "device": evaluator.model.device.type,
        "instruction": task.instruction,
        "versions": versions(),
        "code": identify_code(*CODE),
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with lock(output / f"{task_name}.json"):
        return _evaluate(task, evaluator, output, settings)


def _evaluate(task: Task, evaluator: Evaluator, output: Path, settings: dict) -> dict:
    task_name, limit = settings["task"], settings["limit"]
    final, unfinished = output / f"{task_name}.json", output / f"{task_name}.partial.jsonl"
    if final.exists():
        results = read_results(final)
        check_settings(results["settings"], settings, final)
        # What is made here is made again; what is on the Hub is not downloaded for this.
        if not settings["data"] or Path(settings["data"]).exists():
            check_questions(results["questions"], islice(task.read(settings["data"])[1], limit), final)
        unfinished.unlink(missing_ok=True)  # a kill between the last two lines below
        return results

    count, questions = task.read(settings["data"])
    records = resume(unfinished, settings, evaluator.batch_size)
    questions = islice(questions, limit)
    total = count if limit is None or (count is not None and count < limit) else limit
    with (
        tqdm(total=total, initial=len(records), unit="question", desc=task_name) as progress,
        open(unfinished, "ab") as journal,
    ):
        check_questions(records, islice(questions, len(records)), unfinished)
        seen = {record["id"] for record in records}
        while batch := list(islice(questions, evaluator.batch_size)):
            for question in batch:
                if question.id in seen:
                    raise ValueError(f"the data {settings['data']} hold question {question.id} twice: remove one")
                seen.add(question.id)
            answered = evaluator.answer(task, batch)
            append(journal, answered)
            records += answered
            progress.update(len(batch))
    if not records:
        raise ValueError(f"the data {settings['data']} hold no questions: pass others")
    results = {"settings": settings, **summarize(task, records), "questions": records}
    write_json(final, results)
    unfinished.unlink()
    return results


def read_results(path: str | os.PathLike) -> dict:
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the results {path} ({error}): pass a file that mc-llava eval wrote") from error
    try:
        names = metric_names(TASKS[results["settings"]["task"]])
        whole = all({*names} <= {*record["scores"]} for record in results["questions"]) and "scores" in results
        whole = whole and all({"id", "part", "prompt", "expected"} <= {*record} for record in results["questions"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no results: pass a file that mc-llava eval wrote")
    return results


def check_questions(records: list[dict], questions: Iterable[Question], path: Path):
    for record, question in zip_longest(records, questions):
        if record is None or question is None or not describe(question).items() <= record.items():
            raise ValueError(f"{path} was made of other data: choose another output, or remove it")


def summarize(task: Task, records: list[dict]) -> dict:
    """Scores in percent with 95 % intervals, overall and for each part, and what they cost."""
    parts = dict.fromkeys(record["part"] for record in records)
    rows = {"overall": [record for record in records if not task.overall or record["part"] in task.overall]}
    if len(parts) > 1 or task.overall:
        rows |= {part: [record for record in records if record["part"] == part] for part in parts}
    scores = []
    for part, chosen in rows.items():
        for metric in metric_names(task) if chosen else ():
            values = [record["scores"][metric] for record in chosen]
            is_graded = metric == "vqa_accuracy"
            low, high = bootstrap_interval(values) if is_graded else wilson_interval(sum(values), len(values))
            scores.append(
                {
                    "part": part,
                    "metric": metric,
                    "score": round(100 * sum(values) / len(values), 2),
                    "low": round(100 * low, 2),
                    "high": round(100 * high, 2),
                    "interval": "bootstrap" if is_graded else "wilson",
                    "n": len(values),
                }
            )
    return {
        "scores": scores,
        "failed": [record["id"] for record in records if "failed" in record],
        "crops": sum(record.get("crops", 0) for record in records),
        "tokens": sum(record.get("tokens", 0) for record in records),
        "seconds": round(sum(record["seconds"] for record in records), 2),
    }


def score_table(results: dict) -> str:
    rows = [("part", "metric", "score", "95 % interval", "n")]
    for row in results["scores"]:
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        rows.append((row["part"], row["metric"], f"{row['score']:.2f}", interval, str(row["n"])))
    return align(rows)


def align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


# Comparing


def compare(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """
    Two results files side by side: a table of scores, differences and paired tests, then the questions that changed.

    Only questions that are in both count. The interval of a difference is bootstrapped over questions; p is that of
    McNemar's exact test, which for VQA accuracy is the sign test.

    Raises:
        ValueError: if a file holds no results, or the two have no question in common.
    """
    a, b = read_results(first), read_results(second)
    task_name = a["settings"]["task"]
    if task_name != b["settings"]["task"]:
        raise ValueError(f"{first} has the task {task_name}, {second} {b['settings']['task']}: compare one task")
    task = TASKS[task_name]
    in_a, in_b = ({record["id"]: record for record in results["questions"]} for results in (a, b))
    common = [id for id in in_a if id in in_b and in_a[id]["expected"] == in_b[id]["expected"]]
    if not common:
        raise ValueError(f"{first} and {second} have no question in common: compare results on the same data")

    lines = [f"A: {first}", f"B: {second}"]
    for name in a["settings"] | b["settings"]:
        if (one := a["settings"].get(name)) != (other := b["settings"].get(name)):
            lines.append(f"{name}: {one} -> {other}")
    if len(common) < max(len(in_a), len(in_b)):
        lines.append(f"questions: {len(common)} in both, {len(in_a)} in A, {len(in_b)} in B")

    rows = [("part", "metric", "A", "B", "B - A", "95 % interval", "better", "worse", "p", "n")]
    for part in dict.fromkeys(row["part"] for row in a["scores"]):
        parts = task.overall if part == "overall" else (part,)
        ids = [id for id in common if not parts or in_a[id]["part"] in parts]
        for metric in metric_names(task) if ids else ():
            pairs = [(in_a[id]["scores"][metric], in_b[id]["scores"][metric]) for id in ids]
            differences = [other - one for one, other in pairs]
            better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
            low, high = bootstrap_interval(differences)
            means = [100 * sum(values) / len(ids) for values in (*zip(*pairs), differences)]
            rows.append(
                (
                    *(part, metric, f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:+.2f}"),
                    *(f"{100 * low:+.2f} to {100 * high:+.2f}", str(better), str(worse)),
                    *(f"{mcnemar(better, worse):.3g}", str(len(ids))),
                )
            )
    lines += ["", align(rows), ""]

    changed = [id for id in common if in_a[id]["scores"] != in_b[id]["scores"]]
    lines.append(f"changed: {len(changed)} of {len(common)}")
    for id in changed:
        lines += [f"{id}: {in_a[id]['prompt']!r}, expected {in_a[id]['expected']}"]
        lines += [f"  {name}: {short(record)}" for name, record in (("A", in_a[id]), ("B", in_b[id]))]
    return "\n".join(lines)


def short(record: dict[str, Any]) -> str:
    scores = ", ".join(f"{metric} {score:g}" for metric, score in record["scores"].items())
    return f"{record['reply']!r} ({scores})" if "reply" in record else f"failed ({record['failed']})"
