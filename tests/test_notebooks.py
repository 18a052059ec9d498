"""The notebooks: as their jupytext sources, and run from the first cell to the last."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT
from huggingface_hub.utils import filter_repo_objects


pytestmark = pytest.mark.slow


jupytext = pytest.importorskip("jupytext", reason='pip install "mc-llava[notebooks]" to run the notebooks')
nbclient = pytest.importorskip("nbclient", reason='pip install "mc-llava[notebooks]" to run the notebooks')

NAMES = ("quickstart", "multi_crop")


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_its_source(name):
    """`jupytext --to ipynb --set-kernel python3 examples/notebooks/*.py` makes each notebook from its source."""
    source, notebook = (
        jupytext.read(ROOT / "examples" / "notebooks" / f"{name}.{suffix}") for suffix in ("py", "ipynb")
    )
    assert [(cell.cell_type, cell.source) for cell in source.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    assert notebook.metadata["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_all_but_the_large_weights_are_fetched(name):
    source = (ROOT / "examples" / "notebooks" / f"{name}.py").read_text()
    patterns = json.loads(re.search(r"ignore_patterns=(\[.*?\])", source)[1])
    kept = ["handler.py", "mc_llava/cli.py", "model.safetensors.index.json", "tiny/model.safetensors"]
    left = ["model.safetensors", "model-00001-of-00002.safetensors"]
    assert list(filter_repo_objects(kept + left, ignore_patterns=patterns)) == kept


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as `pip install .` installs it: away from the clone."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", folder, ROOT], check=True)
    return folder


@pytest.fixture(scope="module")
def run(trial, installed):
    def run(name: str) -> tuple[str, int]:
        """What the notebook prints, and how many pictures it shows."""
        notebook = jupytext.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb")
        environment = {
            **os.environ,
            "MC_LLAVA_MODEL": str(trial.folder),
            "NUM_SCENES": "1",
            "PYTHONPATH": str(installed),
        }
        resources = {"metadata": {"path": ROOT / "examples" / "notebooks"}}  # where Jupyter starts it
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
        client.execute(env=environment)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        text = "".join(output.text for output in outputs if output.get("name") == "stdout")
        return text, sum("image/png" in output.get("data", {}) for output in outputs)

    return run


def test_quickstart(run, trial):
    text, pictures = run("quickstart")
    assert f"Question: {trial.questions[0]}\n" in text
    assert not trial.is_right(0, re.search("Without crops: (.*)", text)[1])
    assert trial.is_right(0, re.search("Answer: (.*)", text)[1])
    assert trial.is_right(0, re.search("With zoom: (.*)", text)[1])
    assert pictures == 3


def test_multi_crop(run, trial):
    text, pictures = run("multi_crop")
    assert trial.questions[0] in text
    assert trial.is_right(0, re.findall(r"num_tokens=.*: (.*)", text)[-1]), "the saved knobs"
    row = r"max_crops=\d+: ocr \d+%, attribute \d+%, position \d+%, hard \d+%, [\d.,]+ GFLOP"
    assert len(re.findall(row, text)) == 4
    assert pictures == 3
