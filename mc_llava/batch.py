"""
Ask about many images, from a file or a folder into a file, with one model or a pool of Ray actors.

A worker reads rows by their numbers, wherever it runs; `open_rows` alone knows the formats. During a run, its
journal `OUT.partial` holds the settings and then the records in the order of the rows, written batch by batch. An
interrupted run resumes there, with Ray or without, unless a picture has changed: records in the journal know the files
of their pictures. The finished file is `OUT`, and `OUT.origin` says what it was made of.
"""

import codecs
import hashlib
import json
import os
import time
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from . import FORMATS, GREEDY, FeatureCache, MCLlavaProcessor, check_knob, check_unicode, load_images
from .ahead import Ahead
from .engine import Engine, answer_all, ask_about, count_bytes
from .folders import find_model
from .journal import append, check_utf8, difference, hash_file, lock, parse, replacing, resume, to_line, versions
from .loading import UNKNOWN_COMMIT, find_device, identify, identify_code, load_model, load_processor, resolve_dtype


COLUMNS = ("id", "question", "image", "images")
CODE = ("engine.py", "batch.py")  # answers depend on these, in addition to the model's code
MAX_BLOCKS = 10_000  # for Ray Data to keep track of
MAX_RESTARTS = 10  # of one of Ray's workers
GPU_TIMEOUT = 1800  # seconds for a cluster without a GPU to start a node that has one


# Rows


class JsonLines:
    """An object per line: `{"image": "a.jpg", "question": "What is it?"}`. Paths are relative to the file's folder."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        self.starts, position, digest = array("Q"), 0, hashlib.sha256()
        with open(path, "rb") as file:
            try:
                check_utf8(file.read(4))
            except ValueError as error:
                raise ValueError(f"cannot read {path}: {error}") from error
            file.seek(0)
            for line in file:
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self.starts.append(position)
                position += len(line)
                digest.update(line)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:  # whose text counts the end of this line as a second one
            reason = f"{error.msg} at character {error.pos}"
            raise ValueError(f"the row is not JSON ({reason}): write one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"a line must hold an object with image and question, got {str(row)[:80]}")
        return row


class Parquet:
    """The same as columns; an image is a path, a file's bytes, or both as the Hub's data sets have them."""

    def __init__(self, path: Path):
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ValueError('reading parquet needs the package pyarrow: pip install "mc-llava[eval]"') from error
        self.path, self.folder, self.data_error = path, path.parent, ArrowException
        try:
            self.file = ParquetFile(path)
            names = self.file.schema_arrow.names
            self.columns = [name for name in COLUMNS if name in names]
            footer = self.file.metadata
            self.ends = list(accumulate(footer.row_group(group).num_rows for group in range(footer.num_row_groups)))
        except (ArrowException, ValueError, OverflowError) as error:
            raise ValueError(f"cannot read {path} as parquet: {error}") from error
        if not {"image", "images"} & set(names) and len(self):
            self._check_first(sorted(set(names) - set(COLUMNS)))
        self.group = self.table = None  # the one that was read last
        self.lock = Lock()  # of both

    def _check_first(self, others: list[str]):
        """`refuse_like_image` of the first cell that holds something, of each column that is not read."""
        first = {}
        for name in others:
            with suppress(self.data_error, ValueError, OverflowError, KeyError, OSError):  # it may hold anything
                batches = self.file.iter_batches(256, columns=[name])
                cells = (cell.as_py() for batch in batches for cell in batch.column(0))
                first[name] = next((cell for cell in cells if cell not in (None, "", [])), None)
        refuse_like_image(first, self.folder)

    @cached_property
    def digest(self) -> str:  # only the run asks for it, its workers need not read the whole file
        digest, size = hashlib.sha256(), self.path.stat().st_size
        name = f"Reading {self.path.name}"
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, leave=False) as progress:
            hash_file(digest, self.path, progress.update)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __getitem__(self, index: int) -> dict:
        with self.lock:
            return self._read(index)

    def _read(self, index: int) -> dict:
        group = bisect_right(self.ends, index)
        if group != self.group:
            try:
                self.group, self.table = group, self.file.read_row_group(group, columns=self.columns)
            except (OSError, self.data_error) as error:
                if getattr(error, "errno", None) is not None:  # the disk's, not the data's
                    raise
                raise ValueError(f"cannot read row group {group} of {self.path}: {error}") from error
        start = self.ends[group - 1] if group else 0
        if (rows := len(self.table)) != self.ends[group] - start:  # or rows would be taken for others
            raise ValueError(
                f"row group {group} of {self.path} has {rows} rows, its footer says otherwise: save it again"
            )
        try:
            return self.table.slice(index - start, 1).to_pylist()[0]
        except KeyError as error:  # of a time zone
            raise ValueError(f"a value can't be read: {error}") from error


@cache
def picture_suffixes() -> set[str]:
    """The suffixes of the formats that `load_image` reads, including those that need a plugin, as an error may say."""
    known = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
    return known | {".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif"}


def walk(top: Path) -> Iterator[Path]:
    """
    The files in a folder and its subfolders, and folders that can't be read. Links to folders are followed, to each
    folder once: links may form a cycle.
    """
    errors, entered = [], set()
    for folder, subfolders, files in os.walk(top, followlinks=True, onerror=errors.append):
        if (real := os.path.realpath(folder)) in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders.sort()  # so that each run enters a linked folder by the same path
        yield from (Path(folder, name) for name in files)
    yield from (Path(error.filename) for error in errors)


class Folder:
    """The images in a folder and its subfolders, by name. Linked folders count, each folder once."""

    def __init__(self, path: Path):
        self.folder = path
        suffixes, self.names, self.left_out = picture_suffixes(), [], []
        for file in walk(path):
            is_picture = file.suffix.lower() in suffixes and file.is_file()
            (self.names if is_picture else self.left_out).append(file.relative_to(path).as_posix())
        self.names.sort()
        self.left_out.sort()
        # A file name can be bytes that are not UTF-8.
        self.digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        return {"id": self.names[index], "image": self.names[index]}


def open_rows(source: str | os.PathLike) -> JsonLines | Parquet | Folder:
    """
    The rows of an input by their numbers, each `{"id", "question", "image" or "images"}`, any of which may be missing.

    Raises:
        ValueError: if there is no such file or folder, or it has another format or no rows.
    """
    path = Path(source)
    kinds = {".jsonl": JsonLines, ".parquet": Parquet}
    if path.is_dir():
        rows = Folder(path)
    elif path.suffix not in kinds or (path.exists() and not path.is_file()):
        raise ValueError(f"{source} is neither a .jsonl nor a .parquet file nor a folder of images")
    else:
        try:
            rows = kinds[path.suffix](path)
        except OSError as error:
            raise ValueError(f"cannot read {source}: {error}") from error
    if not len(rows):
        raise ValueError(f"{source} has no rows: pass another input")
    return rows


def find_images(row: dict, folder: Path) -> list[str | bytes | Path]:
    """
    What `load_image` reads for each image of a row: a file's path or bytes, or a data URI.

    Raises:
        ValueError: if an image has another form, or the row none, but something like one under another name.
    """
    held = [cells for cells in (row.get("image"), row.get("images")) if cells is not None and cells != []]
    if not held:
        refuse_like_image({name: cell for name, cell in row.items() if name not in COLUMNS}, folder)
        return []
    if len(held) > 1:
        raise ValueError("the row has both image and images: leave one of them out")
    cells = held[0]
    return [find_image(cell, folder) for cell in (cells if isinstance(cells, list) else [cells])]


def is_empty(question: Any) -> bool:
    return question is None or isinstance(question, str) and not question.strip()


def refuse_like_image(row: dict, folder: Path, names: str = "image or images"):
    """
    Raise a ValueError if a cell that is not read is an image: the answer would be given, or learned, without it.

    Args:
        names: under which an image would be read.
    """
    if other := next((name for name, cell in row.items() if is_like_image(cell, folder)), None):
        raise ValueError(f"there is no image, but {other!r:.80}, which holds one: call it {names}")


def is_like_image(cell: Any, folder: Path) -> bool:
    if isinstance(cell, list):
        return any(is_like_image(entry, folder) for entry in cell)
    if isinstance(cell, dict):
        return any(is_like_image(cell.get(name), folder) for name in ("bytes", "path"))
    if not isinstance(cell, str):
        return isinstance(cell, bytes)
    # A text may end like a picture's name.
    is_named = len(cell) < 1000 and Path(cell).suffix.lower() in picture_suffixes()
    return cell.startswith("data:image/") or is_named and stamp(Path(folder, cell)) is not None


def find_image(cell: str | bytes | dict, folder: Path) -> str | bytes | Path:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise ValueError(f"an image must be a path, a data URI or a file's bytes, got {type(cell).__name__}")
    if cell.lower().startswith(("http://", "https://")):  # rows must not make this machine send requests
        raise ValueError(f"{cell[:200]} is not fetched: download the image and name its file")
    return cell if cell.startswith("data:") else Path(folder, cell)


# Files of pictures


def stamp(path: Path) -> list[int] | None:
    """The size and two times of a file, which tell changes without reading it. No tool sets the second time back."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def digest_of(path: Path) -> str | None:
    """A digest of a regular file, None if there is none."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():  # a pipe would never end
            return None
        if path.stat().st_size:  # many files in /proc claim to be empty and never end
            hash_file(digest, path)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def find_changed(records: Iterable[dict]) -> str:
    """
    A message about the first picture that has changed since its record was made, with a remedy; empty if none has.

    Only files whose size or times have changed are read: a million unchanged pictures cost a million calls to `stat`.

    Raises:
        ValueError: if a record is malformed.
    """
    for record in records:
        check_asked(record)
        for name, size_and_times, digest in record.get("files", ()):
            if stamp(Path(name)) != size_and_times and digest_of(Path(name)) != digest:
                row = f"row {record['row']} (id {record['id']})"
                if digest is None:
                    state = "missing" if size_and_times is None else "not readable"
                    return f"{name} was {state} when it was asked about in {row}, and is there now: take it away again"
                return f"{name} has changed since {row} was asked about it: restore it"
    return ""


def check_record(index: int, record: dict, total: int):
    """Raise a ValueError if a run over `total` rows can't have written this record for row `index`."""
    if index >= total:
        raise ValueError(f"it has more records than the {total} rows")
    check_asked(record)
    if record["row"] != index:
        raise ValueError(f"a record of row {record['row']} is where that of row {index} must be")
    if [isinstance(record.get(name), str) for name in ("answer", "error")].count(True) != 1:
        raise ValueError(f"the record of row {index} must have an answer or an error")


def check_asked(record: dict):
    """Raise a ValueError if the number, the id or the files in a record are malformed."""
    if type(record.get("row")) is not int or not isinstance(record.get("id"), str):
        raise ValueError(f"a record must have a row and an id, got {str(record)[:80]}")
    files = record.get("files", [])
    if not isinstance(files, list) or not all(map(is_file_entry, files)):
        raise ValueError(f"the record of row {record['row']} has malformed files: {str(files)[:80]}")


def is_file_entry(entry: Any) -> bool:
    """Whether this is a file's name, with what `stamp` and `digest_of` returned for it."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    name, stamped, digest = entry
    is_stamp = isinstance(stamped, list) and len(stamped) == 3 and all(type(value) is int for value in stamped)
    return isinstance(name, str) and (stamped is None or is_stamp) and isinstance(digest, str | None)


# Answering


@dataclass(frozen=True)
class Job:
    """
    The questions and the model. A worker on any machine that sees the same files can do a part of it.

    Args:
        source: a JSON lines file, a parquet file or a folder of images.
        question: for the rows that have none.
        max_crops, num_tokens, zoom: by default as the processor was saved.
        batch_size: rows that are asked at once.
        dtype, device, quantize: of the model, see `load_model`.
    """

    source: str
    model: str
    question: str | None = None
    revision: str | None = None
    max_crops: int | None = None
    num_tokens: int | None = None
    zoom: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 200
    dtype: str = "auto"
    device: str | None = None
    quantize: str | None = None


class Worker:
    """
    A model that answers a job's rows. While it works on a batch, threads prepare the next one.

    Raises:
        ValueError: if the rows' digest is not the given one.
    """

    READS_AHEAD = True

    def __init__(self, job: Job, digest: str | None = None, processor: MCLlavaProcessor | None = None):
        self.job, self.rows = job, open_rows(job.source)
        if digest not in (None, self.rows.digest):
            raise ValueError(f"{job.source} has changed since the run began, or is another file here: start again")
        processor = processor or load_processor(job.model, job.revision)
        model = load_model(job.model, job.dtype, job.device, job.revision, job.quantize)
        knobs = processor.image_processor.fill_knobs(job.max_crops, job.num_tokens, job.zoom)
        options = {"batch_size": job.batch_size, "max_new_tokens": job.max_new_tokens, **knobs}
        # Without zoom, a recurring picture always needs the same tokens.
        options["feature_cache"] = FeatureCache(all_patches=knobs["zoom"] > 0)
        self.ahead = None  # the first row of the next batch, and what prepares it
        self.engine = Engine(model, processor, prefix_bytes=0, **options)  # so that it resumes with the same answers

    def answer_batch(self, start: int) -> list[dict]:
        """Records of the batch that starts at a row, in the order of the rows. A failed row's record has the error."""
        begin = time.perf_counter()
        rows = self._begin(start) if self.ahead is None or self.ahead[0] != start else self.ahead[1]
        try:
            read = rows.results()
            if self.READS_AHEAD and (following := start + self.job.batch_size) < len(self.rows):
                self.ahead = (following, rows := self._begin(following))
            asked = [row for row in read if "error" not in row[0]]
            answered = answer_all(self._answer_rows, asked, lambda row, reason: {**row[0], "error": reason})
        except BaseException:  # Ctrl-C, too
            rows.stop()
            raise
        records = {record["row"]: record for record in answered}
        seconds = round((time.perf_counter() - begin) / len(read), 4)
        return [{**records.get(record["row"], record), "seconds": seconds} for record, _ in read]

    def _begin(self, start: int) -> Ahead:
        """Start to prepare the batch that starts at a row."""
        indices = list(range(start, min(start + self.job.batch_size, len(self.rows))))
        return Ahead(self.prepare, indices, lambda row: count_bytes(row[1]))

    def prepare(self, index: int) -> tuple[dict, list]:
        """The same as `read`, with the part of preparing the images that needs no model."""
        record, images = self.read(index)
        try:
            return record, self.engine.prepare(images)
        except ValueError as error:
            return {**record, "error": str(error)}, []

    def read(self, index: int) -> tuple[dict, list[Image.Image]]:
        """The first fields of a row's record, and the row's images."""
        record, images = {"row": index, "id": str(index)}, []
        try:
            row = self.rows[index]
            record["id"] = str(index if row.get("id") is None else row["id"])
            question = self.job.question if is_empty(row.get("question")) else row["question"]
            if not isinstance(question, str) or is_empty(question):
                raise ValueError("the row has no question: give it one, or pass one for all rows")
            record["question"] = question
            check_unicode(question, "the question")
            found = find_images(row, self.rows.folder)
            if files := [path for path in found if isinstance(path, Path)]:
                # Before they are read, so that a file that is replaced meanwhile counts as changed.
                record["files"] = [[str(path), stamp(path), digest_of(path)] for path in files]
            images = load_images(found)
        except (ValueError, OverflowError, RecursionError) as error:  # of a date out of range, a line of brackets
            record["error"] = str(error)
        return record, images

    def _answer_rows(self, rows: list[tuple[dict, list[Image.Image]]]) -> list[dict]:
        try:
            replies = self.engine.answer([ask_about(images, record["question"]) for record, images in rows], **GREEDY)
        except torch.OutOfMemoryError as error:
            if len(rows) > 1:
                raise
            raise ValueError(f"too little memory: {error}") from error  # otherwise each new run would end at this row
        return [
            {
                **record,
                "answer": reply.text,
                "crops": reply.crops,
                "tokens": reply.image_tokens,
                "finish_reason": reply.finish_reason,
                **({"looked_at": reply.looked_at} if reply.looked_at else {}),  # with zoom
            }
            for (record, _), reply in zip(rows, replies)
        ]


class RayWorker(Worker):
    """A worker as Ray Data calls it: with columns of numbers, for columns that Arrow need not understand."""

    READS_AHEAD = False  # Ray decides which worker answers the next batch

    def __call__(self, batch: dict) -> dict:
        return {"records": [json.dumps(self.answer_batch(int(start))) for start in batch["start"]]}


def answer_with_ray(
    job: Job, starts: range, workers: int | None = None, digest: str | None = None
) -> Iterator[list[dict]]:
    """
    The batches in order, answered by an actor pool of Ray Data, on the cluster that Ray finds or on this machine.

    Args:
        workers: the number of actors, each with its own model; by default one per GPU of the cluster, at least one.
        digest: the digest of the rows, which each actor checks.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default, they go to Ray's developers
    try:
        import ray.data
    except ImportError as error:
        raise ValueError('the package ray is missing: pip install "mc-llava[ray]"') from error
    if not starts:
        return
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        needs_gpu = (job.device or ("cuda" if gpus else "cpu")).startswith("cuda")
        context = ray.data.DataContext.get_current()
        if needs_gpu and not gpus:
            context.wait_for_min_actors_s = GPU_TIMEOUT  # otherwise Ray waits forever if none starts
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False  # the run shows its own
        answered = ray.data.from_items(
            [{"start": start} for start in starts], override_num_blocks=min(len(starts), MAX_BLOCKS)
        ).map_batches(
            RayWorker,
            fn_constructor_args=(job, digest),
            batch_size=1,
            num_gpus=int(needs_gpu),
            compute=ray.data.ActorPoolStrategy(size=workers or max(gpus, 1)),
            # Ray Data's own defaults have no bound: a row that kills its worker would be retried forever.
            max_restarts=MAX_RESTARTS,
            max_task_retries=1,
        )
        for row in answered.iter_rows():
            yield json.loads(row["records"])
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray's workers failed: {error}") from error
    finally:
        ray.shutdown()


def run(job: Job, output: str | os.PathLike, *, use_ray: bool = False, workers: int | None = None) -> tuple[int, int]:
    """
    Run a job, or resume an interrupted run of it, and write `output`: a record per row, in the order of the rows.

    A record is `{"row", "id", "question", "answer", "finish_reason", "crops", "tokens", "seconds"}`, with zoom also
    `looked_at`. If the row failed, `error` stands in place of what an answer has.

    A run that has finished is not repeated if its settings were the same.

    Returns:
        The number of rows, and of those that failed.

    Raises:
        ValueError: if the input can't be read, a number is out of range, `output` exists and was not made by the same
            run, an interrupted run had other settings or other pictures, or another run writes `output`.
        OSError: if the disk is full. What was answered stays.
    """
    check_knob("batch_size", job.batch_size, 1)
    check_knob("max_new_tokens", job.max_new_tokens, 1)
    rows = open_rows(job.source)
    if isinstance(rows, Folder) and is_empty(job.question):
        raise ValueError(f"the images in the folder {job.source} have no questions: pass --question, one for all")
    if isinstance(rows, Folder) and rows.left_out:
        names = ", ".join(rows.left_out[:5]) + (", ..." if len(rows.left_out) > 5 else "")
        found = f"{len(rows.left_out)} files or folders of {job.source}"
        warnings.warn(f"{found} are left out because they are not pictures or can't be read: {names}", stacklevel=2)
    # Ray's workers start in their own folders, and a run may be resumed from another one. Each finds "tiny" itself.
    is_folder = find_model(job.model) == job.model and os.path.isdir(job.model)
    job = replace(
        job, source=os.path.abspath(job.source), model=os.path.abspath(job.model) if is_folder else job.model
    )
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name a file, which may be in it")
    if output.exists() and not origin_of(output).exists():  # before a lock is left next to the user's file
        raise ValueError(f"{output} already exists: choose another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock(output):
        return _run(job, rows, output, use_ray, workers)


def origin_of(output: Path) -> Path:
    return output.with_name(output.name + ".origin")


def _run(
    job: Job, rows: JsonLines | Parquet | Folder, output: Path, use_ray: bool, workers: int | None
) -> tuple[int, int]:
    unfinished = output.with_name(output.name + ".partial")
    origin = origin_of(output)
    processor = load_processor(job.model, job.revision)
    settings = describe_run(job, rows, processor, use_ray)
    if output.exists():
        counted = count_finished(output, origin, settings)
        unfinished.unlink(missing_ok=True)  # left if the run was killed between its last two lines
        return counted
    origin.unlink(missing_ok=True)  # of an output that was removed
    done, failed = resume_run(unfinished, settings)
    if not os.path.isdir(find_model(job.model)) and settings["revision"] != UNKNOWN_COMMIT:
        job = replace(job, revision=settings["revision"])  # a branch may move before a worker loads it
    total, starts = len(rows), range(done, len(rows), job.batch_size)
    digest = None if isinstance(rows, Parquet) else rows.digest  # of a parquet file, computed once
    if use_ray:
        batches = answer_with_ray(replace(job, dtype=settings["dtype"]), starts, workers, digest)
    else:
        batches = map(Worker(job, digest, processor).answer_batch, starts) if starts else ()
    with tqdm(total=total, initial=done, unit="row", desc=output.name) as progress:
        for records in batches:
            if records[0]["row"] != done:
                raise RuntimeError(f"row {records[0]['row']} came where {done} was due: please report this")
            append(unfinished, records)
            done, failed = done + len(records), failed + count_errors(records)
            progress.update(len(records))
    if done != total:
        raise RuntimeError(f"{total - done} of {total} rows were not answered: run the command again")

    finish(unfinished, output, origin)
    return done, failed


def resume_run(unfinished: Path, settings: dict) -> tuple[int, int]:
    """
    Resume the journal of an interrupted run, or begin a new one.

    Returns:
        The number of records in it, and of those with an error.

    Raises:
        ValueError: if the run had other settings or other pictures, or the journal is damaged.
    """
    check = partial(check_record, total=settings["rows"])
    records = resume(unfinished, settings, settings["batch_size"], check)
    if changed := find_changed(records):
        raise ValueError(f"{changed}, or remove {unfinished} to ask all rows again")
    return len(records), count_errors(records)


def count_errors(records: list[dict]) -> int:
    return sum("error" in record for record in records)


def describe_run(job: Job, rows: JsonLines | Parquet | Folder, processor: MCLlavaProcessor, use_ray: bool) -> dict:
    """All that the records of a run depend on, for its journal: a run with other settings doesn't resume it."""
    commit, dtype = identify(job.model, job.revision), job.dtype
    if not use_ray or job.device:  # on an unknown device, each of Ray's workers chooses
        dtype = str(resolve_dtype(job.model, dtype, job.device, job.revision)).removeprefix("torch.")
    return {
        **asdict(job),
        **processor.image_processor.fill_knobs(job.max_crops, job.num_tokens, job.zoom),
        "revision": commit,
        "dtype": dtype,
        "device": job.device if use_ray else find_device(job.device),  # Ray's workers may have others
        "digest": rows.digest,  # before what depends on it, see `difference`
        "rows": len(rows),
        "versions": versions(),
        "code": identify_code(*CODE),
    }


def finish(unfinished: Path, output: Path, origin: Path):
    """Turn a complete journal into the output and its origin, each of which is written whole or not at all."""
    with open(unfinished, "rb") as journal, replacing(origin) as file:
        file.write(next(journal))
        for record in map(json.loads, journal):
            if "files" in record:
                file.write(to_line({name: record[name] for name in ("row", "id", "files")}))
    with open(unfinished, "rb") as journal, replacing(output) as file:
        next(journal)
        for record in map(json.loads, journal):
            record.pop("files", None)
            file.write(to_line(record))
    unfinished.unlink()


def count_finished(output: Path, origin: Path, settings: dict) -> tuple[int, int]:
    """
    The number of rows of an output, and of those that failed.

    Raises:
        ValueError: if another run made it, or one about other pictures.
    """
    failed = []
    try:
        with open(origin, "rb") as file:
            lines = map(parse, file)
            if (found := next(lines, None)) is None:
                raise ValueError(f"{origin} is empty")
            if text := difference(found, settings):
                raise ValueError(f"it has {text}")
            changed = find_changed(lines)
        with open(output, "rb") as file:
            for index, record in enumerate(map(parse, file)):
                check_record(index, record, settings["rows"])
                failed.append("error" in record)
        if len(failed) != settings["rows"]:
            raise ValueError(f"it has {len(failed)} rows, {settings['source']} has {settings['rows']}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{output} already exists: choose another output ({error})") from error
    if changed:
        raise ValueError(f"{output} already exists: {changed}, or remove {output} to ask all rows again")
    return len(failed), sum(failed)
