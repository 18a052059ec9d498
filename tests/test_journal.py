"""Journals, files that are written whole or not at all, and the digest of the code that made them."""

import errno
import hashlib
import json
import os
import re
import shutil

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from mc_llava import batch, journal, loading
from mc_llava.evaluation import running


SETTINGS = {"model": "tiny", "limit": 3}
RECORDS = [{"row": row} for row in range(5)]


def write_journal(path, records, settings=SETTINGS):
    path.unlink(missing_ok=True)
    journal.append(path, [settings, *records])


def test_a_run_resumes_behind_its_last_whole_batch(tmp_path):
    path = tmp_path / "out.partial"
    assert journal.resume(path, SETTINGS, 2) == [] and json.loads(path.read_text()) == SETTINGS
    write_journal(path, RECORDS)
    with open(path, "ab") as file:
        file.write(b'{"row": 5')  # torn by the kill
    assert journal.resume(path, SETTINGS, 2) == RECORDS[:4]
    assert path.read_bytes().count(b"\n") == 5 and journal.resume(path, SETTINGS, 2) == RECORDS[:4]
    assert [file.name for file in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("changed", [{"limit": 4}, {"new": 1}])
def test_a_run_with_other_settings_does_not_resume(tmp_path, changed):
    path = tmp_path / "out.partial"
    write_journal(path, RECORDS)
    before = path.read_bytes()
    (name,) = changed
    with pytest.raises(ValueError, match=f"out.partial has {name} .*, this run {changed[name]}: choose another"):
        journal.resume(path, SETTINGS | changed, 2)
    assert path.read_bytes() == before
    write_journal(path, [])  # no record is lost
    assert journal.resume(path, SETTINGS | changed, 2) == []


def test_what_was_written_is_on_the_disk(tmp_path, monkeypatch):
    """Everything has left Python's buffers when the file is synchronized."""
    synchronized = []
    monkeypatch.setattr(os, "fsync", lambda file: synchronized.append(os.fstat(file).st_size))
    journal.append(tmp_path / "out.partial", RECORDS)
    journal.write_json(tmp_path / "out.json", RECORDS)
    assert synchronized == [(tmp_path / name).stat().st_size for name in ("out.partial", "out.json")]


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "out.partial"
    path.write_bytes(b"{}\n" + b"\0" * 20 + b"\n")
    with pytest.raises(ValueError, match="out.partial is damaged"):
        journal.resume(path, {}, 1)


def test_one_run_at_a_time(tmp_path):
    output = tmp_path / "out.jsonl"
    with FileLock(tmp_path / "out.jsonl.lock"), pytest.raises(ValueError, match="another run writes .*out.jsonl"):
        with journal.lock(output):
            pass
    with journal.lock(output):
        pass


def test_half_of_a_surrogate_pair_comes_back(tmp_path):
    record = {"reply": "caf\u00e9 \ud83d"}
    assert json.loads(journal.to_line(record)) == record and "caf\u00e9".encode() in journal.to_line(record)
    journal.write_json(tmp_path / "out.json", record)
    assert json.loads((tmp_path / "out.json").read_text()) == record


def test_a_file_is_replaced_by_all_of_the_next_or_stays(tmp_path):
    path = tmp_path / "out.json"
    journal.write_json(path, [1])
    with pytest.raises(ZeroDivisionError), journal.replacing(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "[\n 1\n]\n"
        raise ZeroDivisionError
    assert path.read_text() == "[\n 1\n]\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=str,
)
def test_a_full_disk_is_named_with_its_remedy(error):
    with (
        pytest.raises(OSError, match=r"cannot write out \(.*\): free some space"),
        journal.storing("out", "free some space"),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("CUDA error")], ids=str)
def test_another_failure_is_not_taken_for_a_full_disk(error):
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"), journal.storing("out", "free some space"):
        raise error


def test_a_file_is_hashed_block_by_block(tmp_path):
    content, sizes, digest = b"0123456789" * 250_000, [], hashlib.sha256()
    (tmp_path / "file").write_bytes(content)
    journal.hash_file(digest, tmp_path / "file", sizes.append)
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
    assert sum(sizes) == len(content) and len(sizes) > 1


@pytest.mark.parametrize("names", [batch.CODE, running.CODE], ids=["batch", "evaluation"])
def test_changed_code_has_another_digest(tmp_path, monkeypatch, names):
    before = loading.identify_code(*names)
    for file in loading.ROOT.glob("*_mc_llava.py"):
        shutil.copy(file, tmp_path)
    shutil.copytree(loading.PACKAGE, tmp_path / "mc_llava", ignore=shutil.ignore_patterns("*_mc_llava.py", "tiny"))
    monkeypatch.setattr(loading, "ROOT", tmp_path)
    monkeypatch.setattr(loading, "PACKAGE", tmp_path / "mc_llava")
    assert loading.identify_code(*names) == before
    known = {before}
    for file in (loading.ROOT / "modeling_mc_llava.py", loading.PACKAGE / "loading.py", loading.PACKAGE / names[-1]):
        file.write_text(file.read_text() + "\n")
        known.add(loading.identify_code(*names))
    assert len(known) == 4
    (loading.PACKAGE / "cli.py").write_text("")
    assert loading.identify_code(*names) in known, "no answer depends on it"
