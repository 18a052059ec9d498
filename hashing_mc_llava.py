"""Hashes of weights, computed on their device, and of what encoded images depend on."""

import hashlib
from itertools import chain, zip_longest

import torch
from torch import nn
from torch.nn.modules import module as modules

from .threads_mc_llava import in_threads


MULTIPLIER = 0x5851F42D4C957F2D  # odd, so that multiplying loses no bits
BLOCK = 2**15  # 64-bit words, which fit a core's cache
STACK_BYTES = 256 * 2**20  # of tensors that are stacked on a device


def hash_tensors(tensors) -> str:
    """
    A hash of the bits, dtypes and shapes of tensors, the same on every device.

    Each tensor's 64-bit words are mixed with their positions and summed on the tensor's device: copying a vision tower
    from a GPU for a hash on the CPU would take longer than encoding a picture. All sums on a device are read at once.

    Raises:
        ValueError: if a tensor is on the meta device, as weights offloaded to disk are.
    """
    tensors = [tensor.detach() for tensor in tensors]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("weights offloaded to disk can't be hashed: load the vision tower to a device")
    places = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    sums = {}
    for device, found in places.items():
        octets = [tensors[place].contiguous().reshape(-1).view(torch.uint8) for place in found]
        sums |= zip(found, sum_in_blocks(octets) if device.type == "cpu" else sum_stacked(octets))
    digest = hashlib.sha256()
    for place, tensor in enumerate(tensors):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}{sums[place]}".encode())
    return digest.hexdigest()


def adapter_states(module: nn.Module) -> list[tuple]:
    """Of each layer with PEFT's adapters: whether they are disabled, which are active, and the factor of each."""
    return [
        (layer.disable_adapters, layer.active_adapters, getattr(layer, "scaling", None))
        for layer in module.modules()
        if isinstance(getattr(layer, "disable_adapters", None), bool)  # without adapters it is a method
    ]


def forward_hooks(module: nn.Module) -> list:
    """The forward hooks and pre-hooks of a module and of all modules in it, and the global ones."""
    found = [modules._global_forward_pre_hooks, modules._global_forward_hooks]
    for part in module.modules():
        found += [part._forward_pre_hooks, part._forward_hooks]
    return [hook for hooks in found for hook in hooks.values()]


def adapter_names(module: nn.Module) -> list[str] | None:
    """PEFT's adapter for each row of a batch, within `generate(..., adapter_names=...)`; otherwise None."""
    given = map(injected_names, forward_hooks(module))
    return next((names for names in given if names is not None), None)


def injected_names(hook) -> list[str] | None:
    """The `adapter_names` that a hook of PEFT passes to a layer; None for other hooks."""
    return getattr(hook, "keywords", {}).get("adapter_names")


def is_training(*parts: nn.Module) -> bool:
    """Whether a module in these parts is in training mode, where dropout changes results."""
    return any(module.training for part in parts for module in part.modules())


def describe_encoder(model) -> tuple[str, str, str, bool]:
    """
    The hash of the weights that encode crops, the dtype, autocast's included, and the device of the results, and
    whether the model is in training mode.
    """
    weights_hash = model.hash_encoder()  # or an error, if weights are on "meta", where there is no autocast
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return weights_hash, str(dtype), str(model.device), is_training(*model.model.encoder_parts)


def picture_key(pixels: bytes, size: tuple[int, int], resample: int | None, values: bytes, made_by: tuple) -> tuple:
    """
    The key of a picture in a `FeatureCache`. A crop's key is this and its box.

    Args:
        pixels, size: the bytes of the RGB picture, and its width and height.
        resample: the filter that resizes crops.
        values: float32[3, 256], what each byte becomes in each channel.
        made_by: what `describe_encoder` returns.
    """
    resample = None if resample is None else int(resample)
    return (hashlib.sha256(pixels).hexdigest(), size, resample, hashlib.sha256(values).hexdigest(), *made_by)


def sum_in_blocks(octets: list[torch.Tensor]) -> list[int]:
    """
    The sum of each tensor's mixed words on a CPU, in blocks that stay in a core's cache. Each thread sums other
    tensors: threads that shared a block would wait for each other at every operator.
    """
    threads = min(torch.get_num_threads(), len(octets))
    shares = [range(first, len(octets), threads) for first in range(threads)]
    sums = in_threads(_sum_share, [[octets[place] for place in share] for share in shares], threads)
    found = dict(zip(chain(*shares), torch.cat(sums).tolist()))
    return [found[place] for place in range(len(octets))]


def _sum_share(octets: list[torch.Tensor]) -> torch.LongTensor:
    """`sum_in_blocks` in one thread: block by block across tensors, because blocks at the same place share keys."""
    keys = _keys(BLOCK, "cpu")
    buffers = (
        torch.empty_like(keys),
        torch.empty_like(keys),
    )  # allocating memory would take longer than computing in it
    step = (2 * BLOCK * MULTIPLIER + 2**63) % 2**64 - 2**63  # as int64
    sums, order = [], []
    for blocks in zip_longest(*(_to_words(tensor).split(BLOCK) for tensor in octets)):
        for place, block in enumerate(blocks):
            if block is not None:
                own, *spare = (tensor[: len(block)] for tensor in (keys, *buffers))
                sums.append(torch.dot(_mix(block, own, *spare), own))
                order.append(place)
        keys += step
    return keys.new_zeros(len(octets)).index_add_(0, torch.tensor(order, device="cpu"), torch.stack(sums))


def sum_stacked(octets: list[torch.Tensor]) -> list[int]:
    """The sum of each tensor's mixed words on an accelerator, with few kernels: tensors of equal size are stacked."""
    sizes = {}
    for place, tensor in enumerate(octets):
        if len(tensor):
            sizes.setdefault(len(tensor), []).append(place)
    if not sizes:
        return [0] * len(octets)
    keys = _keys(-(-max(sizes) // 8), octets[0].device)
    parts, order = [], []
    for size, places in sizes.items():
        at_once = max(1, STACK_BYTES // size)
        for start in range(0, len(places), at_once):
            chosen = places[start : start + at_once]
            words = _to_words(torch.stack([octets[place] for place in chosen]))
            own = keys[: words.shape[-1]]
            parts.append((_mix(words, own) * own).sum(-1))
            order += chosen
    sums = dict(zip(order, torch.cat(parts).tolist()))
    return [sums.get(place, 0) for place in range(len(octets))]


def _to_words(octets: torch.Tensor) -> torch.Tensor:
    """uint8[..., bytes] as int64[..., words], padded with zeros."""
    if missing := -octets.shape[-1] % 8:
        octets = nn.functional.pad(octets, (0, missing))
    elif octets.storage_offset() % 8:  # a view must start at a word
        octets = octets.clone()
    return octets.view(torch.int64)


def _keys(count: int, device: str | torch.device) -> torch.Tensor:
    return (2 * torch.arange(count, device=device) + 1) * MULTIPLIER  # int64 wraps around


def _mix(
    words: torch.Tensor, keys: torch.Tensor, mixed: torch.Tensor | None = None, high: torch.Tensor | None = None
) -> torch.Tensor:
    """Words that depend on all bits of each word and its key. `mixed` and `high` are buffers, allocated by default."""
    mixed = torch.bitwise_xor(words, keys, out=mixed)
    mixed *= MULTIPLIER
    mixed ^= torch.bitwise_right_shift(mixed, 32, out=high)
    return mixed


__all__ = [
    "adapter_names",
    "adapter_states",
    "describe_encoder",
    "forward_hooks",
    "hash_tensors",
    "injected_names",
    "is_training",
    "picture_key",
]
