"""Losses from the correlation of two units, pair by pair."""

import functools
import math
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def standardised(unit: Array) -> tuple[Array, float]:
    """(x - mean) / s with divisor N, and s."""
    count = len(unit)
    mean = math.fsum(unit) / count
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in unit) / count)
    return np.array([(x - mean) / deviation for x in unit]), deviation


def coefficient(first: Array, second: Array) -> float:
    """Pearson's C of two units over N positions."""
    pairs = zip(standardised(first)[0], standardised(second)[0], strict=True)
    return math.fsum(x * y for x, y in pairs) / len(first)


def correlation(student: npt.ArrayLike, teacher: npt.ArrayLike) -> Array:
    """(1 - C_i)^2 of every unit of `[positions, units]`."""
    x, y = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    return np.array([(1 - coefficient(x[:, i], y[:, i])) ** 2 for i in range(x.shape[1])])


def correlation_gradient(student: npt.ArrayLike, teacher: npt.ArrayLike) -> Array:
    """d mean_i (1 - C_i)^2 / d x_ni = -(2 / k) (1 - C_i) / (N s_i) (y^_ni - C_i x^_ni), all k units live."""
    x, y = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    count, units = x.shape
    gradient = np.zeros_like(x)
    for i in range(units):
        x_hat, deviation = standardised(x[:, i])
        y_hat, _ = standardised(y[:, i])
        c = coefficient(x[:, i], y[:, i])
        for n in range(count):
            gradient[n, i] = -(2 / units) * (1 - c) / (count * deviation) * (y_hat[n] - c * x_hat[n])
    return gradient


def cross_correlation(student: npt.ArrayLike, teacher: npt.ArrayLike, off_diagonal: float) -> Array:
    """(1 - C_ii)^2 + off_diagonal * sum over j != i of C_ij^2, all units live."""
    x, y = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    units = x.shape[1]
    values = []
    for i in range(units):
        others = math.fsum(coefficient(x[:, i], y[:, j]) ** 2 for j in range(units) if j != i)
        values.append((1 - coefficient(x[:, i], y[:, i])) ** 2 + off_diagonal * others)
    return np.array(values)


REFERENCES: Final = {
    "correlation": correlation,
    "cross_correlation": functools.partial(cross_correlation, off_diagonal=5e-3),
}
"""Every loss of this file by its name in `FEATURE_LOSS_FACTS`."""
