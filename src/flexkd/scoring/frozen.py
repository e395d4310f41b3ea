"""A model frozen and in eval mode while its outputs are differentiated by its states, then restored."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.modes import eval_mode


@contextmanager
def frozen_eval(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is in eval mode, without parameter gradients and gradient checkpointing; restored afterwards.

    A layer with weights that lets no gradient through raises an error, as scores would miss the paths through it.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    checkpointing: list[tuple[Any, bool]] = [(module, bool(module.gradient_checkpointing)) for module in checkpointed]
    watches = _watch_gradients(model)
    try:
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        for module, _ in checkpointing:
            module.gradient_checkpointing = False
        with eval_mode(model):
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for module, is_checkpointed in checkpointing:
            module.gradient_checkpointing = is_checkpointed
        for watch in watches:
            watch.remove()


def _watch_gradients(model: PreTrainedModel) -> list[RemovableHandle]:
    # Quantized weights are buffers, so linear layers are recognized by name; other modules that have only buffers, such
    # as those of positions, have no gradient to pass on.
    names = {
        module: name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None or "Linear" in type(module).__name__
    }

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        needs = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        if needs and isinstance(output, Tensor) and not output.requires_grad:
            raise UnsupportedModelError(
                f"{type(model).__name__}: scores are unavailable, '{names[module]}' lets no gradient through "
                "(quantised weights?). Score a copy of the teacher in float32 or bfloat16."
            )

    return [module.register_forward_hook(check) for module in names]


def state_gradients(teacher: PreTrainedModel, value: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a scalar by states; the graph is retained.

    Raises:
        UnsupportedModelError: The scalar does not depend on a state, or an operation between them has no backward, as
            the 4-bit kernels of some CPUs.
    """
    grad_states: Sequence[Tensor | None] = ()
    try:
        with warnings.catch_warnings():
            # PyTorch only warns and drops the paths through such an operation, so that the scores would miss them.
            warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
            if value.requires_grad:
                grad_states = torch.autograd.grad(value, states, allow_unused=True, retain_graph=True)
    except UserWarning as warning:
        raise UnsupportedModelError(
            f"{type(teacher).__name__}: scores are unavailable, '{str(warning).partition(': ')[0]}' lets no gradient "
            "through (quantised weights?). Score a copy of the teacher in float32 or bfloat16."
        ) from None
    gradients = tuple(gradient for gradient in grad_states if gradient is not None)
    if len(gradients) < len(states):
        raise UnsupportedModelError(
            f"{type(teacher).__name__}: scores are unavailable, its outputs do not depend on the state that is "
            "read at this layer. Score another layer, or add a row to facts/families (docs/extend.md)."
        )
    return gradients
