"""`torchrun --nproc-per-node 2 tensor_parallel_worker.py FOLDER INPUTS OUTPUT`: see test_tensor_parallel.py."""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from mc_llava import MCLlavaForConditionalGeneration


folder, inputs, output = sys.argv[1:]
model = MCLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
for weight in (model.lm_head.weight, model.model.language_model.layers[0].mlp.fc1.weight):
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    whole = model.config.text_config.vocab_size if weight is model.lm_head.weight else None
    whole = whole or model.config.text_config.intermediate_size
    assert processes == 2 and local.shape[0] == whole // processes, (processes, local.shape)

inputs = load_file(inputs)
with torch.no_grad():
    logits = model(**inputs, logits_to_keep=1).logits
logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
save_file({"logits": logits.contiguous(), "tokens": tokens}, f"{output}.{rank}")
torch.distributed.destroy_process_group()
