"""Crops that share passes, threads or a device have the pixels that Pillow gives each of them alone."""

import concurrent.futures
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from helpers import PATCH, SIDE, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mc_llava import (
    MCLlavaImageProcessor,
    cut_crops,
    cut_on_device,
    hash_tensors,
    image_processing_mc_llava,
    in_threads,
    one_ahead,
    plan_crops,
)
from mc_llava.resizing_mc_llava import count_threads, cut_each


def cut_alone(image: Image.Image, boxes: list, side: int, resample: int = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.stack([np.asarray(image.crop(box).resize((side, side), resample)) for box in boxes])


@st.composite
def pictures_with_boxes(draw):
    """A picture, and boxes of which some share their columns, overlapping or not, and some their rows."""
    width, height = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    image = picture(width, height, draw(st.integers(0, 2**16)))
    if draw(st.booleans()):  # black and white: the filter overshoots, and each pass clips
        image = image.point(lambda value: 255 * (value > 127))
    spans = {
        size: [
            (start := draw(st.integers(0, size - 1)), draw(st.integers(start + 1, size)))
            for _ in range(draw(st.integers(1, 3)))
        ]
        for size in {width, height}
    }
    boxes = [(left, top, right, bottom) for left, right in spans[width] for top, bottom in spans[height]]
    return image, draw(st.permutations([(0, 0, width, height), *boxes]))


@settings(max_examples=150, deadline=None)
@given(pictures_with_boxes(), st.sampled_from([1, 7, 56, 96, 384]), st.sampled_from(list(Image.Resampling)))
def test_every_bit_is_pillows(image_and_boxes, side, resample):
    image, boxes = image_and_boxes
    np.testing.assert_array_equal(cut_crops(image, boxes, side, resample), cut_alone(image, boxes, side, resample))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 150])
def test_every_bit_of_a_strip_is_pillows(width, beyond):
    """Before version 13, Pillow resizes the columns first if there are a hundred times as many rows."""
    image = picture(width, 100 * width + beyond).point(lambda value: 255 * (value > 127))
    for side in (7, 56, 96, 384):
        boxes = [(0, 0, *image.size), (0, 0, width, image.height - 9)]
        expected = cut_alone(image, boxes, side)
        np.testing.assert_array_equal(cut_crops(image, boxes, side), expected)
        np.testing.assert_array_equal(cut_on_device(torch.from_numpy(np.array(image)), boxes, side).numpy(), expected)


@settings(max_examples=150, deadline=None)
@given(pictures_with_boxes(), st.sampled_from([1, 7, 56, 96, 384]))
def test_every_bit_on_a_device_is_pillows(image_and_boxes, side):
    image, boxes = image_and_boxes
    found = cut_on_device(torch.from_numpy(np.array(image)), boxes, side)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), cut_alone(image, boxes, side))


@pytest.mark.parametrize("size", [(1000, 701), (333, 1501), (1501, 97), (56, 56), (1, 1)])
def test_the_usual_grids(size):
    image = picture(*size)
    boxes = [crop.box for crop in plan_crops(*size, 100, 728, SIDE, PATCH)]
    expected = cut_alone(image, boxes, SIDE)
    np.testing.assert_array_equal(cut_crops(image, boxes, SIDE), expected)
    np.testing.assert_array_equal(cut_on_device(torch.from_numpy(np.array(image)), boxes, SIDE).numpy(), expected)


class TestDevice:
    """The device is the CPU, treated like an accelerator."""

    @pytest.fixture
    def sent(self, monkeypatch) -> list[torch.Tensor]:
        """The pictures that were sent to the device."""
        tensors, cut = [], image_processing_mc_llava.cut_on_device

        def remember(picture, boxes, side):
            tensors.append(picture)
            return cut(picture, boxes, side)

        monkeypatch.setattr(image_processing_mc_llava, "can_cut_on", lambda device, resample: True)
        monkeypatch.setattr(image_processing_mc_llava, "cut_on_device", remember)
        return tensors

    @pytest.mark.parametrize("options", [{}, {"zoom": 2}, {"do_normalize": False}, {"max_crops": 0}])
    def test_all_that_a_call_returns_is_equal(self, request, options):
        processor = MCLlavaImageProcessor(size={"height": SIDE, "width": SIDE}, patch_size=PATCH, max_crops=20)
        images = [picture(201, 333), picture(40, 17)]
        expected = processor(images, return_tensors="pt", **options)
        sent = request.getfixturevalue("sent")
        found = processor(images, return_tensors="pt", device="cpu", **options)
        assert list(found) == list(expected)
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name])
        assert [tuple(pixels.shape) for pixels in sent] == [(333, 201, 3), (17, 40, 3)]  # once each, in bytes
        assert {pixels.dtype for pixels in sent} == {torch.uint8}

    def test_other_libraries_tensors_are_refused(self):
        with pytest.raises(ValueError, match="tensors on meta need return_tensors=\"pt\", got 'np'"):
            MCLlavaImageProcessor()(picture(40, 17), device="meta", return_tensors="np")


class TestThreads:
    BOXES = [crop.box for crop in plan_crops(1000, 700, 30, 728, SIDE, PATCH)]

    def threads(self, image=None, boxes=None) -> int:
        """How many threads cut at once."""
        names, gate = set(), threading.Semaphore(0)

        def use(index, crop):
            names.add(threading.get_ident())
            gate.acquire(timeout=0.05)  # so that no thread takes all

        cut_each(image or picture(1000, 700), boxes or self.BOXES, SIDE, Image.Resampling.BICUBIC, use)
        return len(names)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_as_many_as_torch_has(self, count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            assert self.threads() == count
        finally:
            torch.set_num_threads(before)

    def test_memory_bounds_them(self, monkeypatch):
        monkeypatch.setattr("mc_llava.resizing_mc_llava.count_threads", lambda: 8)
        nearly_all = [(0, 0, 1000 - left, 700) for left in range(1, 9)]
        assert self.threads(boxes=nearly_all) == 2

    def test_threads_work_on_after_the_main_one_has_ended(self, monkeypatch):
        """Pools of `concurrent.futures` don't: with them, a server in a thread would fail on each picture."""
        monkeypatch.setattr(concurrent.futures.thread, "_shutdown", True)
        monkeypatch.setattr("mc_llava.resizing_mc_llava.count_threads", lambda: 2)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert len(cut_crops(picture(100, 70), self.BOXES[:0], SIDE)) == 0
        boxes = [(0, 0, 50, 70), (50, 0, 100, 70)]
        np.testing.assert_array_equal(
            cut_crops(picture(100, 70), boxes, SIDE), cut_alone(picture(100, 70), boxes, SIDE)
        )
        assert hash_tensors([torch.ones(3), torch.ones(5)]) == hash_tensors([torch.ones(3), torch.ones(5)])
        assert list(one_ahead(iter("abc"))) == ["a", "b", "c"]

    def test_without_threads_the_caller_does_all(self, monkeypatch):
        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert in_threads(str, [1, 2, 3], 3) == ["1", "2", "3"]
        assert list(one_ahead(iter("abc"))) == ["a", "b", "c"]

    def test_an_error_ends_what_is_made_ahead(self):
        def parts():
            yield 1
            raise ValueError("the second part")

        with pytest.raises(ValueError, match="the second part"):
            list(one_ahead(parts()))

    def test_what_is_made_ahead_ends_with_its_reader(self):
        before, begun = set(threading.enumerate()), []
        parts = one_ahead(begun.append(number) or number for number in range(9))
        assert next(parts) == 0 and next(parts) == 1
        parts.close()
        assert set(threading.enumerate()) == before and max(begun) <= 2, "one part ahead"

    def test_an_error_in_a_thread_is_raised(self, monkeypatch):
        monkeypatch.setattr("mc_llava.resizing_mc_llava.count_threads", lambda: 2)

        def fail(index, crop):
            if index == len(self.BOXES) - 1:
                raise ValueError("the last crop")

        with pytest.raises(ValueError, match="the last crop"):
            cut_each(picture(1000, 700), self.BOXES, SIDE, Image.Resampling.BICUBIC, fail)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_another_process_of_many_takes_one(self, method):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(count_threads) == 1
