"""
Guided zoom against a uniform grid at equal cost: signs of three sizes, and large things, for which zoom could do harm.

The knobs were chosen on other scenes, those of the test split from seed 1,000,000 on.
"""

from pathlib import Path

from matplotlib.figure import Figure

from ..journal import write_json
from .questions import benchmark_question
from .scene import contains
from .study import NAMES, Setting, Study, accuracies, draw_over_flops


UNIFORM = {
    "scenes": ((2, 128), (4, 128), (8, 128), (16, 128), (32, 128)),
    "scenes70": ((32, 128), (128, 256)),
    "scenes140": ((128, 256),),
}
ZOOMED = {
    "scenes": ((10, 32, 1), (12, 64, 1), (18, 64, 2), (24, 40, 3), (24, 64, 3), (32, 128, 1)),
    "scenes70": ((30, 128, 3),),
    "scenes140": ((69, 256, 2),),
}
SETTINGS = tuple(Setting(*knobs, task=task) for task in UNIFORM for knobs in (*UNIFORM[task], *ZOOMED[task]))
SIZES = {"scenes": 35, "scenes70": 70, "scenes140": 140}
COLUMNS = {**NAMES, "large": "large", "all": "all"}
DRAWN = ("ocr", "large", "all")  # in the figure


def run_zoom_study(study: Study, output: Path) -> dict:
    """
    Measure all settings, and write `study_zoom.json` and `study_zoom.png` to the folder `output`.

    Returns:
        The contents of `study_zoom.json`: for each row the knobs, means over the questions, the accuracy by kind as in
        `study.json`, also of "all" kinds together, and with zoom `inside`, see `is_inside`, in percent. A row about
        signs of 1/35 includes large things.
    """
    large = {setting: setting._replace(task="large") for setting in SETTINGS if setting.task == "scenes"}
    asked = {setting: study.ask(setting) for setting in (*SETTINGS, *large.values())}
    rows = []
    for setting in SETTINGS:
        records = asked[setting] + (asked[large[setting]] if setting in large else [])
        row = {"size": SIZES[setting.task], **study.measure(setting, records)}
        if setting.zoom:
            row["inside"] = accuracies((record["part"], is_inside(record, row["size"])) for record in records)
        rows.append(row)
    found = {**study.made_with, "settings": rows}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "study_zoom.json", found)
    draw_figure(found, output)
    return found


def is_inside(record: dict, size: int) -> float:
    """
    1 if each of the things that a record's question names lies whole in a crop of a later round, or if there was none,
    in a scout, else 0.
    """
    kind, _, seed = record["id"].partition("-")
    _, *scouts = (crop["box"] for crop in record["looked_at"] if not crop["round"])
    final = [crop["box"] for crop in record["looked_at"] if crop["round"]] or scouts
    named = benchmark_question(int(seed), kind, size).named
    return float(all(any(contains(box, thing.box) for box in final) for _, thing in named))


def markdown(study: dict) -> str:
    """The table of docs/tiny.md: uniform crops and zoom by the signs' size and cost, accuracies in percent."""
    lines = [
        "| signs | `zoom` | `max_crops` | `num_tokens` | crops | GFLOPs | "
        + " | ".join(COLUMNS.values())
        + " | OCR inside |",
        "|---" * (len(COLUMNS) + 7) + "|",
    ]
    for row in sorted(study["settings"], key=lambda row: (row["size"], row["gflops"])):
        knobs = [f"1/{row['size']}", str(row["zoom"]), str(row["max_crops"]), str(row["num_tokens"])]
        costs = [f"{row['crops']:g}", f"{row['gflops']:.1f}"]
        scores = [f"{row['accuracy'][kind]['score']:.1f}" if kind in row["accuracy"] else "" for kind in COLUMNS]
        inside = f"{row['inside']['ocr']['score']:.1f}" if "inside" in row else ""
        lines.append(f"| {' | '.join([*knobs, *costs, *scores, inside])} |")
    return "\n".join(lines)


def draw_figure(study: dict, output: Path):
    """Accuracy over FLOPs: a panel for each size of signs, a color for each of `DRAWN`, uniform crops and zoom."""
    sizes = sorted({row["size"] for row in study["settings"]})
    figure = Figure(figsize=(4 * len(sizes), 4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes):
        for color, kind in enumerate(DRAWN):
            for zoomed, style, name in ((False, "o--", "grid"), (True, "s-", "zoom")):
                rows = [row for row in study["settings"] if row["size"] == size and bool(row["zoom"]) == zoomed]
                if rows := [row for row in rows if kind in row["accuracy"]]:
                    draw_over_flops(axes, rows, kind, fmt=style, color=f"C{color}", label=f"{COLUMNS[kind]}, {name}")
        axes.set_title(f"signs of 1/{size} of the height")
        axes.set_xlabel("GFLOPs of a question")
        axes.set_ylim(0, 103)  # points at 100 are whole
    figure.axes[0].set_ylabel("right answers, %")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(output / "study_zoom.png", dpi=110)
