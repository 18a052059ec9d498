"""Loads a model by its name, and identifies the weights and code that its results depend on."""

import hashlib
import json
import os
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from jinja2 import TemplateError
from transformers import BitsAndBytesConfig, QuantoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import ROOT, ROOT_FILES, MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaProcessor, choose_dtype
from .folders import INDEX, WEIGHTS, describe_missing, find_model, list_weights
from .journal import hash_file


PACKAGE = Path(__file__).parent
# What answers depend on, of the files in a model's folder.
LOADED = (
    "*.safetensors",
    "*.index.json",
    "*config.json",
    "*.jinja",
    "chat_template.json",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
UNKNOWN_COMMIT = "unknown"  # of a Hub id whose configuration doesn't name one
QUANTIZED = ("nf4", "int8", "int4")
# The image's way into the language model and the answer's way out: few of the weights, and all answers pass them.
NOT_QUANTIZED = ["model.vision_tower", "model.coord_embed", "model.multi_modal_projector", "lm_head"]


def find_device(name: str | None = None) -> str:
    """
    The device for a model: by default the accelerator, or the CPU if there is none.

    Raises:
        ValueError: if there is no such device.
    """
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices = [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count())), "cpu"]
    if name is not None and name not in devices:
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(devices)}")
    return name or devices[0]


def find_whole_model(path: str) -> str:
    """
    What `find_model` finds.

    Raises:
        ValueError: if a folder has no configuration. transformers would take the default values, which are the 3B's.
    """
    path = find_model(path)
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ValueError(describe_missing(path))
    return path


def load_config(path: str, revision: str | None = None) -> MCLlavaConfig:
    """A model's configuration. Raises ValueError as `find_whole_model` does."""
    return MCLlavaConfig.from_pretrained(find_whole_model(path), revision=revision or "main")


def is_quantized(config: MCLlavaConfig) -> bool:
    """Whether a model was saved with quantized weights."""
    return getattr(config, "quantization_config", None) is not None


def resolve_dtype(
    model: str | MCLlavaConfig,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
) -> torch.dtype | str:
    """
    The dtype in which `load_model` loads a model with the same arguments, or "auto" for an accelerator if the
    configuration has none. A model that was saved with quantized weights has its own: transformers converts only a
    part of such weights to another one.

    Args:
        model: a folder, a Hub id, "tiny", or a configuration.

    Raises:
        ValueError: if there is no such dtype or device, or the model can't be loaded in it.
    """
    config = model if isinstance(model, MCLlavaConfig) else load_config(model, revision)
    own = config.dtype if is_quantized(config) else None
    if dtype == "auto":
        chosen = own or choose_dtype(find_device(device))
        return (config.dtype or chosen) if chosen == "auto" else chosen
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if own not in (None, found):
        raise ValueError(f"the model was saved with quantized weights in {own}, got {found}: leave dtype out")
    return found


def load_model(
    path: str,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> MCLlavaForConditionalGeneration:
    """
    A model that is ready to answer, from safetensors alone.

    Args:
        path: a folder, a Hub id or "tiny".
        dtype: by default the choice of `choose_dtype`, which is printed: on a CPU bfloat16 or float32, on an
            accelerator the checkpoint's.
        device: by default an accelerator if there is one.
        revision: branch, tag or commit of a Hub id.
        quantize: one of `QUANTIZED`, for the weights of the language model's layers.

    Raises:
        ValueError: if there is no such device, the configuration is missing, weights are missing or of another model,
            `quantize` is unknown, its package is missing, or the model was saved with quantized weights.
    """
    path, device = find_whole_model(path), find_device(device)
    if any(Path(path, name).is_file() for name in (WEIGHTS, INDEX)):  # transformers reports other missing files
        list_weights(Path(path))
    config = load_config(path, revision)
    chosen = resolve_dtype(config, dtype, device)
    if quantize is not None and is_quantized(config):
        raise ValueError(f"{path} was saved with quantized weights, got quantize {quantize}: leave quantize out")
    if dtype == "auto":
        name = "the precision of its weights" if chosen == "auto" else str(chosen).removeprefix("torch.")
        remedy = "for another precision, set dtype, or --dtype on the command line"
        print(f"computing in {name} on {device}; {remedy}", file=sys.stderr, flush=True)
    options = {"dtype": chosen, "use_safetensors": True, "revision": revision or "main", "output_loading_info": True}
    if quantize is None:
        model, report = MCLlavaForConditionalGeneration.from_pretrained(path, **options)
        check_loaded(path, report)
        return model.to(device).eval()
    if chosen == "auto":
        options["dtype"] = torch.float32
    options |= {"quantization_config": quantization(quantize, options["dtype"]), "device_map": device}
    try:
        import accelerate  # noqa: F401  without it, transformers raises a ValueError about device maps

        model, report = MCLlavaForConditionalGeneration.from_pretrained(path, **options)
    except ImportError as error:
        raise ValueError(f'a package is missing ({error}): pip install "mc-llava[quantize]"') from error
    check_loaded(path, report)
    return model.eval()


def check_loaded(source: str | Path, report: dict):
    """Raise a ValueError if `from_pretrained` met other weights than the model's. It only logs that, and fills in."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            names = sorted(map(str, report[kind]))
            raise ValueError(f"{source} doesn't hold this model, {kind}: {names[:5]}: fetch it again")


def quantization(name: str, dtype: torch.dtype) -> QuantizationConfigMixin:
    """
    transformers' `quantization_config`: 4 bits of a normal distribution by bitsandbytes, which computes
    in `dtype`, integers by quanto. Both run on CPUs, too.
    """
    if name == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    if name not in QUANTIZED:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZED)}, got {name!r}")
    return QuantoConfig(weights=name, modules_to_not_convert=NOT_QUANTIZED)


def load_processor(path: str, revision: str | None = None) -> MCLlavaProcessor:
    """
    A model's processor, whose chat template was tried.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    try:
        processor = MCLlavaProcessor.from_pretrained(find_model(path), revision=revision or "main")
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    except (json.JSONDecodeError, AttributeError, TypeError, TemplateError) as error:
        raise ValueError(f"the processor of {path} can't be loaded ({error}): fetch its files again") from error
    except (OSError, ValueError) as error:
        if Path(path).is_dir() and (missing := describe_missing(path)):  # transformers' message is about the Hub
            raise ValueError(missing) from error
        raise
    return processor


def identify(path: str, revision: str | None = None) -> str:
    """
    Identifies a model for its results: the commit of a Hub id, or `UNKNOWN_COMMIT`, or a digest of a folder's weights,
    configurations, tokenizer and chat template. Other files, such as results, don't count.
    """
    path = find_model(path)
    if not Path(path).is_dir():
        config = load_config(path, revision)
        return getattr(config, "_commit_hash", None) or UNKNOWN_COMMIT
    files = sorted(file for pattern in LOADED for file in Path(path).glob(pattern))
    return known_digest(Path(path).resolve(), files)


def known_digest(folder: Path, files: list[Path]) -> str:
    """
    A digest of a folder's files. They are read only if they have changed since the user's cache got their digest:
    reading the 3B model takes as long as many answers.
    """
    state, cache = stamps(files), identity_file(folder)
    if found := read_identity(cache, state):
        return found
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        hash_file(digest, file)
    found = f"sha256:{digest.hexdigest()}"
    if cache is not None and stamps(files) == state:  # no file was written meanwhile
        draft = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}")
        with suppress(OSError):  # a full or read-only disk
            try:
                draft.write_text(json.dumps({"files": state, "digest": found}))
                os.replace(draft, cache)  # atomic: two runs may write it at once
            finally:
                draft.unlink(missing_ok=True)
    return found


def identity_file(folder: Path) -> Path | None:
    """Where a folder's identity is kept, below `HF_HOME`; None if nothing can be written there."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    try:
        return cached_assets_path("mc-llava", namespace="identities") / f"{name}.json"
    except (OSError, ValueError):
        return None


def read_identity(cache: Path | None, state: list[list]) -> str | None:
    try:
        kept = json.loads(cache.read_bytes()) if cache is not None else None
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged
        return None
    if not isinstance(kept, dict) or kept.get("files") != state:
        return None
    digest = kept.get("digest")
    return digest if isinstance(digest, str) and re.fullmatch("sha256:[0-9a-f]{64}", digest) else None


def stamps(files: list[Path]) -> list[list]:
    """What shows without reading files whether they have changed: no tool sets the time of a status change back."""
    found = [(file.name, file.stat()) for file in files]
    return [[name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev] for name, at in found]


def identify_code(*names: str) -> str:
    """
    Identifies the code behind results: a digest of the remote code, of this file and of the package's files
    `names`. An interrupted run is not resumed if it has changed.
    """
    digest = hashlib.sha256()
    files = [ROOT / f"{name}.py" for name in ROOT_FILES] + [PACKAGE / name for name in ("loading.py", *names)]
    for file in files:
        digest.update(file.name.encode())
        hash_file(digest, file)
    return f"sha256:{digest.hexdigest()}"


def load(
    path: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
) -> tuple[MCLlavaForConditionalGeneration, MCLlavaProcessor, str]:
    """A model, its processor, and the identity of the model for results."""
    processor = load_processor(path, revision)
    return load_model(path, dtype, device, revision, quantize), processor, identify(path, revision)
