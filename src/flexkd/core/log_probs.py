"""Log-probabilities of a few outputs of each prediction, in one pass over all of them and one for the gradient."""

from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexkd.core.tensors import Number

_NO_MASS: Final = -1e30
"""Stands for log 0: finite, so that its gradient is 0 and not 0/0."""

_TOGETHER: Final = 2**20
"""Logits whose gradient is made in float32 before it takes their type: few enough to stay near the processor."""


def log_probs_at(
    logits: Float[Tensor, "rows outputs"], indices: Int64[Tensor, "rows k"], temperature: Number = 1, *, top: int = 0
) -> Float[Tensor, "rows _"]:
    """Log-probabilities of these outputs, in float32 whatever the logits are.

    Args:
        logits: With or without gradients.
        indices: Of each prediction; one output may stand in several columns, but not among the first `top`.
        temperature: Divides the logits.
        top: Where above 0, one more column stands last: the log of the probability of all outputs but the first `top`
            of `indices` together, at most -1e30 where there are none.
    """
    found: Tensor = _LogProbsAt.apply(logits, indices, temperature, top)  # type: ignore[no-untyped-call]
    return found


class _LogProbsAt(torch.autograd.Function):
    """Only the exponentials are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: Number, top: int) -> Tensor:
        scaled = logits.to(torch.float32, copy=True)
        if temperature != 1:
            scaled /= temperature
        chosen = scaled.gather(-1, indices)
        largest = scaled.amax(-1, keepdim=True)
        rest = scaled.sub_(largest).exp_()
        if top:
            total = rest.gather(-1, indices[:, :top]).sum(-1, keepdim=True)
            rest.scatter_(-1, indices[:, :top], 0)
            # Summed without the top, not taken from 1: a rest of next to nothing keeps its digits.
            mass = rest.sum(-1, keepdim=True)
            total += mass
            found = torch.cat([chosen - (largest + total.log()), (mass / total).log().clamp(min=_NO_MASS)], -1)
        else:
            mass = total = rest.sum(-1, keepdim=True)
            found = chosen - (largest + total.log())
        ctx.save_for_backward(rest, total, mass, indices, found)
        ctx.temperature, ctx.top, ctx.dtype = temperature, top, logits.dtype
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_found: Tensor) -> tuple[Tensor, None, None, None]:
        rest, total, mass, indices, found = ctx.saved_tensors
        top, by_chosen = ctx.top, by_found[:, : indices.shape[1]] / ctx.temperature
        by_all = by_found.sum(-1, keepdim=True) / ctx.temperature
        factor = -by_all / total
        if top:
            factor += torch.where(mass > 0, by_found[:, -1:] / (ctx.temperature * mass), 0)
        by_top = by_chosen[:, :top] - by_all * found[:, :top].exp()
        gradient = torch.empty_like(rest, dtype=ctx.dtype)
        size = max(_TOGETHER // max(rest.shape[1], 1), 1)
        for rows in (slice(first, first + size) for first in range(0, len(rest), size)):
            part = rest[rows] * factor[rows]
            part.scatter_(-1, indices[rows, :top], by_top[rows])
            part.scatter_add_(-1, indices[rows, top:], by_chosen[rows, top:])
            gradient[rows] = part
        return gradient, None, None, None
