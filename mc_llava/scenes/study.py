"""
The published claim, "more crops, more detail, at no more tokens", measured on scenes that no model was trained on.

The same questions are asked under every setting: `max_crops` grows while `num_tokens` stays, then the other way round.
The baselines are the model without the picture, and always giving a kind's most common answer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from .. import GREEDY, FeatureCache
from ..engine import Engine, ask_about
from ..estimate import estimate
from ..evaluation.metrics import wilson_interval
from ..evaluation.running import evaluate
from ..evaluation.tasks import NUM_SCENES, PHOTOGRAPH_KINDS, TASKS, Question, Task
from ..journal import write_json
from ..loading import load
from .questions import KINDS, is_correct
from .scene import CROPS, DIRECTIONS


class Setting(NamedTuple):
    """The knobs with which a task is asked, and the task."""

    max_crops: int
    num_tokens: int
    zoom: int = 0
    task: str = "scenes"


MAX_CROPS, NUM_TOKENS = CROPS, 128
STUDIED_CROPS = (0, 2, 4, 8, 16, 32, 64, 100)
STUDIED_TOKENS = (40, 128, 364, 728)
# Most tokens first: with fewer, the crops' patches are found in the cache.
GRID = tuple(Setting(crops, tokens) for crops in STUDIED_CROPS for tokens in reversed(STUDIED_TOKENS))
ZOOMED = (
    Setting(10, 32, zoom=1),
    Setting(12, 64, zoom=1),
    Setting(18, 64, zoom=2),
    Setting(24, 64, zoom=3),
    Setting(32, 128, zoom=1),
)
SETTINGS = (*GRID, *ZOOMED)
FILES = {"scenes": "study", "photographs": "study_photographs"}
KINDS_OF = {"large": 1, "photographs": len(PHOTOGRAPH_KINDS)}  # other tasks ask questions of all `KINDS`
NAMES = {"ocr": "OCR", "attribute": "attributes", "position": "position", "hard": "hard"}
BATCH_SIZE = 64
MAX_NEW_TOKENS = 24
ANSWER_TOKENS = 8  # of an answer, for its FLOPs
CACHE_BYTES = 2**30
PREFIX_BYTES = 2**29  # of the pictures of a batch


class Study:
    """
    The same questions under many settings. An interrupted study resumes.

    Args:
        work: folder for every reply, one results file of `evaluate` per setting.
        num_scenes: of the test split, from the first on, with a question of each kind.
        photographs: the data of the task photographs.

    Raises:
        ValueError: if there are fewer scenes.
    """

    def __init__(self, model_path: str, work: Path, num_scenes: int, photographs: str = ""):
        if num_scenes > NUM_SCENES:
            raise ValueError(f"num_scenes must be at most {NUM_SCENES}, got {num_scenes}")
        self.model_path, self.work, self.num_scenes, self.photographs = model_path, work, num_scenes, photographs
        self.model, self.processor, self.revision = load(model_path)
        self.feature_cache = FeatureCache(CACHE_BYTES, all_patches=False)
        self.kept: dict[str, list[Question]] = {}  # of one task

    @property
    def made_with(self) -> dict:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model": self.model_path, "revision": self.revision, "dtype": dtype, "scenes": self.num_scenes}

    def engine(self, setting: Setting) -> Engine:
        knobs = {"max_crops": setting.max_crops, "num_tokens": setting.num_tokens, "zoom": setting.zoom}
        options = {"batch_size": BATCH_SIZE, "max_new_tokens": MAX_NEW_TOKENS}
        options["prefix_bytes"] = 0 if setting.zoom else PREFIX_BYTES
        return Engine(self.model, self.processor, feature_cache=self.feature_cache, **knobs, **options)

    def task(self, name: str, zoom: int) -> Task:
        """
        A task with the study's questions. Without zoom, those about one picture are in different batches, see
        `in_turns`. With zoom, they are in one batch, in which a picture is cut once.
        """
        kinds = KINDS_OF.get(name, len(KINDS))
        count = self.num_scenes * kinds

        def questions(source: str | None) -> Iterator[Question]:
            return islice(TASKS[name].read(source or "")[1], count)

        def read(source: str | None) -> tuple[int, Iterator[Question]]:
            if name not in self.kept:
                self.kept.clear()
                if name in FILES:  # drawing takes longer than answering; others have few settings, and large pictures
                    self.kept[name] = list(questions(source))
            found = iter(self.kept[name]) if name in self.kept else questions(source)
            return count, found if zoom else in_turns(found, kinds)

        return replace(TASKS[name], read=read)

    def data(self, name: str) -> str | None:
        return self.photographs if name == "photographs" else None

    def ask(self, setting: Setting) -> list[dict]:
        """
        The records of `evaluate` for a setting.

        Raises:
            ValueError: if a question fails.
        """
        zoom = f"-zoom-{setting.zoom}" * (setting.zoom > 0)
        folder = self.work / f"crops-{setting.max_crops}-tokens-{setting.num_tokens}{zoom}"
        results = evaluate(
            setting.task,
            self.engine(setting),
            folder,
            model=self.model_path,
            revision=self.revision,
            data=self.data(setting.task),
            limit=self.num_scenes * KINDS_OF.get(setting.task, len(KINDS)),
            task=self.task(setting.task, setting.zoom),
        )
        records = results["questions"]
        if failed := next((record for record in records if "failed" in record), None):
            raise ValueError(
                f"the question {failed['id']} failed: {failed['failed']}; all settings must have the same questions: "
                f"fix it, and remove {folder} to ask again"
            )
        return records

    def measure(self, setting: Setting, records: list[dict]) -> dict:
        """
        One row: the knobs, means over the questions, and by kind, also of "all" kinds together, the accuracy and the
        FLOPs: with zoom they depend on the question.
        """
        scored = [(record["part"], record["scores"]["accuracy"]) for record in records]
        accuracy = accuracies(scored + [("all", score) for _, score in scored])
        costs = flops_of(self.model.config, records)
        for kind, found in accuracy.items():
            own = [cost for cost, record in zip(costs, records) if kind in (record["part"], "all")]
            found["gflops"] = round(sum(own) / len(own) / 1e9, 3)
        return {
            "zoom": setting.zoom,
            "max_crops": setting.max_crops,
            "num_tokens": setting.num_tokens,
            "crops": round(sum(record["crops"] for record in records) / len(records), 1),
            "tokens": round(sum(record["tokens"] for record in records) / len(records), 1),
            "gflops": accuracy["all"]["gflops"],
            "accuracy": accuracy,
        }


def in_turns(questions: Iterator[Question], kinds: int) -> Iterator[Question]:
    """
    The questions of a batch's pictures, first those of one kind: later ones find a picture's keys and values in the
    prefix cache.
    """
    while pictures := list(islice(questions, BATCH_SIZE * kinds)):
        for kind in range(kinds):
            yield from pictures[kind::kinds]


def run_study(study: Study, output: Path, task: str = "scenes") -> dict:
    """
    Measure all settings on a task, and write a file of `FILES` and three figures.

    Args:
        output: folder for the study's results.

    Returns:
        The contents of the file: accuracies in percent with Wilson's 95 % intervals, and FLOPs per question.
    """
    rows = []
    for setting in SETTINGS:
        setting = setting._replace(task=task)
        records = study.ask(setting)
        rows.append(study.measure(setting, records))
    blind = blind_scores(study.engine(setting), records)
    found = {
        **study.made_with,
        "settings": rows,
        "blind": accuracies(zip([record["part"] for record in records], blind)),
        "majority": majority(records),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{FILES[task]}.json", found)
    draw_figures(found, output, FILES[task])
    draw_kinds(found, output / f"{FILES[task]}_kinds.png")
    return found


def accuracies(scored) -> dict[str, dict]:
    """Per kind of question, from (kind, 0 or 1): percent right, the interval's bounds, and how many questions."""
    by_kind: dict[str, list[float]] = {}
    for kind, score in scored:
        by_kind.setdefault(kind, []).append(score)
    found = {}
    for kind, scores in by_kind.items():
        low, high = wilson_interval(sum(scores), len(scores))
        percent = [round(100 * value, 1) for value in (sum(scores) / len(scores), low, high)]
        found[kind] = dict(zip(("score", "low", "high"), percent)) | {"questions": len(scores)}
    return found


def blind_scores(engine: Engine, records: list[dict]) -> list[float]:
    """The same questions without the image."""
    scores = []
    records = iter(records)
    while batch := list(islice(records, BATCH_SIZE)):
        replies = engine.answer([ask_about([], record["prompt"]) for record in batch], **GREEDY)
        scores += [float(is_correct(record["expected"], reply.text)) for record, reply in zip(batch, replies)]
    return scores


def majority(records: list[dict]) -> dict[str, dict]:
    """
    The most common answer of each kind, and the score of always giving it.

    A question of position names two directions: there it is the more common of these.
    """
    found = {}
    for kind in dict.fromkeys(record["part"] for record in records):
        counts = Counter(record["expected"] for record in records if record["part"] == kind)
        choices = DIRECTIONS if kind == "position" else (tuple(counts),)
        answers = [max(choice, key=lambda key: counts[key]) for choice in choices]
        score = 100 * sum(counts[key] for key in answers) / counts.total()
        found[kind] = {"answer": " or ".join(answers), "score": round(score, 1)}
    return found


def flops_of(config, records: list[dict]) -> list[int]:
    """
    For each question, the FLOPs of the tower, zoom's drafts, the prompt and an answer of `ANSWER_TOKENS` tokens, as if
    it were asked alone: if zoom has looked at all crops, the answer reuses the draft's keys and values.
    """

    @cache
    def flops(crops: int, tokens: int, looks: int, is_reused: bool) -> int:
        cost = estimate(config, crops, tokens, new_tokens=ANSWER_TOKENS, dtype=torch.bfloat16, looks=looks)
        prompts = cost.look_flops + cost.prefill_flops * (not is_reused)
        return cost.tower_flops + prompts + ANSWER_TOKENS * cost.flops_per_new_token

    costs = []
    for record in records:
        looked_at = record.get("looked_at", ())
        looks = count_looks(looked_at)
        is_reused = looks > max((crop["round"] for crop in looked_at), default=0)
        costs.append(flops(record["crops"], record["tokens"], looks, is_reused))
    return costs


def count_looks(looked_at: list[dict]) -> int:
    """How often zoom looked before it answered: a crop of round n has its relevance from look n + 1."""
    return max((1 + crop["round"] for crop in looked_at if crop["relevance"] is not None), default=0)


def markdown(study: dict) -> str:
    """
    Two tables of docs/tiny.md: accuracies by kind with `NUM_TOKENS` or zoom, and the baselines; and the accuracies of
    all kinds together by `max_crops` and `num_tokens`.
    """
    kinds = {kind: NAMES.get(kind, kind) for kind in study["blind"]}
    lines = [
        f"| `zoom` | `max_crops` | `num_tokens` | crops | {' | '.join(kinds.values())} | GFLOPs |",
        "|---" * (len(kinds) + 5) + "|",
    ]

    def cells(accuracy):
        return [f"{accuracy[kind]['score']:.1f}" for kind in kinds]

    for row in sorted(study["settings"], key=lambda row: (row["zoom"], row["max_crops"], row["num_tokens"])):
        if row["zoom"] or row["num_tokens"] == NUM_TOKENS:
            first = [str(row[name]) for name in ("zoom", "max_crops", "num_tokens")] + [f"{row['crops']:g}"]
            lines.append(f"| {' | '.join([*first, *cells(row['accuracy']), format(row['gflops'], '.1f')])} |")
    for name in ("blind", "majority"):
        lines.append(f"| {name} | | | | {' | '.join(cells(study[name]))} | |")
    grid = [row for row in study["settings"] if not row["zoom"]]
    all_crops, all_tokens = (sorted({row[name] for row in grid}) for name in ("max_crops", "num_tokens"))
    lines += ["", f"| `max_crops` \\ `num_tokens` | {' | '.join(map(str, all_tokens))} |"]
    lines += ["|---" * (len(all_tokens) + 1) + "|"]
    scores = {(row["max_crops"], row["num_tokens"]): row["accuracy"]["all"]["score"] for row in grid}
    for crops in all_crops:
        found = [f"{scores[crops, tokens]:.1f}" if (crops, tokens) in scores else "" for tokens in all_tokens]
        lines.append(f"| {crops} | {' | '.join(found)} |")
    return "\n".join(lines)


def scores_and_bars(rows: list[dict], kind: str) -> tuple[list[float], list[list[float]]]:
    """The scores of a kind in rows, and how far their intervals reach below and above, as `errorbar` takes them."""
    found = [row["accuracy"][kind] for row in rows]
    scores = [entry["score"] for entry in found]
    below = [entry["score"] - entry["low"] for entry in found]
    return scores, [below, [entry["high"] - entry["score"] for entry in found]]


def draw_figures(study: dict, output: Path, name: str):
    """One figure per knob: accuracy and cost over that knob, with the other fixed."""
    grid = [row for row in study["settings"] if not row["zoom"]]
    for knob, other, fixed in (("max_crops", "num_tokens", NUM_TOKENS), ("num_tokens", "max_crops", MAX_CROPS)):
        rows = sorted((row for row in grid if row[other] == fixed), key=lambda row: row[knob])
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        cost = axes.twinx()
        cost.bar(places, [row["gflops"] for row in rows], color="0.88", width=0.6, zorder=0)
        cost.set_ylabel("GFLOPs of a question (bars)")
        axes.set_zorder(cost.get_zorder() + 1)
        axes.set_frame_on(False)
        for kind in study["blind"]:
            scores, spread = scores_and_bars(rows, kind)
            (line, *_) = axes.errorbar(places, scores, spread, marker="o", capsize=3, label=NAMES.get(kind, kind))
            axes.axhline(study["blind"][kind]["score"], color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_xticks(places, [str(row[knob]) for row in rows])
        axes.set_xlabel(f"{knob} at {other} = {fixed}")
        axes.set_ylabel("right answers, % (dotted: without the picture)")
        axes.set_ylim(0, 103)  # points at 100 are whole
        figure.legend(loc="outside upper center", ncols=4)  # inside, it would hide points
        figure.savefig(output / f"{name}_{'crops' if knob == 'max_crops' else 'tokens'}.png", dpi=110)


def draw_kinds(study: dict, path: Path):
    """A panel for each kind: accuracy over the FLOPs of that kind's questions, of grids and of zoom."""
    kinds, columns = list(study["blind"]), 4
    rows = -(-len(kinds) // columns)
    zoomed = [row for row in study["settings"] if row["zoom"]]
    grid = [
        row
        for row in study["settings"]
        if not row["zoom"] and row["num_tokens"] == NUM_TOKENS and row["max_crops"] <= MAX_CROPS
    ]
    figure = Figure(figsize=(3 * columns, 0.6 + 2.6 * rows), layout="constrained")
    for axes, kind in zip(figure.subplots(rows, columns, sharex=True, sharey=True).flat, kinds):
        for some, style, label in ((grid, "o--", "grid"), (zoomed, "s-", "zoom")):
            draw_over_flops(axes, some, kind, fmt=style, label=label)
        axes.set_title(NAMES.get(kind, kind))
    figure.supxlabel("GFLOPs of a question of this kind")
    figure.supylabel("right answers, %")
    figure.axes[0].set_ylim(0, 103)  # points at 100 are whole
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def draw_over_flops(axes, rows: list[dict], kind: str, **style):
    """A kind's accuracy in rows, with intervals, over the FLOPs of its questions."""
    rows = sorted(rows, key=lambda row: row["accuracy"][kind]["gflops"])
    scores, spread = scores_and_bars(rows, kind)
    axes.errorbar([row["accuracy"][kind]["gflops"] for row in rows], scores, spread, capsize=3, **style)
