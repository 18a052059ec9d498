"""
Files that survive a kill: a journal from which a run resumes, and results that are written whole or not at all.

During a run, its journal holds the settings and then records, each a line of JSON, written batch by batch. An
interrupted run resumes there if its settings are the same. Nothing here depends on what the records contain.
"""

import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of safetensors, which is written in Rust, and of `torch.save`.
FULL_MESSAGES = (
    *(f"os error {number})" for number in FULL),
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
)
RUN_AGAIN = "free some space and run the command again"
PACKAGES = ("mc-llava", "torch", "transformers", "datasets", "pillow", "numpy", "bitsandbytes", "optimum-quanto")


# Journals


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Lock an output. Raises a ValueError if another run holds the lock: two would write into one journal."""
    try:
        with FileLock(output.with_name(output.name + ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another run writes {output}: wait, or choose another output") from error


def append(unfinished: Path, records: list[dict]):
    """Write records to a journal. They are on the disk when this returns."""
    with (
        storing(unfinished, "free some space and run the command again, it resumes"),
        open(unfinished, "ab") as journal,
    ):
        journal.writelines(map(to_line, records))
        journal.flush()
        os.fsync(journal.fileno())


def to_line(entry: dict) -> bytes:
    # Half of a surrogate pair, which may end a cut text, is not UTF-8; its escape is JSON.
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def to_text(text: str) -> str:
    """A text that any file and terminal takes: half of a surrogate pair becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def resume(
    unfinished: Path, settings: dict, batch_size: int, check: Callable[[int, dict], Any] = lambda index, record: None
) -> list[dict]:
    """
    The records of an interrupted run, and its journal cut to them; none and a new journal if there was no run.

    A batch of which a record is missing is asked again as a whole.

    Args:
        check: raises ValueError if the record at an index is none that the run can have written there.

    Raises:
        ValueError: if the journal is damaged, or is of a run with other settings.
    """
    records = []
    # Anything after the last newline was cut off by the kill.
    lines = unfinished.read_bytes().split(b"\n")[:-1] if unfinished.exists() else []
    if lines:
        with naming_damage(unfinished):
            found, *records = map(parse, lines)
        if records:  # without records, nothing is lost by starting again
            check_settings(found, settings, unfinished)
        with naming_damage(unfinished):
            for index, record in enumerate(records):
                check(index, record)
        records = records[: len(records) // batch_size * batch_size]
    with replacing(unfinished) as journal:
        journal.writelines(map(to_line, [settings, *records]))
    return records


@contextmanager
def naming_damage(unfinished: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{unfinished} is damaged ({error}): remove it, or the lines from there on") from error


def parse(line: bytes) -> dict:
    """The JSON object in a line. Raises a ValueError or a RecursionError if there is none."""
    entry = json.loads(line.decode())  # of bytes, json would guess the encoding
    if not isinstance(entry, dict):
        raise ValueError("a line is not an object")
    return entry


def check_settings(found: dict, wanted: dict, path: Path):
    """Raise a ValueError that names the first setting in which a file's run differs from this one."""
    if text := difference(found, wanted):
        raise ValueError(f"{path} has {text}: choose another output, or remove the file")


def difference(found: dict, wanted: dict) -> str:
    """The first setting in which two runs differ, in words; empty if there is none."""
    name = next((name for name in {**found, **wanted} if found.get(name) != wanted.get(name)), None)
    if name == "digest":  # of the source, under the same name
        return f"other rows, because {wanted['source']} has changed since"
    return "" if name is None else f"{name} {found.get(name)!r}, this run {wanted.get(name)!r}"


def versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on; None for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# Files


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends without an error: a reader never sees half of it."""
    draft = path.with_name(path.name + ".draft")
    try:
        with storing(path, RUN_AGAIN), open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def storing(path: Path, remedy: str) -> Iterator[None]:
    """Raise an OSError with what is written and a remedy if the disk or a quota is full: the system names neither."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        is_full = getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_MESSAGES)
        if not is_full:
            raise
        raise OSError(f"cannot write {path} ({error}): {remedy}") from error


def check_utf8(start: bytes):
    """Raise a ValueError if what begins a file of JSON is in another encoding, with its byte order mark or without."""
    encoding = json.detect_encoding(start)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"it looks like {encoding.upper()}: save it as UTF-8")


def write_json(path: Path, content: Any):
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # see `to_line`


def hash_file(digest: "hashlib._Hash", path: Path, advance: Callable[[int], Any] = lambda size: None):
    """Feed a file to a digest block by block, and the size of each block to `advance`."""
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            advance(len(block))
