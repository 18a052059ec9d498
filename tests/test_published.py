"""The published code's recorded outputs: boxes, pixels and tokens equal, features and logits within 1e-4."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor


@pytest.fixture(scope="module")
def expected(published):
    return json.loads((published / "expected.json").read_text())


@pytest.fixture(scope="module")
def tensors(published):
    return load_file(published / "expected.safetensors")


@pytest.fixture(scope="module")
def images(published, expected):
    return {name: Image.open(published / entry["file"]) for name, entry in expected["images"].items()}


@pytest.fixture(scope="module")
def model(published):
    folder = published / "checkpoint"
    model, report = MCLlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def processor(published):
    return MCLlavaProcessor.from_pretrained(published / "checkpoint")


def test_crops(expected, tensors, images, processor):
    kept = 0
    for index, row in enumerate(expected["crops"]):
        image = images[row["image"]]
        plan = processor.image_processor.plan(*image.size, max_crops=row["max_crops"])
        if row["over_bound"]:
            assert len(plan) <= row["max_crops"] + 1
            continue
        kept += 1
        assert [list(crop.box) for crop in plan[1:]] == row["boxes"]
        out = processor.image_processor(image, max_crops=row["max_crops"], return_tensors="pt")
        assert torch.equal(out["crop_coords"], tensors[f"crops.{index}.coords"])
        assert torch.equal(out["pixel_values"][:, :, ::32, ::32], tensors[f"crops.{index}.pixels_every_32"])
    assert kept > 10


def test_features(expected, tensors, images, processor, model):
    for index, row in enumerate(expected["features"]):
        knobs = {"max_crops": row["max_crops"], "num_tokens": row["num_tokens"]}
        inputs = processor.image_processor(images[row["image"]], return_tensors="pt", **knobs)
        with torch.no_grad():
            out = model.get_image_features(**inputs)
        assert (out.last_hidden_state - tensors[f"features.{index}.vision"]).abs().max() < 1e-4
        assert (out.pooler_output[0] - tensors[f"features.{index}.projected"]).abs().max() < 1e-4


def test_logits_and_greedy_tokens(expected, tensors, images, processor, model):
    batched = 0
    for index, row in enumerate(expected["generation"]):
        ids = [[id for id in ids if id != 50298] for ids in row["input_ids"]]
        prompts = processor.batch_decode(ids)
        assert processor.tokenizer(prompts)["input_ids"] == ids
        own = [images[name] for name in row["images"]] or None
        knobs = {"max_crops": row["max_crops"], "num_tokens": row["num_tokens"]}

        inputs = processor(prompts, own, **knobs)
        assert inputs["input_ids"].shape[1] == row["sequence_length"]
        with torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        assert (logits - tensors[f"generation.{index}.last_logits"]).abs().max() < 1e-4
        for use_cache in (True, False):
            output = model.generate(
                **inputs, max_new_tokens=row["max_new_tokens"], do_sample=False, use_cache=use_cache
            )
            assert output[:, inputs["input_ids"].shape[1] :].tolist() == row["new_tokens"], (index, use_cache)

        if len(prompts) > 1:
            batched += 1
            for prompt, image, tokens in zip(prompts, own, row["new_tokens"]):
                alone = processor(prompt, image, **knobs)
                output = model.generate(**alone, max_new_tokens=row["max_new_tokens"], do_sample=False)
                assert output[0, alone["input_ids"].shape[1] :].tolist() == tokens
    assert batched
