"""Centred kernel alignment from explicit Gram matrices, and the unbiased HSIC as a sum over quadruples."""

import itertools
import math
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.float64]


def gram(states: npt.ArrayLike) -> Array:
    """K_nm = x_n . x_m of the rows as they are."""
    x = np.asarray(states, dtype=np.float64)
    return x @ x.T


def biased_hsic(first: Array, second: Array) -> float:
    """tr(K H L H) / N^2 with H = I - 1 1^T / N."""
    count = len(first)
    centring = np.eye(count) - np.ones((count, count)) / count
    return float(np.trace(first @ centring @ second @ centring)) / count**2


def quadruple_hsic(first: Array, second: Array) -> float:
    """Mean over all ordered quadruples of different positions of K_ij (L_ij + L_qr - 2 L_iq)."""
    count = len(first)
    quadruples = itertools.permutations(range(count), 4)
    terms = (first[i, j] * (second[i, j] + second[q, r] - 2 * second[i, q]) for i, j, q, r in quadruples)
    return math.fsum(terms) / (count * (count - 1) * (count - 2) * (count - 3))


def unbiased_hsic(first: Array, second: Array) -> float:
    """The same from matrices without their diagonals, fast enough for more than ten positions."""
    count = len(first)
    k, m = first - np.diag(np.diag(first)), second - np.diag(np.diag(second))
    ones = np.ones(count)
    total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((count - 1) * (count - 2))
    return float(total - 2 / (count - 2) * (ones @ k @ m @ ones)) / (count * (count - 3))


def cka_of_grams(first: Array, second: Array, *, unbiased: bool = True) -> float:
    """1 - HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    hsic = unbiased_hsic if unbiased else biased_hsic
    return 1 - hsic(first, second) / math.sqrt(hsic(first, first) * hsic(second, second))


def cka(student: npt.ArrayLike, teacher: npt.ArrayLike, *, unbiased: bool = True) -> float:
    """1 - linear CKA of two sets of states."""
    return cka_of_grams(gram(student), gram(teacher), unbiased=unbiased)


def unit_states(states: npt.ArrayLike) -> Array:
    """Centred rows, divided by the root of the sum of all squares."""
    x = np.asarray(states, dtype=np.float64)
    centred = x - x.mean(0)
    return np.asarray(centred / math.sqrt(math.fsum(centred.ravel() ** 2)))


def procrustes(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """The distance that is left by the rotation which scipy finds, the narrower side filled up with zeros."""
    sides = [unit_states(student), unit_states(teacher)]
    width = max(side.shape[1] for side in sides)
    x, y = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in sides)
    turn, _ = scipy.linalg.orthogonal_procrustes(x, y)
    return float(np.square(x @ turn - y).sum())


def gram_distance(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """Pair of positions by pair of positions, the squared difference of their products over that of the teacher's."""
    first, second = gram(unit_states(student)), gram(unit_states(teacher))
    return math.fsum((first - second).ravel() ** 2) / math.fsum(second.ravel() ** 2)


REFERENCES: Final = {"cka": cka, "functional_cka": cka, "gram": gram_distance, "procrustes": procrustes}
"""Every loss of this file by its name in `FEATURE_LOSS_FACTS`."""
