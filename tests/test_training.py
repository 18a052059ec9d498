"""The recipe, on rows in the exact format of LLaVA-Pretrain and LLaVA-Instruct-150K and a very small model."""

import codecs
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from helpers import small_model, write_untrained_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, cli, scenes, training
from mc_llava.loading import NOT_QUANTIZED
from mc_llava.training import (
    LORA_TARGETS,
    PARTS,
    Collator,
    Lora,
    Recipe,
    Rows,
    StopIfDiverged,
    build_recipe,
    check,
    last_checkpoint,
    read_entries,
    read_recipe,
    record_run,
    train,
    training_arguments,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, images and both kinds of data."""
    folder = tmp_path_factory.mktemp("training")
    write_untrained_tiny(folder / "model", layers=1)

    pretrain, instruct = [], []
    asked = "<image>\nWhat color is the sign?", "What color is the sign?\n<image>"
    for index in range(8):
        scene = scenes.make_scene(index)
        image = scenes.draw_scene(scene).resize((400, 300))
        name = f"{index:05d}/{index:09d}.jpg"  # LLaVA-Pretrain has folders
        (folder / "images" / name).parent.mkdir(parents=True)
        image.save(folder / "images" / name)
        pretrain.append(
            {
                "id": f"{index:09d}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": "Give a brief description of the image.\n<image>"},
                    {"from": "gpt", "value": "a red sign that says K7"},
                ],
            }
        )
        instruct.append(
            {
                "id": index if index == 1 else f"{index:012d}",  # LLaVA's mixtures have both
                "image": name,
                "conversations": [
                    {"from": "human", "value": asked[index % 2]},
                    {"from": "gpt", "value": "The sign is red."},
                    {"from": "human", "value": "What does it say?"},
                    {"from": "gpt", "value": "It says K7."},
                ],
            }
        )
    turns = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]
    instruct.insert(4, {"id": "text", "conversations": turns})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(pretrain))
    (folder / "llava_instruct_150k.json").write_text(json.dumps(instruct))
    return folder


@pytest.fixture
def recipe(folder, tmp_path) -> Recipe:
    return Recipe(
        model=str(folder / "model"),
        data=str(folder / "llava_instruct_150k.json"),
        images=str(folder / "images"),
        output=str(tmp_path / "run"),
        train=tuple(PARTS),
        max_crops=(0, 4),
        num_tokens=(8, 16),
        max_steps=4,
        batch_size=2,
        save_steps=2,
        log_steps=1,
        workers=0,
        learning_rate=1e-2,
        bf16=False,
    )


def collate(recipe, count=2):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    rows = check(recipe, processor).good[:count]
    return processor, rows, Collator(processor, recipe, context=2048)(rows)


def losses(output: Path) -> dict[int, float]:
    """Step -> loss, as recorded in the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("blip_laion_cc_sbu_558k.json", "a red sign that says K7<|im_end|>"),
        ("llava_instruct_150k.json", "The sign is red.<|im_end|>It says K7.<|im_end|>"),
    ],
)
def test_loss_is_on_what_the_assistant_says(folder, recipe, data, said):
    processor, rows, batch = collate(replace(recipe, data=str(folder / data)))
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        spoken = labels != -100
        assert torch.equal(labels[spoken], ids[spoken])
        assert processor.tokenizer.decode(labels[spoken]) == said
    image_tokens = (batch["input_ids"] == processor.image_token_id).sum()
    assert image_tokens == batch["crop_num_tokens"].sum()
    # Wherever the row has its <image>, the prompt is the published one.
    for row, ids in zip(rows, batch["input_ids"]):
        prompt = processor.tokenizer.decode(ids)
        assert prompt.startswith("<|im_start|>user\n<image><image>")
        assert "<image>\n" + row["messages"][0]["content"] + "<|im_end|>" in prompt


@pytest.mark.parametrize("saved_zoom", [0, 2])
def test_a_batch_is_what_the_processor_returns_for_its_rows(recipe, monkeypatch, saved_zoom):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    processor.image_processor.zoom = saved_zoom  # which training leaves out
    rows, opened, open_image = check(recipe, processor).good[:3], [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: opened.append(file) or open_image(file, **options))
    recipe = replace(recipe, max_crops=(3, 3), num_tokens=(16, 16))
    batch = Collator(processor, recipe, context=2048)(rows)
    assert len(opened) == 3
    pixels = []
    for index, row in enumerate(rows):
        question, *others = row["messages"]
        parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": question["content"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}, *others],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"max_crops": 3, "num_tokens": 16, "zoom": 0},
        )
        ids, length = inputs["input_ids"][0], inputs["input_ids"].shape[1]
        labels = ids.where(torch.as_tensor(inputs["assistant_masks"])[0].bool(), -100)
        assert torch.equal(batch["input_ids"][index, :length], ids)
        assert torch.equal(batch["labels"][index, :length], labels)
        assert batch["attention_mask"][index].sum() == length
        pixels.append(inputs["pixel_values"])
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert set(batch) == set(inputs) - {"assistant_masks"} | {"labels"}


def test_knobs_are_drawn_for_each_row_and_again_the_same(recipe):
    recipe = replace(recipe, max_crops=(0, 8), num_tokens=(16, 64))
    _, _, batch = collate(recipe, count=8)
    assert len(set(batch["image_grid_thw"][:, 0].tolist())) > 2
    assert torch.equal(batch["crop_num_tokens"], collate(recipe, count=8)[2]["crop_num_tokens"])
    other = collate(replace(recipe, seed=1), count=8)[2]
    assert other["crop_num_tokens"].tolist() != batch["crop_num_tokens"].tolist()
    fixed = collate(replace(recipe, max_crops=(0, 0), num_tokens=(5, 5)), count=3)[2]
    assert fixed["crop_num_tokens"].tolist() == [5, 5, 5]


def test_a_template_that_marks_nothing_to_learn_is_refused(recipe):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        processor.chat_template = processor.chat_template.replace(mark, "")
    with pytest.raises(ValueError, match="doesn't mark what the assistant says"):
        check(recipe, processor)


def test_what_would_fail_after_the_model_was_loaded_is_refused_by_the_check(recipe):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    processor.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}\n{% endfor %}"
    )
    with pytest.raises(ValueError, match="the chat template writes 0 <image> for 1 images: take one that writes"):
        check(recipe, processor)
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=f"the tokenizer of {recipe.model} has no pad_token: name one"):
        check(recipe, processor)


def test_options_of_generate_that_no_checkpoint_can_hold_are_refused(recipe, tmp_path):
    """Trainer writes its tokenizer's tokens into them, and transformers then checks them when it saves them."""
    model = shutil.copytree(recipe.model, tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    with pytest.raises(ValueError, match="can't be saved with a checkpoint, set do_sample to true there"):
        train(replace(recipe, model=str(model)))
    (model / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    assert (train(replace(recipe, model=str(model), max_steps=1)) / "model.safetensors").exists()
    (model / "generation_config.json").unlink()
    check(replace(recipe, model=str(model)), MCLlavaProcessor.from_pretrained(model))


def test_what_the_template_refuses_is_a_broken_row(recipe, tmp_path):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    refuses = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system here') }}{%- endif -%}"
    processor.chat_template = refuses + processor.chat_template
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hi."}]
    system = [{"from": "system", "value": "Answer briefly."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}, {"conversations": system + turns}]))
    rows = check(replace(recipe, data=str(tmp_path / "rows.json"), max_broken=1), processor)
    assert [row["row"] for row in rows.good] == [0]
    assert [(row["row"], row["reason"]) for row in rows.broken] == [(1, "no system here")]


def test_text_that_is_named_like_a_picture_stays_text(recipe, tmp_path):
    turns = [{"from": "human", "value": "What is in a.jpg?"}, {"from": "gpt", "value": "a.jpg"}]
    entry = {"id": "00000/000000000.jpg", "source": "a.jpg", "conversations": turns}
    (tmp_path / "rows.json").write_text(json.dumps([entry]))
    _, (row,), _ = collate(replace(recipe, data=str(tmp_path / "rows.json")))
    assert row["image"] is None


def test_text_alone_gets_a_blank_image_and_the_context_cuts_its_end(folder, recipe, tmp_path):
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It says K7."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": index, "conversations": turns}) + "\n" for index in range(2)))
    processor, rows, batch = collate(replace(recipe, data=str(path)))
    assert batch["crop_num_tokens"].tolist() == [1]
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [0, 0, 1]
    assert (batch["labels"][2] == -100).all() and (batch["labels"][:2] != -100).any()
    model = MCLlavaForConditionalGeneration.from_pretrained(recipe.model)
    text = {name: batch[name][:2] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**text).loss)
    cut = Collator(processor, recipe, context=12)(rows)
    assert torch.equal(cut["input_ids"], batch["input_ids"][:, :12])


def row(value="<image>\nWhat?", answer="That.", image="00000/000000000.jpg", **changes):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "x", "image": image, "conversations": turns} | changes


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (row(image="none.jpg"), "cannot read the image"),
        (row(image="cut.jpg"), "is corrupt"),
        (row(answer=" "), "turn of gpt is empty"),
        (row(value="<image>"), "turn of human is empty"),
        (row(value="What?"), "0 <image> for 1 images"),
        (row(value="<image><image> What?"), "2 <image> for 1 images"),
        (row(image=None), "1 <image> for 0 images"),
        (row(answer="That.<|im_end|>"), "special token <|im_end|>"),
        (row(conversations=[]), "no conversations"),
        (row(conversations=[{"from": "human", "value": "<image> What?"}]), "must alternate"),
        (row(conversations=[{"from": "bot", "value": "Hi."}]), "a turn must have from"),
        (row(conversations=[{"from": ["human"], "value": "Hi."}]), "a turn must have from"),
        (row(conversations=["Hi."]), "a turn must have from"),
        (row(conversations=[{"from": "gpt", "value": "Hi."}]), "must alternate"),
        (row(answer="\ud800"), "half of a surrogate pair"),
        (row(value="<image>" + 2040 * "7"), "tokens, there is room for 2031"),
        (row(image=["a.jpg", "b.jpg"]), "image must be one path"),
        (row(image=None, value="What?") | {"images": ["cut.jpg"]}, "no image, but 'images', which holds one"),
        (row(image=None, value="What?") | {"image_path": "cut.jpg"}, "no image, but 'image_path', which holds one"),
        (row(image=None, value="What?") | {"extra": json.loads("[" * 900 + "]" * 900)}, "recursion"),
        ("text", "no conversations"),
    ],
)
def test_broken_rows_are_named_skipped_and_refused_past_the_limit(folder, recipe, tmp_path, entry, reason):
    good = json.loads((folder / "llava_instruct_150k.json").read_text())
    whole = (folder / "images" / "00000" / "000000000.jpg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good[0], entry, good[1]]))
    processor = MCLlavaProcessor.from_pretrained(recipe.model)

    rows = check(replace(recipe, data=str(path), max_broken=1), processor)
    assert [row["id"] for row in rows.good] == [good[0]["id"], str(good[1]["id"])]
    (named,) = [json.loads(line) for line in Path(recipe.output, "broken.jsonl").read_text().splitlines()]
    assert named["row"] == 1 and reason in named["reason"]
    with pytest.raises(ValueError, match="1 of 3 rows are broken, max_broken is 0"):
        check(replace(recipe, data=str(path)), processor)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "\ud800"}, "the id can't be encoded as UTF-8"),
        ({"id": ["\ud800"], "image": "none.jpg"}, "cannot read the image"),
        ({"image": "\ud800.jpg"}, "the path of the image can't be encoded as UTF-8"),
        ({"image": "\udce9.jpg"}, "the path of the image can't be encoded as UTF-8"),  # the file is there
        ({"image": ["\ud800"]}, "image must be one path"),
    ],
)
def test_half_of_a_surrogate_pair_makes_a_row_broken_and_ends_no_training(folder, recipe, tmp_path, change, reason):
    whole = (folder / "images" / "00000" / "000000000.jpg").read_bytes()
    (folder / "images" / os.fsdecode(b"\xe9.jpg")).write_bytes(whole)
    good = json.loads((folder / "llava_instruct_150k.json").read_text())[:2]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good[0], row() | change, good[1]]))
    with pytest.raises(ValueError, match="1 of 3 rows are broken, max_broken is 0") as raised:
        train(replace(recipe, data=str(path)))
    str(raised.value).encode()
    (named,) = [json.loads(line) for line in Path(recipe.output, "broken.jsonl").read_text().splitlines()]
    assert named["row"] == 1 and reason in named["reason"] and named["id"] == str(change.get("id", "x"))
    train(replace(recipe, data=str(path), max_broken=1, max_steps=1))
    assert Path(recipe.output, "model.safetensors").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_data_that_is_not_in_utf_8_is_refused(tmp_path, encoding):
    for text in ('[{"id": "1"}]', '{"id": "1"}\n{"id": "2"}\n'):
        (tmp_path / "rows.json").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match="rows.json as JSON or JSON lines: it looks like UTF-.*save it as UTF-8"):
            read_entries(str(tmp_path / "rows.json"))


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*rows.json as JSON or JSON lines: .*No such file"):
        read_entries(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("name", ["epochs", "warmup", "learning_rate", "weight_decay"])
def test_numbers_that_are_not_finite_are_refused_before_rows_are_read(recipe, name):
    for number in ("inf", "nan"):
        values = asdict(recipe) | {name: float(number)}
        with pytest.raises(ValueError, match=f"the recipe is invalid: {name} .*finite"):
            build_recipe(Recipe, values)


def test_a_line_that_is_cut_is_a_broken_row(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n\n" + json.dumps(row(id="y"))[:-9] + "\n")
    found = check(
        replace(recipe, data=str(tmp_path / "rows.jsonl"), max_broken=1),
        MCLlavaProcessor.from_pretrained(recipe.model),
    )
    (broken,) = found.broken
    assert [row["id"] for row in found.good] == ["x"]
    assert broken["row"] == 1 and broken["reason"].startswith("line 3 is not JSON")


def test_rows_without_an_id_get_knobs_of_their_own(recipe, tmp_path):
    """What exports a table writes null."""
    (tmp_path / "rows.json").write_text(json.dumps([row(id=None), row(id=None), row()]))
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    rows = check(replace(recipe, data=str(tmp_path / "rows.json")), processor).good
    assert [row["id"] for row in rows] == ["0", "1", "x"]
    collator = Collator(processor, replace(recipe, max_crops=(0, 100), num_tokens=(8, 728)), context=2048)
    lengths = {collator([row])["input_ids"].shape[1] for row in rows}
    assert len(lengths) == 3


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark(folder, recipe, tmp_path, lines, mark):
    rows = json.loads((folder / "llava_instruct_150k.json").read_text())
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (tmp_path / "rows.json").write_bytes(mark + text.encode())
    found = check(replace(recipe, data=str(tmp_path / "rows.json")), MCLlavaProcessor.from_pretrained(recipe.model))
    assert (len(found.good), len(found.broken)) == (len(rows), 0)


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 4, "alpha": 8}, "train": ["projector"]}, {"log_steps": 10}])
def test_training_that_diverges_is_an_error_and_keeps_the_last_good_checkpoint(recipe, tmp_path, capsys, changes):
    values = {name: value for name, value in asdict(recipe).items() if value is not None} | {"save_steps": 1} | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values | {"learning_rate": 1e30, "warmup": 2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mc-llava", "train", str(path)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 1
    assert "training has diverged. Start again in another output with a lower learning_rate" in capsys.readouterr().err
    assert not list(Path(recipe.output).glob("*.safetensors"))
    kept = last_checkpoint(Path(recipe.output))
    assert kept and kept.endswith("checkpoint-1")  # whose learning rate was 0
    for file in Path(recipe.output).rglob("*.safetensors"):
        assert all(tensor.abs().max() < 1e6 for tensor in load_file(file).values()), file


def test_a_single_step_that_diverges(recipe):
    with pytest.raises(ValueError, match="weights are not finite or too large at step 1"):
        train(replace(recipe, learning_rate=1e30, warmup=0, max_steps=1))
    assert last_checkpoint(Path(recipe.output)) is None


ADAPTERS = {"lora": Lora(r=4, alpha=8), "train": ("projector",)}


@pytest.mark.parametrize(
    ("rate", "changes"), [(1e8, {}), (1e12, {}), (1e15, {}), (1e10, ADAPTERS), (1e12, ADAPTERS), (1e15, ADAPTERS)]
)
def test_a_single_step_after_which_the_model_answers_nothing(recipe, rate, changes):
    """The squares of the weights are finite, the logits are not, and no further step would notice."""
    with pytest.raises(ValueError, match="(loss is nan|loss is inf|not finite or too large) at step 1.*has diverged"):
        train(replace(recipe, learning_rate=rate, warmup=0, max_steps=1, **changes))
    assert not list(Path(recipe.output).rglob("*.safetensors"))


def test_a_checkpoint_that_answers_nothing_is_not_made_a_model(recipe, monkeypatch):
    """As a version without the check may have left behind."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "check_sound", lambda *args: None)
        train(replace(recipe, learning_rate=1e8, warmup=0, max_steps=1))
    for file in Path(recipe.output).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="loss is nan at the end"):
        train(replace(recipe, learning_rate=1e8, warmup=0, max_steps=1, resume=True))
    assert not list(Path(recipe.output).glob("*.safetensors"))


def test_the_check_before_a_checkpoint_changes_no_step(recipe, monkeypatch):
    """It draws no random numbers, which would change dropout, and leaves the model in training mode."""
    lora = replace(recipe, lora=Lora(r=4, alpha=8, dropout=0.5), train=("projector",), save_steps=1)
    train(lora)
    monkeypatch.setattr(training, "check_sound", lambda *args: None)
    train(replace(lora, output=f"{recipe.output}-unchecked"))
    assert losses(Path(recipe.output)) == losses(Path(f"{recipe.output}-unchecked"))


def test_weights_that_are_not_finite_are_not_written(recipe, monkeypatch):
    monkeypatch.setattr(StopIfDiverged, "on_step_end", lambda *args, **kwargs: None)
    monkeypatch.setattr(StopIfDiverged, "on_log", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="weights are not finite or too large at the end"):
        train(replace(recipe, learning_rate=1e30, warmup=0))
    assert not list(Path(recipe.output).glob("*.safetensors"))


def test_a_checkpoint_whose_last_file_is_torn_is_not_whole(tmp_path):
    for step, state in ((2, "{}"), (4, '{"log_hi')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("share", [0, 0.9])
def test_a_checkpoint_of_which_any_large_file_is_cut_is_not_whole(tmp_path, name, share):
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"weight": torch.ones(1000)}, checkpoint / "model.safetensors")
        for state in ("optimizer.pt", "rng_state.pth"):
            torch.save({"state": torch.ones(1000)}, checkpoint / state)
        (checkpoint / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(checkpoint)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(share * len(content))])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='what quantizes is not here: pip install "mc-llava[quantize]"',
)
class TestQuantized:
    """QLoRA: adapters are trained on 4-bit weights, and merged into the full ones."""

    def test_by_recipe(self, recipe, monkeypatch):
        found, start = {}, SFTTrainer.train

        def watched(trainer, **options):
            found["4 bits"] = {
                name
                for name, module in trainer.model.named_modules()
                if name.endswith("base_layer") and type(module).__name__ == "Linear4bit"
            }
            found["learn"] = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
            return start(trainer, **options)

        monkeypatch.setattr(SFTTrainer, "train", watched)
        changes = {"train": ("coordinates", "projector"), "lora": {"r": 4, "alpha": 8}, "quantize": "nf4"}
        quantized = replace(recipe, **changes)
        output = train(quantized)
        assert found["learn"] == {torch.float32}
        assert len(found["4 bits"]) == 6 and all("language_model.layers.0" in name for name in found["4 bits"])
        whole = losses(output)
        assert whole[4] < whole[1]
        shutil.rmtree(output / "checkpoint-4")
        train(replace(quantized, resume=True))
        assert losses(output) == pytest.approx(whole, rel=1e-4)

        merged = MCLlavaForConditionalGeneration.from_pretrained(output)
        base = MCLlavaForConditionalGeneration.from_pretrained(recipe.model)
        changed = {
            name for name, tensor in base.state_dict().items() if not torch.equal(tensor, merged.state_dict()[name])
        }
        assert any("q_proj" in name for name in changed) and any("projector" in name for name in changed)
        adapted = PeftModel.from_pretrained(base, output / "adapter").merge_and_unload()
        for name, tensor in adapted.state_dict().items():
            assert torch.equal(tensor, merged.state_dict()[name]), name

    def test_by_trl_alone(self, folder, tmp_path):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=NOT_QUANTIZED)
        model = MCLlavaForConditionalGeneration.from_pretrained(folder / "model", quantization_config=config)
        processor = MCLlavaProcessor.from_pretrained(folder / "model")
        image = Image.open(folder / "images" / "00000" / "000000000.jpg")
        turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a sign."}]
        rows = Dataset.from_list([{"messages": turns, "images": [image]}] * 4)
        arguments = {"max_length": None, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": []}
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path), use_cpu=True, bf16=False, lr_scheduler_type="constant", **arguments),
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"], r=4),
        )
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert found[-1] < found[0]
        trainer.save_model(tmp_path / "adapter")
        base = MCLlavaForConditionalGeneration.from_pretrained(folder / "model")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = MCLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, again[name])}
        assert len(changed) == 6 + 4  # matrices of one layer, and both layers of the projector


@pytest.mark.slow
def test_the_command_checks_and_trains_nothing(recipe):
    values = {"model": recipe.model, "data": recipe.data, "images": recipe.images, "output": recipe.output}
    path = Path(recipe.output).with_suffix(".yaml")
    path.write_text(json.dumps(values | {"num_tokens": [8, 16]}))
    result = processes.run("-m", "mc_llava", "train", path, "--check", text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "good rows: 9, broken rows: 0"
    rows = Path(recipe.output).with_name("rows.json")
    rows.write_text(json.dumps([*json.loads(Path(recipe.data).read_text()), {"id": "broken"}]))
    overrides = (f"data={rows}", "max_broken=1")
    result = processes.run("-m", "mc_llava", "train", path, "--check", *overrides, text=True)
    assert f"good rows: 9, broken rows: 1, listed in {recipe.output}" in result.stderr
    assert [file.name for file in Path(recipe.output).iterdir()] == ["broken.jsonl"]


def test_data_without_a_good_row_say_where_the_reasons_are(recipe, tmp_path):
    processor = MCLlavaProcessor.from_pretrained(recipe.model)
    path = tmp_path / "data.json"
    for rows, reason in (
        ([], "no rows to train on$"),
        ([row(image="none.jpg")], "every row is broken, see .*broken.jsonl"),
    ):
        path.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=reason):
            check(replace(recipe, data=str(path), max_broken=9), processor)


def test_what_gpt_says_first_is_left_out_and_an_answer_may_lie_in_part_behind_the_context(recipe, tmp_path):
    turns = row(value="<image>" + 2000 * "7", answer="That." * 99)["conversations"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(conversations=[{"from": "gpt", "value": "Hi."}, *turns])]))
    _, (found,), batch = collate(replace(recipe, data=str(path)))
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert batch["input_ids"].shape == (1, 2048) and (batch["labels"] != -100).any()


def test_training_lowers_the_loss_and_resumes_on_the_same_curve(recipe, tmp_path):
    output = train(recipe)
    whole = losses(output)
    assert list(whole) == [1, 2, 3, 4]
    assert whole[4] < 0.95 * whole[1]
    assert list(Path(output, "logs").rglob("events.out.tfevents*"))

    with pytest.raises(ValueError, match="holds checkpoint-4: set resume=true"):
        train(recipe)
    # As if the run had been stopped after step 2.
    for path in sorted(Path(output, "checkpoint-4").iterdir()):
        path.unlink()
    Path(output, "checkpoint-4").rmdir()
    train(replace(recipe, resume=True))
    assert losses(output) == pytest.approx(whole, rel=1e-4)
    # As if it had been killed while it saved step 4.
    Path(output, "checkpoint-4", "trainer_state.json").unlink()
    train(replace(recipe, resume=True))
    assert losses(output) == pytest.approx(whole, rel=1e-4)


def test_two_runs_do_not_write_into_one_output(recipe):
    output = Path(recipe.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{output}.lock"), pytest.raises(ValueError, match=f"another run writes {output}: wait"):
        train(recipe)
    assert not list(output.iterdir())


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told(recipe):
    train(replace(recipe, max_steps=2, log_steps=2))
    output = train(replace(recipe, max_steps=5, save_steps=3, log_steps=1, resume=True))
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    assert list(losses(output)) == [2, 3, 4, 5]


@pytest.mark.parametrize("changed", ["data", "broken", "model", "learning_rate"])
def test_a_run_is_not_resumed_as_another(recipe, folder, tmp_path, changed):
    """Its next rows would not be those that are left."""
    rows = read_entries(recipe.data)
    begun = replace(recipe, data=str(tmp_path / "rows.json"), max_steps=2, max_broken=9, learning_rate=1e-4)
    Path(begun.data).write_text(json.dumps([*rows, row(image="later.jpg")]))
    train(begun)
    again = replace(begun, resume=True, max_steps=4)
    if changed == "data":
        Path(begun.data).write_text(json.dumps(rows))
    elif changed == "broken":
        shutil.copytree(begun.images, tmp_path / "images")
        shutil.copy(Path(begun.images, rows[0]["image"]), tmp_path / "images" / "later.jpg")
        again = replace(again, images=str(tmp_path / "images"))
    elif changed == "model":
        again = replace(again, model=str(tmp_path / "model"))
        write_untrained_tiny(tmp_path / "model", layers=1, seed=1)
    else:
        again = replace(again, learning_rate=1e-2)
    with pytest.raises(ValueError, match=f"{begun.output} was begun with {changed} .* this run .*: name another"):
        train(again)
    assert list(losses(Path(begun.output))) == [1, 2]


def test_a_model_that_is_not_there_leaves_nothing_behind(recipe, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        train(replace(recipe, model=str(tmp_path / "nowhere"), output=str(tmp_path / "runs" / "mine")))
    assert not (tmp_path / "runs").exists()


def test_what_a_run_was_made_of_is_damaged(recipe):
    state = Path(recipe.output, "checkpoint-1", "trainer_state.json")
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    Path(recipe.output, "made_of.json").write_text("{")
    with pytest.raises(ValueError, match="made_of.json is damaged .*: name another output"):
        record_run(recipe, Rows())


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_the_model_to_start_from_is_not_overwritten(recipe, tmp_path, lora):
    """Adapters would be merged into it again when the run is resumed."""
    shutil.copytree(recipe.model, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    changes = {"lora": lora, "train": ("projector",), "model": str(tmp_path / "model")}
    with pytest.raises(ValueError, match="link is the model to start from.*name another output"):
        train(replace(recipe, output=str(tmp_path / "link"), **changes))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_model_that_was_saved_with_quantized_weights_is_refused_before_it_trains(recipe, tmp_path):
    """The adapters would be lost at the end, because they can't be merged into such a model."""
    shutil.copytree(recipe.model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="saved with quantized weights.*start from the model it was made from"):
        train(replace(recipe, model=str(tmp_path / "model"), lora=Lora(r=2), train=()))


class TestAUsersOwnTrainer:
    """Whatever a Trainer saves, it loads: a resumed run continues as if nothing had happened."""

    def trainer(self, folder, run, steps, kind="whole", **options):
        torch.manual_seed(0)
        model = MCLlavaForConditionalGeneration.from_pretrained(folder / "model")
        processor = MCLlavaProcessor.from_pretrained(folder / "model")
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"], r=4)
        if kind == "sharded":
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="100KB")
        arguments = {
            "output_dir": str(run),
            "max_steps": steps,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "remove_unused_columns": False,
            **options,
        }
        if kind == "sft":
            turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a sign."}]
            rows = Dataset.from_list([{"messages": turns}] * 16)
            arguments = SFTConfig(**arguments, max_length=None)
            return SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=processor)
        data, images = str(folder / "llava_instruct_150k.json"), str(folder / "images")
        recipe = Recipe(str(folder / "model"), data, images, str(run), max_crops=(1, 4), num_tokens=(8, 16))
        rows, collator = check(recipe, processor).good, Collator(processor, recipe, 2048)
        model = get_peft_model(model, lora) if kind == "peft" else model
        return Trainer(model, TrainingArguments(**arguments), collator, Dataset.from_list(rows), rows[:2])

    def losses(self, trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("kind", ["whole", "sharded", "peft", "sft"])
    def test_resumes(self, folder, tmp_path, kind):
        whole = self.trainer(folder, tmp_path / "whole", 4, kind)
        whole.train()
        self.trainer(folder, tmp_path / "run", 2, kind).train()
        resumed = self.trainer(folder, tmp_path / "run", 4, kind)
        resumed.train(resume_from_checkpoint=True)
        assert self.losses(resumed) == pytest.approx(self.losses(whole), rel=1e-4)
        assert self.losses(whole)[2] < self.losses(whole)[0]

    def test_resumes_from_weights_alone(self, folder, tmp_path):
        options = {"save_only_model": True, "optim": "sgd", "weight_decay": 0.0}
        whole = self.trainer(folder, tmp_path / "whole", 4, **options)
        whole.train()
        self.trainer(folder, tmp_path / "run", 2, **options).train()
        resumed = self.trainer(folder, tmp_path / "run", 4, **options)
        resumed.train(resume_from_checkpoint=True)
        assert self.losses(resumed) == pytest.approx(self.losses(whole), rel=1e-4)

    @pytest.mark.parametrize("kind", ["whole", "sharded", "peft", "sft"])
    def test_loads_the_best_model_at_the_end(self, folder, tmp_path, kind):
        steps = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "load_best_model_at_end": True}
        trainer = self.trainer(folder, tmp_path, 3, kind, learning_rate=3.0, **steps)
        trainer.train()
        found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{found.index(min(found)) + 1}")
        assert found[-1] > min(found)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-4)

    def test_predicts_logits(self, tmp_path, processor):
        """For rows with and without pictures, in several batches."""

        def collate(rows):
            inputs = processor(["a"] * len(rows), [[Image.new("RGB", (60, 60))] * row["pictures"] for row in rows])
            return {**inputs, "labels": inputs["input_ids"]}

        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, remove_unused_columns=False
        )
        found, model = [], small_model()  # a Trainer changes its configuration
        trainer = Trainer(model, arguments, collate, compute_metrics=lambda given: found.append(given) or {})
        for counts in ([0, 0, 1, 2], [1, 1, 0]):
            predicted = trainer.predict([{"pictures": count} for count in counts])
            assert predicted.predictions.shape[::2] == (len(counts), model.config.text_config.vocab_size)
            assert found.pop().predictions.shape == predicted.predictions.shape


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_a_run_that_was_killed_behind_its_last_checkpoint_takes_no_further_step(recipe, lora):
    recipe = replace(recipe, lora=lora, train=("coordinates", "projector"))
    output = train(recipe)
    whole = losses(output)
    weights = {name: tensor.clone() for name, tensor in load_file(output / "model.safetensors").items()}  # unmapped
    (output / "model.safetensors").write_bytes(b"torn")
    train(replace(recipe, resume=True))
    assert losses(output) == whole and not list(output.glob("checkpoint-5"))
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    train(replace(recipe, resume=True, max_steps=6))
    assert list(losses(output)) == [1, 2, 3, 4, 5, 6]


def test_no_more_workers_than_processors(recipe):
    """The recipes in examples/ are for servers: on a laptop, torch would warn of their workers."""
    assert training_arguments(replace(recipe, workers=10_000)).dataloader_num_workers == os.cpu_count()
    assert training_arguments(replace(recipe, workers=0)).dataloader_num_workers == 0


@pytest.mark.parametrize("parts", [("coordinates", "projector"), ("tower",), ("language_model",)])
def test_only_the_named_parts_change(recipe, parts):
    output = train(replace(recipe, train=parts, max_steps=3))
    before = MCLlavaForConditionalGeneration.from_pretrained(recipe.model).state_dict()
    after = MCLlavaForConditionalGeneration.from_pretrained(output).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = tuple(f"{module}." for part in parts for module in PARTS[part])
    assert changed and all(name.startswith(modules) for name in changed)
    for module in modules:
        assert any(name.startswith(module) for name in changed)


def test_lora_changes_the_language_models_matrices_and_the_named_parts(recipe):
    lora = {"r": 4, "alpha": 8}
    output = train(replace(recipe, train=("coordinates", "projector"), lora=lora, max_steps=3))
    before = MCLlavaForConditionalGeneration.from_pretrained(recipe.model).state_dict()
    after = MCLlavaForConditionalGeneration.from_pretrained(output).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "dense.weight", "fc1.weight", "fc2.weight")
    expected = {
        name
        for name in before
        if name.startswith(("model.coord_embed.", "model.multi_modal_projector."))
        or (name.startswith("model.language_model.layers.") and name.endswith(matrices))
    }
    assert changed == expected
    adapter = load_file(Path(output, "adapter", "adapter_model.safetensors"))
    assert any("lora_A" in name for name in adapter)
    assert not (output / "README.md").exists()  # TRL's describes a model "None"


@pytest.mark.parametrize(
    ("parts", "lora", "through_tower"),
    [
        (("coordinates", "projector"), None, False),
        (("coordinates", "projector"), {"r": 4, "alpha": 8}, False),
        (("tower", "projector"), {"r": 4, "alpha": 8}, True),
    ],
)
def test_what_learns_is_in_float32_and_no_gradient_enters_a_frozen_tower(
    recipe, monkeypatch, parts, lora, through_tower
):
    found, start = {}, SFTTrainer.train

    def watched(trainer, **options):
        found["dtypes"] = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
        for name, module in trainer.model.named_modules():
            if name.endswith(("vision_tower.encoder", "vision_tower.modules_to_save.default.encoder")):
                module.register_forward_hook(
                    lambda module, inputs, output: found.update(
                        graph=found.get("graph", output.last_hidden_state.requires_grad)
                    )
                )
        return start(trainer, **options)

    monkeypatch.setattr(SFTTrainer, "train", watched)
    changes = {"dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, "max_steps": 1}
    output = train(replace(recipe, train=parts, lora=lora, **changes))
    assert found == {"dtypes": {torch.float32}, "graph": through_tower}
    saved = load_file(Path(output, "model.safetensors"))
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}


def test_a_recipe_is_read_with_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\ndata: b\nimages: c\noutput: d\nlearning_rate: 1e-3\ntrain: [projector]\n")
    recipe = build_recipe(Recipe, read_recipe(path, ["batch_size=3", "num_tokens=[4, 8]"]))
    assert recipe == Recipe("a", "b", "c", "d", ("projector",), learning_rate=1e-3, batch_size=3, num_tokens=(4, 8))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning=1"], "learning Unexpected keyword argument, choose from model, .*, learning_rate, .*, resume$"),
        (["train=[eyes]"], r"unknown parts \['eyes'\]"),
        (["train=[]"], "nothing learns"),
        (["num_tokens=[8, 4]"], "lower one first"),
        (["num_tokens=[0, 4]"], "num_tokens.0 Input should be greater than 0"),
        (["train=[language_model]", "lora={r: 4}"], "lora trains the language model"),
        (["quantize=nf4"], "weights in nf4 can't learn: set lora"),
        (["quantize=int8", "lora={r: 4}"], "quantize Input should be 'nf4'"),
        (["lora={rank: 4}"], "lora.rank Unexpected keyword argument, choose from r, alpha, dropout$"),
        (["dtype=int8"], "dtype Input should be 'float32' or 'bfloat16'"),
        (["batch_size"], "must read name=value"),
        (["batch_size=" + "[" * 2000], "is not YAML"),
        (["lora.rank=4"], "lora.rank Unexpected keyword argument"),
        (["model.name=4"], "must read name=value, or part.name=value inside a mapping: 'model.name=4'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tmp_path, overrides, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\ndata: b\nimages: c\noutput: d\n")
    with pytest.raises(ValueError, match=message):
        build_recipe(Recipe, read_recipe(path, overrides))


def test_a_recipe_that_is_nested_or_refers_to_itself_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: " + "[" * 2000)
    with pytest.raises(ValueError, match="cannot read the recipe"):
        read_recipe(path)
    lines = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    path.write_text("\n".join(["a0: &a0 x", *lines, "kind: *a11"]))  # 10^11 letters, if it were printed
    with pytest.raises(ValueError, match="kind must be finetune or tiny, got"):
        cli.train(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the recipe .*recipe.yaml: .*No such file"),
        (b"model: [", "cannot read the recipe .*recipe.yaml"),
        (b"model: caf\xe9", "cannot read the recipe .*recipe.yaml: .*utf-8"),
        (b"- model", "recipe.yaml must be a mapping of names to values, got list"),
    ],
    ids=str,
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_a_file_that_is_no_json_is_refused(recipe, tmp_path):
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(ValueError, match="cannot read .*data.json as JSON"):
        check(replace(recipe, data=str(tmp_path / "data.json")), MCLlavaProcessor.from_pretrained(recipe.model))


def test_tokens_that_fill_the_context_are_refused(recipe):
    with pytest.raises(ValueError, match="num_tokens goes up to 2048, the context is 2048: leave room"):
        check(replace(recipe, num_tokens=(8, 2048)), MCLlavaProcessor.from_pretrained(recipe.model))


def test_small_steps_add_up_where_the_model_is_kept_in_bfloat16(recipe, tmp_path):
    changes = {"train": ("projector",), "dtype": "bfloat16", "bf16": True, "learning_rate": 1e-5, "max_steps": 16}
    output = train(replace(recipe, **changes))
    model = MCLlavaForConditionalGeneration.from_pretrained(output)
    before = MCLlavaForConditionalGeneration.from_pretrained(recipe.model, dtype=torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    (_, learned), (_, start) = (list(m.model.multi_modal_projector.named_parameters())[0] for m in (model, before))
    large = start.abs() > 0.02  # their neighbors in bfloat16 are 1e-4 away
    assert (learned != start)[large].float().mean() > 0.1


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("examples/*_3b.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_that_come_along_are_read(path):
    recipe = build_recipe(Recipe, read_recipe(path))
    assert recipe.max_crops[1] > 0 and recipe.num_tokens[1] < 2048
    assert set(recipe.train) == {"coordinates", "projector"}
