"""Scores of the units under a linear head, from the closed gradient of a softmax, prediction by prediction."""

import math

import numpy as np
import numpy.typing as npt

from tests.references.divergences import distribution

Array = npt.NDArray[np.float64]


def target_gradient(state: Array, weight: Array, label: int, target: str) -> Array:
    """d y / d h of one prediction with logits W h."""
    logits = weight @ state
    if target == "log_prob":
        return weight[label] - np.array(distribution(logits)) @ weight
    named = label if target == "logit" else int(np.argmax(logits))
    return weight[named] - weight.mean(0)


def attribution(gradient: Array, state: Array, name: str) -> Array:
    """|g|, |h g| or g^2."""
    return {
        "gradient": np.abs(gradient),
        "gradient_x_activation": np.abs(gradient * state),
        "fisher": gradient**2,
    }[name]


def head_scores(states: npt.ArrayLike, weight: npt.ArrayLike, labels: npt.ArrayLike, target: str, name: str) -> Array:
    """(1 / predictions) sum over predictions of the attribution, one supervised state for each prediction."""
    h, w = np.asarray(states, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    total = np.zeros(h.shape[1])
    for state, label in zip(h, np.asarray(labels), strict=True):
        total += attribution(target_gradient(state, w, int(label), target), state, name)
    return total / len(h)


def kish(weights: npt.ArrayLike) -> float:
    """(sum w)^2 / sum w^2, the number of equal weights that would decide as much."""
    values = [float(w) for w in np.asarray(weights)]
    return math.fsum(values) ** 2 / math.fsum(w * w for w in values)
