"""Sums of per-prediction losses whose logits are computed and freed a few predictions at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flexkd.core.outputs import HeadOutputs

Terms = Callable[[Tensor, slice], Tensor]
"""From the logits of a few predictions `[predictions, outputs]`, and which predictions these are, to the value of each
term `[terms, predictions]`."""

_CHUNKS_TOGETHER: Final = 4
"""Chunks that share one matrix product for the head's gradient; each product is added to a tensor of the weight's
size."""

_OUTPUTS_TOGETHER: Final = 2**14
"""Outputs whose rows of the head's gradient are computed in one matrix product."""


def chunked_sums(
    outputs: HeadOutputs, terms: Terms, weights: Float[Tensor, " terms"], *, chunk_size: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " terms"]]:
    """Sums of per-prediction losses over all predictions, without holding all logits in memory at once.

    Sums, not means: chunks of unequal size weigh what their predictions weigh. Behind a plain linear head the gradient
    is taken together with the value, chunk by chunk, and no logit is computed twice; any other head is run again in
    the backward. Under autocast everything is computed in the types in which the whole logits would have been.

    Args:
        outputs: The student's, with gradients.
        terms: The losses, unreduced; called with the logits of each chunk.
        weights: Of each term in the sum to differentiate; 0 for a term that is only reported.
        chunk_size: Predictions whose logits are in memory at the same time.

    Returns:
        The weighted sum, to be differentiated, and the sum of each term, without a graph.
    """
    assert chunk_size > 0, chunk_size
    head, states = outputs.head, outputs.states
    slices = [slice(first, min(first + chunk_size, len(states))) for first in range(0, len(states), chunk_size)]
    if head.weight is not None:
        weight, bias = head.weight, head.bias
        if not torch.is_grad_enabled():
            # An autograd function would compute the gradients of these inputs although they are not needed.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        arguments = (states, weight, bias, head.finish_logits, terms, weights, slices)
        total, sums = _LinearHead.apply(*arguments)  # type: ignore[no-untyped-call]
        return total, sums

    def sums_of_chunk(chunk_states: Tensor, chunk: slice) -> Tensor:
        return terms(head(chunk_states), chunk).sum(-1)

    sums_by_chunk = [torch.zeros_like(weights) + 0 * states[:0].sum().to(weights)]
    for chunk in slices:
        sums_by_chunk.append(checkpoint(sums_of_chunk, states[chunk], chunk, use_reentrant=False))
    summed = torch.stack(sums_by_chunk).sum(0)
    return weighted_sum(weights, summed), summed.detach()


def weighted_sum(weights: Float[Tensor, " terms"], sums: Float[Tensor, " terms"]) -> Float[Tensor, ""]:
    """Sum of the terms times their weights; a term of weight 0 is left out, even where it is infinite."""
    return torch.where(weights == 0, 0, weights * sums).sum()


def _terms_at(finish: Callable[[Tensor], Tensor], terms: Terms, chunk: slice, raw: Tensor) -> Tensor:
    return terms(finish(raw), chunk).sum(-1)


def _with_gradient(raw: Tensor, sums: Callable[[Tensor], Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each term, and the gradient of their weighted sum."""
    with torch.enable_grad():
        values = sums(raw.requires_grad_())
        (gradient,) = torch.autograd.grad(weighted_sum(weights, values), raw)
    return values.detach(), gradient


def _add_product(grad_weight: Tensor, gradients: Tensor, states: Tensor) -> None:
    """Add `gradients.T @ states` a few outputs at a time: the whole product is as large as the gradient."""
    for part, grad_logits in zip(
        grad_weight.split(_OUTPUTS_TOGETHER), gradients.split(_OUTPUTS_TOGETHER, -1), strict=True
    ):
        part += grad_logits.T @ states


class _LinearHead(torch.autograd.Function):
    """The weighted sum of losses behind a linear head; the forward pass computes its gradient, too."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finish: Callable[[Tensor], Tensor],
        terms: Terms,
        weights: Tensor,
        slices: list[slice],
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[:3]
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        cast_states, matrix = states.to(dtype), weight.to(dtype)
        grad_states = torch.empty_like(states) if needs_gradient[0] else None
        grad_weight = torch.zeros_like(weight) if needs_gradient[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_gradient[2] else None
        sums = torch.zeros_like(weights)
        group_size = _CHUNKS_TOGETHER if grad_weight is not None else 1
        buffer: Tensor | None = None
        for group in (slices[first : first + group_size] for first in range(0, len(slices), group_size)):
            span = slice(group[0].start, group[-1].stop)
            for chunk in group:
                raw = torch.nn.functional.linear(cast_states[chunk], matrix, None if bias is None else bias.to(dtype))
                if not any(needs_gradient):
                    sums += _terms_at(finish, terms, chunk, raw)
                    continue
                values, gradients = _with_gradient(raw, partial(_terms_at, finish, terms, chunk), weights)
                sums += values
                if len(group) > 1:
                    # Allocated once: the operating system clears every new large block.
                    buffer = raw.new_empty(span.stop, len(matrix)) if buffer is None else buffer
                    buffer[chunk.start - span.start : chunk.stop - span.start] = gradients
                # Freed before the logits of the next chunk are computed.
                del raw, values
            if not any(needs_gradient):
                continue
            if buffer is not None and len(group) > 1:
                gradients = buffer[: span.stop - span.start]
            if grad_states is not None:
                grad_states[span] = gradients @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, gradients, cast_states[span])
            if grad_bias is not None:
                grad_bias += gradients.sum(0)
            del gradients
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.mark_non_differentiable(sums)
        return weighted_sum(weights, sums), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradient of a vocabulary is not held twice. A second backward is refused by autograd.
        gradients = [
            None if gradient is None else gradient.mul_(grad_total.to(gradient.dtype)) for gradient in ctx.saved_tensors
        ]
        return (*gradients, None, None, None, None)
