"""
MC-LLaVA in lmms-eval, which finds it by the entry point `lmms_eval.models`:

    lmms-eval --model mc_llava --model_args pretrained=FOLDER,max_crops=20,num_tokens=728 --tasks textvqa_val

lmms-eval asks; `mc_llava.engine` answers. lmms-eval exits with 0 on failure too: check its results.
"""

import json
import os
import sys
from itertools import groupby, islice

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from ..engine import Engine, ask_about
from ..loading import load


def manifest() -> ModelManifest:
    return ModelManifest("mc_llava", simple_class_path=f"{__name__}.MCLlavaForLmmsEval")


class MCLlavaForLmmsEval(lmms):
    """
    Args:
        pretrained: a model folder or a Hub id.
        revision: branch, tag or commit of a Hub id.
        max_crops, num_tokens, zoom: by default as the processor was saved.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: rows of a forward pass.
        device: by default an accelerator if there is one; each of several processes has its own.
        max_batch_size: not used: there is no automatic batch size.
    """

    def __init__(
        self,
        pretrained: str = "visheratin/MC-LLaVA-3b",
        revision: str | None = None,
        max_crops: int | None = None,
        num_tokens: int | None = None,
        zoom: int | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, got {batch_size!r}: there is no automatic one")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None or self._world_size > 1:
            device = str(self.accelerator.device)
        model, processor, _ = load(pretrained, revision, dtype, device)
        options = {"max_crops": max_crops, "num_tokens": num_tokens, "zoom": zoom, "batch_size": int(batch_size)}
        self.engine = Engine(model, processor, max_new_tokens=32, prefix_bytes=0, **options)
        self.device = model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Replies, cut where one of the task's `until` begins; empty if a question can't be asked."""
        # Only requests with the same options can be generated together.
        order = sorted(range(len(requests)), key=lambda index: options_of(requests[index]))
        replies = [""] * len(requests)
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as progress:
            for _, group in groupby(order, key=lambda index: options_of(requests[index])):
                while batch := list(islice(group, self.engine.batch_size)):
                    for index, reply in zip(batch, self._replies([requests[index] for index in batch])):
                        replies[index] = reply
                    progress.update(len(batch))
        return replies

    def _replies(self, batch: list[Instance]) -> list[str]:
        try:
            return self._generate(batch)
        except ValueError as error:
            if len(batch) > 1:
                return [reply for request in batch for reply in self._replies([request])]
            tqdm.write(f"failed, the reply is empty: {batch[0].args[0]!r:.80}: {error}", file=sys.stderr)
            return [""]

    def _generate(self, batch: list[Instance]) -> list[str]:
        until = batch[0].args[1].get("until") or []
        until = [until] if isinstance(until, str) else until
        # Tasks also have options for particular models, such as image_aspect_ratio: keep those that `generate` knows.
        known = self.engine.model.generation_config.to_dict()
        given = {name: value for name, value in batch[0].args[1].items() if name in known}
        temperature = given.get("temperature")
        given["do_sample"] = temperature != 0 and bool(given.get("do_sample", temperature))
        if not given["do_sample"]:
            for name in ("temperature", "top_p", "top_k"):  # used only with sampling
                given.pop(name, None)
        conversations = [ask_about(self._images(request), request.args[0]) for request in batch]
        replies = [reply.text for reply in self.engine.answer(conversations, **given)]
        for end in until:
            replies = [reply.split(end)[0].strip() if end else reply for reply in replies]
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        The loss of each answer as a whole turn, and whether greedy decoding gives exactly that answer.

        lmms-eval's own models return the mean loss of the tokens here too, and its scores take the smallest. Its
        release 0.7.3 turns what any model returns into a string, and so can't score tasks that ask for it.
        """
        found = []
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as progress:
            for _, group in groupby(requests, key=lambda request: (request.args[0], *request.args[3:])):
                group = list(group)  # the options of one question
                answers = [
                    request.args[1] if isinstance(request.args[1], str) else request.args[1](self._doc(request))
                    for request in group
                ]
                likelihoods = self.engine.likelihoods(
                    ask_about(self._images(group[0]), group[0].args[0]), tuple(answer.strip() for answer in answers)
                )
                found += [(-one.log_probability / one.num_tokens, one.is_greedy) for one in likelihoods]
                progress.update(len(group))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("MC-LLaVA answers one question at a time: choose tasks of a single round")

    def _doc(self, request: Instance) -> dict:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _images(self, request: Instance) -> list:
        images = request.args[2](self._doc(request)) if request.args[2] else []
        for image in images:
            if isinstance(image, (str, os.PathLike)):  # paths and URLs in a data set are not followed
                raise ValueError(f"the task gives the text {str(image)!r:.80} instead of an image: choose another")
        return images


def options_of(request: Instance) -> str:
    return json.dumps(request.args[1], sort_keys=True, default=str)
