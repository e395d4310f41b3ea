"""Which features a recipe teaches, how its student is cut, and whether anything reads the unit scores."""

from typing import Final, Literal

from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.recipe.schema import Recipe

TaughtFeatures = Literal["nothing", "whole states", "scored units", "PCA directions", "tangent directions"]

PCA_DIRECTIONS: Final = "PCA directions"
SCORED_UNITS: Final = "scored units"


def may_rotate(recipe: Recipe) -> bool:
    """Whether the recipe cuts the student along the teacher's PCA directions, if the teacher can be rotated."""
    section = recipe.student
    by_default = section.basis == "auto" and recipe.generation is not None
    return section.start == "slice" and (section.basis == "rotated" or by_default)


def is_rotated(recipe: Recipe, *, can_rotate: bool) -> bool:
    """Whether the student is cut along the teacher's PCA directions.

    Args:
        can_rotate: Whether the teacher can be rotated into the basis of these directions. A recipe that sets `basis:
            rotated` counts as rotated either way; a run with another teacher is refused.
    """
    return may_rotate(recipe) and (can_rotate or recipe.student.basis == "rotated")


def taught_features(recipe: Recipe, *, rotated: bool) -> TaughtFeatures:
    """The features that the objective of a recipe teaches.

    Args:
        rotated: Whether the student is cut along the teacher's PCA directions.
    """
    section = recipe.objective.features
    if section is None or section.weight == 0:
        return "nothing"
    if not FEATURE_LOSS_FACTS[section.loss].pairs_units:
        return "whole states"
    if section.basis == "tangent":
        return "tangent directions"
    # Each unit of a rotated student belongs to the direction that it was cut along.
    return PCA_DIRECTIONS if rotated and section.mapping != "matched" else SCORED_UNITS


def reads_scores(recipe: Recipe, *, rotated: bool) -> bool:
    """Whether the unit scores decide anything: the cut of the student, or the units that it is taught.

    Args:
        rotated: Whether the student is cut along the teacher's PCA directions, which do not depend on scores.
    """
    is_cut_by_units = recipe.student.start == "slice" and not rotated
    return is_cut_by_units or taught_features(recipe, rotated=rotated) == SCORED_UNITS


def takes_all_units(recipe: Recipe, *, width: int | None) -> bool:
    """Whether a cut student keeps and is taught every unit of the teacher, so that scores decide nothing.

    Args:
        width: Hidden size of the teacher; None where it is not known.
    """
    student, features = recipe.student, recipe.objective.features
    is_whole = student.hidden_size in (None, width) and student.size is None and student.max_parameters is None
    is_taught_whole = features is None or (features.units in (None, width) and features.coverage is None)
    return width is not None and student.start == "slice" and is_whole and is_taught_whole


def unread_scores_reason(recipe: Recipe, *, rotated: bool) -> str:
    """Why `reads_scores` is false for a recipe, in words."""
    cut = {
        "slice": "the student is cut along the teacher's own directions (PCA of its states)",
        "pretrained": "the student is not cut from the teacher",
        "config": "the student is not cut from the teacher",
    }[recipe.student.start]
    taught = taught_features(recipe, rotated=rotated)
    features = recipe.objective.features
    loss = "" if features is None or taught != "whole states" else f" ({features.loss})"
    return f"{cut}, and {'no features are' if taught == 'nothing' else f'{taught}{loss} are'} taught"
