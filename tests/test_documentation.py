"""
README.md and docs/: every code block is run, or checked as far as possible if it needs the Hub, a GPU or hours.

`tiny`, converted, stands for the 3B model.
"""

import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import processes
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from packaging.version import Version
from PIL import Image
from torch.distributed.run import get_args_parser
from typer.main import get_command

import mc_llava
from mc_llava import MCLlavaConfig, MCLlavaForConditionalGeneration, cli


CURRENT = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*CURRENT, ROOT / "CHANGELOG.md"]  # which also names files that are gone
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
MODEL = "./MC-LLaVA-3b"
# Programs that other tests start as the documentation does, or that only fetch or show something.
OTHER_PROGRAMS = {
    "cd": None,
    "git": None,
    "jupytext": "test_notebooks.py",
    "lmms-eval": "test_lmms_eval.py",
    "scripts/fetch_materials.sh": None,
    "tensorboard": None,
    "transformers": "test_serve.py",
}
# Words of `mc-llava` commands that `test_it_runs` leaves out, and the tests that run them or the like.
RUN_ELSEWHERE = {
    "compare": "test_an_evaluation_and_its_comparison",
    "--push-to-hub": "test_checkpoints.py",
    "--ray": "test_batch.py",
    "eval": "test_an_evaluation_and_its_comparison; test_evaluation.py those on the Hub's data",
    "runs/mine": "test_fine_tuning_from_rows_to_an_answer",
    "study": "test_study.py",
    "train": "test_training.py and test_tiny.py",
    "visheratin/MC-LLaVA-3b": "test_checkpoints.py",
}
# Overrides that turn a recipe for eight GPUs into one step on a CPU.
ONE_STEP = "max_steps=1 batch_size=1 accumulation=1 workers=0 max_crops=[0,2] num_tokens=[20,40] dtype=float32".split()


class Block(NamedTuple):
    document: str
    language: str
    code: str


BLOCKS = [
    Block(path.name, *found)
    for path in DOCUMENTS
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
]


def blocks(language: str, *documents: str) -> list[str]:
    return [block.code for block in BLOCKS if block.language == language and block.document in documents]


def split_commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block, without the variables that are set for it."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                commands.append(words)
    return commands


COMMANDS = [command for block in BLOCKS if block.language == "bash" for command in split_commands(block.code)]
OURS = [words for words in COMMANDS if words[0] == "mc-llava"]
RUN_HERE = [words for words in OURS if not RUN_ELSEWHERE.keys() & set(words)]


def test_every_block_is_of_a_language_that_is_tested_here():
    assert {block.language for block in BLOCKS} == {"bash", "json", "python", "text"}


@pytest.fixture(scope="module")
def place(trial, tmp_path_factory) -> Path:
    """A folder with all files that the documentation names."""
    folder = tmp_path_factory.mktemp("documentation")
    (folder / MODEL).symlink_to(trial.folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    coffee = Image.open(ROOT / "examples" / "coffee.jpg")
    coffee.save(folder / "photo.jpg")
    coffee.save(folder / "other.png")
    (folder / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        coffee.save(folder / "photos" / name)
    (folder / "rows.jsonl").write_text('{"id": "q0", "image": "photo.jpg", "question": "What is it?"}\n')
    (folder / "rows.json").write_text(blocks("json", "README.md")[0])
    return folder


def run(*arguments, cwd) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = processes.run(*arguments, cwd=cwd, env=environment, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def call(words: list[str], monkeypatch, capsys, stdin: bytes = b"") -> str:
    """What a `mc-llava` command prints. It runs in this process, which saves starting another."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, capsys.readouterr().err)
    return capsys.readouterr().out


class TestPython:
    def stand_in(self, code: str) -> str:
        code = code.replace('"cuda"', '"cpu"').replace('"visheratin/MC-LLaVA-3b"', f'"{MODEL}"')
        return code.replace('from_pretrained(".", ', f'from_pretrained("{ROOT}", ')

    @pytest.mark.slow
    @pytest.mark.parametrize("document", ["README.md", "usage.md"])
    def test_the_blocks_run_one_after_another(self, document, place):
        code = "\n".join(blocks("python", document))
        printed = run("-c", self.stand_in(code), cwd=place)
        if document == "README.md":
            assert printed.splitlines()[0] == "It says 9LGP."

    @pytest.mark.slow
    def test_training_quantized_weights(self, place):
        """With a recipe and with TRL alone; and merging the adapter into a whole model."""
        (command,) = [words for words in OURS if "quantize=nf4" in words]
        rows = place / "mine.json"
        rows.write_text(blocks("json", "training.md")[0])
        for name in ("a.jpg", "b.jpg"):
            shutil.copyfile(place / "photo.jpg", place / "photos" / name)
        run("-m", "mc_llava", *command[1:], *ONE_STEP, f"model={MODEL}", f"data={rows}", "images=photos", cwd=place)
        code = self.stand_in("\n".join(blocks("python", "training.md")))
        assert "max_steps=100" in code
        code += "\nlabels = next(iter(trainer.get_train_dataloader()))['labels']"
        code += "\nprint(repr(trainer.processing_class.decode(labels[labels != -100])))"
        printed = run("-c", code.replace("max_steps=100", "max_steps=1, use_cpu=True"), cwd=place)
        assert printed.splitlines()[-1] == repr("A cup of coffee.<|im_end|>")
        adapted = MCLlavaForConditionalGeneration.from_pretrained(place / "runs" / "merged").state_dict()
        trained = MCLlavaForConditionalGeneration.from_pretrained(place / "runs" / "qlora").state_dict()
        for name, tensor in trained.items():
            torch.testing.assert_close(adapted[name].float(), tensor.float())
        assert (place / "runs" / "own" / "adapter" / "adapter_model.safetensors").exists()

    @pytest.mark.slow
    @pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="needs a vocabulary that two processes can share"
    )
    def test_the_script_for_several_processes(self, place):
        (code,) = blocks("python", "scaling.md")
        name = re.match(r"# (\S+)\n", code)[1]
        (place / name).write_text(self.stand_in(code))
        (command,) = [words for words in COMMANDS if words[0] == "torchrun" and name in words]
        assert run("-m", "torch.distributed.run", "--standalone", *command[1:], cwd=place).strip()

    def test_no_other_document_has_python_but_for_an_endpoint(self):
        """test_handler.py runs the endpoint's."""
        run = ("README.md", "usage.md", "training.md")
        others = [b for b in BLOCKS if b.language == "python" and b.document not in run]
        assert [block.document for block in others] == ["scaling.md", "serving.md"]
        assert "InferenceClient" in others[1].code


class TestCommands:
    known = get_command(cli.app).commands

    def test_each_command_is_documented(self):
        assert {words[1] for words in OURS} == set(self.known)

    def test_commands_and_options_exist(self):
        inline = [
            shlex.split(code) for path in CURRENT for code in re.findall(r"`(mc-llava [^`]+)`", path.read_text())
        ]
        modules = [words[words.index("mc_llava") - 1 :] for words in COMMANDS if "-m mc_llava" in " ".join(words)]
        assert len(inline) > 10 and len(modules) == 2
        for words in (*OURS, *inline, *(["mc-llava", *words[2:]] for words in modules)):
            if words[-1] == "--help":
                assert set(words[1:-1]) <= set(self.known)
                continue
            options = {option for parameter in self.known[words[1]].params for option in parameter.opts}
            for word in words[2:]:
                assert not word.startswith("-") or word == "-" or word in options, words

    def test_other_programs(self):
        """Their arguments exist: scripts, extras, options of launchers."""
        text = (ROOT / "pyproject.toml").read_text()
        extras = re.findall(
            r"^([\w-]+) = \[", text.partition("[project.optional-dependencies]")[2], flags=re.MULTILINE
        )
        launchers = {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}
        for words in COMMANDS:
            program = words[0]
            if program in launchers:
                options = launchers[program]._option_string_actions
                own = words[1 : words.index("-m")] if "-m" in words else words[1:]
                assert all(word in options for word in own if word.startswith("--")), words
            elif program == "pip":
                for named in re.findall(r"^\.\[(.*)\]$", words[2]):
                    assert set(named.split(",")) <= set(extras), words
            elif program in ("bash", "python") and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), words
            elif program == "python":
                assert words[2] == "vllm.entrypoints.openai.api_server"  # test_vllm.py starts it
            elif program != "mc-llava":
                assert program in OTHER_PROGRAMS, words
                assert OTHER_PROGRAMS[program] is None or (ROOT / "tests" / OTHER_PROGRAMS[program]).is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("words", RUN_HERE, ids=lambda words: " ".join(words)[:60])
    def test_it_runs(self, words, place, monkeypatch, capsys):
        monkeypatch.chdir(place)
        stdin = b"What is it?\n" if words[1] == "chat" else b""
        if "<" in words:
            words, stdin = words[: words.index("<")], Path(words[-1]).read_bytes()
        fewer = ["--num-scenes", "12"] if words[1] == "zoom-heads" else []
        printed = call([*words, *fewer], monkeypatch, capsys, stdin)
        if words[1] in ("ask", "chat", "estimate"):
            assert printed.strip()
        if words[1] == "batch":
            records = [json.loads(line) for line in Path(words[words.index("-o") + 1]).read_text().splitlines()]
            documented = [json.loads(line) for line in blocks("json", "scaling.md")[0].splitlines()]
            assert all(list(record) == list(documented[0]) for record in records)

    @pytest.mark.slow
    def test_an_evaluation_and_its_comparison(self, place, monkeypatch, capsys):
        """The documented evaluation on drawn scenes, whose results stand in for those of benchmarks."""
        monkeypatch.chdir(place)
        evaluations = [words for words in OURS if words[1] == "eval" and "scenes" in words]
        (evaluation,) = [words for words in evaluations if "--zoom" not in words]
        call(evaluation, monkeypatch, capsys)
        comparisons = [words for words in OURS if words[1] == "compare"]
        assert comparisons
        for words in comparisons:
            for path in map(Path, words[2:]):
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile("results/scenes.json", path)
            assert call(words, monkeypatch, capsys).strip()


class TestTraining:
    @pytest.mark.parametrize("document", ["README.md", "training.md"])
    def test_the_rows_are_good(self, document, place, monkeypatch):
        from mc_llava import training
        from mc_llava.loading import load_processor

        monkeypatch.chdir(place)
        (code,) = blocks("json", document)
        Path("documented.json").write_text(code)
        values = {"model": MODEL, "data": "documented.json", "images": "photos", "output": "runs/rows"}
        rows = training.check(training.build_recipe(training.Recipe, values), load_processor(MODEL))
        assert len(rows.good) == code.count('"conversations"') and not rows.broken

    @pytest.mark.slow
    def test_fine_tuning_from_rows_to_an_answer(self, place):
        """The documented commands, with one short step of training."""
        commands = [words[1:] for block in blocks("bash", "training.md") for words in split_commands(block)]
        check, train, ask = [words for words in commands if any("runs/mine" in word for word in words)][:3]
        assert train in [words[1:] for block in blocks("bash", "README.md") for words in split_commands(block)]
        run("-m", "mc_llava", *check, "num_tokens=[20,40]", cwd=place)
        run("-m", "mc_llava", *train, *ONE_STEP, cwd=place)
        assert (place / "runs" / "mine" / "adapter").is_dir()
        assert run("-m", "mc_llava", *ask, "--max-new-tokens", "4", cwd=place) is not None

    def test_recipes_and_their_overrides_can_be(self):
        from mc_llava import training
        from mc_llava.scenes.language_model import TinyRecipe

        trained = [words[2:] for words in OURS if words[1] == "train"]
        assert {words[0] for words in trained} == {
            f"examples/{name}.yaml" for name in ("finetune_3b", "pretrain_3b", "tiny")
        }
        for recipe, *overrides in trained:
            values = training.read_recipe(ROOT / recipe, [word for word in overrides if word != "--check"])
            kind = values.pop("kind", None)
            training.build_recipe(TinyRecipe if kind == "tiny" else training.Recipe, values)

    def test_the_table_has_each_name_of_a_recipe(self):
        from mc_llava import training

        text = (ROOT / "docs" / "training.md").read_text()
        table = text[text.index("| name | default | meaning |") :].partition("\n\n")[0]
        names = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
        assert names == {field.name for field in fields(training.Recipe)}

    def test_the_memory(self):
        """16 bytes per trainable parameter, 2 per frozen one."""
        from mc_llava import training

        with torch.device("meta"):
            model = MCLlavaForConditionalGeneration._from_config(MCLlavaConfig(), dtype=torch.bfloat16)

        def count(*parts) -> int:
            prefixes = tuple(f"{module}." for part in parts for module in training.PARTS[part])
            return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))

        everything = sum(p.numel() for p in model.parameters())
        small = count("coordinates", "projector")
        adapters = sum(
            64 * (module.in_features + module.out_features)
            for name, module in model.named_modules()
            if re.fullmatch(training.LORA_TARGETS, name)
        )
        most = count("coordinates", "projector", "language_model")
        text = (ROOT / "docs" / "training.md").read_text()
        for learning, others in (
            (small, everything - small),
            (small + adapters, everything),
            (most, everything - most),
        ):
            learns = f"{learning / 1e6:,.3g}" if learning < 1e9 else f"{learning / 1e6:,.0f}"
            assert f"| {learns} million | {(16 * learning + 2 * others) / 1e9:.1f} GB |" in text
        assert (
            f"LoRA needs {(16 * (small + adapters) + 2 * everything) / 1e9:.1f} GB" in (ROOT / "README.md").read_text()
        )


class TestFigures:
    @pytest.mark.slow
    def test_the_four_answers(self, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)
        text = (ROOT / "README.md").read_text()
        command = shlex.split(re.search(r"\| `(mc-llava ask .*)` \|", text)[1])
        answers = re.findall(r"^\| `(--max-crops .*)` \| \**(.+?)\** \|$", text, flags=re.MULTILINE)
        assert len(answers) == 4 and "--zoom" in answers[-1][0]
        for options, answer in answers:
            assert call([*command, *options.split()], monkeypatch, capsys).strip() == answer

    def test_the_study_is_docs_tinys(self):
        rows = re.findall(r"^\| (?:\d+|blind) \|(?: [\d.]* ?\|){8,}$", (ROOT / "README.md").read_text(), re.MULTILINE)
        assert len(rows) == 5
        assert set(rows) <= set((ROOT / "docs" / "tiny.md").read_text().splitlines())

    def test_no_kind_is_below_grids_of_the_same_cost(self):
        rows = json.loads((ROOT / "docs" / "study_zoom.json").read_text())["settings"]
        compared = 0
        for row in rows:
            for kind, found in row["accuracy"].items() if row["zoom"] else ():
                grids = [
                    other["accuracy"][kind] for other in rows if not other["zoom"] and other["size"] == row["size"]
                ]
                curve = sorted((grid["gflops"], grid["score"]) for grid in grids)  # np.interp continues it level
                assert found["score"] >= np.interp(found["gflops"], *zip(*curve)), (row["max_crops"], kind)
                compared += 1
        assert compared == 46

    def test_what_tiny_knows(self):
        from mc_llava.scenes import scene

        text = (ROOT / "docs" / "tiny.md").read_text()
        code = (ROOT / "scripts" / "prepare_objects.py").read_text()
        objects = re.findall(r'"(\w+)": "', code.partition("# fmt: skip")[0])
        assert f"{', '.join(scene.COLORS)};" in text
        assert f"{', '.join(scene.SHAPES + scene.OBJECTS)};" in text
        assert f"{len(objects)} objects, from {min(objects)} to {max(objects)}," in text

    @pytest.mark.slow
    def test_the_estimate(self, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)
        (command,) = split_commands(blocks("bash", "costs.md")[0])
        assert call(command, monkeypatch, capsys) == blocks("text", "costs.md")[0]


def anchors(path: Path) -> set[str]:
    """The anchors that the Hub and GitHub make from headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*CURRENT, CONTRIBUTING], ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    for name in re.findall(
        r"`(?:bash |python )?((?:scripts|tests|examples|docs|mc_llava)/[\w./-]*)", path.read_text()
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", [*DOCUMENTS, CONTRIBUTING], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            linked = (path.parent / name) if name else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_reading_order_names_each_file_once():
    order = CONTRIBUTING.read_text().partition("in this order:")[2].partition("\n\n")[0]
    assert sorted(f"{name}_mc_llava" for name in re.findall(r"`(\w+)`", order)) == sorted(mc_llava.ROOT_FILES)
