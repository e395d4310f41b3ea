"""The ratio of two costs, measured in turn so that other work on the machine slows down both sides alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

_RESAMPLES: Final = 10_000

Work = Callable[[], object]
"""One unit of work: a step, a pass or a run."""


class Seconds(NamedTuple):
    """Wall and CPU time of one unit of work."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval.

    Attributes:
        first: Median of the numerator, in seconds or bytes.
        second: Median of the denominator, in seconds or bytes.
        value: Median of the ratios.
        low: Lower end of the interval.
        high: Upper end of the interval.
        pairs: Number of measured pairs.
        processes: Number of processes of each side.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    pairs: int
    processes: int = 1

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], processes: int) -> "Ratio":
        """The median ratio of pairs, with a bootstrap interval over the pairs."""
        above, below = np.asarray(first), np.asarray(second)
        ratios = above / below
        resamples = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[resamples], axis=1), [2.5, 97.5])
        medians = float(np.median(above)), float(np.median(below))
        return cls(*medians, float(np.median(ratios)), float(low), float(high), len(ratios), processes)

    @classmethod
    def from_end_to_end(cls, first: Sequence[float], second: Sequence[float]) -> "Ratio":
        """The ratio of the medians of values that are not paired; the interval covers the ratio of any two values."""
        above, below = sorted(first), sorted(second)
        medians = float(np.median(above)), float(np.median(below))
        low, high = above[0] / below[-1], above[-1] / below[0]
        return cls(*medians, medians[0] / medians[1], low, high, len(above), len(above))

    def verdict(self, bar: float) -> str:
        """`met` or `missed` if the whole interval lies on one side of the bar, else `open`."""
        if self.high <= bar:
            return "met"
        return "missed" if self.low > bar else "open"


def pairs_of(first: Callable[[], Seconds], second: Callable[[], Seconds], pairs: int) -> list[tuple[Seconds, Seconds]]:
    """Measure pairs of both sides; the side that goes first alternates."""
    measured = []
    for pair in range(pairs):
        if pair % 2 == 0:
            above, below = first(), second()
        else:
            below, above = second(), first()
        measured.append((above, below))
    return measured
