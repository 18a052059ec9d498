"""Crop plans as values: passed to a call, returned by it, and kept with what was encoded."""

import io

import numpy as np
import pytest
import torch
from helpers import picture, prompt, small_model
from PIL import Image

from mc_llava import Crop, EncodedImages, FeatureCache, MCLlavaImageProcessor, check_plan, cut_crops, load_image


pytestmark = pytest.mark.usefixtures("no_old_name")
WIDE = picture(200, 120)
BOXES = [(0, 0, 200, 120), (10, 20, 60, 70), (30, 20, 131, 100), (199, 119, 200, 120)]  # overlap, sizes, a pixel


def test_the_plan_of_a_call_given_to_the_next_changes_nothing(processor):
    image_processor = processor.image_processor
    plan = image_processor.plan(*WIDE.size)
    expected = image_processor(WIDE, return_tensors="pt")
    assert expected["crop_boxes"].tolist() == [list(crop.box) for crop in plan]
    for given in (plan, expected["crop_boxes"], expected["crop_boxes"].numpy(), expected["crop_boxes"].tolist()):
        found = image_processor(WIDE, plans=[given], return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in image_processor.model_input_names)


def test_boxes_lie_anywhere(processor):
    side = processor.image_processor.size["height"]
    inputs = processor.image_processor([WIDE, picture(50, 40)], plans=[BOXES, [(1, 2, 30, 40)]], return_tensors="pt")
    assert inputs["crop_boxes"].tolist() == [*map(list, BOXES), [1, 2, 30, 40]]
    assert inputs["crop_num_tokens"].tolist() == [5, 5, 5, 5, 15], "20 tokens each, 15 at most in a crop"
    assert inputs["crop_coords"][1].tolist() == pytest.approx([35 / 200, 45 / 120])
    for box, pixels in zip(BOXES, inputs["pixel_values"]):
        cut = np.asarray(WIDE.crop(box).resize((side, side), Image.Resampling.BICUBIC))
        assert torch.allclose(pixels, torch.tensor(cut).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_cut_crops_makes_bytes():
    cut = cut_crops(WIDE, BOXES, 16)
    assert cut.dtype == np.uint8 and cut.shape == (4, 16, 16, 3)
    assert (cut[3] == np.asarray(WIDE)[119, 199]).all()


def test_boxes_are_of_the_picture_after_its_orientation():
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    WIDE.save(content, "PNG", exif=exif)
    image_processor = MCLlavaImageProcessor()
    box = [(0, 100, 120, 200)]  # 120 wide and 200 high once it is upright
    turned = image_processor(content.getvalue(), plans=[box], return_tensors="pt")
    upright = image_processor(load_image(content.getvalue()), plans=[box], return_tensors="pt")
    assert torch.equal(turned["pixel_values"], upright["pixel_values"])
    with pytest.raises(ValueError, match="extends beyond the 200 x 120 pixels"):
        image_processor(WIDE, plans=[box])


@pytest.mark.parametrize(
    "plan, message",
    [
        ([], "hold at least one"),
        ([(0, 0, 201, 120)], r"\(0, 0, 201, 120\) is empty or extends beyond the 200 x 120 pixels"),
        ([(-1, 0, 20, 20)], "is empty or extends beyond"),
        ([(20, 0, 20, 20)], "is empty or extends beyond"),
        ([(0, 30, 20, 20)], "is empty or extends beyond"),
        ([(0, 0, 20.0, 20)], "a box's edge must be an integer, got 20.0"),
        ([(0, 0, True, 20)], "a box's edge must be an integer, got True"),
        ([(0, 0, 20)], "must be a list of boxes"),
        ([3], "must be a list of boxes"),
        (3, "each a list of boxes"),
        ([(0, 0, 20, 20), ((0, 0, 20, 20), 3)], "must be a list of boxes"),
        ([((0, 0, 20), 3)], "a box must be four integers"),
        ([((0, 0, 20, 20), 0)], "a crop's tokens must be at least 1, got 0"),
        ([((0, 0, 20, 20), 16)], "a crop gives at most 15 tokens, the plan asks for 16"),
        ([(0, 0, 20, 20)] * 21, "21 crops need a token each, num_tokens is 20"),
        (torch.tensor([[0.0, 0.0, 20.0, 20.0]]), "a box's edge must be an integer"),
    ],
    ids=str,
)
def test_wrong_plans(processor, plan, message):
    with pytest.raises(ValueError, match=message):
        processor.image_processor(WIDE, plans=[plan])


def test_plans_and_images_are_equally_many(processor):
    for plans in ([], [BOXES, BOXES]):
        with pytest.raises(ValueError, match=f"got {len(plans)} plans for 1 images"):
            processor.image_processor(WIDE, plans=plans)
        with pytest.raises(ValueError, match=f"got {len(plans)} plans for 1 images"):
            processor("What?", WIDE, plans=plans)
        with pytest.raises(ValueError, match=f"got {len(plans)} plans for 1 images"):
            FeatureCache().encode(small_model(), processor.image_processor, [WIDE], plans=plans)
    with pytest.raises(ValueError, match="leave max_crops out"):
        processor("What?", WIDE, plans=[BOXES], max_crops=3)
    for wrong in ("all", np.array([BOXES]), {"a": BOXES}, [None], [(box for box in BOXES)], [{*BOXES}]):
        with pytest.raises(ValueError, match="plans must be a list with a plan for each image"):
            processor("What?", WIDE, plans=wrong)
    for options in ({"plans": [BOXES]}, {"images_kwargs": {"plans": [BOXES]}}):
        with pytest.raises(ValueError, match="got 1 plans for 0 images"):
            processor("What?", **options)


def test_a_plan_is_not_saved(processor, tmp_path):
    image_processor = processor.image_processor
    image_processor(WIDE, plans=[BOXES])
    assert "plans" not in image_processor.to_dict()
    with pytest.raises(ValueError, match="can't be saved"):
        MCLlavaImageProcessor(plans=[BOXES])


@pytest.mark.parametrize("plan", [BOXES, [Crop(BOXES[1], 3), Crop(BOXES[2], 9)]], ids=["boxes", "crops"])
def test_everywhere_that_a_picture_goes(model, processor, plan):
    """Processor, messages, an encoding processor, a feature cache: the same answer."""

    def ask(inputs):
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    inputs = processor("What?", WIDE, plans=[plan])
    tokens = int(inputs["crop_num_tokens"].sum())
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == tokens
    expected = ask(inputs)
    assert expected != ask(processor("What?", WIDE))
    message = {"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What?"}]}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert ask(processor.apply_chat_template([message], **options, plans=[plan])) == expected
    assert ask(processor.apply_chat_template([message], **options, processor_kwargs={"plans": [plan]})) == expected
    assert ask(processor(prompt("What?"), WIDE, model, plans=[plan])) == expected
    cache = FeatureCache()
    for _ in range(2):
        assert ask(processor(prompt("What?"), WIDE, model, feature_cache=cache, plans=[plan])) == expected
    processor(prompt("What?"), WIDE, model, feature_cache=cache, plans=[[BOXES[1]]])
    assert (cache.hits, cache.misses) == (2, 1), "it has the crop"
    counts = processor._get_num_multimodal_tokens(image_sizes=[WIDE.size[::-1]], plans=[plan])
    assert (counts.num_image_tokens, counts.num_image_patches) == ([tokens], [len(plan)])


def test_what_was_encoded_knows_its_crops(model, processor, tmp_path):
    encoded = model.encode_images(**processor("Both?", [[WIDE, picture(50, 40)]], plans=[BOXES, [(1, 2, 30, 40)]]))
    encoded.save(tmp_path / "encoded.safetensors")
    for images in (encoded, EncodedImages.load(tmp_path / "encoded.safetensors")):
        assert images.crop_boxes.tolist() == [*map(list, BOXES), [1, 2, 30, 40]]
        assert images.crops_per_image == [4, 1] and images.tokens_per_image == [20, 15]
        again = processor.image_processor([WIDE, picture(50, 40)], plans=images.plans, return_tensors="pt")
        assert torch.equal(again["crop_boxes"], images.crop_boxes)
        assert torch.equal(again["crop_num_tokens"], images.crop_num_tokens)
    cached = FeatureCache().encode(model, processor.image_processor, [WIDE, picture(50, 40)])
    assert [len(one.crop_boxes) for one in cached] == [
        len(processor.image_processor.plan(*size)) for size in (WIDE.size, (50, 40))
    ]
    without = {name: value for name, value in processor("What?", WIDE).items() if name != "crop_boxes"}
    with pytest.raises(ValueError, match="crop_boxes are missing"):
        model.encode_images(**without)


def test_several_encoded_images_are_asked_about(model, processor):
    encoded = FeatureCache().encode(model, processor.image_processor, [WIDE, picture(50, 40)])
    inputs = processor.tokenizer(prompt("Both?", 2), return_tensors="pt")
    both = model.generate(**inputs, image_features=encoded, max_new_tokens=5, do_sample=False)
    features = [image.features for image in encoded]
    assert torch.equal(both, model.generate(**inputs, image_features=features, max_new_tokens=5, do_sample=False))
    with pytest.raises(ValueError, match="encoded with other weights"):
        small_model(1).generate(**inputs, image_features=encoded)


def test_integers_of_numpy_and_torch_are_read():
    expected = [Crop((0, 0, 20, 10), 5), Crop((3, 2, 20, 10), 6)]
    for given in (
        expected,
        [[[0, 0, 20, 10], 5], [[3, 2, 20, 10], 6]],
        [(np.array([0, 0, 20, 10]), np.int64(5)), (torch.tensor([3, 2, 20, 10]), torch.tensor(6))],
    ):
        assert check_plan(given, 20, 10, 100, 56, 14) == expected
