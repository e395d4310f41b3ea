"""The knee of a curve: against a second derivation from the paper, unchanged by scales, absent where there is none."""

import numpy as np
import pytest

from flexkd.evaluate.sizes.knees import knee_index

EVEN = [1.0, 2.0, 3.0, 4.0, 5.0]


def kneedle(x: list[float], y: list[float]) -> list[tuple[float, int]]:
    """All knees of the paper's algorithm with sensitivity 1, each with its height above the chord, point by point."""
    n = len(x)
    xs = [(value - min(x)) / (max(x) - min(x)) for value in x]
    ys = [(value - min(y)) / (max(y) - min(y)) for value in y]
    d = [b - a for a, b in zip(xs, ys, strict=True)]
    knees, threshold, peak = [], None, None
    for i in range(1, n):
        if i < n - 1 and d[i - 1] < d[i] and d[i] >= d[i + 1]:  # a local maximum sets the threshold
            peak, threshold = i, d[i] - sum(xs[k + 1] - xs[k] for k in range(n - 1)) / (n - 1)
        elif peak is not None and d[i] > d[i - 1]:  # behind a minimum the threshold waits for the next maximum
            peak, threshold = None, None
        elif peak is not None and threshold is not None and d[i] < threshold:
            knees.append((d[peak], peak))
            peak, threshold = None, None
    return knees


def test_the_knee_is_the_highest_one_of_the_papers_algorithm() -> None:
    draw, num_knees = np.random.default_rng(3), 0
    for _ in range(2000):
        count = int(draw.integers(4, 9))
        x = np.cumsum(draw.uniform(0.1, 2.0, count)).tolist()
        y = (np.cumsum(draw.exponential(0.6 ** np.arange(count))) + draw.normal(0, 0.05, count)).tolist()
        knees = kneedle(x, y) if y[-1] > y[0] else []
        assert knee_index(x, y) == (max(knees)[1] if knees else None), (x, y)
        num_knees += bool(knees)
    assert 500 < num_knees < 1900


def test_scales_and_units_do_not_move_a_knee() -> None:
    y = [0.5, 0.7, 0.75, 0.76, 0.765]
    for scale, shift in ((1e6, 0.0), (0.01, 7.0)):
        assert knee_index([scale * value + shift for value in EVEN], y) == 1
        assert knee_index(EVEN, [scale * value + shift for value in y]) == 1


@pytest.mark.parametrize(
    "y",
    [
        pytest.param([0.5, 0.6, 0.7, 0.8, 0.9], id="straight"),
        pytest.param([0.5, 0.51, 0.53, 0.6, 0.8], id="hanging"),
        pytest.param([0.5, 0.61, 0.71, 0.81, 0.9], id="bends too little"),
        pytest.param([0.7, 0.7, 0.7, 0.7, 0.7], id="flat"),
        pytest.param([0.8, 0.9, 0.7, 0.6, 0.5], id="falls"),
        # 0.25 above the chord, exactly one mean distance: it has to be more.
        pytest.param([0.0, 0.5, 0.75, 0.875, 1.0], id="at the threshold"),
    ],
)
def test_curves_without_a_knee_have_none(y: list[float]) -> None:
    assert knee_index(EVEN, y) is None


def test_three_points_and_equal_sizes_have_no_knee() -> None:
    assert knee_index([1, 2, 3], [0.0, 0.9, 1.0]) is None
    assert knee_index([2, 2, 2, 2], [0.0, 0.9, 0.95, 1.0]) is None
