"""Outputs of a model in three forms: whole logits, the states before a head, or the k likeliest."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexkd.core.log_probs import log_probs_at
from flexkd.core.tensors import Number


@dataclass(frozen=True)
class Head:
    """The head of a model, which maps hidden states to logits.

    Attributes:
        module: The head itself; a call runs its hooks and adapters. Not called where there is a `weight`.
        finish: What the model does to its head's output: a scale, a soft-cap, a bias. None: nothing.
        weight: Of a plain linear head, `[outputs, hidden]`, so that the logits are `finish(states @ weight.T + bias)`;
            None: the head is more than that.
        bias: Of a plain linear head.
    """

    module: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows outputs"]:
        """Logits of states, all at once."""
        if self.weight is None:
            return self.finish_logits(self.module(states))
        # A module that is sharded together with others counts its calls: one more would leave them half-way.
        return self.finish_logits(F.linear(states, self.weight, self.bias))

    def finish_logits(self, logits: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows outputs"]:
        """The model's logits from its head's output."""
        return logits if self.finish is None else self.finish(logits)


@dataclass(frozen=True)
class HeadOutputs:
    """Logits that are computed on demand: the states that a head reads, one row a prediction, and the head."""

    states: Float[Tensor, "predictions hidden"]
    head: Head

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, part: slice) -> Float[Tensor, "part outputs"]:
        return self.head(self.states[part])


@dataclass(frozen=True)
class TopOutputs:
    """The k likeliest outputs of each prediction, and the probability of all others as one.

    Attributes:
        log_probs: Log-probabilities at the temperature, from the likeliest down.
        indices: Which outputs these are.
        log_tail: Log of the probability of all other outputs together; -inf where they have none.
        temperature: Logits were divided by it; the tail cannot be known at another one.
        outputs: Number of all outputs; None: not known.
    """

    log_probs: Float[Tensor, "predictions k"]
    indices: Int[Tensor, "predictions k"]
    log_tail: Float[Tensor, " predictions"]
    temperature: Number = 1.0
    outputs: int | None = None

    def __len__(self) -> int:
        return len(self.log_probs)

    def __getitem__(self, part: slice) -> "TopOutputs":
        return replace(self, log_probs=self.log_probs[part], indices=self.indices[part], log_tail=self.log_tail[part])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, indices and tails."""
        return self.log_probs, self.indices, self.log_tail

    def categories(self) -> Float[Tensor, "predictions _"]:
        """Log-probabilities of the k outputs and of the rest: a distribution over k + 1 categories."""
        return torch.cat([self.log_probs.float(), self.log_tail.float()[:, None]], 1)


Outputs = Tensor | HeadOutputs | TopOutputs
"""Logits `[predictions, outputs]`, or what stands for them; a slice gives logits or a smaller `TopOutputs`."""


def predictions_at(outputs: Outputs, indices: Int64[Tensor, " chosen"]) -> Outputs:
    """The outputs of a few predictions; behind a head their states, of which no logits are made yet."""
    if isinstance(outputs, HeadOutputs):
        return replace(outputs, states=outputs.states.index_select(0, indices.to(outputs.states.device)))
    if isinstance(outputs, TopOutputs):
        log_probs, top, log_tail = (part.index_select(0, indices) for part in outputs.tensors())
        return replace(outputs, log_probs=log_probs, indices=top, log_tail=log_tail)
    return outputs.index_select(0, indices)


@torch.no_grad()
def entropies_of(logits: Float[Tensor, "predictions outputs"]) -> Float[Tensor, " predictions"]:
    """Entropy of each prediction in nats, float32; NaN where the logits are no distribution."""
    log_probs = logits.float().log_softmax(-1)
    return -(log_probs.exp() * log_probs.where(log_probs != -torch.inf, 0)).sum(-1)


@dataclass(frozen=True)
class TopRule:
    """How the likeliest outputs are taken, of a live teacher and for a cached one.

    Attributes:
        k: Outputs of each prediction.
        temperature: Divides the logits.
        shared_outputs: Number of first outputs that count, where vocabularies are padded unequally; None: all.
    """

    k: int
    temperature: Number = 1.0
    shared_outputs: int | None = None

    def __call__(self, logits: Float[Tensor, "predictions outputs"]) -> TopOutputs:
        """The top of logits; its log-probabilities are in float32."""
        logits = logits.detach()[:, : self.shared_outputs]
        indices = logits.topk(min(self.k, logits.shape[-1]), -1).indices
        parts = log_probs_at(logits, indices, self.temperature, top=indices.shape[1])
        return TopOutputs(parts[:, :-1], indices, parts[:, -1], self.temperature, logits.shape[-1])


def at_top(
    logits: Float[Tensor, "predictions outputs"], top: TopOutputs, *also: Int64[Tensor, " predictions"]
) -> Float[Tensor, "predictions _"]:
    """A student's log-probabilities of the outputs that a teacher's top holds, and of all others together.

    Divergences between these two distributions of k + 1 categories are divergences: not negative, 0 for equal
    distributions, and not above those over all outputs. They know nothing of how mass is spread within the rest.

    Args:
        logits: The student's, with gradients.
        top: The teacher's.
        *also: Further outputs, one of each prediction, whose log-probabilities are between the top and the rest.
    """
    indices = torch.cat([top.indices.long(), *(outputs[:, None] for outputs in also)], -1)
    return log_probs_at(logits, indices, top.temperature, top=top.indices.shape[1])
