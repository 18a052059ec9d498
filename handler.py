"""
For Hugging Face's Inference Endpoints, which find this file in a model folder and call `EndpointHandler(path)(data)`.

    {"inputs": "What is it?", "image": ...}               -> [{"generated_text": "..."}]
    {"inputs": {"question": "What is it?", "image": ...}} -> [{"answer": "...", "score": 0.9}]
    {"question": "What is it?", "image": ...}             -> [{"answer": "...", "score": 0.9}]
    {"messages": [...]}                                   -> {"object": "chat.completion", "choices": [...], ...}

An image is base64 text, a data URI or a URL; `parameters` may hold `OPTIONS`. Anything else is a ValueError, which an
endpoint answers with status 400 and `{"error": "..."}`.

URLs are fetched only with the environment variable `ALLOW_IMAGE_URLS=1`, and never from addresses that are not public.
"""

import base64
import http.client
import importlib
import io
import ipaddress
import os
import socket
import ssl
import time
import uuid
from urllib.parse import urljoin, urlsplit

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


KNOBS = ("max_crops", "num_tokens")
OPTIONS = (*KNOBS, "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
# OpenAI's names, and what its clients send that changes nothing here.
CHAT_OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
IGNORED = {"model", "user", "stream", "id"}
MAX_NEW_TOKENS = 200  # unless asked for otherwise
MAX_IMAGE_BYTES = 32 * 2**20
FETCH_SECONDS = 20  # of all redirects together
MAX_REDIRECTS = 5
CACHE_BYTES = 256 * 2**20


class EndpointHandler:
    def __init__(self, path: str = ""):
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype="auto")
        self.model = model.to(device).eval()
        code = importlib.import_module(type(self.processor).__module__)
        self.load_image, self.cache = code.load_image, code.FeatureCache(CACHE_BYTES)

    def __call__(self, data: dict) -> list[dict] | dict:
        """
        Answer a request.

        Raises:
            ValueError: if the request is none of those above, an option is unknown or out of range, or an image can't
                be read or may not be fetched.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a request must be an object, got {type(data).__name__}")
        inputs = data.get("inputs")
        if "messages" in data or isinstance(inputs, list):
            return self._chat(data)
        if isinstance(inputs, dict):
            if "messages" in inputs:
                return self._chat({**data, **inputs})
            return self._answer(inputs, data)
        if "question" in data:  # the hub's client then sends the image as inputs, too
            return self._answer(data, data)
        if isinstance(inputs, str) and "image" in data:
            reply, _ = self._generate(self._ask(inputs, data["image"]), data.get("parameters"))
            return [{"generated_text": reply}]
        raise ValueError(
            "pass a question as inputs and an image, or {question, image} as inputs or by themselves, or messages; "
            f"got {', '.join(sorted(map(str, data))) or 'nothing'}"
        )

    def _answer(self, asked: dict, data: dict) -> list[dict]:
        question = asked.get("question", asked.get("text"))
        if not isinstance(question, str) or "image" not in asked:
            raise ValueError(f"pass a question (a string) and an image, got {', '.join(sorted(map(str, asked)))}")
        reply, outcome = self._generate(self._ask(question, asked["image"]), data.get("parameters"))
        return [{"answer": reply, "score": outcome["probability"]}]

    def _chat(self, data: dict) -> dict:
        messages = data.get("messages", data.get("inputs"))
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be a list of objects with role and content")
        if data.get("stream"):
            raise ValueError("an endpoint's handler can't stream: pass stream=false, or run `transformers serve`")
        rest = {name: value for name, value in data.items() if name not in {"messages", "inputs", "parameters"}}
        options = {
            CHAT_OPTIONS.get(name, name): value
            for name, value in {**rest, **self._parameters(data.get("parameters"))}.items()
            if value is not None and name not in IGNORED
        }
        conversation = [{**message, "content": self._content(message.get("content"))} for message in messages]
        reply, outcome = self._generate(conversation, options)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": data.get("model") or self.model.config.model_type,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply},
                    "finish_reason": outcome["finish_reason"],
                    "logprobs": None,
                }
            ],
            "usage": outcome["usage"],
        }

    def _ask(self, question: str, image) -> list[dict]:
        content = [{"type": "image", "image": self._read(image)}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def _content(self, content) -> list[dict] | str:
        """A message's content with its images loaded. A part may name no file: it would be read here."""
        if not isinstance(content, list):
            return content
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                image = part.get("image_url")
                parts.append(
                    {"type": "image", "image": self._read(image.get("url") if isinstance(image, dict) else image)}
                )
            elif kind == "image":
                source = next((part[name] for name in ("image", "url", "base64") if name in part), None)
                parts.append({"type": "image", "image": self._read(source)})
            else:
                parts.append(part)
        return parts

    def _read(self, image):
        """An RGB image of base64 text, a data URI, a URL, or what the endpoint decoded."""
        if not isinstance(image, str):
            if isinstance(image, bytes) or hasattr(image, "getpixel"):  # a picture sent as such
                return self.load_image(image)
            raise ValueError(f"an image must be base64 text, a data URI or a URL, got {type(image).__name__}")
        if image.lower().startswith(("http://", "https://")):
            if os.environ.get("ALLOW_IMAGE_URLS") != "1":
                raise ValueError("this endpoint fetches no URLs (ALLOW_IMAGE_URLS=1 would): send the image as base64")
            return self.load_image(fetch(image))
        if len(image) > MAX_IMAGE_BYTES * 4 // 3 + 100:
            raise ValueError(f"an image may have {MAX_IMAGE_BYTES} bytes, got {len(image) * 3 // 4}: resize it")
        header, comma, text = image.partition(",")
        try:
            return self.load_image(base64.b64decode("".join((text if comma else header).split()), validate=True))
        except ValueError as error:
            raise ValueError(f"the image can't be read as base64 of an image ({error})") from None

    @staticmethod
    def _parameters(parameters) -> dict:
        if not isinstance(parameters or {}, dict):
            raise ValueError(f"parameters must be an object, got {type(parameters).__name__}")
        return parameters or {}

    def _generate(self, conversation: list[dict], parameters) -> tuple[str, dict]:
        options = {name: value for name, value in self._parameters(parameters).items() if value is not None}
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise ValueError(f"unknown parameters {', '.join(unknown)}: there are {', '.join(OPTIONS)}")
        for name, value in options.items():
            kind = bool if name == "do_sample" else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(
                    f"{name} must be {'true or false' if kind is bool else 'a number'}, got {value!r:.100}"
                )
        knobs = {name: options.pop(name) for name in KNOBS if name in options}
        if options.get("temperature") == 0:  # as OpenAI's clients ask for the likeliest answer
            del options["temperature"]
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": "temperature" in options, **options}

        parts = [part for turn in conversation if isinstance(turn["content"], list) for part in turn["content"]]
        images = [part["image"] for part in parts if isinstance(part, dict) and "image" in part]
        limit = self.model.config.text_config.max_position_embeddings
        plans = [self.processor.image_processor.plan(*image.size, **knobs) for image in images]
        if (tokens := sum(crop.num_tokens for plan in plans for crop in plan)) >= limit:  # before any is encoded
            raise ValueError(
                f"{len(images)} images have {tokens} tokens, the context {limit}: pass fewer, or num_tokens="
                f"{limit // (len(images) + 1)}"
            )
        inputs = self.processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"model": self.model, "feature_cache": self.cache, **knobs},
        )
        prompt_length = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        new_ids = output.sequences[0, prompt_length:]
        logprobs = [logits[0].float().log_softmax(-1)[id].item() for logits, id in zip(output.logits, new_ids)]
        eos = self.model.generation_config.eos_token_id  # one id, or several
        stopped = bool(len(new_ids)) and new_ids[-1].item() in (eos if isinstance(eos, list) else [eos])
        prompt_tokens = prompt_length - len(images) + tokens
        return self.processor.decode(new_ids, skip_special_tokens=True).strip(), {
            "probability": float(torch.tensor(logprobs).sum().exp()),
            "finish_reason": "stop" if stopped else "length",
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(new_ids),
                "total_tokens": prompt_tokens + len(new_ids),
            },
        }


def fetch(url: str) -> bytes:
    """
    The bytes behind a URL of a public address, which is looked up once and then connected to as it was checked.

    Raises:
        ValueError: if an address is not public, redirects or seconds are too many, or it holds too many bytes.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url[:200]} is no http(s) URL")
        try:
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            connection = http.client.HTTPConnection(parts.hostname, port, timeout=_seconds_left(deadline))
            stream = connection.sock = _connect(parts.hostname, port, parts.scheme == "https", deadline)
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"User-Agent": "mc-llava"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status != 200:
                    raise ValueError(f"{url[:200]} answered {response.status} {response.reason}")
                content = io.BytesIO()
                while chunk := response.read1(2**16):
                    content.write(chunk)
                    if content.tell() > MAX_IMAGE_BYTES:
                        raise ValueError(f"{url[:200]} holds more than {MAX_IMAGE_BYTES} bytes: resize the image")
                    stream.settimeout(_seconds_left(deadline))
                return content.getvalue()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url[:200]} can't be fetched: {error}") from error
    raise ValueError(f"{url[:200]} was redirected more than {MAX_REDIRECTS} times")


def _connect(host: str, port: int, is_encrypted: bool, deadline: float) -> socket.socket:
    addresses = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        if not ip.is_global or ip.is_multicast:
            raise ValueError(f"{host} is {address}, which is not a public address: images come from public ones only")
    connection = socket.create_connection((addresses[0], port), timeout=_seconds_left(deadline))
    if not is_encrypted:
        return connection
    return ssl.create_default_context().wrap_socket(connection, server_hostname=host)


def _seconds_left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise ValueError(f"fetching took longer than {FETCH_SECONDS} s")
    return left
