"""The package as a bare clone and as a wheel, and the card at the README's top."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT
from huggingface_hub import ModelCard, constants
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mc_llava import ROOT_FILES


CODE_FILES = [f"{name}.py" for name in ROOT_FILES]


def run(*arguments, cwd, python_path="") -> str:
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not names:
        pytest.skip("this is no git checkout: which files a clone has is not known")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".", cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, built without git from a clone's files, as downloaded from the Hub."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(clone, folder)
    assert wheel.name.startswith("mc_llava-0.2.0-")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_a_bare_clone_works(clone, trial):
    assert Path(run("-c", "import mc_llava; print(mc_llava.__file__)", cwd=clone).strip()).parent.parent == clone
    answer = run("-m", "mc_llava", "ask", f"examples/{trial.pictures[0].name}", trial.questions[0], cwd=clone)
    assert trial.is_right(0, answer)


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(installed, trial, tmp_path):
    code = "import mc_llava; print(mc_llava.__file__, mc_llava.modeling_mc_llava.__file__)"
    files = run("-c", code, cwd=tmp_path, python_path=installed).split()
    assert [Path(file).parent for file in files] == [installed / "mc_llava"] * 2
    command = ("-m", "mc_llava", "ask", trial.pictures[0], trial.questions[0])
    assert trial.is_right(0, run(*command, cwd=tmp_path, python_path=installed))
    run("-m", "mc_llava", "convert", "tiny", "model", cwd=tmp_path, python_path=installed)
    assert {path.name for path in (tmp_path / "model").iterdir()} > set(CODE_FILES)


@pytest.mark.slow
def test_the_version_follows_from_git(clone, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.com")

    def version(commit: str) -> str:
        for command in (("add", "--all"), ("commit", "--quiet", "--allow-empty", "--message", commit)):
            subprocess.run([*git, *command], cwd=folder, check=True)
        return build_wheel(folder, tmp_path / commit).name.split("-")[1]

    subprocess.run([*git, "init", "--quiet"], cwd=folder, check=True)
    assert version("first").startswith("0.2.1.dev1+g"), "without a tag the commits are counted"
    subprocess.run([*git, "tag", "v0.7.0"], cwd=folder, check=True)
    assert version("second").startswith("0.7.1.dev1+g")


def test_the_wheel_lists_every_file_of_the_root(installed):
    assert {path.stem for path in ROOT.glob("*_mc_llava.py")} == set(ROOT_FILES)
    assert {path.stem for path in (installed / "mc_llava").glob("*_mc_llava.py")} == set(ROOT_FILES)


def test_the_wheel_carries_code_configurations_and_templates_once(installed):
    files = [path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()]
    names = [name.rsplit("/", 1)[-1] for name in files]
    for name in CODE_FILES:
        assert names.count(name) == 1, name
    for folder in ("mc_llava", "mc_llava/tiny"):
        for name in ("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
            assert f"{folder}/{name}" in files
    assert not any("test" in name for name in files)


def test_lmms_eval_finds_the_model(installed):
    entry_points = configparser.ConfigParser()
    entry_points.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    module, _, function = entry_points["lmms_eval.models"]["mc_llava"].partition(":")
    assert f"def {function}(" in (installed / module.replace(".", "/")).with_suffix(".py").read_text()


def test_what_an_endpoint_installs_is_what_the_package_needs(installed):
    metadata = next(installed.glob("*.dist-info")).joinpath("METADATA").read_text()
    needed = {line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")}
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert requirements and {Requirement(line) for line in requirements} <= {Requirement(line) for line in needed}


@pytest.mark.parametrize(
    "name, extras", [("demo", []), ("test", ["test"]), ("end-to-end", ["test", "end-to-end"]), ("vllm", [])]
)
def test_all_that_the_scripts_install_is_pinned(name, extras):
    """`bash scripts/pin.sh` pins what pyproject.toml asks for, and what builds the package."""
    tomllib = pytest.importorskip("tomllib", reason="the pins are for Python 3.11, which can read pyproject.toml")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*table["build-system"]["requires"], *table["project"]["dependencies"]]
    while extras:
        requirements = [Requirement(line) for line in table["project"]["optional-dependencies"][extras.pop()]]
        extras += [extra for one in requirements if one.name == "mc-llava" for extra in one.extras]
        wanted += [str(one) for one in requirements if one.name != "mc-llava"]
    lines = (ROOT / "scripts" / "pins" / f"{name}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    torch = (ROOT / "scripts" / "pins" / "torch.txt").read_text()
    assert f"\ntorch=={pins['torch']}\n" in torch and "+" not in pins["torch"]  # the public index has no suffix


def test_no_file_of_the_remote_code_is_twice_in_the_tree(clone):
    for name in CODE_FILES:
        assert list(clone.rglob(name)) == [clone / name]


class TestModelCard:
    def test_its_metadata_are_what_the_hub_reads(self):
        data = ModelCard.load(ROOT / "README.md", ignore_metadata_errors=False).data
        assert (data.license, data.language, data.library_name) == ("mit", ["en"], "transformers")
        assert data.pipeline_tag == "image-text-to-text"
        assert data.base_model == ["vince62s/phi-2-psy", "google/siglip-so400m-patch14-384"]
        assert data.datasets == ["liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"]
        assert {"llava", "custom_code"} <= set(data.tags)
        assert [set(example) for example in data.get("widget")] == [{"text", "src"}] * 2

    @pytest.mark.parametrize("status", [200, 400])
    def test_the_validator_is_asked_and_heard(self, monkeypatch, status):
        """huggingface_hub's validator asks the Hub, for which a server on this machine stands in."""
        asked = []

        class Hub(BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"what the Hub says")

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
            card = ModelCard.load(ROOT / "README.md")
            if status == 200:
                card.validate()
            else:
                with pytest.raises(ValueError, match="what the Hub says"):
                    card.validate()
            server.shutdown()
        ((path, body),) = asked
        assert path == "/api/validate-yaml" and body["repoType"] == "model"
        assert (
            body["content"].startswith("---\nlicense: mit") and "pipeline_tag: image-text-to-text" in body["content"]
        )

    def test_the_hub_itself_accepts_it(self):
        """Only if TEST_HUB is set."""
        if os.environ.get("TEST_HUB") != "1":
            pytest.skip("ModelCard.validate() asks the Hub: set TEST_HUB=1 to run it")
        code = f"from huggingface_hub import ModelCard; ModelCard.load({str(ROOT / 'README.md')!r}).validate()"
        environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["bash", "scripts/fuzz.sh", "0"], "pass a number of minutes, 1 or more, not 0"),
        (["bash", "scripts/fuzz.sh", "ten"], "pass a number of minutes, 1 or more, not ten"),
        pytest.param(
            [sys.executable, "scripts/quantized.py", "folder", "nf5"],
            "nf5 must be some of nf4, int8, int4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scripts_refuse_what_they_cannot_do(command, said):
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 2 and said in result.stderr, result.stderr
