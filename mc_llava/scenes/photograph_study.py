"""
The study on photographs: how crops, tokens and zoom affect accuracy where signs, shapes and objects lie in photographs
that no model was trained on.
"""

from pathlib import Path

from ..evaluation.tasks import PHOTOGRAPH_KINDS
from ..journal import write_json
from .study import NAMES, Setting, Study, accuracies


CROPS = (0, 2, 4, 8, 16, 32, 64, 100)
TOKENS = (40, 128, 364, 728)
UNIFORM = dict.fromkeys([(crops, 128) for crops in CROPS] + [(crops, t) for crops in (32, 100) for t in TOKENS])
ZOOMED = ((10, 40, 1), (16, 64, 1), (24, 64, 1))
SETTINGS = tuple(Setting(*knobs, task="photographs") for knobs in (*UNIFORM, *ZOOMED))
COLUMNS = {**NAMES, **{kind: kind for kind in PHOTOGRAPH_KINDS if kind not in NAMES}, "all": "all"}


def run_photograph_study(study: Study, output: Path) -> dict:
    """
    Measure all settings, and write `study_photographs.json` to the folder `output`.

    Returns:
        The contents of the file: for each row the knobs, means over the questions, and the accuracy by kind as in
        `study.json`, also of "all" kinds together.
    """
    rows = []
    for setting in SETTINGS:
        records = study.ask(setting)
        row = {"zoom": setting.zoom, **study.measure(setting, records)}
        (row["accuracy"]["all"],) = accuracies(("all", record["scores"]["accuracy"]) for record in records).values()
        rows.append(row)
    found = {**study.made_with, "settings": rows}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "study_photographs.json", found)
    return found


def markdown(study: dict) -> str:
    """The table of docs/tiny.md, accuracies in percent."""
    lines = [
        "| `zoom` | `max_crops` | `num_tokens` | crops | GFLOPs | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for row in study["settings"]:
        first = [str(row[name]) for name in ("zoom", "max_crops", "num_tokens")]
        costs = [f"{row['crops']:g}", f"{row['gflops']:.1f}"]
        scores = [f"{row['accuracy'][kind]['score']:.1f}" for kind in COLUMNS]
        lines.append(f"| {' | '.join([*first, *costs, *scores])} |")
    return "\n".join(lines)
