"""Where a projector begins, and units of one size: maps and scales computed from states or heads, not learned."""

from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flexkd.core.tensors import DEAD_FACTOR

_STRENGTHS: Final = tuple(10.0**exponent for exponent in range(-6, 3))
"""Strengths of a ridge regression between standardized states."""


class LinearMap(NamedTuple):
    """A map from a student's state to a teacher's, in the layout of `nn.Linear`: `h @ weight.T + bias`."""

    weight: Float[Tensor, "teacher_units student_units"]
    bias: Float[Tensor, " teacher_units"]

    def in_basis(self, basis: Float[Tensor, "teacher_units columns"]) -> "LinearMap":
        """The map to the columns of a basis of the teacher's state."""
        return LinearMap(basis.T.to(self.weight) @ self.weight, self.bias @ basis.to(self.bias))


def unit_variance_basis(states: Float[Tensor, "positions units"]) -> Float[Tensor, "units units"]:
    """A diagonal basis in which every unit of these states has variance 1; a unit that does not vary becomes 0.

    A few units of a language model are hundreds of times larger than the rest, and a squared distance of raw states is
    about them alone.
    """
    exact = states.double()
    deviation = exact.std(0, correction=0)
    live = deviation > DEAD_FACTOR * exact.abs().amax(0)
    return torch.diag(torch.where(live, 1 / torch.where(live, deviation, 1.0), 0.0)).float()


def cut_map(states: Float[Tensor, "positions units"], cut: Float[Tensor, "units kept_units"]) -> LinearMap:
    """The map that gives a teacher's state back from what a cut keeps of it.

    The pseudo-inverse of the cut gives back exactly what lies in it, for units a matrix of zeros and ones. What it
    leaves of the states is predicted from what is kept, as far as that helps at positions which the prediction was not
    fitted to: plain least squares of a few hundred positions is worse than none for a few hundred kept units.

    Args:
        states: The teacher's, on rows of the task.
        cut: Unit j of the student begins as column j of `states @ cut`.
    """
    y, directions = states.double(), cut.double()
    inverse = torch.linalg.pinv(directions)
    x = y @ directions
    weight = inverse + _prediction(x, y - x @ inverse)
    return LinearMap(weight.T.float(), (y.mean(0) - x.mean(0) @ weight).float())


def _prediction(x: Float64[Tensor, "positions inputs"], y: Float64[Tensor, "positions outputs"]) -> Tensor:
    """The ridge regression that predicts the second half of the positions best from the first, or zeros."""
    half, scales = len(x) // 2, [_scale(x), _scale(y)]
    x, y = (x - x.mean(0)) / scales[0], (y - y.mean(0)) / scales[1]
    errors = {strength: _error(weight, x[half:], y[half:]) for strength, weight in _ridge(x[:half], y[:half]).items()}
    best = min(errors, key=lambda strength: errors[strength])
    if not errors[best] < float(y[half:].square().sum()):
        return x.new_zeros(x.shape[1], y.shape[1])
    return _ridge(x, y)[best] * scales[1] / scales[0][:, None]


def _scale(values: Tensor) -> Tensor:
    deviation = values.std(0, correction=0)
    return torch.where(deviation > DEAD_FACTOR * values.abs().amax(0), deviation, 1.0)


def _error(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float((y - x @ weight).square().sum())


def _ridge(x: Tensor, y: Tensor) -> dict[float, Tensor]:
    """Weights that minimize `|y - x w|^2 / positions + strength |w|^2`, by strength."""
    count = max(len(x), 1)
    values, vectors = torch.linalg.eigh(x.T @ x / count)
    turned = vectors.T @ (x.T @ y / count)
    return {strength: vectors @ (turned / (values.clamp(min=0) + strength)[:, None]) for strength in _STRENGTHS}


def head_map(
    student_weight: Float[Tensor, "outputs student_units"],
    teacher_weight: Float[Tensor, "outputs teacher_units"],
    bias_difference: Float[Tensor, " outputs"] | None = None,
) -> LinearMap:
    """The map after which the teacher's head gives, as nearly as it can, what the student's own head gives.

    `P` minimizes `||P W_t' - W_s'||`, so that a state mapped by it has the student's logits under the teacher's head.

    Args:
        bias_difference: The bias of the student's head minus that of the teacher's; None: neither has one.

    Source:
        Zhang et al., DSKDv2, 2025, arXiv:2504.11426: projectors that begin with the pseudo-inverse of a head.
    """
    w_s, w_t = student_weight.detach().double(), teacher_weight.detach().double()
    # The product of the teacher's head with itself is small where its pseudo-inverse is as large as the vocabulary.
    inverse = torch.linalg.pinv(w_t.T @ w_t, hermitian=True)
    bias = w_t.new_zeros(w_t.shape[1])
    if bias_difference is not None:
        bias = inverse @ (w_t.T @ bias_difference.detach().double())
    return LinearMap((inverse @ (w_t.T @ w_s)).float(), bias.float())
