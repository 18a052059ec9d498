"""
Measure a model of the 3B's size on this machine: `python scripts/full_size.py FOLDER` (13 GB of disk, not part of the
test suite).

1. Make a random checkpoint of 6.4 GB in the published layout in FOLDER/published, unless it exists.
2. Convert it to FOLDER/converted, unless it exists: 0 missing and 0 unexpected tensors.
3. Load it as `mc-llava ask` does, in the precision that this machine computes in, and ask about a photograph with more
   and more crops. This runs in a separate process, to measure only its peak memory.

The last line of output is JSON. The answers are gibberish: only time and memory are measured.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from make_published_checkpoint import FULL_SIZE, write_published_checkpoint
from PIL import Image
from transformers import AutoModel, AutoProcessor

from mc_llava import choose_dtype
from mc_llava.convert import convert
from mc_llava.loading import find_device


PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "hubble.jpg"
MAX_CROPS = (0, 4, 12)
REPEATS = 3
NEW_TOKENS = 16


def seconds(function, *args, **kwargs) -> float:
    """The median of a few runs, because single times on a shared machine vary."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def measure(folder: Path) -> dict:
    start = time.perf_counter()
    device = find_device()
    model = AutoModel.from_pretrained(folder, dtype=choose_dtype(device), trust_remote_code=True).to(device)
    load = time.perf_counter() - start
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.open(PHOTOGRAPH)}, {"type": "text", "text": "What shines here?"}]

    rows = []
    for max_crops in MAX_CROPS:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"max_crops": max_crops},
        ).to(device)
        images = {name: inputs.pop(name) for name in processor.image_processor.model_input_names}
        crops = len(images["pixel_values"])
        inputs["image_features"] = model.get_image_features(**images).pooler_output  # warms up, too
        options = {"do_sample": False, "eos_token_id": None}
        tower = seconds(model.get_image_features, **images)
        first = seconds(model.generate, **inputs, **options, max_new_tokens=1)
        whole = seconds(model.generate, **inputs, **options, max_new_tokens=NEW_TOKENS + 1)
        rows.append(
            {
                "crops": crops,
                "prompt_tokens": inputs["input_ids"].shape[1],
                "tower_seconds": round(tower, 2),
                "seconds_per_crop": round(tower / crops, 2),
                "first_token_seconds": round(first, 2),
                "seconds_per_further_token": round((whole - first) / NEW_TOKENS, 2),
            }
        )
    return {
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_seconds": round(load, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "rows": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    published, converted = arguments.folder / "published", arguments.folder / "converted"
    if arguments.measure_only:
        print(json.dumps(measure(converted)))
    else:
        if not published.exists():
            write_published_checkpoint(published, FULL_SIZE)
        if not converted.exists():
            convert(str(published), str(converted))
        sys.exit(subprocess.call([sys.executable, *sys.argv, "--measure-only"]))
