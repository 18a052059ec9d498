"""`python vllm_worker.py REQUESTS ANSWERS`: see test_vllm.py. The answers are token ids."""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


if __name__ == "__main__":  # vLLM starts processes that import this file
    requests = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(**requests["engine"], trust_remote_code=True, dtype="float32")
    prompts = [
        {
            "prompt": row["prompt"],
            **({"multi_modal_data": {"image": [Image.open(path) for path in row["images"]]}} if row["images"] else {}),
            **({"mm_processor_kwargs": row["knobs"]} if row["knobs"] else {}),
        }
        for row in requests["rows"]
    ]
    sampling = SamplingParams(temperature=0, max_tokens=requests["max_tokens"])
    answers = model.generate(prompts, sampling, use_tqdm=False)
    Path(sys.argv[2]).write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
