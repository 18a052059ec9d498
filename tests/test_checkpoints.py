"""Checkpoints: old and new names, conversion, the Auto classes, and the card's snippet."""

import copy
import hashlib
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, prompt, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from mc_llava import (
    CHAT_TEMPLATE,
    ROOT_FILES,
    MCLlavaConfig,
    MCLlavaForConditionalGeneration,
    MCLlavaImageProcessor,
    MCLlavaProcessor,
)
from mc_llava import convert as convert_module
from mc_llava.convert import convert
from mc_llava.loading import load_model, load_processor


CODE_FILES = [f"{name}.py" for name in ROOT_FILES]
PHOTOGRAPH = ROOT / "examples" / "coffee.jpg"
KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def tensor_names(folder: Path) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def ask(model, processor) -> list[int]:
    inputs = processor("What is on the table?", PHOTOGRAPH, num_tokens=60)
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()


def load(folder, **kwargs):
    return MCLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **kwargs)


class TestPublishedFolders:
    def test_every_tensor_finds_its_place(self, checkpoint):
        _, report = load(checkpoint, output_loading_info=True)
        assert not any(report[kind] for kind in KINDS)

    def test_the_values_are_the_files(self, checkpoint):
        model = load(checkpoint)
        tensors = {}
        for shard in checkpoint.glob("*.safetensors"):
            tensors |= load_file(shard)
        for ours, published in (
            (model.lm_head.bias, "language_model.lm_head.bias"),
            (model.model.language_model.layers[1].mlp.fc1.weight, "language_model.model.layers.1.mlp.fc1.weight"),
            (model.model.coord_embed[2].weight, "vision_model.coord_embed.2.weight"),
            (model.model.multi_modal_projector.linear_2.weight, "multi_modal_projector.linear_2.weight"),
            (
                model.model.vision_tower.encoder.layers[2].self_attn.q_proj.weight,
                "vision_model.vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight",
            ),
        ):
            assert torch.equal(ours, tensors[published].float())

    def test_generation_stops_at_the_end_of_a_turn(self, checkpoint):
        model = load(checkpoint)
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (50295, 50298)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias.zero_()
            model.lm_head.bias[50295] = 1.0
        inputs = MCLlavaProcessor.from_pretrained(checkpoint)("What?", PHOTOGRAPH)
        assert model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :].tolist() == [50295]

    def test_the_processor_is_ours(self, checkpoint):
        processor = MCLlavaProcessor.from_pretrained(checkpoint)
        assert type(processor.image_processor) is MCLlavaImageProcessor
        assert (processor.image_processor.max_crops, processor.image_processor.num_tokens) == (100, 728)
        assert processor.tokenizer.padding_side == "left"
        text = prompt("Does it work , or n't ?")
        assert processor.decode(processor.tokenizer(text)["input_ids"]) == text

    @pytest.mark.parametrize("change", ["missing", "unexpected", "renamed"])
    def test_wrong_names_are_noticed(self, checkpoint, tmp_path, change):
        folder = tmp_path / "wrong"
        shutil.copytree(checkpoint, folder)
        shard = next(folder.glob("*-00002-*.safetensors"))
        tensors = load_file(shard)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        name = "language_model.lm_head.bias"
        if change == "unexpected":
            tensors["vision_model.extra"] = index["weight_map"]["vision_model.extra"] = torch.zeros(1)
        else:
            tensors["language_model.head.bias"] = tensors.pop(name)
            if change == "missing":
                del tensors["language_model.head.bias"]
        index["weight_map"] = {
            **{key: value for key, value in index["weight_map"].items() if value != shard.name},
            **dict.fromkeys(tensors, shard.name),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="doesn't hold this model, (missing|unexpected)_keys"):
            convert(str(folder), str(tmp_path / "target"))
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["wrong"]


class TestStateDicts:
    """Code that reads tensors without `from_pretrained` finds them under the published names, too."""

    @pytest.fixture
    def published(self, checkpoint):
        return {
            name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()
        }

    def test_published_names(self, checkpoint, published):
        expected = load(checkpoint)
        for model in (small(expected), copy.deepcopy(small(expected)), pickle.loads(pickle.dumps(small(expected)))):
            model.load_state_dict(published)
            assert_equal(model, expected)
            wrapped = nn.ModuleDict({"module": small(expected)})
            wrapped.load_state_dict({f"module.{name}": tensor for name, tensor in published.items()})
            assert_equal(wrapped["module"], expected)

    def test_the_models_own_names(self, checkpoint):
        expected = load(checkpoint)
        model = small(expected)
        model.load_state_dict(expected.state_dict())
        assert_equal(model, expected)

    def test_the_base_model(self, checkpoint, published):
        expected = load(checkpoint).model
        model = small(load(checkpoint)).model
        found = model.load_state_dict(published, strict=False)
        assert not found.missing_keys
        assert set(found.unexpected_keys) == {"lm_head.weight", "lm_head.bias"}
        assert_equal(model, expected)

    def test_what_is_missing_and_unexpected_is_still_said(self, checkpoint, published):
        del published["language_model.lm_head.bias"]
        published["vision_model.extra"] = torch.zeros(1)
        found = small(load(checkpoint)).load_state_dict(published, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["lm_head.bias"], ["vision_model.extra"])

    def test_shards_that_transformers_loads_one_by_one(self, checkpoint, tmp_path):
        from transformers.trainer_utils import load_sharded_checkpoint

        expected = load(checkpoint)
        expected.save_pretrained(tmp_path, max_shard_size="1MB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        model = small(expected)
        load_sharded_checkpoint(model, tmp_path, strict=False)
        assert_equal(model, expected)

    def test_accelerate_loads_the_models_own_names(self, checkpoint, tmp_path):
        from accelerate import load_checkpoint_in_model

        expected = load(checkpoint)
        expected.save_pretrained(tmp_path, save_original_format=False)
        model = small(expected)
        load_checkpoint_in_model(model, tmp_path, strict=True)
        assert_equal(model, expected)


def small(like) -> MCLlavaForConditionalGeneration:
    """A model of the same size with other weights."""
    torch.manual_seed(1)
    return MCLlavaForConditionalGeneration._from_config(copy.deepcopy(like.config), dtype=torch.float32)


def assert_equal(model, expected):
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


class TestDeviceMaps:
    """With accelerate. Even on one device, the parts of the model are dispatched separately."""

    def test_one_device(self, checkpoint):
        processor = MCLlavaProcessor.from_pretrained(checkpoint)
        assert ask(load(checkpoint, device_map="cpu"), processor) == ask(load(checkpoint), processor)

    def test_parts_on_disk(self, checkpoint, tmp_path):
        model = load(checkpoint)
        model.save_pretrained(tmp_path / "model", save_original_format=False)
        parts = dict.fromkeys(("vision_tower", "coord_embed", "multi_modal_projector", "language_model"), "disk")
        device_map = {**{f"model.{part}": device for part, device in parts.items()}, "lm_head": "cpu"}
        offloaded = load(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
        processor = MCLlavaProcessor.from_pretrained(checkpoint)
        assert offloaded.model.vision_tower.device.type == "meta"
        assert ask(offloaded, processor) == ask(model, processor)
        ours, theirs = (processor("What?", PHOTOGRAPH, m)["image_features"][0] for m in (model, offloaded))
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize(
        "disk",
        [
            ["lm_head"],
            ["model.vision_tower"],
            ["model.coord_embed", "model.multi_modal_projector"],
            ["model.language_model"],
            ["model.language_model.embed_tokens"],
        ],
        ids=lambda disk: disk[0],
    )
    def test_some_on_disk_and_the_others_on_the_cpu(self, checkpoint, tmp_path, disk):
        parts = ["model.vision_tower", "model.coord_embed", "model.multi_modal_projector", "lm_head"]
        if disk == ["model.language_model"]:
            parts += disk
        else:
            parts += [f"model.language_model.{name}" for name in ("embed_tokens", "layers", "final_layernorm")]
        device_map = {part: "disk" if part in disk else "cpu" for part in parts}
        offloaded = load(checkpoint, device_map=device_map, offload_folder=tmp_path)
        model, processor = load(checkpoint), MCLlavaProcessor.from_pretrained(checkpoint)
        assert {parameter.device.type for parameter in offloaded.get_submodule(disk[0]).parameters()} == {"meta"}
        assert ask(offloaded, processor) == ask(model, processor)
        for inputs in (processor("Hi."), processor("What?", PHOTOGRAPH)):
            ours, theirs = (m(**inputs, labels=inputs["input_ids"]).loss for m in (model, offloaded))
            assert torch.equal(ours, theirs)


class TestConversion:
    def test_the_weights_are_untouched_and_the_rest_is_there(self, checkpoint, converted):
        def digests(folder):
            return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors*")}

        assert digests(checkpoint) == digests(converted)
        files = {path.name for path in converted.iterdir()}
        assert {*CODE_FILES, "config.json", "generation_config.json", "chat_template.jinja"} <= files
        assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= files
        for name in CODE_FILES:
            assert (converted / name).read_bytes() == (ROOT / name).read_bytes()
        assert json.loads((converted / "tokenizer_config.json").read_text())["padding_side"] == "left"
        assert converted.stat().st_mode & 0o777 == 0o755

    def test_a_converted_folder_can_be_converted(self, converted, tmp_path):
        again = convert(str(converted), str(tmp_path / "again"))
        assert {path.name for path in again.iterdir()} == {path.name for path in converted.iterdir()}

    def test_the_target_must_be_free(self, checkpoint, tmp_path):
        (tmp_path / "file").write_text("mine")
        for target, reason in ((tmp_path, "is not empty, it holds file"), (tmp_path / "file", "is a file")):
            with pytest.raises(
                ValueError, match=f"{reason}: (empty it, or pass a new folder|pass a new or empty folder)"
            ):
                convert(str(checkpoint), str(target))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        (tmp_path / "empty").mkdir()
        assert (convert(str(checkpoint), str(tmp_path / "empty")) / "config.json").exists()

    def test_unfinished_files_are_on_the_targets_disk_and_a_killed_run_is_in_nobodys_way(
        self, checkpoint, tmp_path, monkeypatch
    ):
        """An empty target may be a mounted volume. In a container, each run has the process id of the one before."""
        found, copy = [], convert_module._copy_weights

        def copy_and_leave(source, target):
            copy(source, target)
            found.append(target.parent)
            shutil.copytree(target, f"{target}-killed")

        monkeypatch.setattr(convert_module, "_copy_weights", copy_and_leave)
        convert(str(checkpoint), str(tmp_path / "model"))
        shutil.rmtree(tmp_path / "model")
        convert(str(checkpoint), str(tmp_path / "model"))
        (tmp_path / "volume").mkdir()
        convert(str(checkpoint), str(tmp_path / "volume"))
        assert found == [tmp_path, tmp_path, tmp_path / "volume"]

    def test_a_target_with_missing_parents_or_the_working_directory(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert (convert(str(checkpoint), "a/b/c") / "config.json").exists()
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        convert(str(checkpoint), ".")
        assert (tmp_path / "empty" / "config.json").exists()
        with pytest.raises(ValueError):
            convert(str(tmp_path), str(tmp_path / "d" / "e"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]

    def test_one_file_beside_a_stale_index(self, checkpoint, tmp_path):
        load(checkpoint).save_pretrained(tmp_path / "source")
        MCLlavaProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "source")
        (tmp_path / "source" / "model.safetensors.index.json").write_text("{}")
        target = convert(str(tmp_path / "source"), str(tmp_path / "target"))
        assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]

    @pytest.mark.parametrize(
        ("source", "options", "message"),
        [
            ("./nowhere", {}, "neither a folder nor a Hub id"),
            ("nowhere", {}, "neither a folder nor a Hub id"),
            (str(ROOT), {"revision": "main"}, "has no revision main"),
        ],
    )
    def test_sources_that_are_none(self, source, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            convert(source, str(tmp_path / "target"), **options)

    @pytest.mark.parametrize(
        "damage",
        [
            "no weights",
            "no configuration",
            "no shard",
            "cut shard",
            "empty index",
            "index of nothing",
            "index of numbers",
            "foreign shard",
            "wrong shape",
            "interrupted",
        ],
    )
    def test_nothing_is_left_behind_by_a_failure(self, checkpoint, tmp_path, monkeypatch, damage):
        source = tmp_path / "source"
        shutil.copytree(checkpoint, source)
        shard = source / "model-00002-of-00002.safetensors"
        if damage == "no weights":
            (source / "model.safetensors.index.json").unlink()
        elif damage == "no configuration":
            (source / "config.json").unlink()
        elif damage == "empty index":
            (source / "model.safetensors.index.json").write_text("{}")
        elif damage == "index of nothing":
            (source / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
        elif damage == "index of numbers":
            (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": ["c"]}}')
        elif damage == "wrong shape":
            save_file({**load_file(shard), "language_model.lm_head.bias": torch.zeros(7)}, shard)
        elif damage == "no shard":
            shard.unlink()
        elif damage == "cut shard":
            shard.write_bytes(shard.read_bytes()[:-1000])
        elif damage == "foreign shard":
            index = source / "model.safetensors.index.json"
            index.write_text(index.read_text().replace(shard.name, "../../secret.safetensors"))
        else:
            monkeypatch.setattr(
                convert_module, "_load_and_save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        with pytest.raises(KeyboardInterrupt if damage == "interrupted" else ValueError):
            convert(str(source), str(tmp_path / "target"))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ('{"metadata": {}, "weight_map": {}}', "index.json names no file: fetch it again"),
            ('{"metadata": {}, "weight_map": []}', "index.json is not an index of weights"),
            ("[]", "index.json is not an index of weights"),
            ('{"metadata": {}}', "index.json is not an index of weights .*weight_map"),
            ("{", "index.json is not an index of weights"),
            ("[" * 100_000, "index.json is not an index of weights .*[Rr]ecursion"),
            ('{"weight_map": ' + "[" * 100_000, "index.json is not an index of weights .*[Rr]ecursion"),
            ('{"weight_map": {"lm_head.bias": "SHARD"}}', "index.json is not an index of weights .*no metadata"),
            ('{"metadata": null, "weight_map": {"lm_head.bias": "SHARD"}}', "index.json is .* no metadata"),
            ('{"metadata": [], "weight_map": {"lm_head.bias": "SHARD"}}', "index.json is .* no metadata"),
            ('\ufeff{"metadata": {}, "weight_map": {"lm_head.bias": "SHARD"}}', "index.json is not an .* BOM"),
            *(
                (json.dumps({"metadata": {}, "weight_map": {"lm_head.bias": name}}), message)
                for name, message in (
                    ("model-00009-of-00002.safetensors", "lacks the shard model-00009-of"),
                    (1, "lacks the shard 1 that model.safetensors.index.json names"),
                    (None, "lacks the shard None"),
                    (["SHARD"], "is not an index of weights"),
                    ("a" * 5000, "lacks the shard a{200} that model.safetensors.index.json names"),
                    ("a\0.safetensors", "lacks the shard a"),
                    ("a\ud83d.safetensors", "lacks the shard a.ud83d"),
                    ("", "lacks the shard"),
                    ("..", "lacks the shard"),
                    ("config.json", "index.json names config.json, which is not a .safetensors"),
                    ("../source/SHARD", "lacks the shard ../source"),
                )
            ),
        ],
        ids=range(22),
    )
    def test_an_index_that_names_no_weights(self, checkpoint, tmp_path, index, message):
        folder = tmp_path / "source"
        shutil.copytree(checkpoint, folder)
        shard = next(folder.glob("*.safetensors")).name
        (folder / "model.safetensors.index.json").write_text(index.replace("SHARD", shard), encoding="utf-8")
        for load_it in (load_model, lambda source: convert(source, str(tmp_path / "target"))):
            with pytest.raises(ValueError, match=message) as error:
                load_it(str(folder))
            str(error.value).encode()
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize("sharded", [True, False])
    @pytest.mark.parametrize("damage", ["empty", "cut", "no header", "a page"])
    def test_weights_that_are_cut(self, checkpoint, converted, tmp_path, damage, sharded):
        folder = tmp_path / "source"
        shutil.copytree(converted, folder)
        if not sharded:
            MCLlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
            for file in folder.glob("model*-of-*"):
                file.unlink()
        file = max(folder.glob("*.safetensors"))
        whole = file.read_bytes()
        damaged = {"empty": b"", "cut": whole[:-1000], "no header": whole[:100], "a page": b"<html>not found</html>"}
        file.write_bytes(damaged[damage])
        for load_it in (load_model, lambda source: convert(source, str(tmp_path / "target"))):
            with pytest.raises(
                ValueError, match=f"{file.name} is truncated or not a safetensors file .*fetch it again"
            ):
                load_it(str(folder))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 3}, "missing_keys: .*layers.2"),
            ({"num_hidden_layers": 1}, "unexpected_keys: .*layers.1"),
        ],
    )
    def test_weights_of_another_model_are_not_filled_in(self, tmp_path, change, message):
        small_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load_model(str(tmp_path))

    def test_a_folder_without_a_configuration_is_not_taken_for_the_3b(self, tmp_path, processor):
        small_model().save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="has no config.json: pass a whole model folder, such as"):
            load_model(str(tmp_path))

    def test_hub_ids_revisions_and_uploads(self, checkpoint, tmp_path, monkeypatch):
        calls = []

        class Api:
            def __getattr__(self, name):
                return lambda *args, **kwargs: calls.append((name, args, kwargs))

        def download(*args, **kwargs):
            calls.append(("download", args, kwargs))
            return str(checkpoint)

        monkeypatch.setattr(convert_module, "snapshot_download", download)
        monkeypatch.setattr(convert_module, "HfApi", Api)
        target = tmp_path / "target"
        convert("visheratin/MC-LLaVA-3b", str(target), revision="main", push_to_hub="somebody/model")
        assert [name for name, _, _ in calls] == ["download", "create_repo", "upload_folder"]
        assert calls[0][1] == ("visheratin/MC-LLaVA-3b",) and calls[0][2]["revision"] == "main"
        assert not any(".bin" in pattern or ".py" in pattern for pattern in calls[0][2]["allow_patterns"])
        assert calls[2][2]["repo_id"] == "somebody/model" and calls[2][2]["folder_path"] == target

    def test_an_upload_that_fails_leaves_a_complete_folder(self, converted, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise failure("Connection refused")

        failure = type("ConnectError", (Exception,), {})  # neither an OSError nor a ValueError
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
        target = tmp_path / "target"
        with pytest.raises(OSError, match="target is complete, but .* run hf upload somebody/model .*target"):
            convert(str(converted), str(target), push_to_hub="somebody/model")
        load_model(str(target))


# As users run it: a new process, another folder, without our package and the network.
CARD_SNIPPET = """
import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

PATH, PICTURE = sys.argv[1:]
model = AutoModel.from_pretrained(PATH, torch_dtype=torch.float16, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(PATH, trust_remote_code=True)

with torch.inference_mode():
    prompt = "<|im_start|>user\\n<image>\\nWhat is on the table?<|im_end|>\\n<|im_start|>assistant\\n"
    raw_image = Image.open(PICTURE)
    inputs = processor(prompt, [raw_image], model, max_crops=100, num_tokens=728)
    assert set(inputs) == {"input_ids", "attention_mask", "image_features"}
    output = model.generate(
        **inputs,
        max_new_tokens=200,
        use_cache=True,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.eos_token_id,
    )
answer = processor.tokenizer.decode(output[0]).replace(prompt, "")
assert answer == processor.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]) != ""

messages = [{"role": "user", "content": [{"type": "image", "image": raw_image}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", max_crops=2
)
assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
assert "mc_llava" not in sys.modules
print("both ways work")
"""


class TestAutoClasses:
    @pytest.mark.slow
    def test_both_ways_of_calling_on_a_photograph(self, converted, tmp_path):
        command = [sys.executable, "-c", CARD_SNIPPET, converted, PHOTOGRAPH]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "both ways work\n"

    @pytest.mark.parametrize(
        "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    )
    def test_models(self, converted, auto_class):
        model = auto_class.from_pretrained(converted, trust_remote_code=True, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        ours = MCLlavaProcessor.from_pretrained(converted)
        assert type(model) is not MCLlavaForConditionalGeneration, "the folder's own code, not the package's"
        assert ask(model, processor) == ask(load(converted), ours)

    def test_the_others(self, converted):
        assert AutoConfig.from_pretrained(converted, trust_remote_code=True).model_type == "mc-llava"
        image_processor = AutoImageProcessor.from_pretrained(converted, trust_remote_code=True)
        assert type(image_processor).__name__ == "MCLlavaImageProcessor"
        assert len(AutoTokenizer.from_pretrained(converted, trust_remote_code=True)) == 50299

    def test_saving_twice_in_a_row(self, converted, tmp_path):
        first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
        for source, target in ((converted, first), (first, second), (second, third)):
            AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.float32).save_pretrained(target)
            AutoProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(target)
        assert {path.name for path in third.iterdir()} == {path.name for path in first.iterdir()} > set(CODE_FILES)
        for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
            assert (second / name).read_text() == (third / name).read_text()
        reloaded = AutoModel.from_pretrained(third, trust_remote_code=True)
        assert ask(reloaded, AutoProcessor.from_pretrained(third, trust_remote_code=True)) == ask(
            load(converted), MCLlavaProcessor.from_pretrained(converted)
        )

    @pytest.mark.parametrize("save_original_format", [True, False])
    def test_old_and_new_names(self, checkpoint, tmp_path, save_original_format):
        model = load(checkpoint)
        model.save_pretrained(tmp_path, save_original_format=save_original_format)
        names = tensor_names(tmp_path)
        assert ("language_model.lm_head.bias" in names) == save_original_format
        assert ("model.coord_embed.0.bias" in names) != save_original_format
        again, report = load(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in KINDS)
        for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(a, b), name

    def test_a_saved_base_model(self, checkpoint, tmp_path):
        load(checkpoint).model.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(base).__name__ == "MCLlavaModel"

    def test_a_model_of_a_configuration(self, converted):
        """vLLM takes `AutoModel` without a head and brings its own."""
        config = AutoConfig.from_pretrained(converted, trust_remote_code=True)
        base = AutoModel.from_config(config, trust_remote_code=True)
        whole = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
        assert (type(base).__name__, type(whole).__name__) == ("MCLlavaModel", "MCLlavaForConditionalGeneration")

    def test_a_subfolder_takes_its_code_from_the_root(self, converted, tmp_path):
        repository, tiny = tmp_path / "repository", tmp_path / "repository" / "tiny"
        shutil.copytree(converted, tiny, ignore=lambda folder, names: CODE_FILES)
        for name in (*CODE_FILES, "config.json"):
            shutil.copyfile(ROOT / name, repository / name)
        options = {"subfolder": "tiny", "trust_remote_code": True}
        model = AutoModel.from_pretrained(repository, dtype=torch.float32, **options)
        reference = load(converted), MCLlavaProcessor.from_pretrained(converted)
        assert ask(model, AutoProcessor.from_pretrained(repository, **options)) == ask(*reference)

    def test_push_to_hub(self, converted, monkeypatch, tmp_path):
        from transformers.utils import hub

        uploads = []
        monkeypatch.setattr(hub, "create_commit", lambda **kwargs: uploads.append(kwargs), raising=False)
        monkeypatch.setattr(
            "huggingface_hub.HfApi.create_commit", lambda self, **kwargs: uploads.append(kwargs), raising=True
        )

        class Url:
            repo_id = "somebody/model"

        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: Url())
        monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: Url(), raising=False)
        monkeypatch.chdir(tmp_path)
        load(converted).push_to_hub("somebody/model")
        files = {operation.path_in_repo for upload in uploads for operation in upload["operations"]}
        assert {"config.json", "modeling_mc_llava.py", "model.safetensors"} <= files

    def test_a_pushed_processor_brings_its_code(self, converted, monkeypatch, tmp_path):
        """As a whole, and as the image processor alone, which a pipeline saves."""
        uploads = []

        class Url:
            repo_id = "somebody/model"

        monkeypatch.setattr("huggingface_hub.HfApi.create_commit", lambda self, **kwargs: uploads.append(kwargs))
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: Url())
        monkeypatch.chdir(tmp_path)
        code = {
            "processing_mc_llava.py",
            "image_processing_mc_llava.py",
            "image_loading_mc_llava.py",
            "crops_mc_llava.py",
        }
        processor = MCLlavaProcessor.from_pretrained(converted)
        for push, config in (
            (lambda: processor.push_to_hub("somebody/model"), "processor_config.json"),
            (lambda: processor.image_processor.push_to_hub("somebody/model"), "preprocessor_config.json"),
            (
                lambda: processor.image_processor.save_pretrained("here", push_to_hub=True, repo_id="somebody/model"),
                "preprocessor_config.json",
            ),
        ):
            uploads.clear()
            push()
            files = {operation.path_in_repo for upload in uploads for operation in upload["operations"]}
            assert code | {config} <= files

    def test_options_for_loading_a_processor(self, converted, tmp_path):
        def auto(folder, **options):
            return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **options)

        options = {"padding_side": "right", "clean_up_tokenization_spaces": True, "backend": "pil", "max_crops": 1}
        processor = auto(converted, **options)
        assert processor.tokenizer.padding_side == "right" and processor.tokenizer.clean_up_tokenization_spaces is True
        assert auto(converted).tokenizer.padding_side == "left"
        assert len(processor("a", PHOTOGRAPH)["crop_boxes"]) == 1
        # What is set afterwards counts, and is saved.
        processor.image_processor.max_crops = 2
        assert len(processor("a", PHOTOGRAPH)["crop_boxes"]) == 3
        processor.save_pretrained(tmp_path)
        assert len(auto(tmp_path)("a", PHOTOGRAPH)["crop_boxes"]) == 3

    def test_a_tokenizer_saved_alone_names_no_code(self, converted, tmp_path):
        processor = MCLlavaProcessor.from_pretrained(converted)
        processor.tokenizer.save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(processor.tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model": {'),
        ("processor_config.json", b"[]"),
        ("chat_template.jinja", b"{% for message in messages %}"),
        ("chat_template.jinja", b"{{ messages[0].nothing.more }}"),
    ],
)
def test_a_damaged_file_of_a_processor_is_an_error_that_names_the_folder(converted, tmp_path, name, content):
    shutil.copytree(converted, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError, match="processor of .*/model can't be loaded .*fetch its files again"):
        load_processor(str(tmp_path / "model"))


def test_what_a_folder_lacks_to_be_a_models(tmp_path):
    with pytest.raises(
        ValueError, match="has no config.json, processor_config.json, tokenizer.json, model.safetensors: p"
    ):
        load_processor(str(tmp_path))
    with pytest.raises(
        ValueError, match=f"the folder {ROOT} has no tokenizer.json, model.safetensors: pass a whole mo"
    ):
        load_processor(str(ROOT))
    shutil.copytree(ROOT / "tiny", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert load_processor(str(tmp_path / "model")), "it needs no weights"


class TestASavedImageProcessor:
    def test_saving_changes_no_configuration(self, converted, tmp_path):
        """Otherwise a cache of features would miss its images, and datasets, which hash all attributes, its rows."""
        processor = MCLlavaProcessor.from_pretrained(converted)
        saved = processor, processor.image_processor

        def look() -> list[dict]:
            return [{name: repr(value) for name, value in vars(one).items()} for one in saved]

        before, attributes = processor.image_processor.to_dict(), look()
        processor.save_pretrained(tmp_path / "both")
        processor.image_processor.save_pretrained(tmp_path / "one")
        assert processor.image_processor.to_dict() == before and look() == attributes
        for folder in ("both", "one"):
            again = MCLlavaImageProcessor.from_pretrained(tmp_path / folder)
            assert again.to_dict() == before

    def test_numbers_of_numpy_and_torch_are_saved(self, tmp_path):
        numbers = {"max_crops": np.int64(5), "num_tokens": torch.tensor(50), "zoom": np.int32(1)}
        numbers |= {"image_mean": np.float32(0.5), "image_std": np.array([0.5] * 3), "do_normalize": np.bool_(True)}
        MCLlavaImageProcessor(**numbers, size={"height": np.int64(98), "width": np.int64(98)}).save_pretrained(
            tmp_path
        )
        again = MCLlavaImageProcessor.from_pretrained(tmp_path)
        assert (again.max_crops, again.num_tokens, again.zoom, again.size["height"]) == (5, 50, 1, 98)
        assert again.image_mean == 0.5 and list(again.image_std) == [0.5] * 3 and again.do_normalize is True

    def test_unknown_keys_are_ignored_and_named(self, converted, tmp_path, caplog):
        """An extra attribute of the user's, or an option of a newer version."""
        processor = MCLlavaProcessor.from_pretrained(converted)
        processor.image_processor.zoom_of_tomorrow = {"levels": 3}
        processor.save_pretrained(tmp_path)
        again = MCLlavaProcessor.from_pretrained(tmp_path)
        MCLlavaImageProcessor.from_pretrained(tmp_path)
        assert caplog.text.count("unknown options zoom_of_tomorrow, which are ignored") == 1
        assert not hasattr(again.image_processor, "zoom_of_tomorrow")
        assert torch.equal(again("a", PHOTOGRAPH)["pixel_values"], processor("a", PHOTOGRAPH)["pixel_values"])
        with pytest.raises(ValueError, match="unknown options max_crop: did you mean max_crops?"):
            MCLlavaImageProcessor(max_crop=3)
        with pytest.raises(ValueError, match="unknown options max_crop"):
            again("a", PHOTOGRAPH, max_crop=3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"image_std": [0.5, 0, 0.5]},
                r"image_std must be a finite number above 0, or three of them, got \[0.5, 0",
            ),
            ({"image_std": 0}, "image_std must be a finite number above 0"),
            ({"image_std": [-0.5] * 3}, "image_std must be a finite number above 0"),
            ({"image_std": [0.5, 0.5]}, "or three of them"),
            ({"image_std": [math.inf] * 3}, "image_std must be a finite number above 0"),
            ({"image_mean": [0.5, math.nan, 0.5]}, "image_mean must be a finite number, or three of them"),
            ({"image_mean": ["0.5"] * 3}, "image_mean must be a finite number"),
            ({"image_mean": "0.5"}, "image_mean must be a finite number"),
            ({"image_mean": [True] * 3}, "image_mean must be a finite number"),
            ({"rescale_factor": math.nan}, "rescale_factor must be a finite number above 0"),
            ({"rescale_factor": 0}, "rescale_factor must be a finite number above 0"),
            ({"rescale_factor": 10**400}, "rescale_factor must be a finite number above 0"),
            ({"resample": 99}, "resample must be one of Pillow's 0 .nearest."),
            ({"resample": 3.0}, "resample must be one of Pillow's 0 .nearest."),
            ({"do_normalize": "no"}, "do_normalize must be true or false"),
            ({"size": {"height": 384, "width": 380}}, "size must have equal height and width"),
            ({"size": {"shortest_edge": 384}}, "size must have equal height and width"),
            ({"size": {"height": 10**9, "width": 10**9}}, "size must be at most 20000, got 1000000000"),
            ({"size": {"height": 0, "width": 0}}, "size must be at least 1, got 0"),
            ({"size": {"height": 38.4, "width": 38.4}}, "size must be an integer"),
            ({"patch_size": 0}, "patch_size must be at least 1"),
        ],
    )
    def test_what_would_give_garbage_is_refused(self, converted, tmp_path, changes, message):
        processor = MCLlavaProcessor.from_pretrained(converted)
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        saved["image_processor"] |= changes
        (tmp_path / "processor_config.json").write_text(json.dumps(saved))
        with pytest.raises(ValueError, match=message):
            MCLlavaProcessor.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            processor("a", PHOTOGRAPH, **changes)

    def test_attributes_that_would_give_garbage(self, converted):
        processor = MCLlavaProcessor.from_pretrained(converted)
        processor.image_processor.image_std = [0.0] * 3
        with pytest.raises(ValueError, match="image_std must be a finite number above 0"):
            processor("a", PHOTOGRAPH)
        for name, value in (
            ("image_std", [1e-40] * 3),
            ("image_std", [1e-30] * 3),  # finite, but the tower turns it into NaN
            ("image_mean", [1e300] * 3),
            ("rescale_factor", 1e-320),
            ("do_rescale", None),
            ("patch_size", 0),
        ):
            processor = MCLlavaProcessor.from_pretrained(converted)
            setattr(processor.image_processor, name, value)
            with pytest.raises(ValueError, match=f"{name}.* (give the bytes 0 to 255|must be at least 1)"):
                processor("a", PHOTOGRAPH)


class TestTheRootOfTheRepository:
    def test_configuration(self):
        config = MCLlavaConfig.from_pretrained(ROOT)
        expected = MCLlavaConfig(dtype="float16", architectures=["MCLlavaForConditionalGeneration"])
        ignored = ("transformers_version", "_name_or_path")
        ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, expected))
        assert ours == theirs
        assert json.loads((ROOT / "config.json").read_text())["auto_map"] == config.auto_map

    def test_generation_configuration_and_template(self, converted):
        generation = json.loads((ROOT / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 50256, "eos_token_id": 50295, "pad_token_id": 50298}
        assert json.loads((converted / "generation_config.json").read_text()).items() >= generation.items()
        for folder in (ROOT, ROOT / "tiny", converted):
            assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE, folder

    def test_processor_configuration(self, converted):
        assert (ROOT / "processor_config.json").read_text() == (converted / "processor_config.json").read_text()

    def test_the_remote_code_needs_nothing_but_the_core(self):
        import ast

        # torch requires jinja2, and a chat template needs it anyway.
        core = {"torch", "transformers", "safetensors", "PIL", "numpy", "huggingface_hub", "jinja2"}
        allowed = core | sys.stdlib_module_names
        for name in CODE_FILES:
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules = [node.module]
                assert {module.split(".")[0] for module in modules} <= allowed, name
