"""`torchrun --nproc-per-node 2 tensor_parallel_worker.py FOLDER INPUTS OUTPUT`: see test_tensor_parallel.py."""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from mc_llava import PrefixCache


folder, inputs, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
)
text = model.config.text_config
for weight, rows in (
    (model.lm_head.weight, text.vocab_size),
    (model.model.language_model.layers[0].mlp.fc1.weight, text.intermediate_size),
):
    share = weight.to_local() if isinstance(weight, DTensor) else weight
    assert len(share) == rows // 2, (len(share), rows)

inputs = load_file(inputs)
with torch.no_grad():
    # A forward pass can't zoom: its boxes are compared instead.
    is_zooming = "zoom_options" in inputs
    logits = model.zoom(**inputs).crop_boxes if is_zooming else model(**inputs, logits_to_keep=1).logits
logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
prefix_cache = PrefixCache()
for _ in range(2):
    kept = model.generate(**inputs, prefix_cache=prefix_cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(kept, tokens)
assert prefix_cache.nbytes
save_file({"logits": logits.contiguous(), "tokens": tokens}, f"{output}.{torch.distributed.get_rank()}")
torch.distributed.destroy_process_group()
