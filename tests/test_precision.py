"""The default precision of a model, what reports it, and the memory that loading takes."""

import json
import os
import sys
import threading

import processes
import pytest
import torch
from helpers import ROOT, load_handler, picture, small_model
from make_published_checkpoint import write_published_checkpoint
from PIL import Image
from transformers import AutoModel, AutoProcessor, modeling_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mc_llava import MCLlavaForConditionalGeneration, choose_dtype, computes_in_bfloat16, precision_mc_llava
from mc_llava.batch import Job
from mc_llava.batch import run as run_job
from mc_llava.loading import load_model, resolve_dtype
from mc_llava.modeling_mc_llava import one_copy


HERE = choose_dtype("cpu")
NAME = str(HERE).removeprefix("torch.")


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch):
    """Each warning is given once per process; here, once per test."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    precision_mc_llava.logger.warning_once.__func__.cache_clear()


def run(*arguments, **environment):
    return processes.run(*arguments, env={**os.environ, **environment}, text=True)


class TestChoice:
    @pytest.mark.parametrize(
        ("capabilities", "held_to", "expected"),
        [
            ({"avx512_bf16": True}, None, True),
            ({"avx512_bf16": True}, "", True),
            ({"avx512_bf16": True}, "ALL", True),
            ({"avx512_bf16": True}, "AVX512_CORE_BF16", True),
            ({"amx_bf16": True, "avx512_bf16": False}, "AVX512_CORE_AMX", True),
            ({"bf16": True, "architecture": "aarch64"}, None, True),
            ({"avx2": True, "avx512_bf16": False, "avx_vnni": True}, None, False),
            ({}, None, False),
            ({"avx512_bf16": True}, "AVX2", False),
            ({"avx512_bf16": True}, "avx2", False),
            ({"avx512_bf16": True, "amx_bf16": True}, "AVX512_CORE", False),  # computed in float32, which takes longer
            ({"avx512_bf16": True}, "AVX2_VNNI_2", False),
        ],
    )
    def test_what_the_processor_computes_in(self, capabilities, held_to, expected, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        if held_to is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
        assert computes_in_bfloat16() == expected
        assert choose_dtype("cpu") == choose_dtype(torch.device("cpu")) == [torch.float32, torch.bfloat16][expected]
        assert {choose_dtype(device) for device in ("cuda", "cuda:1", "mps", "xpu")} == {"auto"}

    def test_the_older_name_of_the_variable_and_torch_without_onednn(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
        assert choose_dtype("cpu") == torch.float32
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")  # it is read first
        assert choose_dtype("cpu") == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            assert choose_dtype("cpu") == torch.float32
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert choose_dtype("cpu") == torch.float32


class TestLoading:
    """The file holds float16."""

    def test_auto_is_printed_once(self, converted, capsys):
        assert load_model(str(converted)).dtype == HERE
        assert capsys.readouterr().err.count(f"computing in {NAME} on cpu") == 1

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_what_is_asked_for_is_obeyed(self, converted, capsys, dtype):
        model = load_model(str(converted), dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {getattr(torch, dtype)}
        assert "computing in" not in capsys.readouterr().err
        assert load_model(str(converted), getattr(torch, dtype)).dtype == getattr(torch, dtype)

    def test_resolved_before_it_is_loaded(self, converted, monkeypatch):
        assert resolve_dtype(str(converted)) == HERE
        assert resolve_dtype(str(converted), "float16") == torch.float16
        monkeypatch.setattr("mc_llava.loading.find_device", lambda name=None: name or "cuda")
        assert resolve_dtype(str(converted)) == torch.float16, "an accelerator computes in what the file holds"
        for name in ("float17", "Tensor"):
            with pytest.raises(ValueError, match=f"must be auto, float32, bfloat16 or float16, got '{name}'"):
                load_model(str(converted), name)

    def test_the_handler(self, converted, capsys):
        handler = load_handler(converted).EndpointHandler(str(converted))
        assert handler.model.dtype == HERE
        assert capsys.readouterr().err.count(f"computing in {NAME} on cpu") == 1

    def test_results_of_batch(self, trial, tmp_path, monkeypatch):
        """Results record the dtype of the computation, and are not mixed with another's."""
        picture(30, 20).save(tmp_path / "a.png")
        job = Job(str(tmp_path / "a.png"), str(trial.folder), max_new_tokens=2, max_crops=0)
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"image": "a.png", "question": "What?"}) + "\n")
        job = Job(str(rows), str(trial.folder), max_new_tokens=2, max_crops=0)
        assert run_job(job, tmp_path / "out.jsonl") == (1, 0)
        origin = json.loads((tmp_path / "out.jsonl.origin").read_text().splitlines()[0])
        assert origin["dtype"] == NAME
        monkeypatch.setattr("mc_llava.loading.choose_dtype", lambda device: torch.float64)
        with pytest.raises(ValueError, match=f"dtype.*{NAME}"):
            run_job(job, tmp_path / "out.jsonl")

    @pytest.mark.slow
    @pytest.mark.parametrize("held_to", ["", "AVX2"])
    def test_commands(self, converted, tmp_path, held_to):
        expected = NAME if not held_to else "float32"
        options = ("--model", converted, "--max-new-tokens", 2, "--max-crops", 0)
        asked = run(
            "-m", "mc_llava", "ask", ROOT / "examples" / "coffee.jpg", "What?", "--json", *options,
            ONEDNN_MAX_CPU_ISA=held_to,
        )  # fmt: skip
        assert json.loads(asked.stdout)["dtype"] == expected, asked.stderr
        assert (
            asked.stderr.count(f"computing in {expected} on cpu") == 1 and "several times slower" not in asked.stderr
        )
        options = ("--output", tmp_path, "--tasks", "scenes", "--limit", 1, *options)
        run("-m", "mc_llava", "eval", *options, ONEDNN_MAX_CPU_ISA=held_to)
        assert json.loads((tmp_path / "scenes.json").read_text())["settings"]["dtype"] == expected


class TestFloat16:
    """A user who asks for float16 gets it, with a warning."""

    @staticmethod
    def warnings(caplog) -> list[str]:
        return [record.message for record in caplog.records if "several times slower" in record.message]

    def test_the_cards_snippet(self, converted, caplog):
        model = AutoModel.from_pretrained(converted, torch_dtype=torch.float16, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        assert model.dtype == torch.float16
        prompt = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        for _ in range(2):
            with torch.inference_mode():
                inputs = processor(prompt, [Image.new("RGB", (40, 30))], model, max_crops=100, num_tokens=728)
                model.generate(**inputs, max_new_tokens=2, use_cache=True, do_sample=False)
        (warning,) = self.warnings(caplog)
        assert f"than {HERE}: load it with dtype={HERE}" in warning

    def test_text_alone(self, caplog):
        small_model().half().generate(torch.tensor([[5, 6]]), max_new_tokens=1)
        assert len(self.warnings(caplog)) == 1

    def test_pictures_alone(self, processor, caplog):
        small_model().half().encode_images(**processor("What?", picture(40, 30)))
        assert len(self.warnings(caplog)) == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_others_are_not_warned(self, processor, caplog, dtype):
        small_model().to(dtype).generate(**processor("What?", picture(40, 30)), max_new_tokens=1)
        precision_mc_llava.warn_of_float16(torch.float16, torch.device("cuda"))
        assert self.warnings(caplog) == []


class TestOneCopy:
    def test_a_dtype_for_each_part(self, converted):
        """transformers uses the model's dtype, and warns that such dictionaries are deprecated."""
        for dtype in ({"": torch.bfloat16, "text_config": torch.float32}, {"": "bfloat16"}):
            model = MCLlavaForConditionalGeneration.from_pretrained(converted, dtype=dtype)
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_copies_of_the_code_load_in_turn(self, converted):
        plain, loading = modeling_utils.safe_open, threading.Event()
        of_other_code = get_class_from_dynamic_module("modeling_mc_llava.one_copy", converted)

        def load():
            with of_other_code("float16"):
                loading.set()
                assert ended.wait(10)

        ended, thread = threading.Event(), threading.Thread(target=load)
        with one_copy("float16"):
            thread.start()
            loading.wait(0.2)
        ended.set()
        thread.join()
        assert modeling_utils.safe_open is plain


PEAK = """
import sys
from pathlib import Path
from mc_llava.loading import load_model
from mc_llava import MCLlavaForConditionalGeneration

def held():
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage counts the process that started this one
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = held()
folder, how, dtype = sys.argv[1:]
load = load_model if how == "load_model" else MCLlavaForConditionalGeneration.from_pretrained
model = load(folder, dtype=dtype)
size = sum(parameter.nbytes for parameter in model.parameters())
print(size, held() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(("how", "dtype"), [("load_model", "float32"), ("from_pretrained", "bfloat16")])
def test_loading_in_another_dtype_holds_one_copy(tmp_path_factory, how, dtype):
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    folder = write_published_checkpoint(tmp_path_factory.mktemp("large") / "it", {"text": text, "vision": vision})
    size, peak = map(int, run("-c", PEAK, folder, how, dtype).stdout.split())
    assert 3e8 < size < peak < 1.5 * size  # a tensor in each of four threads comes on top
