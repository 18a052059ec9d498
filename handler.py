"""
Handler for Hugging Face's Inference Endpoints, which load this file and call `EndpointHandler(path)(data)`.

    {"inputs": "What is it?", "image": ...}               -> [{"generated_text": "..."}]
    {"inputs": {"question": "What is it?", "image": ...}} -> [{"answer": "...", "score": 0.9}]
    {"inputs": {"messages": [...]}}                       -> {"object": "chat.completion", "choices": [...], ...}

The contents of `inputs` may also be at the top level, with or without `inputs`. Endpoints, however, pass on only
requests with `inputs`, and leave the image to this file only with the task "custom". An image is base64 text or a data
URI; `parameters` may hold `OPTIONS`. Messages that end with the assistant's turn are continued. With `zoom`, replies
also tell where the model looked, as `looked_at`. Anything else raises a ValueError, which an endpoint answers with
status 400 and `{"error": "..."}`. URLs are not fetched, because a safe HTTP client does not belong in a model
repository.
"""

import base64
import io
import reprlib
import sys
import time
import uuid

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


KNOBS = ("max_crops", "num_tokens", "zoom")
# Type, minimum and maximum.
NUMBERS = {
    "max_crops": (int, 0, 1000),
    "num_tokens": (int, 1, 100_000),
    "zoom": (int, 0, 10),
    "max_new_tokens": (int, 1, 10**6),
    "temperature": (float, 0.01, 100),  # or 0, for greedy decoding
    "top_k": (int, 0, 10**6),
    "top_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100),
    "seed": (int, -(2**63), 2**63 - 1),
}
OPTIONS = (*NUMBERS, "do_sample", "stop")
TOP_K = 50  # by default, as in transformers
MAX_STOPS = 4  # as in OpenAI's API
# OpenAI's names for `OPTIONS`.
CHAT_OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# OpenAI's options that never change an answer here.
IGNORED = {
    "model",
    "user",
    "id",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "stream_options",
}
# OpenAI's options of which only these values, which its clients send by default, change nothing.
WITHOUT_EFFECT = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "stream": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
}
ROLES = ("system", "user", "assistant")
# Fields of a reply's message that clients send back with it. They must be empty.
ECHOED = {"annotations", "audio", "function_call", "name", "reasoning", "reasoning_content", "refusal", "tool_calls"}
MAX_NEW_TOKENS = 200  # by default
# Limits of one request:
MAX_TEXT = 100_000  # characters
MAX_PARTS = 1000  # messages and their parts
MAX_IMAGES = 16
MAX_PIXELS = 100_000_000  # of all images together
MAX_IMAGE_BYTES = 32 * 2**20  # of each
MAX_BYTES = 64 * 2**20  # of all images together
CACHE_BYTES = 256 * 2**20  # of encoded crops
PREFIX_BYTES = 2**30  # of keys and values


class EndpointHandler:
    """
    Loads a model folder and answers requests, on an accelerator if there is one. `choose_dtype` chooses the precision,
    which is printed; a model that was saved with quantized weights has its own.

    Args:
        path: the model folder.
    """

    def __init__(self, path: str = ""):
        accelerator = torch.accelerator.current_accelerator()
        device = "cpu" if accelerator is None else accelerator.type
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        dtype = get_class_from_dynamic_module("precision_mc_llava.choose_dtype", path)(device)
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        if getattr(config, "quantization_config", None):
            dtype = "auto"
        options = {"config": config, "trust_remote_code": True, "dtype": dtype, "use_safetensors": True}
        self.model = AutoModelForImageTextToText.from_pretrained(path, **options).to(device).eval()
        print(f"computing in {str(self.model.dtype).removeprefix('torch.')} on {device}", file=sys.stderr, flush=True)
        self.cache = get_class_from_dynamic_module("feature_cache_mc_llava.FeatureCache", path)(CACHE_BYTES)
        prefixes = get_class_from_dynamic_module("prefix_cache_mc_llava.PrefixCache", path)
        can_keep = get_class_from_dynamic_module("prefix_cache_mc_llava.can_keep_prefixes", path)
        self.prefixes = prefixes(PREFIX_BYTES) if can_keep(self.model) else None
        self.load_image, self.open_image = (
            get_class_from_dynamic_module(f"image_loading_mc_llava.{name}", path)
            for name in ("load_image", "open_image")
        )
        self.check_unicode = get_class_from_dynamic_module("processing_mc_llava.check_unicode", path)
        self.check_context = get_class_from_dynamic_module("generation_mc_llava.check_context", path)
        self.find_ends = get_class_from_dynamic_module("generation_mc_llava.find_ends", path)

    def __call__(self, data: dict) -> list[dict] | dict:
        """
        Answer a request in one of the forms above.

        Raises:
            ValueError: if the request has none of these forms or exceeds a limit, a name is unknown, an option is
                unknown or out of range, or an image can't be read.
        """
        try:
            return self._reply(data)
        except RecursionError:  # from comparing or printing a value
            raise ValueError("the request is nested too deeply") from None

    def _reply(self, data: dict) -> list[dict] | dict:
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
            reply, outcome = self._generate(self._ask(inputs, data["image"]), self._parameters(data))
            return [{"generated_text": reply, **outcome["zoom"]}]
        raise ValueError(
            "pass a question as inputs and an image, or {question, image} or {messages} as inputs; "
            f"got {join_names(data) or 'nothing'}"
        )

    def _answer(self, data: dict) -> list[dict]:
        check_names(data, {"question", "text", "image", "inputs", "parameters"})
        question, image = data.get("question", data.get("text")), data.get("image")
        if not isinstance(question, str) or image is None:
            raise ValueError(f"pass a question (a string) and an image, got {join_names(data)}")
        inputs = data.get("inputs", image)  # the Hub's client also sends the image as inputs
        if inputs is not image and not (isinstance(inputs, str) and isinstance(image, str) and inputs == image):
            raise ValueError("inputs must be the image if a question is given: leave them out")
        parameters = dict(self._parameters(data))
        if parameters.pop("top_k", None) not in (None, 1):  # the Hub's client means the number of answers
            raise ValueError("top_k is the number of answers to return here, and there is only one: leave it out")
        reply, outcome = self._generate(self._ask(question, image), parameters)
        return [{"answer": reply, "score": outcome["probability"], **outcome["zoom"]}]

    def _chat(self, data: dict) -> dict:
        if data.get("messages") is not None and data.get("inputs"):
            raise ValueError("pass either messages or inputs, not both")
        messages = data.get("messages", data.get("inputs"))
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be a list of objects with role and content")
        model = data.get("model") or self.model.config.model_type
        if not isinstance(model, str):
            raise ValueError(f"model must be a string, got {show(model)}")
        self.check_unicode(model, "model")  # the reply names it
        options = self._chat_options(data)
        conversation = [self._message(message) for message in messages]
        if not any(turn["role"] == "user" for turn in conversation):
            raise ValueError("messages must have a turn of the user: add the question")
        reply, outcome = self._generate(conversation, options)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply},
                    "finish_reason": outcome["finish_reason"],
                    "logprobs": None,
                }
            ],
            "usage": outcome["usage"],
            **outcome["zoom"],
        }

    def _chat_options(self, data: dict) -> dict:
        """A chat request's options under their names in `OPTIONS`, without those that have no effect."""
        options = {}
        for name, value in (*data.items(), *self._parameters(data).items()):
            if value is None or name in {"messages", "inputs", "parameters", *IGNORED}:
                continue
            if name in WITHOUT_EFFECT:
                allowed = WITHOUT_EFFECT[name]
                if not any(is_same(value, entry) for entry in allowed):
                    if name == "stream":
                        raise ValueError(
                            "an endpoint's handler can't stream: pass stream=false, or run `transformers serve`"
                        )
                    values = " or ".join(map(show, allowed))
                    raise ValueError(f"{name} must be {values} here, got {show(value)}: leave it out")
                continue
            name = CHAT_OPTIONS.get(name, name)
            if name in options and options[name] != value:
                raise ValueError(f"{name} is given twice, as {show(options[name])} and {show(value)}")
            options[name] = value
        return options

    def _ask(self, question: str, image) -> list[dict]:
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]

    def _message(self, message: dict) -> dict:
        """A message in the processor's form."""
        message = drop_empty(message)
        check_names(message, {"role", "content"})
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {show(role)}")
        content = "" if content is None else content
        if isinstance(content, list):
            content = [self._part(part) for part in content]
        elif not isinstance(content, str):
            raise ValueError(f"content must be a string or a list of parts, got {show(content)}")
        return {"role": role, "content": content}

    def _part(self, part):
        """A part of a message in the processor's form. It can't name a file, which would be read from this machine."""
        part = drop_empty(part) if isinstance(part, dict) else part
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
        if kind == "text" and isinstance(part.get("text"), str):
            check_names(part, {"type", "text"})
            return part
        raise ValueError(f"a content part must be a text with a string or an image, got {show(part)}")

    def _check_limits(self, conversation: list[dict]):
        """Raise a ValueError if a request is too large, before anything is made of its texts and images."""
        parts = [part for turn in conversation if isinstance(turn["content"], list) for part in turn["content"]]
        texts = [turn["content"] for turn in conversation if isinstance(turn["content"], str)]
        texts += [part["text"] for part in parts if part["type"] == "text"]
        if (length := sum(map(len, texts))) > MAX_TEXT:
            raise ValueError(f"a request may have {MAX_TEXT} characters of text, got {length}: shorten it")
        images = [part["image"] for part in parts if part["type"] == "image"]
        if len(images) > MAX_IMAGES:
            raise ValueError(f"a request may have {MAX_IMAGES} images, got {len(images)}: pass fewer")
        if (count := len(conversation) + len(parts)) > MAX_PARTS:
            raise ValueError(f"a request may have {MAX_PARTS} messages and parts, got {count}: pass fewer")
        sizes = [len(image) * 3 // 4 for image in images if isinstance(image, str)]  # of what base64 text encodes
        sizes += [len(image) for image in images if isinstance(image, bytes)]
        if (largest := max(sizes, default=0)) > MAX_IMAGE_BYTES + 100:  # a data URI has a header
            raise ValueError(f"an image may have {MAX_IMAGE_BYTES} bytes, got {largest}: resize it")
        if (total := sum(sizes)) > MAX_BYTES:
            raise ValueError(f"a request's images may have {MAX_BYTES} bytes in all, got {total}: resize them")

    def _load(self, conversation: list[dict]) -> list[Image.Image]:
        """Replace the images of a request by RGB pictures. None is decoded before the sizes of all are checked."""
        contents = [turn["content"] for turn in conversation if isinstance(turn["content"], list)]
        parts = [part for content in contents for part in content if part["type"] == "image"]
        opened, pixels = [], 0
        for part in parts:
            opened.append(image := self._open(part["image"]))
            if (pixels := pixels + image.width * image.height) > MAX_PIXELS:
                raise ValueError(f"a request's images may have {MAX_PIXELS} pixels in all, got {pixels}: resize them")
        for part, image in zip(parts, opened):
            part["image"] = self.load_image(image)
        return [part["image"] for part in parts]

    def _open(self, image) -> Image.Image:
        """Open base64 text, a data URI or an image that the endpoint decoded. Only the header is read."""
        if isinstance(image, Image.Image):
            return image
        if isinstance(image, str):
            image = decode_base64(image)
        elif not isinstance(image, bytes):
            raise ValueError(f"an image must be base64 text or a data URI, got {type(image).__name__}")
        return self.open_image(io.BytesIO(image), f"an image of {len(image)} bytes")

    @staticmethod
    def _parameters(data: dict) -> dict:
        parameters = data.get("parameters")
        if not isinstance(parameters, (dict, type(None))):
            raise ValueError(f"parameters must be an object, got {type(parameters).__name__}")
        return parameters or {}

    def _check_options(self, parameters: dict) -> dict:
        """The options with numbers of their types and `stop` as a list of strings, without those that are None."""
        options = {name: value for name, value in parameters.items() if value is not None}
        check_names(options, set(OPTIONS))
        if not isinstance(options.get("do_sample", False), bool):
            raise ValueError(f"do_sample must be true or false, got {show(options['do_sample'])}")
        if is_same(options.get("temperature"), 0):  # how OpenAI's clients ask for greedy decoding
            del options["temperature"]
            options["do_sample"] = False
        for name in NUMBERS.keys() & options.keys():
            options[name] = to_number(name, options[name], *NUMBERS[name])
        stops = options.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
        if not is_list or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must be a string or a list of up to {MAX_STOPS}, none empty, got {show(stops)}")
        return {**options, "stop": stops}

    def _read_options(self, parameters: dict) -> tuple[dict, list[str], dict]:
        """The knobs, the stop texts, and the options of `generate`."""
        options = self._check_options(parameters)
        knobs = {name: options.pop(name) for name in KNOBS if name in options}
        stops = options.pop("stop")
        # A seed promises the same answer, and reused keys and values may differ from new ones by rounding errors.
        prefixes = self.prefixes if options.get("seed") is None else None
        sampling = LogitsProcessorList()
        if options.pop("do_sample", "temperature" in options):
            sampling = self._sampling(options)
        generate = {"max_new_tokens": MAX_NEW_TOKENS, "prefix_cache": prefixes, "logits_processor": sampling}
        generate |= {name: options[name] for name in ("max_new_tokens", "repetition_penalty") if name in options}
        return knobs, stops, generate

    def _sampling(self, options: dict) -> LogitsProcessorList:
        """
        What `generate(do_sample=True)` does to the logits, and `AddNoise`, which makes the most likely token a sampled
        one. Takes its options out of `options`.
        """
        saved = self.model.generation_config

        def pop(name: str, default):
            value = options.pop(name, getattr(saved, name, None))
            return default if value is None else value

        temperature, top_k, top_p = pop("temperature", 1.0), pop("top_k", TOP_K), pop("top_p", 1.0)
        steps = [TemperatureLogitsWarper(float(temperature))]
        if top_k > 0:
            steps.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        return LogitsProcessorList([*steps, AddNoise(options.pop("seed", None))])

    def _write_prompt(self, conversation: list[dict]) -> tuple[str, bool]:
        """The prompt, and whether it ends within the assistant's turn."""
        *turns, last = conversation
        if last["role"] != "assistant":
            return self.processor.apply_chat_template(conversation, add_generation_prompt=True), False
        content = last["content"]
        if not content or all(part == {"type": "text", "text": ""} for part in content):
            return self.processor.apply_chat_template(turns, add_generation_prompt=True), False
        return self.processor.apply_chat_template(conversation, continue_final_message=True), True

    def _generate(self, conversation: list[dict], parameters: dict) -> tuple[str, dict]:
        """The text of the reply, and its probability, finish reason, usage and, with zoom, where it looked."""
        knobs, stops, options = self._read_options(parameters)
        self._check_limits(conversation)
        limit = self.model.config.text_config.max_position_embeddings
        prompt, is_continued = self._write_prompt(conversation)
        inputs = self.processor.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        prompt_length = inputs["input_ids"].shape[1]
        if prompt_length >= limit:
            raise ValueError(f"the text has {prompt_length} tokens, the context {limit}: shorten the text")
        encoded, looked_at = self._encode(
            prompt, self._load(conversation), knobs, prompt_length, options["prefix_cache"]
        )
        output = self.model.generate(
            **inputs,
            image_features=[image.features for image in encoded],
            **options,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            stopping_criteria=StoppingCriteriaList([StopTexts(stops, prompt_length, self._decode)] if stops else []),
            return_dict_in_generate=True,
            output_logits=True,
        )
        new_ids = output.sequences[0, prompt_length:]
        text, is_finished = self._read_answer(new_ids, stops)
        prompt_tokens = prompt_length - len(encoded) + sum(len(image.features) for image in encoded)
        return text.rstrip() if is_continued else text.strip(), {
            "zoom": {} if looked_at is None else {"looked_at": looked_at},
            "probability": probability_of(new_ids, output.logits),
            "finish_reason": "stop" if is_finished else "length",
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(new_ids),
                "total_tokens": prompt_tokens + len(new_ids),
            },
        }

    def _decode(self, ids: torch.LongTensor) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def _read_answer(self, new_ids: torch.LongTensor, stops: list[str]) -> tuple[str, bool]:
        """The text up to the first of the stops, and whether it ended by itself rather than at a limit."""
        text = self._decode(new_ids)
        if ends := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(ends)], True
        return text, bool(len(new_ids)) and new_ids[-1].item() in self.find_ends(self.model, None, {})

    def _encode(
        self, prompt: str, images: list[Image.Image], knobs: dict, length: int, prefix_cache
    ) -> tuple[list, list | None]:
        """The encoded images of a prompt of some length, and where guided zoom looked, None without it."""
        if images and self.processor.image_processor.asks_to_zoom(knobs):
            inputs = self.processor(prompt, [images], **knobs).to(self.model.device)
            looked = self.model.zoom(**inputs, feature_cache=self.cache, prefix_cache=prefix_cache)
            return looked.unbind(), looked.looked_at
        plans = [self.processor.image_processor.plan(*image.size, **knobs) for image in images]
        tokens = sum(crop.num_tokens for plan in plans for crop in plan)
        self.check_context(self.model.config, [length - len(images) + tokens], [tokens], [len(images)])
        return self.cache.encode(self.model, self.processor.image_processor, images, plans=plans), None


class AddNoise(LogitsProcessor):
    """
    Adds Gumbel noise: the token with the largest sum is a sample from the softmax of the logits. Unlike transformers'
    sampling, it draws from its own generator. A seed thus gives the same answer whatever other threads draw, and the
    process's random state is neither read nor changed.
    """

    def __init__(self, seed: int | None):
        self.generator = torch.Generator()  # on the CPU, so that a seed means the same on each device
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape).exponential_(generator=self.generator).clamp_min(1e-30).log()
        return scores - noise.to(scores.device)


class StopTexts(StoppingCriteria):
    """Stops when the new text holds one of several strings, however it is split into tokens."""

    def __init__(self, stops: list[str], prompt_length: int, decode):
        self.stops, self.prompt_length, self.decode = stops, prompt_length, decode

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        text = self.decode(input_ids[0, self.prompt_length :])
        return torch.full((len(input_ids),), any(stop in text for stop in self.stops), device=input_ids.device)


def probability_of(new_ids: torch.LongTensor, logits: tuple[torch.Tensor, ...]) -> float:
    """The probability of an answer's tokens, given the logits float[1, vocabulary] of each."""
    logprobs = [step[0].float().log_softmax(-1)[id].item() for step, id in zip(logits, new_ids)]
    return float(torch.tensor(logprobs, dtype=torch.float32).sum().exp())


def decode_base64(text: str) -> bytes:
    """The bytes of base64 text or of a data URI. Few copies are made: the text may be long."""
    text = text.lstrip()
    if text[:8].lower().startswith(("http://", "https://")):
        raise ValueError("this endpoint fetches no URLs: send the picture's bytes as base64")
    start = 0
    if text[:5].lower() == "data:":
        start = text.find(",") + 1
        if not text[:start].lower().endswith(";base64,"):
            raise ValueError("a data URI must be data:<type>;base64,<text>: encode the picture's bytes as base64")
    try:
        content = text[start:].encode("ascii").translate(None, b" \t\n\r\v\f")
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        reason = "it has other characters" if isinstance(error, UnicodeEncodeError) else error
        raise ValueError(f"the image can't be read as base64 ({reason}): encode its file") from None


def to_number(name: str, value, kind: type, low, high) -> int | float:
    """`value` as `kind`, int or float. JSON has one type of numbers, so 32.0 is also an integer."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN is in no range.
    if not is_number or not low <= value <= high or (kind is int and value != int(value)):
        number = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {number} from {low} to {high}, got {show(value)}")
    return kind(value)


def check_names(given, known: set[str]):
    """Raise a ValueError for names that are not known."""
    if unknown := join_names(set(given) - known):
        raise ValueError(f"unknown {unknown}: there are {', '.join(sorted(known))}")


def join_names(names) -> str:
    """A few of the names, short and in ASCII: a request may have many, long ones, and halves of surrogate pairs."""
    shown = sorted(ascii(name)[1:-1][:50] if isinstance(name, str) else show(name) for name in names)
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")


def show(value) -> str:
    """A value for an error message, shortened where it is long or deep."""
    try:
        return (repr(value) if isinstance(value, str) and len(value) < 100 else reprlib.repr(value))[:200]
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__


def drop_empty(fields: dict) -> dict:
    """A message or part without what is None, and without empty fields in `ECHOED`."""

    def is_empty(name, value) -> bool:
        return value is None or (name in ECHOED and isinstance(value, (str, list, dict)) and not value)

    return {name: value for name, value in fields.items() if not is_empty(name, value)}


def is_same(value, other) -> bool:
    """Equal as JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, bool) != isinstance(other, bool):
        return False
    return isinstance(value, (bool, int, float, str, list, dict)) and value == other
