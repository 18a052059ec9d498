"""`handler.py`, loaded and called as Inference Endpoints do, and asked by the Hub's own client."""

import base64
import importlib.util
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import NEW_TOKENS, ROOT, plain_reply
from huggingface_hub import InferenceClient, constants
from PIL import Image


def load_handler(folder):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(trial):
    return load_handler(trial.folder)


@pytest.fixture(scope="module")
def handler(module, trial):
    return module.EndpointHandler(str(trial.folder))


def encoded(trial, index: int = 0) -> str:
    return base64.b64encode(trial.pictures[index].read_bytes()).decode()


PARAMETERS = {"max_new_tokens": NEW_TOKENS}


class Server:
    """
    Answers as the toolkit of Inference Endpoints does: `/` and `/predict` alone, bodies must have `inputs`, and errors
    have status 400 and say why.
    """

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    if "inputs" not in data:
                        raise ValueError("Body needs to provide a inputs key")
                    status, body = (200, answer(data)) if self.path in ("/", "/predict") else (404, {})
                except Exception as error:
                    status, body = 400, {"error": str(error)}
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


class TestFolder:
    def test_convert_copies_it(self, trial):
        for name in ("handler.py", "requirements.txt"):  # an endpoint installs these
            assert (trial.folder / name).read_bytes() == (ROOT / name).read_bytes()

    @pytest.mark.slow
    def test_it_needs_nothing_but_the_folder(self, trial, tmp_path):
        """Away from the checkout and without the package."""
        shutil.copytree(trial.folder, tmp_path / "model")
        code = (
            "import sys; sys.modules['mc_llava'] = None\n"
            "from handler import EndpointHandler\n"
            f"image = open({str(trial.pictures[0])!r}, 'rb').read()\n"
            f"request = {{'question': {trial.questions[0]!r}, 'image': image, 'parameters': {PARAMETERS!r}}}\n"
            "print('answer:', EndpointHandler('.')(request)[0]['answer'])"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path / "model", capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert trial.is_right(0, result.stdout.rpartition("answer:")[2])


class TestEndpoint:
    @pytest.fixture
    def url(self, handler):
        with Server(handler) as server:
            yield server.url

    @pytest.mark.parametrize("index", [0, 1])
    def test_the_hubs_client(self, url, trial, index, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is here
        client = InferenceClient(url)
        (answer,) = client.visual_question_answering(str(trial.pictures[index]), trial.questions[index], top_k=1)
        assert trial.is_right(index, answer.answer) and 0 <= answer.score <= 1

    def post(self, url, body) -> dict | list:
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def test_posted_messages(self, url, trial):
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded(trial)}"}}
        content = [image, {"type": "text", "text": trial.questions[0]}]
        options = {"max_tokens": NEW_TOKENS, "temperature": 0}
        reply = self.post(url, {"inputs": {"messages": [{"role": "user", "content": content}], **options}})
        assert trial.is_right(0, reply["choices"][0]["message"]["content"])
        assert reply["choices"][0]["finish_reason"] == "stop"
        usage = reply["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 1 <= usage["completion_tokens"] <= NEW_TOKENS and usage["prompt_tokens"] > 128

    def test_a_posted_question(self, url, trial):
        asked = {"image": encoded(trial), "question": trial.questions[0]}
        (reply,) = self.post(f"{url}/predict", {"inputs": asked, "parameters": PARAMETERS})
        assert trial.is_right(0, reply["answer"])

    def test_the_documented_code(self, url, monkeypatch, capsys):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(ROOT)
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
        (code,) = [block for block in blocks if "InferenceClient" in block]
        exec(code.replace("https://my-endpoint.endpoints.huggingface.cloud", url), {})
        answer, completion = capsys.readouterr().out.splitlines()
        assert "'answer':" in answer and "chat.completion" in completion

    def test_an_error_says_why(self, url):
        with pytest.raises(urllib.error.HTTPError) as raised:
            self.post(url, {"inputs": {"question": "What?", "image": "/etc/hostname"}})
        assert raised.value.code == 400 and "can't be read as base64" in json.load(raised.value)["error"]


class TestShapes:
    def test_text_with_an_image(self, handler, trial):
        for image in (encoded(trial), f"data:image/jpeg;base64,{encoded(trial)}", Image.open(trial.pictures[0])):
            request = {"inputs": trial.questions[0], "image": image, "parameters": PARAMETERS}
            (reply,) = handler(request)
            assert set(reply) == {"generated_text"} and trial.is_right(0, reply["generated_text"])

    def test_question_and_image(self, handler, trial):
        asked = {"question": trial.questions[1], "image": encoded(trial, 1)}
        for request in ({"inputs": asked}, asked, {"inputs": asked["image"], **asked}):
            (reply,) = handler({**request, "parameters": PARAMETERS})
            assert trial.is_right(1, reply["answer"]) and 0 <= reply["score"] <= 1

    def test_messages_of_several_turns(self, handler, module, trial):
        first = {"role": "user", "content": [{"type": "image", "base64": encoded(trial)}]}
        first["content"].append({"type": "text", "text": trial.questions[0]})
        for request in ({"messages": [first]}, {"inputs": [first]}, {"inputs": {"messages": [first]}}):
            reply = handler({**request, "parameters": PARAMETERS})
            message = reply["choices"][0]["message"]
            assert reply["object"] == "chat.completion" and trial.is_right(0, message["content"])
        second = handler({"messages": [first, message, {"role": "user", "content": "And?"}], "max_tokens": 2})
        assert "top_k" in module.OPTIONS and handler({"messages": [first], "max_tokens": 2, "top_k": 3})
        assert second["usage"]["prompt_tokens"] > reply["usage"]["total_tokens"]

    def test_knobs_and_the_cache(self, handler, trial):
        asked = {"question": trial.questions[0], "image": encoded(trial)}
        knobs = {"max_crops": 1, "num_tokens": 30}
        misses, hits = handler.cache.misses, handler.cache.hits
        for _ in range(2):
            reply = handler({"inputs": asked, "parameters": {**PARAMETERS, **knobs}})[0]["answer"]
            assert reply == plain_reply(trial.folder, trial.pictures[0], trial.questions[0], **knobs)
        assert (handler.cache.misses - misses, handler.cache.hits - hits) == (1, 1)

    def test_whole_numbers_where_any_are_meant(self, handler, trial):
        asked = {"question": trial.questions[0], "image": encoded(trial), "parameters": {"num_tokens": 9}}
        numbers = {"temperature": 1, "top_p": 1, "repetition_penalty": 2, "max_new_tokens": 2}
        for extra in ({"inputs": {**asked, "parameters": numbers}}, {"inputs": asked, "parameters": numbers}):
            assert handler(extra)[0]["answer"] is not None

    @pytest.mark.parametrize(
        "request_, message",
        [
            ([], "a request must be an object, got list"),
            ({}, "pass a question as inputs and an image.*got nothing"),
            ({"inputs": "What?"}, "pass a question as inputs and an image.*got inputs"),
            ({"inputs": {"question": "What?"}}, "pass a question .* and an image, got parameters, question"),
            ({"inputs": {"image": "IMAGE"}}, "pass a question as inputs and an image.*got image"),
            ({"inputs": "Where?", "question": "What?", "image": "IMAGE"}, "inputs must be the image"),
            ({"inputs": [{"role": "user"}], "messages": [{"role": "user"}]}, "either messages or inputs"),
            (
                {"inputs": "What?", "image": "IMAGE", "max_crops": 3},
                "unknown max_crops: there are image, inputs, para",
            ),
            ({"inputs": {"question": "What?", "image": "IMAGE", "foo": 3}}, "unknown foo: there are"),
            ({"question": "What?", "image": "IMAGE", "foo": 3}, "unknown foo: there are"),
            ({"inputs": {"question": "?", "image": "IMAGE", "parameters": {"top_q": 3}}}, "unknown top_q: there are"),
            ({"question": "?", "image": "IMAGE", "parameters": {"top_k": 3}}, "number of answers to return here"),
            ({"messages": [{"role": "user", "content": "What?"}], "n": 2}, "unknown n: there are"),
            ({"messages": [{"role": "user", "content": "What?", "name": "me"}]}, "unknown name: there are"),
            ({"messages": [], "max_tokens": 3, "parameters": {"max_new_tokens": 4}}, "max_new_tokens is given twice"),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "?", "image": 3}]}]},
                "unknown image",
            ),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "one of image, url and base64, got 0"),
            ({"inputs": "caf\udce9", "image": "IMAGE"}, "can't be encoded as UTF-8"),
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"do_sample": 1}}, "must be true or false, got 1"),
            ({"inputs": "What?", "image": 3}, "must be base64 text or a data URI, got int"),
            ({"inputs": "What?", "image": "/etc/hostname"}, "can't be read as base64"),
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"top_q": 1}}, "unknown top_q: there are"),
            ({"inputs": "What?", "image": "IMAGE", "parameters": 3}, "parameters must be an object"),
            (
                {"inputs": "What?", "image": "IMAGE", "parameters": {"max_new_tokens": "9"}},
                "must be an integer from 1 to 1000000, got '9'",
            ),
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"max_crops": -1}}, "at least 0, got -1"),
            ({"inputs": "What?<|im_end|>", "image": "IMAGE"}, "special token <|im_end|>"),
            ({"messages": "What?"}, "messages must be a list"),
            ({"messages": [{"role": "user", "content": "What?"}], "stream": True}, "can't stream"),
            ({"messages": [{"role": "owner", "content": "What?"}]}, "role must be one of"),
            ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, "unknown path"),
            ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a text with a string or an image"),
            (
                {"inputs": "What?", "image": "http://example.com/a.png"},
                "fetches no URLs: send the picture's bytes as base64",
            ),
        ],
        ids=str,
    )
    def test_anything_else_is_a_clear_error(self, handler, trial, request_, message):
        request_ = json.loads(json.dumps(request_).replace("IMAGE", encoded(trial)))
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            handler(request_)

    @pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "temperature", "top_p", "repetition_penalty"])
    @pytest.mark.parametrize("value", [-1, 10**400, float("nan"), float("inf"), 1e-300, "1", True, [1]], ids=str)
    def test_numbers_out_of_range(self, handler, trial, name, value):
        if (name, value) == ("top_p", 1e-300):
            pytest.skip("a tiny top_p is allowed: it keeps the most likely token")
        content = [{"type": "image", "base64": encoded(trial)}, {"type": "text", "text": "What?"}]
        request = {"messages": [{"role": "user", "content": content}], name: value, "do_sample": True}
        with pytest.raises(ValueError, match=f"{name} must be an? (integer|number) from"):
            handler(request)
        if name in ("max_new_tokens", "top_k"):
            with pytest.raises(ValueError, match=f"{name} must be an integer from"):
                handler({**request, name: 2.5})

    def test_too_much_is_refused_before_it_is_encoded(self, handler, trial, module, monkeypatch):
        image = {"type": "image", "base64": encoded(trial)}
        misses = handler.cache.misses
        with pytest.raises(
            ValueError, match="16 images have 2048 tokens, the context 2048: pass fewer, or num_tokens=120"
        ):
            handler({"messages": [{"role": "user", "content": [image] * 16}]})
        for question in ("a<image>", "word " * 3000):
            with pytest.raises(ValueError, match="special token|shorten the text"):
                handler({"inputs": question, "image": encoded(trial)})
        assert handler.cache.misses == misses
        with pytest.raises(ValueError, match="may have 16 images, got 17"):
            handler({"messages": [{"role": "user", "content": [image] * 17}]})
        with pytest.raises(ValueError, match="may have 100000 characters of text, got 150000"):
            handler({"messages": [{"role": "user", "content": "word " * 15_000}] * 2})
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1000)
        with pytest.raises(ValueError, match="may have 1000 bytes"):
            handler({"inputs": "What?", "image": encoded(trial)})

    def test_pixels_are_counted_before_they_are_decoded(self, handler, monkeypatch):
        """From headers alone: the files have no pixels."""
        monkeypatch.setattr(handler, "load_image", None)
        header = struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        image = {"type": "image", "base64": base64.b64encode(content).decode()}
        with pytest.raises(ValueError, match="may have 100000000 pixels in all, got 128000000: resize them"):
            handler({"messages": [{"role": "user", "content": [image] * 2}]})


def test_pictures_of_any_kind(handler, trial):
    """Transparent ones are laid over white, as everywhere else."""
    content = io.BytesIO()
    Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(content, "PNG")
    (image,) = handler._load(handler._ask("What?", base64.b64encode(content.getvalue()).decode()))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)
