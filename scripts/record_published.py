"""
Make tests/published/ from a full recording of the published code: `python scripts/record_published.py FOLDER`.

FOLDER holds `checkpoint/`, `images/`, `expected.json` and `expected.safetensors` (18 MB), which the published code
wrote for a random checkpoint. This script keeps 2.5 MB of the recorded values and computes none:

- the boxes of all crops, and samples of their pixels for the images that a question is asked about (as lossless WebP);
- every eighth visual token before and after the projector;
- all weights, but only some rows of the vocabulary's: the embeddings of all tokens that occur and, for the head, also
  every hundredth row and the runners-up of each generated token. The logits of these rows are kept.

The head is linear in 40 hidden values, which these rows determine: if their logits are right, so are all others.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor


EVERY_FEATURE, EVERY_TOKEN, RUNNERS_UP = 8, 100, 4
VOCABULARY = {
    "language_model.model.embed_tokens.weight": "embedded_ids",
    "language_model.lm_head.weight": "scored_ids",
    "language_model.lm_head.bias": "scored_ids",
}
NEVER = -1e4  # the bias of a token whose row is not kept


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for shard in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }


@torch.no_grad()
def runners_up(folder: Path, rows: list[dict]) -> set[int]:
    """The tokens with the highest logits at each step of the recorded answers."""
    model = MCLlavaForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    processor = MCLlavaProcessor.from_pretrained(folder / "checkpoint")
    found = set()
    for row in rows:
        prompts = processor.batch_decode([[id for id in ids if id != 50298] for ids in row["input_ids"]])
        images = [Image.open(folder / "images" / f"{name}.png") for name in row["images"]]
        inputs = processor(prompts, images or None, max_crops=row["max_crops"], num_tokens=row["num_tokens"])
        output = model.generate(
            **inputs,
            max_new_tokens=row["max_new_tokens"],
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        found |= {id for logits in output.logits for id in logits.topk(RUNNERS_UP).indices.flatten().tolist()}
    return found


def record(folder: Path, target: Path):
    expected = json.loads((folder / "expected.json").read_text())
    rows = expected["generation"]
    occurring = {50298} | {id for row in rows for ids in (*row["input_ids"], *row["new_tokens"]) for id in ids}
    scored = occurring | set(range(0, 51200, EVERY_TOKEN)) | runners_up(folder, rows)
    ids = {"embedded_ids": torch.tensor(sorted(occurring)), "scored_ids": torch.tensor(sorted(scored))}

    target.mkdir(parents=True)
    asked = {row["image"] for row in expected["features"]} | {name for row in rows for name in row["images"]}
    for name, entry in expected["images"].items():
        file = entry.pop("file")
        if name in asked:
            entry["file"] = f"{name}.webp"
            Image.open(folder / file).save(target / entry["file"], lossless=True, quality=100, method=6)
    (target / "expected.json").write_text(json.dumps({**expected, "every_feature": EVERY_FEATURE}) + "\n")
    (target / "config.json").write_text((folder / "checkpoint" / "config.json").read_text())

    kept = dict(ids)
    for name, tensor in load_file(folder / "expected.safetensors").items():
        kind, index, *_ = name.split(".")
        if kind == "features":
            kept[name] = tensor[::EVERY_FEATURE].clone()
        elif kind == "generation":
            kept[name] = tensor[:, ids["scored_ids"]].clone()
        elif expected["crops"][int(index)]["image"] in asked:
            kept[name] = tensor
    save_file(kept, target / "expected.safetensors")

    weights = load_weights(folder / "checkpoint")
    for name, which in VOCABULARY.items():
        weights[name] = weights[name][ids[which]]
    save_file(weights, target / "weights.safetensors")


def restore_checkpoint(recorded: Path, folder: Path) -> Path:
    """Write a checkpoint in the published layout, without a tokenizer. It generates only tokens with kept rows."""
    expected, weights = load_file(recorded / "expected.safetensors"), load_file(recorded / "weights.safetensors")
    for name, which in VOCABULARY.items():
        full = weights[name].new_full((51200, *weights[name].shape[1:]), NEVER if name.endswith("bias") else 0.0)
        full[expected[which]] = weights[name]
        weights[name] = full
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((recorded / "config.json").read_text())
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the full recording")
    parser.add_argument("target", type=Path, nargs="?", default=Path("tests/published"), help="must not exist yet")
    arguments = parser.parse_args()
    record(arguments.folder, arguments.target)
