"""Losses between hidden states, unit by unit and position by position."""

import math

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


def mse(student: npt.ArrayLike, teacher: npt.ArrayLike) -> Array:
    """Mean over positions of the squared difference of every unit."""
    x, y = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    return np.array(
        [math.fsum((a - b) ** 2 for a, b in zip(x[:, i], y[:, i], strict=True)) / len(x) for i in range(x.shape[1])]
    )


def cosine(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """Mean over positions of 1 - cos(x_n, y_n)."""
    x, y = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    distances = [1 - a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(x, y, strict=True)]
    return math.fsum(distances) / len(distances)
