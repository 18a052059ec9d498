"""
Write a random checkpoint in exactly the published layout: `python scripts/make_published_checkpoint.py FOLDER`.

Tensor names, dtype, shards, configurations and tokenizer files are as on the Hub. The weights are random, so answers
are gibberish. The model is small by default (9 MB); --full-size writes the 3B's sizes (6.4 GB). The tokenizer has the
published ids for special tokens and whitespace, and pairs of bytes instead of GPT-2's learned merges.
"""

import argparse
import json
from itertools import islice, product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PhiConfig, PhiForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.convert_slow_tokenizer import bytes_to_unicode


SMALL = {
    "text": {"hidden_size": 40, "intermediate_size": 80, "num_attention_heads": 2, "num_hidden_layers": 3},
    "vision": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3},
}
FULL_SIZE = {
    "text": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32, "num_hidden_layers": 32},
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27},
}
SHARD_BYTES = 5 * 10**9
SPECIAL_TOKENS = {50256: "<|endoftext|>", 50295: "<|im_end|>", 50296: "<|im_start|>", 50297: "<image>", 50298: "<pad>"}


def published_config(sizes: dict) -> dict:
    """`config.json` with the relevant keys of transformers 4.37's full dumps, with nulls and the stale code map."""
    return {
        "auto_map": {
            "AutoConfig": "configuration_llava.LlavaConfig",
            "AutoModel": "modeling_llava.LlavaForCausalLM",
            "AutoModelForCausalLM": "modeling_llava.LlavaForCausalLM",
        },
        "model_type": "mc-llava",
        "ignore_index": -100,
        "image_token_index": 50297,
        "projector_hidden_act": "gelu",
        "projector_tokens_num": 1,
        "text_config": {
            "auto_map": {"AutoConfig": "vince62s/phi-2-psy--configuration_phi.PhiConfig"},
            "bos_token_id": None,
            "do_sample": False,
            "eos_token_id": None,
            "hidden_act": "gelu_new",
            "max_length": 20,
            "max_position_embeddings": 2048,
            "model_type": "phi",
            "num_key_value_heads": sizes["text"]["num_attention_heads"],
            "pad_token_id": None,
            "partial_rotary_factor": 0.4,
            "resid_pdrop": 0.1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "torch_dtype": "float16",
            "vocab_size": 51200,
            **sizes["text"],
        },
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "image_size": 384,
            "max_length": 20,
            "model_type": "siglip_vision_model",
            "patch_size": 14,
            "torch_dtype": None,
            **sizes["vision"],
        },
        "vocab_size": 51200,
        "torch_dtype": "float16",
        "transformers_version": "4.37.2",
    }


def published_shapes(config: dict) -> dict[str, torch.Size]:
    """The published names and shapes, taken from transformers' SigLIP (with its pooling head) and Phi."""
    leave_out = ("auto_map", "model_type", "max_length", "do_sample", "torch_dtype")
    text, vision = (
        {name: value for name, value in config[part].items() if value is not None and name not in leave_out}
        for part in ("text_config", "vision_config")
    )
    with torch.device("meta"):
        tower, language_model = SiglipVisionModel(SiglipVisionConfig(**vision)), PhiForCausalLM(PhiConfig(**text))
    shapes = {f"vision_model.vision_tower.vision_model.{k}": v.shape for k, v in tower.state_dict().items()}
    shapes |= {f"language_model.{k}": v.shape for k, v in language_model.state_dict().items()}
    for module, inner, outer, first, second in (
        ("vision_model.coord_embed", 2, vision["hidden_size"], "0", "2"),
        ("multi_modal_projector", vision["hidden_size"], text["hidden_size"], "linear_1", "linear_2"),
    ):
        shapes[f"{module}.{first}.weight"] = torch.Size([outer, inner])
        shapes[f"{module}.{second}.weight"] = torch.Size([outer, outer])
        shapes |= {f"{module}.{layer}.bias": torch.Size([outer]) for layer in (first, second)}
    return shapes


def write_weights(folder: Path, shapes: dict[str, torch.Size], seed: int):
    """Write float16 weights in two or more shards of at most `SHARD_BYTES`, one shard in memory at a time."""
    torch.manual_seed(seed)
    total = 2 * sum(shape.numel() for shape in shapes.values())  # bytes
    limit = min(SHARD_BYTES, total // 2 + 2**20)
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > limit:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 2 * shape.numel()

    weight_map = {}
    with tqdm(total=len(shapes), unit="tensor", desc="Writing random weights") as progress:
        for number, names in enumerate(shards, start=1):
            tensors, file_name = {}, f"model-{number:05}-of-{len(shards):05}.safetensors"
            for name in names:
                if name.endswith("bias"):
                    tensors[name] = torch.zeros(shapes[name], dtype=torch.float16)
                elif "norm" in name:
                    tensors[name] = torch.ones(shapes[name], dtype=torch.float16)
                else:
                    std = shapes[name][-1] ** -0.5  # wide enough for images and questions to change the answer
                    tensors[name] = torch.empty(shapes[name], dtype=torch.float16).normal_(std=std)
                weight_map[name] = file_name
                progress.update()
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(folder: Path):
    """256 bytes, 50,000 merges, <|endoftext|>, runs of 31 to 2 spaces and 9 to 2 tabs, and ChatML's tokens."""
    letters = list(bytes_to_unicode().values())
    merges = list(islice(product(letters, letters), 50_000))
    vocabulary = {token: id for id, token in enumerate([*letters, *map("".join, merges), SPECIAL_TOKENS[50256]])}
    runs = [" " * length for length in range(31, 1, -1)] + ["\t" * length for length in range(9, 1, -1)]
    added = SPECIAL_TOKENS | {50257 + index: run for index, run in enumerate(runs)}

    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    write_json(folder / "added_tokens.json", {token: id for id, token in added.items() if id != 50256})
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": token.isspace(),
                    "rstrip": False,
                    "single_word": False,
                    "special": id in (50256, 50295, 50298),
                }
                for id, token in sorted(added.items())
            },
            "bos_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "pad_token": "<pad>",
            "tokenizer_class": "CodeGenTokenizer",
            "unk_token": "<|endoftext|>",
        },
    )


def write_published_checkpoint(folder: str | Path, sizes: dict = SMALL, seed: int = 0) -> Path:
    """Write the folder and return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = published_config(sizes)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "transformers_version": "4.37.2"})
    write_json(
        folder / "preprocessor_config.json",
        {
            "auto_map": {"AutoProcessor": "processing_llava.LlavaProcessor"},
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": 384, "width": 384},
        },
    )
    write_tokenizer(folder)
    write_weights(folder, published_shapes(config), seed)
    return folder


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that doesn't exist yet")
    parser.add_argument("--full-size", action="store_true", help="the 3B's sizes, 6.4 GB")
    arguments = parser.parse_args()
    write_published_checkpoint(arguments.folder, FULL_SIZE if arguments.full_size else SMALL)
