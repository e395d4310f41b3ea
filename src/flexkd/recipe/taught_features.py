"""What a student is cut by and what it is taught, chosen by what, in data and in words, and which scores that reads."""

from dataclasses import dataclass
from typing import Final, Literal

from flexkd.facts.losses import FEATURE_LOSS_FACTS, TASK_LOSS_FACTS, TASK_LOSS_OF
from flexkd.facts.names import ALL_LAYERS
from flexkd.recipe.schema import Recipe

Kind = Literal["units", "directions"]

BY_SCORES: Final = ("scores", "lowest")
"""Choices that read scores: the best of them, or the worst."""
_ALL_KEYS: Final = frozenset({"target", "attribution", "layer", "rows"})
_READ_KEYS: Final = {
    "scores": _ALL_KEYS,
    "lowest": _ALL_KEYS,
    "variance": frozenset({"layer", "rows"}),
    "activation": frozenset({"layer", "rows"}),
    "random": frozenset({"layer"}),
}
"""Keys of `scores` that each choice of units reads."""
_WORDS: Final = {
    ("units", "scores"): "the units with the highest scores",
    ("units", "variance"): "the units with the most variance",
    ("units", "activation"): "the units with the largest mean activation",
    ("units", "random"): "units chosen at random",
    ("units", "lowest"): "the units with the lowest scores",
    ("directions", "scores"): "the PCA directions with the highest scores (variance times function)",
    ("directions", "variance"): "the PCA directions with the most variance",
    ("directions", "activation"): "the PCA directions with the largest mean activation",
    ("directions", "random"): "PCA directions chosen at random",
    ("directions", "lowest"): "the PCA directions with the lowest scores (variance times function)",
    ("directions", "mixed"): "the leading directions of variance and function added up",
}
"""What a cut keeps, or what is taught of units."""
_DIRECTIONS_OVER_LAYERS: Final = {
    "scores": "the PCA directions with the highest scores over all blocks (gradient times state)",
    "lowest": "the PCA directions with the lowest scores over all blocks (gradient times state)",
}
"""What a cut keeps of directions that are scored at every block."""
_MATCHED_WORDS: Final = {
    "scores": "the directions that the output depends on most",
    "variance": "the directions with the most variance",
    "random": "random directions",
    "lowest": "the directions that the output depends on least",
}
"""What is taught of directions that the student was not cut along."""


@dataclass(frozen=True)
class Choice:
    """Units or directions, and what they are chosen by.

    Attributes:
        chosen_by: As in the recipe, never null.
        is_cut: Whether these are what the student is cut by, paired by identity.
        over_layers: Whether they are ranked over all blocks, not at one layer.
    """

    kind: Kind
    chosen_by: str
    is_cut: bool
    over_layers: bool = False

    def __str__(self) -> str:
        if self.kind == "directions" and not self.is_cut:
            return _MATCHED_WORDS[self.chosen_by]
        if self.over_layers and self.kind == "directions":
            return _DIRECTIONS_OVER_LAYERS[self.chosen_by]
        return _WORDS[self.kind, self.chosen_by] + (" over all blocks" if self.over_layers else "")


def may_rotate(recipe: Recipe) -> bool:
    """Whether the recipe cuts the student along the teacher's directions, if the teacher can be rotated."""
    section = recipe.student
    by_default = section.basis == "auto" and recipe.generation is not None
    return section.start == "slice" and (section.basis == "rotated" or by_default)


def is_rotated(recipe: Recipe, *, can_rotate: bool) -> bool:
    """Whether the student is cut along the teacher's directions.

    Args:
        can_rotate: Whether the teacher can be rotated into the basis of these directions. A recipe that sets `basis:
            rotated` counts as rotated either way; a run with another teacher is refused.
    """
    return may_rotate(recipe) and (can_rotate or recipe.student.basis == "rotated")


def cut_chosen_by(recipe: Recipe, *, rotated: bool) -> str:
    """What a slice keeps is chosen by, as in `student.chosen_by`, with what `auto` means for this recipe.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    chosen_by = recipe.student.chosen_by
    if chosen_by != "auto":
        return chosen_by
    if not rotated or recipe.scores.layer == ALL_LAYERS:
        return "scores"
    # How much the output depends on a direction is known for outputs that are one distribution.
    return "mixed" if TASK_LOSS_FACTS[TASK_LOSS_OF[recipe.task.problem]].is_distribution else "variance"


def cut_choice(recipe: Recipe, *, rotated: bool) -> Choice | None:
    """What the student is cut by; None where it is not cut out of the teacher.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    section = recipe.student
    if section.start != "slice":
        return None
    kind: Kind = "directions" if rotated else "units"
    chosen_by = cut_chosen_by(recipe, rotated=rotated)
    return Choice(kind, chosen_by, is_cut=True, over_layers=_is_over_layers(recipe, kind, chosen_by))


def taught_choice(recipe: Recipe, *, rotated: bool) -> Choice | None:
    """The units or directions that the objective teaches; None where it teaches whole states, or no features.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    section, cut = recipe.objective.features, cut_choice(recipe, rotated=rotated)
    if section is None or section.weight == 0 or not FEATURE_LOSS_FACTS[section.loss].pairs_units:
        return None
    if cut is not None and section.mapping != "matched":
        return cut
    default = ("units", "scores") if cut is None else (cut.kind, cut.chosen_by)
    kind = default[0] if section.basis == "auto" else section.basis
    chosen_by = section.chosen_by or default[1]
    if chosen_by == "mixed":
        chosen_by = "scores"  # a mixed basis is known for the cut alone
    if kind == "directions":
        return Choice("directions", chosen_by, is_cut=False)
    return Choice("units", chosen_by, is_cut=False, over_layers=_is_over_layers(recipe, "units", chosen_by))


def _is_over_layers(recipe: Recipe, kind: Kind, chosen_by: str) -> bool:
    """Whether a choice goes by what is measured at all blocks; of directions that are their scores alone."""
    is_measured = chosen_by in BY_SCORES if kind == "directions" else chosen_by != "random"
    return is_measured and recipe.scores.layer == ALL_LAYERS


def describe_cut(recipe: Recipe, *, rotated: bool) -> str:
    """What the student starts as, in words."""
    section, cut = recipe.student, cut_choice(recipe, rotated=rotated)
    if cut is None:
        return {"pretrained": "a pretrained model", "config": "new weights"}.get(section.start, section.start)
    if section.hidden_size is None and section.size is None and section.max_parameters is None:
        return f"cut out of the teacher along all of its {cut.kind}"
    return f"cut out of the teacher along {cut}"


def describe_taught(recipe: Recipe, *, rotated: bool) -> str:
    """What the feature term teaches, in words."""
    section, choice = recipe.objective.features, taught_choice(recipe, rotated=rotated)
    if section is None or section.weight == 0:
        return "no features"
    if choice is None:
        return f"whole states, by {section.loss}"
    if choice.is_cut:
        return f"the {choice.kind} that it is cut along, by {section.loss}"
    paired = {"matched": "paired by similarity", "score": "paired by score"}.get(section.mapping, "paired in order")
    return f"{choice}, {paired}, by {section.loss}"


def unit_attributions(recipe: Recipe, *, rotated: bool) -> tuple[str, ...]:
    """How the units are scored that choose something, first for the cut; empty where no scores of units are read.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    choices = (cut_choice(recipe, rotated=rotated), taught_choice(recipe, rotated=rotated))
    attributions = [
        unit_attribution(recipe, choice.chosen_by)
        for choice in choices
        if choice is not None and choice.kind == "units"
    ]
    return tuple(dict.fromkeys(attributions))


def unit_attribution(recipe: Recipe, chosen_by: str) -> str:
    """The attribution of the unit scores that a choice ranks units by."""
    return recipe.scores.attribution if chosen_by in BY_SCORES else chosen_by


def read_score_keys(recipe: Recipe, *, rotated: bool) -> frozenset[str]:
    """Keys of `scores` that decide anything: units, directions, or what a loss weighs the states by.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    return keys_of_loss(recipe).union(
        *map(keys_of, (cut_choice(recipe, rotated=rotated), taught_choice(recipe, rotated=rotated)))
    )


def keys_of(choice: Choice | None) -> frozenset[str]:
    """Keys of `scores` that a choice reads."""
    if choice is None:
        return frozenset()
    if choice.kind == "units":
        return _READ_KEYS[choice.chosen_by]
    if choice.over_layers:
        return frozenset({"rows", "layer", "target"})
    return frozenset({"rows"} if reads_geometry(choice) else ())


def keys_of_loss(recipe: Recipe) -> frozenset[str]:
    """Keys of `scores` that the feature loss itself reads."""
    section = recipe.objective.features
    needs_geometry = section is not None and section.weight > 0 and FEATURE_LOSS_FACTS[section.loss].needs_geometry
    return frozenset({"rows"} if needs_geometry else ())


def reads_geometry(choice: Choice | None) -> bool:
    """Whether a choice reads how much the output depends on directions, which is known for classes and tokens."""
    if choice is None or choice.kind == "units" or choice.over_layers:
        return False
    return choice.chosen_by in (*BY_SCORES, "mixed")


def drawn_rows(recipe: Recipe, *, rotated: bool) -> dict[str, int | None]:
    """How many training rows a start reads, those that `student.start_seed` draws, by the key that says it; None: all.

    Args:
        rotated: Whether the student is cut along the teacher's directions.
    """
    features, taught = recipe.objective.features, taught_choice(recipe, rotated=rotated)
    is_matched = taught is not None and not taught.is_cut and features is not None and features.mapping == "matched"
    projector = None if features is None or features.weight == 0 else features.projector
    is_measured = projector is not None and (projector.standardize or projector.start == "cut")
    rows: dict[str, int | None] = {}
    if recipe.student.start == "slice" or is_matched or is_measured:
        rows["student.calibration_rows"] = recipe.student.calibration_rows
    if "rows" in read_score_keys(recipe, rotated=rotated):
        rows["scores.rows"] = recipe.scores.rows
    return rows


def takes_all_units(recipe: Recipe, *, width: int | None) -> bool:
    """Whether a cut student keeps every unit or direction of the teacher, so that no choice decides about its cut.

    Args:
        width: Hidden size of the teacher; None where it is not known.
    """
    student = recipe.student
    is_whole = student.hidden_size in (None, width) and student.size is None and student.max_parameters is None
    return width is not None and student.start == "slice" and is_whole


def teaches_all_units(recipe: Recipe, *, width: int | None) -> bool:
    """Whether a student of its teacher's width is taught everything that it is cut by."""
    features = recipe.objective.features
    is_taught_whole = features is None or (features.units in (None, width) and features.coverage is None)
    return takes_all_units(recipe, width=width) and is_taught_whole


def unread_scores_reason(recipe: Recipe, *, rotated: bool) -> str:
    """Why keys of `scores` are not read, in words."""
    return (
        f"the student is {describe_cut(recipe, rotated=rotated)}, and it is taught "
        f"{describe_taught(recipe, rotated=rotated)}"
    )
