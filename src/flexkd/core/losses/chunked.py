"""Sums of per-prediction losses whose logits are made, used and forgotten a few predictions at a time."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flexkd.core.outputs import HeadOutputs

Terms = Callable[[Tensor, slice], Tensor]
"""Logits of some predictions `[rows, outputs]`, and which rows these are, to the value of each term
`[terms, rows]`."""


def chunked_sums(
    outputs: HeadOutputs, terms: Terms, weights: Float[Tensor, " terms"], *, chunk_size: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " terms"]]:
    """Sums over all predictions of some per-prediction losses, without the logits ever standing in memory.

    Sums, not means: chunks of unequal size weigh what their predictions weigh. Behind a plain linear head the gradient
    is taken together with the value, chunk by chunk, and no logit is computed twice; any other head is run again in
    the backward. Under autocast everything is computed in the types in which the whole logits would have been.

    Args:
        outputs: The student's, with gradients.
        terms: The losses, unreduced; called with the logits of each chunk.
        weights: Of each term in the sum to differentiate; 0 for a term that is only looked at.
        chunk_size: Predictions whose logits stand in memory together.

    Returns:
        The weighted sum, to be differentiated, and the sum of each term, without a graph.
    """
    assert chunk_size > 0, chunk_size
    head, states = outputs.head, outputs.states
    slices = [slice(first, min(first + chunk_size, len(states))) for first in range(0, len(states), chunk_size)]
    if head.weight is not None:
        given = (states, head.weight, head.bias, head.finished, terms, weights, slices)
        total, sums = _LinearHead.apply(*given)  # type: ignore[no-untyped-call]
        return total, sums

    def chunk(part: Tensor, rows: slice) -> Tensor:
        return terms(head(part), rows).sum(-1)

    found = [torch.zeros_like(weights) + 0 * states[:0].sum().to(weights)]
    for rows in slices:
        found.append(checkpoint(chunk, states[rows], rows, use_reentrant=False))
    summed = torch.stack(found).sum(0)
    return (weights * summed).sum(), summed.detach()


class _LinearHead(torch.autograd.Function):
    """The weighted sum behind a linear head, its gradient computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        finished: Callable[[Tensor], Tensor],
        terms: Terms,
        weights: Tensor,
        slices: list[slice],
    ) -> tuple[Tensor, Tensor]:
        wants = ctx.needs_input_grad[:3]
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        rows_of, matrix = states.to(dtype), weight.to(dtype)
        by_state = torch.empty_like(states) if wants[0] else None
        by_weight = torch.zeros_like(weight) if wants[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        sums = torch.zeros_like(weights)
        for rows in slices:
            part = rows_of[rows]
            raw = torch.nn.functional.linear(part, matrix, None if bias is None else bias.to(dtype))
            if not any(wants):
                sums += terms(finished(raw), rows).sum(-1)
                continue
            with torch.enable_grad():
                values = terms(finished(raw.requires_grad_()), rows).sum(-1)
                (gradient,) = torch.autograd.grad((weights * values).sum(), raw)
            sums += values.detach()
            if by_state is not None:
                by_state[rows] = gradient @ matrix
            if by_weight is not None:
                by_weight += gradient.T @ part
            if by_bias is not None:
                by_bias += gradient.sum(0)
        ctx.save_for_backward(by_state, by_weight, by_bias)
        ctx.mark_non_differentiable(sums)
        return (weights * sums).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if one is None else one * by_total.to(one.dtype) for one in ctx.saved_tensors]
        return (*found, None, None, None, None)
