"""
Measure what users wait for: `python scripts/benchmark.py [ROW ...]`, by default all rows.

With `--against REVISION`, that commit is checked out into a temporary git worktree, and each row runs there and here
alternately, in fresh processes with the same number of threads. Each row prints one line of JSON with the median, the
smallest and the largest value, and the same for the ratios of pairs of runs, which vary less on a shared machine.

    python scripts/benchmark.py preprocess --against 6cf41cd >> docs/benchmark.jsonl
    python scripts/benchmark.py --table      # writes the table in docs/costs.md from docs/benchmark.jsonl

A row is a function here that takes a `Bench` and returns its values, {"name (unit)": number}. It uses only what both
commits export, and models with random weights.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tiny")  # both trees measure this one: an earlier commit's has other sizes
SAVED, PAGE = ROOT / "docs" / "benchmark.jsonl", ROOT / "docs" / "costs.md"
MARKERS = ("<!-- benchmark: written by scripts/benchmark.py --table -->", "<!-- end of benchmark -->")
PHOTOGRAPH = (4240, 2832)  # pixels: 97 crops
ROWS = {}


@dataclass
class Bench:
    """
    What a row measures with.

    Args:
        folder: for what a row prepares once for all of its processes.
        device: of the models.
    """

    folder: Path
    device: str

    def photograph(self, name: str = "photograph.jpg", mode: str = "RGB", **options) -> Path:
        """A file of 12 megapixels, made of a photograph. The name's suffix is its format."""
        from PIL import Image

        path = self.folder / name
        if not path.exists():
            picture = Image.open(ROOT / "examples" / "hubble.jpg").convert(mode)
            picture.resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, **options)
        return path

    def seconds(self, function: Callable, repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
        """The median time of a call, after a warm-up; with `time.process_time`, its CPU time."""
        times = []
        for _ in range(repeats + 1):
            gc.collect()
            self.wait()
            start = clock()
            function()
            self.wait()
            times.append(clock() - start)
        return statistics.median(times[1:])

    def wait(self):
        """Wait until the device is idle."""
        if self.device != "cpu":
            import torch

            torch.accelerator.synchronize()

    def peak(self, function: Callable) -> int:
        """The most memory that a call takes beyond what this process holds, in bytes (Linux)."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or the call would use what earlier ones have left
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = self._status("VmRSS")
        function()
        return self._status("VmHWM") - before

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def row(function: Callable[[Bench], dict[str, float]]):
    """Make a function a row. The table shows the first line of its docstring."""
    ROWS[function.__name__] = function
    return function


@row
def preprocess(bench: Bench) -> dict[str, float]:
    """A JPEG of 12 megapixels to the tensors of 97 crops."""
    from mc_llava import MCLlavaImageProcessor

    processor, path = MCLlavaImageProcessor(), bench.photograph(quality=90)

    def call():
        return processor(path, return_tensors="pt")

    return {"time (s)": bench.seconds(call), "CPU time (s)": bench.seconds(call, clock=time.process_time)}


def build_engine(bench: Bench, layers: int = 8, max_crops: int = 0):
    """
    An `Engine` over the 3B model's width, one layer of its tower and `layers` of its language model. By default it
    reads one crop as 728 tokens.
    """
    import torch

    from mc_llava import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor
    from mc_llava.engine import Engine
    from mc_llava.loading import load_processor

    tokenizer = load_processor(TINY).tokenizer
    published, ids = MCLlavaConfig(), {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**published.text_config.to_dict(), "num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    vision = {**published.vision_config.to_dict(), "num_hidden_layers": 1}
    config = MCLlavaConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = MCLlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return Engine(model, MCLlavaProcessor(MCLlavaImageProcessor(max_crops=max_crops), tokenizer), max_new_tokens=8)


@row
def chat(bench: Bench) -> dict[str, float]:
    """Turns of a conversation about a picture of 728 tokens, each answered with 8 (full width, 8 layers)."""
    from PIL import Image

    from mc_llava.engine import ask_about

    engine = build_engine(bench)
    (encoded,) = engine.encode([Image.open(ROOT / "examples" / "hubble.jpg")])
    engine.answer([ask_about([], "Hello")])  # warms up
    # Random words would be other tokens in the next turn's prompt.
    words = engine.processor.tokenizer("It is a bright star in the middle.")["input_ids"][:8]
    turns, times = ask_about([encoded], "What shines in the middle?"), []
    for question in ("How many spirals are there?", "What color is the sky behind them?", "Is that a star?", ""):
        written = iter(words)
        options = {"prefix_allowed_tokens_fn": lambda row, ids, words=written: [next(words)], "eos_token_id": None}
        bench.wait()
        start = time.perf_counter()
        (reply,) = engine.answer([turns], do_sample=False, **options)
        times.append(time.perf_counter() - start)
        turns = [*turns, {"role": "assistant", "content": reply.text}, {"role": "user", "content": question}]
    return {"first turn (s)": times[0], "later turns (s)": statistics.median(times[1:])}


@row
def second_question(bench: Bench) -> dict[str, float]:
    """The first token about an encoded picture of 728 tokens (full width, 8 layers)."""
    from PIL import Image

    from mc_llava.engine import ask_about

    engine = build_engine(bench)
    (encoded,) = engine.encode([Image.open(ROOT / "examples" / "hubble.jpg")])
    engine.answer([ask_about([], "Hello")], max_new_tokens=1)  # warms up
    times = []
    for question in ("What shines in the middle?", "How many spirals are there?", "What color is it?", "Is that it?"):
        bench.wait()
        start = time.perf_counter()
        engine.answer([ask_about([encoded], question)], max_new_tokens=1, do_sample=False)
        times.append(time.perf_counter() - start)
    return {"first question (s)": times[0], "later questions (s)": statistics.median(times[1:])}


@row
def first_token(bench: Bench) -> dict[str, float]:
    """The first token about a JPEG of 12 megapixels: 97 crops, 728 tokens (full width, 1 layer of each model)."""
    import torch

    from mc_llava import load_image

    engine, path = build_engine(bench, layers=1, max_crops=100), bench.photograph()
    model, processor = engine.model, engine.processor
    kept = {}

    def decode():
        kept["picture"] = load_image(path)

    def cut():
        kept["inputs"] = processor("What is it?", kept["picture"], return_tensors="pt").to(model.device)

    def tower():
        kept["features"] = model.encode_images(**kept["inputs"])

    def prefill():
        inputs = {name: kept["inputs"][name] for name in ("input_ids", "attention_mask")}
        model.generate(**inputs, image_features=kept["features"], max_new_tokens=1)

    parts = (decode, cut, tower, prefill)
    with torch.no_grad():
        return {f"{part.__name__} (s)": bench.seconds(part, repeats=1) for part in parts}


@row
def generate(bench: Bench) -> dict[str, float]:
    """`generate` from the pixels of 30 crops, without zoom (`tiny`, 8 new tokens)."""
    import torch
    from PIL import Image

    from mc_llava.loading import load

    model, processor, _ = load(TINY, dtype="float32", device=bench.device)
    inputs = processor("What is written on the blue sign?", Image.open(ROOT / "examples" / "scene1.jpg"))
    inputs = inputs.to(model.device)
    with torch.no_grad():
        return {"time (s)": bench.seconds(lambda: model.generate(**inputs, max_new_tokens=8, min_new_tokens=8))}


@row
def zoom(bench: Bench) -> dict[str, float]:
    """The questions of examples/questions.json, each asked alone (`tiny`)."""
    import inspect

    from PIL import Image

    from mc_llava.engine import Engine, ask_about
    from mc_llava.loading import load

    model, processor, _ = load(TINY, dtype="float32", device=bench.device)
    asked = json.loads((ROOT / "examples" / "questions.json").read_text(encoding="utf-8"))
    conversations = [ask_about([Image.open(ROOT / "examples" / row["image"])], row["question"]) for row in asked]

    def ask_all(**knobs):
        for conversation in conversations:
            Engine(model, processor, max_new_tokens=16, **knobs).answer([conversation])

    def seconds(**knobs):
        return bench.seconds(lambda: ask_all(**knobs), repeats=3)

    grid = seconds(max_crops=32, num_tokens=128)
    if "zoom" not in inspect.signature(Engine).parameters:
        return {"grid of 32 (s)": grid}
    zoomed = seconds(max_crops=24, num_tokens=40, zoom=3)
    return {"grid of 32 (s)": grid, "zoom (s)": zoomed, "zoom, of the grid's time (share)": zoomed / grid}


@row
def load_memory(bench: Bench) -> dict[str, float]:
    """Loading 12 megapixels: the peak of memory."""
    from PIL import ExifTags, Image

    from mc_llava import load_image

    turned, pixels = Image.Exif(), PHOTOGRAPH[0] * PHOTOGRAPH[1]
    turned[ExifTags.Base.Orientation] = 6
    paths = {
        "JPEG": bench.photograph(quality=90),
        "JPEG on its side": bench.photograph("turned.jpg", quality=90, exif=turned),
        "TIFF of CMYK on its side": bench.photograph("turned.tif", mode="CMYK", exif=turned),
    }
    load_image(Image.new("CMYK", (9, 9)))
    return {
        f"{name} (bytes a pixel)": bench.peak(lambda path=path: load_image(path)) / pixels
        for name, path in paths.items()
    }


@row
def collate(bench: Bench) -> dict[str, float]:
    """The training collator's batch of 4 pictures of 640 x 480, in one thread as in a worker."""
    import torch
    from PIL import Image

    from mc_llava.loading import load_processor
    from mc_llava.training import Collator, Recipe

    torch.set_num_threads(1)
    processor = load_processor(TINY)
    processor.image_processor.size, processor.image_processor.patch_size = {"height": 384, "width": 384}, 14
    path = bench.folder / "small.jpg"
    Image.open(bench.photograph(quality=90)).resize((640, 480)).save(path)
    turns = ["What is in the picture?", "A telescope above the Earth.", "Which color is it?", "Blue."]
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant") * 2, turns)]
    rows = [{"row": number, "id": str(number), "image": str(path), "messages": messages} for number in range(4)]
    recipe = Recipe(model=TINY, data="rows.json", images=str(bench.folder), output=str(bench.folder))
    collator = Collator(processor, recipe, 2048)
    return {"time (s)": bench.seconds(lambda: collator(rows), repeats=15)}


def write_checkpoint(bench: Bench, vision_layers: int, text_layers: int) -> str:
    """A folder with the 3B's widths, fewer layers and random weights in float16, as on the Hub."""
    from make_published_checkpoint import FULL_SIZE, write_published_checkpoint

    layers = {"vision": vision_layers, "text": text_layers}
    folder = bench.folder / f"{vision_layers}-{text_layers}"
    if not folder.exists():
        sizes = {part: {**FULL_SIZE[part], "num_hidden_layers": number} for part, number in layers.items()}
        write_published_checkpoint(folder, sizes)
    return str(folder)


@row
def precision(bench: Bench) -> dict[str, float]:
    """The 3B's file in float16, loaded with `--dtype auto`: 4 of 27 layers of the tower, 2 of 32 of Phi."""
    import torch

    from mc_llava.loading import load_model

    model = load_model(write_checkpoint(bench, 4, 2), device=bench.device)
    pixels = torch.zeros(2, 3, 384, 384, device=bench.device)
    fields = {
        "crop_coords": torch.zeros(2, 2, device=bench.device),
        "crop_num_tokens": torch.tensor([364, 364], device=bench.device),
        "image_grid_thw": torch.tensor([[2, 1, 1]], device=bench.device),
    }
    ids = torch.full((1, 755), 5, device=bench.device)
    with torch.no_grad():
        tower = bench.seconds(lambda: model.get_image_features(pixels, **fields), repeats=2)
        prefill = bench.seconds(lambda: model(ids, logits_to_keep=1, use_cache=False), repeats=2)
        token = bench.seconds(lambda: model(ids[:, :1], use_cache=False))
    return {"a crop (s)": tower / 2, "prefill of 755 tokens (s)": prefill, "a token (s)": token}


@row
def hash_encoder(bench: Bench) -> dict[str, float]:
    """The hash of the 3B's vision tower, coordinate embedding and projector, in float16."""
    import torch

    from mc_llava import MCLlavaConfig, MCLlavaForConditionalGeneration

    text = {"model_type": "phi", "num_hidden_layers": 1, "vocab_size": 51200}
    config = MCLlavaConfig(text_config={**text, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2})
    model = MCLlavaForConditionalGeneration._from_config(config, dtype=torch.float16).to(bench.device)
    return {"time (s)": bench.seconds(model.hash_encoder, repeats=3)}


@row
def host_reads(bench: Bench) -> dict[str, float]:
    """Reads from the device during `generate` on a picture of 12 megapixels."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import CountReads

    from mc_llava.loading import load_model, load_processor

    model, processor = load_model(TINY, device=bench.device), load_processor(TINY)
    found = {}
    for max_crops in (0, 100):
        inputs = processor("What is it?", bench.photograph(quality=90), max_crops=max_crops, num_tokens=128)
        inputs = inputs.to(bench.device)
        with CountReads() as counted:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        crops = len(inputs["pixel_values"])
        found[f"{crops} crop{'s' * (crops > 1)} (reads)"] = len(counted.reads)
    return found


@row
def loading_memory(bench: Bench) -> dict[str, float]:
    """Loading a float16 file in bfloat16: the peak of memory."""
    from mc_llava.loading import load_model

    folder, models = write_checkpoint(bench, 4, 4), []
    peak = bench.peak(lambda: models.append(load_model(folder, "bfloat16", "cpu")))
    return {"peak (times the weights)": peak / sum(parameter.nbytes for parameter in models[0].parameters())}


@row
def busy_device(bench: Bench) -> dict[str, float]:
    """
    `mc-llava batch` about 48 photographs of 12 megapixels, with a simulated device that takes 0.3 s for each.

    As on an accelerator, the values of pixels are made from their bytes there.
    """
    import torch
    from make_published_checkpoint import write_published_checkpoint
    from PIL import Image

    import mc_llava
    from mc_llava import MCLlavaForConditionalGeneration, MCLlavaModel
    from mc_llava.batch import Job, run

    folder, pictures = bench.folder / "small", bench.folder / "pictures"
    opened, used, open_picture = [], [], Image.open
    if not pictures.exists():
        write_published_checkpoint(folder)
        pictures.mkdir()
        for number in range(48):
            bench.photograph(f"{number}.jpg", quality=90 - number).rename(pictures / f"{number}.jpg")

    def open_and_note(*arguments, **options):
        opened.append(time.perf_counter())
        return open_picture(*arguments, **options)

    # On a real device, the CPU would not fill these tensors: they take no memory.
    def encode_crops(self, pixel_values, **options):
        used.append(0.3 * len(pixel_values) / 97)
        time.sleep(used[-1])
        return torch.zeros(1).expand(len(pixel_values), 27**2, self.config.vision_config.hidden_size)

    def look_up_bytes(crops, values):
        sent = torch.stack(crops)
        return torch.zeros(1).expand(len(sent), 3, *sent.shape[1:3])

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, input_ids.new_full((len(input_ids), 1), self.config.eos_token_id)], dim=1)

    MCLlavaModel.encode_crops, MCLlavaForConditionalGeneration.generate = encode_crops, generate
    Image.open = open_and_note
    if hasattr(mc_llava, "feature_cache_mc_llava"):  # before, the CPU made the values of pixels
        mc_llava.feature_cache_mc_llava.look_up_bytes = look_up_bytes
    output = bench.folder / f"answers-{os.getpid()}.jsonl"
    job = Job(str(pictures), str(folder), "What is in the picture?", batch_size=4, dtype="float32", device="cpu")
    run(job, output)
    whole = time.perf_counter() - opened[0]  # the model is loaded by then
    return {"time (s)": whole, "of it, the device is busy (share)": sum(used) / whole}


@row
def identity(bench: Bench) -> dict[str, float]:
    """Identifying a model folder of 1 GB again."""
    os.environ["HF_HOME"] = str(bench.folder / "cache")
    from mc_llava.loading import identify

    folder = bench.folder / "model"
    folder.mkdir(exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(10**9)
    return {"time (s)": bench.seconds(lambda: identify(str(folder)), repeats=1)}


@row
def many_small_pictures(bench: Bench) -> dict[str, float]:
    """Encoding 16 pictures of one crop each (width of the 3B model's vision tower, 2 layers)."""
    import torch
    from PIL import Image

    from mc_llava import FeatureCache, MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaImageProcessor

    published = MCLlavaConfig()
    vision = {**published.vision_config.to_dict(), "num_hidden_layers": 2}
    text = {**published.text_config.to_dict(), "num_hidden_layers": 1, "vocab_size": 51200}
    with torch.device(bench.device):
        model = MCLlavaForConditionalGeneration._from_config(MCLlavaConfig(text_config=text, vision_config=vision))
    pictures = [Image.new("RGB", (384, 384), (number, 0, 0)) for number in range(16)]
    processor = MCLlavaImageProcessor(max_crops=0)
    return {"time (s)": bench.seconds(lambda: FeatureCache(0).encode(model, processor, pictures), repeats=3)}


def measure_here(name: str, bench: Bench) -> dict:
    """What this process measures of a row, with what it runs on. `mc_llava` is what PYTHONPATH leads to."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    values = ROWS[name](bench)
    return {"values": values, "device": device_name(bench.device), "torch": torch.__version__}


def device_name(device: str) -> str:
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cores = fields.get("cpu cores")
    return fields.get("model name", platform.machine()) + (f", cores: {cores}" if cores else "")


def measure(name: str, tree: Path, folder: str, options: argparse.Namespace) -> dict:
    """What a fresh process measures of a row with the code of a tree."""
    command = [sys.executable, __file__, name, "--measure-in", folder, "--device", options.device or ""]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(options.threads)}
    run = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    if run.returncode:  # the process has said why
        raise SystemExit(f"{name} ended with status {run.returncode} in {tree}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(name: str, trees: dict[str, Path], options: argparse.Namespace) -> dict:
    """A row, measured in each tree alternately. "after" is this tree."""
    runs = {label: [] for label in trees}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for label, tree in trees.items():
                print(f"{name}: {label}, round {number + 1} of {options.rounds}", file=sys.stderr)
                runs[label].append(measure(name, tree, folder, options))
    last = runs["after"][-1]
    record = {"row": name, "what": ROWS[name].__doc__.strip().splitlines()[0]}
    record |= {"device": last["device"], "threads": options.threads, "rounds": options.rounds, "torch": last["torch"]}
    record |= {"revision": revision("HEAD"), "against": options.against and revision(options.against)}
    return record | {"parts": {part: summary(part, runs) for part in last["values"]}}


def summary(part: str, runs: dict[str, list[dict]]) -> dict:
    """The median and the spread of a part's values in each tree, and of the ratios of the pairs."""
    found = {label: [run["values"][part] for run in each if part in run["values"]] for label, each in runs.items()}
    if found.get("before"):  # an earlier commit may lack what is measured
        found["ratio"] = [after / before for before, after in zip(found["before"], found["after"]) if before]
    return {
        label: {name: round_to(function(values), 4) for name, function in STATISTICS.items()}
        for label, values in found.items()
        if values
    }


STATISTICS = {"median": statistics.median, "least": min, "most": max}


def round_to(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def revision(name: str) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", name], cwd=ROOT, text=True).strip()


def check_out(commit: str, stack: ExitStack) -> Path:
    """A temporary worktree of a commit."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tree")
    command = ["git", "worktree", "add", "--quiet", "--detach", folder, commit]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"{commit} can't be checked out: pass --against a commit of this repository")
    stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
    return folder


def write_table():
    """Writes the newest line of each row and device into the page, between its markers."""
    lines = SAVED.read_text(encoding="utf-8").splitlines()
    newest = {(record["row"], record["device"]): record for record in map(json.loads, lines)}
    text = ["| row | what | | before | after | ratio | pairs | machine |", "|---|---|---|---|---|---|---|---|"]
    for record in newest.values():
        machine = f"{record['device']}, {record['threads']} thread{'s' * (record['threads'] > 1)}"
        for part, found in record["parts"].items():
            before, after = (show(found.get(label)) for label in ("before", "after"))
            ratio = show(found.get("ratio"), with_spread=True)
            row = [f"`{record['row']}`", record["what"], part, before, after, ratio, record.get("rounds", ""), machine]
            text.append(f"| {' | '.join(map(str, row))} |")
    head, start, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    if not end:
        raise SystemExit(f"{PAGE} lacks the markers {' and '.join(MARKERS)}: write both where the table belongs")
    PAGE.write_text(head + start + "\n" + "\n".join(text) + "\n" + end + tail, encoding="utf-8")


def show(found: dict | None, with_spread: bool = False) -> str:
    if found is None:
        return ""
    median, least, most = (f"{round_to(found[name], 3):,g}" for name in STATISTICS)
    return f"{median} ({least} to {most})" if with_spread else median


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--against", metavar="REVISION", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each row and tree")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", help="of the models, by default the accelerator if there is one")
    parser.add_argument("--table", action="store_true", help=f"write the table in {PAGE.relative_to(ROOT)}")
    parser.add_argument("--measure-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"there are no rows {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    if min(options.rounds, options.threads) < 1:
        parser.error(f"--rounds {options.rounds} and --threads {options.threads} must be 1 or more")
    if options.table:
        write_table()
    elif options.measure_in is not None:
        from mc_llava.loading import find_device

        print(
            json.dumps(measure_here(options.rows[0], Bench(options.measure_in, find_device(options.device or None))))
        )
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worktree is removed then, too
        with ExitStack() as stack:
            trees = {"before": check_out(options.against, stack)} if options.against else {}
            for name in options.rows or ROWS:
                print(json.dumps(compare(name, {**trees, "after": ROOT}, options)), flush=True)


if __name__ == "__main__":
    main()
