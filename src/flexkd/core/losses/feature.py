"""The function of each feature loss of `facts.losses`, by name, and losses of users."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from flexkd.core.losses import alignment, correlations, distances, lens
from flexkd.core.tensors import num_processes
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, MINIMUM_POSITIONS, FeatureLossFacts
from flexkd.facts.user_code import LOSS_KEY, note_function

FeatureLoss = Callable[..., Tensor]

_FUNCTIONS: Final = {**correlations.LOSSES, **alignment.LOSSES, **distances.LOSSES, **lens.LOSSES}

FEATURE_LOSSES: Final[dict[str, FeatureLoss]] = {name: _FUNCTIONS[name] for name in FEATURE_LOSS_FACTS}
"""Every feature loss, in the order of its facts."""

UNIT_STATISTICS: Final[dict[str, FeatureLoss]] = {
    name: correlations.FROM_MOMENTS[name] for name, facts in FEATURE_LOSS_FACTS.items() if facts.has_live_units
}
"""Losses over units that can be dead, from `PairedMoments`; their mean is over live units."""

_MORE_THAN_STATES: Final = ("has_live_units", "needs_projector", "needs_geometry", "needs_heads")
"""Facts of losses that a run has to prepare."""


def register_loss(facts: FeatureLossFacts, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make a function a feature loss of this process, which a recipe names as `objective.features.loss`.

    It is called with the states of the compared positions, student's and teacher's, `[positions, units]` in float32 or
    narrower, and returns one value a unit or a single one; the loss is their mean. No gradient flows to the teacher.
    It is tried once, on random states.

    Args:
        facts: Its name and what is true of it; `pairs_units` says whether it compares unit i with unit i.
        function: Not for several processes, whose positions it would not see together.

    Raises:
        RecipeError: The name is taken or no name, a fact asks for more than states, or the function does not give a
            finite value with a gradient to the student.

    Example:
        >>> def median_distance(student, teacher):
        ...     return (student.float() - teacher.float()).abs().median(0).values
        >>> register_loss(FeatureLossFacts(name="median_distance", pairs_units=True), median_distance)
        >>> del FEATURE_LOSSES["median_distance"], FEATURE_LOSS_FACTS["median_distance"]
    """
    where = f"register_loss: {facts.name!r}"
    if facts.name in FEATURE_LOSS_FACTS or not facts.name.isidentifier():
        reason = "is taken" if facts.name in FEATURE_LOSS_FACTS else "is no name: letters, digits and '_'"
        raise RecipeError(f"{where} {reason}. Choose another name.")
    for name in _MORE_THAN_STATES:
        if getattr(facts, name):
            raise RecipeError(f"{where} has {name}, which is more than a function of states. Leave it False.")

    def loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, across_processes: bool = False) -> Tensor:
        if across_processes and num_processes() > 1:
            raise RecipeError(f"{where} is a function of the states of one process. Start one.")
        chosen = (student, teacher) if mask is None else (student[mask], teacher[mask])
        return function(chosen[0], chosen[1].detach())

    _try_out(where, loss)
    FEATURE_LOSS_FACTS[facts.name] = facts
    FEATURE_LOSSES[facts.name] = loss
    note_function(LOSS_KEY, facts.name, function)


def _try_out(where: str, loss: Callable[..., Any]) -> None:
    """Refuse a loss that does not work on random states, which leave the random state as it was.

    Raises:
        RecipeError: Says what it did.
    """
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2 * MINIMUM_POSITIONS, 3, generator=draw) for _ in range(2)]
    student, teacher = states[0].requires_grad_(), states[1]
    advice = "Let it take states of student and teacher, [positions, units], and return one value a unit or one of all."
    try:
        value = loss(student, teacher)
        if not isinstance(value, Tensor) or value.ndim > 1 or not value.isfinite().all():
            raise RecipeError(f"{where} returned {value!r:.100}, not finite values of 0 or 1 axes. {advice}")
        (gradient,) = torch.autograd.grad(value.mean(), student)
    except RecipeError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise RecipeError(f"{where} raised {type(error).__name__} ({text}) on random states. {advice}") from error
    if not gradient.isfinite().all() or not gradient.any():
        raise RecipeError(f"{where} has no finite gradient to the student that is not 0. {advice}")
