"""`handler.py`, loaded and called as Inference Endpoints do, and asked by the Hub's own client."""

import base64
import importlib.util
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import NEW_TOKENS, ROOT, plain_reply
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
    """Answers every path with the handler, as an endpoint does: errors have status 400 and say why."""

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                try:
                    data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    status, body = 200, answer(data)
                except Exception as error:
                    status, body = 400, {"error": str(error)}
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                status, headers, content = answer(self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [content] if isinstance(content, bytes) else content:
                    self.wfile.write(piece)

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
        assert (trial.folder / "handler.py").read_bytes() == (ROOT / "handler.py").read_bytes()

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


class TestHubClient:
    @pytest.fixture
    def client(self, handler, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is here
        with Server(handler) as server:
            yield InferenceClient(server.url)

    @pytest.mark.parametrize("index", [0, 1])
    def test_visual_question_answering(self, client, trial, index):
        (answer,) = client.visual_question_answering(str(trial.pictures[index]), trial.questions[index])
        assert trial.is_right(index, answer.answer) and 0 <= answer.score <= 1

    def test_chat_completion(self, client, trial):
        image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded(trial)}"}}
        content = [image, {"type": "text", "text": trial.questions[0]}]
        reply = client.chat_completion([{"role": "user", "content": content}], max_tokens=NEW_TOKENS, temperature=0)
        assert trial.is_right(0, reply.choices[0].message.content)
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert 1 <= reply.usage.completion_tokens <= NEW_TOKENS and reply.usage.prompt_tokens > 128


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

    def test_messages_of_several_turns(self, handler, trial):
        first = {"role": "user", "content": [{"type": "image", "base64": encoded(trial)}]}
        first["content"].append({"type": "text", "text": trial.questions[0]})
        for request in ({"messages": [first]}, {"inputs": [first]}, {"inputs": {"messages": [first]}}):
            reply = handler({**request, "parameters": PARAMETERS})
            message = reply["choices"][0]["message"]
            assert reply["object"] == "chat.completion" and trial.is_right(0, message["content"])
        second = handler({"messages": [first, message, {"role": "user", "content": "And?"}], "max_tokens": 2})
        assert second["usage"]["prompt_tokens"] > reply["usage"]["total_tokens"]

    def test_knobs_and_the_cache(self, handler, trial):
        asked = {"question": trial.questions[0], "image": encoded(trial)}
        knobs = {"max_crops": 1, "num_tokens": 30}
        misses, hits = handler.cache.misses, handler.cache.hits
        for _ in range(2):
            reply = handler({"inputs": asked, "parameters": {**PARAMETERS, **knobs}})[0]["answer"]
            assert reply == plain_reply(trial.folder, trial.pictures[0], trial.questions[0], **knobs)
        assert (handler.cache.misses - misses, handler.cache.hits - hits) == (1, 1)

    @pytest.mark.parametrize(
        "request_, message",
        [
            ([], "a request must be an object, got list"),
            ({}, "pass a question as inputs and an image.*got nothing"),
            ({"inputs": "What?"}, "pass a question as inputs and an image.*got inputs"),
            ({"inputs": {"question": "What?"}}, "pass a question .* and an image, got question"),
            ({"inputs": {"image": "IMAGE"}}, "pass a question .* and an image, got image"),
            ({"inputs": "What?", "image": 3}, "must be base64 text, a data URI or a URL, got int"),
            ({"inputs": "What?", "image": "/etc/hostname"}, "can't be read as base64"),
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"top_q": 1}}, "unknown parameters top_q: there are"),
            ({"inputs": "What?", "image": "IMAGE", "parameters": 3}, "parameters must be an object"),
            (
                {"inputs": "What?", "image": "IMAGE", "parameters": {"max_new_tokens": "9"}},
                "must be a number, got '9'",
            ),
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"max_crops": -1}}, "at least 0, got -1"),
            ({"inputs": "What?<|im_end|>", "image": "IMAGE"}, "special token <|im_end|>"),
            ({"messages": "What?"}, "messages must be a list"),
            ({"messages": [{"role": "user", "content": "What?"}], "stream": True}, "can't stream"),
            ({"messages": [{"role": "owner", "content": "What?"}]}, "role must be one of"),
            ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, "got NoneType"),
            ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a text with a string or an image"),
            ({"inputs": "What?", "image": "http://example.com/a.png"}, "fetches no URLs"),
        ],
        ids=str,
    )
    def test_anything_else_is_a_clear_error(self, handler, trial, request_, message):
        request_ = json.loads(json.dumps(request_).replace("IMAGE", encoded(trial)))
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            handler(request_)

    def test_too_much_is_refused_before_it_is_encoded(self, handler, trial, module, monkeypatch):
        image = {"type": "image", "base64": encoded(trial)}
        misses = handler.cache.misses
        with pytest.raises(
            ValueError, match="40 images have 5120 tokens, the context 2048: pass fewer, or num_tokens=49"
        ):
            handler({"messages": [{"role": "user", "content": [image] * 40}]})
        assert handler.cache.misses == misses
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1000)
        with pytest.raises(ValueError, match="may have 1000 bytes"):
            handler({"inputs": "What?", "image": encoded(trial)})


class TestUrls:
    """A server on this machine stands for the public one: `_connect` alone is told that it may be reached."""

    @pytest.fixture
    def server(self, trial):
        def answer(path):
            if path.startswith("/moved"):
                return 302, {"Location": path.removeprefix("/moved") or "/moved"}, b""
            if path == "/big":
                return 200, {}, bytes(10_000)
            if path == "/slow":
                return 200, {}, (time.sleep(0.3) or b"a" for _ in range(20))
            if path == "/none":
                return 404, {}, b""
            return 200, {}, trial.pictures[0].read_bytes()

        with Server(answer) as server:
            yield server

    @pytest.fixture
    def public(self, module, monkeypatch):
        monkeypatch.setattr(module, "_connect", lambda host, port, *rest: socket.create_connection((host, port)))

    def test_only_where_it_is_allowed(self, handler, trial, server, public, monkeypatch):
        request = {"inputs": trial.questions[0], "image": f"{server.url}/a.png", "parameters": PARAMETERS}
        with pytest.raises(ValueError, match="fetches no URLs"):
            handler(request)
        monkeypatch.setenv("ALLOW_IMAGE_URLS", "1")
        assert trial.is_right(0, handler(request)[0]["generated_text"])
        content = [{"type": "image_url", "image_url": {"url": f"{server.url}/moved/moved/a.png"}}]
        content.append({"type": "text", "text": trial.questions[0]})
        reply = handler({"messages": [{"role": "user", "content": content}], **{"max_tokens": NEW_TOKENS}})
        assert trial.is_right(0, reply["choices"][0]["message"]["content"])

    def test_limits(self, module, server, public, monkeypatch):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 9_999)
        with pytest.raises(ValueError, match="holds more than 9999 bytes"):
            module.fetch(f"{server.url}/big")
        with pytest.raises(ValueError, match="answered 404"):
            module.fetch(f"{server.url}/none")
        with pytest.raises(ValueError, match="redirected more than 5 times"):
            module.fetch(f"{server.url}/moved")
        monkeypatch.setattr(module, "FETCH_SECONDS", 1)
        with pytest.raises(ValueError, match="took longer than 1 s|timed out"):
            module.fetch(f"{server.url}/slow")
        monkeypatch.setattr(module, "FETCH_SECONDS", 0)
        with pytest.raises(ValueError, match="took longer than 0 s"):
            module.fetch(f"{server.url}/a.png")

    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1",
            "localhost",
            "10.0.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
        ]
        + ["[fd00::1]", "224.0.0.1", "2130706433", "0x7f.1", "100.64.0.1"],
    )
    def test_private_addresses(self, module, server, host):
        with pytest.raises(ValueError, match="not a public address"):
            module.fetch(f"http://{host}:{server.url.rpartition(':')[2]}/a.png")

    def test_a_name_that_points_inside_and_a_redirect_there(self, module, server, monkeypatch):
        def resolve(host, port, **kwargs):
            address = "93.184.215.14" if host == "public.example" else "10.1.2.3"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        port = int(server.url.rpartition(":")[2])
        connect = socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(ValueError, match="sneaky.example is 10.1.2.3, which is not a public address"):
            module.fetch("http://sneaky.example/a.png")
        reached = []

        def here(address, **kwargs):
            reached.append(address)
            monkeypatch.undo()
            sock = connect(("127.0.0.1", port))
            return sock

        monkeypatch.setattr(socket, "create_connection", here)
        with pytest.raises(ValueError, match="127.0.0.1, which is not a public address"):
            module.fetch(f"http://public.example/movedhttp://127.0.0.1:{port}/a.png")
        assert reached == [("93.184.215.14", 80)], "what was checked is what is connected to"

    @pytest.mark.parametrize("url", ["ftp://example.com/a", "http:///a", "file:///etc/passwd", "http://[::1/"])
    def test_other_addresses(self, module, url):
        with pytest.raises(ValueError):
            module.fetch(url)


def test_pictures_of_any_kind(handler, trial):
    """Transparent ones are laid over white, as everywhere else."""
    content = io.BytesIO()
    Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(content, "PNG")
    image = handler._read(base64.b64encode(content.getvalue()).decode())
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)
