"""`handler.py`, loaded and called as Inference Endpoints do, and asked by the Hub's own client."""

import base64
import io
import json
import re
import reprlib
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import urllib.error
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import NEW_TOKENS, ROOT, load_handler, plain_reply, prompt
from huggingface_hub import InferenceClient, constants
from PIL import Image


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
    Answers as the toolkit of Inference Endpoints does: only `/` and `/predict`, bodies must have `inputs`, and errors
    have status 400 and a reason.
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
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the server is on this machine
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
        knobs = {"max_crops": 5, "num_tokens": 30}
        misses, hits = handler.cache.misses, handler.cache.hits
        for _ in range(2):
            reply = handler({"inputs": asked, "parameters": {**PARAMETERS, **knobs}})[0]["answer"]
            assert reply == plain_reply(trial.folder, trial.pictures[0], trial.questions[0], **knobs)
        assert (handler.cache.misses - misses, handler.cache.hits - hits) == (1, 1)

    def test_zoom_tells_where_it_looked(self, handler, trial):
        knobs = {"zoom": 3, "max_crops": 24, "num_tokens": 64}
        asked = {"inputs": trial.questions[0], "image": encoded(trial), "parameters": {**PARAMETERS, **knobs}}
        (reply,) = handler(asked)
        assert reply["generated_text"] == plain_reply(trial.folder, trial.pictures[0], trial.questions[0], **knobs)
        assert trial.is_right(0, reply["generated_text"])
        assert [crop["round"] for crop in reply["looked_at"]] == [0] * 7 + [1] * 6 + [2] * 6 + [3] * 6
        assert json.loads(json.dumps(reply)) == reply
        chat = ask(trial, {"role": "user", "content": [{"type": "image", "url": encoded(trial)}]}, **knobs)
        assert handler(chat)["looked_at"]
        assert "looked_at" not in handler({**asked, "parameters": {**PARAMETERS, "zoom": 0}})[0]
        reused = handler.prefixes.reused
        (sure,) = handler({**asked, "inputs": "Where is the camera, left or right of the volcano?"})
        assert [crop["round"] for crop in sure["looked_at"]] == [0] * 7
        assert handler.prefixes.reused - reused >= 64, "the draft's tokens"

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
            ({"messages": [{"role": "user", "content": "What?"}], "n": 2}, "n must be 1 here, got 2: leave it out"),
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
            ({"inputs": "What?", "image": "IMAGE", "parameters": {"max_crops": -1}}, "from 0 to 1000, got -1"),
            ({"inputs": "What?<|im_end|>", "image": "IMAGE"}, "special token <|im_end|>"),
            ({"messages": "What?"}, "messages must be a list"),
            ({"messages": [{"role": "user", "content": "What?"}], "stream": True}, "can't stream"),
            ({"messages": [{"role": "owner", "content": "What?"}]}, "role must be one of"),
            ({"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}, "unknown path"),
            (
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image_url", "image_url": "IMAGE", "path": "/"}]}
                    ]
                },
                "unknown path",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"path": "/"}}]}]},
                "unknown path",
            ),
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

    def test_a_number_too_long_to_print(self, handler):
        with pytest.raises(ValueError, match="n must be 1 here, got a number of 16610 bits: leave it out"):
            handler({"messages": [{"role": "user", "content": "What?"}], "n": 10**5000})

    def test_too_much_is_refused_before_it_is_encoded(self, handler, trial, module, monkeypatch):
        image = {"type": "image", "base64": encoded(trial)}
        misses = handler.cache.misses
        with pytest.raises(ValueError, match="no room for an answer: pass num_tokens=126 or less"):
            handler({"messages": [{"role": "user", "content": [image] * 16}]})
        request = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "word " * 600}]}]}
        with pytest.raises(ValueError, match=r"pass num_tokens=\d+ or less") as error:
            handler({**request, "num_tokens": 2000})
        assert handler.cache.misses == misses
        fitting = int(str(error.value).split("num_tokens=")[1].split()[0])
        handler({**request, "num_tokens": fitting, "max_new_tokens": 1})  # the remedy is one
        misses = handler.cache.misses
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

    def test_there_is_one_answer_whatever_was_saved(self, handler, trial, monkeypatch):
        request = {"inputs": "What?", "image": encoded(trial), "parameters": PARAMETERS}
        expected = handler(request)
        for name, value in (("do_sample", True), ("num_return_sequences", 2)):
            monkeypatch.setattr(handler.model.generation_config, name, value)
        assert handler(request) == expected

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
    """Transparent pictures are blended with white, as everywhere else."""
    content = io.BytesIO()
    Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(content, "PNG")
    (image,) = handler._load(handler._ask("What?", base64.b64encode(content.getvalue()).decode()))
    assert image.mode == "RGB" and image.getpixel((3, 3)) == (255, 255, 255)


def ask(trial, *turns, **options) -> dict:
    """A chat request with the first question, and perhaps further turns."""
    content = [{"type": "image", "base64": encoded(trial)}, {"type": "text", "text": trial.questions[0]}]
    return {"messages": [{"role": "user", "content": content}, *turns], "max_tokens": NEW_TOKENS, **options}


def choice(reply: dict) -> tuple[str, str]:
    (first,) = reply["choices"]
    return first["message"]["content"], first["finish_reason"]


class TestPrefilledAnswer:
    @pytest.mark.parametrize(
        "content",
        [
            "It is",
            [{"type": "text", "text": "It is"}],
            [{"type": "text", "text": "It"}, {"type": "text", "text": " is"}],
        ],
        ids=str,
    )
    def test_it_is_continued(self, handler, trial, content):
        reply = handler(ask(trial, {"role": "assistant", "content": content}))
        text, reason = choice(reply)
        raw = prompt(trial.questions[0]) + "It is"
        assert text.strip() == plain_reply(trial.folder, trial.pictures[0], raw)
        assert text.startswith(" ") and reason == "stop"  # "It is" + text is the whole answer

    @pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]], ids=str)
    def test_an_empty_one_is_none(self, handler, trial, content):
        assert choice(handler(ask(trial, {"role": "assistant", "content": content}))) == choice(handler(ask(trial)))

    def test_it_must_hold_no_special_token(self, handler, trial):
        with pytest.raises(ValueError, match="special token <|im_end|>".replace("|", r"\|")):
            handler(ask(trial, {"role": "assistant", "content": "It<|im_end|>"}))


class TestOpenAIsOptions:
    @pytest.mark.parametrize("place", ["top", "parameters"])
    def test_defaults_change_nothing(self, handler, trial, place):
        options = {
            **{"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "seed": None, "stop": None},
            **{"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "auto", "functions": [], "id": "a"},
            **{"function_call": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "stream": False},
            **{"parallel_tool_calls": True, "store": False, "service_tier": "auto", "metadata": {"a": "b"}},
            **{"stream_options": {}, "user": "me", "safety_identifier": "me", "prompt_cache_key": "a"},
            **{"reasoning_effort": "none", "verbosity": "medium", "prediction": None, "audio": None},
        }
        request = ask(trial, **options) if place == "top" else {**ask(trial), "parameters": options}
        assert choice(handler(request)) == choice(handler(ask(trial)))

    @pytest.mark.parametrize(
        "option",
        [
            *({"n": 2}, {"n": True}, {"n": "1"}, {"presence_penalty": 0.1}, {"frequency_penalty": -1}),
            *({"logprobs": True}, {"logprobs": 0}, {"top_logprobs": 2}, {"tools": [{"type": "function"}]}),
            *({"tool_choice": "required"}, {"tool_choice": {"type": "function"}}, {"functions": [{}]}),
            *({"response_format": {"type": "json_object"}}, {"logit_bias": {"50": 1}}, {"store": True}),
            *({"modalities": ["audio"]}, {"stream": True}, {"reasoning_effort": "high"}, {"n": [[1]]}),
            *({"prediction": {"type": "content"}}, {"web_search_options": {}}, {"functions": False}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("place", ["top", "parameters"])
    def test_what_would_change_the_answer_is_refused(self, handler, trial, option, place):
        (name,) = option
        request = ask(trial, **option) if place == "top" else {**ask(trial), "parameters": option}
        with pytest.raises(ValueError, match=f"{name} must be .* here|unknown {name}|can't {name}"):
            handler(request)

    @pytest.mark.parametrize(
        "fields",
        [
            {"annotations": [], "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
            {
                "annotations": None,
                "tool_calls": [],
                "refusal": "",
                "name": "",
                "reasoning_content": "",
                "reasoning": "",
            },
        ],
        ids=str,
    )
    def test_an_echoed_answer(self, handler, trial, fields):
        turns = [{"role": "assistant", "content": "It is blue."}, {"role": "user", "content": "And?"}]
        wanted = handler(ask(trial, *turns))
        turns[0] |= fields
        assert choice(handler(ask(trial, *turns))) == choice(wanted)
        parts = {**turns[0], "content": [{"type": "text", "text": "It is blue.", **fields}]}
        assert choice(handler(ask(trial, parts, turns[1]))) == choice(wanted)
        turns[0] |= {"tool_calls": [{"id": "1"}]}
        with pytest.raises(ValueError, match="unknown tool_calls"):
            handler(ask(trial, *turns))


class TestStop:
    def test_the_answer_ends_before_it(self, handler, trial):
        whole = handler(ask(trial))
        text = choice(whole)[0]
        middle = len(text) // 2
        for stop in (text[middle], text[middle : middle + 2], text[2 : middle + 1]):  # however it is tokenized
            for given in (stop, [stop], ["nowhere", stop], [stop, text[-1]]):
                reply = handler(ask(trial, stop=given))
                assert choice(reply) == (text[: text.index(stop)].strip(), "stop")
                if stop != text[-1]:
                    assert reply["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
        (reply,) = handler(
            {"inputs": trial.questions[0], "image": encoded(trial), "parameters": {**PARAMETERS, "stop": text[middle]}}
        )
        assert reply["generated_text"] == text[: text.index(text[middle])].strip()

    def test_what_does_not_come_does_nothing(self, handler, trial):
        whole = choice(handler(ask(trial)))
        for stop in ([], "<|im_end|>", ["\ud800"], ["nowhere"] * 4, trial.questions[0]):
            assert choice(handler(ask(trial, stop=stop))) == whole

    @pytest.mark.parametrize("stop", ["", [""], ["a"] * 5, [1], 1, True, {"a": 1}, [["a"]], ["a", None]], ids=str)
    def test_of_other_types(self, handler, trial, stop):
        with pytest.raises(ValueError, match="stop must be a string or a list of up to 4, none empty"):
            handler(ask(trial, stop=stop))


class TestSeed:
    HOT = {"temperature": 5, "top_k": 0, "max_tokens": 12}

    def test_it_repeats_an_answer_and_nothing_else_draws(self, handler, trial):
        state = torch.random.get_rng_state()
        answers = [[choice(handler(ask(trial, **self.HOT, seed=seed)))[0] for seed in range(4)] for _ in range(2)]
        assert answers[0] == answers[1] and len(set(answers[0])) == 4
        assert torch.equal(torch.random.get_rng_state(), state)
        assert len({choice(handler(ask(trial, **self.HOT)))[0] for _ in range(4)}) > 1
        assert choice(handler(ask(trial, seed=1))) == choice(handler(ask(trial, seed=-(2**63))))  # greedy

    def test_threads_do_not_disturb_it(self, handler, trial):
        wanted = choice(handler(ask(trial, **self.HOT, seed=3)))
        got = []

        def draw(seed):
            torch.rand(5)
            got.append((seed, choice(handler(ask(trial, **self.HOT, seed=seed)))))

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in (3, 4, 3, 5, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer for seed, answer in got if seed == 3] == [wanted] * 3

    def test_samples_have_the_probabilities_of_the_logits(self, module):
        logits = torch.tensor([[2.0, 0.0, -torch.inf, 1.0]])
        noise = module.AddNoise(0)
        counts = torch.zeros(4)
        for _ in range(20_000):
            counts[noise(None, logits).argmax()] += 1
        assert (counts / 20_000 - logits.softmax(-1)[0]).abs().max() < 0.015 and counts[2] == 0

    def test_sampling_takes_the_options(self, handler, trial):
        greedy = choice(handler(ask(trial)))
        for options in ({"top_k": 1}, {"top_p": 0}, {"temperature": 0.01}):
            assert choice(handler(ask(trial, **{"temperature": 50, "seed": 1, **options}))) == greedy
        assert choice(handler(ask(trial, **{**self.HOT, "seed": 1, "do_sample": True, "temperature": 0}))) == greedy

    @pytest.mark.parametrize("seed", [1.5, "1", True, [1], 2**63, float("nan"), float("inf"), {}], ids=str)
    def test_of_other_types(self, handler, trial, seed):
        with pytest.raises(ValueError, match="seed must be an integer from"):
            handler(ask(trial, seed=seed))


class TestOddRequests:
    DEEP = json.loads("[" * 900 + "]" * 900)
    LIMIT = 1000  # characters of an error

    @pytest.mark.parametrize(
        "change",
        [
            *({"messages": value} for value in ([], {}, "a", 1, [None], [1], [[]], [{}], [[{}]], {"role": "user"})),
            *({"messages": [{"role": role, "content": "?"}]} for role in (None, 1, [], {}, "User", "tool", "\ud800")),
            *({"messages": [{"role": "user", "content": value}]} for value in (1, {}, [1], [None], [[]], [{}], True)),
            *({"messages": [{"role": role, "content": "a"}]} for role in ("system", "assistant")),  # no question
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            {"messages": [{"role": "user", "content": [{"type": [], "text": "a"}]}]},
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": [1]}]}]},
            {"messages": [{"role": "user", "content": [{"type": "image", "image": {"a": 1}}]}]},
            {"messages": [{"role": "user", "content": "?"}] * 1001},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1000}]},
            *({"model": value} for value in (1, ["a"], {"a": 1}, "\ud800")),
            *({"max_tokens": value} for value in ("5", [5], {}, True, 0.5, float("nan"), float("inf"), -(10**400))),
            *({name: 10**9} for name in ("max_crops", "num_tokens", "max_tokens", "temperature", "top_p")),
            *({name: "x" * 10**6} for name in ("max_crops", "num_tokens", "do_sample", "n", "stop_", "temperature")),
            *({name: 1 << 20_000} for name in ("max_crops", "num_tokens", "seed", "n")),
            {"x" * 10**6: 1},
            {"\ud800": 1},
            {7: 1, None: 2, ("a",): 3},
            {f"name {index}": 1 for index in range(10_000)},
            {"parameters": [1]},
        ],
        ids=lambda change: reprlib.repr({name: type(value).__name__ for name, value in change.items()}),
    )
    def test_they_are_value_errors_in_few_words(self, handler, trial, change):
        with pytest.raises(ValueError) as raised:
            handler({**ask(trial), **change})
        assert len(str(raised.value).encode()) < self.LIMIT

    @pytest.mark.parametrize(
        "place",
        [
            *("messages", "inputs", "question", "image", "parameters", "max_tokens", "max_completion_tokens", "stop"),
            *(
                "n",
                "tools",
                "model",
                "role",
                "content",
                "type",
                "text",
                "image_url",
                "tool_calls",
                "seed",
                "do_sample",
            ),
        ],
    )
    def test_deep_ones(self, handler, trial, place):
        for value in (self.DEEP, {"a": self.DEEP}, [{"role": "user", "content": self.DEEP}]):
            part = {"type": "text", "text": "?"}
            message = {"role": "user", "content": [part]}
            request = {"messages": [message]}
            if place in ("type", "text", "image_url"):
                part[place] = value
            elif place in ("role", "content", "tool_calls"):
                message[place] = value
            elif place in ("question", "image", "inputs"):
                request = {"question": "?", "image": encoded(trial), "inputs": json.loads(json.dumps(value))}
                request[place] = value
                if place == "image":
                    request["inputs"] = json.loads(json.dumps(value))  # equal, which takes deep recursion to find
            else:
                request |= {place: value}
                if place == "max_tokens":
                    request["max_completion_tokens"] = json.loads(json.dumps(value))
            with pytest.raises(ValueError) as raised:
                handler(request)
            assert len(str(raised.value).encode()) < self.LIMIT

    def test_integral_numbers(self, handler, trial):
        """JSON's 3.0 is 3."""
        wanted = handler(ask(trial, max_tokens=3, max_crops=1, num_tokens=30, seed=2, temperature=1))
        reply = handler(ask(trial, max_tokens=3.0, max_crops=1.0, num_tokens=30.0, seed=2.0, temperature=1.0))
        assert choice(reply) == choice(wanted) and reply["usage"] == wanted["usage"]

    def test_the_text_is_checked_before_an_image_is_opened(self, handler, trial, monkeypatch):
        monkeypatch.setattr(handler, "open_image", None)
        for question in ("a<image>", "word " * 3000):
            with pytest.raises(ValueError, match="special token|shorten the text"):
                handler({"inputs": question, "image": encoded(trial)})


class TestImages:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("anything,IMAGE", "can't be read as base64"),
            ("image/png;base64,IMAGE", "can't be read as base64"),
            ("data:image/png,IMAGE", "a data URI must be data:<type>;base64,<text>"),
            ("data:image/png;base64 IMAGE", "a data URI must be"),
            ("data:image/png;base64,IMAGE,IMAGE", "can't be read as base64"),
            ("data:image/png;base64,file:///etc/hostname", "can't be read as base64"),
            ("file:///etc/hostname", "can't be read as base64"),
            ("HTTPS://example.com/a,IMAGE", "fetches no URLs"),
            ("ftp://example.com/a.png", "can't be read as base64"),
            ("\ud800IMAGE", "it has other characters"),
            ("\0IMAGE", "can't be read as base64"),
            ("IMAGE*", "can't be read as base64"),
            ("", "an image of 0 bytes is not an image"),
        ],
    )
    def test_base64_or_a_data_uri(self, handler, trial, text, message):
        text = text.replace("IMAGE", encoded(trial).rstrip("="))
        with pytest.raises(ValueError, match=message):
            handler({"inputs": "What?", "image": text})

    def test_spaces_and_capitals(self, handler, trial):
        lines = base64.encodebytes(trial.pictures[0].read_bytes()).decode()
        for text in (lines, f" DATA:image/JPEG;name=a;BASE64,{lines}", f"data:;base64,{lines}"):
            assert handler._open(text).size == Image.open(trial.pictures[0]).size

    def test_spaces_cost_no_memory(self, handler):
        """A list of the words between them would take many times the memory."""
        text = "A " * 2_000_000
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="not an image"):
                handler._open(text)
            assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
        finally:
            tracemalloc.stop()

    def test_bytes_of_all_are_counted_before_any_is_read(self, handler, module, monkeypatch):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1000)
        monkeypatch.setattr(module, "MAX_BYTES", 2000)
        monkeypatch.setattr(handler, "open_image", None)
        for image in (b"a" * 900, "a" * 1200):
            parts = [{"type": "image", "image": image}] * 3
            with pytest.raises(ValueError, match="images may have 2000 bytes in all, got 2700: resize them"):
                handler({"messages": [{"role": "user", "content": parts}]})
        with pytest.raises(ValueError, match="an image may have 1000 bytes, got 1200"):
            handler({"inputs": "What?", "image": b"a" * 1200})

    def test_pixels_of_decoded_images_are_counted(self, handler, monkeypatch):
        """An endpoint may have opened the pictures already. None is decoded."""
        monkeypatch.setattr(handler, "load_image", None)
        content = io.BytesIO()
        Image.new("1", (8000, 8000)).save(content, "PNG")
        images = [Image.open(content), Image.new("1", (8000, 8000))]
        content = [{"type": "image", "image": image} for image in images]
        with pytest.raises(ValueError, match="may have 100000000 pixels in all, got 128000000"):
            handler({"messages": [{"role": "user", "content": content}]})
        assert images[0].fp is not None  # it was not decoded
