"""
Handler for Hugging Face's Inference Endpoints, which load this file and call `EndpointHandler(path)(data)`.

    {"inputs": "What is it?", "image": ...}               -> [{"generated_text": "..."}]
    {"inputs": {"question": "What is it?", "image": ...}} -> [{"answer": "...", "score": 0.9}]
    {"inputs": {"messages": [...]}}                       -> {"object": "chat.completion", "choices": [...], ...}

The contents of `inputs` may also be at the top level, with or without `inputs`. Endpoints, however, pass on only
requests with `inputs`, and leave the image to this file only with the task "custom". An image is base64 text or a data
URI; `parameters` may hold `OPTIONS`. Anything else raises a ValueError, which an endpoint answers with status 400 and
`{"error": "..."}`. URLs are not fetched, because a safe HTTP client does not belong in a model repository.
"""

import base64
import io
import time
import uuid

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


KNOBS = ("max_crops", "num_tokens")
# Type, minimum and maximum.
NUMBERS = {
    "max_new_tokens": (int, 1, 10**6),
    "temperature": (float, 0.01, 100),  # or 0, for greedy decoding
    "top_k": (int, 0, 10**6),
    "top_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
}
OPTIONS = (*KNOBS, "do_sample", *NUMBERS)
# OpenAI's names, and names that its clients send and that have no effect here.
CHAT_OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
IGNORED = {"model", "user", "stream", "id"}
MAX_NEW_TOKENS = 200  # by default
# Limits of one request:
MAX_TEXT = 100_000  # characters
MAX_IMAGES = 16
MAX_PIXELS = 100_000_000  # of all images together
MAX_IMAGE_BYTES = 32 * 2**20  # of each
CACHE_BYTES = 256 * 2**20


class EndpointHandler:
    """
    Loads a model folder and answers requests, on an accelerator if there is one.

    Args:
        path: the model folder.
    """

    def __init__(self, path: str = ""):
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        options = {"trust_remote_code": True, "dtype": "auto", "use_safetensors": True}
        self.model = AutoModelForImageTextToText.from_pretrained(path, **options).to(device).eval()
        self.cache = get_class_from_dynamic_module("encoded_images_mc_llava.FeatureCache", path)(CACHE_BYTES)
        self.load_image, self.open_image = (
            get_class_from_dynamic_module(f"image_loading_mc_llava.{name}", path)
            for name in ("load_image", "open_image")
        )

    def __call__(self, data: dict) -> list[dict] | dict:
        """
        Answer a request in one of the forms above.

        Raises:
            ValueError: if the request has none of these forms or exceeds a limit, a name is unknown, an option is
                unknown or out of range, or an image can't be read.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a request must be an object, got {type(data).__name__}")
        if isinstance(inputs := data.get("inputs"), dict):
            rest = {name: value for name, value in data.items() if name != "inputs"}
            parameters = {**self._parameters(data), **self._parameters(inputs)}
            data = {**rest, **inputs, "parameters": parameters}
        inputs = data.get("inputs")
        if "messages" in data or isinstance(inputs, list):
            return self._chat(data)
        if "question" in data or ("text" in data and inputs is None):
            return self._answer(data)
        if isinstance(inputs, str) and "image" in data:
            check_names(data, {"inputs", "image", "parameters"})
            reply, _ = self._generate(self._ask(inputs, data["image"]), self._parameters(data))
            return [{"generated_text": reply}]
        raise ValueError(
            "pass a question as inputs and an image, or {question, image} or {messages} as inputs; "
            f"got {', '.join(sorted(map(str, data))) or 'nothing'}"
        )

    def _answer(self, data: dict) -> list[dict]:
        check_names(data, {"question", "text", "image", "inputs", "parameters"})
        question, image = data.get("question", data.get("text")), data.get("image")
        if not isinstance(question, str) or image is None:
            raise ValueError(f"pass a question (a string) and an image, got {', '.join(sorted(data))}")
        if data.get("inputs", image) != image:  # the Hub's client also sends the image as inputs
            raise ValueError("inputs must be the image if a question is given: leave them out")
        parameters = dict(self._parameters(data))
        if parameters.pop("top_k", None) not in (None, 1):  # the Hub's client means the number of answers
            raise ValueError("top_k is the number of answers to return here, and there is only one: leave it out")
        reply, outcome = self._generate(self._ask(question, image), parameters)
        return [{"answer": reply, "score": outcome["probability"]}]

    def _chat(self, data: dict) -> dict:
        if data.get("messages") is not None and data.get("inputs"):
            raise ValueError("pass either messages or inputs, not both")
        messages = data.get("messages", data.get("inputs"))
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be a list of objects with role and content")
        if data.get("stream"):
            raise ValueError("an endpoint's handler can't stream: pass stream=false, or run `transformers serve`")
        options = {}
        for name, value in (*data.items(), *self._parameters(data).items()):
            if value is not None and name not in {"messages", "inputs", "parameters", *IGNORED}:
                name = CHAT_OPTIONS.get(name, name)
                if name in options and options[name] != value:
                    raise ValueError(f"{name} is given twice, as {options[name]!r:.100} and {value!r:.100}")
                options[name] = value
        conversation = [self._message(message) for message in messages]
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
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]

    def _message(self, message: dict) -> dict:
        check_names({name for name, value in message.items() if value is not None}, {"role", "content"})
        content = message.get("content")
        if isinstance(content, list):
            content = [self._part(part) for part in content]
        return {"role": message.get("role"), "content": content}

    def _part(self, part):
        """A part of a message in the processor's form. It can't name a file, which would be read from this machine."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            check_names(part, {"type", "image_url"})
            source = part.get("image_url")
            if isinstance(source, dict):
                check_names(source, {"url", "detail"})
                source = source.get("url")
            return {"type": "image", "image": source}
        if kind == "image":
            check_names(part, {"type", "image", "url", "base64"})
            sources = [part[name] for name in part if name != "type"]
            if len(sources) != 1:
                raise ValueError(f"an image part must have one of image, url and base64, got {len(sources)} of them")
            return {"type": "image", "image": sources[0]}
        if kind == "text":
            check_names(part, {"type", "text"})
        return part

    def _load(self, conversation: list[dict]) -> list[Image.Image]:
        """Replace the images of a request by RGB pictures. None is decoded before the sizes of all are checked."""
        contents = [turn["content"] for turn in conversation]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        parts = [part for part in parts if isinstance(part, dict)]
        texts = [content for content in contents if isinstance(content, str)]
        texts += [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if (length := sum(map(len, texts))) > MAX_TEXT:
            raise ValueError(f"a request may have {MAX_TEXT} characters of text, got {length}: shorten it")
        parts = [part for part in parts if part.get("type") == "image"]
        if len(parts) > MAX_IMAGES:
            raise ValueError(f"a request may have {MAX_IMAGES} images, got {len(parts)}: pass fewer")
        opened = [self._open(part["image"]) for part in parts]
        if (pixels := sum(image.width * image.height for image in opened)) > MAX_PIXELS:
            raise ValueError(f"a request's images may have {MAX_PIXELS} pixels in all, got {pixels}: resize them")
        for part, image in zip(parts, opened):
            part["image"] = self.load_image(image)
        return [part["image"] for part in parts]

    def _open(self, image) -> Image.Image:
        """Open base64 text, a data URI or an image that the endpoint decoded. Only the header is read."""
        if hasattr(image, "getpixel"):
            return image
        if isinstance(image, bytes):
            content = image
        elif not isinstance(image, str):
            raise ValueError(f"an image must be base64 text or a data URI, got {type(image).__name__}")
        elif image.lower().startswith(("http://", "https://")):
            raise ValueError("this endpoint fetches no URLs: send the picture's bytes as base64")
        else:
            if len(image) > MAX_IMAGE_BYTES * 4 // 3 + 100:
                raise ValueError(f"an image may have {MAX_IMAGE_BYTES} bytes, got {len(image) * 3 // 4}: resize it")
            header, comma, text = image.partition(",")
            try:
                content = base64.b64decode("".join((text if comma else header).split()), validate=True)
            except ValueError as error:
                raise ValueError(f"the image can't be read as base64 ({error}): encode its file") from None
        return self.open_image(io.BytesIO(content), f"an image of {len(content)} bytes")

    @staticmethod
    def _parameters(data: dict) -> dict:
        parameters = data.get("parameters")
        if not isinstance(parameters, (dict, type(None))):
            raise ValueError(f"parameters must be an object, got {type(parameters).__name__}")
        return parameters or {}

    def _generate(self, conversation: list[dict], parameters: dict) -> tuple[str, dict]:
        options = {name: value for name, value in parameters.items() if value is not None}
        check_names(options, set(OPTIONS))
        if options.get("temperature") == 0:  # how OpenAI's clients ask for greedy decoding
            del options["temperature"]
        if not isinstance(options.get("do_sample", False), bool):
            raise ValueError(f"do_sample must be true or false, got {options['do_sample']!r:.100}")
        for name in NUMBERS.keys() & options.keys():
            value, (kind, low, high) = options[name], NUMBERS[name]
            accepted = int if kind is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, accepted) or not low <= value <= high:
                number = "an integer" if kind is int else "a number"
                raise ValueError(f"{name} must be {number} from {low} to {high}, got {value!r:.100}")
            options[name] = kind(value)
        knobs = {name: options.pop(name) for name in KNOBS if name in options}
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": "temperature" in options, **options}

        images = self._load(conversation)
        limit = self.model.config.text_config.max_position_embeddings
        plans = [self.processor.image_processor.plan(*image.size, **knobs) for image in images]
        if (tokens := sum(crop.num_tokens for plan in plans for crop in plan)) >= limit:  # before any is encoded
            raise ValueError(
                f"{len(images)} images have {tokens} tokens, the context {limit}: pass fewer, or num_tokens="
                f"{limit // (len(images) + 1)}"
            )
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = self.processor.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        prompt_length = inputs["input_ids"].shape[1]
        if prompt_length >= limit:
            raise ValueError(f"the text has {prompt_length} tokens, the context {limit}: shorten the text")
        encoded = self.cache.encode(self.model, self.processor.image_processor, images, plans=plans)
        output = self.model.generate(
            **inputs,
            image_features=[image.features for image in encoded],
            **options,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new_ids = output.sequences[0, prompt_length:]
        logprobs = [logits[0].float().log_softmax(-1)[id].item() for logits, id in zip(output.logits, new_ids)]
        eos = self.model.generation_config.eos_token_id  # one id, or several
        stopped = bool(len(new_ids)) and new_ids[-1].item() in (eos if isinstance(eos, list) else [eos])
        prompt_tokens = prompt_length - len(encoded) + sum(len(image.features) for image in encoded)
        return self.processor.decode(new_ids, skip_special_tokens=True).strip(), {
            "probability": float(torch.tensor(logprobs).sum().exp()),
            "finish_reason": "stop" if stopped else "length",
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(new_ids),
                "total_tokens": prompt_tokens + len(new_ids),
            },
        }


def check_names(given, known: set[str]):
    """Raise a ValueError for names that are not known."""
    if unknown := sorted(str(name) for name in set(given) - known):
        raise ValueError(f"unknown {', '.join(unknown)}: there are {', '.join(sorted(known))}")
