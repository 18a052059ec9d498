"""Our model compared with a composition of transformers' SigLIP and Phi, on a checkpoint in the published layout."""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT, picture
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM, SiglipVisionConfig, SiglipVisionModel

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor


EAGER = {"attn_implementation": "eager"}  # the fused one differs from CPU to CPU by more than 1e-4


class Composition:
    """One picture, one question, no cache, no batch: the published model's computation, step by step."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        tensors = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= {name: tensor.float() for name, tensor in load_file(shard).items()}

        def part(prefix):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        text, vision = config["text_config"], config["vision_config"]
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(**{name: value for name, value in vision.items() if name != "model_type"}, **EAGER)
        )
        self.tower.load_state_dict(part("vision_model.vision_tower.vision_model."))
        rotary = {"rope_theta": 10000.0, "partial_rotary_factor": 0.4, "rope_type": "default"}
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        self.phi = PhiForCausalLM(PhiConfig(rope_parameters=rotary, **{name: text[name] for name in sizes}, **EAGER))
        self.phi.load_state_dict(part("language_model."))
        vision_size, text_size = vision["hidden_size"], text["hidden_size"]
        self.coord = nn.Sequential(nn.Linear(2, vision_size), nn.GELU(), nn.Linear(vision_size, vision_size))
        self.coord.load_state_dict(part("vision_model.coord_embed."))
        self.projector = nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))
        for index, layer in ((0, "linear_1"), (2, "linear_2")):
            self.projector[index].load_state_dict(part(f"multi_modal_projector.{layer}."))
        for module in (self.tower, self.phi):
            module.eval()

    def image_tokens(self, image: Image.Image, boxes: list, num_tokens: int) -> torch.Tensor:
        boxes = [(0, 0, *image.size), *boxes]
        share, rows = num_tokens // len(boxes), []
        for index, (left, top, right, bottom) in enumerate(boxes):
            crop = image.crop((left, top, right, bottom)).resize((384, 384), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(crop)).movedim(-1, 0)[None] / 255
            hidden = self.tower.embeddings((pixels - 0.5) / 0.5)
            for layer in self.tower.encoder.layers:
                hidden = layer(hidden, None)
            patches = hidden[0, 1:]
            keep = share if index < len(boxes) - 1 else num_tokens - share * (len(boxes) - 1)
            centre = torch.tensor([(left + right) / 2 / image.width, (top + bottom) / 2 / image.height])
            rows.append(patches[-min(keep, len(patches)) :] + self.coord(centre))
        return self.projector(torch.cat(rows))

    def answer(self, ids: list[int], image_tokens: torch.Tensor, steps: int) -> list[int]:
        place = ids.index(50297)
        embed = self.phi.get_input_embeddings()
        prompt = torch.cat([embed(torch.tensor(ids[:place])), image_tokens, embed(torch.tensor(ids[place + 1 :]))])
        new = []
        for _ in range(steps):
            embeds = torch.cat([prompt, embed(torch.tensor(new, dtype=torch.long))])
            new.append(int(self.phi(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax()))
        return new


@pytest.mark.parametrize(
    ("image", "boxes", "num_tokens"),
    [
        (picture(60, 50), [], 728),
        (picture(60, 50), [], 40),
        (ROOT / "examples" / "coffee.jpg", [(0, 0, 384, 400), (192, 0, 600, 400)], 100),
        (ROOT / "examples" / "coffee.jpg", [(0, 0, 384, 400), (192, 0, 600, 400)], 728),
    ],
)
@torch.no_grad()
def test_parity(checkpoint, image, boxes, num_tokens):
    composition = Composition(checkpoint)
    model = MCLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **EAGER)
    processor = MCLlavaProcessor.from_pretrained(checkpoint)
    image = image if isinstance(image, Image.Image) else Image.open(image)

    expected = composition.image_tokens(image, boxes, num_tokens)
    inputs = processor("What is on the table?", image, num_tokens=num_tokens)
    features = model.get_image_features(**{n: inputs[n] for n in processor.image_processor.model_input_names})
    assert len(expected) == min(num_tokens, 728)
    assert (features.pooler_output[0] - expected).abs().max() < 1e-4

    ids = processor("What is on the table?", image, model, num_tokens=num_tokens)["input_ids"][0].tolist()
    output = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == composition.answer(ids, expected, 5)
