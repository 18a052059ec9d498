"""Model folders and Hub ids: the part that needs neither torch nor transformers."""

import json
import re
from pathlib import Path

from . import KNOB_MINIMA, MAX_CROPS, NUM_TOKENS, PATCH_SIZE, ROOT, SIDE, check_knob


TINY = ROOT / "tiny"  # the checkpoint that is bundled
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # ours, and the published one


def find_model(name: str) -> str:
    """
    The path or Hub id to load for a model's name: "tiny" is the bundled checkpoint, all else is unchanged.

    Raises:
        ValueError: if no such folder is there, and the name does not have the form of a Hub id, owner/name.
    """
    if name == "tiny":
        return str(TINY)
    text = str(name)
    # All else would be looked up on the Hub, which takes minutes when it is out of reach.
    is_id = re.fullmatch(r"[^./~\\][^/\\]*/[^/\\]+", text) is not None
    if not text or not Path(text).is_dir() and (not is_id or Path(text).exists()):
        raise ValueError(
            f"{text[:200]!r} is neither a folder nor a Hub id, which has the form owner/name: pass the path of a "
            "model folder, an id such as visheratin/MC-LLaVA-3b, or tiny"
        )
    return text


def describe_missing(folder: str) -> str:
    """A message about the kinds of files that a folder lacks to be a model's; empty if it has all."""
    kinds = (("config.json",), PROCESSOR_FILES, ("tokenizer.json", "vocab.json"), (WEIGHTS, INDEX))
    missing = [names[0] for names in kinds if not any(Path(folder, name).is_file() for name in names)]
    remedy = "pass a whole model folder, such as one that mc-llava convert made"
    return f"the folder {folder} has no {', '.join(missing)}: {remedy}" if missing else ""


def read_plan_options(model: str | None = None) -> dict[str, int]:
    """
    `max_crops`, `num_tokens`, `side` and `patch_size` as a model's processor was saved, by default the 3B's.

    `MCLlavaImageProcessor.plan` plans with the same numbers, and needs transformers.

    Raises:
        ValueError: if the model has no readable processor configuration.
    """
    try:
        path = None if model is None else find_model(model)
    except ValueError as error:
        raise ValueError(f"cannot read {PROCESSOR_FILES[0]} of {model}: {error}") from None
    saved = {} if path is None else _read_processor(path)
    size = saved.get("size", SIDE)
    found = {
        "max_crops": saved.get("max_crops", MAX_CROPS),
        "num_tokens": saved.get("num_tokens", NUM_TOKENS),
        "side": size.get("height") if isinstance(size, dict) else size,
        "patch_size": saved.get("patch_size", PATCH_SIZE),
    }
    return {name: check_knob(name, value, KNOB_MINIMA.get(name, 1)) for name, value in found.items()}


def list_weights(folder: Path) -> list[str]:
    """
    The names of a folder's files of weights, which are whole files of safetensors.

    Raises:
        ValueError: if it has none, its index is not one or names files that are not there, or a file is cut.
    """
    if (folder / WEIGHTS).exists():  # transformers looks for this first, too
        names = [WEIGHTS]
    elif (folder / INDEX).exists():
        names = _read_index(folder / INDEX)
    else:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: convert it to safetensors")
    for name in names:
        _check_header(folder / name)
    return names


def _read_index(index: Path) -> list[str]:
    """The files that an index of shards names, all of which are there."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))  # transformers takes no byte order mark
        names = sorted(set(content["weight_map"].values()))
        if not isinstance(content.get("metadata"), dict):
            raise ValueError("it has no metadata")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weights ({error!r:.300}): fetch it again") from error
    if not names:
        raise ValueError(f"{index} names no file: fetch it again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not _is_file(index.parent / name):
            shown = str(name)[:200].encode("utf-8", "backslashreplace").decode()
            raise ValueError(f"{index.parent} lacks the shard {shown} that {INDEX} names: fetch it again")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name}, which is not a .safetensors file: fetch it again")
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # of a name that no file can have
        return False


def _check_header(path: Path):
    """Raise a ValueError if a file is not one of safetensors, or is not as long as it says."""
    from safetensors import SafetensorError, safe_open  # `mc-llava crops` starts without it

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error


def is_whole(path: Path) -> bool:
    """Whether this is a complete file of safetensors."""
    try:
        _check_header(path)
    except ValueError:
        return False
    return True


def _read_processor(model: str) -> dict:
    """The image processor's options: in `processor_config.json` under a key, in the older file at the top."""
    for name in PROCESSOR_FILES:
        try:
            if (path := _find_file(model, name)) is None:
                continue
            content = json.loads(path.read_text(encoding="utf-8"))
            if name == PROCESSOR_FILES[0]:
                if "image_processor" not in content:  # older releases of transformers wrote both files
                    continue
                content = content["image_processor"]
            if not isinstance(content, dict):
                raise ValueError(f"it holds {str(content)[:80]} instead of an object")
            return content
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read {name} of {model} ({error}): pass a model folder or a Hub id") from error
    raise ValueError(
        f"{model} has no options of an image processor in {' or '.join(PROCESSOR_FILES)}, or is out of reach: "
        "pass a model folder or a Hub id"
    )


def _find_file(model: str, name: str) -> Path | None:
    """A file of a folder, or of a repository on the Hub or in its cache; None if there is no such file."""
    if Path(model).is_dir():
        return Path(model, name) if Path(model, name).exists() else None
    from huggingface_hub import hf_hub_download  # takes as long to import as the rest of `mc-llava crops`
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:  # also if it is not in the cache and the Hub is out of reach
        return None
