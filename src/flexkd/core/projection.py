"""Where a projector begins, and units of one size: maps and scales computed from states or heads, not learned."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flexkd.core.tensors import DEAD_FACTOR


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
    leaves of the states is predicted from what is kept by least squares: no linear map of the kept part is nearer to
    the whole states, and a part that the states do not determine gets the smallest map.

    Args:
        states: The teacher's, on rows of the task.
        cut: Unit j of the student begins as column j of `states @ cut`.
    """
    y, directions = states.double(), cut.double()
    inverse = torch.linalg.pinv(directions)
    x = y @ directions
    x_mean, rest = x.mean(0), y - x @ inverse
    prediction = torch.linalg.lstsq(x - x_mean, rest - rest.mean(0), driver="gelsd").solution
    weight = inverse + prediction
    return LinearMap(weight.T.float(), (y.mean(0) - x_mean @ weight).float())


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
