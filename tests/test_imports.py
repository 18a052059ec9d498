"""Which modules are loaded when: help texts, wrong options and `crops` must not wait for torch."""

import ast
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

import mc_llava
from mc_llava import folders
from mc_llava.evaluation import TASK_NAMES
from mc_llava.evaluation.tasks import TASKS


HEAVY = ("torch", "transformers")
FILES = tuple(f"mc_llava.{file}" for file in mc_llava.ROOT_FILES)


def loaded_by(code: str, cwd=ROOT, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of these modules, by default the heavy packages, a new process has loaded after some code."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint([n for n in {names} if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1].replace("'", '"'))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ask", "--help"],
        ["eval", "--help"],
        ["ask", "photo.jpg", "What?", "--no-such-option"],
        ["ask", "photo.jpg", "What?", "--dtype", "float8"],
        ["nosuch"],
        ["crops", str(ROOT / "examples" / "coffee.jpg"), "-o", "grid.png", "--max-crops", "4"],
        ["crops", str(ROOT / "examples" / "coffee.jpg"), "-o", "grid.png", "--model", "tiny"],
    ],
    ids=" ".join,
)
def test_commands_that_load_neither_torch_nor_transformers(arguments, tmp_path):
    code = f"from mc_llava.cli import app; sys.argv[1:] = {arguments}; app()"
    assert loaded_by(code, cwd=tmp_path) == []
    assert (tmp_path / "grid.png").exists() == (arguments[0] == "crops")


@pytest.mark.slow
def test_what_is_light_is_loaded_alone():
    assert loaded_by("from mc_llava import Crop, load_image, plan_crops, scenes") == []
    found = loaded_by("import mc_llava; mc_llava.MCLlavaForConditionalGeneration", names=(*HEAVY, *FILES))
    assert found[:2] == list(HEAVY), "the check itself works"
    # The model gets tensors: it reads no files, URLs or color profiles.
    left_out = ("feature_cache", "image_costs", "image_loading", "image_pixels", "image_processing", "processing")
    assert sorted(set(FILES) - set(found)) == [f"mc_llava.{file}_mc_llava" for file in left_out]


@pytest.mark.parametrize("file", mc_llava.ROOT_FILES)
def test_no_private_name_of_transformers_is_imported(file):
    """A private name may be gone in the next release, after which the whole model would no longer load."""
    nodes = ast.walk(ast.parse((ROOT / f"{file}.py").read_text()))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = {name.name for node in imports if (node.module or "").startswith("transformers") for name in node.names}
    assert [name for name in names if name.startswith("_")] == []


def test_every_name_that_a_root_file_exports_is_there():
    for file in mc_llava.ROOT_FILES:
        module = getattr(mc_llava, file)
        assert module.__name__ == f"mc_llava.{file}" and sys.modules[module.__name__] is module
        assert all(getattr(mc_llava, name) is getattr(module, name) for name in module.__all__)


def test_names_are_listed_and_a_misspelt_one_loads_nothing():
    assert {"MCLlavaProcessor", "plan_crops", "generation_mc_llava", "ROOT"} <= set(dir(mc_llava))
    assert "load_image" in mc_llava.__all__ and "cache" not in mc_llava.__all__
    assert loaded_by("import mc_llava; dir(mc_llava); hasattr(mc_llava, 'MCLlavaProcesor')") == []


def test_nothing_else_of_the_root_is_a_module():
    for name in ("mc_llava", "scripts", "tests", "handler", "helpers"):
        with pytest.raises(ModuleNotFoundError):
            __import__(f"mc_llava.{name}")
        with pytest.raises(ImportError):
            exec(f"from mc_llava import {name}")
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        mc_llava.nosuch  # noqa: B018


def test_the_crops_of_a_model_are_those_of_its_processor(converted, checkpoint):
    for model in ("tiny", str(converted), str(checkpoint)):
        saved = mc_llava.MCLlavaImageProcessor.from_pretrained(folders.find_model(model))
        for size in ((1977, 1501), (100, 50)):
            options = folders.read_plan_options(model)
            assert mc_llava.plan_crops(*size, **options) == saved.plan(*size)
    assert mc_llava.plan_crops(1500, 900, **folders.read_plan_options()) == mc_llava.MCLlavaImageProcessor().plan(
        1500, 900
    )


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="has no options of an image processor in processor_config.json or preprocessor_config.json"
    ):
        folders.read_plan_options(str(tmp_path))
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read processor_config.json"):
        folders.read_plan_options(str(tmp_path))
    for content in ('{"image_processor": null}', '{"image_processor": {"size": {"height": 0}}}', "[]", "3"):
        (tmp_path / "processor_config.json").write_text(content)
        with pytest.raises(ValueError):
            folders.read_plan_options(str(tmp_path))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "MCLlavaProcessor"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 56, "max_crops": 3}')
    found = folders.read_plan_options(str(tmp_path))
    assert (found["side"], found["max_crops"]) == (56, 3), "as older releases of transformers wrote them"
    with pytest.raises(ValueError, match="someone/something has no options of an image processor"):
        folders.read_plan_options("someone/something")
    with pytest.raises(ValueError, match="cannot read processor_config.json of /nosuch/folder"):
        folders.read_plan_options("/nosuch/folder")


def test_the_help_names_all_tasks():
    assert TASK_NAMES == tuple(TASKS)


@pytest.mark.parametrize(
    "name", ["/nosuch/dir", "./nosuch", "~/nosuch", "a/b/c", "nosuch/dir/", "nosuch", "nosuch/", "README.md", ""]
)
def test_a_folder_that_is_not_there(name, monkeypatch):
    """It is not sent to the Hub as an id: when out of reach, the Hub is asked again for minutes."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="is neither a folder nor a Hub id"):
        folders.find_model(name)
    assert folders.find_model("somebody/model") == "somebody/model"
    assert folders.find_model("tiny") == str(ROOT / "tiny")
