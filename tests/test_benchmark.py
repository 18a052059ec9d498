"""The benchmark command: rows that run in two trees alternately, and the table."""

import argparse
import json

import benchmark
import pytest


LINE = {
    "row": "preprocess",
    "what": "A picture to tensors.",
    "device": "a card",
    "threads": 2,
    "rounds": 3,
    "parts": {
        "time (s)": {
            "before": {"median": 0.5, "least": 0.4, "most": 0.6},
            "after": {"median": 0.25, "least": 0.2, "most": 0.3},
            "ratio": {"median": 0.5, "least": 0.45, "most": 0.55},
        }
    },
}


def test_trees_alternate_and_pairs_are_compared(monkeypatch, tmp_path):
    values = iter([4.0, 1.0, 10.0, 5.0, 8.0, 2.0])  # before, after, before, ...
    asked = []

    def measure(name, tree, folder, options):
        asked.append(tree)
        return {"values": {"time (s)": next(values)}, "device": "cpu", "torch": "2"}

    monkeypatch.setattr(benchmark, "measure", measure)
    options = argparse.Namespace(rounds=3, threads=1, against="HEAD", device=None)
    record = benchmark.compare("preprocess", {"before": "old", "after": "new"}, options)
    assert asked == ["old", "new"] * 3
    found = record["parts"]["time (s)"]
    assert record["rounds"] == 3
    assert [found[label]["median"] for label in ("before", "after", "ratio")] == [8, 2, 0.25]
    assert (found["ratio"]["least"], found["ratio"]["most"]) == (0.25, 0.5)


@pytest.mark.slow
def test_a_training_batch_is_collated(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # of the other tests, too
    monkeypatch.setattr(benchmark, "PHOTOGRAPH", (640, 480))
    assert benchmark.ROWS["collate"](benchmark.Bench(tmp_path, "cpu"))["time (s)"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["identity", "--rounds", "0"], "--rounds 0 and --threads 1 must be 1 or more"),
        pytest.param(["identity", "--device", "nowhere"], "identity ended with status 1 in ", marks=pytest.mark.slow),
        (["identity", "--against", "nothing"], "nothing can't be checked out: pass --against a commit"),
    ],
)
def test_what_cannot_be_measured_is_no_traceback(monkeypatch, capfd, words, said):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *words, "--threads", "1"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert said in f"{ended.value.code}{capfd.readouterr().err}"


def test_the_newest_line_of_a_row_and_device_is_in_the_table(monkeypatch, tmp_path):
    page, saved = tmp_path / "costs.md", tmp_path / "benchmark.jsonl"
    page.write_text("Before.\n" + "\nold\n".join(benchmark.MARKERS) + "\nAfter.\n")
    old = {**LINE, "what": "An older line."}
    saved.write_text("".join(json.dumps(line) + "\n" for line in (old, LINE, {**LINE, "device": "a CPU"})))
    monkeypatch.setattr(benchmark, "PAGE", page)
    monkeypatch.setattr(benchmark, "SAVED", saved)
    benchmark.write_table()
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    assert "old" not in text and text.count("A picture to tensors.") == 2
    assert "| 0.5 | 0.25 | 0.5 (0.45 to 0.55) | 3 | a card, 2 threads |" in text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        benchmark.write_table()
