"""The blocks of a model compiled while it trains; hooks that read or replace states run around them as always."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch._dynamo
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flexkd.errors import RecipeError, UnsupportedModelError

_VARIANTS: Final = 64
"""Compilations before torch gives up: all kinds of blocks share one wrapper, each with its own arguments, shapes, and a
training and an evaluation form."""


@contextmanager
def compiled_blocks(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """Compile the `forward` of each block, for as long as the context lasts.

    Blocks of one kind share what is compiled, and nothing of it is saved with the model. A block is called through its
    hooks, which are not compiled: they change with every batch, and each change would compile the model again.

    Raises:
        UnsupportedModelError: No module of the model is marked as a block.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__}: none of its modules is marked as a block. Set training.compile to false."
        )
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend)
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def check_compiler(device: torch.device) -> None:
    """Compile one addition.

    Raises:
        RecipeError: It fails: there is no C++ compiler, or no Triton for the device.
    """
    try:
        torch.compile(_add_one)(torch.zeros(2, device=device))
    except Exception as error:  # The compiler's errors have no type in common.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"training.compile: torch cannot compile here ({reason}). Set it to false, or install the compiler that is "
            "missing."
        ) from error


def _add_one(values: torch.Tensor) -> torch.Tensor:
    return values + 1
