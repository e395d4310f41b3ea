"""The ratio of two costs, measured in turn so that what else the machine does meets both sides alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

_RESAMPLES: Final = 10_000

Work = Callable[[], object]
"""One unit of what is measured: a step, a pass, a run."""


class Seconds(NamedTuple):
    """What one unit of work took."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sides with its 95 % interval.

    Attributes:
        first: Median of the side above the line: seconds, or bytes.
        second: Median of the side below it.
        value: Median of the ratios.
        low: Lower end of the interval.
        high: Upper end.
        pairs: How many pairs are behind it.
        processes: Of each side.
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
        drawn = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
        medians = float(np.median(above)), float(np.median(below))
        return cls(*medians, float(np.median(ratios)), float(low), float(high), len(ratios), processes)

    @classmethod
    def from_end_to_end(cls, first: Sequence[float], second: Sequence[float]) -> "Ratio":
        """The ratio of medians of what does not come in pairs; its interval holds every ratio."""
        above, below = sorted(first), sorted(second)
        middle = float(np.median(above)), float(np.median(below))
        low, high = above[0] / below[-1], above[-1] / below[0]
        return cls(*middle, middle[0] / middle[1], low, high, len(above), len(above))

    def verdict(self, bar: float) -> str:
        """`met` or `missed` where the whole interval lies on one side of the bar, else `open`."""
        if self.high <= bar:
            return "met"
        return "missed" if self.low > bar else "open"


def pairs_of(first: Callable[[], Seconds], second: Callable[[], Seconds], pairs: int) -> list[tuple[Seconds, Seconds]]:
    """What both sides took, pair by pair; who goes first changes from pair to pair."""
    found = []
    for pair in range(pairs):
        if pair % 2 == 0:
            above, below = first(), second()
        else:
            below, above = second(), first()
        found.append((above, below))
    return found
