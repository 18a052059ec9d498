"""
Measure size, speed and agreement of quantized weights: `python scripts/quantized.py FOLDER [nf4] [int8] [int4]`.

If FOLDER doesn't exist, a random checkpoint with Phi-2's heads, an eighth of its weights and a small vision tower is
written there. Prints one line of JSON for full precision and for each quantization.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from make_published_checkpoint import write_published_checkpoint
from PIL import Image

from mc_llava import MCLlavaProcessor
from mc_llava.loading import QUANTIZED, load_model


SIZES = {
    "text": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 8},
    "vision": {"hidden_size": 144, "intermediate_size": 288, "num_attention_heads": 2, "num_hidden_layers": 2},
}
NEW_TOKENS = 16
QUESTIONS = ["What is on the table?", "What color is the cup?", "How many spoons are there?", "Where is it?"]
COFFEE = Path(__file__).parent.parent / "examples" / "coffee.jpg"


def main(folder: str, *names: str):
    if not Path(folder).exists():
        write_published_checkpoint(folder, SIZES)
    processor = MCLlavaProcessor.from_pretrained(folder)
    image = Image.open(COFFEE)
    batches = [processor(question, image, max_crops=0, num_tokens=50) for question in QUESTIONS]
    expected = []
    for name in (None, *(names or QUANTIZED)):
        model = load_model(folder, "float32", "cpu", quantize=name)
        size = sum(tensor.nbytes for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor))
        logits, seconds = [], []
        for inputs in batches:
            with torch.no_grad():
                logits.append(model(**inputs).logits[0])
            lengths = []
            for new_tokens in (1, NEW_TOKENS):
                start = time.perf_counter()
                model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
                lengths.append(time.perf_counter() - start)
            seconds.append((lengths[1] - lengths[0]) / (NEW_TOKENS - 1))
        logits = torch.cat(logits)
        expected = logits if name is None else expected
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
        row = {
            "weights": name or "float32",
            "megabytes": round(size / 1e6),
            "tokens_per_second": round(1 / sorted(seconds)[len(seconds) // 2], 1),
            "same_top_token": round(float(same), 3),
            "cosine_of_logits": round(float(torch.cosine_similarity(logits, expected, dim=-1).mean()), 4),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUANTIZED)}; by default all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(QUANTIZED):
        parser.error(f"{', '.join(sorted(unknown))} must be some of {', '.join(QUANTIZED)}")
    main(arguments.folder, *arguments.names)
