"""The ratio of two costs, measured in turn so that what else the machine does meets both sides alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

WARM_UP: Final = 2
"""Calls of each side before the first pair."""

_RESAMPLES: Final = 10_000

Work = Callable[[], object]
"""One unit of what is measured: a step, a pass, a run."""


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
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> "Ratio":
        """The median ratio of pairs, with a bootstrap interval over the pairs."""
        above, below = np.asarray(first), np.asarray(second)
        ratios = above / below
        drawn = np.random.default_rng(0).integers(0, len(ratios), (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
        medians = float(np.median(above)), float(np.median(below))
        return cls(*medians, float(np.median(ratios)), float(low), float(high), len(ratios))

    def verdict(self, bar: float) -> str:
        """`met` or `missed` where the whole interval lies on one side of the bar, else `open`."""
        if self.high <= bar:
            return "met"
        return "missed" if self.low > bar else "open"


def paired_ratio(first: Work, second: Work, pairs: int) -> dict[str, Ratio]:
    """Wall and CPU time of one side over the other; who goes first changes from pair to pair."""
    for _ in range(WARM_UP):
        first()
        second()
    seconds: tuple[list[tuple[float, float]], ...] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[side].append(_seconds((first, second)[side]))
    return {
        name: Ratio.of([one[index] for one in seconds[0]], [one[index] for one in seconds[1]])
        for index, name in enumerate(("wall", "cpu"))
    }


def _seconds(work: Work) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
