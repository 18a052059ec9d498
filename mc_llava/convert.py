"""Converts a checkpoint in the published layout to a model folder that the Auto classes load."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from . import ROOT, ROOT_FILES, MCLlavaForConditionalGeneration, MCLlavaProcessor
from .folders import INDEX, WEIGHTS, find_model, list_weights
from .journal import storing
from .loading import check_loaded, load_config


# Inference Endpoints run the handler and install the requirements.
ENDPOINT = ("handler.py", "requirements.txt")


def convert(source: str, target: str, revision: str | None = None, push_to_hub: str | None = None) -> Path:
    """
    Write a folder with code, configurations, chat template, tokenizer and the untouched weights of `source`.

    Args:
        source: a folder, a Hub id, or "tiny" for the bundled checkpoint.
        target: a folder that doesn't exist yet, or is empty. Until all files are valid, they are in a hidden folder
            in the target, or next to where it will be.
        revision: branch, tag or commit of a Hub id.
        push_to_hub: repository id to upload the folder to, created if necessary.

    Raises:
        ValueError: if the target is not empty, or the source lacks safetensors weights that match the model exactly.
        OSError: if the disk is full, or the finished folder can't be uploaded.
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: pass a new or empty folder")
    if target.exists() and (found := next(target.iterdir(), None)):
        raise ValueError(f"{target} is not empty, it holds {found.name}: empty it, or pass a new folder")
    folder = Path(find_model(source))
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{source} is a folder, which has no revision {revision}: leave the revision out")
    else:
        patterns = ["*.json", "*.safetensors", "*.txt"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))

    # On the target's file system, so that moving is instant: an empty target may be a mounted volume.
    parent = next(parent for parent in (target, *target.parents) if parent.is_dir())
    unfinished = Path(mkdtemp(prefix=f".{target.name}-unfinished-", dir=parent))
    try:
        with storing(target, "free some space and convert again, nothing was left behind"):
            _copy_weights(folder, unfinished)
            _load_and_save(folder, unfinished)
            for name in (*(f"{module}.py" for module in ROOT_FILES), *ENDPOINT):
                shutil.copyfile(ROOT / name, unfinished / name)
        target.mkdir(parents=True, exist_ok=True)
        for path in unfinished.iterdir():
            path.replace(target / path.name)
    finally:  # after an interruption, too
        shutil.rmtree(unfinished)
    if push_to_hub is not None:
        _upload(target, push_to_hub)
    return target


def _upload(folder: Path, repository: str):
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="MC-LLaVA for transformers 5")
    except Exception as error:  # without a network, that of the hub's HTTP client
        raise OSError(
            f"{folder} is complete, but can't be uploaded to {repository} ({error}): to try again, run "
            f"hf upload {repository} {folder}"
        ) from error


def _copy_weights(source: Path, target: Path):
    names = list_weights(source)
    if names != [WEIGHTS]:
        shutil.copyfile(source / INDEX, target / INDEX)
    total = sum((source / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Copying weights") as progress:
        for name in names:
            with open(source / name, "rb") as reader, open(target / name, "wb") as writer:
                while chunk := reader.read(16 * 2**20):
                    writer.write(chunk)
                    progress.update(len(chunk))


def _load_and_save(source: Path, target: Path):
    """Write all but the weights, and load the result as users will: every tensor must fit."""
    config = load_config(str(source))
    config.architectures = [MCLlavaForConditionalGeneration.__name__]
    config.save_pretrained(target)
    if (source / GENERATION_CONFIG_NAME).is_file():
        shutil.copyfile(source / GENERATION_CONFIG_NAME, target / GENERATION_CONFIG_NAME)
    MCLlavaProcessor.from_pretrained(source).save_pretrained(target)
    try:
        model, report = MCLlavaForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:  # cut files, wrong shapes
        raise ValueError(f"the weights in {source} don't fit {CONFIG_NAME} ({error}): fetch both again") from error
    check_loaded(source, report)
    model.generation_config.save_pretrained(target)
