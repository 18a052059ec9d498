"""
Odd requests to the handler: valid ones, changed at random. Each is answered or gets a short ValueError, quickly and in
bounded memory. `FUZZ_SEED` chooses other requests, `FUZZ_COUNT` how many. `make_request(seed, index)` reproduces one.
"""

import base64
import copy
import io
import json
import os
import random
import reprlib
import resource
import sys
import time
from functools import lru_cache

import pytest
from helpers import load_handler, picture
from PIL import Image


pytestmark = [pytest.mark.slow, pytest.mark.fuzz]

SEED = int(os.environ.get("FUZZ_SEED", "0"))
COUNT = int(os.environ.get("FUZZ_COUNT", "2000"))
SECONDS = 20  # of a request, on a busy machine
MEMORY = 2**30  # bytes more than at the start
ERROR_LENGTH = 1000

OPTIONS = [
    *(
        "max_crops",
        "num_tokens",
        "max_new_tokens",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_k",
        "top_p",
    ),
    *(
        "repetition_penalty",
        "do_sample",
        "seed",
        "stop",
        "n",
        "stream",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
    ),
    *("functions", "function_call", "response_format", "logit_bias", "presence_penalty", "frequency_penalty", "user"),
    *("model", "metadata", "store", "stream_options", "modalities", "parallel_tool_calls", "service_tier", "id"),
]
KEYS = [
    *OPTIONS,
    *("inputs", "messages", "question", "text", "image", "parameters", "role", "content", "type", "url", "base64"),
    *(
        "image_url",
        "detail",
        "name",
        "refusal",
        "annotations",
        "audio",
        "tool_calls",
        "path",
        "foo",
        "",
        "\0",
        "\ud800",
    ),
    *("__class__", "x" * 5000),
]


def nested(depth: int, is_dict: bool):
    value = 1
    for _ in range(depth):
        value = {"a": value} if is_dict else [value]
    return value


# A function makes a new value each time: requests are changed in place.
ODD_VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 7, 2**31, 2**63, 10**400, 1 << 20_000, 0.5, 1.0, 2.0, -0.0, 1e308, 1e-308),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "1", "true", "\0", "\ud800", "é", "\u202e", "😀", " "),
    *("<image>", "<|im_end|>", "<|im_start|>user", "<|endoftext|>", "{{ 1 }}", "{% raw %}", "%s", "auto", "none"),
    *("user", "assistant", "system", "tool", "text", "image", "image_url", "/etc/passwd", "file:///etc/passwd"),
    *("http://127.0.0.1:1/a.png", "data:", "data:,", "data:image/png;base64,", "../a", "word " * 1000, "x" * 100_001),
    *(("a",), b"", b"a", object(), 1j, list, dict, set, lambda: [[]], lambda: [None], lambda: [1, 2], lambda: ["a"]),
    *(lambda: ["a"] * 5, lambda: [[["a"]]], lambda: {"a": 1}, lambda: {1: 2}, lambda: {"url": None}),
    *(lambda: {"type": "text"}, lambda: {"type": "text", "text": "a"}, lambda: {"role": "user", "content": "a"}),
    *(lambda: [None] * 2000, lambda: ["a" * 100] * 500, lambda: {str(index): index for index in range(2000)}),
    *(lambda: nested(5, True), lambda: nested(900, False), lambda: nested(900, True), lambda: nested(20_000, False)),
]


def odd_value(rng: random.Random):
    value = odd_image(rng) if rng.random() < 0.1 else rng.choice(ODD_VALUES)
    return value() if callable(value) else value


@lru_cache
def encode(mode: str, size: tuple[int, int], kind: str) -> bytes:
    """A file, or nothing if the format doesn't have this mode or size."""
    content = io.BytesIO()
    try:
        draw(mode, size).save(content, kind)
    except (OSError, ValueError):
        return b""
    return content.getvalue()


def draw(mode: str, size: tuple[int, int]) -> Image.Image:
    image = Image.new("1", size) if size[0] * size[1] > 10**6 else picture(*size)
    return image.convert("I").convert(mode) if mode == "I;16" else image.convert("RGB").convert(mode)


def odd_image(rng: random.Random):
    """A picture as an endpoint gets it: base64 text or a data URI, often broken, or a decoded picture."""
    mode = rng.choice(["RGB", "RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK"])
    size = rng.choice([(1, 1), (1, 900), (40, 30), (40, 30), (150, 100), (20_001, 1)])
    if rng.random() < 0.01:
        size = (4000, 3000)
    if rng.random() < 0.15:
        return draw(mode, size)
    octets = bytearray(
        encode(mode, size, rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "PPM", "TGA"]))
    )
    octets = octets or bytearray(encode("RGB", (40, 30), "PNG"))
    for _ in range(rng.choice([0, 0, 0, 1, 10])):
        octets[rng.randrange(min(len(octets), rng.choice([64, 10**9])))] = rng.randrange(256)
    octets = octets[: rng.choice([len(octets)] * 3 + [rng.randrange(len(octets) + 1), 100])]
    if rng.random() < 0.1:
        return bytes(octets)
    text = base64.b64encode(octets).decode()
    if rng.random() < 0.2:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(["\n", " ", ",", "=", "*", "\0", "é", "\ud800", "-_"]) + text[place:]
    plain = ["", "data:image/png;base64,", "DATA:;BASE64,"]
    header = rng.choice([*plain, *plain, "data:image/png,", "image/png;base64,", "a,"])
    return header + text


def valid_request(rng: random.Random) -> dict:
    def part(kind: str):
        image = odd_image(rng)
        if kind == "image_url":
            return {"type": kind, kind: rng.choice([image, {"url": image}, {"url": image, "detail": "low"}])}
        return {"type": "image", rng.choice(["image", "url", "base64"]): image}

    options = {"num_tokens": rng.choice([1, 9, 20.0]), "max_crops": rng.choice([0, 0, 1, 3])}
    if rng.random() < 0.3:
        options |= {"temperature": rng.choice([0, 0.7, 1, 2]), "seed": rng.randrange(-5, 5), "stop": [".", "b"]}
    if rng.random() < 0.2:
        options |= {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}}
    form = rng.choice(["question", "inputs", "messages", "messages"])
    if form == "messages":
        text = {"type": "text", "text": "What is it?"}
        images = [part(rng.choice(["image", "image_url"])) for _ in range(rng.choice([0, 1, 1, 2, 17]))]
        turns = [{"role": "user", "content": [*images, text]}]
        if rng.random() < 0.3:
            turns += [{"role": "assistant", "content": "It is", "annotations": [], "refusal": None}]
        if rng.random() < 0.2:
            turns += [{"role": "user", "content": "And?"}]
        return {"messages": turns, "max_tokens": 2, "model": "a", **options}
    options = {name: options[name] for name in options if name not in ("n", "tools", "logprobs", "response_format")}
    parameters = {**options, "max_new_tokens": 2}
    if form == "question":
        return {"question": "What is it?", "image": odd_image(rng), "parameters": parameters}
    return {"inputs": "What is it?", "image": odd_image(rng), "parameters": parameters}


def change(rng: random.Random, request):
    """Replace, remove or add one value, at any depth."""
    holders, rest = [], [request]
    while rest and len(holders) < 100:
        value = rest.pop()
        if isinstance(value, (dict, list)):
            holders.append(value)
            rest += value.values() if isinstance(value, dict) else value
    holder = rng.choice(holders)
    places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    what = rng.random()
    if what < 0.55 and places:
        holder[rng.choice(places)] = odd_value(rng)
    elif what < 0.7 and places:
        del holder[rng.choice(places)]
    elif isinstance(holder, dict):
        holder[rng.choice([*KEYS, 1, None, ("a",)])] = odd_value(rng)
    else:
        holder.extend(rng.choice([[odd_value(rng)], copy.copy(holder) * rng.choice([1, 20])]))


def make_request(seed: int, index: int):
    rng = random.Random(f"{seed} {index}")
    request = valid_request(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 1, 1, 2, 3])):
        change(rng, request)
    if rng.random() < 0.3:  # as endpoints pass it on
        request = {"inputs": request}
    return odd_value(rng) if rng.random() < 0.01 else request


def check(handler, request) -> str:
    """The kind of outcome, "answer" or the first words of an error. Raises an AssertionError for any other outcome."""
    try:
        reply = handler(request)
    except Exception as error:
        assert type(error) is ValueError, f"{type(error).__name__}: {reprlib.repr(str(error))}"
        words = str(error)
        words.encode()
        assert 0 < len(words) < ERROR_LENGTH, f"an error of {len(words)} characters: {words[:200]}"
        return " ".join(words.split()[:3])
    json.dumps(reply, ensure_ascii=False, allow_nan=False).encode()
    (entry,) = reply if isinstance(reply, list) else reply["choices"]
    assert isinstance(entry, dict)
    return "answer"


def show(request) -> str:
    try:
        return reprlib.repr(request)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a request with a large integer"


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of broken TIFFs and icons
def test_odd_requests(trial):
    handler = load_handler(trial.folder).EndpointHandler(str(trial.folder))
    content = base64.b64encode(trial.pictures[0].read_bytes()).decode()
    known = {"inputs": trial.questions[0], "image": content, "parameters": {"max_new_tokens": 24}}
    ((answer,),) = (list(reply.values()) for reply in handler(known))
    assert trial.is_right(0, answer)
    before, outcomes = peak(), {}
    for index in range(COUNT):
        request = make_request(SEED, index)
        start = time.monotonic()
        try:
            outcome = check(handler, request)
        except Exception as error:
            pytest.fail(f"FUZZ_SEED={SEED}, request {index}: {error}\n{show(request)}", pytrace=False)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        seconds, memory = time.monotonic() - start, peak() - before
        if seconds > SECONDS or memory > MEMORY:
            pytest.fail(
                f"FUZZ_SEED={SEED}, request {index}: {seconds:.1f} s, {memory / 2**20:.0f} MiB more than at the "
                f"start\n{show(request)}",
                pytrace=False,
            )
    assert handler(known)[0]["generated_text"] == answer
    print(sorted(outcomes.items(), key=lambda entry: -entry[1]), f"{(peak() - before) / 2**20:.0f} MiB")
    # Both must happen, or the requests test too little.
    assert COUNT < 100 or (outcomes["answer"] > COUNT / 20 and len(outcomes) > 15)
