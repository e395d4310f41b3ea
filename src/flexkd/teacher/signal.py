"""What an objective reads of a teacher for one batch, whether the teacher runs or its answers are cached."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flexkd.core.objective import Objective, Signal
from flexkd.core.outputs import TopRule
from flexkd.core.terms import LayerPair

PREFETCHED: Final = "prefetched_for_teacher"
"""Key of a batch for the result of the teacher's `prefetch`, computed before the batch was moved to a device."""


@dataclass(frozen=True)
class SignalRequest:
    """Which parts of a teacher an objective reads.

    A cache stores exactly this: the logits of predictions, and the taught units (not the whole width) of the chosen
    positions.

    Attributes:
        logits: Whether the logits are read.
        top: Which outputs of each prediction; None: all.
        layers: Pairs of layers; the teacher's side of each names the layer, its units and its basis.
        positions: `tokens` or `supervised`.
    """

    logits: bool
    layers: tuple[LayerPair, ...]
    positions: str
    top: TopRule | None = None

    @classmethod
    def of(cls, objective: Objective) -> "SignalRequest":
        """What this objective reads."""
        features, logits = objective.features, objective.logits
        return cls(
            logits=logits is not None,
            layers=features.layers if features is not None else (),
            positions=features.positions if features is not None else "tokens",
            top=None if logits is None else logits.top,
        )


@dataclass(frozen=True)
class BatchPositions:
    """Positions of one model's encoding of a batch, as masks or as indices of the flattened batch.

    Attributes:
        features: Positions that the feature term reads, in the order in which their rows stand in a signal.
        supervised: Positions whose state is read for a label; for a causal model each is one prediction.
    """

    features: Bool[Tensor, "batch seq"] | Int[Tensor, " features"] | None
    supervised: Bool[Tensor, "batch seq"] | Int[Tensor, " supervised"] | None

    def indices(self) -> "BatchPositions":
        """The same positions as indices, so that their number is known without waiting for a device."""
        masks = (self.features, self.supervised)
        return BatchPositions(*(None if mask is None else mask.flatten().nonzero()[:, 0] for mask in masks))

    def empty(self) -> "BatchPositions":
        """The same without any position; only for positions that are indices."""
        indices = (self.features, self.supervised)
        return BatchPositions(*(None if index is None else index[:0] for index in indices))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "BatchPositions":
        """The same positions on a device."""
        tensors = (self.features, self.supervised)
        return BatchPositions(
            *(None if tensor is None else tensor.to(device, non_blocking=non_blocking) for tensor in tensors)
        )


@dataclass(frozen=True)
class Extents:
    """For each row of a batch, the number of its positions in the features and the number of its predictions."""

    features: list[int]
    predictions: list[int]


@runtime_checkable
class Teacher(Protocol):
    """Source of signals.

    A live teacher runs on the batch; a cached one looks up its rows by `batch["example_id"]`. The entries of a signal
    are in the same order in both cases, so that an objective cannot tell them apart. In distributed training each
    process has a teacher of its own.
    """

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """The teacher's side of one batch, without gradients, on the device of the batch."""


@runtime_checkable
class PrefetchingTeacher(Teacher, Protocol):
    """A teacher that reads a batch while it is still on the CPU, so that `signal` waits for no device."""

    def prefetch(self, batch: Mapping[str, Any], request: SignalRequest) -> Any:
        """What `signal` expects under the batch's key `PREFETCHED`."""
