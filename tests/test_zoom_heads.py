"""Which heads find what is asked about: a planted head is found, and none if none was planted."""

import json

import numpy as np
import pytest
import torch
from helpers import small_model
from PIL import Image

from mc_llava import cli
from mc_llava.zoom_heads import Example, choose_heads, find_config, head_table, measure_heads, write_heads


PLANTED = (0, 2)


def examples(number: int, is_visible: bool = True):
    """A bright square somewhere on gray noise, or a square of the noise."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        pixels = rng.integers(60, 100, (300, 400, 3), dtype=np.uint8)
        left, top = int(rng.integers(0, 340)), int(rng.integers(0, 240))
        if is_visible:
            pixels[top : top + 60, left : left + 60] = 255
        yield Example(Image.fromarray(pixels), "Where is it?", (left, top, left + 60, top + 60))


def plant(model, processor):
    """
    Have one head attend to bright crops: its keys measure how far a token lies from dark to bright, and its query
    asks for that, whatever the question. Only the last dimension is used, which is not rotated.
    """
    features = []
    for value in (80, 255):
        inputs = processor("Where?", Image.new("RGB", (50, 50), (value,) * 3))
        images = {name: inputs[name] for name in processor.image_processor.model_input_names}
        features.append(model.get_image_features(**images).pooler_output[0].mean(0))
    layer = model.model.language_model.layers[PLANTED[0]]
    dark, bright = layer.input_layernorm(torch.stack(features))
    attention = layer.self_attn
    row = (PLANTED[1] + 1) * attention.head_dim - 1
    rows = slice(row + 1 - attention.head_dim, row + 1)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] = 0
        projection.bias[rows] = 0
    attention.k_proj.weight[row] = (bright - dark) / (bright - dark).norm()
    attention.q_proj.bias[row] = 40


@torch.no_grad()
def test_a_planted_head_is_found(processor, tmp_path):
    model = small_model(3)
    plant(model, processor)
    measured = measure_heads(model, processor, examples(60))
    chosen = choose_heads(measured, 1)
    assert [(head.layer, head.head) for head in chosen] == [PLANTED]
    assert chosen[0].rate > 0.6 > chosen[0].chance and chosen[0].low > chosen[0].chance
    assert len(measured) == 6 and " *" in head_table(measured, chosen).splitlines()[1]

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mc-llava", "kept": 1}))
    write_heads(find_config(tmp_path), chosen)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["kept"] == 1 and written["zoom_heads"][0]["head"] == PLANTED[1]


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_no_head_finds_what_can_not_be_seen(processor, tmp_path, seed):
    measured = measure_heads(small_model(seed), processor, examples(60, is_visible=False))
    assert choose_heads(measured, 3) == []
    (tmp_path / "config.json").write_text("{}")
    write_heads(tmp_path / "config.json", [])
    assert json.loads((tmp_path / "config.json").read_text())["zoom_heads"] is None


def test_heads_that_could_not_be_written_are_not_measured(monkeypatch):
    monkeypatch.setattr("mc_llava.loading.load_model", None)
    with pytest.raises(ValueError, match="somebody/model/config.json does not exist: pass a local model folder"):
        cli.zoom_heads(model="somebody/model", write=True)
    with pytest.raises(ValueError, match="the bundled tiny is not changed: pass --model FOLDER"):
        cli.zoom_heads(write=True)


def test_pictures_without_scouts_can_not_be_used(processor):
    with pytest.raises(ValueError, match="no picture could be used"):
        measure_heads(small_model(4), processor, [Example(Image.new("RGB", (40, 40)), "What?", (0, 0, 5, 5))])
