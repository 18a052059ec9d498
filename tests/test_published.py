"""
The published code's recorded outputs: boxes, pixels and tokens equal, features and logits within 1e-4.

tests/published/ is the part of the recording that is in the repository: scripts/record_published.py says what it
contains, and why its logits stand for all. If the full recording is available, it and its tokenizer are compared, too.
Attention is eager: with the fused one, some CPUs are off by 1.2e-4 instead of 2.4e-5.
"""

import hashlib
import json

import pytest
import torch
from helpers import ROOT
from PIL import Image
from record_published import restore_checkpoint
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaImageProcessor, MCLlavaProcessor


SHIPPED, FULL = ROOT / "tests" / "published", ROOT.parent / "shared" / "published"
IMAGE, PAD = 50297, 50298


class Recording:
    """What was recorded, and our model with the recorded weights."""

    def __init__(self, folder, checkpoint):
        self.checkpoint = checkpoint
        self.expected = json.loads((folder / "expected.json").read_text())
        self.tensors = load_file(folder / "expected.safetensors")
        files = {name: entry["file"] for name, entry in self.expected["images"].items() if "file" in entry}
        self.images = {name: Image.open(folder / file) for name, file in files.items()}
        self.image_processor = MCLlavaImageProcessor()
        self.model, report = MCLlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.encode_once(self.model.model)

    @staticmethod
    def encode_once(model):
        """The tower, which takes most of the time, encodes each pass of crops once, for all questions about them."""
        encode, kept = model.encode_crops, {}

        def encode_crops(pixel_values: torch.Tensor) -> torch.Tensor:
            digest = hashlib.sha256(pixel_values.numpy()).digest()
            if digest not in kept:
                kept[digest] = encode(pixel_values)
            return kept[digest]

        model.encode_crops = encode_crops

    def inputs(self, prompts: list[list[int]], images: list[str], **knobs) -> dict[str, torch.Tensor]:
        """Model inputs for prompts with one `<image>` per image, padded on the left."""
        if not images:
            ids = torch.tensor(prompts)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = dict(self.image_processor([self.images[name] for name in images], return_tensors="pt", **knobs))
        crops = iter(inputs["crop_num_tokens"].split(inputs["image_grid_thw"][:, 0].tolist()))
        rows = [
            torch.tensor([one for id in ids for one in [id] * (int(next(crops).sum()) if id == IMAGE else 1)])
            for ids in prompts
        ]
        ids = pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **inputs}


@pytest.fixture(scope="module", params=["shipped", pytest.param("full", marks=pytest.mark.slow)])
def recording(request, tmp_path_factory) -> Recording:
    if request.param == "shipped":
        return Recording(SHIPPED, restore_checkpoint(SHIPPED, tmp_path_factory.mktemp("shipped") / "checkpoint"))
    if not FULL.exists():
        pytest.skip(f"the full recording is not here ({FULL}): tests/published/ alone is compared with")
    return Recording(FULL, FULL / "checkpoint")


def test_crops(recording):
    compared = 0
    for index, row in enumerate(recording.expected["crops"]):
        size = recording.expected["images"][row["image"]]
        plan = recording.image_processor.plan(size["width"], size["height"], max_crops=row["max_crops"])
        if row["over_bound"]:
            assert len(plan) <= row["max_crops"] + 1
            continue
        assert [list(crop.box) for crop in plan[1:]] == row["boxes"]
        if image := recording.images.get(row["image"]):
            assert image.size == (size["width"], size["height"])
            out = recording.image_processor(image, max_crops=row["max_crops"], return_tensors="pt")
            assert torch.equal(out["crop_coords"], recording.tensors[f"crops.{index}.coords"])
            pixels = out["pixel_values"][:, :, ::32, ::32]
            assert torch.equal(pixels, recording.tensors[f"crops.{index}.pixels_every_32"])
            compared += 1
    assert compared >= 10


@torch.no_grad()
def test_features(recording):
    every = recording.expected.get("every_feature", 1)
    for index, row in enumerate(recording.expected["features"]):
        knobs = {"max_crops": row["max_crops"], "num_tokens": row["num_tokens"]}
        inputs = recording.image_processor(recording.images[row["image"]], return_tensors="pt", **knobs)
        out = recording.model.get_image_features(**inputs)
        for name, features in (("vision", out.last_hidden_state), ("projected", out.pooler_output[0])):
            assert list(features.shape) == [row["shape"][0], {"vision": 48, "projected": 40}[name]]
            assert (features[::every] - recording.tensors[f"features.{index}.{name}"]).abs().max() < 1e-4


def questions(recording):
    """For each recorded question: its row, its prompts as ids, and its numbers of crops and tokens."""
    for row in recording.expected["generation"]:
        prompts = [[id for id in ids if id != PAD] for ids in row["input_ids"]]
        yield row, prompts, {"max_crops": row["max_crops"], "num_tokens": row["num_tokens"]}


@torch.no_grad()
def test_logits(recording):
    scored = recording.tensors.get("scored_ids", slice(None))
    for index, (row, prompts, knobs) in enumerate(questions(recording)):
        inputs = recording.inputs(prompts, row["images"], **knobs)
        assert inputs["input_ids"].shape[1] == row["sequence_length"]
        logits = recording.model(**inputs, logits_to_keep=1).logits[:, -1, scored]
        assert (logits - recording.tensors[f"generation.{index}.last_logits"]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens(recording, use_cache):
    """In a batch as recorded, and each prompt alone."""
    batched = 0
    for row, prompts, knobs in questions(recording):
        asked = [(prompts, row["images"], row["new_tokens"])]
        if len(prompts) > 1:
            batched += 1
            alone = zip(prompts, row["images"], row["new_tokens"])
            asked += [([prompt], [image], [tokens]) for prompt, image, tokens in alone]
        for some_prompts, images, new_tokens in asked:
            inputs = recording.inputs(some_prompts, images, **knobs)
            output = recording.model.generate(
                **inputs,
                max_new_tokens=row["max_new_tokens"],
                do_sample=False,
                pad_token_id=PAD,
                use_cache=use_cache,
            )
            assert output[:, inputs["input_ids"].shape[1] :].tolist() == new_tokens
    assert batched


def test_the_processor_makes_the_recorded_prompts(recording):
    if not (recording.checkpoint / "tokenizer.json").exists():
        pytest.skip("the published tokenizer (3 MB) is not shipped: the full recording has it")
    processor = MCLlavaProcessor.from_pretrained(recording.checkpoint)
    for row, prompts, knobs in questions(recording):
        texts = processor.batch_decode(prompts)
        assert processor.tokenizer(texts)["input_ids"] == prompts
        inputs = processor(texts, [recording.images[name] for name in row["images"]] or None, **knobs)
        expected = recording.inputs(prompts, row["images"], **knobs)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
