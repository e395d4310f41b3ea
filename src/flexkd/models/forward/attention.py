"""Which attention is the fastest for the rows of a run."""

from collections.abc import Sequence
from typing import Any

import torch


def prefer_short_rows_attention(models: Sequence[Any], max_length: int) -> None:
    """On a CPU, rows of up to 256 tokens train faster with eager attention than with the fused one."""
    if torch.cuda.is_available() or max_length > 256:
        return
    for model in models:
        model.set_attn_implementation("eager")
