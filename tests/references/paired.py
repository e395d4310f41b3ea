"""Statistics of paired differences, by plain loops over patterns of signs, subsets and narrow strips of an integral."""

import itertools
import math
from collections.abc import Sequence
from typing import Final

STRIPS: Final = 2_000


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Share of all sign patterns with a sum as far from 0; whole numbers, so that no sum is rounded."""
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    reaching = [
        pattern
        for pattern in patterns
        if abs(sum(sign * number for sign, number in zip(pattern, differences, strict=True))) >= observed
    ]
    return len(reaching) / len(patterns)


def holm(p_values: Sequence[float]) -> list[float]:
    """Closed testing: a hypothesis falls once Bonferroni rejects every set of hypotheses that holds it."""
    indices = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in itertools.combinations(indices, size)]
    bonferroni = {chosen: min(1.0, len(chosen) * min(p_values[index] for index in chosen)) for chosen in sets}
    return [max(p for chosen, p in bonferroni.items() if index in chosen) for index in indices]


def effect_size(differences: Sequence[float]) -> float:
    """The mean in standard deviations, divisor n - 1."""
    mean = sum(differences) / len(differences)
    squares = sum((difference - mean) ** 2 for difference in differences)
    return mean / math.sqrt(squares / (len(differences) - 1))


def beyond(threshold: float, freedom: int, shift: float = 0.0) -> float:
    """P(|T| > threshold), T = (Z + shift) / S: Z is normal, S the root of a mean of `freedom` squared normals.

    The density of S is summed over strips: it is 2 (v/2)^(v/2) / gamma(v/2) s^(v-1) exp(-v s^2 / 2).
    """
    half = freedom / 2
    constant = math.log(2) + half * math.log(half) - math.lgamma(half)
    width = 12.0 / STRIPS
    total = 0.0
    for strip in range(STRIPS):
        s = (strip + 0.5) * width
        density = math.exp(constant + (freedom - 1) * math.log(s) - half * s * s)
        total += width * density * (normal_below(shift - threshold * s) + normal_below(-shift - threshold * s))
    return total


def normal_below(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2


def t_test(differences: Sequence[float]) -> float:
    """Two-sided p of Student's test of the mean."""
    return beyond(abs(effect_size(differences)) * math.sqrt(len(differences)), len(differences) - 1)


def threshold_at(level: float, freedom: int) -> float:
    """The value that |T| exceeds with the probability `level`, by halving an interval."""
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle, freedom) > level else (low, middle)
    return (low + high) / 2


def power(effect: float, num_pairs: int, level: float = 0.05) -> float:
    """Probability with which the test at the level finds a true effect."""
    freedom = num_pairs - 1
    return beyond(threshold_at(level, freedom), freedom, effect * math.sqrt(num_pairs))
