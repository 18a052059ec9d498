"""Model folders and Hub ids: the part that needs neither torch nor transformers."""

import json
from pathlib import Path

from . import MAX_CROPS, NUM_TOKENS, PATCH_SIZE, ROOT, SIDE


TINY = ROOT / "tiny"  # the checkpoint that is bundled
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")  # ours, and the published one


def find_model(name: str) -> str:
    """The path or Hub id to load for a model's name: "tiny" is the bundled checkpoint, all else is unchanged."""
    return str(TINY) if name == "tiny" else name


def read_plan_options(model: str | None = None) -> dict[str, int]:
    """
    `max_crops`, `num_tokens`, `side` and `patch_size` as a model's processor was saved, by default the 3B's.

    `MCLlavaImageProcessor.plan` plans with the same numbers, and needs transformers.

    Raises:
        ValueError: if the model has no readable processor configuration.
    """
    saved = {} if model is None else _read_processor(find_model(model))
    size = saved.get("size") or {}
    return {
        "max_crops": saved.get("max_crops", MAX_CROPS),
        "num_tokens": saved.get("num_tokens", NUM_TOKENS),
        "side": size.get("height", SIDE),
        "patch_size": saved.get("patch_size", PATCH_SIZE),
    }


def _read_processor(model: str) -> dict:
    for name in PROCESSOR_FILES:
        try:
            if (path := _find_file(model, name)) is not None:
                content = json.loads(path.read_text(encoding="utf-8"))
                return content.get("image_processor", content)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"cannot read {name} of {model} ({error}): pass a model folder or a Hub id") from error
    raise ValueError(f"{model} has neither {' nor '.join(PROCESSOR_FILES)}: pass a model folder or a Hub id")


def _find_file(model: str, name: str) -> Path | None:
    """A file of a folder, or of a repository on the Hub; None if there is no such file."""
    if Path(model).is_dir():
        return Path(model, name) if Path(model, name).exists() else None
    from huggingface_hub import hf_hub_download  # takes as long to import as the rest of `mc-llava crops`
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError:  # offline, or out of reach
        raise
    except EntryNotFoundError:
        return None
