"""Turn questions and pictures into model inputs: assemble prompts, with one `<image>` per visual token.

The processor handles text. The image processor decides where crops are and how many tokens they give.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import Environment
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Scope
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .configuration_mc_llava import add_to_package
from .crops_mc_llava import check_plans, refuse_unknown
from .encoded_images_mc_llava import input_device, is_encoded
from .feature_cache_mc_llava import check_processor
from .image_loading_mc_llava import flatten_images
from .image_processing_mc_llava import MCLlavaImageProcessor, MCLlavaImageProcessorKwargs, square_side


# The tokens that control the model. In a published tokenizer, not all of them are marked as special.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>")

# ChatML as Phi-2 was fine-tuned with it: no turn is added. A turn's images come before its text, wherever they stand
# in the message: the model was trained on nothing else. Where an image stood between two texts, a new line begins.
# It rejects special tokens in a message as well, because engines such as vLLM render it without the processor.
# `{% generation %}` marks the assistant's text, including its <|im_end|>, for training on those tokens alone.
# The files chat_template.jinja are written from here, by `save_pretrained`.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- set ns = namespace(images='', text='', gap='') -%}
{%- if message['content'] is string -%}
{%- set ns.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{%- set ns.images = ns.images + '<image>\\n' -%}
{%- set ns.gap = '\\n' if ns.text else '' -%}
{%- else -%}
{%- set ns.text = ns.text + (ns.gap if part['text'] else '') + part['text'] -%}
{%- set ns.gap = '' if part['text'] else ns.gap -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for token in CONTROL_TOKENS if token in message['role'] + '\\n' + ns.text -%}
{{- raise_exception('the text of a message must not hold the special token ' + token + ': remove it') -}}
{%- endfor -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ns.images + ns.text + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- ns.images + ns.text + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("CONTROL_TOKENS", str(list(CONTROL_TOKENS)))

ROLES = ("system", "user", "assistant")
# What guided zoom compares a question with, for a model whose attention heads were never measured.
GENERAL_QUESTION = "Write a general description of the image."
ENGINES_CANNOT_ZOOM = (
    "zoom needs several passes over a prompt, which serving engines don't make: pass zoom=0, or as plans the boxes "
    "that model.zoom found"
)
SOURCES = ("image", "url", "path", "base64")  # where transformers looks for the picture of an image part


class Prompt(str):
    """Text that a chat template has rendered. The processor uses it unchanged, whatever it holds."""

    __slots__ = ()


def check_unicode(text: str, name: str = "the text"):
    """Raise a ValueError for unpaired surrogates, from JSON or from bytes that were not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"character {error.start} is a byte in another encoding, or half of a surrogate pair"
        raise ValueError(f"{name} can't be encoded as UTF-8, {reason}: pass text in UTF-8") from None


class GenerationTag(Extension):
    """`{% generation %}`, which transformers adds to Jinja, for templates that are parsed and not rendered."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache
def template_names(chat_template: str) -> frozenset[str]:
    """The variables that a template reads and does not define. One that it may assign first is among them."""
    environment = Environment(extensions=[GenerationTag, "jinja2.ext.loopcontrols"])  # as transformers' has
    names = find_undeclared_variables(environment.parse(chat_template))
    return frozenset(names - {"raise_exception", "strftime_now"})  # functions that transformers defines


def to_plain(value):
    """Convert message objects to dicts and lists. All other values are returned unchanged and not copied."""
    if isinstance(value, Mapping):
        return {name: to_plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type) and not is_encoded(value):
        return _without_none({field.name: to_plain(getattr(value, field.name)) for field in fields(value)})
    if callable(getattr(value, "model_dump", None)):  # pydantic's, without importing it
        return _without_none(to_plain(value.model_dump()))
    return value


def is_given(value) -> bool:
    """Whether an optional value is there: OpenAI's clients send None and empty lists for what was left out."""
    return value is not None and not (isinstance(value, (str, list, tuple, dict, bool)) and not value)


def refuse_options(names, known: set[str]):
    """`refuse_unknown`, which says of an option of `generate` where it belongs: a pipeline passes all options here."""
    if misplaced := sorted((set(names) - known) & set(vars(GenerationConfig()))):
        raise ValueError(
            f"the processor has no {', '.join(misplaced)}: pass options of generate to generate, or to a pipeline as "
            "generate_kwargs={...}"
        )
    refuse_unknown(names, known)


def _without_none(fields: dict) -> dict:
    """Fields that were left out. transformers takes each name among image, url, path and base64 for a picture."""
    return {name: value for name, value in fields.items() if value is not None}


class MCLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MCLlavaImageProcessorKwargs
    _defaults = {
        "text_kwargs": {"padding": True, "return_tensors": "pt"},
        "images_kwargs": {"return_tensors": "pt"},
    }


class MCLlavaProcessor(ProcessorMixin):
    r"""
    Combines an image processor and a tokenizer.

    A question and its image become the published prompt, whose `<image>` is repeated once per visual token:

        <|im_start|>user\n<image>\nWhat animal is it?<|im_end|>\n<|im_start|>assistant\n
                         └─ at most num_tokens times

    Args:
        image_processor (`MCLlavaImageProcessor`): its saved `max_crops`, `num_tokens` and `zoom` are the
            defaults of a call.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer, which pads on the left.
        chat_template (`str`, *optional*): the published ChatML by default.

    Raises:
        ValueError: if the tokenizer has no token `<image>`.
    """

    valid_processor_kwargs = MCLlavaProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {self.image_token}: add it, or load the model's tokenizer")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        # What saving writes, as in `MCLlavaImageProcessor`.
        self.auto_map = {"AutoProcessor": f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"}

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        kwargs.pop("backend", None)  # Pillow or torchvision: ours is always Pillow
        # Published folders name transformers' SigLIP processor and code that no longer exists: load ours instead.
        image_processor = MCLlavaImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs = {"padding_side": "left", "clean_up_tokenization_spaces": False, **kwargs}
        # Given a config, AutoTokenizer doesn't load the folder's, and so doesn't ask to trust its code.
        kwargs |= {"config": PreTrainedConfig(), "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # Saved alone, a tokenizer would name our code, and a folder would lack it. Saving a processor writes the name.
        # Knobs that a tokenizer was loaded with would win over the image processor's.
        for name in ("auto_map", *image_processor.option_names):
            tokenizer.init_kwargs.pop(name, None)
        return [image_processor, tokenizer]

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that control the model. Words that were added to the tokenizer are not among them."""
        marked = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return list(dict.fromkeys([*CONTROL_TOKENS, *self.tokenizer.all_special_tokens, *marked]))

    def _written_token(self, text: str, is_normalized: bool = False) -> str | None:
        """
        The first special token that is written in a text.

        Args:
            is_normalized: look for tokens that the tokenizer finds in normalized text only.
        """
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        if is_normalized and normalizer is None:
            return None
        added = {str(token): token for token in self.tokenizer.added_tokens_decoder.values()}
        for name in self.special_tokens:
            token, written, searched = added.get(name), name, text
            if is_normalized:
                if token is None or not token.normalized:
                    continue
                written, searched = normalizer.normalize_str(name).strip(), normalizer.normalize_str(text)
            pattern = re.escape(written)
            if token is not None and token.single_word and name not in CONTROL_TOKENS:
                pattern = rf"(?<!\w){pattern}(?!\w)"
            if written and re.search(pattern, searched):
                return name
        return None

    def _is_prompt(self, text: str) -> bool:
        """Whether a text is a prompt rather than a question."""
        check_unicode(text)
        return isinstance(text, Prompt) or self._written_token(text) is not None

    def _refuse_special_tokens(self, text: str):
        check_unicode(text)
        token = self._written_token(text) or self._written_token(text, is_normalized=True)
        if token is not None:
            raise ValueError(f"the text of a message must not hold the special token {token}: remove it")

    def get_vocab(self) -> dict[str, int]:
        """The tokenizer's tokens and their ids, for callers that take a processor for a tokenizer."""
        return self.tokenizer.get_vocab()

    def __call__(
        self,
        text: str | list[str] | None = None,
        images: Any = None,
        model: PreTrainedModel | None = None,
        feature_cache: Any = None,
        is_prompt: bool | None = None,
        **kwargs: Unpack[MCLlavaProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Prepare questions or prompts, and their images, for the model.

        Args:
            text (`str` or `list[str]`): questions or raw prompts. Text with a special token, and text that
                `apply_chat_template` returned, is a raw prompt and is used unchanged; it needs one `<image>` per
                image. All other text is a question and is put into the chat template after its images.
            images (*optional*): anything that `load_image` reads. In a flat list, a single text gets all images;
                otherwise each question gets one and each raw prompt as many as it has `<image>`. A list of lists has
                the images of each text.
            model (`MCLlavaForConditionalGeneration`, *optional*): encode the images in this call, as the published
                processor did. `input_ids` then keep one `<image>` per image.
            feature_cache (`FeatureCache`, *optional*): cache for the encoded images. Requires `model`.
            is_prompt (`bool`, *optional*): whether the texts are raw prompts (True) or questions (False), whatever
                they hold. A question with a special token is refused.
            kwargs: `max_crops`, `num_tokens`, `zoom`, `plans` (one per image, in the order of the texts; see
                `MCLlavaImageProcessorKwargs`), `device`, and the options of transformers' processors (`padding`,
                `return_tensors`, ...), flat or in `images_kwargs` and `text_kwargs`.

        Returns:
            `BatchFeature` with int64 `input_ids` and `attention_mask` [batch, length], padded on the left. With
            images, also the fields of `MCLlavaImageProcessor` or, given `model`, `image_features`: a list with one
            float[tokens, hidden] per image. With `zoom`, also `zoom_general_ids`, int64[images, tokens]: the general
            question that guided zoom compares with. Tensors are torch's by default, see `return_tensors`.

        Raises:
            ValueError: if `text` is missing, an option is unknown or out of range, images and `<image>` tokens don't
                match, an image can't be read, truncation would cut visual tokens, or `zoom` is combined with `model`.
        """
        kwargs = self._check_kwargs(kwargs)
        if text is None:
            raise ValueError("text is missing: pass a question or a prompt, or call the image processor for images")
        text = self._mark_texts(text, is_prompt)
        self._check_engine_options(text, kwargs)
        plans = {**kwargs, **kwargs.get("images_kwargs", {})}.get("plans")
        if plans is not None:  # without images, nothing else checks them
            check_plans(plans, 0 if images is None else len(flatten_images(images)))
        if model is None:
            if feature_cache is not None:
                raise ValueError("feature_cache needs the model that encodes: pass model as well")
            return self._add_general_question(super().__call__(images=images, text=text, **kwargs))
        return self._encode(model, feature_cache, text, images, kwargs)

    def _encode(self, model, feature_cache, text: list[str], images, kwargs: dict) -> BatchFeature:
        """The result of a call with a model: prompts in short form, and the encoded images."""
        if self.image_processor.asks_to_zoom(kwargs):
            raise ValueError("zoom happens in generate, after this call: leave model out, or pass zoom=0")
        prompts, images = self._assemble(text, images)
        kwargs = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        inputs = self.tokenizer(prompts, **kwargs["text_kwargs"])
        self._check_special_mm_tokens(prompts, inputs, ["image"])
        inputs = BatchFeature(dict(inputs)).to(input_device(model))
        if images:
            check_processor(model, self.image_processor)
            inputs["image_features"] = self._encode_images(model, feature_cache, images, kwargs["images_kwargs"])
        return inputs

    def _encode_images(self, model, feature_cache, images: list, options: dict) -> list[torch.Tensor]:
        """One float[tokens, hidden] per image."""
        if feature_cache is not None:
            encoded = feature_cache.encode(model, self.image_processor, images, **options)
            return [one.features for one in encoded]
        device = input_device(model)
        options = {**options, "device": options.get("device") or device, "return_tensors": "pt"}
        inputs = self.image_processor(images, **options).to(device)
        with torch.no_grad():
            return model.get_image_features(**inputs, return_dict=True).pooler_output

    def _add_general_question(self, inputs: BatchFeature) -> BatchFeature:
        """Add `zoom_general_ids`, with which guided zoom compares the question, to inputs that zoom."""
        if "zoom_options" not in inputs:
            return inputs
        content = [{"type": "image"}, {"type": "text", "text": GENERAL_QUESTION}]
        messages = [{"role": "user", "content": content}]
        prompt = self.apply_chat_template(messages, CHAT_TEMPLATE, add_generation_prompt=True)
        ids = self.tokenizer(prompt.split(self.image_token)[1], return_tensors="np")["input_ids"]
        ids = np.repeat(ids, len(inputs["zoom_options"]), axis=0)  # int64[images, tokens], see `zoom_values`
        is_torch = isinstance(inputs["zoom_options"], torch.Tensor)
        inputs["zoom_general_ids"] = torch.from_numpy(ids) if is_torch else ids
        return inputs

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """
        Like transformers' `apply_chat_template`, with these differences: knobs may be passed flat or in
        `processor_kwargs`, an image part may hold anything that `load_image` reads, and messages and their parts may
        be dicts, dataclasses or pydantic models, such as those of OpenAI's client. The default template puts a turn's
        images before its text. Given `return_assistant_tokens_mask` and no `return_tensors`, ids and masks are lists.

        Raises:
            ValueError: if a role is not one of system, user and assistant, if the text of a message holds a special
                token (so that a question can't forge a turn or an image) or is not valid Unicode, if a part is
                neither text nor an image, if an option is unknown, or if there are tools or documents and the template
                does not render them.
        """
        template = self.find_template(chat_template)
        conversations, is_batched = self._read_conversations(conversation, template)
        # transformers warns about flat processor options and, up to 5.20, lets them replace `processor_kwargs`.
        known = self._known_kwargs()
        if not isinstance(processor_kwargs, (dict, type(None))):
            raise ValueError(f"processor_kwargs must be a dict of options, got {processor_kwargs!r:.100}")
        processor_kwargs = {
            **(processor_kwargs or {}),
            **{name: kwargs.pop(name) for name in list(kwargs) if name in known and name != "return_tensors"},
        }
        self._check_template_kwargs(template, kwargs, processor_kwargs)
        if kwargs.get("tokenize"):
            processor_kwargs["is_prompt"] = True
            if kwargs.get("return_assistant_tokens_mask") and kwargs.get("return_tensors") in (None, "auto"):
                # transformers returns the masks as lists, and TRL looks ids up in a set: a tensor's are never found.
                kwargs.pop("return_tensors", None)  # or it is given twice
                text_kwargs = processor_kwargs.get("text_kwargs") or {}
                processor_kwargs["text_kwargs"] = {"return_tensors": None, **text_kwargs}
        output = super().apply_chat_template(
            conversations if is_batched else conversations[0], template, processor_kwargs=processor_kwargs, **kwargs
        )
        if kwargs.get("tokenize"):
            return output
        return [Prompt(prompt) for prompt in output] if is_batched else Prompt(output)

    def find_template(self, chat_template: str | None = None) -> str:
        """The template of a call: a template, or the name of one of the processor's."""
        if chat_template is not None and not isinstance(chat_template, str):
            raise ValueError(f"chat_template must be a template or the name of one, got {chat_template!r:.100}")
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        name = "default" if chat_template is None else chat_template
        if chat_template is None and name not in templates:
            raise ValueError(f"there is no default among the chat templates {sorted(templates)}: name one of them")
        if not templates.get(name) and chat_template is None:
            raise ValueError("the processor has no chat template: pass one, or set processor.chat_template")
        return templates.get(name) or name

    def _check_template_kwargs(self, template: str, kwargs: dict, processor_kwargs: dict):
        """Raise a ValueError for options that neither transformers, nor the processor, nor the template knows."""
        own = ("images", "model", "feature_cache")  # arguments of a call that are no options
        self._check_kwargs({name: value for name, value in processor_kwargs.items() if name not in own})
        names, rendered = set(inspect.signature(super().apply_chat_template).parameters), template_names(template)
        refuse_options(set(kwargs) - rendered, names | self._known_kwargs())
        for name in {"tools", "documents"} - rendered:
            if is_given(kwargs.get(name)):
                raise ValueError(
                    f"the chat template doesn't render {name}: leave them out, or pass a chat_template that does"
                )

    def _read_conversations(self, conversation, template: str) -> tuple[list[list[dict]], bool]:
        """Checked copies of the conversations, and whether there is a batch of them."""
        conversation = getattr(conversation, "messages", conversation)  # of an object that holds a conversation
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"a conversation must be a list of messages, got {conversation!r:.200}")
        first = conversation[0] if conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        conversations = [getattr(entry, "messages", entry) for entry in conversation] if is_batched else [conversation]
        for messages in conversations:
            if not isinstance(messages, (list, tuple)):
                raise ValueError(f"each conversation of a batch must be a list of messages, got {messages!r:.200}")
            if not messages:
                raise ValueError("a conversation has no message: pass at least one, such as a user's question")
        try:
            plain = [to_plain(messages) for messages in conversations]
        except RecursionError:
            raise ValueError("a message holds itself, or is nested too deep: pass text and image parts") from None
        return [[self._check_message(message, template) for message in messages] for messages in plain], is_batched

    def _check_message(self, message: dict, template: str) -> dict:
        """A copy of the message with string content or text and image parts, free of special tokens."""
        if not isinstance(message, dict):
            raise ValueError(
                f"a message must be a dict, dataclass or pydantic model with a role, got {message!r:.200}"
            )
        role, content = message.get("role"), message.get("content")
        content = "" if content is None else content
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r:.100}")
        for name in ("tool_calls", "function_call"):
            if is_given(message.get(name)) and name not in template:
                raise ValueError(f"the chat template doesn't render {name}: leave them out of the message")
        if not isinstance(content, (str, list)):
            raise ValueError(f"content must be a string or a list of parts, got {content!r:.200}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [_without_none(part) if isinstance(part, dict) else part for part in parts]
        self._check_parts(parts, template)
        return {**message, "content": content if isinstance(content, str) else parts}

    def _check_parts(self, parts: list, template: str):
        # Adjacent text parts are checked together, or a token could be split over two of them.
        runs = [""]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                runs[-1] += part["text"]
            elif kind in ("image", "image_url"):
                runs.append("")
                if len(sources := [name for name in SOURCES if name in part]) > 1:
                    raise ValueError(
                        f"an image part must hold one image, got {' and '.join(sources)}: pass a part each"
                    )
            else:
                raise ValueError(f"a content part must be a text with a string or an image, got {part!r:.200}")
        # The default template separates texts between which an image stood. Others may not.
        self._refuse_special_tokens(("\n" if template == CHAT_TEMPLATE else "").join(runs))

    @property
    def text_option_names(self) -> set[str]:
        """The names of the options for the tokenizer."""
        return set(self.valid_processor_kwargs.__annotations__["text_kwargs"].__annotations__)

    def _known_kwargs(self) -> set[str]:
        flat = set(self.valid_processor_kwargs.__annotations__)
        return self.text_option_names | self.image_processor.option_names | flat

    def _check_kwargs(self, kwargs: dict) -> dict:
        """The options with checked knobs. Raises a ValueError for options that transformers would only warn about."""
        kwargs = {**(kwargs.pop("common_kwargs", None) or {}), **kwargs}
        for name in ("videos", "audio", "videos_kwargs", "audio_kwargs"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} can't be processed, only text and images: leave it out")
        kwargs = {name: value for name, value in kwargs.items() if value is not None or not name.endswith("_kwargs")}
        for name in ("text_kwargs", "images_kwargs"):
            if not isinstance(kwargs.get(name, {}), dict):
                raise ValueError(f"{name} must be a dict of options, got {kwargs[name]!r:.100}")
        refuse_options(kwargs, self._known_kwargs())
        refuse_unknown(kwargs.get("text_kwargs", {}), self.text_option_names)
        image_options = {name: kwargs.pop(name) for name in list(kwargs) if name in self.image_processor.option_names}
        kwargs |= self.image_processor.check_kwargs(image_options)
        if "images_kwargs" in kwargs:
            kwargs["images_kwargs"] = self.image_processor.check_kwargs(kwargs["images_kwargs"])
        return kwargs

    # The methods below are called by ProcessorMixin.__call__.

    def _merge_kwargs(self, *args, **kwargs):
        try:
            return super()._merge_kwargs(*args, **kwargs)
        except StrictDataclassError as error:  # the type of an option's value
            raise ValueError(f"an option has a wrong value: {error}") from error

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        prompts, images = self._assemble(text, images)
        return images or None, prompts, None, None

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """`_assemble` has checked them. transformers' own check knows fewer kinds of images."""

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        return processed, [self.replace_image_token(processed, index) for index in range(len(images))]

    def _mark_texts(self, text, is_prompt: bool | None) -> list[str]:
        """The texts of a call as a list, with prompts marked if `is_prompt` says so."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(entry, str) for entry in texts):
            raise ValueError(f"text must be a string or a list of strings, got {text!r:.200}")
        if is_prompt not in (None, True, False):
            raise ValueError(f"is_prompt must be True, False or None, got {is_prompt!r:.100}")
        if is_prompt is False:
            for entry in texts:
                self._refuse_special_tokens(entry)
            return [str(entry) for entry in texts]
        return [Prompt(entry) for entry in texts] if is_prompt else list(texts)

    def _assemble(self, texts: list[str], images) -> tuple[list[str], list]:
        """One prompt per text, and the images in the order of their `<image>`. The image processor loads them."""
        raw = [self._is_prompt(entry) for entry in texts]
        wanted = [entry.count(self.image_token) if is_raw else None for entry, is_raw in zip(texts, raw)]
        per_text = self._images_per_text(images, wanted)

        prompts = []
        for entry, own, count in zip(texts, per_text, wanted):
            if count is None:
                entry = self._write_prompt(entry, len(own))
            elif count != len(own):
                raise ValueError(
                    f"the prompt has {count} {self.image_token} but {len(own)} images: "
                    f"write one {self.image_token} per image (prompt: {entry[:80]!r})"
                )
            prompts.append(entry)
        return prompts, [image for own in per_text for image in own]

    def _write_prompt(self, question: str, count: int) -> str:
        """The prompt of a question about `count` images."""

        def render(content) -> str:
            return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        prompt = render(parts)
        if str(parts) in prompt:  # the template reads strings alone, and prints a list as Python does
            prompt = render(question)
        self.check_placeholders(prompt, count)
        return prompt

    def check_placeholders(self, prompt: str, count: int):
        """Raise a ValueError unless a prompt that a template has rendered has a place for each of `count` images."""
        if (written := prompt.count(self.image_token)) != count:
            raise ValueError(
                f"the chat template writes {written} {self.image_token} for {count} images: "
                f"take one that writes {self.image_token} for each image part, or pass raw prompts"
            )

    def _images_per_text(self, images, wanted: list[int | None]) -> list[list]:
        """
        The images of each text.

        Args:
            images: None, one image, a flat list, or one list per text.
            wanted: the number of `<image>` in each raw prompt, None for a question.
        """
        if images is None:
            images = [[]] * len(wanted)
        if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
            if len(images) != len(wanted) or not all(isinstance(entry, (list, tuple)) for entry in images):
                raise ValueError(f"got {len(images)} lists of images for {len(wanted)} texts: pass one list per text")
            return [flatten_images(entry) for entry in images]

        images = flatten_images(images)
        if len(wanted) == 1:
            return [images]
        counts = [1 if count is None else count for count in wanted]
        if sum(counts) != len(images):
            raise ValueError(
                f"{len(wanted)} texts have places for {counts} images but {len(images)} came: "
                "pass one image per question, or a list of images for each text"
            )
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]

    def replace_image_token(self, image_inputs, image_idx: int, **kwargs) -> str:
        crops_per_image = [int(row[0]) for row in image_inputs["image_grid_thw"]]
        start = sum(crops_per_image[:image_idx])
        num_tokens = image_inputs["crop_num_tokens"][start : start + crops_per_image[image_idx]].sum()
        return self.image_token * int(num_tokens)

    def _check_special_mm_tokens(self, text: list[str], text_inputs, modalities: list[str]):
        for prompt, ids in zip(text, text_inputs["input_ids"]):
            wanted, kept = prompt.count(self.image_token), int((np.asarray(ids) == self.image_token_id).sum())
            if kept > wanted:
                raise ValueError(
                    f"the tokenizer finds {kept} {self.image_token} where {wanted} are written: remove what it "
                    f"normalizes to {self.image_token}"
                )
            if wanted != kept:
                raise ValueError(
                    f"truncation would keep {kept} of {wanted} visual tokens: "
                    "raise max_length, shorten the text, or lower num_tokens"
                )

    def _check_engine_options(self, texts: list[str], kwargs: dict):
        """
        Raise a ValueError, in a serving engine's call, for options that its model would raise an error on: vLLM's
        engine doesn't survive that. vLLM passes pictures with their `<image>` alone and asks what replaces each.

        Several plans are refused, too. vLLM caches pictures one by one, under a hash of the picture and all options:
        one that comes twice would get the first plan both times, and known ones are missing from the call.
        """
        asks = {**kwargs, **kwargs.get("text_kwargs", {})}.get("return_text_replacement_offsets")
        if not asks or "".join(texts).replace(self.image_token, ""):
            return
        saved, options = self.image_processor, {**kwargs, **kwargs.get("images_kwargs", {})}
        if saved.asks_to_zoom(options):
            raise ValueError(ENGINES_CANNOT_ZOOM)
        for name in ("size", "patch_size"):
            value, own = options.get(name), getattr(saved, name)
            if value is not None and square_side(value) != square_side(own):
                raise ValueError(f"{name} must be the model's, {square_side(own)}, got {value!r:.100}: leave it out")
        if len(options.get("plans") or []) > 1:
            raise ValueError("serving engines cache pictures one by one: pass plans in a request with one image only")

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """The numbers of crops and tokens of images with sizes (height, width), for serving engines."""
        if image_sizes is None:
            return MultiModalData()
        saved, kwargs = self.image_processor, {**kwargs, **(kwargs.get("images_kwargs") or {})}
        if saved.asks_to_zoom(kwargs):
            raise ValueError(ENGINES_CANNOT_ZOOM)
        options = saved.check_kwargs({name: value for name, value in kwargs.items() if name in saved.option_names})
        plans = saved.plans_of([(width, height) for height, width in image_sizes], options)
        return MultiModalData(
            num_image_tokens=[sum(crop.num_tokens for crop in plan) for plan in plans],
            num_image_patches=[len(plan) for plan in plans],
        )


MCLlavaProcessor.register_for_auto_class()

add_to_package(__name__)

__all__ = ["CHAT_TEMPLATE", "MCLlavaProcessor", "MCLlavaProcessorKwargs", "Prompt", "check_unicode", "to_plain"]
