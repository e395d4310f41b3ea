"""Whether the answers of a cache are those that the teacher gives now: some rows are answered again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from flexkd.core.outputs import HeadOutputs, Outputs, TopOutputs, at_top
from flexkd.errors import ArtifactError
from flexkd.models.forward.engine import rounding_noise
from flexkd.teacher.cache.columns import CachedColumns
from flexkd.teacher.cache.quantization import INT8, stored_columns
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

_TOGETHER: Final = 64
"""Predictions whose outputs stand in memory at once."""

_HALF: Final = torch.finfo(torch.float16).eps / 2
_SMALLEST_HALF: Final = torch.finfo(torch.float16).smallest_normal * _HALF
_SINGLE: Final = torch.finfo(torch.float32).eps / 2
_IMPOSSIBLE: Final = -100.0
"""Log-probabilities from here down are all the same: float16 has no more of them from -65504."""


@dataclass(frozen=True)
class Deviation:
    """How far one part of the stored answers lies from the teacher's, and how far it may.

    Attributes:
        what: Predictions, or columns of a state.
        value: Root mean square, in `unit`.
        limit: What storing rounds and two machines of one precision differ by.
        unit: Nats, units of a logit, or a share of the columns' own size.
    """

    what: str
    value: float
    limit: float
    unit: str

    def __str__(self) -> str:
        return f"{self.what} deviate by {self.value:.2g} {self.unit} (limit {self.limit:.2g})"


@dataclass(frozen=True)
class Verification:
    """Some rows of a cache beside the teacher's answers of now."""

    rows: int
    deviations: tuple[Deviation, ...]

    def __str__(self) -> str:
        return f"{self.rows} rows were answered again: {'; '.join(map(str, self.deviations))}"

    def check(self, cached: CachedTeacher, told: Sequence[str]) -> None:
        """Refuse answers beyond a limit.

        Args:
            cached: Holds them.
            told: In what the engine differs, as far as it is known.

        Raises:
            ArtifactError: Gives the figures.
        """
        # Also a NaN is beyond every limit.
        beyond = [one for one in self.deviations if not one.value <= one.limit]
        if beyond:
            reason = f"What is known: {'; '.join(told)}. " if told else ""
            raise ArtifactError(
                f"{cached.folder}: its answers are not those of this teacher. Of {self.rows} rows that were answered "
                f"again, {'; '.join(map(str, beyond))}. {reason}Choose another folder (teacher.cache), or "
                "delete this one to build it again."
            )


def verify(
    cached: CachedTeacher, teacher: LiveTeacher, request: SignalRequest, batches: Sequence[Mapping[str, Any]]
) -> Verification:
    """Answer batches of a cache again.

    Args:
        cached: Holds what is requested.
        teacher: Answers.
        request: Parts that are compared.
        batches: Rows as they were asked together: int8 columns have one scale a batch.
    """
    noise = rounding_noise(teacher.model, teacher.precision)
    # Whole outputs, of which those that are stored are picked by their index.
    whole = replace(request, top=None)
    pairs = [(cached.signal(batch, request), teacher.signal(batch, whole)) for batch in batches]
    deviations = []
    if request.logits:
        outputs = [(old.logits, new.logits) for old, new in pairs]
        shared = None if request.top is None else request.top.shared_outputs
        deviations.append(_predictions(outputs, noise, cached.writes_text, shared))
    for index, held in enumerate(CachedColumns.of(request).columns):
        columns = [(old.features[index], new.features[index]) for old, new in pairs]
        deviations.append(_columns(held.describe(), columns, noise, cached.storage))
    return Verification(sum(len(batch["example_id"]) for batch in batches), tuple(deviations))


def _columns(name: str, pairs: Sequence[tuple[Tensor, Tensor]], noise: float, storage: str) -> Deviation:
    """The middle one of all columns: a few are far larger than the rest, or almost constant.

    A column may deviate by what storing rounds, at most half a step: 2^-11 of a value in float16, in int8 half a scale
    of its batch; and by the rounding of the teacher, relative to the column's root mean square.
    """
    deviation, size, rounding = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for old, new in pairs:
        exact = new.double().cpu()
        deviation = deviation + (old.double().cpu() - exact).square().sum(0)
        size = size + exact.square().sum(0)
        if storage == INT8:
            step = stored_columns(new.float().cpu(), INT8)["scale"][0].double()
        else:
            step = 2 * (_HALF * exact.abs().amax(0) + _SMALLEST_HALF) if len(exact) else exact.new_zeros(())
        rounding = rounding + len(exact) * (step / 2).square()
    scale = size.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    shares = deviation.sqrt() / scale
    limits = rounding.sqrt() / scale + noise
    return Deviation(name, float(shares.median()), float(limits.median()), "of their size")


def _predictions(
    pairs: Sequence[tuple[Outputs | None, Outputs | None]], noise: float, writes_text: bool, shared: int | None
) -> Deviation:
    """Log-probabilities weighed by their probability, so that half the square is about the KL; a classifier's logits.

    The states' relative rounding reaches a logit times the spread of the logits (of a classifier: their size, at least
    1, below which none changes a probability much). Log-probabilities are stored in float16, a classifier's logits in
    float32.
    """
    deviation, size, spread, predictions = 0.0, 0.0, 0.0, 0
    for old, new in pairs:
        assert old is not None
        assert new is not None
        for first in range(0, len(old), _TOGETHER):
            rows = slice(first, first + _TOGETHER)
            stored, logits = old[rows], new[rows]
            assert not isinstance(logits, TopOutputs | HeadOutputs), "whole outputs were asked for"
            assert not isinstance(stored, HeadOutputs), "outputs on disk are tensors"
            parts = _log_probs(stored, logits, shared) if writes_text else _logits(stored, logits)
            deviation, size, spread = (a + float(b) for a, b in zip((deviation, size, spread), parts, strict=True))
            predictions += len(logits)
    value, size, spread = ((part / max(predictions, 1)) ** 0.5 for part in (deviation, size, spread))
    rounding = (_HALF if writes_text else _SINGLE) * size
    return Deviation("predictions", value, rounding + noise * spread, "nats" if writes_text else "of a logit")


def _log_probs(stored: Tensor | TopOutputs, logits: Tensor, shared: int | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()[:, :shared]
    temperature = 1.0
    if isinstance(stored, TopOutputs):
        old, new, temperature = stored.categories(), at_top(logits, stored), float(stored.temperature)
    else:
        old, new = stored.float(), logits.log_softmax(-1)
    old, new = (one.double().cpu().clamp(min=_IMPOSSIBLE) for one in (old, new))
    weight = new.exp()
    spread = (logits / temperature).log_softmax(-1).clamp(min=_IMPOSSIBLE).double().var(-1)
    return (weight * (old - new).square()).sum(), (weight * new.square()).sum(), spread.sum()


def _logits(stored: Tensor | TopOutputs, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(stored, Tensor), "a classifier's outputs are stored whole"
    old, new = stored.double().cpu(), logits.double().cpu()
    size = new.square().mean(-1).clamp(min=1.0).sum()
    return (old - new).square().mean(-1).sum(), size, size
