"""
A cache of the keys and values of prompts, for later prompts with the same beginning: another question about the same
picture, or the next turn of a conversation.

    first prompt     system, <image> <image> ... <image> | What is on the table?
    second prompt    system, <image> <image> ... <image> | What color is it?
                     └─ reused ────────────────────────┘
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import gcd
from threading import Lock

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .encoded_images_mc_llava import read_integers
from .hashing_mc_llava import adapter_names, adapter_states, forward_hooks, injected_names, is_training


SAMPLE = 4096  # values of each weight that are compared, spread evenly; more for those with more rows or columns
ROOM = 128  # tokens that a `RoomyLayer` can grow by before it is copied
# Whose forward hooks leave keys and values alone: they record outputs, gather weights or ask for gradients.
HARMLESS_HOOKS = ("torch.", "transformers.", "accelerate.", "peft.peft_model", "peft.mixed_model", "peft.utils.")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Segment:
    """
    Keys and values of consecutive tokens of a prompt.

    Args:
        names: the names of the tokens, see `name_tokens`.
        layers: keys and values of each layer, float[1, heads, tokens, head_dim].
    """

    names: list[bytes]
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in chain(*self.layers))


class RoomyLayer(DynamicLayer):
    """
    A layer's keys and values with room behind them. `DynamicLayer` copies all tokens for each new one; here, a new one
    is written into the room:

        room    [ known tokens | new | ...free... ]
        keys     └────────────────┘
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._rooms = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (part[..., :0, :] for part in (key_states, value_states))
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, known: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length, room = known.shape[-2], self._rooms.get(name)
        stop = length + new.shape[-2]
        is_own = room is not None and room.data_ptr() == known.data_ptr() and len(room) == len(known)
        if not is_own or stop > room.shape[-2]:
            room = self._rooms[name] = new.new_empty(*new.shape[:-2], stop + ROOM, new.shape[-1])
            room[..., :length, :] = known
        room[..., length:stop, :] = new
        return room[..., :stop, :]

    # These make new tensors, without room.

    def reorder_cache(self, *args, **kwargs):
        super().reorder_cache(*args, **kwargs)
        self._rooms.clear()

    def batch_repeat_interleave(self, *args, **kwargs):
        super().batch_repeat_interleave(*args, **kwargs)
        self._rooms.clear()

    def batch_select_indices(self, *args, **kwargs):
        super().batch_select_indices(*args, **kwargs)
        self._rooms.clear()

    def reset(self):
        super().reset()
        self._rooms.clear()


@dataclass
class Prompts:
    """
    The prompts of a call.

    Args:
        starts: the column where each row starts, after its padding.
        names: the names of each row's tokens, see `name_tokens`.
    """

    starts: list[int]
    names: list[list[bytes]]


class PrefixCache:
    """
    Keeps the keys and values of the most recently used prompts and answers. `generate` with this `prefix_cache`
    computes only what follows the longest known beginning of a prompt:

        kept = PrefixCache()
        for question in questions:
            inputs = processor(question, picture).to(model.device)
            model.generate(**inputs, prefix_cache=kept)

    A token is identified by the embeddings of all tokens up to it, those of images included, by the dtype and by the
    language model's weights and adapters. What prompts share is kept once. Threads may share a cache.

    Changed weights are detected by torch's version counters and by values of each row and column, at least `SAMPLE` of
    each weight. After changing single values in a way that torch doesn't count (through `.data`, a NumPy view, or a
    fused optimizer), or attributes of layers, call `clear`.

    Args:
        max_bytes: upper bound of the size of all keys and values in bytes. They stay on the device that computed them,
            and the least recently used ones are dropped first.

    Attributes:
        nbytes: size of the keys and values in the cache, in bytes.
        reused: how many tokens were taken from the cache, over all calls.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int = 2**30):
        if not max_bytes >= 0:  # of NaN, no comparison is true
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.nbytes = self.reused = 0
        self._segments = OrderedDict()  # by number, the least recently used first
        self._tokens = {}  # name -> (number of the segment, place in it)
        self._count = 0  # of all segments that were ever added, the number of the next one
        self._lock = Lock()

    def clear(self):
        """Forget everything."""
        with self._lock:
            self._segments.clear()
            self._tokens.clear()
            self.nbytes = 0

    def load(self, model, embeds: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Cache, Prompts]:
        """
        Look up prompts.

        Args:
            model: `MCLlavaForConditionalGeneration`.
            embeds: float[batch, length, hidden], padded on the left.
            attention_mask: int[batch, length], 0 for padding.

        Returns:
            A cache for `generate`, filled as far as all rows are known, but not with the last token, whose logits are
            needed; and the prompts, for `keep`.

        Raises:
            ValueError: if the prompts are not padded on the left.
        """
        made_by = describe_rows(model, len(embeds))
        counts, (is_left,) = read_integers(  # a mask may be of floats
            attention_mask.sum(-1), (attention_mask[:, 1:] >= attention_mask[:, :-1]).all().view(1)
        )
        if not is_left:
            raise ValueError("a prefix cache needs prompts that are padded on the left: pad them there")
        starts = [attention_mask.shape[1] - count for count in counts]
        names = [name_tokens(before, row[start:]) for before, row, start in zip(made_by, read_bytes(embeds), starts)]
        prompts = Prompts(starts, names)
        cache = DynamicCache(config=model.config.get_text_config())
        cache.layers = [RoomyLayer() for _ in cache.layers]
        with self._lock:
            found = [self._find(row) for row in names]
        ends = [start + sum(stop - first for _, first, stop in runs) for start, runs in zip(starts, found)]
        columns = min(*ends, embeds.shape[1] - 1)
        if columns > min((start for start, runs in zip(starts, found) if runs), default=columns):
            for index in range(len(next(iter(filter(None, found)))[0][0].layers)):
                keys, values = (self._fill(found, starts, index, part, columns) for part in range(2))
                fill_layer(cache.layers[index], keys, values)
            with self._lock:
                self.reused += sum(max(0, columns - start) for start in starts)
        return cache, prompts

    def keep(self, prompts: Prompts, cache: Cache, new_embeds: torch.Tensor | None = None, repeats: int = 1):
        """
        Store what a call has computed.

        Args:
            prompts: what `load` returned.
            cache: keys and values of the prompts and of the tokens after them.
            new_embeds: float[batch, new, hidden], embeddings of the tokens after the prompts. By default, only the
                prompts are stored.
            repeats: how many rows of `cache` each prompt has.
        """
        length = cache.get_seq_length()
        new = None if new_embeds is None else read_bytes(new_embeds)
        for row, (start, names) in enumerate(zip(prompts.starts, prompts.names)):
            if new is not None:
                names = names + name_tokens(names[-1], new[row]) if names else []
            names = names[: length - start]
            layers = [(layer.keys[row * repeats], layer.values[row * repeats]) for layer in cache.layers]
            self._put(names, start, layers)

    def _find(self, names: list[bytes]) -> list[tuple[Segment, int, int]]:
        """The longest known beginning of a prompt, as parts of segments: (segment, first, stop)."""
        runs, numbers = [], []
        for name in names:
            number, place = self._tokens.get(name, (None, 0))
            if number is None:
                break
            if numbers and numbers[-1] == number and runs[-1][2] == place:
                runs[-1] = (*runs[-1][:2], place + 1)
            else:
                runs.append((self._segments[number], place, place + 1))
                numbers.append(number)
        for number in reversed(numbers):  # a segment is useless without those before it, which are dropped later
            self._segments.move_to_end(number)
        return runs

    @staticmethod
    def _fill(found: list, starts: list[int], index: int, part: int, columns: int) -> torch.Tensor:
        """Keys or values of a layer up to a column, zeros for padding: float[batch, heads, columns, head_dim]."""
        some = next(iter(filter(None, found)))[0][0].layers[index][part]
        rows = []
        for start, runs in zip(starts, found):
            parts = [some.new_zeros(*some.shape[:2], start, some.shape[3])] if start else []
            parts += [segment.layers[index][part][:, :, first:stop] for segment, first, stop in runs]
            rows.append((torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])[:, :, :columns])
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _put(self, names: list[bytes], start: int, layers: list[tuple[torch.Tensor, torch.Tensor]]):
        """
        Store the new tokens of a prompt.

        Args:
            start: the column of the prompt's first token.
            layers: keys and values of each layer, float[heads, length, head_dim].
        """
        with self._lock:
            known = sum(stop - first for _, first, stop in self._find(names))
        bytes_per_token = sum(tensor[:, 0].numel() * tensor.itemsize for tensor in chain(*layers))
        fitting = int(min(self.max_bytes, bytes_per_token * len(names)) // bytes_per_token)  # it may be infinite
        new = names[known:fitting]
        if not new:
            return
        columns = slice(start + known, start + known + len(new))
        segment = Segment(new, [tuple(part[None, :, columns].clone() for part in layer) for layer in layers])
        with self._lock:
            if runs := self._find(names):
                self._split(*runs[-1])
            self._add(segment)
            self._find(names)  # marks them as used
            while self.nbytes > self.max_bytes:
                self._drop(next(iter(self._segments)))

    def _split(self, segment: Segment, first: int, stop: int):
        """Split a segment where two prompts diverge, so that what they share can outlive the rest."""
        if stop == len(segment.names):
            return
        self._drop(self._tokens[segment.names[first]][0])
        for columns in (slice(stop, None), slice(stop)):
            parts = [tuple(part[:, :, columns].clone() for part in layer) for layer in segment.layers]
            self._add(Segment(segment.names[columns], parts))

    def _add(self, segment: Segment):
        self._count += 1
        self._segments[self._count] = segment
        self.nbytes += segment.nbytes
        self._tokens |= {name: (self._count, place) for place, name in enumerate(segment.names)}

    def _drop(self, number: int):
        segment = self._segments.pop(number)
        self.nbytes -= segment.nbytes
        for name in segment.names:
            if self._tokens.get(name, (None, 0))[0] == number:
                del self._tokens[name]


def fill_layer(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor):
    """Give a new layer keys and values, without copying them as `update` does. They are not changed as it grows."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def read_bytes(embeds: torch.Tensor) -> np.ndarray:
    """float[batch, length, hidden] as uint8[batch, length, bytes] on the host, in one copy."""
    return embeds.detach().contiguous().view(torch.uint8).cpu().numpy()


def name_tokens(before: bytes, embeds: np.ndarray) -> list[bytes]:
    """
    A name for each token: a digest of all that its keys and values depend on, which are the weights, the dtype, and
    the embeddings up to it.

    Args:
        before: the name of the token before them or, at the start of a prompt, what `describe_rows` returns for it.
        embeds: uint8[length, bytes], of `read_bytes`.
    """
    names, name = [], before
    for row in embeds:
        name = hashlib.sha256(name + row.tobytes()).digest()
        names.append(name)
    return names


def describe_language_model(model) -> bytes:
    """A quick digest of the language model's weights, see `PrefixCache`, and of how it computes."""
    language_model, digest = model.model.language_model, hashlib.sha256()
    device = language_model.device.type  # the vision tower may be offloaded
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest.update(f"{autocast} {model.config.get_text_config().to_json_string()}".encode())
    digest.update(f"{is_training(language_model)}".encode())
    digest.update(str(adapter_states(language_model)).encode())
    samples = {}
    for name, tensor in chain(language_model.named_parameters(), language_model.named_buffers()):
        for part in plain_tensors(tensor):
            changes = None if part.is_inference() else part._version
            digest.update(f"{name} {part.dtype} {list(part.shape)} {part.data_ptr()} {changes}".encode())
            sample = part.detach().reshape(-1)[:: sampling_step(part.shape)]
            if not part.dtype.is_complex:
                sample = sample.view(INTEGERS[part.itemsize])
            samples.setdefault((sample.dtype, part.device), []).append(sample)
    for parts in samples.values():
        digest.update(torch.cat(parts).view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()


def sampling_step(shape: torch.Size) -> int:
    """
    The step between the sampled values of a weight, which are counted row by row. It is not longer than a row, and has
    no factor in common with its length: so each row and each column has a sample.
    """
    size, columns = shape.numel(), shape[-1] if shape else 1
    if not size:
        return 1
    step = max(1, size // max(SAMPLE, columns, size // columns))
    while gcd(step, columns) > 1:
        step -= 1
    return step


def describe_rows(model, rows: int) -> list[bytes]:
    """For each prompt of a batch, `describe_language_model` and the adapter that `adapter_names` chose for it."""
    made_by, adapters = describe_language_model(model), adapter_names(model.model.language_model)
    if adapters is None or len(adapters) % rows:  # PEFT refuses the latter
        return [made_by] * rows
    adapters = adapters[:: len(adapters) // rows]  # each beam has a name
    return [hashlib.sha256(made_by + name.encode()).digest() for name in adapters]


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that a quantized or distributed one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a distributed tensor also names its devices (torch 2.13)
            yield from plain_tensors(part)


def refuse_prefixes(model):
    """Raise a ValueError if a model's keys and values can't be kept."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    if kinds := sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}):
        raise ValueError(
            f"a prefix cache needs the keys and values of all earlier tokens, but the language model's layers use "
            f"{', '.join(kinds)}: leave prefix_cache out"
        )
    if any(parameter.is_meta for parameter in model.model.language_model.parameters()):
        raise ValueError(
            "the language model's weights are offloaded, so that changes of them can't be detected: leave "
            "prefix_cache out, or load the model to a device"
        )
    before = [hook for module in (model, model.model) for hook in module._forward_pre_hooks.values()]
    for hook in forward_hooks(model.model.language_model) + before:
        function = getattr(hook, "func", hook)  # of a partial
        function = function if hasattr(function, "__qualname__") else type(function)
        name = f"{function.__module__}.{function.__qualname__}"
        if not name.startswith(HARMLESS_HOOKS) and injected_names(hook) is None:
            raise ValueError(
                f"the model has the forward hook {name}, which may change keys and values: remove it, or "
                "leave prefix_cache out"
            )


def can_keep_prefixes(model, generation_config=None, **options) -> bool:
    """Whether `generate` accepts a `prefix_cache` with this model, its saved defaults and these options."""
    try:
        model._refuse_with_prefixes(generation_config, options)
    except ValueError:
        return False
    return True


__all__ = ["PrefixCache", "can_keep_prefixes"]
