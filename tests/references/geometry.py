"""The Fisher form of a head, from finite differences of its log-probabilities."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tests.references.differences import numerical_gradient
from tests.references.divergences import distribution, kl

Array = npt.NDArray[np.float64]
Head = Callable[[Array], Array]


def log_probability(head: Head, state: Array, outcome: int) -> float:
    return float(np.log(distribution(head(state))[outcome]))


def fisher(head: Head, states: npt.ArrayLike) -> Array:
    """sum_n sum_v p_v grad(log p_v) grad(log p_v)^T over the rows of the states."""
    rows = np.asarray(states, dtype=np.float64)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for state in rows:
        for outcome, share in enumerate(distribution(head(state))):
            gradient = numerical_gradient(lambda h, v=outcome: log_probability(head, h, v), state)
            total += share * np.outer(gradient, gradient)
    return total


def divergence_of_step(head: Head, state: Array, step: Array) -> float:
    """KL(p(h) || p(h + e))."""
    return kl(distribution(head(state)), distribution(head(state + step)))
