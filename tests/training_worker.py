"""
`mc-llava train` as one of several processes, which records what it saw: see test_sharded_training.py.

accelerate shards on accelerators only. torch can also shard on a CPU: here accelerate is made to do so.
"""

import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

from mc_llava import cli, training


construct, collate, step = AcceleratorState.__init__, training.Collator.__call__, Trainer.training_step
seen = {"images": [], "crops": [], "sharded": None}


def shard_on_a_cpu(self, *args, fsdp_plugin=None, **kwargs):
    construct(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does itself


def note_batch(self, rows):
    batch = collate(self, rows)
    seen["images"].append(sum(row["image"] is not None for row in rows))
    seen["crops"].append(len(batch["pixel_values"]))
    return batch


def note_parameters(self, model, *args, **kwargs):
    seen["sharded"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return step(self, model, *args, **kwargs)


if os.environ["SHARD_ON_A_CPU"] == "1":
    AcceleratorState.__init__ = shard_on_a_cpu
training.Collator.__call__ = note_batch
Trainer.training_step = note_parameters
cli.app(standalone_mode=False)
Path(f"{os.environ['SEEN']}.{os.environ.get('RANK', 0)}").write_text(json.dumps(seen))
