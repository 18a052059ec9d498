"""What many tests share: the small random model, drawn pictures, the card's prompt, `tiny` with its questions."""

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mc_llava import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaProcessor, scenes


ROOT = Path(__file__).parent.parent
SIDE, PATCH = 56, 14  # of the small model: 16 patches a crop
EXAMPLES = json.loads((ROOT / "examples" / "questions.json").read_text())
NEW_TOKENS = 24  # enough for any answer about a scene


class Trial(NamedTuple):
    """`tiny` in a folder made by `convert`, pictures with a question about each, and the right answers."""

    folder: Path
    pictures: list[Path]
    questions: list[str]
    keys: list[str]

    def is_right(self, index: int, reply: str) -> bool:
        return scenes.is_correct(self.keys[index], reply)


def plain_reply(folder: Path, image, question: str, options: dict | None = None, **knobs) -> str:
    """What `generate` gives for the processor's pixels."""
    model = MCLlavaForConditionalGeneration.from_pretrained(folder)
    processor = MCLlavaProcessor.from_pretrained(folder)
    inputs = processor(question, [image], **knobs)
    output = model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **(options or {})})
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def load_handler(folder: Path):
    """The module `handler.py` of a converted folder, loaded as Inference Endpoints do."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_untrained_tiny(folder: Path, layers: int, seed: int = 0):
    """A random model of `tiny`'s kind with its processor, for tests that train one."""
    from mc_llava.scenes import language_model  # needs the extra train, which vLLM's environment lacks

    torch.manual_seed(seed)
    processor = language_model.build_processor()
    vision = language_model.vision_config(width=32, layers=layers)
    language_model.build_model(processor, vision, width=32, layers=layers).save_pretrained(folder)
    processor.save_pretrained(folder)


def small_config(**kwargs) -> MCLlavaConfig:
    text = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    return MCLlavaConfig(
        text_config={"model_type": "phi", "partial_rotary_factor": 0.4, "max_position_embeddings": 128, **text},
        vision_config={"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, **vision},
        **kwargs,
    )


def small_model(seed: int = 0, attn_implementation: str = "sdpa") -> MCLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = MCLlavaForConditionalGeneration._from_config(small_config(), attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:  # wide enough for every input to change the logits
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(question: str, images: int = 1) -> str:
    """The card's prompt."""
    return "<|im_start|>user\n" + "<image>\n" * images + question + "<|im_end|>\n<|im_start|>assistant\n"


@contextmanager
def counting_crops(model):
    """A list with the number of crops in each pass of the vision tower."""
    crops = []
    hook = model.model.vision_tower.encoder.register_forward_hook(
        lambda module, arguments, output: crops.append(len(output.last_hidden_state))
    )
    try:
        yield crops
    finally:
        hook.remove()


class CountReads(TorchDispatchMode):
    """
    Counts what would wait for a device if the tensors were on one: reads of values, and operators whose output's shape
    depends on values. `reads` has the file and line of each that comes from our code, `kernels` the names of all
    operators that compute.

    A processor's `tolist` and `cpu` dispatch nothing and are wrapped.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "is_nonzero")
    METHODS = ("tolist", "cpu")
    VIEWS = {"alias", "as_strided", "detach", "expand", "permute", "reshape", "select", "slice", "split", "squeeze"}
    VIEWS |= {"t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "lift_fresh", "_local_scalar_dense"}

    def __init__(self):
        super().__init__()
        self.reads, self.kernels = [], []

    def __enter__(self):
        self.methods = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, lambda tensor, *args, method=method: self._note() or method(tensor, *args))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        with_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if with_mask or name.startswith(self.WAITING):
            self._note()
        if name not in self.VIEWS:
            self.kernels.append(name)
        return function(*args, **(kwargs or {}))

    def _note(self):
        """Add the innermost frame outside this file and torch, if it is in our code."""
        frame = sys._getframe(1)
        while frame and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        while frame and frame.f_code.co_name == "read_integers":  # the code that asked for it
            frame = frame.f_back
        if frame and frame.f_code.co_filename.endswith("_mc_llava.py"):
            self.reads.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
