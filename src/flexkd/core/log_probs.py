"""Log-probabilities of a few outputs of each prediction, in one pass over all of them and one for the gradient."""

from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexkd.core.tensors import Number

_CHUNK_ELEMENTS: Final = 2**20
"""Logits whose gradient is computed in float32 at once: few enough for the CPU's cache."""


def log_probs_at(
    logits: Float[Tensor, "rows outputs"], indices: Int64[Tensor, "rows k"], temperature: Number = 1, *, top: int = 0
) -> Float[Tensor, "rows _"]:
    """Log-probabilities of these outputs, in float32 whatever the logits are; -inf of those without mass.

    Where all logits are -inf, no output has any, and all log-probabilities are -inf.

    Args:
        logits: With or without gradients.
        indices: Of each prediction; one output may be in several columns, but not among the first `top`.
        temperature: Divides the logits.
        top: Where above 0, one more column comes last: the log of the probability of all outputs but the first `top`
            of `indices` together, -inf where there are none.
    """
    log_probs: Tensor = _LogProbsAt.apply(logits, indices, temperature, top)  # type: ignore[no-untyped-call]
    return log_probs


def _no_infinity(logs: Tensor) -> Tensor:
    """The logs with 0 in place of -inf, since -inf - -inf is NaN."""
    return torch.where(logs == -torch.inf, 0, logs)


class _LogProbsAt(torch.autograd.Function):
    """`log_probs_at`, which saves one tensor of the logits' size for the gradient: the exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor, temperature: Number, top: int) -> Tensor:
        scaled = logits.to(torch.float32, copy=True)
        if temperature != 1:
            scaled /= temperature
        chosen = scaled.gather(-1, indices)
        if top:
            scaled.scatter_(-1, indices[:, :top], -torch.inf)
        # Relative to their own largest, and not 1 minus the top: a tiny mass keeps its digits.
        largest = _no_infinity(scaled.amax(-1, keepdim=True))
        exponentials = scaled.sub_(largest).exp_()
        mass = exponentials.sum(-1, keepdim=True)
        log_mass = largest + mass.log()
        log_total = log_mass
        if top:
            log_total = torch.logaddexp(chosen[:, :top].logsumexp(-1, keepdim=True), log_mass)
        log_total = _no_infinity(log_total)
        log_probs = chosen - log_total
        if top:
            log_probs = torch.cat([log_probs, log_mass - log_total], -1)
        scale = torch.where(mass > 0, (largest - log_total).exp(), 0)
        ctx.save_for_backward(exponentials, scale, mass, indices, log_probs)
        ctx.temperature, ctx.top, ctx.dtype = temperature, top, logits.dtype
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, scale, mass, indices, log_probs = ctx.saved_tensors
        top, grad_chosen = ctx.top, grad_log_probs[:, : indices.shape[1]] / ctx.temperature
        grad_sum = grad_log_probs.sum(-1, keepdim=True) / ctx.temperature
        factor = -grad_sum * scale
        if top:
            factor += torch.where(mass > 0, grad_log_probs[:, -1:] / (ctx.temperature * mass), 0)
        grad_top = grad_chosen[:, :top] - grad_sum * log_probs[:, :top].exp()
        gradient = torch.empty_like(exponentials, dtype=ctx.dtype)
        size = max(_CHUNK_ELEMENTS // max(exponentials.shape[1], 1), 1)
        for first in range(0, len(exponentials), size):
            span = slice(first, first + size)
            part = exponentials[span] * factor[span]
            part.scatter_(-1, indices[span, :top], grad_top[span])
            part.scatter_add_(-1, indices[span, top:], grad_chosen[span, top:])
            gradient[span] = part
        return gradient, None, None, None
