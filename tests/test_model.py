"""The model on small random weights: batches, features, attention, precision, training and what it refuses."""

import copy
import json
import pickle

import pytest
import torch
from helpers import PATCH, SIDE, counting_crops, picture, prompt, small_config, small_model
from transformers import LlamaConfig, SiglipVisionConfig

from mc_llava import CROPS_PER_PASS, MCLlavaConfig, MCLlavaForConditionalGeneration, count_image_tokens


pytestmark = pytest.mark.usefixtures("no_old_name")
IMAGES = [picture(40, 30), picture(200, 60, seed=1), picture(70, 150, seed=2)]
QUESTIONS = ["What is it?", "And where?", "Why?"]
IMAGE_FIELDS = ("pixel_values", "crop_coords", "crop_num_tokens", "image_grid_thw")


def image_fields(inputs) -> dict:
    return {name: inputs[name] for name in IMAGE_FIELDS}


@torch.no_grad()
def last_logits(model, inputs) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_batch_equals_one_by_one(processor, seed):
    model = small_model(seed)
    texts = [*QUESTIONS, "No image", prompt("Two", 2)]
    images = [[image] for image in IMAGES] + [[], IMAGES[1:]]
    batch = last_logits(model, processor(texts, images))
    for row, text, own in zip(batch, texts, images):
        assert torch.allclose(row, last_logits(model, processor(text, [own]))[0], atol=1e-4)


def test_every_image_and_its_place_matter(model, processor):
    def logits(images, **knobs):
        return last_logits(model, processor("Which?", images, **knobs))

    reference = logits(IMAGES[:2])
    for images, knobs in (
        (IMAGES[1::-1], {}),
        ([IMAGES[0], IMAGES[2]], {}),
        ([IMAGES[2], IMAGES[1]], {}),
        (IMAGES[:2], {"max_crops": 0}),
    ):
        assert (logits(images, **knobs) - reference).abs().max() > 1e-2

    inputs = processor("Which?", IMAGES[1])
    moved = {**inputs, "crop_coords": 1 - inputs["crop_coords"]}
    assert (last_logits(model, moved) - last_logits(model, inputs)).abs().max() > 1e-2


def test_more_crops_than_go_through_the_tower_at_once(model, processor):
    image = picture(600, 500)
    inputs = processor("What?", image, max_crops=60, num_tokens=100)
    assert len(inputs["pixel_values"]) > 40
    with torch.no_grad():
        features = model.get_image_features(**image_fields(inputs)).last_hidden_state
        start = 0
        for index, count in enumerate(inputs["crop_num_tokens"].tolist()):
            one = {name: inputs[name][index : index + 1] for name in IMAGE_FIELDS[:3]}
            alone = model.get_image_features(**one, image_grid_thw=torch.tensor([[1, 1, 1]])).last_hidden_state
            assert torch.allclose(features[start : start + count], alone, atol=1e-4)
            start += count


def test_features_are_what_pixels_give(model, processor):
    inputs = processor(QUESTIONS, IMAGES)
    with torch.no_grad():
        features = model.get_image_features(**image_fields(inputs)).pooler_output
    assert [len(entry) for entry in features] == (inputs["input_ids"] == 50297).sum(-1).tolist()
    reference = last_logits(model, inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(last_logits(model, {**text, "image_features": features}), reference)
    same = [entry[:20] for entry in features if len(entry) == 20]
    one = processor(["a"] * len(same), [image for image, f in zip(IMAGES, features) if len(f) == 20])
    text = {name: one[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(
        last_logits(model, {**text, "image_features": torch.stack(same)}),
        last_logits(model, {**text, "image_features": same}),
    )


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations(processor, implementation):
    inputs = processor(QUESTIONS, IMAGES)
    reference = last_logits(small_model(), inputs)
    assert torch.allclose(last_logits(small_model(attn_implementation=implementation), inputs), reference, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(processor, dtype):
    inputs = processor(QUESTIONS, IMAGES)
    reference = last_logits(small_model(), inputs)
    logits = last_logits(small_model().to(dtype), inputs)
    assert logits.dtype == dtype
    assert (logits.float() - reference).norm() / reference.norm() < 0.05


def test_training_step(processor):
    inputs = processor([prompt(f"{q}") + "A cup.<|im_end|>\n" for q in QUESTIONS], IMAGES)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == 50297), -100)
    gradients = {}
    for checkpointing in (False, True):
        model = small_model().train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.text_config.resid_pdrop = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(**inputs, labels=labels)
        expected = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        assert torch.allclose(output.loss, expected, atol=1e-5)
        output.loss.backward()
        gradients[checkpointing] = {name: p.grad for name, p in model.named_parameters()}
    unused = {name for name, grad in gradients[False].items() if grad is None}
    assert unused == {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    for name, gradient in gradients[False].items():
        if name not in unused:
            assert gradient.abs().sum() > 0, name
            assert torch.allclose(gradient, gradients[True][name], atol=1e-5), name


def test_a_few_steps_learn(processor):
    inputs = processor([prompt(q) + "A cup.<|im_end|>\n" for q in QUESTIONS], IMAGES)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == 50297), -100)
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_tuples_and_hidden_states(model, processor):
    inputs = processor(QUESTIONS, IMAGES)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        flags = {"output_hidden_states": True, "use_cache": False, "return_dict": False}
        logits, hidden_states, image_outputs = model(**inputs, **flags)
    assert torch.equal(output.logits, logits)
    assert len(output.hidden_states) == len(hidden_states) == 3
    assert torch.equal(output.image_outputs.last_hidden_state, image_outputs.last_hidden_state)


def test_outputs_hold_those_of_the_tower(model, processor):
    inputs = processor(QUESTIONS * 2, IMAGES * 2)
    fields = image_fields(inputs)
    crops, patches = len(inputs["pixel_values"]), (SIDE // PATCH) ** 2
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        plain = model(**inputs)
        eager = small_model(attn_implementation="eager")
        features = eager.get_image_features(**fields, output_hidden_states=True, output_attentions=True)
        patches_before_norm = torch.cat([eager.model.encode_crops(pixels[None]) for pixels in inputs["pixel_values"]])
    assert crops > CROPS_PER_PASS, "more than one pass"
    for outputs in (output.image_outputs, features):
        assert [tuple(state.shape) for state in outputs.hidden_states] == [(crops, patches, 32)] * 3
    assert [tuple(weights.shape) for weights in features.attentions] == [(crops, 2, patches, patches)] * 2
    assert torch.allclose(features.attentions[0].sum(-1), torch.ones(()), atol=1e-5)
    kept = eager.model.keep_last(patches_before_norm, inputs["crop_num_tokens"])
    positions = eager.model.coord_embed(inputs["crop_coords"]).repeat_interleave(inputs["crop_num_tokens"], 0)
    assert torch.allclose(features.last_hidden_state, kept + positions, atol=1e-5)
    assert plain.image_outputs.hidden_states is None and plain.image_outputs.attentions is None
    assert [len(tokens) for tokens in plain.image_outputs.pooler_output] == count_image_tokens(
        inputs["crop_num_tokens"], inputs["image_grid_thw"]
    )
    assert model(**processor("Why?")).image_outputs is None


def test_pickle_and_copies(processor):
    inputs, model = processor(QUESTIONS, IMAGES), small_model()
    model.generate(**inputs, max_new_tokens=2)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(last_logits(twin, inputs), last_logits(model, inputs))


def inconsistent(**changes):
    def apply(inputs, features):
        kept = {name: value for name, value in inputs.items() if name not in changes.get("without", ())}
        kept |= {name: change(inputs[name]) for name, change in changes.items() if name not in ("without", "features")}
        if "features" in changes:
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            kept["image_features"] = changes["features"](features)
        return kept

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (inconsistent(input_ids=lambda ids: ids[:, 5:], attention_mask=lambda m: m[:, 5:]), "the rows have"),
        (inconsistent(pixel_values=lambda x: x[:-1]), "pixel_values, crop_coords and crop_num_tokens describe"),
        (inconsistent(crop_num_tokens=lambda x: x[:-1]), "image_grid_thw has .* crops"),
        (inconsistent(image_grid_thw=lambda x: x[:-1]), "image_grid_thw has .* crops"),
        (inconsistent(crop_num_tokens=lambda x: x - 1), "the rows have"),
        (inconsistent(without=["crop_num_tokens"]), "pixel_values need crop_num_tokens"),
        (inconsistent(without=["crop_coords"]), "pixel_values, crop_coords and crop_num_tokens describe"),
        (inconsistent(without=IMAGE_FIELDS), "<image> tokens but got no images"),
        (inconsistent(features=lambda f: [None]), "tensor for each image, got NoneType"),
        (inconsistent(without=["input_ids"]), "pass either input_ids or inputs_embeds"),
        (inconsistent(features=lambda f: f[:-1]), "the rows have"),
        (inconsistent(features=lambda f: [f[0][1:], torch.cat([f[0][:1], f[1]]), f[2]]), "the rows have"),
        (inconsistent(features=lambda f: [entry[:, :-1] for entry in f]), r"must be a \[tokens, 48\] tensor"),
        (inconsistent(features=lambda f: torch.cat(f)), r"must be a \[tokens, 48\] tensor"),
    ],
)
def test_what_does_not_belong_together_is_refused(model, processor, change, message):
    inputs = processor(QUESTIONS, IMAGES)
    with torch.no_grad():
        features = model.get_image_features(**image_fields(inputs)).pooler_output
        changed = change(inputs, features)
        with pytest.raises(ValueError, match=message):
            model(**changed)
        if "input_ids" in changed:
            with pytest.raises(ValueError, match=message):
                model.generate(**changed, max_new_tokens=1)


@pytest.mark.parametrize("count", [-1, 0, 1, 15, 16])
def test_a_crop_gives_from_one_token_to_all_patches_but_the_first(model, processor, count):
    """Of the small model's 16 patches a crop, the first was never trained on."""
    fields = image_fields(processor(QUESTIONS, IMAGES))
    fields["crop_num_tokens"] = torch.full_like(fields["crop_num_tokens"], count)
    if 1 <= count <= 15:
        with torch.no_grad():
            features = model.get_image_features(**fields).last_hidden_state
        assert len(features) == count * len(fields["pixel_values"])
    else:
        message = rf"crop_num_tokens must lie between 1 and 15 .* got {count} to {count}"
        with pytest.raises(ValueError, match=message):
            model.get_image_features(**fields)


def test_pixels_and_features_at_once_are_refused(model, processor):
    inputs = processor(QUESTIONS, IMAGES)
    with torch.no_grad():
        features = model.get_image_features(**image_fields(inputs)).pooler_output
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="not both"):
            call(**inputs, image_features=features)


def test_images_need_ids(model, processor):
    inputs = processor(QUESTIONS, IMAGES)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="images need input_ids"):
            call(inputs_embeds=embeds, **inputs)


class TestConfig:
    def test_phi_2_and_siglip_are_the_defaults(self):
        config = MCLlavaConfig()
        assert config.text_config.rope_parameters["partial_rotary_factor"] == 0.4
        assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (2560, 1152)
        assert config.image_token_id == config.image_token_index == 50297
        with torch.device("meta"):
            model = MCLlavaForConditionalGeneration(config)
        assert sum(p.numel() for p in model.parameters()) == 3_203_510_640

    def test_there_and_back(self, tmp_path):
        config = MCLlavaConfig(image_token_index=7, vision_config={"image_size": 96, "patch_size": 12})
        config.save_pretrained(tmp_path)
        again = MCLlavaConfig.from_pretrained(tmp_path)
        ignored = ("transformers_version", "_name_or_path")
        assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
            k: v for k, v in config.to_dict().items() if k not in ignored
        }

    def test_another_model_is_refused(self):
        with pytest.raises(ValueError, match="projector_tokens_num must be 1, got 2"):
            MCLlavaConfig(projector_tokens_num=2)
        with pytest.raises(ValueError, match="tie_word_embeddings must be False"):
            MCLlavaConfig(tie_word_embeddings=True)

    def test_the_callers_parts_stay_as_they_are(self):
        vision_config = SiglipVisionConfig()
        assert not MCLlavaConfig(vision_config=vision_config).vision_config.vision_use_head
        assert getattr(vision_config, "vision_use_head", True)

    @pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
    @pytest.mark.parametrize(
        "name",
        ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"],
    )
    @pytest.mark.parametrize("value", ["evil/kernel", {"": "evil/kernel", "text_config": "evil/kernel"}], ids=str)
    def test_a_file_chooses_no_kernel(self, tmp_path, part, name, value):
        """transformers would fetch its code. The caller may choose one."""
        small_config().save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        (saved if part is None else saved[part])[name] = value
        (tmp_path / "config.json").write_text(json.dumps(saved))
        config = MCLlavaConfig.from_pretrained(tmp_path)
        assert "evil" not in str({**vars(config), **vars(config.text_config), **vars(config.vision_config)})
        chosen = MCLlavaConfig.from_pretrained(tmp_path, attn_implementation="kernels-community/flash-attn2")
        for one in (chosen, chosen.text_config, chosen.vision_config):
            assert one._attn_implementation == "kernels-community/flash-attn2"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text_config": {"model_type": "llama"}}, "model_type must be phi, got 'llama'"),
            ({"text_config": {"model_type": "nosuch"}}, "model_type must be phi, got 'nosuch'"),
            ({"text_config": LlamaConfig()}, "model_type must be phi, got 'llama'"),
            ({"vision_config": {"model_type": "clip"}}, "model_type must be siglip_vision_model, got 'clip'"),
            (
                {"text_config": {"num_hidden_layers": 10**9}},
                "num_hidden_layers of text_config must be from 1 to 1000, got 1000000000",
            ),
            ({"text_config": {"hidden_size": 10**9}}, "hidden_size of text_config must be from 1 to 131072"),
            ({"text_config": {"vocab_size": -1}}, "vocab_size of text_config must be from 1 to"),
            (
                {"vision_config": {"num_hidden_layers": -1}},
                "num_hidden_layers of vision_config must be from 1 to 1000",
            ),
            ({"vision_config": {"patch_size": 0}}, "patch_size of vision_config must be from 1 to"),
            ({"vision_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps of vision_config must be above 0"),
            ({"text_config": {"layer_norm_eps": -1.0}}, "layer_norm_eps of text_config must be above 0"),
            ({"text_config": {"hidden_act": "evil"}}, "the activation of text_config, 'evil', is unknown"),
            ({"projector_hidden_act": "evil"}, "the activation of the projector, 'evil', is unknown"),
            ({"auto_map": "x"}, "auto_map must be a dict"),
        ],
    )
    def test_another_model_or_an_absurd_size(self, changes, message):
        with pytest.raises(ValueError, match=message) as caught:
            MCLlavaConfig(**changes)
        assert "config.json" not in str(caught.value), "it comes from no file"

    @pytest.mark.parametrize(
        "content",
        [
            [],
            {"image_token_index": "3"},
            {"projector_hidden_act": 1},
            {"zoom_heads": [1]},
            {"dtype": "x"},
            {"vision_config": {"hidden_size": "x"}},
            {"text_config": {"num_hidden_layers": 1.5}},
            {"text_config": {"hidden_size": 2**18}},
            {"text_config": {"layer_norm_eps": -1.0}},
            {"projector_hidden_act": "evil"},
            {"auto_map": "x"},
            {"text_config": []},
        ],
        ids=str,
    )
    def test_a_file_with_a_value_of_another_type(self, tmp_path, content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="config.json .*: fetch it again"):
            MCLlavaConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("model_type", ["llava", "phi", "mc_llava", None])
    def test_a_file_of_another_model(self, tmp_path, model_type):
        small_config().save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**saved, "model_type": model_type}))
        with pytest.raises(ValueError, match=f"model_type must be mc-llava, got {model_type!r}"):
            MCLlavaConfig.from_pretrained(tmp_path)

    def test_no_code_from_a_third_repository(self):
        text_config = {"model_type": "phi", "auto_map": {"AutoConfig": "somebody/else--code.Config"}}
        assert not hasattr(MCLlavaConfig(text_config=text_config).text_config, "auto_map")

    def test_the_code_of_a_derived_repository_is_kept(self):
        reference = "visheratin/MC-LLaVA-3b--configuration_mc_llava.MCLlavaConfig"
        assert MCLlavaConfig(auto_map={"AutoConfig": reference}).auto_map == {"AutoConfig": reference}


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_states_of_a_generated_sequence_cost_no_second_pass_of_the_tower(processor, name):
    model = small_model(attn_implementation="eager")
    inputs = processor(QUESTIONS[1], IMAGES[1])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, f"output_{name}": True}
    with counting_crops(model) as crops:
        output = model.generate(**inputs, **options)
    assert (
        sum(crops) == len(inputs["pixel_values"])
        and len(output[name]) == output.sequences.shape[1] - inputs["input_ids"].shape[1]
    )
    assert torch.equal(output.sequences, model.generate(**inputs, max_new_tokens=3, do_sample=False))


class Packed(torch.nn.Linear):
    """A layer as quantizers make it: its weight is bytes that only the layer can use."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.whole = layer.weight.data
        self.weight = torch.nn.Parameter(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, inputs):
        assert inputs.dtype == self.bias.dtype
        return torch.nn.functional.linear(inputs, self.whole, self.bias)


class Called(torch.nn.Module):
    """A layer as torch quantizes it: its weight and bias are methods."""

    def __init__(self, layer):
        super().__init__()
        self.forward, self.weight, self.bias = layer.forward, lambda: layer.weight, lambda: layer.bias


@pytest.mark.parametrize("kind", [Packed, Called])
def test_coordinates_are_no_integers_where_weights_are(model, processor, kind):
    images = processor.image_processor(picture(200, 100), return_tensors="pt")
    packed = copy.deepcopy(model)
    packed.model.coord_embed[0] = kind(packed.model.coord_embed[0])
    with torch.no_grad():
        expected, found = (m.get_image_features(**images, return_dict=True).pooler_output for m in (model, packed))
    assert torch.equal(found[0], expected[0])
