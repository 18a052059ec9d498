"""Compares two results files of one task: is the difference significant, and which replies changed?"""

import os
from typing import Any

from .metrics import bootstrap_interval, mcnemar
from .results import align, metric_names, read_results
from .tasks import TASKS


def compare(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """
    Two results files side by side: a table of scores, differences and paired tests, then the questions that changed.

    Only questions in both files count. The interval of a difference is bootstrapped over questions; p is that of
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
    if others := sum(in_a[id].get("image") != in_b[id].get("image") for id in common):
        lines.append(f"images: {others} of {len(common)} questions have another image in B")

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
