"""Images as they come: files, arrays and tensors of every kind, and broken ones."""

import base64
import io
import os
import signal
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, picture
from PIL import Image

from mc_llava import MCLlavaImageProcessor, flatten_images, image_loading_mc_llava, load_image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def same(image, reference) -> bool:
    image = load_image(image)
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(reference))


def test_sources(tmp_path):
    image = picture(7, 5)
    content = encode(image)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    for source in (image, path, str(path), content, bytearray(content), text, f"data:image/png;base64,{text}"):
        assert same(source, image)


def test_exif_orientation_is_applied():
    image = picture(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    assert same(encode(image, exif=exif), image.rotate(-90, expand=True))


def test_modes():
    grey = picture(6, 4).convert("L")
    assert same(encode(grey), grey.convert("RGB"))
    palette = picture(6, 4).quantize(8)
    assert same(encode(palette), palette.convert("RGB"))
    bits = picture(6, 4).convert("1")
    assert same(encode(bits), bits.convert("RGB"))
    cmyk = picture(6, 4).convert("CMYK")
    assert same(encode(cmyk, "TIFF"), cmyk.convert("RGB"))


def test_alpha_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 255, 51
    expected = [[[255, 255, 255], [0, 0, 0], [204, 204, 204]]]
    image = Image.fromarray(rgba)
    assert same(encode(image), expected)
    assert same(rgba, expected)
    assert same(torch.from_numpy(rgba).movedim(-1, 0), expected)
    assert same(encode(image.convert("LA")), expected)
    assert load_image(image.convert("LA").convert("La")).getpixel((0, 0)) == (255, 255, 255)

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    assert same(encode(palette, transparency=0), [[[255, 255, 255], [0, 0, 255]]])


def test_16_bits_are_divided_by_257():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, axis=-1)
    assert same(encode(Image.fromarray(values)), expected)
    assert same(values, expected)
    assert same(Image.fromarray(values.astype(np.int32)), expected)
    assert same(values.astype(">u2"), expected)
    expected[0, 2] = 255
    assert same(encode(Image.fromarray(values), transparency=128 * 257), expected)
    with pytest.raises(ValueError, match="0 to 65535"):
        load_image(Image.fromarray(values.astype(np.int32) + 1))


def test_an_animation_shows_its_first_frame():
    frames = [picture(6, 4, seed) for seed in range(3)]
    content = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert same(content, frames[0])
    animation = Image.open(io.BytesIO(content))
    animation.seek(2)
    assert same(animation, frames[0])
    assert animation.tell() == 2


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "tensor", "bfloat16"])
def test_arrays_and_tensors(kind, channels_first):
    pixels = np.asarray(picture(7, 5)) // 255 * 255  # black and white, which bfloat16 keeps
    array = np.moveaxis(pixels, -1, 0) if channels_first else pixels
    if kind in ("float32", "float64"):
        array = (array / 255).astype(kind)
    elif kind == "tensor":
        array = torch.from_numpy(np.ascontiguousarray(array))
    elif kind == "bfloat16":
        array = (torch.from_numpy(np.ascontiguousarray(array)) / 255).bfloat16().requires_grad_()
    assert same(array, pixels)


def test_floats_are_rounded_not_cut_off():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert same((values / 255).astype(np.float32), np.repeat(values[..., None], 3, axis=-1))


def test_a_shape_that_could_be_either_way():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert same(pixels, pixels)  # NumPy: [H, W, C]
    assert same(torch.from_numpy(pixels), np.moveaxis(pixels, 0, -1))  # torch: [C, H, W]
    assert load_image(pixels, "channels_first").size == (3, 5)
    assert load_image(np.zeros((1, 1, 3), dtype=np.uint8)).size == (1, 1)


def test_a_url_is_read_up_to_a_limit(monkeypatch):
    image = picture(7, 5)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(encode(image))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert same(f"{url}/image.png", image)
        assert same(f"{url}/image.png".replace("http", "HTTP"), image)
        with pytest.raises(ValueError, match="404"):
            load_image(f"{url}/other.png")
        monkeypatch.setattr(image_loading_mc_llava, "MAX_DOWNLOAD_BYTES", 10)
        with pytest.raises(ValueError, match="more than 10 bytes"):
            load_image(f"{url}/image.png")
        server.shutdown()


def test_a_pipe_a_device_and_a_folder_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the image was still being read after 10 seconds"))
    signal.alarm(10)
    try:
        for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
            for source in (path, str(path)):
                with pytest.raises(ValueError, match="not a regular file"):
                    load_image(source)
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no-such-file.png", "no-such-file.png is neither a file, an http"),
        ("data:image/png,abc", "without base64"),
        ("no-such-fïle.png", "no-such-fïle.png is neither a file, an http"),
        ("http://exa mple.com/x.png", "cannot read the image http://exa mple"),
        ("http://localhost:abc/", "cannot read the image http://localhost:abc/"),
        ("http://[::1/", r"cannot read the image http://\[::1/"),
        (b"", "0 bytes is not an image"),
        (b"not an image", "not an image"),
        (encode(picture(64, 64))[:-2000], "corrupt"),
        (encode(picture(64, 64), "JPEG")[:-500], "corrupt"),
        (np.zeros((5, 5, 2), dtype=np.uint8), "no axis of 1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "at least 1 x 1"),
        (np.zeros((2, 2, 2, 3), dtype=np.uint8), r"pass \[H, W\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "dtype int64"),
        (np.full((4, 4, 3), 1.5), "floats from 1.5 to 1.5, allowed are 0 to 1"),
        (np.full((4, 4, 3), np.nan), "floats from nan"),
        (np.zeros((1, 20_001), dtype=np.uint8), "20001 x 1 pixels, a side may have 20000"),
        (object(), "cannot read an image from object"),
        (None, "cannot read an image from NoneType"),
    ],
)
def test_broken_images(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


def test_a_decompression_bomb(monkeypatch):
    content = encode(Image.new("1", (2000, 2000)))
    # Pillow itself warns of the first and refuses the second.
    for limit, message in ((3_000_000, "2000 x 2000 pixels, .* 3000000: resize it"), (1000, "too large.*Resize it")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            warnings.simplefilter("ignore")
            load_image(content)


def test_files_stay_open_for_their_owner(tmp_path):
    path = tmp_path / "image.png"
    picture(7, 5).save(path)
    with open(path, "rb") as file:
        assert same(file, picture(7, 5))
        file.seek(0)
        assert len(file.read()) == path.stat().st_size


def test_base64_in_lines():
    assert same(base64.encodebytes(encode(picture(40, 30))).decode(), picture(40, 30))


def test_what_is_no_picture_format_stays_closed(tmp_path):
    """An EPS file would go to a PostScript interpreter."""
    path = tmp_path / "image.eps"
    picture(7, 5).save(path)
    with pytest.raises(ValueError, match="not an image that can be read: save it as PNG or JPEG"):
        load_image(path)


def test_flat_lists():
    image = picture(3, 2)
    batch = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert flatten_images(image) == [image]
    assert flatten_images([image, [image, (image,)]]) == [image] * 3
    assert len(flatten_images(batch)) == 2
    assert len(flatten_images([image, torch.zeros(3, 3, 4, 4)])) == 4


class TestImageProcessor:
    processor = MCLlavaImageProcessor()

    @pytest.mark.parametrize("size", [(1, 1), (1, 2000), (577, 576)])
    def test_the_tensors(self, size):
        images = [picture(*size), picture(640, 400)]
        out = self.processor(images, return_tensors="pt", max_crops=4, num_tokens=50)
        crops = out["image_grid_thw"][:, 0].tolist()
        assert out["image_grid_thw"].tolist() == [[count, 1, 1] for count in crops]
        assert out["pixel_values"].shape == (sum(crops), 3, 384, 384)
        assert out["crop_coords"].shape == (sum(crops), 2)
        assert out["crop_num_tokens"].shape == (sum(crops),)
        dtypes = [out[name].dtype for name in self.processor.model_input_names]
        assert dtypes == [torch.float32, torch.int64, torch.float32, torch.int64, torch.int64]
        assert out["crop_coords"][0].tolist() == [0.5, 0.5]
        for image, count in zip(images, crops):
            assert len(self.processor.plan(*image.size, max_crops=4, num_tokens=50)) == count

    def test_an_image_does_not_depend_on_its_neighbours(self):
        images = [picture(700, 300), picture(50, 60, seed=1), picture(400, 900, seed=2)]
        together = self.processor(images, return_tensors="pt")
        alone = [self.processor(image, return_tensors="pt") for image in images]
        for name in self.processor.model_input_names:
            assert torch.equal(together[name], torch.cat([out[name] for out in alone]))

    def test_pixels_are_those_of_pillow_and_siglip(self):
        image = picture(500, 300)
        expected = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC)) / 255
        expected = (np.moveaxis(expected, -1, 0) - 0.5) / 0.5
        assert np.abs(self.processor(image)["pixel_values"][0] - expected).max() < 1e-6

    def test_options_of_transformers(self):
        image = picture(30, 20)
        raw = self.processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
        normalized = self.processor(image, image_mean=[0.0, 0.1, 0.2], image_std=[1.0, 2.0, 3.0])["pixel_values"]
        assert raw.max() == 255
        mean, std = np.array([0, 0.1, 0.2])[:, None, None], np.array([1, 2, 3])[:, None, None]
        assert np.abs(normalized[0] - (raw[0] / 255 - mean) / std).max() < 1e-6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_crop": 3}, "unknown options max_crop: did you mean max_crops?"),
            ({"banana": 3}, "unknown options banana: leave them out"),
            ({"max_crops": -1}, "max_crops must be at least 0, got -1"),
            ({"do_resize": False}, "do_resize must be True, got False"),
            ({"do_center_crop": True}, "do_center_crop must be False"),
            ({"size": {"height": 30, "width": 20}}, "equal height and width"),
            ({"size": {"height": 20, "width": 20}}, "size 20 must hold at least 2 x 2 patches, got patch_size 14"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.processor(picture(9, 9), **options)
        if "size" not in options:
            with pytest.raises(ValueError, match=message):
                MCLlavaImageProcessor(**options)

    def test_no_images(self):
        with pytest.raises(ValueError, match="empty list"):
            self.processor([])

    def test_photographs(self):
        for path in (ROOT / "examples").glob("*.jpg"):
            assert len(self.processor(path)["pixel_values"]) == len(self.processor.plan(*Image.open(path).size))
