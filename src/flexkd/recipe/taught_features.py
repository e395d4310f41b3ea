"""What a recipe cuts its student by and teaches it, and whether anything reads the scores of the teacher's units."""

from typing import Final, Literal

from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.recipe.schema import Recipe

Taught = Literal["nothing", "whole states", "scored units", "PCA directions", "tangent directions"]

PCA_DIRECTIONS: Final = "PCA directions"
SCORED_UNITS: Final = "scored units"


def may_rotate(recipe: Recipe) -> bool:
    """Whether the student is cut along the teacher's own directions, where the teacher's family can be turned."""
    section = recipe.student
    by_default = section.basis == "auto" and recipe.generation is not None
    return section.start == "slice" and (section.basis == "rotated" or by_default)


def is_rotated(recipe: Recipe, *, turns: bool) -> bool:
    """Whether the student is cut along the teacher's own directions.

    Args:
        turns: The teacher can be turned into their basis; where a recipe asks for it by name, a run ends if it cannot.
    """
    return may_rotate(recipe) and (turns or recipe.student.basis == "rotated")


def taught_features(recipe: Recipe, *, rotated: bool) -> Taught:
    """What the feature term of a recipe hands to the student.

    Args:
        rotated: The student is cut along the teacher's own directions.
    """
    section = recipe.objective.features
    if section is None or section.weight == 0:
        return "nothing"
    if not FEATURE_LOSS_FACTS[section.loss].pairs_units:
        return "whole states"
    if section.basis == "tangent":
        return "tangent directions"
    # A unit of a rotated student is bound to the direction that it was cut along.
    return PCA_DIRECTIONS if rotated and section.mapping != "matched" else SCORED_UNITS


def reads_scores(recipe: Recipe, *, rotated: bool) -> bool:
    """Whether the scores of the teacher's units decide anything: the cut of the student, or the units it is taught.

    Args:
        rotated: The student is cut along the teacher's own directions, which no score chooses.
    """
    is_cut_by_units = recipe.student.start == "slice" and not rotated
    return is_cut_by_units or taught_features(recipe, rotated=rotated) == SCORED_UNITS


def takes_all_units(recipe: Recipe, *, width: int | None) -> bool:
    """Whether a cut student keeps and is taught every unit of the teacher, so that no score chooses any.

    Args:
        width: The teacher's; None where it is not known.
    """
    student, features = recipe.student, recipe.objective.features
    is_whole = student.hidden_size in (None, width) and student.size is None and student.max_parameters is None
    is_taught_whole = features is None or (features.units in (None, width) and features.coverage is None)
    return width is not None and student.start == "slice" and is_whole and is_taught_whole


def unread_scores_reason(recipe: Recipe, *, rotated: bool) -> str:
    """The reason, for a recipe of which `reads_scores` is false."""
    cut = {
        "slice": "the student is cut along the teacher's own directions (PCA of its states)",
        "pretrained": "the student is not cut from the teacher",
        "config": "the student is not cut from the teacher",
    }[recipe.student.start]
    taught = taught_features(recipe, rotated=rotated)
    features = recipe.objective.features
    loss = "" if features is None or taught != "whole states" else f" ({features.loss})"
    return f"{cut}, and {'no features are' if taught == 'nothing' else f'{taught}{loss} are'} taught"
