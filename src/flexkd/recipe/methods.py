"""The methods of `flexkd compare`: what each changes in a recipe, and which of them mean something under it."""

from collections.abc import Sequence
from typing import Any, Final

from flexkd.errors import RecipeError, unknown_name
from flexkd.recipe.loading import override_recipe
from flexkd.recipe.schema import Recipe
from flexkd.recipe.taught_features import (
    PCA_DIRECTIONS,
    is_rotated,
    reads_scores,
    takes_all_units,
    taught_features,
    unread_scores_reason,
)

METHODS: Final[dict[str, tuple[str, ...]]] = {
    "fine_tuning": (
        "objective.logits=null",
        "objective.features=null",
        "objective.baseline=true",
        "objective.task.weight=1",
    ),
    "logit_kd": ("objective.features=null",),
    "projector": ("objective.features.loss=projector", "objective.features.basis=units"),
    "cka": ("objective.features.loss=cka", "objective.features.basis=units"),
    "cosine": ("objective.features.loss=cosine",),
    "mse": ("objective.features.loss=mse",),
    "pca_directions": (
        "student.basis=rotated",
        "objective.features.basis=units",
        "objective.features.mapping=index",
    ),
    "flexkd": (),
    "flexkd_random": ("scores.attribution=random",),
    "flexkd_variance": ("scores.attribution=variance",),
    "flexkd_activation": ("scores.attribution=activation",),
}
"""What each method changes in the recipe, which itself describes `flexkd`. The last three choose the units by a
control, for the start as well as for the loss; `pca_directions` cuts and teaches the leading directions of the
teacher's states, which no score chooses."""

WITHOUT_FEATURES: Final = ("fine_tuning", "logit_kd")
DEFAULT_SEEDS: Final = (0, 1, 2)

_DEFAULT_METHODS: Final = ("fine_tuning", "logit_kd", "projector")
_BY_SCORES: Final = ("flexkd", "flexkd_random", "flexkd_variance", "flexkd_activation")
_CONTROLS: Final = ("random", "variance", "activation")


def compared_methods(recipe: Recipe, methods: Sequence[str], *, turns: bool | None) -> list[str]:
    """The methods that are asked for, those of the recipe, or the rivals with the method that the recipe describes.

    The last goes by the name of what it teaches.

    Args:
        recipe: Describes `flexkd`.
        methods: Those asked for; may be empty.
        turns: The teacher can be turned into the basis of its own directions; None: not known.
    """
    section = recipe.compare
    described = "pca_directions" if is_rotated(recipe, turns=bool(turns)) else "flexkd"
    return list(methods or (section.methods if section else ()) or (*_DEFAULT_METHODS, described))


def compared_seeds(recipe: Recipe, seeds: Sequence[int]) -> list[int]:
    """The seeds that are asked for, those of the recipe, or the default ones."""
    section = recipe.compare
    return list(seeds or (section.seeds if section else ()) or DEFAULT_SEEDS)


def method_recipe(recipe: Recipe, method: str) -> Recipe:
    """The recipe of one method.

    Raises:
        RecipeError: The method sets what this recipe cannot have.
    """
    try:
        return override_recipe(recipe, METHODS[method])
    except RecipeError as error:
        reason = str(error).splitlines()[0].removeprefix("command line: ").rpartition(". ")[0]
        raise RecipeError(
            f"compare.methods: '{method}' does not go with this recipe: {reason}. Leave it out."
        ) from None


def check_comparison(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], *, turns: bool | None, width: int | None = None
) -> None:
    """Refuse a comparison that would not compare what it names.

    Args:
        recipe: Describes `flexkd`.
        methods: As from `compared_methods`.
        seeds: As from `compared_seeds`.
        turns: As in `compared_methods`; names are not held against what they teach where it is not known.
        width: The teacher's; None where it is not known.

    Raises:
        RecipeError: An unknown method, one named twice, fewer than two seeds, a method of features where none are
            taught, a method whose name promises a choice that nothing reads, one that does not go with the recipe, or
            two methods that are one run.
    """
    for method in methods:
        if method not in METHODS:
            raise RecipeError(unknown_name("compare.methods", "method", method, METHODS))
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise RecipeError(f"compare.{name}: {list(values)} names one twice. Name each once.")
    if len(seeds) < 2:
        raise RecipeError(
            f"compare.seeds: {list(seeds)} cannot be compared in pairs. Give two or more, five to say anything."
        )
    _check_features(recipe, methods)
    if turns is False and "pca_directions" in methods:
        raise RecipeError(
            "compare.methods: 'pca_directions' needs a teacher that can be turned into the basis of its own directions "
            "(RMSNorms right before what reads them, as in Llama or Qwen), and this one cannot. Leave it out."
        )
    variants = {method: method_recipe(recipe, method) for method in methods}
    if turns is not None:
        for method, variant in variants.items():
            _check_name(method, variant, rotated=is_rotated(variant, turns=turns))
        _check_distinct(variants, turns=turns, width=width)


def _check_features(recipe: Recipe, methods: Sequence[str]) -> None:
    features = recipe.objective.features
    feature_methods = [method for method in methods if method not in WITHOUT_FEATURES]
    if feature_methods and (features is None or features.weight == 0):
        raise RecipeError(
            f"compare.methods: {', '.join(feature_methods)} would teach no features: objective.features is null or has "
            "weight 0. Give it a weight, or leave these methods out."
        )


def _check_name(method: str, variant: Recipe, *, rotated: bool) -> None:
    """A method that is named after a choice by scores makes one."""
    if method not in _BY_SCORES:
        return
    if not reads_scores(variant, rotated=rotated):
        features = variant.objective.features
        assert features is not None, "a method of features"
        if taught_features(variant, rotated=rotated) == PCA_DIRECTIONS:
            instead = "Name it 'pca_directions', which says what is taught, or set student.basis: coordinates."
        elif features.loss in METHODS:
            instead = f"Name it '{features.loss}', or set objective.features.loss: correlation."
        else:
            instead = "Leave it out, or set objective.features.loss: correlation with basis: units."
        raise RecipeError(
            f"compare.methods: '{method}' promises units chosen by scores, and nothing here reads them: "
            f"{unread_scores_reason(variant, rotated=rotated)}. {instead}"
        )
    if method == "flexkd" and variant.scores.attribution in _CONTROLS:
        control = variant.scores.attribution
        raise RecipeError(
            f"compare.methods: 'flexkd' chooses units by the gradient, and scores.attribution is '{control}', a "
            f"control. Name it 'flexkd_{control}', or set scores.attribution: gradient."
        )


def _check_distinct(variants: dict[str, Recipe], *, turns: bool, width: int | None) -> None:
    """A row that can only repeat another one, digit by digit, is no control and no rival."""
    names: dict[str, str] = {}
    for method, variant in variants.items():
        settings: dict[str, Any] = variant.model_dump(mode="json")
        if not reads_scores(variant, rotated=is_rotated(variant, turns=turns)):
            settings.pop("scores")
        elif takes_all_units(variant, width=width):
            settings["scores"].pop("attribution")
        twin = names.setdefault(repr(settings), method)
        if twin != method:
            why = ", for a student as wide as its teacher is taught every unit, whatever the scores"
            raise RecipeError(
                f"compare.methods: '{method}' is the same run as '{twin}' under this recipe"
                f"{why if takes_all_units(variant, width=width) else ''}. Leave one of them out."
            )
