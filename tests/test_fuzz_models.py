"""
Random small models, pictures, plans and prompts, with and without zoom: each way to ask gives the same tokens in
float32.

`FUZZ_SEED` and `FUZZ_COUNT` choose other models and how many; a failure prints the seed that reproduces it.
"""

import os
import random

import pytest
import torch
from helpers import picture
from transformers import set_seed
from transformers.generation import utils as generation_utils

from mc_llava import (
    FeatureCache,
    MCLlavaConfig,
    MCLlavaForConditionalGeneration,
    MCLlavaImageProcessor,
    PrefixCache,
)


pytestmark = [pytest.mark.slow, pytest.mark.fuzz]
FIRST, COUNT = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_COUNT", 250))
IMAGE, PAD, WORDS = 1, 0, 96  # ids; the vocabulary


def random_model(rng: random.Random) -> tuple[MCLlavaForConditionalGeneration, MCLlavaImageProcessor]:
    patch = rng.choice([7, 8, 14])
    side = patch * rng.randint(2, 4)
    heads, layers = rng.randint(1, 4), rng.randint(1, 3)
    config = MCLlavaConfig(
        text_config={
            "model_type": "phi",
            "hidden_size": 16 * heads,
            "intermediate_size": 32,
            "num_attention_heads": heads,
            "num_key_value_heads": rng.choice([1, heads]),
            "num_hidden_layers": layers,
            "partial_rotary_factor": rng.choice([0.25, 0.5, 1.0]),
            "max_position_embeddings": rng.choice([96, 256]),
            "vocab_size": WORDS,
            "eos_token_id": None,
            "bos_token_id": None,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "image_size": side,
            "intermediate_size": 24,
            "num_attention_heads": rng.choice([1, 2]),
            "num_hidden_layers": rng.randint(1, 2),
            "patch_size": patch,
        },
        image_token_index=IMAGE,
        pad_token_id=PAD,
        eos_token_id=None,
        bos_token_id=None,
    )
    attention = rng.choice(["eager", "sdpa"])
    model = MCLlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:  # wide enough for every input to change the logits
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    knobs = {"max_crops": rng.randint(0, 7), "num_tokens": rng.randint(1, 16)}
    return model, MCLlavaImageProcessor(size={"height": side, "width": side}, patch_size=patch, **knobs)


def random_rows(rng: random.Random) -> list[tuple[list[int], list]]:
    """Up to three prompts, as ids with -1 in place of each picture, and up to two pictures for each."""
    rows = []
    for _ in range(rng.randint(1, 3)):
        images = [
            picture(rng.randint(1, 160), rng.randint(1, 160), rng.getrandbits(16)) for _ in range(rng.randint(0, 2))
        ]
        ids = [rng.randrange(2, WORDS) for _ in range(rng.randint(1, 12))]
        for place in sorted(rng.choices(range(len(ids) + 1), k=len(images)), reverse=True):
            ids.insert(place, -1)
        rows.append((ids, images))
    return rows


def to_inputs(rows, image_processor, **knobs) -> dict:
    """The fields for `generate`, padded on the left, with an `<image>` for each visual token."""
    images = [image for _, own in rows for image in own]
    fields = dict(image_processor(images, return_tensors="pt", **knobs)) if images else {}
    if knobs and images:
        fields["zoom_general_ids"] = torch.tensor([[5, 6, 7]] * len(images))
    crops = fields["image_grid_thw"][:, 0].tolist() if images else []
    counts = iter([int(part.sum()) for part in fields["crop_num_tokens"].split(crops)] if images else [])
    expanded = [[new for id in ids for new in ([IMAGE] * next(counts) if id < 0 else [id])] for ids, _ in rows]
    return {**pad(expanded), **fields}


def pad(rows: list[list[int]]) -> dict:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def tokens(model, inputs, **options) -> list[list[int]]:
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def disagreements(seed: int) -> list[str]:
    rng = random.Random(seed)
    set_seed(seed)
    model, image_processor = random_model(rng)
    rows = random_rows(rng)
    inputs = to_inputs(rows, image_processor)
    expected, beams = tokens(model, inputs), tokens(model, inputs, num_beams=2)
    found = {
        "one by one": [tokens(model, to_inputs([row], image_processor))[0] for row in rows],
        "uncached": tokens(model, inputs, use_cache=False),
        "static cache": tokens(model, inputs, cache_implementation="static", disable_compile=True),
    }
    kept = PrefixCache(max_bytes=rng.choice([0, 2**12, 2**14, 2**28]))
    for times in ("once", "twice"):
        found[f"keeping prefixes, {times}"] = tokens(model, inputs, prefix_cache=kept)
    found["one by one, keeping prefixes"] = [
        tokens(model, to_inputs([row], image_processor), prefix_cache=kept)[0] for row in rows
    ]
    if hasattr(generation_utils, "_slice_mm_encoder_output"):  # transformers 5.23
        found["chunked prefill"] = tokens(model, inputs, prefill_chunk_size=rng.randint(1, 9))
    found_beams = {
        "beams one by one": [tokens(model, to_inputs([row], image_processor), num_beams=2)[0] for row in rows]
    }
    if fields := {name: inputs[name] for name in image_processor.model_input_names if name in inputs}:
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        encoded = model.encode_images(**fields)
        short = pad([[IMAGE if id < 0 else id for id in ids] for ids, _ in rows])
        found["features"] = tokens(model, {**text, "image_features": encoded})
        found["features, short prompts"] = tokens(model, {**short, "image_features": encoded.split()})
        found_beams["beams, features"] = tokens(model, {**text, "image_features": encoded}, num_beams=2)
        found["short prompts, keeping prefixes"] = tokens(
            model, {**short, "image_features": encoded.split(), "prefix_cache": kept}
        )
    found_beams["beams, keeping prefixes"] = tokens(model, inputs, num_beams=2, prefix_cache=kept)
    return [way for way, got in found.items() if got != expected] + [
        way for way, got in found_beams.items() if got != beams
    ]


@pytest.mark.parametrize("part", range(10))
def test_every_way_to_ask_gives_the_same_tokens(part):
    for seed in range(FIRST + part, FIRST + COUNT, 10):
        assert disagreements(seed) == [], f"FUZZ_SEED={seed} FUZZ_COUNT=1"


def zoom_disagreements(seed: int) -> list[str]:
    rng = random.Random(f"zoom {seed}")
    set_seed(seed)
    model, image_processor = random_model(rng)
    text = model.config.text_config
    if rng.random() < 0.7:
        heads = range(rng.randint(1, 3))
        model.config.zoom_heads = [
            {"layer": rng.randrange(text.num_hidden_layers), "head": rng.randrange(text.num_attention_heads)}
            for _ in heads
        ]
    rows = random_rows(rng)
    knobs = {"zoom": rng.randint(1, 3), "max_crops": rng.randint(0, 40), "num_tokens": rng.randint(1, 30)}
    inputs = to_inputs(rows, image_processor, **knobs)
    batch = tokens(model, inputs)
    found = {"one by one": [tokens(model, to_inputs([row], image_processor, **knobs))[0] for row in rows]}
    if "zoom_options" in inputs:
        looked = model.zoom(**inputs)
        assert max(looked.crops_per_image) <= knobs["max_crops"] + 1
        assert max(looked.tokens_per_image) <= knobs["num_tokens"]
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found["zoom, then generate"] = tokens(model, {**texts, "image_features": looked})
        cache = FeatureCache(max_bytes=rng.choice([0, 2**10, 2**14, 2**28]))
        found["crops that are kept"] = tokens(model, {**inputs, "feature_cache": cache})
        found["crops that were kept"] = tokens(model, {**inputs, "feature_cache": cache})
    return [way for way, got in found.items() if got != batch]


@pytest.mark.parametrize("part", range(10))
def test_zoom_gives_the_same_tokens_in_a_batch_and_alone(part):
    for seed in range(FIRST + part, FIRST + COUNT // 2, 10):
        assert zoom_disagreements(seed) == [], f"FUZZ_SEED={seed} FUZZ_COUNT=2"
