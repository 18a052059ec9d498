"""Compares two results files of one task: is the difference significant, and which replies changed?"""

import os
from collections.abc import Iterable
from typing import Any

from .metrics import bootstrap_interval, mcnemar
from .results import align, metric_names, read_results
from .tasks import TASKS, Task


def compare(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """
    Two results files side by side: a table of scores, differences and paired tests, then the questions that changed.

    Only questions in both files count. The interval of a difference is bootstrapped over questions; p is that of
    McNemar's exact test, which for VQA accuracy is the sign test.

    Raises:
        ValueError: if a file holds no results, or the two have no question in common.
    """
    a, b = read_results(first), read_results(second)
    task = a["settings"]["task"]
    if task != b["settings"]["task"]:
        raise ValueError(f"{first} has the task {task}, {second} {b['settings']['task']}: compare one task")
    in_a, in_b = ({record["id"]: record for record in results["questions"]} for results in (a, b))
    common = [id for id in in_a if id in in_b and in_a[id]["expected"] == in_b[id]["expected"]]
    if not common:
        raise ValueError(f"{first} and {second} have no question in common: compare results on the same data")

    lines = [f"A: {first}", f"B: {second}", *settings_that_differ(a["settings"], b["settings"])]
    if len(common) < max(len(in_a), len(in_b)):
        lines.append(f"questions: {len(common)} in both, {len(in_a)} in A, {len(in_b)} in B")
    pairs = [(in_a[id], in_b[id]) for id in common]
    if others := sum(one.get("image") != other.get("image") for one, other in pairs):
        lines.append(f"images: {others} of {len(common)} questions have another image in B")
    parts = dict.fromkeys(row["part"] for row in a["scores"])
    lines += ["", difference_table(TASKS[task], parts, pairs), ""]
    changed = [(one, other) for one, other in pairs if one["scores"] != other["scores"]]
    lines.append(f"changed: {len(changed)} of {len(common)}")
    for one, other in changed:
        lines += [f"{one['id']}: {one['prompt']!r}, expected {one['expected']}"]
        lines += [f"  A: {short(one)}", f"  B: {short(other)}"]
    return "\n".join(lines)


def settings_that_differ(a: dict, b: dict) -> list[str]:
    return [f"{name}: {a.get(name)} -> {b.get(name)}" for name in a | b if a.get(name) != b.get(name)]


def difference_table(task: Task, parts: Iterable[str], pairs: list[tuple[dict, dict]]) -> str:
    """
    The scores of each part and metric in A and B, with paired tests.

    Args:
        pairs: the records of each common question.
    """
    rows = [("part", "metric", "A", "B", "B - A", "95 % interval", "better", "worse", "p", "n")]
    for part in parts:
        counted = task.overall if part == "overall" else (part,)
        chosen = [(one["scores"], other["scores"]) for one, other in pairs if not counted or one["part"] in counted]
        for metric in metric_names(task) if chosen else ():
            rows.append((part, metric, *compare_scores([(one[metric], other[metric]) for one, other in chosen])))
    return align(rows)


def compare_scores(pairs: list[tuple[float, float]]) -> tuple[str, ...]:
    """The cells of one row of `difference_table`, without its part and metric."""
    differences = [other - one for one, other in pairs]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    low, high = bootstrap_interval(differences)
    mean_a, mean_b, difference = (100 * sum(values) / len(pairs) for values in (*zip(*pairs), differences))
    return (
        *(f"{mean_a:.2f}", f"{mean_b:.2f}", f"{difference:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}"),
        *(str(better), str(worse), f"{mcnemar(better, worse):.3g}", str(len(pairs))),
    )


def short(record: dict[str, Any]) -> str:
    """A record's reply and scores."""
    scores = ", ".join(f"{metric} {score:g}" for metric, score in record["scores"].items())
    return f"{record['reply']!r} ({scores})" if "reply" in record else f"failed ({record['failed']})"
