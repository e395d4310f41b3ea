"""The number type that a model computes in: its name in a recipe, what `auto` means here, and the type for autocast."""

from pathlib import Path
from typing import Final

import torch

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number types by the names that recipes have for them."""

_CPU_FLAGS: Final = ("amx_bf16", "avx512_bf16")


def resolve_precision(precision: str) -> str:
    """`auto` as float32 or bfloat16: bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.is_file() else ""
    return "bfloat16" if any(flag in flags for flag in _CPU_FLAGS) else "float32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Autocast type of a resolved precision; None for float32."""
    return None if precision == "float32" else DTYPES[precision]


def scoring_dtype(precision: str) -> torch.dtype | None:
    """Autocast type in which a teacher of a resolved precision is scored: small gradients are zeros in float16."""
    return None if precision == "float16" else autocast_dtype(precision)
