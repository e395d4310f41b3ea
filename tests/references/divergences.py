"""Divergences of two categorical or Bernoulli distributions, class by class."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def distribution(logits: npt.ArrayLike, temperature: float = 1.0) -> list[float]:
    """exp(z_v / tau) / sum_u exp(z_u / tau) of one row."""
    scaled = [float(z) / temperature for z in np.asarray(logits, dtype=np.float64)]
    largest = max(scaled)
    powers = [math.exp(z - largest) for z in scaled]
    return [power / math.fsum(powers) for power in powers]


def kl(first: Sequence[float], second: Sequence[float]) -> float:
    """sum_v first_v log(first_v / second_v), where 0 log 0 = 0."""
    terms = []
    for a, b in zip(first, second, strict=True):
        if a == 0:
            continue
        terms.append(math.inf if b == 0 else a * math.log(a / b))
    return math.fsum(terms)


def mixture(first: Sequence[float], second: Sequence[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def divergence(name: str, student: npt.ArrayLike, teacher: npt.ArrayLike, temperature: float, share: float) -> float:
    """Divergence of one row by its name; `share` is beta or alpha where there is one."""
    p, q = distribution(teacher, temperature), distribution(student, temperature)
    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jensen_shannon":
            middle = mixture(p, q, share)
            return share * kl(p, middle) + (1 - share) * kl(q, middle)
        case "skew_kl":
            return kl(p, mixture(p, q, share))
        case "skew_reverse_kl":
            return kl(q, mixture(q, p, share))
        case "total_variation":
            return 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))
    raise KeyError(name)


def bernoulli_kl(student: npt.ArrayLike, teacher: npt.ArrayLike, temperature: float) -> float:
    """Sum over the labels of one row; each label is a distribution over (present, absent) with logits (z, 0)."""
    pairs = zip(np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64), strict=True)
    return math.fsum(kl(distribution([t, 0.0], temperature), distribution([s, 0.0], temperature)) for s, t in pairs)


def rows(name: str, student: npt.ArrayLike, teacher: npt.ArrayLike, temperature: float, share: float) -> Array:
    """`divergence` of every row of two matrices."""
    pairs = zip(np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64), strict=True)
    return np.array([divergence(name, s, t, temperature, share) for s, t in pairs])
