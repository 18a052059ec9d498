"""Images that are encoded once: the value, its file, its hash, and the cache over it."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import CountReads, counting_crops, picture, prompt, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from mc_llava import (
    EncodedImages,
    FeatureCache,
    MCLlavaForConditionalGeneration,
    MCLlavaImageProcessor,
    MCLlavaProcessor,
    hash_tensors,
    hashing_mc_llava,
)


IMAGES = [picture(40, 30), picture(200, 60, seed=1), picture(70, 150, seed=2), picture(300, 300, seed=3)]
PATCHES, ROW = 15, 32 * 4  # the most that a crop of the small model can give; the bytes of one
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def ask(model, inputs, **options) -> list:
    return model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def text_of(inputs) -> dict:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(["What is it?", prompt("And these two?", 2)], [IMAGES[:1], IMAGES[1:3]])


@pytest.fixture(scope="module")
def encoded(model, inputs) -> EncodedImages:
    return model.encode_images(**inputs)


@pytest.fixture
def passes(model):
    """How many crops passed through the vision tower."""
    with counting_crops(model) as crops:
        yield crops


class TestAsking:
    def test_it_stands_in_for_pixels_in_both_forms(self, model, processor, inputs, encoded):
        reference = ask(model, inputs)
        assert ask(model, text_of(inputs), image_features=encoded) == reference
        short = processor.tokenizer([prompt("What is it?"), prompt("And these two?", 2)], padding=True)
        short = {name: torch.tensor(value) for name, value in short.items()}
        for options in ({}, {"num_beams": 3}):
            assert ask(model, short, image_features=encoded, **options) == ask(model, inputs, **options)
        with torch.no_grad():
            logits = [
                model(**inputs).logits,
                model(**text_of(inputs), image_features=encoded).logits,
            ]
        assert torch.equal(*logits)

    def test_further_questions_pass_no_tower(self, model, processor, monkeypatch):
        inputs = processor("What is it?", IMAGES[1])
        encoded = model.encode_images(**inputs)
        expected = [ask(model, processor(question, IMAGES[1])) for question in ("Where?", "Is it blue?")]
        monkeypatch.setattr(model.model.vision_tower.encoder, "forward", None)
        for question, answer in zip(("Where?", "Is it blue?"), expected):
            assert (
                ask(model, processor.tokenizer(prompt(question), return_tensors="pt"), image_features=encoded)
                == answer
            )

    def test_other_counts_are_refused(self, model, processor, inputs, encoded):
        with pytest.raises(ValueError, match="<image> tokens"):
            model.generate(**text_of(processor("What?", IMAGES[0], num_tokens=7)), image_features=encoded)
        with pytest.raises(ValueError, match="<image> tokens"):
            model.generate(**processor.tokenizer(prompt("?", 2), return_tensors="pt"), image_features=encoded)
        with pytest.raises(ValueError, match="either pixel_values or image features"):
            model.generate(**inputs, image_features=encoded)

    def test_it_goes_from_the_package_to_remote_code(self, converted, tmp_path):
        model = AutoModel.from_pretrained(converted, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        inputs = processor("What is it?", IMAGES[1], num_tokens=50)
        model.encode_images(**inputs).save(tmp_path / "encoded.safetensors")
        encoded = EncodedImages.load(tmp_path / "encoded.safetensors")
        assert ask(model, text_of(inputs), image_features=encoded) == ask(model, inputs)


class TestWeights:
    @pytest.mark.parametrize("part", ["vision_tower", "coord_embed", "multi_modal_projector"])
    def test_a_training_step_of_what_encodes_is_noticed(self, inputs, part):
        model = small_model()
        encoded = model.encode_images(**inputs)
        parameters = list(getattr(model.model, part).parameters())
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        with pytest.raises(ValueError, match="other weights of vision tower.* encode them again"):
            model.generate(**text_of(inputs), image_features=encoded)
        with pytest.raises(ValueError, match="other weights"):
            model(**text_of(inputs), image_features=encoded)
        again = model.encode_images(**inputs)
        assert ask(model, text_of(inputs), image_features=again) == ask(model, inputs)

    def test_changes_that_no_version_counts_are_noticed(self, inputs):
        model = small_model()
        encoded = model.encode_images(**inputs)
        weight = model.model.multi_modal_projector.linear_2.weight
        version = weight._version
        weight.data[3, 5] += 1e-4
        assert weight._version == version
        with pytest.raises(ValueError, match="other weights"):
            model.generate(**text_of(inputs), image_features=encoded)

    def test_the_language_model_may_change(self, inputs):
        model = small_model()
        encoded = model.encode_images(**inputs)
        before = ask(model, inputs)
        with torch.no_grad():
            model.lm_head.weight.normal_()
        assert ask(model, text_of(inputs), image_features=encoded) == ask(model, inputs) != before

    def test_the_dtype_counts(self, inputs, encoded):
        with pytest.raises(ValueError, match="another dtype"):
            small_model().bfloat16().generate(**text_of(inputs), image_features=encoded)

    def test_equal_weights_have_equal_hashes(self, model):
        assert small_model().hash_encoder() == copy.deepcopy(model).hash_encoder() == model.hash_encoder()

    def test_weights_on_a_disk_are_refused(self, inputs):
        with pytest.raises(ValueError, match="offloaded to disk"):
            small_model().to("meta").hash_encoder()

    def test_an_adapter_that_is_switched_off_is_noticed(self, processor):
        peft = pytest.importorskip("peft", reason='pip install "mc-llava[train]" to test adapters')
        model, image = small_model(), processor.image_processor(IMAGES[1], return_tensors="pt")
        plain = model.encode_images(**image)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear_1"], init_lora_weights=False))
        encoded = model.encode_images(**image)
        with adapted.disable_adapter():
            without = model.encode_images(**image)
        assert torch.equal(without.features, plain.features) and not torch.equal(encoded.features, plain.features)
        assert len({plain.weights_hash, encoded.weights_hash, without.weights_hash}) == 3

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_every_bit_counts(self, data):
        """Flipped bits, one or several, wherever they lie, and swapped words: each gives another hash."""
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]))
        tensor = torch.randn(data.draw(st.integers(2, 60)), generator=torch.Generator().manual_seed(0)).to(dtype)
        bits = tensor.view(torch.uint8)
        changed = bits.clone()
        for place in data.draw(st.sets(st.integers(0, 8 * len(bits) - 1), min_size=1, max_size=9)):
            changed[place // 8] ^= 1 << place % 8
        assert hash_tensors([changed.view(dtype)]) != hash_tensors([tensor]) == hash_tensors([tensor.clone()])

    def test_two_changed_signs_do_not_cancel_out(self):
        """The sign of a float64 is the highest bit of a word, which multiplying by an odd number merely passes on."""
        tensor = torch.arange(1.0, 33.0, dtype=torch.float64)
        hashes = {hash_tensors([tensor])}
        pairs = list(combinations(range(32), 2))
        for pair in pairs:
            changed = tensor.clone()
            changed[list(pair)] *= -1
            hashes.add(hash_tensors([changed]))
        assert len(hashes) == 1 + len(pairs)

    def test_order_sign_shape_and_dtype_count(self):
        tensor = torch.arange(1.0, 65.0)
        variants = [tensor, -tensor, tensor.flip(0), tensor.view(8, 8), tensor.view(8, 8).T, tensor.view(torch.int32)]
        hashes = {hash_tensors([variant]) for variant in variants}
        hashes |= {hash_tensors([tensor[:32], tensor[32:]]), hash_tensors([]), hash_tensors([tensor[:0]])}
        assert len(hashes) == len(variants) + 3


def plain_sum(tensor: torch.Tensor) -> int:
    """What `hash_tensors` sums for a tensor, computed word by word."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(octets[start : start + 8], "little") for start in range(0, len(octets), 8)]
    total = 0
    for place, word in enumerate(words):
        key = (2 * place + 1) * 0x5851F42D4C957F2D % 2**64
        mixed = (word ^ key) * 0x5851F42D4C957F2D % 2**64
        signed = mixed - 2**64 * (mixed >= 2**63)
        total += ((signed >> 32) % 2**64 ^ mixed) * key
    return (total + 2**63) % 2**64 - 2**63


def fused_step(model):
    """Change weights without incrementing their version."""
    weight = model.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    weight.grad = torch.full_like(weight, 0.1)
    torch.optim.AdamW([weight], lr=1e-3, fused=True).step()


def edit_data(model):
    model.model.coord_embed[2].bias.data[5] += 1e-5


def edit_in_numpy(model):
    model.model.multi_modal_projector.linear_1.weight.detach().numpy()[3, 4] *= 1.001


class TestHash:
    """The hashes must stay the same, because cached features on users' disks contain them."""

    def test_it_is_what_it_was(self):
        """Computed by the code before the words were summed in blocks."""
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(size, generator=generator).to(dtype)
            for size in ((), (3,), (5, 7), (2, 3, 4), (300, 301), (300, 301))
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        ]
        tensors += [tensors[8].T, tensors[16][:, 1:], torch.zeros(0, 3), torch.tensor([True, False])]
        assert hash_tensors(tensors) == "384efd63dc681d21a86e538472d61ef7986254a7e1a192072dd89712c8a6a983"

    @given(
        sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6),
        block=st.sampled_from([1, 2, 3, 8, 64]),
        stack=st.sampled_from([1, 100, 10**9]),
    )
    @settings(max_examples=60, deadline=None)
    def test_blocks_and_stacks_sum_the_same(self, sizes, block, stack):
        tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)).half() for size in sizes]
        octets = [tensor.view(torch.uint8) for tensor in tensors]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing_mc_llava, "BLOCK", block)
            patch.setattr(hashing_mc_llava, "STACK_BYTES", stack)
            expected = [plain_sum(tensor) for tensor in tensors]
            for threads in (1, 3):
                patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                assert hashing_mc_llava.sum_in_blocks(octets) == expected
            assert hashing_mc_llava.sum_stacked(octets) == expected

    def test_a_tensor_that_starts_within_a_word(self):
        whole = torch.arange(41, dtype=torch.int16)
        assert hash_tensors([whole[1:]]) == hash_tensors([whole[1:].clone()]) != hash_tensors([whole[:-1]])

    @pytest.mark.parametrize("change", [fused_step, edit_data, edit_in_numpy])
    def test_a_change_that_no_version_counts_is_noticed(self, model, inputs, change):
        changed = small_model()
        encoded, version = changed.encode_images(**inputs), [tensor._version for tensor in changed.parameters()]
        assert changed.hash_encoder() == model.hash_encoder()
        change(changed)
        assert [tensor._version for tensor in changed.parameters()] == version
        assert changed.hash_encoder() != model.hash_encoder()
        with pytest.raises(ValueError, match="other weights of vision tower.* encode them again"):
            changed.generate(**text_of(inputs), image_features=encoded)

    def test_adapters_that_are_merged_and_taken_out_again_are_noticed(self):
        peft = pytest.importorskip("peft", reason='pip install "mc-llava[train]" to test adapters')
        model = small_model()
        plain = model.hash_encoder()
        options = peft.LoraConfig(target_modules=["linear_1", "fc2"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, options)
        apart = model.hash_encoder()
        adapted.merge_adapter()
        merged = model.hash_encoder()
        adapted.unmerge_adapter()
        assert len({plain, apart, merged}) == 3
        # Subtracting what was added may give other bits, in which case the hash still differs.
        names = [name for name, _ in model.named_parameters() if "base_layer.weight" in name]
        assert names and (model.hash_encoder() == apart) == self.is_as_before(model, names)

    def test_the_factor_of_an_adapter_is_noticed(self, inputs):
        peft = pytest.importorskip("peft", reason='pip install "mc-llava[train]" to test adapters')
        model = small_model()
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["linear_1"], init_lora_weights=False))
        encoded = model.encode_images(**inputs)
        model.model.multi_modal_projector.linear_1.set_scale("default", 0.5)
        assert not torch.equal(model.encode_images(**inputs).features, encoded.features)
        with pytest.raises(ValueError, match="other weights of vision tower.* encode them again"):
            model.generate(**text_of(inputs), image_features=encoded)

    @staticmethod
    def is_as_before(model, names) -> bool:
        fresh, weights = small_model().state_dict(), model.state_dict()
        return all(torch.equal(weights[name], fresh[name.replace("base_layer.", "")]) for name in names)

    @pytest.mark.parametrize(
        "part, changes",
        [
            ("vision_config", {"hidden_act": "relu"}),
            ("vision_config", {"num_attention_heads": 4}),
            ("vision_config", {"layer_norm_eps": 0.1}),
            (None, {"projector_hidden_act": "relu"}),
        ],
        ids=str,
    )
    def test_the_same_weights_in_a_model_that_computes_otherwise(self, model, processor, inputs, part, changes):
        config = copy.deepcopy(model.config)
        (getattr(config, part) if part else config).update(changes)
        other = MCLlavaForConditionalGeneration._from_config(config)
        other.load_state_dict(model.state_dict())
        encoded = model.encode_images(**inputs)
        assert not torch.equal(other.eval().encode_images(**inputs).features, encoded.features)
        with pytest.raises(ValueError, match="encode them again"):
            other.generate(**text_of(inputs), image_features=encoded)
        cache = FeatureCache()
        for each in (model, other):
            (expected,) = processor("What?", IMAGES[1], each)["image_features"]
            (found,) = processor("What?", IMAGES[1], each, feature_cache=cache)["image_features"]
            torch.testing.assert_close(found, expected)

    def test_a_device_is_asked_once(self):
        """The 3B model's tower has 27 layers, but few shapes of weights. Tensors of one shape are hashed together."""
        config = small_config()
        config.vision_config.num_hidden_layers = 27
        model = MCLlavaForConditionalGeneration._from_config(config)
        with CountReads() as on_cpu:
            expected = model.hash_encoder()
        assert len(on_cpu.reads) == 1
        with torch.inference_mode():
            assert model.hash_encoder() == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing_mc_llava, "sum_in_blocks", hashing_mc_llava.sum_stacked)
            with CountReads() as on_device:
                assert model.hash_encoder() == expected
        assert len(on_device.reads) == 1
        assert len(on_device.kernels) <= 130


class TestFiles:
    def test_saved_and_loaded(self, model, inputs, encoded, tmp_path):
        encoded.save(tmp_path / "encoded.safetensors")
        loaded = EncodedImages.load(tmp_path / "encoded.safetensors")
        assert loaded.weights_hash == encoded.weights_hash
        assert all(torch.equal(a, b) for a, b in zip(loaded.split(), encoded.split()))
        assert ask(model, text_of(inputs), image_features=loaded.to("cpu")) == ask(model, inputs)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"crop_num_tokens": torch.tensor([-5, 25]), "crop_coords": torch.zeros(2, 2)}, "counts of at least 1"),
            ({"crop_num_tokens": torch.tensor([20.0])}, "counts of at least 1, got torch.float32"),
            ({"crop_num_tokens": torch.tensor(20)}, "crop_num_tokens must be int64"),
            ({"crop_num_tokens": torch.tensor([], dtype=torch.int64)}, "crop_num_tokens must be int64"),
            ({"image_grid_thw": torch.tensor([[2, 1, 1], [-1, 1, 1]])}, "image_grid_thw must be int64"),
            ({"image_grid_thw": torch.tensor([1, 1, 1])}, "image_grid_thw must be int64"),
            ({"image_grid_thw": torch.tensor([[2, 1, 1]])}, "image_grid_thw has 2 crops, crop_num_tokens 1"),
            ({"features": torch.ones(20, 48, dtype=torch.int64)}, "features must be finite floats"),
            ({"features": torch.ones(20, 48, dtype=torch.complex64)}, "features must be finite floats"),
            ({"features": torch.full((20, 48), float("nan"))}, "features must be finite floats"),
            ({"features": torch.tensor(1.0)}, "1 crops with 20 tokens don't fit"),
            ({"crop_boxes": torch.zeros(2, 4, dtype=torch.int64)}, "1 crops with 20 tokens don't fit"),
            ({"features": torch.ones(20)}, r"features must be \[tokens, hidden\], got \[20\]"),
            ({"features": torch.full((20, 48), float("inf"))}, "features must be finite floats"),
            ({"crop_coords": torch.tensor([[0.5, float("nan")]])}, "crop_coords must be finite floats"),
            ({"crop_coords": torch.tensor([[0.5, float("inf")]])}, "crop_coords must be finite floats"),
            ({"crop_coords": torch.zeros(1, 2, dtype=torch.int64)}, "crop_coords must be finite floats"),
            ({"crop_coords": torch.tensor([[0.5, 1.5]])}, "crop_coords must lie in 0 to 1"),
            ({"crop_coords": torch.tensor([[-0.5, 0.5]])}, "crop_coords must lie in 0 to 1"),
            ({"image_grid_thw": torch.tensor([[1, 7, 9]])}, r"image_grid_thw must have rows \[crops, 1, 1\]"),
            ({"crop_boxes": torch.tensor([[0, 0, 0, 30]])}, "0 <= left < right"),
            ({"crop_boxes": torch.tensor([[0, 30, 40, 0]])}, "0 <= left < right"),
            ({"crop_boxes": torch.tensor([[-1, 0, 40, 30]])}, "0 <= left < right"),
            ({"crop_boxes": torch.tensor([[0.0, 0.0, 40.0, 30.0]])}, "crop_boxes must be int64"),
            (  # their sum would wrap around to 20
                {
                    "crop_num_tokens": torch.tensor([2**62, 2**62, 2**62, 2**62 + 20]),
                    "crop_boxes": torch.tensor([[0, 0, 40, 30]] * 4),
                    "crop_coords": torch.zeros(4, 2),
                    "image_grid_thw": torch.tensor([[4, 1, 1]]),
                },
                f"4 crops with {2**64 + 20} tokens don't fit",
            ),
        ],
        ids=str,
    )
    def test_what_fits_no_image_is_refused(self, tmp_path, changes, message):
        tensors = {
            "features": torch.ones(20, 48),
            "crop_boxes": torch.tensor([[0, 0, 40, 30]]),
            "crop_coords": torch.zeros(1, 2),
            "crop_num_tokens": torch.tensor([20]),
            "image_grid_thw": torch.tensor([[1, 1, 1]]),
        }
        EncodedImages(**tensors, weights_hash="a")
        save_file({**tensors, **changes}, tmp_path / "other.safetensors", metadata={"weights_hash": "a"})
        with pytest.raises(ValueError, match=message):
            EncodedImages.load(tmp_path / "other.safetensors")

    def test_no_crops_are_refused(self, model, inputs):
        nothing = {name: inputs[name][:0] for name in inputs if name not in text_of(inputs)}
        with pytest.raises(ValueError, match="no crops to encode"):
            model.encode_images(**nothing)

    def test_other_files_are_refused(self, encoded, tmp_path):
        path = tmp_path / "other.safetensors"
        for nothing in (path, tmp_path):  # no file, and a folder
            with pytest.raises(ValueError, match="holds no encoded images"):
                EncodedImages.load(nothing)
        path.write_bytes(b"no safetensors")
        with pytest.raises(ValueError, match="holds no encoded images"):
            EncodedImages.load(path)
        tensors = {name: value for name, value in vars(encoded).items() if name != "weights_hash"}
        for broken, metadata in (
            ({"features": encoded.features}, {"weights_hash": "a"}),
            (tensors, None),
            (tensors, {"format": "pt"}),
        ):
            save_file(broken, path, metadata=metadata)
            with pytest.raises(ValueError, match="holds no encoded images"):
                EncodedImages.load(path)
        save_file({**tensors, "features": encoded.features[1:].clone()}, path, metadata={"weights_hash": "a"})
        with pytest.raises(ValueError, match="13 crops with 55 tokens don't fit"):
            EncodedImages.load(path)


class TestFeatureCache:
    @given(st.data())
    @settings(max_examples=20, deadline=None)
    def test_cached_equals_uncached(self, model, processor, data):
        """Over random orders, sizes, knobs and evictions."""
        kept = data.draw(st.integers(0, 12), label="crops that fit")
        cache = FeatureCache(max_bytes=kept * PATCHES * ROW)
        for _ in range(data.draw(st.integers(1, 8))):
            images = data.draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=3))
            knobs = {"max_crops": data.draw(st.integers(0, 5)), "num_tokens": data.draw(st.integers(4, 20))}
            arguments = (prompt("What?", len(images)), images)
            cached = processor(*arguments, model, feature_cache=cache, **knobs)
            uncached = processor(*arguments, model, **knobs)
            assert torch.equal(cached["input_ids"], uncached["input_ids"])
            for ours, theirs in zip(cached["image_features"], uncached["image_features"], strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
            assert cache.nbytes == sum(crop.patches.nbytes for crop in cache._crops.values()) <= cache.max_bytes

    def test_hits_and_what_makes_a_miss(self, processor):
        model, cache = small_model(), FeatureCache()

        def counts(image, **options):
            processor("What?", image, model, feature_cache=cache, **options)
            return cache.hits, cache.misses

        assert counts(IMAGES[1]) == (0, 1)
        assert counts(IMAGES[1].copy()) == (1, 1)
        assert counts(IMAGES[1], max_crops=6, num_tokens=10) == (2, 1), "the saved knobs, written out"
        assert counts(IMAGES[1], max_crops=2) == (2, 2)
        assert counts(IMAGES[1], num_tokens=19) == (3, 2), "more or fewer tokens of the same crops"
        other = IMAGES[1].copy()
        other.putpixel((7, 7), (1, 2, 3))
        assert counts(other) == (3, 3)
        assert counts(IMAGES[1].transpose(0).transpose(0)) == (4, 3)
        assert counts(IMAGES[1], resample=Image.Resampling.NEAREST) == (4, 4)
        assert counts(IMAGES[1], image_mean=[0.4, 0.5, 0.5]) == (4, 5)
        assert counts(IMAGES[1], do_normalize=False) == (4, 6)
        with torch.no_grad():
            model.model.coord_embed[0].bias += 1
        assert counts(IMAGES[1]) == (4, 7)
        model.bfloat16()
        assert counts(IMAGES[1]) == (4, 8)

    @pytest.mark.parametrize(
        "more", [{"max_crops": 6}, {"num_tokens": 30}, {"plans": [[(0, 0, 300, 300), (5, 5, 99, 99)]]}]
    )
    def test_only_new_crops_pass_the_tower(self, model, processor, passes, more):
        first, second = {"max_crops": 4, "num_tokens": 20}, {"num_tokens": 20, **more}
        if "plans" not in more:
            second = {**first, **more}
        cache = FeatureCache()
        (known,) = cache.encode(model, processor.image_processor, [IMAGES[3]], **first)
        assert passes == [len(known.crop_boxes)]
        (found,) = cache.encode(model, processor.image_processor, [IMAGES[3]], **second)
        boxes = {tuple(box) for box in found.crop_boxes.tolist()}
        assert sum(passes[1:]) == len(boxes - {tuple(box) for box in known.crop_boxes.tolist()}) < len(boxes)
        (alone,) = FeatureCache().encode(model, processor.image_processor, [IMAGES[3]], **second)
        torch.testing.assert_close(found.features, alone.features, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.crop_coords, alone.crop_coords) and found.plans == alone.plans

    def test_a_full_cache_keeps_what_was_asked_for(self, model, processor, passes):
        """Patches that nobody asked for are dropped first, those of the least recently used crops, and then crops."""
        asked = {"max_crops": 0, "num_tokens": 5}
        cache = FeatureCache(max_bytes=2 * (PATCHES + 5) * ROW)
        for image in IMAGES:
            cache.encode(model, processor.image_processor, [image], **asked)
        sizes = [len(crop.patches) for crop in cache._crops.values()]
        assert sizes == [5, 5, PATCHES, PATCHES] and cache.nbytes == cache.max_bytes
        cache.encode(model, processor.image_processor, IMAGES, **asked)
        assert passes == [1] * 4 and len(cache) == 4
        cache.encode(model, processor.image_processor, IMAGES[:1], max_crops=0, num_tokens=6)
        assert passes == [1] * 5, "it had been cut down to fewer"
        cache.encode(model, processor.image_processor, [picture(40, 30, seed=99)], **asked)
        cache.encode(model, processor.image_processor, IMAGES[:1], max_crops=0, num_tokens=6)
        assert passes == [1] * 6, "it has been cut down to as many as were asked for last"
        for seed in range(20):
            cache.encode(model, processor.image_processor, [picture(40, 30, seed=100 + seed)], **asked)
            assert cache.nbytes <= cache.max_bytes
        assert len(cache) == 2 * (PATCHES + 5) // 5

    def test_without_all_patches_more_pictures_fit(self, model, processor, passes):
        asked = {"max_crops": 0, "num_tokens": 5}
        cache = FeatureCache(max_bytes=20 * ROW, all_patches=False)
        expected = FeatureCache().encode(model, processor.image_processor, IMAGES, **asked)
        passes.clear()
        for _ in range(2):
            found = cache.encode(model, processor.image_processor, IMAGES, **asked)
            assert all(torch.equal(one.features, other.features) for one, other in zip(found, expected))
        assert passes == [4] and cache.nbytes == cache.max_bytes
        cache.encode(model, processor.image_processor, IMAGES[:1], max_crops=0, num_tokens=6)
        assert passes == [4, 1], "one more token"

    @pytest.mark.parametrize("all_patches", [True, False])
    def test_kept_patches_do_not_keep_their_pass(self, model, processor, passes, all_patches):
        cache, asked = FeatureCache(all_patches=all_patches), {"max_crops": 8, "num_tokens": 20}
        encoded = cache.encode(model, processor.image_processor, IMAGES, **asked)
        assert sum(passes) == len(cache) > len(IMAGES)
        counts = [count for image in encoded for count in image.crop_num_tokens.tolist()]
        assert len(set(counts)) > 2, "crops of a pass give different numbers of tokens"
        kept = [crop.patches for crop in cache._crops.values()]
        assert [len(patches) for patches in kept] == ([PATCHES] * len(kept) if all_patches else counts)
        assert all(patches.untyped_storage().nbytes() == patches.nbytes for patches in kept)
        assert cache.nbytes == sum(patches.nbytes for patches in kept)

    def test_the_crop_that_was_not_used_for_longest_loses_patches_first(self):
        """A full cache of whole crops makes room for another one."""
        size = 2 * PATCHES + 3  # patches: two whole crops, and the last few of a third
        cache = FeatureCache(max_bytes=size * ROW)
        for name in ("a", "b", "a", "c"):
            cache.look_up([((name,), name)], [2], lambda missing: [torch.zeros(1, 1 + PATCHES, ROW // 4)])
        assert {name: len(crop.patches) for (_, name), crop in cache._crops.items()} == {
            "b": 2,
            "a": PATCHES,
            "c": PATCHES,
        }

    @pytest.mark.parametrize("crops", [1, 3])
    def test_as_many_crops_must_come_as_were_missing(self, crops):
        keys = [(("picture",), (0, 0, side, side)) for side in (8, 9)]
        with pytest.raises(ValueError, match="zip"):
            FeatureCache().look_up(keys, [5, 5], lambda missing: [torch.zeros(crops, 1 + PATCHES, ROW // 4)])

    @pytest.mark.parametrize("counts", [[5, 3], [3, 5]], ids=str)
    def test_a_crop_that_comes_twice_gives_each_number_of_tokens(self, counts):
        key, patches = (("picture",), (0, 0, 8, 8)), torch.randn(1, 1 + PATCHES, ROW // 4)
        found = FeatureCache().look_up([key, key], counts, lambda missing: [patches])
        assert all(torch.equal(one, patches[0, -count:]) for one, count in zip(found, counts))

    def test_a_slower_thread_leaves_longer_patches(self, model, processor, passes):
        cache, asked = FeatureCache(all_patches=False), {"max_crops": 0}

        def encode_more(missing):
            cache.encode(model, processor.image_processor, IMAGES[:1], **asked, num_tokens=10)
            return iter([torch.zeros(1, 1 + PATCHES, ROW // 4)])

        cache.encode(model, processor.image_processor, IMAGES[:1], **asked, num_tokens=5)
        ((key, _),) = cache._crops.items()
        cache._crops.clear(), cache._uncut.clear()
        cache.nbytes = 0
        cache.look_up([key], [5], encode_more)
        passes.clear()
        cache.encode(model, processor.image_processor, IMAGES[:1], **asked, num_tokens=10)
        assert not passes

    def test_a_call_that_another_model_would_need_is_refused(self, model, processor):
        cache = FeatureCache()
        cache.encode(model, processor.image_processor, IMAGES[:1])
        for wrong in ({"patch_size": 7}, {"size": {"height": 70, "width": 70}}, {"size": 70}):
            with pytest.raises(
                ValueError, match="the image processor has .*, the model .*: use the processor of this"
            ):
                cache.encode(model, processor.image_processor, IMAGES[:1], **wrong)
        for wrong in ({"nonsense": 3}, {"image_std": 0}, {"num_tokens": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                cache.encode(model, processor.image_processor, IMAGES[:1], **wrong)

    def test_autocast_makes_a_miss(self, model, processor):
        cache = FeatureCache()
        dtypes = []
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                inputs = processor("What?", IMAGES[1], model, feature_cache=cache)
            dtypes.append(inputs["image_features"][0].dtype)
        assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16] and (cache.hits, cache.misses) == (1, 2)

    def test_another_device_makes_a_miss(self, model, processor, monkeypatch):
        cache = FeatureCache()
        cache.encode(model, processor.image_processor, IMAGES[:1])
        monkeypatch.setattr(type(model), "device", torch.device("cpu", 0))
        for misses in (2, 2):
            cache.encode(model, processor.image_processor, IMAGES[:1])
            assert cache.misses == misses

    def test_a_palette_makes_a_miss(self, model, processor):
        image = IMAGES[1].quantize(8)
        inverted = image.copy()
        inverted.putpalette([255 - value for value in image.getpalette()])
        cache = FeatureCache()
        first, second = (cache.encode(model, processor.image_processor, [entry])[0] for entry in (image, inverted))
        assert cache.misses == 2 and not torch.equal(first.features, second.features)

    def test_another_shape_of_the_same_bytes_makes_a_miss(self, model, processor):
        upright = Image.frombytes("RGB", (30, 40), IMAGES[0].tobytes())
        cache = FeatureCache()
        first, second = (cache.encode(model, processor.image_processor, [entry])[0] for entry in (IMAGES[0], upright))
        assert cache.misses == 2 and not torch.equal(first.features, second.features)

    def test_what_is_larger_than_the_cache_leaves_it_alone(self, model, processor):
        cache = FeatureCache(max_bytes=10 * ROW)
        counts = []
        for image, num_tokens in ((IMAGES[0], 10), (IMAGES[1], 11), (IMAGES[0], 10)):
            processor("What?", image, model, feature_cache=cache, num_tokens=num_tokens)
            counts.append((len(cache), cache.nbytes, cache.hits))
        assert counts == [(1, cache.max_bytes, 0), (1, cache.max_bytes, 0), (1, cache.max_bytes, 1)]

    def test_what_it_gives_may_be_changed(self, model, processor):
        cache, expected = FeatureCache(), processor("What?", IMAGES[1], model)["image_features"][0]
        for _ in range(3):
            (features,) = processor("What?", IMAGES[1], model, feature_cache=cache)["image_features"]
            assert torch.equal(features, expected)
            features.zero_()

    def test_the_weights_are_hashed_once_a_call(self, model, processor, monkeypatch):
        calls, hash_encoder = [], model.hash_encoder
        monkeypatch.setattr(model, "hash_encoder", lambda: calls.append(1) or hash_encoder())
        cache = FeatureCache()
        for count in (1, 2):
            processor(prompt("What?", 3), IMAGES[:3], model, feature_cache=cache)
            assert len(calls) == count

    def test_the_one_unused_for_longest_goes(self, model, processor):
        cache = FeatureCache(max_bytes=2 * 10 * ROW)
        for image, hits in ((0, 0), (1, 0), (0, 1), (2, 1), (0, 2), (1, 2)):
            processor("What?", picture(40, 40, seed=image), model, feature_cache=cache, num_tokens=10)
            assert cache.hits == hits and len(cache) <= 2

    def test_a_processor_that_was_saved_still_hits(self, model, processor, tmp_path):
        processor = copy.deepcopy(processor)
        cache = FeatureCache()
        processor("What?", IMAGES[0], model, feature_cache=cache)
        processor.save_pretrained(tmp_path)
        processor("What?", IMAGES[0], model, feature_cache=cache)
        again = MCLlavaProcessor.from_pretrained(tmp_path)
        again("What?", IMAGES[0], model, feature_cache=cache)
        assert (cache.hits, cache.misses) == (2, 1)

    @pytest.mark.parametrize("options", [{"size": {"height": 70, "width": 70}}, {"patch_size": 7}, {"patch_size": 28}])
    def test_a_processor_of_another_model_is_refused(self, model, processor, options):
        knobs = {"size": processor.image_processor.size, "patch_size": 14, "max_crops": 0, "num_tokens": 3, **options}
        other = MCLlavaProcessor(MCLlavaImageProcessor(**knobs), processor.tokenizer)
        for arguments in ({}, {"feature_cache": FeatureCache()}):
            with pytest.raises(
                ValueError, match=r"the image processor has .*, the model .*: use the processor of this"
            ):
                other("What?", IMAGES[0], model, **arguments)
        if "size" in options:
            for call in (model, model.generate, model.encode_images):
                with pytest.raises(
                    ValueError, match=r"pixel_values are \[1, 3, 70, 70\], the vision tower reads \[crops, 3"
                ):
                    call(**other("What?", IMAGES[0]))
        elif options["patch_size"] == 7:
            with pytest.raises(ValueError, match="use the processor of this model, with patch_size 14"):
                model(**other("What?", IMAGES[0], num_tokens=60))

    def test_arrays_with_channels_first(self, model, processor):
        arrays = [np.asarray(image).transpose(2, 0, 1) for image in IMAGES[1:3]]
        cache = FeatureCache()
        expected = cache.encode(model, processor.image_processor, IMAGES[1:3])
        found = cache.encode(model, processor.image_processor, arrays, input_data_format="channels_first")
        assert (cache.hits, cache.misses) == (2, 2)
        assert all(torch.equal(one.features, other.features) for one, other in zip(found, expected, strict=True))

    def test_a_model_with_adapters(self, processor):
        peft = pytest.importorskip("peft", reason='pip install "mc-llava[train]" to test adapters')
        options = peft.LoraConfig(target_modules=["linear_1", "fc2"], init_lora_weights=False)
        adapted, cache = peft.get_peft_model(small_model(), options), FeatureCache()
        for hits in (0, 1):
            (found,) = processor("What?", IMAGES[1], adapted, feature_cache=cache)["image_features"]
            (expected,) = processor("What?", IMAGES[1], adapted)["image_features"]
            assert torch.equal(found, expected) and cache.hits == hits
        (prepared,) = cache.prepare(adapted, processor.image_processor, [IMAGES[1]])
        (encoded,) = cache.encode(adapted, processor.image_processor, [prepared])
        assert torch.equal(encoded.features, found) and cache.hits == 2

    def test_what_dropout_made_is_not_reused(self, processor):
        model, cache = small_model(), FeatureCache()
        model.model.vision_tower.encoder.layers[0].train()
        cache.encode(model, processor, [IMAGES[1]])
        model.eval()
        cache.encode(model, processor, [IMAGES[1]])
        assert (cache.hits, cache.misses) == (0, 2)

    def test_a_picture_that_is_changed_after_it_was_prepared(self, processor):
        model, cache, frame = small_model(), FeatureCache(), IMAGES[1].copy()
        (prepared,) = cache.prepare(model, processor, [frame])
        frame.paste("red", (0, 0, *frame.size))
        cache.encode(model, processor, [prepared])
        with torch.no_grad():
            next(model.model.coord_embed.parameters()).add_(1)  # its crops are cut again
        (found,) = cache.encode(model, processor, [prepared])
        (expected,) = FeatureCache().encode(model, processor, [IMAGES[1]])
        assert torch.equal(found.features, expected.features)

    def test_a_whole_processor_and_a_single_image(self, model, processor):
        cache = FeatureCache()
        (expected,) = cache.encode(model, processor.image_processor, [IMAGES[1]])
        (found,) = cache.encode(model, processor, [IMAGES[1]])
        assert found is not expected and torch.equal(found.features, expected.features) and cache.hits == 1
        with pytest.raises(ValueError, match=r"images must be a list, got Image: pass \[image\]"):
            cache.encode(model, processor, IMAGES[1])

    def test_in_messages(self, model, processor):
        cache = FeatureCache()
        content = [{"type": "image", "image": IMAGES[1]}, {"type": "text", "text": "What is it?"}]
        for _ in range(2):
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"model": model, "feature_cache": cache, "max_crops": 3},
            )
            assert ask(model, inputs) == ask(model, processor("What is it?", IMAGES[1], max_crops=3))
        assert (cache.hits, cache.misses) == (1, 1)

    def test_wrong_arguments(self, processor):
        with pytest.raises(ValueError, match="pass model as well"):
            processor("What?", IMAGES[0], feature_cache=FeatureCache())
        for max_bytes in (-1, float("nan")):
            with pytest.raises(ValueError, match=f"max_bytes must be at least 0, got {max_bytes}"):
                FeatureCache(max_bytes)
