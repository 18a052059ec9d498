"""A model that answers: batches of questions about encoded images, and how likely given answers are."""

import math
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from . import FeatureCache, MCLlavaForConditionalGeneration, MCLlavaProcessor, check_knob


Asked = TypeVar("Asked")


def user_turn(question: str, num_images: int) -> list[dict]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


class Likelihood(NamedTuple):
    """
    Of an answer's tokens, the end of its turn among them: without it "red" could never be less likely than "red and
    blue".
    """

    log_probability: float  # the sum over the tokens, natural
    num_tokens: int
    is_greedy: bool  # whether each token is the likeliest


class Evaluator:
    """
    A model that answers questions about images, many at a time. Images that follow each other are encoded once.

    Args:
        max_crops, num_tokens: as the processor was saved where None.
        batch_size: rows of a forward pass.
        max_new_tokens: upper bound of a reply's tokens.

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
        max_new_tokens: int = 32,
    ):
        self.model, self.processor, self.feature_cache = model.eval(), processor, FeatureCache()
        self.knobs = fill_knobs(processor, max_crops, num_tokens)
        self.batch_size = check_knob("batch_size", batch_size, 1)
        self.max_new_tokens = check_knob("max_new_tokens", max_new_tokens, 1)

    def encode(self, images: list) -> list[torch.Tensor]:
        """One float[tokens, hidden] per RGB image."""
        return self.feature_cache.encode(self.model, self.processor.image_processor, images, **self.knobs)

    def expand(self, prompt: str, features: list[torch.Tensor]) -> str:
        """The prompt with one `<image>` per visual token."""
        image_token = self.processor.image_token
        first, *rest = prompt.split(image_token)
        return first + "".join(image_token * len(tokens) + text for tokens, text in zip(features, rest, strict=True))

    def generate(self, questions: list[str], features: list[list[torch.Tensor]], **options) -> list[str]:
        """
        Replies to questions.

        Args:
            features: of each question its encoded images.
            options: for `generate`, beside the defaults: greedy, and `max_new_tokens` of this object.
        """
        prompts = []
        for question, images in zip(questions, features):
            turn = user_turn(question, len(images))
            prompts.append(self.expand(self.processor.apply_chat_template(turn, add_generation_prompt=True), images))
        inputs = self.processor.tokenizer(prompts, padding=True, return_tensors="pt").to(self.model.device)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, **options}
        output = self.model.generate(**inputs, image_features=[*chain(*features)], **options)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return [reply.strip() for reply in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]

    def option_likelihoods(
        self, question: str, options: tuple[str, ...], features: list[torch.Tensor]
    ) -> list[Likelihood]:
        """
        How likely each option is as the whole answer to a question about encoded images.

        Raises:
            ValueError: if an option doesn't fit into the context, or its likelihood is no finite number.
        """
        turn = user_turn(question, len(features))
        prompt = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        rows, lengths = [], []
        for option in options:
            whole = self.processor.apply_chat_template([*turn, {"role": "assistant", "content": option}]).rstrip("\n")
            if not whole.startswith(prompt):
                raise ValueError("the chat template writes another prompt before an answer: use the published one")
            prompt_ids, option_ids = (
                self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (self.expand(prompt, features), whole.removeprefix(prompt))
            )
            rows.append(torch.tensor(prompt_ids + option_ids))
            lengths.append(len(option_ids))
        limit = self.model.config.text_config.max_position_embeddings
        if (longest := max(map(len, rows))) > limit:
            raise ValueError(f"question and option have {longest} tokens, the context {limit}: lower num_tokens")

        likelihoods = []
        for start in range(0, len(rows), self.batch_size):
            end = start + self.batch_size
            likelihoods += self._row_likelihoods(rows[start:end], lengths[start:end], features)
        for option, likelihood in zip(options, likelihoods):
            if not math.isfinite(likelihood.log_probability):
                raise ValueError(
                    f"the log probability of {option!r} is {likelihood.log_probability}: try the dtype float32"
                )
        return likelihoods

    def _row_likelihoods(self, rows: list[torch.Tensor], lengths: list[int], features: list) -> list[Likelihood]:
        """Of the last `lengths[i]` tokens of row i."""
        padding = self.processor.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        kept = max(lengths) + 1  # padded on the left, all options end in the last column
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(self.model.device),
                image_features=features * len(rows),
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


def fill_knobs(processor: MCLlavaProcessor, max_crops: int | None, num_tokens: int | None) -> dict[str, int]:
    """The knobs, as the processor was saved where None."""
    saved = processor.image_processor
    return {
        "max_crops": check_knob("max_crops", saved.max_crops if max_crops is None else max_crops, 0),
        "num_tokens": check_knob("num_tokens", saved.num_tokens if num_tokens is None else num_tokens, 1),
    }


def answer_all(
    answer: Callable[[list[Asked]], list[dict]], batch: list[Asked], fail: Callable[[Asked, str], dict]
) -> list[dict]:
    """
    The records that `answer` makes of a batch.

    A batch that fails is asked again one by one: what fails then has the record that `fail` makes of it and the error.

    Raises:
        OSError, RuntimeError: of the machine, not of what was asked, and so no wrong answer: a lost device or network,
            too little memory for a single question. A run goes on from there when it is started again.
    """
    if not batch:
        return []
    try:
        return answer(batch)
    except (ValueError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) and len(batch) == 1:
            raise
        failure = str(error)
    # Only now, without the error, is the failed batch's memory free.
    if len(batch) == 1:
        return [fail(batch[0], failure)]
    return [record for asked in batch for record in answer_all(answer, [asked], fail)]
