"""The knee of a curve that rises ever more slowly: the point from which more of x brings little more of y."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

SENSITIVITY: Final = 1.0
"""How far, in mean distances between two points, the curve has to fall back towards its chord behind a knee; 1 is what
the source of `knee_index` recommends."""
FEWEST_POINTS: Final = 4
"""With fewer points that are evenly spaced, no curve falls back so far."""


def knee_index(x: Sequence[float], y: Sequence[float]) -> int | None:
    """Index of the knee of a curve by the Kneedle algorithm; None where it has none.

    Both axes are scaled to 0 .. 1, and the curve is compared with its chord: the difference of both has a maximum where
    more of x begins to bring less than it brings on average. An inner maximum is a knee where the difference falls
    behind it, before it rises again, by more than `SENSITIVITY` mean distances of x. Of several the one that stands
    highest above the chord is taken. A straight or hanging curve, one that bends little for so few points, and one that
    does not rise at all have no knee.

    Not the package kneed: of a hanging curve such as 0.50, 0.51, 0.53, 0.80 its version 0.9 names the first point.

    Args:
        x: Ascending, such as numbers of parameters.
        y: Of which more is better, one value for each x.

    Source:
        Satopaa et al., 2011, Finding a "Kneedle" in a Haystack, sec. III, without its smoothing.

    Example:
        >>> knee_index([1, 2, 3, 4, 5], [0.5, 0.7, 0.75, 0.76, 0.765])
        1
        >>> knee_index([1, 2, 3, 4, 5], [0.5, 0.6, 0.7, 0.8, 0.9]) is None
        True
    """
    if len(x) < FEWEST_POINTS or x[-1] <= x[0] or y[-1] <= y[0]:
        return None
    along = _scaled(x)
    difference = _scaled(y) - along
    fall = SENSITIVITY * float(np.diff(along).mean())
    peaks = [
        index
        for index in range(1, len(x) - 1)
        if difference[index - 1] < difference[index] >= difference[index + 1]
        and difference[index] - _lowest_behind(difference, index) > fall
    ]
    return max(peaks, key=lambda index: float(difference[index]), default=None)


def _scaled(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Values from 0 to 1; not all of them are equal."""
    numbers = np.asarray(values, dtype=np.float64)
    scaled: npt.NDArray[np.float64] = (numbers - numbers.min()) / (numbers.max() - numbers.min())
    return scaled


def _lowest_behind(difference: npt.NDArray[np.float64], peak: int) -> float:
    """The value to which the difference falls behind a maximum before it rises again."""
    lowest = float(difference[peak])
    for value in difference[peak + 1 :].tolist():
        if value > lowest:
            break
        lowest = value
    return lowest
