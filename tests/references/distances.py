"""Distances between hidden states, unit by unit and position by position."""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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


def distill_lens(student: npt.ArrayLike, teacher: npt.ArrayLike) -> float:
    """Mean over positions of half of KL(p || m) and half of KL(q || m), m the mean of both distributions."""
    sides = []
    for logits in (teacher, student):
        exponentials = np.exp(np.asarray(logits, dtype=np.float64))
        sides.append(exponentials / exponentials.sum(-1, keepdims=True))
    middle = (sides[0] + sides[1]) / 2
    nats = [math.fsum((side * np.log(side / middle)).ravel()) for side in sides]
    return sum(nats) / (2 * len(middle))


REFERENCES: Final = {
    "distill_lens": distill_lens,
    "mse": mse,
    "projector": mse,
    "cosine": cosine,
}
"""Every loss of this file by its name in `FEATURE_LOSS_FACTS`."""
