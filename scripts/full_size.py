"""
The 3B's size on this machine: `python scripts/full_size.py FOLDER` (13 GB of disk, not part of the test suite).

1. Make a random checkpoint of 6.4 GB in the published layout in FOLDER/published, unless it is there.
2. Convert it to FOLDER/converted, unless it is there: 0 missing and 0 unexpected tensors.
3. Load it in bfloat16 and ask about a photograph, in a process of its own, so that its peak memory is its own.

Ends with one line of JSON. The answer is gibberish: what is measured is time and memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from make_published_checkpoint import FULL_SIZE, write_published_checkpoint
from PIL import Image
from transformers import AutoModel, AutoProcessor

from mc_llava.convert import convert


PHOTOGRAPH = Path(__file__).parent.parent / "examples" / "hubble.jpg"
NEW_TOKENS = 9


def measure(folder: Path, max_crops: int) -> dict:
    def timed(function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        return result, time.perf_counter() - start

    model, load = timed(AutoModel.from_pretrained, folder, dtype=torch.bfloat16, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.open(PHOTOGRAPH)}, {"type": "text", "text": "What shines here?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"max_crops": max_crops},
    )
    images = {name: inputs.pop(name) for name in processor.image_processor.model_input_names}
    with torch.no_grad():
        features, encode = timed(model.get_image_features, **images)
    options = {"image_features": features.pooler_output, "do_sample": False}
    _, first = timed(model.generate, **inputs, **options, max_new_tokens=1)
    output, whole = timed(model.generate, **inputs, **options, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    crops = len(images["pixel_values"])
    return {
        "threads": torch.get_num_threads(),
        "crops": crops,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "load_seconds": round(load, 1),
        "seconds_per_crop": round(encode / crops, 2),
        "first_token_seconds": round(first, 2),
        "seconds_per_further_token": round((whole - first) / (NEW_TOKENS - 1), 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "answer": processor.decode(output[0, inputs["input_ids"].shape[1] :]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-crops", type=int, default=4)
    parser.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    published, converted = arguments.folder / "published", arguments.folder / "converted"
    if arguments.measure_only:
        print(json.dumps(measure(converted, arguments.max_crops)))
    else:
        if not published.exists():
            write_published_checkpoint(published, FULL_SIZE)
        if not converted.exists():
            convert(str(published), str(converted))
        sys.exit(subprocess.call([sys.executable, *sys.argv, "--measure-only"]))
