"""The contents of a results file: records of questions, their scores, and a table of the scores."""

import json
import math
import os
from pathlib import Path

from .metrics import bootstrap_interval, wilson_interval
from .tasks import TASKS, Task


def read_results(path: str | os.PathLike) -> dict:
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the results {path} ({error}): pass a file that mc-llava eval wrote") from error
    try:
        names = metric_names(TASKS[results["settings"]["task"]])
        whole = all(is_record(record, names) for record in results["questions"])
        whole = whole and all("part" in row for row in results["scores"])
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no results: pass a file that mc-llava eval wrote")
    return results


def is_record(record: dict, names: list[str]) -> bool:
    """Whether a run can have written this for a question with scores of these names."""
    scores, costs = record.get("scores"), [record.get(name, 0) for name in ("crops", "tokens", "seconds")]
    return (
        {"id", "part", "prompt", "expected"} <= {*record}
        and isinstance(record["id"], str)
        and isinstance(record["part"], str)
        and not {"reply", "failed"}.isdisjoint(record)
        and isinstance(scores, dict)
        and {*names} <= {*scores}
        and all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores.values())
        and all(isinstance(cost, (int, float)) and 0 <= cost < math.inf for cost in costs)
    )


def metric_names(task: Task) -> list[str]:
    return [task.metric, *(["likelihood", "likelihood_per_token"] if task.metric == "letter" else [])]


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
        "seconds": round(sum(record.get("seconds", 0) for record in records), 2),
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
