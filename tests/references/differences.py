"""Gradient by central differences, for references in float64."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def numerical_gradient(function: Callable[[Array], float], point: npt.ArrayLike, step: float = 1e-5) -> Array:
    """d function / d point, exact to about step ** 2 and 1e-16 / step, whichever is larger."""
    centre = np.array(point, dtype=np.float64)
    gradient = np.zeros_like(centre)
    for index in np.ndindex(centre.shape):
        ahead, behind = centre.copy(), centre.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient
