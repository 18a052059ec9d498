"""How `tiny` is made, with a few steps and scenes."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, scenes, tasks, train_tiny
from mc_llava.pretraining import CropDataset, MuonAndAdamW, Stage, TowerForPretraining, pretrain_tower, sine_positions


@pytest.fixture(scope="module")
def processor():
    return train_tiny.build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return train_tiny.build_model(processor, train_tiny.vision_config(width=32, layers=1), width=32, layers=1).eval()


def test_the_tokenizer_keeps_the_characters_of_signs_single(processor):
    tokenizer = processor.tokenizer
    said = tokenizer.convert_ids_to_tokens(tokenizer.encode("It says AB12, HELP.")[2:])
    assert "".join(said) == "ĠAB12,ĠHELP."
    assert all(len(token.strip("Ġ")) <= 1 for token in said)
    scene = scenes.make_scene(0, "test")
    for kind in scenes.KINDS:
        question = scenes.ask(scene, kind, random.Random(0))
        assert tokenizer.decode(tokenizer.encode(question.text)) == question.text
    assert (processor.image_processor.max_crops, processor.image_processor.num_tokens) == (32, 128)


def test_cached_features_give_the_same_answers_as_pixels(processor, model):
    scene = scenes.make_scene(0)
    image = scenes.draw_scene(scene)
    inputs = processor("What color is the star?", image, max_crops=8, num_tokens=40)
    (cached,) = train_tiny.encode_scenes(model, processor, [0], "train", [(8, 40)])
    trainee = train_tiny.LanguageModelTrainee(model.config).eval()
    trainee.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs).logits
        fields = train_tiny.image_fields([cached, cached])
        twice = {name: torch.cat([inputs[name]] * 2) for name in ("input_ids", "attention_mask")}
        got = trainee(**twice, **fields).logits
    # The cache holds bfloat16's results in float16.
    torch.testing.assert_close(got, torch.cat([expected] * 2), rtol=0.02, atol=0.02)


def test_conversations_have_their_loss_on_the_answers(processor, model):
    images = train_tiny.encode_scenes(model, processor, [0, 1], "train", [(0, 20), (0, 30)])
    tokenizer = processor.tokenizer
    rows = [{"image": 0, "seed": 5}, {"image": 1, "seed": 6}]
    collator = train_tiny.SceneCollator(processor, images, captions=0.0, turns=3)
    batch = collator(rows)
    assert torch.equal(batch["input_ids"], collator(rows)["input_ids"])
    assert batch["input_ids"].tolist() != collator([rows[0] | {"seed": 7}, rows[1]])["input_ids"].tolist()
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [20, 30]
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        spoken = labels != -100
        assert torch.equal(ids[spoken], labels[spoken])
        answers = tokenizer.decode(labels[spoken]).removesuffix("<|im_end|>").split("<|im_end|>")
        text = tokenizer.decode(ids).replace("<image>", "").replace("<pad>", "")
        turns = text.split("<|im_start|>assistant\n")[1:]
        assert [turn.split("<|im_end|>")[0] for turn in turns] == answers
    # What the chat template makes of the same turns.
    caption = train_tiny.SceneCollator(processor, images, captions=1.0, turns=3)(rows[1:])
    text = tokenizer.decode(caption["input_ids"][0]).replace("<image>", "")
    asked, said = text.split("<|im_end|>")[0].split("\n")[-1], text.split("assistant\n")[1].removesuffix("<|im_end|>")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": said},
    ]
    assert processor.apply_chat_template(messages).replace("<image>", "") == text + "\n"


@pytest.mark.parametrize("count", [1, 4, 100])
def test_few_crops_show_a_part_of_the_scene(processor, model, count):
    (image,) = train_tiny.encode_scenes(model, processor, [3], "train", [(32, 128)])
    whole = scenes.make_scene(3)
    boxes = [crop.box for crop in processor.image_processor.plan(whole.width, whole.height, 32, 128)]
    few, scene = train_tiny.show_few(image, whole, boxes, count, random.Random(0))
    crops = [image.coords.tolist().index(place) for place in few.coords.tolist()]
    assert crops[0] == 0 and len(crops) == 1 + min(count, len(boxes) - 1)
    features = image.features.split(image.num_tokens.tolist())
    assert torch.equal(few.features, torch.cat([features[crop] for crop in crops]))
    assert few.num_tokens.tolist() == image.num_tokens[crops].tolist()
    assert scene.groups and set(scene.groups) <= set(whole.groups)
    for group in whole.groups:
        left, top, right, bottom = scenes.outline(group)
        inside = any(
            boxes[crop][0] <= left and boxes[crop][1] <= top and boxes[crop][2] >= right and boxes[crop][3] >= bottom
            for crop in crops[1:]
        )
        assert inside or group not in scene.groups
    if count == 100:
        assert scene == whole
    # Crops that magnify too little show nothing that could be asked about.
    few, scene = train_tiny.show_few(image, whole, [(0, 0, whole.width, whole.height)] * 5, 1, random.Random(0))
    assert few is image and scene is whole


def test_each_time_around_all_images_have_their_turn_and_other_conversations():
    rows = train_tiny.scene_rows(5, 12, seed=0).to_list()
    images = [row["image"] for row in rows]
    assert len(rows) == 12 and sorted(images[:5]) == sorted(images[5:10]) == [0, 1, 2, 3, 4]
    assert images[:5] != images[5:10] and len({row["seed"] for row in rows}) == 12
    assert rows == train_tiny.scene_rows(5, 31, seed=0).to_list()[:12]
    assert rows != train_tiny.scene_rows(5, 12, seed=1).to_list()


def test_measuring_counts_right_replies(processor, model, monkeypatch):
    images = train_tiny.encode_scenes(model, processor, [0, 1, 2, 3], "test", [(0, 8)] * 4)
    answers = iter(["It says nothing."] * 4 + ["red"] * 4 + ["left"] * 4 + ["?"] * 4)
    monkeypatch.setattr(train_tiny, "answer", lambda *args: [next(answers) for _ in range(4)])
    rng = random.Random(0)
    keys = {kind: [scenes.ask(scenes.make_scene(s, "test"), kind, rng).key for s in range(4)] for kind in scenes.KINDS}
    expected = {"ocr": 0, "attribute": 25.0 * keys["attribute"].count("red")}
    expected |= {"position": 25.0 * keys["position"].count("left"), "hard": 0}
    assert train_tiny.measure(model, processor, images, "test") == expected


def test_the_optimizer_steps_all_that_learns_and_comes_back_from_its_state():
    torch.manual_seed(0)
    model = TowerForPretraining(train_tiny.vision_config(width=32, layers=1))
    model.tower.embeddings.patch_embedding.weight.requires_grad = False
    batch = torch.utils.data.default_collate([CropDataset(4, "train", 96, 8)[index] for index in range(4)])
    optimizer = MuonAndAdamW(model, 1e-3, 0.0)

    def step(model, optimizer):
        random.seed(0)
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    before = {name: value.clone() for name, value in model.named_parameters()}
    step(model, optimizer)
    unused = {"tower.post_layernorm.weight", "tower.post_layernorm.bias", "tower.embeddings.patch_embedding.weight"}
    assert {name for name, value in model.named_parameters() if torch.equal(value, before[name])} == unused

    other = TowerForPretraining(train_tiny.vision_config(width=32, layers=1))
    other.load_state_dict(model.state_dict())
    other.tower.embeddings.patch_embedding.weight.requires_grad = False
    restored = MuonAndAdamW(other, 5.0, 0.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(other, restored)
    for value, expected in zip(other.parameters(), model.parameters()):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_positions_are_alike_for_patches_that_are_near():
    positions = sine_positions(12, 128)
    assert positions.shape == (144, 128) and positions.square().mean() == pytest.approx(0.5, abs=0.01)
    alike = torch.cosine_similarity(positions[:, None], positions[None], dim=-1).reshape(144, 12, 12)
    of_middle = alike[6 * 12 + 5]
    assert of_middle[6, 5] == of_middle.max()
    assert of_middle[6, 5] > of_middle[6, 6] > of_middle[6, 7] and of_middle[6, 5] > of_middle[7, 5] > of_middle[8, 5]
    learned = TowerForPretraining(train_tiny.vision_config(128, 6)).tower.embeddings.position_embedding.weight
    assert torch.equal(learned, positions)


def run_recipe(output) -> dict[str, dict[int, float]]:
    """`mc-llava train examples/tiny.yaml` with a smaller model; of both stages step -> loss."""
    sizes = {
        "num_images": 4,
        "num_tested": 2,
        "tower_width": 32,
        "tower_layers": 3,
        "width": 32,
        "layers": 1,
        "workers": 0,
        "tower.steps": 120,
        "tower.decay": 20,
        "tower.warmup": 10,
        "tower.batch_size": 16,
        "tower.learning_rate": 3e-3,
        "tower.save_steps": 60,
        "language_model.steps": 20,
        "language_model.decay": 5,
        "language_model.warmup": 2,
        "language_model.batch_size": 2,
        "language_model.learning_rate": 3e-3,
        "language_model.save_steps": 10,
    }
    values = [f"{name}={value}" for name, value in {"output": output, **sizes}.items()]
    command = [sys.executable, "-m", "mc_llava", "train", "examples/tiny.yaml", *values]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    work = output.with_name(output.name + "-work")
    losses = {}
    for stage, last in (("tower", "checkpoint-120"), ("language_model", "checkpoint-20")):
        state = json.loads((work / stage / last / "trainer_state.json").read_text())
        losses[stage] = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    return losses


def test_a_smaller_model_learns_by_the_command_and_resumes_on_the_same_curve(tmp_path):
    work = tmp_path / "tiny-work"
    whole = run_recipe(tmp_path / "tiny")
    assert whole["tower"][120] < 0.8 * whole["tower"][10]
    # As if each stage had been stopped half-way, the second after its four images had come around five times.
    shutil.rmtree(work / "tower" / "checkpoint-120")
    shutil.rmtree(work / "language_model" / "checkpoint-20")
    again = run_recipe(tmp_path / "tiny")
    for stage in whole:
        assert again[stage] == pytest.approx(whole[stage], rel=1e-3)


def test_all_stages_run_leave_a_model_and_can_be_called_again(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "SHARD", 3)
    tested, encode = set(), train_tiny.encode_scenes

    def noted(model, processor, seeds, split, budgets, workers=0):
        tested.update(seeds if split == "test" else ())
        return encode(model, processor, seeds, split, budgets, workers)

    monkeypatch.setattr(train_tiny, "encode_scenes", noted)
    stage = Stage(steps=2, decay=1, learning_rate=1e-3, batch_size=2, warmup=1)
    sizes = {"tower_width": 32, "tower_layers": 3, "width": 32, "layers": 1, "workers": 0}
    recipe = train_tiny.TinyRecipe(str(tmp_path / "tiny"), stage, stage, num_images=5, num_tested=2, **sizes)
    output = train_tiny.train_tiny(recipe)
    model = MCLlavaForConditionalGeneration.from_pretrained(output)
    processor = MCLlavaProcessor.from_pretrained(output)
    tower = pretrain_tower(tmp_path / "tiny-work" / "tower", train_tiny.vision_config(32, 3), stage, workers=0).tower
    for name, value in model.model.vision_tower.state_dict().items():
        torch.testing.assert_close(value.float(), tower.state_dict()[name], rtol=0.01, atol=1e-3)
    inputs = processor("What color is the star?", scenes.draw_scene(scenes.make_scene(0, "test")))
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    report = json.loads((tmp_path / "tiny-work" / "language_model" / "accuracy.jsonl").read_text())
    assert set(report["crops"]) == set(scenes.KINDS)
    assert len(tested) == 2 and not tested & set(range(tasks.NUM_SCENES))

    def cached():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny-work/images").glob("*.safetensors")}

    shards = cached()
    assert set(shards) == {"0-3.safetensors", "3-5.safetensors"}
    train_tiny.train_tiny(recipe)
    again = MCLlavaForConditionalGeneration.from_pretrained(output).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert shards == cached()
    checkpoints = {path.name for path in (tmp_path / "tiny-work").glob("*/checkpoint-*")}
    assert checkpoints == {"checkpoint-2"}, "what is finished took further steps"
    # Another tower's features, or a language model on them, are not gone on with.
    longer = replace(recipe, tower=replace(stage, steps=3))
    for name in ("images", "language_model"):
        with pytest.raises(ValueError, match=f"{name} was made with tower.steps 2, the recipe has 3: remove the fold"):
            train_tiny.train_tiny(longer)
        shutil.rmtree(tmp_path / "tiny-work" / name)
    with pytest.raises(ValueError, match="tower was made with tower.learning_rate 0.001, the recipe has 0.002"):
        train_tiny.train_tiny(replace(recipe, tower=replace(stage, learning_rate=2e-3)))
    train_tiny.train_tiny(replace(longer, language_model=replace(stage, seed=1)))
    train_tiny.train_tiny(replace(longer, language_model=replace(stage, seed=1, steps=3)))
    assert (tmp_path / "tiny-work" / "language_model" / "checkpoint-3").is_dir() and cached() != shards
