"""Units from scores: the k best, the share of the score that they hold, and pairs of student and teacher units."""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flexkd.core.losses.moments import paired_moments
from flexkd.core.scores import UnitScores
from flexkd.core.tensors import Number, can_be_read
from flexkd.errors import RecipeError, ScoreError, ShapeError, unknown_name
from flexkd.facts.losses import MINIMUM_POSITIONS

MAPPINGS: Final = ("index", "score", "matched")
"""Which student unit is paired with which teacher unit: ascending to ascending, by score, or by initial correlation."""


@dataclass(frozen=True)
class UnitPairs:
    """Student unit `student[i]` is taught teacher unit `teacher[i]`; whole numbers, `[k]` each.

    Raises:
        ShapeError: Not as many of one as of the other, none, a negative one, or one of the student twice.
    """

    # Shape and type are checked below and not by the annotation, so that every run says in words what is wrong.
    student: Tensor
    teacher: Tensor

    def __post_init__(self) -> None:
        for name, units in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(units, Tensor):
                raise ShapeError(
                    f"units: of the {name} are a {type(units).__name__}. Give a tensor (torch.tensor(...))."
                )
        sizes = [list(units.shape) for units in (self.student, self.teacher)]
        if sizes[0] != sizes[1] or len(sizes[0]) != 1 or sizes[0] == [0]:
            raise ShapeError(
                f"units: {sizes[0]} of the student for {sizes[1]} of the teacher. Give one list of each, as long as "
                "the other."
            )
        for name, units in (("student", self.student), ("teacher", self.teacher)):
            if units.is_floating_point() or units.dtype == torch.bool:
                raise ShapeError(f"units: of the {name} are {units.dtype}. Give whole numbers, indices from 0.")
            if can_be_read(units) and int(units.min()) < 0:
                raise ShapeError(f"units: {int(units.min())} is no unit of the {name}. Give indices from 0.")
        if not can_be_read(self.student):
            return
        values, counts = self.student.unique(return_counts=True)
        if int(counts.max()) > 1:
            raise ShapeError(f"units: student unit {int(values[counts > 1][0])} appears twice. Teach each unit once.")


def _score_values(scores: UnitScores | Tensor) -> Float64[Tensor, " hidden"]:
    values = scores.values if isinstance(scores, UnitScores) else scores
    if not isinstance(values, Tensor) or values.ndim != 1 or len(values) == 0:
        what = f"of shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ShapeError(f"scores: are {what}. Give the UnitScores of one layer, or a tensor of one number a unit.")
    values = values.detach().double().cpu()
    bad = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    if bad:
        raise ScoreError(f"scores: not finite for unit {', '.join(map(str, bad[:10]))}. Score again in float32.")
    return values


def ranked_units(scores: UnitScores | Tensor, *, lowest: bool = False) -> Int64[Tensor, " hidden"]:
    """All units from the highest score to the lowest, or from the lowest to the highest; ties by index."""
    return torch.sort(_score_values(scores), descending=not lowest, stable=True).indices


def select_units(scores: UnitScores | Tensor, k: int, *, lowest: bool = False) -> Int64[Tensor, " k"]:
    """The k units with the highest scores, ascending by index; ties go to the lower index.

    Args:
        scores: Of units, or of whatever else has one number each, as directions.
        k: How many are selected.
        lowest: Select those with the lowest scores, as a control.

    Raises:
        ScoreError: A score is NaN or infinite; names the units.
        ShapeError: k is below 1 or above the number of units.

    Source:
        Saadi and Wang, Flex-KD, 2025, arXiv:2507.10155: the `d_S` best teacher units.

    Example:
        >>> select_units(torch.tensor([0.1, 0.9, 0.3, 0.9]), 2)
        tensor([1, 3])
    """
    ranked = ranked_units(scores, lowest=lowest)
    if not 1 <= k <= len(ranked):
        raise ShapeError(f"units: cannot choose {k} of {len(ranked)} teacher units. Ask for 1 to {len(ranked)}.")
    return ranked[:k].sort().values


def coverage_curve(scores: UnitScores | Tensor, *, lowest: bool = False) -> Float64[Tensor, " hidden"]:
    """Share of the total score that the 1, 2, ... best units hold.

    Args:
        scores: As in `select_units`.
        lowest: The units with the lowest scores come first.

    Raises:
        ScoreError: No score is above 0, or one is below 0.
    """
    values = _score_values(scores).sort(descending=True).values
    if values[0] <= 0:
        raise ScoreError("scores: none is above 0, so that no unit holds a share. Score again, with another target.")
    if values[-1] < 0:
        raise ScoreError(
            f"scores: {float(values[-1]):g} is below 0, and no share of a total. Give their sizes (abs())."
        )
    return (values.flip(0) if lowest else values).cumsum(0) / values.sum()


def units_for_coverage(scores: UnitScores | Tensor, share: Number) -> int:
    """Fewest units that hold a share of the score: the effective functional dimension of the task.

    Raises:
        RecipeError: The share is not above 0 and at most 1.
    """
    return count_for_coverage(coverage_curve(scores), share)


def count_for_coverage(curve: Float64[Tensor, " hidden"], share: Number) -> int:
    """Fewest units or directions, best first, that hold a share.

    Args:
        curve: What the first 1, 2, ... of them hold; ends at 1.
        share: Above 0, at most 1.

    Raises:
        RecipeError: The share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise RecipeError(f"coverage: must be above 0 and at most 1, was {share}. 0.9 keeps 90 % of the score.")
    # A curve that ends at 1 - 1e-16 must still be reached by share 1.
    reached = curve >= share * (1 - 1e-12)
    return int(torch.nonzero(reached)[0]) + 1


def pair_units(
    units: Int64[Tensor, " k"],
    student_size: int,
    *,
    mapping: str = "index",
    scores: UnitScores | Tensor | None = None,
    student_states: Float[Tensor, "student_positions student_hidden"] | None = None,
    teacher_states: Float[Tensor, "teacher_positions columns"] | None = None,
) -> UnitPairs:
    """Decide which student unit learns which teacher unit.

    Args:
        units: Chosen teacher units, ascending.
        student_size: Width of the student; with fewer units than that, `index` and `score` bind its first k units.
        mapping: `index` ascending to ascending; `score` the student's first unit to the best; `matched` the one-to-one
            assignment with the highest signed correlation between the states of the untrained student and the teacher.
        scores: Needed by `score`.
        student_states: Needed by `matched`: calibration rows through the untrained student.
        teacher_states: Needed by `matched`: the same rows through the teacher, columns in the order of `units`.

    Raises:
        RecipeError: Unknown mapping, or without what it needs.
        ShapeError: More units than the student has, or states of other positions or units.
    """
    if mapping not in MAPPINGS:
        raise RecipeError(unknown_name("objective.features.mapping", "mapping", mapping, MAPPINGS))
    if len(units) > student_size:
        raise ShapeError(f"units: {len(units)} teacher units for {student_size} student units. Ask for fewer units.")
    first = torch.arange(len(units))
    if mapping == "index":
        return UnitPairs(first, units)
    if mapping == "score":
        if scores is None:
            raise RecipeError("mapping: 'score' pairs units by their scores, and none are given. Pass scores=.")
        chosen = set(units.tolist())
        return UnitPairs(first, torch.tensor([u for u in ranked_units(scores).tolist() if u in chosen]))
    if student_states is None or teacher_states is None:
        raise RecipeError(
            "mapping: 'matched' compares states of calibration rows, and none are given. Pass student_states= and "
            "teacher_states=."
        )
    sizes = tuple(student_states.shape), tuple(teacher_states.shape)
    if sizes != ((sizes[0][0], student_size), (sizes[0][0], len(units))):
        raise ShapeError(
            f"mapping: states are {list(sizes[0])} of the student and {list(sizes[1])} of the teacher, for "
            f"{student_size} student units and {len(units)} teacher units. Give the same positions of both, and these "
            "units."
        )
    student_units, columns = matched_columns(student_states, teacher_states)
    return UnitPairs(student_units, units[columns])


def matched_columns(
    student_states: Float[Tensor, "positions student_hidden"], teacher_states: Float[Tensor, "positions k"]
) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
    """Student columns and teacher columns of the one-to-one assignment with the highest signed correlation."""
    if len(student_states) < MINIMUM_POSITIONS:
        raise ShapeError(
            f"mapping: {len(student_states)} positions are fewer than the {MINIMUM_POSITIONS} that a correlation "
            "needs. Give states of more rows."
        )
    student = paired_moments(student_states, student_states)
    teacher = paired_moments(teacher_states, teacher_states)
    matrix = (student.student / student.student_std).T @ (teacher.student / teacher.student_std)
    if not bool(matrix.isfinite().all()):
        raise ShapeError("mapping: states that are not finite have no correlation. Read them again in float32.")
    correlations = (matrix / len(student_states)).detach().double().cpu().numpy()
    student_columns, teacher_columns = linear_sum_assignment(correlations, maximize=True)
    return torch.from_numpy(student_columns).long(), torch.from_numpy(teacher_columns).long()
