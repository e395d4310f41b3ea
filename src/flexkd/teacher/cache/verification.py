"""Whether the answers of a cache are those that the teacher gives today, tested on some of its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from flexkd.core.outputs import HeadOutputs, Outputs, TopOutputs, at_top
from flexkd.errors import ArtifactError
from flexkd.models.forward.engine import rounding_noise
from flexkd.teacher.cache.columns import CachedColumns
from flexkd.teacher.cache.quantization import INT8, PREDICTIONS_AT_ONCE, stored_columns
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

_HALF: Final = torch.finfo(torch.float16).eps / 2
_SMALLEST_HALF: Final = torch.finfo(torch.float16).smallest_normal * _HALF
_SINGLE: Final = torch.finfo(torch.float32).eps / 2
_IMPOSSIBLE: Final = -100.0
"""Log-probabilities below this are all taken as equal to it: the smallest number of float16 is -65504."""


@dataclass(frozen=True)
class Deviation:
    """Deviation of one part of the stored answers from the teacher's, and its limit.

    Attributes:
        what: Name of the part: predictions, or columns of a state.
        value: Root mean square, in `unit`.
        limit: What quantization and the rounding of another machine with the same precision account for.
        unit: Nats, units of a logit, or a share of the root mean square of the columns.
    """

    what: str
    value: float
    limit: float
    unit: str

    def __str__(self) -> str:
        return f"{self.what} deviate by {self.value:.2g} {self.unit} (limit {self.limit:.2g})"


@dataclass(frozen=True)
class Verification:
    """Deviations of some rows of a cache from the teacher's present answers."""

    num_rows: int
    deviations: tuple[Deviation, ...]

    def __str__(self) -> str:
        return f"{self.num_rows} rows were answered again: {'; '.join(map(str, self.deviations))}"

    def check(self, cached: CachedTeacher, engine_differences: Sequence[str]) -> None:
        """Refuse a cache whose answers deviate by more than a limit.

        Args:
            cached: The cache that was verified.
            engine_differences: From `Manifest.check`, for the message.

        Raises:
            ArtifactError: Gives the deviations and the limits.
        """
        # Not `>`: a NaN is beyond every limit.
        beyond = [deviation for deviation in self.deviations if not deviation.value <= deviation.limit]
        if beyond:
            reason = f"What is known: {'; '.join(engine_differences)}. " if engine_differences else ""
            raise ArtifactError(
                f"{cached.folder}: its answers are not those of this teacher. Of {self.num_rows} rows that were "
                f"answered again, {'; '.join(map(str, beyond))}. {reason}Choose another folder (teacher.cache), or "
                "delete this one to build it again."
            )


def verify(
    cached: CachedTeacher, teacher: LiveTeacher, request: SignalRequest, batches: Sequence[Mapping[str, Any]]
) -> Verification:
    """Compare stored answers with those that the teacher gives now.

    Args:
        cached: A cache that covers the request.
        teacher: The teacher that made it.
        request: The parts to compare.
        batches: Batches of the same rows as when the cache was built, as each has its own scales in int8.
    """
    noise = rounding_noise(teacher.model, teacher.precision)
    # The teacher computes all outputs, from which the stored ones are picked by index.
    untruncated = replace(request, top=None)
    pairs = [(cached.signal(batch, request), teacher.signal(batch, untruncated)) for batch in batches]
    deviations = []
    if request.logits:
        outputs = [(old.logits, new.logits) for old, new in pairs]
        shared = None if request.top is None else request.top.shared_outputs
        deviations.append(_predictions(outputs, noise, cached.writes_text, shared))
    for index, columns in enumerate(CachedColumns.of(request).columns):
        values = [(old.features[index], new.features[index]) for old, new in pairs]
        deviations.append(_columns(columns.describe(), values, noise, cached.storage))
    return Verification(sum(len(batch["example_id"]) for batch in batches), tuple(deviations))


def _columns(name: str, pairs: Sequence[tuple[Tensor, Tensor]], noise: float, storage: str) -> Deviation:
    """Median deviation over columns, as a few columns are far larger than the others, or almost constant.

    The limit of a column has two parts. Quantization rounds by at most half a step: 2^-11 of the value in float16, half
    the scale of its batch in int8. The teacher's own rounding is relative to the column's root mean square.
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
    """Deviation of the predictions: of log-probabilities for a language model, of logits for a classifier.

    Log-probabilities are weighted by their probability, so that half the mean square is about the KL. Rounding of the
    states, which is relative, changes the logits in proportion to their spread (for a classifier: to their size, taken
    as at least 1, as smaller logits hardly change a probability). Log-probabilities are stored in float16, a
    classifier's logits in float32.
    """
    deviation, size, spread, predictions = 0.0, 0.0, 0.0, 0
    for old, new in pairs:
        assert old is not None
        assert new is not None
        for first in range(0, len(old), PREDICTIONS_AT_ONCE):
            chunk = slice(first, first + PREDICTIONS_AT_ONCE)
            stored, logits = old[chunk], new[chunk]
            assert not isinstance(logits, TopOutputs | HeadOutputs), "the request is for whole outputs"
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
    old, new = (log_probs.double().cpu().clamp(min=_IMPOSSIBLE) for log_probs in (old, new))
    weight = new.exp()
    spread = (logits / temperature).log_softmax(-1).clamp(min=_IMPOSSIBLE).double().var(-1)
    return (weight * (old - new).square()).sum(), (weight * new.square()).sum(), spread.sum()


def _logits(stored: Tensor | TopOutputs, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert isinstance(stored, Tensor), "a classifier's outputs are stored whole"
    old, new = stored.double().cpu(), logits.double().cpu()
    size = new.square().mean(-1).clamp(min=1.0).sum()
    return (old - new).square().mean(-1).sum(), size, size
