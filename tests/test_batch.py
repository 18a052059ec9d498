"""`mc-llava batch` on each kind of input, killed and resumed, and on a Ray cluster of two workers."""

import codecs
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from filelock import FileLock
from helpers import picture, plain_reply
from PIL import Image

from mc_llava import MCLlavaProcessor, batch, cli
from mc_llava.batch import Job, open_rows, run
from mc_llava.loading import identify


KNOBS = {"max_crops": 2, "num_tokens": 30}
NEW_TOKENS = 4
SIZES = [(640, 400), (300, 200), (700, 700), (90, 60)]
with_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason='pyarrow is not here: pip install "mc-llava[eval]"'
)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not here: pip install "mc-llava[ray]"'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Fifteen rows in a file, of which six fail, and the folder of their images."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "images").mkdir()
    for index, size in enumerate(SIZES):
        picture(*size, seed=index).save(folder / "images" / f"{index}.png")
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:2000])
    rows = [{"id": f"q{i}", "image": f"images/{i % 4}.png", "question": f"What is number {i}?"} for i in range(7)]
    rows.insert(1, {"image": "images/cut.png", "question": "What?"})
    rows.insert(3, {"image": "images/0.png", "question": "What?<|im_end|>"})
    rows.insert(6, {"id": 6, "images": ["images/1.png", "images/3.png"], "question": "What differs?"})
    lines = [json.dumps(row) for row in rows] + ["", json.dumps({"question": "What is a galaxy?"}), "{no row"]
    lines.append(json.dumps({"image": "http://127.0.0.1:9/a.png", "question": "What?"}))
    lines += [json.dumps({"question": "A cut emoji: \ud83d"}), "[" * 100_000]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


ERRORS = {
    1: "is corrupt",
    3: "special token <|im_end|>",
    11: "the row is not JSON (Expecting property name enclosed in double quotes at character 1): write one object per",
    12: "is not fetched",
    13: "the question can't be encoded as UTF-8, character 13 is a byte in another encoding, or half of a surrogate",
    14: "recursion",
}


def job(folder: Path, model: Path, **changes) -> Job:
    options = {"batch_size": 3, "max_new_tokens": NEW_TOKENS, "dtype": "float32", "device": "cpu", **KNOBS}
    return Job(**{"source": str(folder / "rows.jsonl"), "model": str(model), **options, **changes})


def records_of(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        assert record.pop("seconds") >= 0
    return records


@pytest.fixture(scope="module")
def whole(folder, converted) -> list[dict]:
    """The output of one uninterrupted process for these rows."""
    output = folder / "whole.jsonl"
    assert run(job(folder, converted), output) == (15, 6)
    assert sorted(path.name for path in folder.iterdir()) == [
        "images",
        "rows.jsonl",
        "whole.jsonl",
        "whole.jsonl.lock",
        "whole.jsonl.origin",
    ]
    return records_of(output)


def test_each_row_has_its_answer_or_its_error(folder, converted, whole):
    assert [record["row"] for record in whole] == list(range(15))
    for record in whole:
        if record["row"] in ERRORS:
            assert ERRORS[record["row"]] in record["error"] and "answer" not in record
        else:
            assert set(record) == {"row", "id", "question", "answer", "crops", "tokens", "finish_reason"}
    assert [record["id"] for record in whole[:7]] == ["q0", "1", "q1", "3", "q2", "q3", "6"]
    assert [(whole[i]["crops"], whole[i]["tokens"]) for i in (0, 2, 6, 10)] == [(3, 30), (1, 30), (2, 60), (0, 0)]
    for row, image in ((0, 0), (2, 1), (5, 3)):
        path = folder / "images" / f"{image}.png"
        reply = plain_reply(converted, path, whole[row]["question"], {"max_new_tokens": NEW_TOKENS}, **KNOBS)
        assert whole[row]["answer"] == reply


def test_a_folder_with_one_question(folder, converted, tmp_path):
    asked = job(folder, converted, source=str(folder / "images"), question="What is number 0?")
    assert run(asked, tmp_path / "new" / "out.jsonl") == (5, 1)
    records = records_of(tmp_path / "new" / "out.jsonl")
    assert [record["id"] for record in records] == ["0.png", "1.png", "2.png", "3.png", "cut.png"]
    assert "is corrupt" in records[4]["error"]


@pytest.mark.parametrize("question", [None, " "])
def test_a_folder_without_a_question(folder, tmp_path, question):
    asked = job(folder, "no-model", source=str(folder / "images"), question=question)
    with pytest.raises(ValueError, match="images have no questions: pass --question"):
        run(asked, tmp_path / "out.jsonl")


def read_rows(source: Path, question: str | None = None) -> list[tuple[dict, list]]:
    """The records and pictures that a worker reads, without the model that it would ask."""
    worker = object.__new__(batch.Worker)
    worker.job, worker.rows = Job(str(source), "no-model", question), open_rows(source)
    return [worker.read(index) for index in range(len(worker.rows))]


def test_what_a_folder_leaves_out_is_told(tmp_path, converted):
    picture(9, 9).save(tmp_path / "a.png")
    for name in ("b.HEIC", "c.heif", "d.hif", "notes.txt", "clip.mov"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    read = read_rows(tmp_path, "What is it?")
    assert [record["id"] for record, _ in read] == ["a.png", "b.HEIC", "c.heif", "d.hif"]
    assert all("pillow-heif" in record["error"] for record, _ in read[1:])
    with pytest.warns(
        UserWarning,
        match="3 files or folders of .* are left out because .* can't be read: clip.mov, gone.png, notes.txt",
    ):
        run(job(tmp_path, converted, source=str(tmp_path), question="What is it?"), tmp_path.parent / "out.jsonl")


@with_pyarrow
def test_a_picture_under_another_name_is_not_left_out(tmp_path):
    """Otherwise the row would be answered without the picture, and nobody would notice."""
    import pyarrow
    from pyarrow import parquet

    picture(9, 9).save(tmp_path / "a.png")
    content, question = (tmp_path / "a.png").read_bytes(), "What is it?"
    lines = [{"img": "a.png"}, {"Image": "data:image/png;base64,AAAA"}, {"frames": ["a.png"]}, {"expected": "b.png"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": question, **row}) for row in lines))
    records = [record for record, _ in read_rows(tmp_path / "rows.jsonl")]
    for record, name in zip(records, ("img", "Image", "frames")):
        assert f"no image, but '{name}', which holds one: call it image or images" in record["error"]
    assert "error" not in records[3]

    for cell in (content, {"bytes": content, "path": "a.png"}, "a.png"):
        for cells in ([cell], [None] * 40 + [cell]):
            table = pyarrow.table({"picture": cells, "question": [question] * len(cells)})
            parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=8)
            with pytest.raises(ValueError, match="no image, but 'picture', which holds one"):
                open_rows(tmp_path / "rows.parquet")
    odd = pyarrow.array([10**18], pyarrow.timestamp("us"))  # a date beyond Python's
    parquet.write_table(pyarrow.table({"when": odd, "question": [question]}), tmp_path / "rows.parquet")
    ((record, _),) = read_rows(tmp_path / "rows.parquet")
    assert "error" not in record


def test_linked_folders_are_entered_once(tmp_path):
    for name in ("photos", "other/deep"):
        (tmp_path / name).mkdir(parents=True)
        picture(9, 9).save(tmp_path / name / "a.png")
    (tmp_path / "photos" / "2023").symlink_to(tmp_path / "other")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "other" / "deep")
    (tmp_path / "other" / "up").symlink_to(tmp_path)  # a loop
    rows = open_rows(tmp_path / "photos")
    assert rows.names == ["2023/deep/a.png", "a.png"] and not rows.left_out


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read all folders")
def test_a_folder_that_can_not_be_read_is_left_out(tmp_path):
    """Like a disk's lost+found."""
    picture(9, 9).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    rows = open_rows(tmp_path)
    assert rows.names == ["a.png"] and rows.left_out == ["closed"]


def test_a_name_that_is_no_utf8_and_what_is_no_file(tmp_path):
    name = b"caf\xe9.png"
    try:
        picture(9, 9).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/" + name)
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    ((record, images),) = read_rows(tmp_path, "What is it?")
    assert record["id"] == os.fsdecode(name) and images[0].size == (9, 9)


def test_image_beside_images_and_empty_cells(tmp_path):
    picture(9, 9).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    cells = [
        {"image": "a.png", "images": []},
        {"image": None, "images": ["a.png", "a.png"]},
        {"images": [], "image": []},
        {"image": "a.png", "images": ["a.png"]},
        {"image": "pipe.png"},
        {"image": "a.png", "question": ""},
        {"image": "a.png", "question": " \n"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": "What?", **row}) for row in cells))
    read = read_rows(tmp_path / "rows.jsonl")
    assert [len(images) for _, images in read] == [1, 2, 0, 0, 0, 0, 0]
    errors = [record.get("error", "") for record, _ in read]
    assert errors[:3] == [""] * 3 and "both image and images" in errors[3]
    assert "not a regular file" in errors[4] and all("no question" in error for error in errors[5:])
    for record, _ in read_rows(tmp_path / "rows.jsonl", "What is it?")[5:]:
        assert record["question"] == "What is it?"


@with_pyarrow
def test_a_time_zone_that_is_unknown_is_the_rows_error(tmp_path):
    import pyarrow
    from pyarrow import parquet

    ids = pyarrow.array([0], pyarrow.timestamp("us", tz="Nowhere/X"))
    parquet.write_table(pyarrow.table({"id": ids, "question": ["What?"]}), tmp_path / "rows.parquet")
    ((record, _),) = read_rows(tmp_path / "rows.parquet")
    assert "Nowhere/X" in record["error"]


@with_pyarrow
def test_parquet_with_equal_sizes_and_statistics_is_another_input(tmp_path):
    import pyarrow
    from pyarrow import parquet

    digests = set()
    for middle in ("m1?", "m2?"):
        parquet.write_table(pyarrow.table({"question": ["a?", middle, "z?"]}), tmp_path / f"{middle[:2]}.parquet")
        digests.add(open_rows(tmp_path / f"{middle[:2]}.parquet").digest)
    assert len(digests) == 2


@with_pyarrow
def test_parquet_with_broken_data(tmp_path):
    import pyarrow
    from pyarrow import parquet

    far = pyarrow.array([2**31 - 1, 1], pyarrow.int32()).cast(pyarrow.date32())  # Python's years have four digits
    parquet.write_table(pyarrow.table({"id": far, "question": ["a?", "b?"]}), tmp_path / "far.parquet")
    (far, _), (near, _) = read_rows(tmp_path / "far.parquet")
    assert "2147483647" in far["error"] and near["id"] == "1970-01-02"

    path = tmp_path / "cut.parquet"
    table = pyarrow.table({"question": [f"question {index}?" for index in range(200)]})
    parquet.write_table(table, path, row_group_size=100)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 56 + whole[60:])
    records = [record for record, _ in read_rows(path)]
    assert "cannot read row group 0 of" in records[99]["error"] and "cut.parquet" in records[99]["error"]
    assert "error" not in records[100]

    parquet.write_table(table, path)
    whole, count = path.read_bytes(), b"\x16\x90\x03"  # of 200 rows: in the footer, in the column and in its group
    place = whole.rindex(count)
    path.write_bytes(whole[:place] + b"\x16\x9a\x03" + whole[place + 3 :])
    records = [record for record, _ in read_rows(path)]
    assert all("row group 0 of" in record["error"] and "200 rows" in record["error"] for record in records)

    size = int.from_bytes(whole[-8:-4], "little")
    for position in range(len(whole) - 8 - size, len(whole) - 8, 7):
        path.write_bytes(whole[:position] + b"\xff" * 5 + whole[position + 5 :])
        try:
            open_rows(path)
        except ValueError as error:
            assert "cut.parquet" in str(error)


@with_pyarrow
def test_a_failing_disk_ends_the_run_and_fails_no_row(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    parquet.write_table(pyarrow.table({"question": ["a?"]}), tmp_path / "rows.parquet")
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_rows(tmp_path / "rows.parquet")


@with_pyarrow
def test_parquet_with_the_images_inside(folder, converted, whole, tmp_path):
    import pyarrow
    from pyarrow import parquet

    def cell(name):
        return {"bytes": (folder / "images" / name).read_bytes(), "path": None}

    by_path = {"bytes": None, "path": str(folder / "images" / "3.png")}
    table = {
        "id": ["a", "b", "c", "d"],
        "question": ["What is number 0?", "What?", None, "What is number 3?"],
        "image": [cell("0.png"), cell("cut.png"), cell("1.png"), by_path],
        "unread": [1, 2, 3, 4],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet", row_group_size=3)
    assert run(job(folder, converted, source=str(tmp_path / "rows.parquet")), tmp_path / "out.jsonl") == (4, 2)
    a, b, c, d = records_of(tmp_path / "out.jsonl")
    assert a["answer"] == whole[0]["answer"] and d["answer"] == whole[5]["answer"]
    assert "is corrupt" in b["error"] and "no question" in c["error"]
    rows = open_rows(tmp_path / "rows.parquet")
    assert [rows[i]["id"] for i in (3, 0, 2, 1)] == ["d", "a", "c", "b"] and "unread" not in rows[0]


def command(folder: Path, model: Path, output: Path, *more) -> list[str]:
    options = {**KNOBS, "batch_size": 3, "max_new_tokens": NEW_TOKENS, "dtype": "float32", "device": "cpu"}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    call = ["-m", "mc_llava", "batch", str(folder / "rows.jsonl"), "-o", str(output)]
    return [*call, "--model", str(model), *flags, *more]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), pytest.param(("--ray", "--workers", "2"), marks=with_ray)], ids=["one", "ray"])
def test_killed_and_started_again(folder, converted, whole, tmp_path, more):
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # not a cluster that runs or ran here
    process = processes.Process(*command(folder, converted, output, *more), env=environment)
    deadline = time.monotonic() + 500
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):  # the settings and a batch
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = journal.read_bytes()
    assert not output.exists()

    torn = kept[: -len(kept.splitlines()[-1]) // 2]  # in the middle of a record
    (tmp_path / "other.jsonl.partial").write_bytes(torn)
    assert run(job(folder, converted), tmp_path / "other.jsonl") == (15, 6)  # in one process, whichever kind started
    assert records_of(tmp_path / "other.jsonl") == whole

    journal.write_bytes(torn)
    result = processes.run(*command(folder, converted, output, *more), env=environment, text=True)
    assert result.returncode == 0, result.stderr
    assert "15 rows, 6 of them with an error" in result.stderr and "15/15" in result.stderr
    assert records_of(output) == whole and not journal.exists()


def test_rows_that_changed_since_the_run_began(folder):
    with pytest.raises(ValueError, match="rows.jsonl has changed since the run began"):
        batch.Worker(job(folder, "no-model"), "another digest")


def test_two_runs_on_one_output(folder, converted, tmp_path):
    output = tmp_path / "out.jsonl"
    with (
        FileLock(tmp_path / "out.jsonl.lock"),
        pytest.raises(ValueError, match="another run writes .*out.jsonl: wait"),
    ):
        run(job(folder, converted), output)
    assert not output.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_rows_that_changed_since_an_earlier_run(converted, tmp_path, monkeypatch, finished):
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "What is a galaxy?"}\n')
    asked = job(tmp_path, converted, batch_size=1, max_new_tokens=1)
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(batch, "finish", lambda *paths: None)
        run(asked, output)
    source.write_text(2 * '{"question": "What is a star?"}\n')
    with pytest.raises(ValueError, match="has other rows, because .*rows.jsonl has changed since"):
        run(asked, output)


def test_an_input_is_not_overwritten_and_gets_no_lock(folder, converted, tmp_path):
    shutil.copy(folder / "rows.jsonl", tmp_path)
    with pytest.raises(ValueError, match="rows.jsonl already exists: choose another output"):
        run(job(tmp_path, converted), tmp_path / "rows.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_output_that_is_a_folder(folder, converted, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is a folder: name a file"):
        run(job(folder, converted), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_only_a_regular_file_has_a_digest(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert batch.digest_of(tmp_path / "file") == hashlib.sha256().hexdigest()
    assert batch.digest_of(tmp_path) is None and batch.digest_of(tmp_path / "none") is None
    read = []
    with pytest.MonkeyPatch.context() as patch:  # reading a pipe would hang the test
        patch.setattr(batch, "hash_file", lambda digest, path: read.append(path))
        os.mkfifo(tmp_path / "pipe")
        assert batch.digest_of(tmp_path / "pipe") is None
        if (endless := Path("/proc/self/pagemap")).exists():
            assert batch.digest_of(endless) == hashlib.sha256().hexdigest()
    assert not read


@pytest.mark.slow
def test_what_is_there_is_not_overwritten(folder, converted, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    answer = batch.Worker.answer_batch
    monkeypatch.setattr(batch.Worker, "answer_batch", lambda self, start: 1 / 0 if start else answer(self, start))
    with pytest.raises(ZeroDivisionError):
        run(job(folder, converted), output)
    for changes, message in (
        ({"max_new_tokens": 5}, "has max_new_tokens 4, this run 5"),
        ({"source": str(folder / "images"), "question": "What?"}, "choose another output"),
        ({"source": os.path.relpath(folder / "rows.jsonl")}, "division by zero"),  # the same file, so the run resumes
    ):
        with pytest.raises((ValueError, ZeroDivisionError), match=message):
            run(job(folder, converted, **changes), output)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "identify_code", lambda *names: "another")
        with pytest.raises(ValueError, match="has code 'sha256:.*', this run 'another'"):
            run(job(folder, converted), output)
    output.write_text("mine")
    with pytest.raises(ValueError, match="already exists: choose another output"):
        run(job(folder, converted), output)
    assert output.read_text() == "mine"


def test_a_run_is_known_by_what_was_chosen_for_it(folder, converted, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "What is a galaxy?"}\n')
    asked = job(folder, converted, source=str(tmp_path / "rows.jsonl"), dtype="auto", device=None, max_crops=None)
    run(asked, tmp_path / "out.jsonl")
    settings = json.loads((tmp_path / "out.jsonl.origin").read_text())
    assert f"computing in {settings['dtype']} on {settings['device']}" in capsys.readouterr().err
    saved = MCLlavaProcessor.from_pretrained(converted).image_processor
    assert (settings["max_crops"], settings["num_tokens"], settings["zoom"]) == (saved.max_crops, 30, saved.zoom)
    assert settings["revision"] == identify(str(converted)) and settings["rows"] == 1


@pytest.mark.parametrize(
    ("rows", "message"), [([0, 1, 2], "12 of 15 rows were not answered"), ([3, 4, 5], "row 3 came where 0 was due")]
)
def test_rows_that_ray_loses_are_missed(folder, converted, whole, tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(batch, "answer_with_ray", lambda *_: [[whole[row] for row in rows]])
    with pytest.raises(RuntimeError, match=message):
        run(job(folder, converted), tmp_path / "out.jsonl", use_ray=True)
    assert not (tmp_path / "out.jsonl").exists()


def copy_pictures(folder, to):
    return shutil.copytree(folder / "images", to / "images", ignore=shutil.ignore_patterns("cut.png"))


def ask_for(pictures, converted, kind):
    if kind == "folder":
        return job(pictures, converted, source=str(pictures), question="What is it?", batch_size=2)
    lines = [{"images": [f"{index}.png", "3.png"], "question": "What is it?"} for index in range(4)]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job(pictures, converted, source=str(pictures / "rows.jsonl"), batch_size=2)


def stop(monkeypatch, asked, output, after=1):
    """Run until `after` batches are written."""
    answer = batch.Worker.answer_batch
    with monkeypatch.context() as patch:
        patch.setattr(
            batch.Worker, "answer_batch", lambda self, start: 1 / 0 if start >= 2 * after else answer(self, start)
        )
        with pytest.raises(ZeroDivisionError):
            run(asked, output)


@pytest.fixture(scope="module")
def stopped(folder, converted, tmp_path_factory):
    """A job that was stopped, its output, and the first line of its journal."""
    there = tmp_path_factory.mktemp("stopped")
    asked, output = ask_for(copy_pictures(folder, there), converted, "jsonl"), there / "out.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop(monkeypatch, asked, output)
    return asked, output, (there / "out.jsonl.partial").read_text().splitlines()[0]


class TestStartedAgain:
    """A run that was stopped at some point, and the changes that may have happened since."""

    @pytest.fixture
    def pictures(self, folder, tmp_path):
        return copy_pictures(folder, tmp_path)

    def replace(self, path, seed, keep_time=False):
        """Replace it with a picture of the same size in bytes, if possible."""
        found = path.stat()
        picture(*Image.open(path).size, seed=seed).save(path)
        if keep_time:
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    @pytest.mark.parametrize("kind", ["folder", "jsonl"])
    @pytest.mark.parametrize("keep_time", [False, True])
    def test_a_picture_that_was_asked_about_has_changed(
        self, pictures, converted, tmp_path, monkeypatch, kind, keep_time
    ):
        asked, output = ask_for(pictures, converted, kind), tmp_path / "out.jsonl"
        stop(monkeypatch, asked, output)
        before = (pictures / "1.png").read_bytes()
        self.replace(pictures / "1.png", 9, keep_time)
        message = (
            r"1.png has changed since row 1 \(id 1.*\) was asked about it: restore it, or remove .*out.jsonl.partial"
        )
        with pytest.raises(ValueError, match=message):
            run(asked, output)
        (pictures / "1.png").unlink()
        with pytest.raises(ValueError, match="1.png has changed|has other rows, because .*images has changed"):
            run(asked, output)
        (pictures / "1.png").write_bytes(before)  # at another time
        run(asked, output)
        records = records_of(output)
        assert [record["row"] for record in records] == [0, 1, 2, 3]
        assert not any("files" in record for record in records)

    def test_a_picture_that_was_missing_is_there(self, pictures, converted, tmp_path, monkeypatch):
        asked, output = ask_for(pictures, converted, "jsonl"), tmp_path / "out.jsonl"
        kept = (pictures / "0.png").read_bytes()
        (pictures / "0.png").unlink()
        stop(monkeypatch, asked, output)
        (pictures / "0.png").write_bytes(kept)
        message = (
            r"0.png was missing when it was asked about in row 0 \(id 0\), and is there now: take it away again, or "
        )
        with pytest.raises(ValueError, match=message + "remove .*out.jsonl.partial to ask all rows again") as error:
            run(asked, output)
        assert "restore" not in str(error.value)
        (pictures / "0.png").unlink()
        assert run(asked, output) == (4, 1)

    @pytest.mark.parametrize(
        "lines",
        [
            ["0", "1", "0", "1"],
            ["1", "0"],
            ["7", "8"],
            ["0", "{}"],
            ['{"a": 1}'],
            ["0", "1", "2", "3", "4", "5"],
            ['{"row": true, "id": "0", "answer": "A."}'],
            ['{"row": 0, "answer": "A."}'],
            ['{"row": 0, "id": "0"}'],
            ['{"row": 0, "id": "0", "answer": "A.", "error": "B."}'],
            ['{"files": [["a.png", null, null]]}'],
            *(
                ['{"row": 0, "id": "0", "answer": "A.", "files": ' + files + "}"]
                for files in (
                    "[[1, [1, 2, 3], null]]",
                    '[["a.png", null]]',
                    '[["a.png", [1, "2", 3], null]]',
                    "5",
                    "[5]",
                )
            ),
            ["0", "[" * 100_000],
            ["0", "\0" * 40],
            ["0", "\0{\0}"],
            ["0", "[1]"],
        ],
    )
    def test_a_journal_that_no_run_can_have_written(self, stopped, lines):
        asked, output, settings = stopped
        unfinished = output.with_name("out.jsonl.partial")
        usual = {str(row): {"row": row, "id": str(row), "question": "What?", "answer": "A."} for row in range(9)}
        lines = [json.dumps(usual[line]) if line in usual else line for line in lines]
        before = "".join(line + "\n" for line in [settings, *lines]).encode()
        unfinished.write_bytes(before)
        message = "out.jsonl.partial is damaged .*: remove it, or the lines from there on"
        with pytest.raises(ValueError, match=message):
            run(asked, output)
        assert unfinished.read_bytes() == before and not output.exists()

    def test_a_finished_run_names_one_remedy_and_its_reason(self, pictures, converted, tmp_path):
        asked, output = ask_for(pictures, converted, "jsonl"), tmp_path / "out.jsonl"
        run(asked, output)
        origin = tmp_path / "out.jsonl.origin"
        kept, before = origin.read_bytes(), (pictures / "0.png").read_bytes()
        with pytest.raises(ValueError) as error:
            run(replace(asked, max_new_tokens=5), output)
        assert str(error.value).endswith("choose another output (it has max_new_tokens 4, this run 5)")
        self.replace(pictures / "0.png", 9)
        with pytest.raises(
            ValueError, match="0.png has changed since row 0 .*restore it, or remove .*out.jsonl to ask"
        ) as error:
            run(asked, output)
        assert "choose another" not in str(error.value)
        (pictures / "0.png").write_bytes(before)
        settings = kept.splitlines(keepends=True)[0]
        for text, reason in (
            (b"", "out.jsonl.origin is empty"),
            (b"\0" * 9 + b"\n", "Expecting value"),
            (settings + b'{"row": 0, "files": []}\n', "a row and an id"),
            (settings + b'{"row": 0, "id": "0", "files": [[1, 2, 3]]}\n', "malformed files"),
            (settings + b"[1]\n", "not an object"),
            (settings + b"[" * 100_000, "recursion"),
        ):
            origin.write_bytes(text)
            with pytest.raises(ValueError, match=rf"out.jsonl already exists: choose another output \(.*{reason}"):
                run(asked, output)
        origin.write_bytes(kept)
        assert run(asked, output) == (4, 0)

    def test_a_picture_that_was_not_yet_asked_about_may_change(self, pictures, converted, tmp_path, monkeypatch):
        asked, output = ask_for(pictures, converted, "folder"), tmp_path / "out.jsonl"
        stop(monkeypatch, asked, output)
        picture(*SIZES[1], seed=1).save(pictures / "2.png")
        run(asked, output)
        records = records_of(output)
        assert records[2]["answer"] == records[1]["answer"]

    def test_unchanged_pictures_are_not_read_again(self, pictures, converted, tmp_path, monkeypatch):
        asked, output = ask_for(pictures, converted, "folder"), tmp_path / "out.jsonl"
        stop(monkeypatch, asked, output)
        read, digest_of = [], batch.digest_of
        monkeypatch.setattr(batch, "digest_of", lambda path: read.append(path.name) or digest_of(path))
        run(asked, output)
        assert sorted(read) == ["2.png", "3.png"]

    @pytest.mark.parametrize("killed", ["before the output", "after the output", "at the end"])
    def test_all_was_written(self, folder, converted, whole, tmp_path, monkeypatch, killed):
        output, unfinished = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
        origin, asked = tmp_path / "out.jsonl.origin", job(folder, converted)
        finish = batch.finish
        with monkeypatch.context() as patch:
            patch.setattr(batch, "finish", lambda *paths: None)
            run(asked, output)
        kept = unfinished.read_bytes()
        finish(unfinished, output, origin)
        if killed == "before the output":
            output.unlink()
        if killed != "at the end":
            unfinished.write_bytes(kept)
        monkeypatch.setattr(batch.Worker, "answer_batch", lambda self, start: pytest.fail("a row is asked again"))
        for _ in range(2):
            assert run(asked, output) == (15, 6)
            assert records_of(output) == whole
            assert sorted(path.name for path in tmp_path.iterdir()) == [
                "out.jsonl",
                "out.jsonl.lock",
                "out.jsonl.origin",
            ]

    def test_by_command(self, folder, converted, tmp_path, monkeypatch, capsys):
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr(sys, "argv", command(folder, converted, output)[1:])
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code
        first, second = [line for line in capsys.readouterr().err.splitlines() if "15 rows, 6 of them" in line]
        assert first.startswith(f"wrote {output}: ")
        assert second.startswith(f"{output} is complete, nothing was left to do: ")

    @pytest.mark.slow
    def test_all_was_written_by_another_run(self, pictures, converted, tmp_path):
        asked, output = ask_for(pictures, converted, "folder"), tmp_path / "out.jsonl"
        run(asked, output)
        written = output.read_bytes()
        with pytest.raises(ValueError, match="already exists: choose another output .*max_new_tokens 4, this run 5"):
            run(replace(asked, max_new_tokens=5), output)
        self.replace(pictures / "3.png", 9)
        with pytest.raises(
            ValueError, match="already exists: .*3.png has changed since row 3 .* or remove .*out.jsonl"
        ):
            run(asked, output)
        assert output.read_bytes() == written
        output.unlink()
        run(asked, output)
        for text in (b"mine\n", written, b"".join(written.splitlines(keepends=True)[:3])):
            output.write_bytes(text)
            if text != written:
                with pytest.raises(ValueError, match="already exists: choose another output"):
                    run(asked, output)
                assert output.read_bytes() == text


def test_a_byte_order_mark(tmp_path):
    line = json.dumps({"question": "What is it?"}).encode() + b"\n"
    for text, count in ((codecs.BOM_UTF8 + line, 1), (codecs.BOM_UTF8 + b"\n" + line + codecs.BOM_UTF8 + line, 2)):
        (tmp_path / "rows.jsonl").write_bytes(text)
        read = read_rows(tmp_path / "rows.jsonl")
        assert [record.get("question") for record, _ in read] == ["What is it?"] * count


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_rows_that_are_not_in_utf_8(tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_bytes('{"question": "What is it?"}\n'.encode(encoding))
    with pytest.raises(ValueError, match="rows.jsonl: it looks like UTF-.*save it as UTF-8"):
        open_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot read"),
        ("rows.csv", "a,b", "neither a .jsonl nor a .parquet file nor a folder"),
        ("empty.jsonl", "\n", "has no rows"),
        pytest.param("rows.parquet", "PAR1", "rows.parquet as parquet", marks=with_pyarrow),
    ],
)
def test_what_is_no_input(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_rows(tmp_path / name)


@pytest.mark.slow
@with_ray
def test_a_row_that_kills_its_worker_ends_the_run(folder, converted, monkeypatch):
    class Killed(batch.RayWorker):  # by value: Ray's processes can't import this file
        def __init__(self, job, digest):
            pass

        def answer_batch(self, start):
            if start == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return [{"row": start}]

    monkeypatch.setattr(batch, "RayWorker", Killed)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(RuntimeError, match="Ray's workers failed"):
        list(batch.answer_with_ray(job(folder, converted), range(0, 15, 3)))


class TestReadingAhead:
    def test_the_next_batch_is_prepared_while_this_one_is_answered(self, folder, converted, monkeypatch):
        worker = batch.Worker(job(folder, converted))
        begun, read, answer = threading.Event(), worker.read, worker.engine.answer
        rows = []

        def note(index):
            rows.append(index)
            if index == 3:
                begun.set()
            return read(index)

        def wait(conversations, **options):
            assert begun.wait(10), "nothing of the next batch is read"
            return answer(conversations, **options)

        monkeypatch.setattr(worker, "read", note)
        monkeypatch.setattr(worker.engine, "answer", wait)
        for start in (0, 3, 6):
            assert [record["row"] for record in worker.answer_batch(start)] == [start, start + 1, start + 2]
        worker.ahead[1].results()
        assert sorted(rows) == list(range(12)), "each row is read once"
        assert [record["row"] for record in worker.answer_batch(3)] == [3, 4, 5], "in any order"

    def test_ctrl_c_ends_it(self, folder, converted, monkeypatch):
        worker = batch.Worker(job(folder, converted))
        slow, read = threading.Event(), worker.read

        def wait(index):
            if index >= 3:
                slow.wait(10)
            return read(index)

        def interrupt(conversations, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(worker, "read", wait)
        monkeypatch.setattr(worker.engine, "answer", interrupt)
        before = set(threading.enumerate())
        with pytest.raises(KeyboardInterrupt):
            worker.answer_batch(0)
        slow.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()

    def test_a_machine_that_fails_in_a_thread_ends_the_run(self, folder, converted, monkeypatch):
        worker = batch.Worker(job(folder, converted))
        read = worker.read

        def fail(index):
            if index == 4:
                raise OSError("the disk is gone")
            return read(index)

        monkeypatch.setattr(worker, "read", fail)
        assert len(worker.answer_batch(0)) == 3
        with pytest.raises(OSError, match="the disk is gone"):
            worker.answer_batch(3)


def test_a_pipe_is_no_input(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="neither a .jsonl nor a .parquet file"):
        open_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_a_batch_that_fails_is_asked_one_by_one(folder, converted, monkeypatch, error):
    worker = batch.Worker(job(folder, converted))
    answer, asked = worker.engine.answer, []

    def fail(conversations, **options):
        asked.append(len(conversations))
        if any("number 1" in turn["content"][-1]["text"] for (turn,) in conversations):
            raise error("no answer")
        return answer(conversations, **options)

    monkeypatch.setattr(worker.engine, "answer", fail)
    records = worker.answer_batch(0)
    assert asked == [2, 1, 1] and "no answer" in records[2]["error"]
    assert records[0]["tokens"] == 30
