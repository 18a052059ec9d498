"""
Conversations in, replies out: a model, its processor, two caches and the three knobs.

The engine knows nothing of files, tasks or wire formats. The command line, the Space, batches and evaluation all ask
through it; a new way to serve the model starts here.
"""

import math
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from . import (
    Crop,
    EncodedImages,
    FeatureCache,
    MCLlavaConfig,
    MCLlavaForConditionalGeneration,
    MCLlavaProcessor,
    PrefixCache,
    can_keep_prefixes,
    check_context,
    check_knob,
    check_weights,
    find_ends,
    find_option,
    input_device,
    is_encoded,
    is_prepared,
    load_images,
    load_unprepared,
    pad_prompts,
    to_plain,
)


ONE_REPLY = {"num_return_sequences": 1, "return_dict_in_generate": False}  # whatever was saved or a configuration says
Asked = TypeVar("Asked")


def ask_about(images: list, question: str) -> list[dict]:
    """A conversation of one question about images, each whatever `load_image` reads or an `EncodedImages` of one."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


class Reply(NamedTuple):
    """An answer, and what was encoded and read for it."""

    text: str
    images: list[EncodedImages]  # one for each image of the conversation: its crops' boxes and tokens
    prompt_tokens: int  # visual ones included
    new_tokens: int
    finish_reason: str  # "length" if max_new_tokens or the context cut it off, otherwise "stop"

    @property
    def crops(self) -> int:
        return sum(len(image.crop_boxes) for image in self.images)

    @property
    def looked_at(self) -> list[dict]:
        """Where guided zoom looked, see `ZoomedImages.looked_at`; empty without zoom."""
        return [
            {**crop, "image": number}
            for number, image in enumerate(self.images)
            for crop in getattr(image, "looked_at", ())
        ]

    @property
    def image_tokens(self) -> int:
        return sum(len(image.features) for image in self.images)


class Likelihood(NamedTuple):
    """
    The likelihood of an answer, including the end of its turn: without that, "red" could never be less likely than
    "red and blue".
    """

    log_probability: float  # the sum over the tokens, natural
    num_tokens: int
    is_greedy: bool  # whether each token is the most likely one


class Engine:
    """
    A model that answers questions about images, many at a time. Crops that recur are encoded once, and what prompts
    share at their beginning, such as a picture or earlier turns, is computed once.

    A conversation is a list of messages with `role` and `content`. An image part is `{"type": "image", "image": ...}`
    with whatever `load_image` reads, or with an `EncodedImages` of one image.

    Args:
        max_crops, num_tokens, zoom: by default as the processor was saved. With zoom, the engine looks at images again
            for each question, except at those that are already encoded.
        batch_size: rows of a forward pass.
        max_new_tokens: upper bound of a reply's tokens.
        prefix_bytes: upper bound of the size of keys and values that are kept, see `PrefixCache`. With 0, none are
            kept: in bfloat16 or float16, rounding errors could otherwise make a reply depend on earlier ones.
        feature_cache: by default a new `FeatureCache`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        model: MCLlavaForConditionalGeneration,
        processor: MCLlavaProcessor,
        max_crops: int | None = None,
        num_tokens: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 200,
        zoom: int | None = None,
        prefix_bytes: int = 2**30,
        feature_cache: FeatureCache | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        self.feature_cache = FeatureCache() if feature_cache is None else feature_cache
        is_kept = check_knob("prefix_bytes", prefix_bytes, 0) and can_keep_prefixes(model)
        self.prefix_cache = PrefixCache(prefix_bytes) if is_kept else None
        self.knobs = processor.image_processor.fill_knobs(max_crops, num_tokens, zoom)
        self.batch_size = check_knob("batch_size", batch_size, 1)
        self.max_new_tokens = check_knob("max_new_tokens", max_new_tokens, 1)

    def encode(self, images: list, plans: list | None = None, **knobs) -> list[EncodedImages]:
        """
        Encode images, each anything that `load_image` reads. Returns an `EncodedImages` for each.

        Args:
            plans: a crop plan for each image instead of the usual grid.
            knobs: `max_crops` and `num_tokens` instead of the engine's.

        Raises:
            ValueError: as `FeatureCache.encode` does. Images are encoded without a question, so `zoom` must be 0.
        """
        options = {**self.knobs, "zoom": 0, **knobs}
        if plans is not None:
            options = {"num_tokens": self.knobs["num_tokens"], **knobs, "plans": plans}
        return self.feature_cache.encode(self.model, self.processor.image_processor, images, **options)

    def prepare(self, images: list) -> list:
        """
        Do the part of `encode` that needs no model, see `FeatureCache.prepare`. Pass the results to `encode`, or put
        them into conversations in place of the images. With zoom, images are only loaded, because their crops depend
        on the question.

        Raises:
            ValueError: as `encode` does.
        """
        if self.knobs["zoom"]:
            return load_images(images)
        return self.feature_cache.prepare(self.model, self.processor.image_processor, images, **self.knobs)

    def check(self, conversation: list[dict]):
        """
        Check the text of a conversation before anything is encoded for it.

        Raises:
            ValueError: if a message is malformed or holds a special token, or the text alone fills the context.
        """
        check_prompts(self.processor, self.model.config, [to_plain(conversation)])

    def answer(self, conversations: list[list[dict]], streamer=None, **options) -> list[Reply]:
        """
        The next turn of each conversation, in one batch.

        Args:
            streamer: one of transformers', for a single conversation.
            options: for `generate`. `max_new_tokens` is by default that of a given `generation_config`, or else the
                engine's.

        Raises:
            ValueError: if a message, an image or an option is refused, images were encoded with other weights, or
                there is no room for an answer. Nothing is encoded for a text that is refused.
        """
        if not conversations:
            return []
        if refused := sorted(set(ONE_REPLY) & set(options)):
            raise ValueError(f"{', '.join(refused)}: each conversation has one reply, leave them out")
        for conversation in conversations:
            self.check(conversation)
        conversations = self._encode_parts(conversations)
        images = [images_of(conversation) for conversation in conversations]
        prompts = [self._write_prompt(conversation, add_generation_prompt=True) for conversation in conversations]
        rows = [self.processor.tokenizer(prompt)["input_ids"] for prompt in prompts]
        input_ids, attention_mask = self._pad(rows)
        options = self._fill_options(options)
        output = self.model.generate(
            input_ids,
            attention_mask=attention_mask,
            image_features=[image.features for image in chain(*images)],
            streamer=streamer,
            **options,
        )
        new_tokens = output[:, input_ids.shape[1] :]
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        return [
            Reply(text.strip(), encoded, len(row), *self._end_of(ids, len(row), options))
            for text, encoded, row, ids in zip(texts, images, rows, new_tokens.tolist())
        ]

    def _pad(self, rows: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        Ids and mask of prompts, padded on the left: int64[batch, length] each, on the model's device. A fast tokenizer
        keeps the option to pad, which calls in other threads would change.
        """
        tensors = [torch.tensor(row, device=input_device(self.model)) for row in rows]
        return pad_prompts(tensors, self.processor.tokenizer.pad_token_id)

    def _fill_options(self, options: dict) -> dict:
        """All options for `generate`: without the prefix cache if a caller's can't be combined with it."""
        is_kept = self.prefix_cache is not None and can_keep_prefixes(self.model, **options)
        defaults = {"prefix_cache": self.prefix_cache if is_kept else None}
        if getattr(options.get("generation_config"), "max_new_tokens", None) is None:
            defaults["max_new_tokens"] = self.max_new_tokens
        return {**defaults, **options, **ONE_REPLY}

    def _end_of(self, new_ids: list[int], prompt_tokens: int, options: dict) -> tuple[int, str]:
        """How many tokens a row's answer has, the end of its turn included, and why it ended. Padding follows."""
        config = options.get("generation_config")
        ends = find_ends(self.model, config, options)
        end = next((index for index, id in enumerate(new_ids) if id in ends), None)
        if end is not None:
            return end + 1, "stop"
        padding = self.processor.tokenizer.pad_token_id
        count = next((n for n in range(len(new_ids), 0, -1) if new_ids[n - 1] != padding), 0)
        room = self.model.config.text_config.max_position_embeddings - prompt_tokens
        most = find_option(self.model, "max_new_tokens", config, options) or 0
        return count, "stop" if count < min(most, room) else "length"  # a stop string or a criterion ended it

    def stream(self, conversation: list[dict], stopping_criteria=(), **options) -> Iterator[str]:
        """The pieces of an answer as they are generated. Closing the iterator stops the generation."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, errors = threading.Event(), []

        def is_stopped(input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

        def answer():
            try:
                criteria = StoppingCriteriaList([*stopping_criteria, is_stopped])
                self.answer([conversation], streamer, stopping_criteria=criteria, **options)
            except Exception as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]

    def likelihoods(self, conversation: list[dict], answers: tuple[str, ...]) -> list[Likelihood]:
        """
        How likely each of some answers is as the whole next turn of a conversation.

        Raises:
            ValueError: if there are no answers, one doesn't fit into the context, or its likelihood is not finite.
        """
        if not answers:
            raise ValueError("answers are empty: pass at least one")
        self.check(conversation)
        (conversation,) = self._encode_parts([conversation])
        prompt = self._write_prompt(conversation, add_generation_prompt=True)
        rows, lengths = [], []
        for answer in answers:
            turns = [*conversation, {"role": "assistant", "content": answer}]
            whole = self._write_prompt(turns, add_generation_prompt=False).rstrip("\n")
            if not whole.startswith(prompt):
                raise ValueError("the chat template writes another prompt before an answer: use the published one")
            prompt_ids, answer_ids = (
                self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (prompt, whole.removeprefix(prompt))
            )
            rows.append(prompt_ids + answer_ids)
            lengths.append(len(answer_ids))
        limit = self.model.config.text_config.max_position_embeddings
        if (longest := max(map(len, rows))) > limit:
            remedy = "lower num_tokens" if images_of(conversation) else "shorten the text"
            raise ValueError(f"question and option have {longest} tokens, the context {limit}: {remedy}")

        likelihoods = []
        for start in range(0, len(rows), self.batch_size):
            end = start + self.batch_size
            likelihoods += self._row_likelihoods(rows[start:end], lengths[start:end], images_of(conversation))
        for answer, likelihood in zip(answers, likelihoods):
            if not math.isfinite(likelihood.log_probability):
                raise ValueError(
                    f"the log probability of {answer!r} is {likelihood.log_probability}: try the dtype float32"
                )
        return likelihoods

    def _row_likelihoods(
        self, rows: list[list[int]], lengths: list[int], images: list[EncodedImages]
    ) -> list[Likelihood]:
        """The likelihoods of the last `lengths[i]` tokens of each row i. Each row is about all the images."""
        input_ids, attention_mask = self._pad(rows)
        kept = max(lengths) + 1  # padded on the left, all options end in the last column
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
                image_features=[image.features for image in images] * len(rows),
                logits_to_keep=kept,
            ).logits
        log_probabilities = logits[:, :-1].float().log_softmax(-1)
        targets = input_ids[:, -kept + 1 :].to(log_probabilities.device)
        scores = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        is_greedy = log_probabilities.argmax(-1) == targets
        return [
            Likelihood(float(row[-length:].sum()), length, bool(greedy[-length:].all()))
            for row, greedy, length in zip(scores, is_greedy, lengths)
        ]

    def _encode_parts(self, conversations: list[list[dict]]) -> list[list[dict]]:
        """The conversations with an `EncodedImages` in every image part. Those without one are encoded in one call."""
        conversations = [to_plain(conversation) for conversation in conversations]
        held = [image for conversation in conversations for image in images_of(conversation)]
        given = [image for image in held if is_encoded(image)]
        if any(len(image.crops_per_image) != 1 for image in given):
            raise ValueError("an image part must hold one image, got an EncodedImages of several: use a part for each")
        if given:
            check_weights(given, self.model)
        if self.knobs["zoom"] and len(given) < len(held):
            if given:
                raise ValueError("zoom looks at all images of a batch: pass pictures, not encoded images, or zoom=0")
            encoded = iter(self.look(conversations))
        else:
            pictures = load_unprepared([image for image in held if not is_encoded(image)])
            sizes = [image.picture.size if is_prepared(image) else image.size for image in pictures]
            plans = [self.processor.image_processor.plan(*size, **self.knobs) for size in sizes]  # none if it zooms
            self._check_room(conversations, plans)
            encoded = iter(self.encode(pictures, plans))
        values = iter([image if is_encoded(image) else next(encoded) for image in held])
        return [
            map_image_parts(conversation, lambda part: {**part, "image": next(values)})
            for conversation in conversations
        ]

    def _check_room(self, conversations: list[list[dict]], plans: list[list[Crop]]):
        """Check that prompts leave room for an answer. The images that are not encoded yet will have these plans."""
        new = iter(plans)
        counts = [
            [
                len(image.features) if is_encoded(image) else sum(crop.num_tokens for crop in next(new))
                for image in images_of(conversation)
            ]
            for conversation in conversations
        ]
        check_prompts(self.processor, self.model.config, conversations, counts)

    def look(self, conversations: list[list[dict]], **knobs) -> list[EncodedImages]:
        """
        Guided zoom for each conversation's last question: a `ZoomedImages` for each image, without an answer.

        Args:
            knobs: `max_crops`, `num_tokens` and `zoom` instead of the engine's.
        """
        conversations = [to_plain(conversation) for conversation in conversations]
        if not any(map(images_of, conversations)):
            return []
        inputs = self.processor.apply_chat_template(
            [
                map_image_parts(turns, lambda part: {"type": "image", "image": part["image"]})
                for turns in conversations
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={**self.knobs, **knobs, "text_kwargs": {"padding": False, "return_tensors": None}},
        )
        ids = inputs.pop("input_ids")
        del inputs["attention_mask"]  # of prompts without padding
        looked = self.model.zoom(
            *self._pad(ids),
            **inputs.to(input_device(self.model)),
            feature_cache=self.feature_cache,
            prefix_cache=self.prefix_cache,
        )
        return looked.unbind()

    def _write_prompt(self, conversation: list[dict], add_generation_prompt: bool) -> str:
        """The prompt of a conversation about encoded images, with one `<image>` per visual token."""
        image_token = self.processor.image_token
        bare = map_image_parts(conversation, lambda part: {"type": "image"})
        prompt = self.processor.apply_chat_template(bare, add_generation_prompt=add_generation_prompt)
        first, *rest = prompt.split(image_token)
        images = images_of(conversation)
        return first + "".join(
            image_token * len(image.features) + text for image, text in zip(images, rest, strict=True)
        )


def check_prompts(
    processor: MCLlavaProcessor,
    config: MCLlavaConfig,
    conversations: list[list[dict]],
    counts: list[list[int]] | None = None,
):
    """
    Check conversations before anything is encoded for them. This needs no weights.

    Args:
        counts: the visual tokens of each image of each conversation; by default only the text is checked.

    Raises:
        ValueError: if a message is malformed or holds a special token, or a prompt leaves no room for an answer.
    """
    lengths, limit = [], config.text_config.max_position_embeddings
    for conversation in conversations:
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"a conversation must be a list of messages, got {conversation!r:.200}")
        bare = map_image_parts(conversation, lambda part: {"type": "image"})
        prompt = processor.apply_chat_template(bare, add_generation_prompt=True)
        processor.check_placeholders(prompt, len(images_of(conversation)))
        lengths.append(len(processor.tokenizer(prompt)["input_ids"]))
        if lengths[-1] >= limit:
            raise ValueError(f"the text has {lengths[-1]} tokens, the context {limit}: shorten the text")
    if counts is not None:  # the template writes one `<image>` for each image
        lengths = [length - len(own) + sum(own) for length, own in zip(lengths, counts)]
        check_context(config, lengths, list(map(sum, counts)), list(map(len, counts)))


def count_bytes(images: list) -> int:
    """The size of what `Engine.prepare` returned, in bytes: Pillow takes four per pixel."""
    pictures = [image for image in images if isinstance(image, Image.Image)]
    prepared = [image for image in images if is_prepared(image)]
    return sum(4 * picture.width * picture.height for picture in pictures) + sum(image.nbytes for image in prepared)


def map_image_parts(conversation: list[dict], function: Callable[[dict], dict]) -> list[dict]:
    """
    A copy of a conversation in which each image part is replaced by what the function returns for it.

    Raises:
        ValueError: if an image part has no `image`. The processor finds all other errors.
    """

    def fill(part):
        if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
            return part
        if "image" not in part:
            raise ValueError(f"an image part must be {{'type': 'image', 'image': ...}}, got {part!r:.200}")
        return function(part)

    return [
        {**turn, "content": list(map(fill, turn["content"]))}
        if isinstance(turn, dict) and isinstance(turn.get("content"), (list, tuple))
        else turn
        for turn in conversation
    ]


def images_of(conversation: list[dict]) -> list:
    """What the image parts of a conversation hold, in order."""
    images = []
    map_image_parts(conversation, lambda part: images.append(part["image"]) or part)
    return images


def answer_all(
    answer: Callable[[list[Asked]], list[dict]], batch: list[Asked], fail: Callable[[Asked, str], dict]
) -> list[dict]:
    """
    The records that `answer` makes of a batch.

    A batch that fails is asked again one by one; `fail` makes the record of each one that fails again.

    Raises:
        OSError, RuntimeError: if the machine fails (a lost device or network, too little memory for a single
            question), which must not count as a wrong answer. The run can be resumed.
    """
    if not batch:
        return []
    try:
        return answer(batch)
    except (ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) and len(batch) == 1:
            raise
        failure = str(error)
    # The failed batch's memory is freed only now, with the error.
    if len(batch) == 1:
        return [fail(batch[0], failure)]
    return [record for asked in batch for record in answer_all(answer, [asked], fail)]
