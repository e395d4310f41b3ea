"""Predictions that models read off their hidden states with their own heads, and how far those of two models differ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from jaxtyping import Bool, Float
from torch import Tensor

from flexkd.core.checks import unit_loss
from flexkd.core.losses.chunked import chunked_sums
from flexkd.core.losses.logit import jensen_shannon
from flexkd.core.losses.moments import count_positions, sum_over_processes
from flexkd.core.outputs import Head, HeadOutputs
from flexkd.core.tensors import select_positions

__all__ = ["distill_lens"]

_HEAD_INPUT: Final = -1
_CHUNK_BYTES: Final = 3 * 2**23
"""Logits of one chunk in float32."""


@dataclass(frozen=True)
class Lens:
    """A model's own way from a hidden state to predictions: the norm before its head, then the head.

    Attributes:
        norm: From the output of a block to what the head reads.
        head: The head of the model, looked up for each batch, since adapters may take its place.
        num_outputs: Outputs of the head.
        shared_outputs: As in `LogitTerm`.
    """

    norm: Callable[[Tensor], Tensor]
    head: Callable[[], Head]
    num_outputs: int
    shared_outputs: int | None = None

    def read(self, states: Float[Tensor, "positions hidden"], layer: int) -> HeadOutputs:
        """The predictions of states at a layer; no logits are made yet."""
        return HeadOutputs(states if layer == _HEAD_INPUT else self.norm(states), self.head())


def lens_divergence(
    student: HeadOutputs, teacher: HeadOutputs, lens: Lens, *, across_processes: bool = False
) -> Float[Tensor, ""]:
    """`distill_lens` of two readings, whose logits are made and freed a few positions at a time.

    Args:
        lens: The student's.
    """

    def terms(logits: Tensor, chunk: slice) -> Tensor:
        shared = slice(lens.shared_outputs)
        return jensen_shannon(logits[:, shared], teacher[chunk][:, shared])[None]

    chunk_size = max(_CHUNK_BYTES // (4 * lens.num_outputs), 1)
    ones = student.states.new_ones(1).float()
    total, _ = chunked_sums(student, terms, ones, chunk_size=chunk_size)
    count = count_positions(student.states, across_processes)
    return sum_over_processes(total, across_processes) / count.clamp(min=1)


@unit_loss
def distill_lens(
    student: Float[Tensor, "*positions outputs"],
    teacher: Float[Tensor, "*positions outputs"],
    mask: Bool[Tensor, "*positions"] | None = None,
    *,
    across_processes: bool = False,
) -> Float[Tensor, " 1"]:
    """Jensen-Shannon divergence of predictions that two models read off their hidden states, mean over the positions.

    Adds up over micro-batches. Takes the logits; an `Objective` makes them of states, with the final norm and the head
    of each model (the logit lens). The student's norm and head learn with its states.

    Source:
        Dhakal et al., DistillLens, 2026, arXiv:2602.13567.
    """
    x, y = select_positions(student, mask), select_positions(teacher, mask).detach()
    total = sum_over_processes(jensen_shannon(x, y).sum(), across_processes)
    return (total / count_positions(x, across_processes).clamp(min=1)).unsqueeze(0)


LOSSES: Final[dict[str, Callable[..., Tensor]]] = {"distill_lens": distill_lens}
"""By name."""
