"""From a checkpoint in the published layout to a model folder that loads by the Auto classes."""

import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import modeling_mc_llava
from .modeling_mc_llava import MCLlavaForConditionalGeneration
from .processing_mc_llava import MCLlavaProcessor


REMOTE_CODE = (
    "configuration_mc_llava.py",
    "image_processing_mc_llava.py",
    "processing_mc_llava.py",
    "modeling_mc_llava.py",
)


def convert(source: str, target: str, revision: str | None = None, push_to_hub: str | None = None) -> Path:
    """
    Write a folder with code, configurations, chat template, tokenizer and the untouched weights of `source`.

    Args:
        source: a folder or a Hub id.
        target: a folder that doesn't exist yet, or is empty. It appears only when it is complete.
        revision: branch, tag or commit of a Hub id.
        push_to_hub: repository id to upload the folder to, made if need be.

    Raises:
        ValueError: if the target is taken, or the source has no safetensors weights or not exactly the model's.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: pass a new or an empty folder")
    if Path(source).is_dir():
        folder = Path(source)
    else:
        patterns = ["*.json", "*.safetensors", "*.txt"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _copy_weights(folder, unfinished)
        _load_and_save(folder, unfinished)
        code = Path(modeling_mc_llava.__file__).parent
        for name in REMOTE_CODE:
            shutil.copyfile(code / name, unfinished / name)
        unfinished.chmod(0o755)  # mkdtemp's folders are for their owner alone
        unfinished.replace(target)
    except BaseException:  # an interruption, too, must leave nothing behind
        shutil.rmtree(unfinished)
        raise
    if push_to_hub is not None:
        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=target, commit_message="MC-LLaVA for transformers 5")
    return target


def _copy_weights(source: Path, target: Path):
    index = source / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shutil.copyfile(index, target / index.name)
    elif (source / SAFE_WEIGHTS_NAME).exists():
        names = [SAFE_WEIGHTS_NAME]
    else:
        raise ValueError(
            f"{source} has no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}: convert it to safetensors"
        )
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise ValueError(f"{source} lacks the shard {name} that {SAFE_WEIGHTS_INDEX_NAME} names: fetch it again")

    total = sum((source / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Copying weights") as progress:
        for name in names:
            with open(source / name, "rb") as reader, open(target / name, "wb") as writer:
                while chunk := reader.read(16 * 2**20):
                    writer.write(chunk)
                    progress.update(len(chunk))


def _load_and_save(source: Path, target: Path):
    """Load model and processor as users do, and save all of them but the weights."""
    try:
        model, report = MCLlavaForConditionalGeneration.from_pretrained(source, output_loading_info=True, dtype="auto")
    except SafetensorError as error:
        raise ValueError(f"the weights in {source} are corrupt ({error}): fetch them again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            raise ValueError(f"{source} doesn't hold this model, {kind}: {sorted(map(str, report[kind]))[:5]}")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    MCLlavaProcessor.from_pretrained(source).save_pretrained(target)
