"""The precision of weights on a CPU, where float16 takes ten times as long as what the CPU computes in."""

import os

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN, which multiplies torch's matrices, from instructions for bfloat16.
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
# What `torch.cpu.get_capabilities` calls these instructions on x86 and on Arm.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def computes_in_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices with instructions of this CPU. Older releases of torch can't tell."""
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if held_to in WITHOUT_BFLOAT16 or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in BFLOAT16)


def choose_dtype(device: str | torch.device) -> torch.dtype | str:
    """
    The default `dtype` for `from_pretrained`.

    On a CPU: bfloat16 if the CPU computes in it, else float32, whatever the file's dtype. On an accelerator: "auto",
    which keeps the file's.
    """
    if torch.device(device).type != "cpu":
        return "auto"
    return torch.bfloat16 if computes_in_bfloat16() else torch.float32


def warn_of_float16(dtype: torch.dtype, device: torch.device):
    """Warn once about a model that computes in float16 on a CPU."""
    if dtype == torch.float16 and device.type == "cpu" and not torch.compiler.is_compiling():
        faster = choose_dtype(device)
        logger.warning_once(
            f"The model computes in torch.float16, which is several times slower on a CPU than {faster}: load it with "
            f"dtype={faster}, or move it to a GPU"
        )


__all__ = ["choose_dtype", "computes_in_bfloat16", "warn_of_float16"]
