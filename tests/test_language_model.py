"""The training of `tiny`, with a few steps and scenes."""

import copy
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from filelock import FileLock
from helpers import ROOT
from safetensors.torch import load_file
from transformers import TrainingArguments

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, plan_scouts, scenes, training
from mc_llava.evaluation.tasks import NUM_SCENES
from mc_llava.scenes import conversations, encoding, language_model
from mc_llava.scenes.encoding import Budget
from mc_llava.scenes.scene import legible_height, outline
from mc_llava.scenes.tower import (
    CropDataset,
    MuonAndAdamW,
    Stage,
    TowerForPretraining,
    label_crop,
    pretrain_tower,
    sine_positions,
)
from mc_llava.scenes.trainee import (
    PLACE_WEIGHT,
    READING_WEIGHT,
    LanguageModelTrainee,
    SceneTrainer,
    looking_loss,
    reading_loss,
)
from mc_llava.scenes.warm_start import Start, copy_weights, load_start


@pytest.fixture(scope="module")
def processor():
    return language_model.build_processor()


def drawn(*seeds: int, split: str = "train") -> list[scenes.Scene]:
    return [scenes.make_scene(seed, split) for seed in seeds]


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return language_model.build_model(
        processor, language_model.vision_config(width=32, layers=1), width=32, layers=1
    ).eval()


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
    (cached,) = encoding.encode_scenes(model, processor, drawn(0), [Budget(8, 40)])
    trainee = LanguageModelTrainee(model.config).eval()
    trainee.begin_with(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        fields = encoding.image_fields([cached, cached])
        twice = {name: torch.cat([inputs[name]] * 2) for name in ("input_ids", "attention_mask")}
        got = trainee(**twice, **fields).logits
    # The cache holds bfloat16's results in float16.
    torch.testing.assert_close(got, torch.cat([expected] * 2), rtol=0.02, atol=0.02)


def test_conversations_have_their_loss_on_the_answers(processor, model, monkeypatch):
    monkeypatch.setattr(conversations, "UNTOLD", 0)
    images = encoding.encode_scenes(model, processor, drawn(0, 1), [Budget(32, 60), Budget(32, 70)])
    tokenizer = processor.tokenizer
    rows = [{"image": 0, "short": False, "seed": 5}, {"image": 1, "short": False, "seed": 6}]
    collator = conversations.SceneCollator(processor, images, captions=0.0, turns=3)
    batch = collator(rows)
    assert torch.equal(batch["input_ids"], collator(rows)["input_ids"])
    assert batch["input_ids"].tolist() != collator([rows[0] | {"seed": 7}, rows[1]])["input_ids"].tolist()
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [60, 70]
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        spoken = labels != -100
        assert torch.equal(ids[spoken], labels[spoken])
        answers = tokenizer.decode(labels[spoken]).removesuffix("<|im_end|>").split("<|im_end|>")
        text = tokenizer.decode(ids).replace("<image>", "").replace("<pad>", "")
        turns = text.split("<|im_start|>assistant\n")[1:]
        assert [turn.split("<|im_end|>")[0] for turn in turns] == answers
    # What the chat template renders for the same turns.
    caption = conversations.SceneCollator(processor, images, captions=1.0, turns=3)(rows[1:])
    text = tokenizer.decode(caption["input_ids"][0]).replace("<image>", "")
    asked, said = text.split("<|im_end|>")[0].split("\n")[-1], text.split("assistant\n")[1].removesuffix("<|im_end|>")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]},
        {"role": "assistant", "content": said},
    ]
    assert processor.apply_chat_template(messages).replace("<image>", "") == text + "\n"


def test_short_batches_show_the_last_token_of_each_crop(processor, model):
    (image,) = encoding.encode_scenes(model, processor, drawn(3), [Budget(8, 60)])
    last = [features[-1] for features in image.features.split(image.num_tokens.tolist())]
    collator = conversations.SceneCollator(processor, [image], captions=0.0, turns=4)
    batch = collator([{"image": 0, "short": True, "seed": 1}])
    assert torch.equal(batch["pixel_values"], torch.stack(last)[:, None].float())
    assert batch["crop_num_tokens"].tolist() == [1] * len(last) and len(last) > 1
    assert (batch["input_ids"] == processor.image_token_id).sum() == len(last)
    assert torch.equal(batch["crop_coords"], image.coords)
    starts = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")).sum().item()
    assert starts in (4, 6, 8), "two to four questions and answers"


def answer_around(processor, ids, position) -> str:
    """The turn of the conversation that holds a position."""
    turn = (ids[: position + 1] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")).sum()
    return processor.tokenizer.decode(ids).split("<|im_start|>")[turn]


def test_positions_of_short_batches_are_spread_as_if_crops_had_more_tokens(processor, model):
    images = encoding.encode_scenes(model, processor, drawn(3), [Budget(8, 60)])
    collator = conversations.SceneCollator(processor, images, captions=0.0, turns=1)
    crops, spacings = len(images[0].coords), set()
    for seed in range(20):
        batch = collator([{"image": 0, "short": True, "seed": seed}])
        positions, is_visual = batch["position_ids"][0], batch["input_ids"][0] == processor.image_token_id
        start = is_visual.nonzero()[0].item()
        spacing = (positions[is_visual][0].item() - start) + 1
        # Where the last token of each crop would stand, had all of them `spacing` tokens.
        assert positions[is_visual].tolist() == [start + spacing * (crop + 1) - 1 for crop in range(crops)]
        text = positions[~is_visual].tolist()
        assert text[:start] == list(range(start))
        assert text[start:] == list(range(start + spacing * crops, spacing * crops + len(text)))
        spacings.add(spacing)
    assert len(spacings) > 5 and min(spacings) == 1
    assert encoding.MOST_TOKENS / 2 < max(spacings) * crops < encoding.MOST_TOKENS + crops
    whole = collator([{"image": 0, "short": False, "seed": 0}])
    assert whole["position_ids"].tolist() == [list(range(whole["input_ids"].shape[1]))]


@pytest.mark.parametrize("short", [False, True])
def test_looks_lead_from_names_and_answers_to_the_crops_that_show_the_thing(processor, model, short):
    images = encoding.encode_scenes(model, processor, drawn(3, 4), [Budget(32, 128)] * 2)
    collator = conversations.SceneCollator(processor, images, captions=0.0, turns=4)
    batch = collator([{"image": 0, "short": short, "seed": 2}, {"image": 1, "short": short, "seed": 3}])
    looks, layers = batch["looks"], set()
    for layer, row, position, targets, place in zip(*looks.values()):
        image = images[row]
        scene = image.scene
        plan = processor.image_processor.plan(scene.width, scene.height, 32, 128)
        ids, layers = batch["input_ids"][row], layers | {int(layer)}
        # Which group does this place belong to, and which crops show the whole group?
        (group, thing), *others = [
            (group, thing)
            for group in scene.groups
            for thing in group
            if torch.allclose(torch.tensor(thing.center) / torch.tensor([scene.width, scene.height]), place)
        ]
        assert not others
        box, glyph = outline(group), min(thing.glyph for thing in group)
        showing = [legible_height(box, glyph, [crop.box]) >= conversations.READABLE for crop in plan]
        counts = batch["crop_num_tokens"].split(batch["image_grid_thw"][:, 0].tolist())[row]
        last = torch.where(ids == processor.image_token_id)[0][counts.cumsum(0) - 1]
        before, shown = processor.tokenizer.decode(ids[: position + 1]), set(last[torch.tensor(showing)].tolist())
        looked_at = targets.nonzero()[:, 0].tolist()
        assert shown and (set(looked_at) == shown or shown < set(looked_at) and before.endswith("assistant\n"))
        if layer == conversations.NAMING_LAYER:
            assert before.endswith((f" {thing.text}", thing.name))
        else:
            assert batch["labels"][row, position + 1] not in (-100, processor.tokenizer.eos_token_id)
    assert layers == {conversations.NAMING_LAYER, conversations.ANSWERING_LAYER}
    # From every word of answers about one thing, which these crops show whole; about two, from the last of the prompt.
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
        spoken = ((labels != -100) & (labels != processor.tokenizer.eos_token_id)).nonzero()[:, 0]
        turns = processor.tokenizer.decode(ids).count("<|im_start|>user")
        comparing = ("left of", "right of", "above the", "below the")
        missing = ("There is no", "There are no", "\nNo.")
        expected = []
        for position in spoken:
            answer = answer_around(processor, ids, position)
            first = processor.tokenizer.decode(ids[:position]).endswith("assistant\n")
            if not any(words in answer for words in missing) and (
                first or not any(word in answer for word in comparing)
            ):
                expected.append(position.item() - 1)
        here = looks["rows"] == row
        answering = here & (looks["layers"] == conversations.ANSWERING_LAYER)
        assert looks["positions"][answering].tolist() == expected
        naming = (here & (looks["layers"] == conversations.NAMING_LAYER)).sum().item()
        assert 0 < naming <= 2 * turns
    # A caption names all groups and asks about none; short batches have questions only.
    caption = conversations.SceneCollator(processor, images, captions=1.0, turns=4)
    assert bool(len(caption([{"image": 0, "short": short, "seed": 2}])["looks"]["rows"])) is short


def test_the_loss_of_looking_falls_with_the_share_of_the_right_crops():
    layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(4)])
    for layer in layers:
        layer.input_layernorm = torch.nn.Identity()
    attentions = [torch.full((2, 3, 5, 5), 0.2) for _ in layers]
    hidden_states = [torch.zeros(2, 5, 6) for _ in range(5)]
    targets = torch.zeros(2, 5, dtype=torch.bool)
    targets[:, 1:3] = True
    looks = {
        "layers": torch.tensor([1, 2]),
        "rows": torch.tensor([0, 1]),
        "positions": torch.tensor([3, 4]),
        "targets": targets,
        "places": torch.tensor([[0.5, 0.25], [0.1, 0.1]]),
    }

    def loss():
        return looking_loss(layers, attentions, hidden_states, **looks).item()

    # Two fifths of the attention in both layers; the name's place is known after neither of them.
    places = PLACE_WEIGHT * 2 * 0.375
    assert loss() == pytest.approx(-2 * math.log(0.4) + places, rel=1e-4)
    attentions[1][0, :2, 3] = torch.tensor([0, 0.5, 0.5, 0, 0])  # the third head is free
    assert loss() == pytest.approx(-math.log(0.4) + places, rel=1e-4)
    for layer in (0, 1, 4):
        hidden_states[layer][0, 3, :2] = torch.tensor([0.5, 0.25])
    assert loss() == pytest.approx(-math.log(0.4) + places, rel=1e-4)
    hidden_states[2][0, 3, :2] = torch.tensor([0.5, 0.25])
    assert loss() == pytest.approx(-math.log(0.4) + places / 2, rel=1e-4)
    layers[3].input_layernorm = torch.nn.Linear(6, 6)
    torch.nn.init.zeros_(layers[3].input_layernorm.weight)
    layers[3].input_layernorm.bias.data = torch.tensor([0.5, 0.25, 9, 9, 9, 9])
    assert loss() == pytest.approx(-math.log(0.4), rel=1e-4)
    looks = {name: value[:0] for name, value in looks.items()}  # a batch of captions
    assert loss() == 0


def test_the_trainer_adds_the_losses_of_looking_and_reading(processor, tmp_path):
    model = language_model.build_model(processor, language_model.vision_config(width=64, layers=1), width=64, layers=3)
    trainee = LanguageModelTrainee(model.config)
    trainee.set_attn_implementation("eager")
    images = encoding.encode_scenes(model.eval(), processor, drawn(3, 4), [Budget(32, 128)] * 2)
    batch = conversations.SceneCollator(processor, images, captions=0.0, turns=4)(
        [{"image": 0, "short": True, "seed": 2}, {"image": 1, "short": True, "seed": 3}]
    )
    layers, read = trainee.model.language_model.layers, []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        loss = SceneTrainer(trainee, arguments).compute_loss(trainee.eval(), dict(batch)).item()
        looks, readings = batch.pop("looks"), batch.pop("readings")
        read.clear()
        outputs = trainee(**batch, output_attentions=True)
        looking = looking_loss(layers, outputs.attentions, read, **looks).item()
        reading = READING_WEIGHT * reading_loss(trainee, read, **readings).item()
    assert looking > 1 and reading > 1
    assert loss == pytest.approx(outputs.loss.item() + looking + reading, rel=1e-5)


def test_the_loss_of_reading_is_about_what_each_crops_last_token_tells(processor):
    model = language_model.build_model(processor, language_model.vision_config(width=64, layers=1), width=64, layers=3)
    trainee = LanguageModelTrainee(model.config)
    images = encoding.encode_scenes(model.eval(), processor, drawn(3, 4), [Budget(32, 128), Budget(8, 40)])
    collator = conversations.SceneCollator(processor, images, captions=0.0, turns=1)
    batch = collator([{"image": index, "short": False, "seed": 1} for index in (0, 1)])
    readings = batch["readings"]
    tokens = [image.num_tokens.cumsum(0) - 1 for image in images]
    for row, (image, last) in enumerate(zip(images, tokens)):
        (visual,) = (batch["input_ids"][row] == processor.image_token_id).nonzero(as_tuple=True)
        assert torch.equal(readings["positions"][readings["rows"] == row], visual[last])
        for name in conversations.READ:
            shown = [label_crop(image.scene, tuple(box), scenes.SIDE, 8)[name] for box in image.boxes.tolist()]
            assert readings[name][readings["rows"] == row].tolist() == [label.tolist() for label in shown]
    # Only the tokens that are read matter, and a head that has learned them has no loss.
    hidden_states = [torch.randn(*batch["input_ids"].shape, 64) for _ in range(4)]
    others = [states.clone() for states in hidden_states]
    elsewhere = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    elsewhere[readings["rows"], readings["positions"]] = False
    for states in others:
        states[elsewhere] = 0
    loss = reading_loss(trainee, hidden_states, **readings)
    assert loss == reading_loss(trainee, others, **readings) and loss > 5
    optimizer = torch.optim.AdamW(trainee.reading_head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = reading_loss(trainee, hidden_states, **readings)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_projector_starts_where_all_directions_count_the_same(model):
    torch.manual_seed(0)
    mixing, scales = torch.linalg.qr(torch.randn(32, 32)).Q, torch.logspace(-0.5, 0.5, 32)
    images = [
        encoding.CachedImage(
            0,
            (0, 2),
            (torch.randn(2, 32) * scales) @ mixing + 5,
            torch.zeros(1, 4),
            torch.zeros(1, 2),
            torch.tensor([2]),
        )
        for _ in range(500)
    ]
    projector = copy.deepcopy(model.model.multi_modal_projector)
    mixing = projector.linear_1.weight.detach().clone()
    mixing /= mixing.std() * 32**0.5
    language_model.whiten_projector(projector, images)
    projected = projector.linear_1(torch.stack([image.features[-1] for image in images]))
    torch.testing.assert_close(projected.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(projected.T.cov(), mixing @ mixing.T, atol=0.1, rtol=0)


def test_each_time_around_all_images_have_their_turn_and_other_conversations():
    nothing = torch.zeros(0)
    images = [
        encoding.CachedImage(
            None, Budget(crops, 20), nothing, nothing, torch.zeros(crops + 1, 2), torch.ones(crops + 1)
        )
        for crops in (0, 7, 16, 32, 64)
    ]
    stage = Stage(steps=4, decay=1, learning_rate=1e-3, batch_size=3, warmup=1)

    def rows(stage, short_steps):
        return conversations.scene_rows(images, stage, short_steps).to_list()

    whole = rows(stage, 0)
    shown = [row["image"] for row in whole]
    assert len(whole) == 12 and sorted(shown[:5]) == sorted(shown[5:10]) == [0, 1, 2, 3, 4]
    assert len({row["seed"] for row in whole}) == 12
    assert whole == rows(replace(stage, steps=9), 0)[:12]
    assert whole != rows(replace(stage, seed=1), 0)
    # The short steps come first and see scenes of many crops.
    both = rows(stage, 2)
    assert [row["short"] for row in both] == [True] * 6 + [False] * 6
    assert sorted(row["image"] for row in both[:3]) == sorted(row["image"] for row in both[3:6]) == [2, 3, 4]
    assert both[6:] == whole[:6] and rows(stage, 9)[:6] == both[:6] and len(rows(stage, 9)) == 12


def test_a_batch_of_images_with_many_tokens_has_fewer(processor, model, monkeypatch):
    monkeypatch.setattr(conversations, "VISUAL_TOKENS", 100)
    few, many = encoding.encode_scenes(model, processor, drawn(3, 4), [Budget(0, 20), Budget(8, 60)])
    collator = conversations.SceneCollator(processor, [few, many], captions=0.0, turns=2)
    for indices, rows in (([0, 0, 0, 0], 4), ([0, 1, 0, 0], 1), ([0] * 6, 5)):
        batch = collator([{"image": index, "short": False, "seed": 1} for index in indices])
        assert len(batch["input_ids"]) == len(batch["image_grid_thw"]) == rows


def test_the_images_of_a_batch_have_about_as_many_tokens():
    rng, stage = random.Random(0), Stage(steps=4, decay=1, learning_rate=1e-3, batch_size=5, warmup=1)
    lengths = [rng.choice((30, 128, 700)) for _ in range(160)]
    order = conversations.batches_alike(list(range(160)), lengths, stage, rng)
    assert sorted(order) == list(range(160))
    longest = [max(lengths[index] for index in order[start : start + 5]) for start in range(0, 160, 5)]
    shortest = [min(lengths[index] for index in order[start : start + 5]) for start in range(0, 160, 5)]
    assert sum(long == short for long, short in zip(longest, shortest)) >= 26
    assert longest != sorted(longest) and set(longest) == {30, 128, 700}


def test_measuring_counts_right_replies(processor, model, monkeypatch):
    images = encoding.encode_scenes(model, processor, drawn(0, 1, 2, 3, split="test"), [Budget(0, 8)] * 4)
    answers = iter(["It says nothing."] * 4 + ["red"] * 4 + ["left"] * 4 + ["?"] * 4)
    monkeypatch.setattr(language_model, "answer_cached", lambda *args: [next(answers) for _ in range(4)])
    rng = random.Random(0)
    keys = {kind: [scenes.ask(scenes.make_scene(s, "test"), kind, rng).key for s in range(4)] for kind in scenes.KINDS}
    expected = {"ocr": 0, "attribute": 25.0 * keys["attribute"].count("red")}
    expected |= {"position": 25.0 * keys["position"].count("left"), "hard": 0}
    assert language_model.measure_language_model(model, processor, images, scenes.KINDS) == expected


def test_the_optimizer_steps_all_that_learns_and_comes_back_from_its_state():
    torch.manual_seed(0)
    model = TowerForPretraining(language_model.vision_config(width=32, layers=1))
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

    other = TowerForPretraining(language_model.vision_config(width=32, layers=1))
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
    learned = TowerForPretraining(language_model.vision_config(128, 6)).tower.embeddings.position_embedding.weight
    assert torch.equal(learned, positions)


class TestBudgets:
    def test_they_have_all_numbers_of_crops_and_tokens_and_zoom_where_things_are_small(self):
        rng, (scene, tiny) = random.Random(0), (drawn(3)[0], scenes.make_scene(3, "train", 140))
        budgets = [encoding.draw_budget(rng, scene) for _ in range(2000)]
        assert {budget.max_crops for budget in budgets if not budget.zoom} == {0, 2, 4, 8, 16, 32, 64, 100}
        tokens = [budget.num_tokens for budget in budgets]
        assert 32 <= min(tokens) < 36 and 690 < max(tokens) <= 728 and 900 < tokens.count(128) < 1150
        zoomed = {(zoom, rounds) for zoom in range(4) for rounds in range(zoom + 1)}
        assert {(budget.zoom, budget.rounds) for budget in budgets} == zoomed
        small = [encoding.draw_budget(rng, tiny) for _ in range(500)]
        assert sum(budget.zoom > 1 for budget in small) > 250 and sum(budget.zoom > 0 for budget in budgets) < 1000

    def test_zooms_boxes_are_scouts_and_closer_ones_about_what_is_sought(self):
        inside = 0
        for seed in range(40):
            scene = scenes.make_scene(seed, "train")
            boxes = encoding.plan_boxes(scene, Budget(16, 64, 1, 1), random.Random(seed))
            knobs = scene.width, scene.height, 1, 16, 64, scenes.SIDE, 8
            scouts = [crop.box for crop in plan_scouts(*knobs)]
            assert boxes[: len(scouts)] == scouts and len(scouts) < len(boxes) <= 17
            assert encoding.plan_boxes(scene, Budget(16, 64, 1, 0), random.Random(seed)) == scouts
            best = {
                group: max(encoding.glyph_height(group, box) for box in boxes[len(scouts) :]) for group in scene.groups
            }
            inside += max(best.values()) > 6.5
        assert inside > 25, "a closer look shows a group legibly, unless it missed all"

    def test_zoom_does_not_look_closer_at_what_the_whole_picture_shows(self):
        scene = scenes.make_scene(0, "train", large=True)
        alone = replace(scene, groups=scene.groups[:1])
        looked = [len(encoding.plan_boxes(alone, Budget(16, 64, 1, 1), random.Random(seed))) for seed in range(40)]
        assert looked.count(min(looked)) > 25

    def test_a_zoomed_scene_is_encoded_as_the_processor_cuts_it(self, processor, model):
        (scene,), budget = drawn(3), Budget(16, 65, 1, 1)
        (image,) = encoding.encode_scenes(model, processor, [scene], [budget])
        boxes = encoding.plan_boxes(scene, budget, random.Random(scene.background_seed))
        inputs = processor("Read it.", scenes.draw_scene(scene), plans=[boxes], num_tokens=65)
        assert image.boxes.tolist() == list(map(list, boxes)) == inputs["crop_boxes"].tolist()
        assert image.num_tokens.tolist() == inputs["crop_num_tokens"].tolist() and image.num_tokens.sum() == 65


class TestWhatCanBeTold:
    def test_texts_only_if_a_crop_shows_them_legibly(self, processor, model, monkeypatch):
        whole, crops = encoding.encode_scenes(model, processor, drawn(3, 3), [Budget(0, 40), Budget(32, 128)])
        rng = random.Random(0)
        for kind in ("ocr", "hard", "object"):
            question = scenes.ask(whole.scene, kind, rng, ())
            assert not conversations.can_tell(question, conversations.best_heights(whole))
            assert conversations.can_tell(question, conversations.best_heights(crops))
        for kind in ("attribute", "position", "existence", "absent"):
            assert conversations.can_tell(scenes.ask(whole.scene, kind, rng, ()), conversations.best_heights(whole))
        # What can't be told is not trained on, but that it is there is.
        collator = conversations.SceneCollator(processor, [whole], captions=0.0, turns=2)
        _, labels, looks = collator.conversation(whole, [scenes.ask(whole.scene, "ocr", rng)])
        assert processor.decode([label for label in labels if label != -100]) == "It" and looks

    def test_where_nothing_is_legible_the_best_crops_are_looked_at(self, processor, model):
        (scouts,) = encoding.encode_scenes(model, processor, drawn(3), [Budget(9, 128, 1, 0)])
        for group in scouts.scene.groups:
            heights = [encoding.glyph_height(group, box) for box in scouts.boxes.tolist()]
            last = (scouts.num_tokens.cumsum(0) - 1).tolist()
            seen = conversations.last_tokens_showing(scouts)[group[0]]
            assert 0 < max(heights) < conversations.READABLE and heights[0] < 0.7 * max(heights)
            assert seen == [token for token, height in zip(last, heights) if height >= 0.7 * max(heights)]


def test_folders_that_are_missing_or_do_not_fit_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Stage(steps=2, decay=1, learning_rate=1e-3, batch_size=2, warmup=1)
    recipe = language_model.TinyRecipe("tiny", stage, stage, num_images=5, short_steps=1, objects="here")
    with pytest.raises(ValueError, match="objects .here. and fonts .None. are for scenes on photographs"):
        recipe.materials()
    with pytest.raises(ValueError, match="start: there is no folder nowhere; .* or set start=null"):
        language_model.train_tiny(replace(recipe, objects=None, start="nowhere"))
    with pytest.raises(
        ValueError, match="tiny has num_hidden_layers 6 in its text_config, the recipe 5: set start to"
    ):
        language_model.train_tiny(replace(recipe, objects=None, start=str(ROOT / "tiny"), layers=5))
    with pytest.raises(ValueError, match="photographs: there is no folder nowhere"):
        language_model.train_tiny(replace(recipe, photographs="nowhere"))
    assert not list(filter(Path.is_dir, tmp_path.iterdir())), (
        "a folder of a run that was refused has to be removed before the next one"
    )


def test_an_output_that_can_be_no_folder_is_refused_before_hours_of_training(tmp_path):
    stage = Stage(steps=2, decay=1, learning_rate=1e-3, batch_size=2, warmup=1)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", ".", ".."):
        recipe = language_model.TinyRecipe(str(output), stage, stage, num_images=5, short_steps=1)
        with pytest.raises(ValueError, match="can't be the folder of a model: name another output"):
            language_model.train_tiny(recipe)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("tower_width=100", "tower_width Input should be a multiple of 32"),
        ("width=16", "width Input should be a multiple of 32"),
        ("tower.steps=3700", "tower .*warmup 300 and decay 3500 together exceed the 3700 steps: lower them"),
        ("language_model.decay=1000", "warmup 50 and decay 1000 together exceed the 1000 steps"),
    ],
)
def test_sizes_and_steps_that_cannot_be_are_refused(override, reason):
    values = training.read_recipe(ROOT / "examples" / "tiny.yaml", [override])
    del values["kind"]
    with pytest.raises(ValueError, match=reason):
        training.build_recipe(language_model.TinyRecipe, values)


def test_damaged_files_of_an_earlier_run_are_named_or_made_anew(processor, model, tmp_path):
    for content in ("", "[1]", '{"a": 1'):
        (tmp_path / language_model.SETTINGS_FILE).write_text(content)
        with pytest.raises(ValueError, match="recipe.json is damaged .*: remove the folder, or name another output"):
            language_model.record_settings(tmp_path, {"a": 1})
    encoding.cache_scenes(model, processor, tmp_path / "images", range(2), workers=0)
    (shard,) = (tmp_path / "images").iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    encoding.cache_scenes(model, processor, tmp_path / "images", range(2), workers=0)
    assert shard.read_bytes() == whole


COMMAND = """
import torch._dynamo
from mc_llava import cli
from mc_llava.scenes import language_model

torch._dynamo.config.disable = False  # layers are compiled, as for users
language_model.SCENES_FOR_HEADS = 12  # not 300, after each of the two runs
cli.main()
"""


def run_recipe(output) -> dict[str, dict[int, float]]:
    """`mc-llava train examples/tiny.yaml` with a smaller model. For both stages, step -> loss."""
    sizes = {
        "num_images": 4,
        "num_tested": 2,
        "earlier": "[]",
        "averaged": 0,
        "start": "null",
        "photographs": "null",
        "objects": "null",
        "fonts": "null",
        "tower_width": 32,
        "tower_layers": 3,
        "width": 32,
        "layers": 3,
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
        "short_steps": 14,
    }
    values = [f"{name}={value}" for name, value in {"output": output, **sizes}.items()]
    result = processes.run("-c", COMMAND, "train", "examples/tiny.yaml", *values, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    work = output.with_name(output.name + "-work")
    losses = {}
    for stage, last in (("tower", "checkpoint-120"), ("language_model-1", "checkpoint-20")):
        state = json.loads((work / stage / last / "trainer_state.json").read_text())
        losses[stage] = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    return losses


@pytest.mark.slow
def test_a_smaller_model_learns_by_the_command_and_resumes_on_the_same_curve(tmp_path):
    work = tmp_path / "tiny-work"
    whole = run_recipe(tmp_path / "tiny")
    assert whole["tower"][120] < 0.8 * whole["tower"][10]
    # As if each stage had been stopped halfway, the second after five passes over its four images.
    shutil.rmtree(work / "tower" / "checkpoint-120")
    shutil.rmtree(work / "language_model-1" / "checkpoint-20")
    again = run_recipe(tmp_path / "tiny")
    for stage in whole:
        assert again[stage] == pytest.approx(whole[stage], rel=1e-3)


@pytest.mark.slow
def test_all_stages_run_leave_a_model_and_can_be_called_again(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD", 3)
    monkeypatch.setattr(language_model, "SCENES_FOR_HEADS", 12)
    measured = []
    chosen = lambda heads, most: measured.append(len(heads)) or heads[:most]  # noqa: E731
    monkeypatch.setattr(language_model, "choose_heads", chosen)
    tested, encode = set(), language_model.encode_scenes

    def noted(model, processor, scenes, budgets, workers=0):
        tested.update(scenes)
        return encode(model, processor, scenes, budgets, workers)

    monkeypatch.setattr(language_model, "encode_scenes", noted)
    stage = Stage(steps=2, decay=1, learning_rate=1e-3, batch_size=2, warmup=1)
    sizes = {"tower_width": 32, "tower_layers": 3, "width": 32, "layers": 3, "workers": 0}
    recipe = language_model.TinyRecipe(
        str(tmp_path / "tiny"), stage, stage, num_images=5, short_steps=1, num_tested=2, **sizes
    )
    output = language_model.train_tiny(recipe)
    model = MCLlavaForConditionalGeneration.from_pretrained(output)
    processor = MCLlavaProcessor.from_pretrained(output)
    assert "use_cache" not in json.loads((output / "config.json").read_text()), "a setting of Trainer's"
    tower = pretrain_tower(
        tmp_path / "tiny-work" / "tower", language_model.vision_config(32, 3), stage, workers=0
    ).tower
    for name, value in model.model.vision_tower.state_dict().items():
        torch.testing.assert_close(value.float(), tower.state_dict()[name], rtol=0.01, atol=1e-3)
    assert measured == [3] and len(model.config.zoom_heads) == 2
    inputs = processor("What color is the star?", scenes.draw_scene(scenes.make_scene(0, "test")))
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    report = json.loads((tmp_path / "tiny-work" / "language_model-1" / "accuracy.jsonl").read_text())
    assert set(report["crops"]) == set(scenes.KINDS)
    assert len(tested) == 2 and not tested & {scenes.make_scene(seed, "test") for seed in range(NUM_SCENES)}
    assert set(report) >= {"crops", "whole", "most", "seen"} and "photographs" not in report

    def cached():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny-work/images-2").glob("*.safetensors")}

    shards = cached()
    assert set(shards) == {"scenes-0-3.safetensors", "scenes-3-5.safetensors"}
    language_model.train_tiny(recipe)
    again = MCLlavaForConditionalGeneration.from_pretrained(output).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert shards == cached()
    checkpoints = {path.name for path in (tmp_path / "tiny-work").glob("*/checkpoint-*")}
    assert checkpoints == {"checkpoint-2"}, "what is finished took further steps"
    # A run doesn't resume with features of other scenes, or with a language model trained on another tower's.
    with monkeypatch.context() as changed, pytest.raises(ValueError, match="images-2 was made with scenes "):
        changed.setattr(encoding, "ZOOM_BUDGETS", (9,))
        language_model.train_tiny(recipe)
    longer = replace(recipe, tower=replace(stage, steps=3))
    with pytest.raises(ValueError, match="language_model-1 was made with tower.steps 2, the recipe has 3: remove the"):
        language_model.train_tiny(longer)
    shutil.rmtree(tmp_path / "tiny-work" / "language_model-1")
    with pytest.raises(ValueError, match="tower was made with tower.learning_rate 0.001, the recipe has 0.002"):
        language_model.train_tiny(replace(recipe, tower=replace(stage, learning_rate=2e-3)))
    language_model.train_tiny(replace(longer, language_model=replace(stage, seed=1)))
    language_model.train_tiny(replace(longer, language_model=replace(stage, seed=1, steps=3)))
    assert (tmp_path / "tiny-work" / "language_model-1" / "checkpoint-3").is_dir()
    assert len(list((tmp_path / "tiny-work" / "images-3").glob("*.safetensors"))) == 2 and cached() == shards
    # A model that is trained further starts from the other one's weights.
    still = {"tower": replace(stage, steps=1, decay=0, learning_rate=1e-9)}
    still["language_model"] = replace(still["tower"], seed=1)
    started = replace(recipe, output=str(tmp_path / "other"), start=str(output), num_images=2, **still)
    other = MCLlavaForConditionalGeneration.from_pretrained(language_model.train_tiny(started))
    before = MCLlavaForConditionalGeneration.from_pretrained(output).state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0.01, atol=1e-4)


@pytest.mark.slow
def test_a_round_goes_on_with_another_tower_other_scenes_and_more_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "SCENES_FOR_HEADS", 2)
    stage = Stage(steps=4, decay=1, learning_rate=3e-2, batch_size=2, warmup=0)
    sizes = {"tower_width": 32, "tower_layers": 3, "width": 32, "layers": 4, "workers": 0}
    earlier = {"tower": {"steps": 1}, "language_model": {"steps": 1}, "layers": 3}, {"language_model": {"steps": 2}}
    earlier[1]["num_images"] = 2
    recipe = language_model.TinyRecipe(
        str(tmp_path / "tiny"), stage, stage, num_images=3, short_steps=1, num_tested=2, earlier=earlier, **sizes
    )
    work, done, train_round = tmp_path / "tiny-work", [], language_model.train_round

    def noted(rounds, number, *arguments):
        done.append(number)
        return train_round(rounds, number, *arguments)

    monkeypatch.setattr(language_model, "train_round", noted)
    model = MCLlavaForConditionalGeneration.from_pretrained(language_model.train_tiny(recipe))
    made = {path.relative_to(work).as_posix(): path.stat().st_mtime_ns for path in work.glob("images-*/*.safetensors")}
    scenes_of = {"images-1": ["0-3"], "images-4": ["3-5", "3-6"]}  # of the second tower: two at first, then one more
    assert set(made) == {f"{name}/scenes-{part}.safetensors" for name, parts in scenes_of.items() for part in parts}
    assert done == [1, 2, 3]
    assert len(model.model.language_model.layers) == 4
    first = MCLlavaForConditionalGeneration.from_pretrained(work / "round-1")
    assert len(first.model.language_model.layers) == 3
    name = "encoder.layers.0.mlp.fc1.weight"
    for made_by, steps in ((first, 1), (model, 4)):
        tower = load_file(work / "tower" / f"checkpoint-{steps}" / "model.safetensors")
        assert torch.equal(made_by.model.vision_tower.state_dict()[name], tower[f"tower.{name}"].bfloat16())
    assert not torch.equal(first.model.vision_tower.state_dict()[name], model.model.vision_tower.state_dict()[name])
    # A run that was stopped in the last round doesn't repeat the others.
    shutil.rmtree(work / "language_model-3" / "checkpoint-4")
    done.clear()
    again = MCLlavaForConditionalGeneration.from_pretrained(language_model.train_tiny(recipe))
    assert done == [3]
    changed = {"layers": 3, "tower": {"steps": 1}, "language_model": {"steps": 1, "learning_rate": 1e-3}}, earlier[1]
    shutil.move(work / "language_model-1", work / "language_model-0")
    for number in (2, 3):
        shutil.move(work / f"language_model-{number}", tmp_path / f"{number}")
    with pytest.raises(ValueError, match="round-1 was made with round .*, the recipe has .*: remove the folder"):
        language_model.train_tiny(replace(recipe, earlier=changed))
    shutil.move(work / "language_model-0", work / "language_model-1")
    for number in (2, 3):
        shutil.move(tmp_path / f"{number}", work / f"language_model-{number}")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0.02, atol=1e-3, msg=name)
    with pytest.raises(ValueError, match="images-4 was made with first seed 3, the recipe has 0"):
        language_model.train_tiny(replace(recipe, earlier=()))
    shutil.rmtree(work / "round-1")
    with pytest.raises(ValueError, match=f"checkpoint-4 is of a later round than .*language_model-1.*remove {work}"):
        language_model.train_tiny(recipe)


@pytest.mark.slow
def test_a_round_may_keep_the_mean_of_what_it_began_with_and_of_several_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "SCENES_FOR_HEADS", 2)
    stage = Stage(steps=1, decay=0, learning_rate=1e-2, batch_size=2, warmup=0, seed=5)
    sizes = {"tower_width": 32, "tower_layers": 3, "width": 32, "layers": 3, "workers": 0}
    recipe = language_model.TinyRecipe(
        str(tmp_path / "tiny"),
        stage,
        stage,
        num_images=3,
        short_steps=0,
        averaged=2,
        num_tested=2,
        earlier=({"averaged": 0},),
        **sizes,
    )
    mean = load_file(language_model.train_tiny(recipe) / "model.safetensors")
    # What is measured of the mean stands beside what was measured of each training.
    assert capsys.readouterr().out.count("{'mean of': 3, 'crops': {'ocr': ") == 1
    work = tmp_path / "tiny-work"
    folders = "round-1", *(f"language_model-2/seed-{seed}/checkpoint-1" for seed in (5, 6))
    states = [load_file(work / folder / "model.safetensors") for folder in folders]
    changed = 0
    for name, value in mean.items():
        began, *trained = (state[name].float() for state in states)
        torch.testing.assert_close(value.float(), (began + sum(trained)) / 3, rtol=0.01, atol=1e-4, msg=name)
        changed += not torch.allclose(value.float(), sum(trained) / 2, rtol=0.01, atol=1e-3)
        changed += not torch.allclose(trained[0], trained[1], rtol=0.01, atol=1e-3)
    assert changed > 20, "the trainings or what they began with are the same"
    # Only what is missing is trained again.
    shutil.rmtree(work / "language_model-2" / "seed-6" / "checkpoint-1")
    finished = (work / "language_model-2" / "seed-5" / "checkpoint-1" / "model.safetensors").stat().st_mtime_ns
    again = load_file(language_model.train_tiny(recipe) / "model.safetensors")
    assert (work / "language_model-2/seed-5/checkpoint-1/model.safetensors").stat().st_mtime_ns == finished
    for name, value in again.items():
        torch.testing.assert_close(value, mean[name], rtol=0.02, atol=1e-3, msg=name)
    for number, earlier in ((1, ()), (2, ({"averaged": 0, "layers": 3},))):
        with pytest.raises(ValueError, match=f"averaged is 2 in round {number}, but .*: set averaged to 0 there, or"):
            replace(recipe, layers=4, earlier=earlier).rounds()


def test_what_differs_in_a_round_is_checked():
    stage = Stage(steps=4, decay=1, learning_rate=1e-3, batch_size=2, warmup=1)
    recipe = language_model.TinyRecipe("tiny", stage, stage, num_images=3, short_steps=1)
    first, last = replace(recipe, earlier=({"tower": {"steps": 3}, "short_steps": 0, "num_images": 9},)).rounds()
    assert (first.tower, first.language_model, first.short_steps) == (replace(stage, steps=3), stage, 0)
    assert last == recipe
    for changes, message in (
        ({"tower": {"steps": 5}}, "tower.steps is 5 in one round and 4 in the next one"),
        ({"layers": 5}, "layers is 5 in one round and 4 in the next one"),
        (
            {"layer": 4},
            "rounds may differ in tower.steps, layers, short_steps, num_images, averaged, language_model, "
            "not in layer",
        ),
        ({"num_images": 4}, "num_images is 4 in one round and 3 in the next one"),
        ({"averaged": 1}, "averaged is 1 in round 1, but there is no mean with weights of another tower"),
        ({"num_tested": 4}, "not in num_tested"),
        ({"tower": {"learning_rate": 1e-2, "steps": 3}}, "not in tower.learning_rate"),
        ({"tower": 3}, "tower must be settings such as {steps: 1000}, got 3"),
        ({"language_model": {"step": 3}}, "language_model.step Unexpected keyword argument, choose from steps"),
        ({"tower": {"steps": 0}}, "tower.steps Input should be greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(recipe, earlier=(changes,)).rounds()


def test_two_runs_do_not_make_one_model(tmp_path):
    stage = Stage(steps=1, decay=0, learning_rate=1e-2, batch_size=2, warmup=0)
    recipe = language_model.TinyRecipe(str(tmp_path / "runs/tiny"), stage, stage, num_images=2, short_steps=0)
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs/tiny.lock"), pytest.raises(ValueError, match="another run writes .*tiny: wait"):
        language_model.train_tiny(recipe)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny.lock"]


def test_a_checkpoint_to_start_from_runs_no_code_of_its_folder(processor, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("transformers asks whether to run the folder's code")

    monkeypatch.setattr("builtins.input", refuse)
    vision = language_model.vision_config(width=128, layers=6)
    config = language_model.build_model(processor, vision, width=192, layers=6).config
    assert load_start(str(ROOT / "tiny"), config).tokenizer.get_vocab()["<image>"] > 0
    config.vision_config.num_attention_heads = 8
    with pytest.raises(ValueError, match="tiny has num_attention_heads 4 in its vision_config, the recipe 8"):
        load_start(str(ROOT / "tiny"), config)


class Vocabulary(dict):
    def get_vocab(self):
        return self

    def convert_tokens_to_string(self, tokens):
        return " + ".join(tokens)

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [self[token] for token in text.split(" + ")]


def test_copied_weights_follow_the_tokens(model):
    tokens = len(model.get_input_embeddings().weight)
    known = Vocabulary({f"token {row}": row for row in range(tokens)})
    shuffled = random.Random(0).sample(range(tokens), tokens)
    other = Vocabulary({f"token {token}": row for row, token in enumerate(shuffled)} | {"token 3 + token 5": tokens})
    here = copy.deepcopy(model)
    here.resize_token_embeddings(tokens + 1)
    for parameter in here.parameters():
        torch.nn.init.constant_(parameter, 7)
    copy_weights(Start(model, known), here, other)
    copied, by_token = (
        here.state_dict(),
        ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"),
    )
    for name, value in model.state_dict().items():
        if name in by_token:
            value = torch.cat([value[shuffled], value[[3, 5]].mean(0, keepdim=True)])
        assert torch.equal(copied[name], value), name
