"""The methods of `flexkd compare`: what each changes in a recipe, and which of them make sense for it."""

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
    "entropy_positions": ("objective.features=null", "objective.logits.entropy_share=0.2"),
    "projector": ("objective.features.loss=projector", "objective.features.basis=units"),
    "projector_exact": (
        "objective.features.loss=projector",
        "objective.features.basis=units",
        "objective.features.projector={learning_rate: 1.0e-3, standardize: true, start: cut}",
    ),
    "projector_heads": (
        "objective.features.loss=projector",
        "objective.features.basis=units",
        "objective.features.projector={learning_rate: 1.0e-3, standardize: true, start: heads}",
    ),
    "cka": ("objective.features.loss=cka", "objective.features.basis=units"),
    "procrustes": ("objective.features.loss=procrustes", "objective.features.basis=units"),
    "gram": ("objective.features.loss=gram", "objective.features.basis=units"),
    "functional_cka": ("objective.features.loss=functional_cka", "objective.features.basis=units"),
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
"""Built-in method -> overrides of the recipe, which itself describes `flexkd`. The last three choose units by a control
instead of the scores, for the cut as well as for the loss; `projector` is a learned map as the recipe sets it up, by
default random and under the student's learning rate, `projector_exact` one that begins with the way back from the cut,
`projector_heads` one that begins with the map between the heads, both on targets of unit variance and with a learning
rate of their own; `pca_directions` cuts and teaches the leading PCA directions of the teacher's states, which do not
depend on scores."""

WITHOUT_FEATURES: Final = ("fine_tuning", "logit_kd", "entropy_positions")
DEFAULT_SEEDS: Final = (0, 1, 2)

_DEFAULT_METHODS: Final = ("fine_tuning", "logit_kd", "projector")
_BY_SCORES: Final = ("flexkd", "flexkd_random", "flexkd_variance", "flexkd_activation")
_CONTROLS: Final = ("random", "variance", "activation")


def compared_methods(recipe: Recipe, methods: Sequence[str], *, can_rotate: bool | None) -> list[str]:
    """The requested methods; if none, those of the recipe; if none, the baselines and the recipe's own method.

    The recipe's own method is `pca_directions` where the student is cut along PCA directions, else `flexkd`.

    Args:
        methods: Requested methods, may be empty.
        can_rotate: Whether the teacher can be rotated into the basis of its PCA directions; None: not known.
    """
    section = recipe.compare
    described = "pca_directions" if is_rotated(recipe, can_rotate=bool(can_rotate)) else "flexkd"
    return list(methods or (section.methods if section else ()) or (*_DEFAULT_METHODS, described))


def compared_seeds(recipe: Recipe, seeds: Sequence[int]) -> list[int]:
    """The requested seeds; if none, those of the recipe; if none, the default seeds."""
    section = recipe.compare
    return list(seeds or (section.seeds if section else ()) or DEFAULT_SEEDS)


def reference_method(methods: Sequence[str]) -> str:
    """The method that the others are compared with by default: plain fine-tuning, or else the first one."""
    return "fine_tuning" if "fine_tuning" in methods else methods[0]


def compared_contrasts(recipe: Recipe, methods: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of a method and its reference that the recipe names; if none, each method and the default reference."""
    section = recipe.compare
    if section and section.contrasts:
        return list(section.contrasts)
    reference = reference_method(methods)
    return [(method, reference) for method in methods if method != reference]


def method_recipe(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the changes of one method, and without its `compare` section.

    Raises:
        RecipeError: The recipe is not valid with these changes.
    """
    definitions = _definitions(recipe)
    return _changed(recipe, method, definitions[method] if method in definitions else METHODS[method])


def definition_notes(recipe: Recipe, methods: Sequence[str]) -> list[str]:
    """What the methods that a recipe defines change in it, a sentence for each of those that are compared."""
    definitions = _definitions(recipe)
    return [
        f"{method}: a method of this recipe, with {', '.join(definitions[method]) or 'nothing changed'}."
        for method in methods
        if method in definitions
    ]


def _definitions(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The methods that a recipe itself defines: name -> overrides."""
    return {} if recipe.compare is None else recipe.compare.definitions


def _changed(recipe: Recipe, method: str, overrides: Sequence[str]) -> Recipe:
    # Methods and values of a search are no part of what one method is; they need not fit each other's recipe.
    plain = recipe.model_copy(update={"compare": None})
    try:
        return override_recipe(plain, overrides)
    except RecipeError as error:
        reason = str(error).splitlines()[0].removeprefix("command line: ").rpartition(". ")[0]
        raise RecipeError(
            f"compare.methods: '{method}' does not go with this recipe: {reason}. Leave it out."
        ) from None


def check_comparison(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], *, can_rotate: bool | None, width: int | None = None
) -> None:
    """Refuse a comparison that would not compare what its methods promise.

    Args:
        methods: From `compared_methods`.
        seeds: From `compared_seeds`.
        can_rotate: As in `compared_methods`; where it is not known, names are not compared with what they teach.
        width: Hidden size of the teacher; None where it is not known.

    Raises:
        RecipeError: A method is unknown, repeated, not valid for the recipe or named after another one; there are fewer
            than two seeds; a contrast is repeated or names a method that is not compared; a method needs features where
            none are taught, or scores where nothing reads them; or two methods would be the same run.
    """
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise RecipeError(f"compare.{name}: {list(values)} names one twice. Name each once.")
    _check_names(recipe, methods)
    if len(seeds) < 2:
        raise RecipeError(
            f"compare.seeds: {list(seeds)} cannot be compared in pairs. Give two or more, five to say anything."
        )
    _check_contrasts(recipe, methods)
    _check_features(recipe, methods)
    if can_rotate is False and "pca_directions" in methods:
        raise RecipeError(
            "compare.methods: 'pca_directions' needs a teacher that can be turned into the basis of its own directions "
            "(RMSNorms right before what reads them, as in Llama or Qwen), and this one cannot. Leave it out."
        )
    variants = {method: method_recipe(recipe, method) for method in methods}
    if can_rotate is not None:
        for method, variant in variants.items():
            _check_name(method, variant, rotated=is_rotated(variant, can_rotate=can_rotate))
        _check_distinct(variants, can_rotate=can_rotate, width=width)


def _check_names(recipe: Recipe, methods: Sequence[str]) -> None:
    """Refuse methods that are unknown, or that could be taken for another one."""
    definitions = _definitions(recipe)
    names: dict[str, str] = {}
    for method in methods:
        if method not in definitions and method not in METHODS:
            # A recipe that says what each method changes says null, or nothing, for the built-in ones.
            has_mapping = recipe.compare is not None and isinstance(recipe.compare.methods, dict)
            kind = "built-in method" if has_mapping else "method"
            raise RecipeError(unknown_name("compare.methods", kind, method, [*definitions, *METHODS]))
        twin = names.setdefault(method.lower(), method)
        if twin != method:
            raise RecipeError(
                f"compare.methods: '{twin}' and '{method}' differ in capital letters alone, and would share a folder "
                "on some systems. Rename one of them."
            )
        if method in definitions and method in METHODS:
            _check_definition(recipe, method)


def _check_definition(recipe: Recipe, method: str) -> None:
    """Refuse a method that the recipe defines under the name of a built-in one, and that is not the same."""
    if method_recipe(recipe, method) == _changed(recipe, method, METHODS[method]):
        return
    built_in, defined = (", ".join(each) or "nothing" for each in (METHODS[method], _definitions(recipe)[method]))
    raise RecipeError(
        f"compare.methods: '{method}' is a built-in method, which changes {built_in}, and not {defined}. Give these "
        "changes another name."
    )


def _check_contrasts(recipe: Recipe, methods: Sequence[str]) -> None:
    contrasts = recipe.compare.contrasts if recipe.compare else ()
    for contrast in contrasts:
        for name in contrast:
            if name not in methods:
                raise RecipeError(unknown_name("compare.contrasts", "method of this comparison", name, methods))
        if contrast[0] == contrast[1]:
            raise RecipeError(f"compare.contrasts: {list(contrast)} is one method. Name two, as [flexkd, logit_kd].")
    if len({frozenset(contrast) for contrast in contrasts}) < len(contrasts):
        raise RecipeError(
            f"compare.contrasts: {[list(contrast) for contrast in contrasts]} names two methods twice. Name each pair "
            "once: the correction is for the number of pairs."
        )


def _check_features(recipe: Recipe, methods: Sequence[str]) -> None:
    features = recipe.objective.features
    feature_methods = [method for method in methods if method in METHODS and method not in WITHOUT_FEATURES]
    if feature_methods and (features is None or features.weight == 0):
        raise RecipeError(
            f"compare.methods: {', '.join(feature_methods)} would teach no features: objective.features is null or has "
            "weight 0. Give it a weight, or leave these methods out."
        )


def _check_name(method: str, variant: Recipe, *, rotated: bool) -> None:
    """Refuse a method that is named after a choice by scores but makes none."""
    if method not in _BY_SCORES:
        return
    if not reads_scores(variant, rotated=rotated):
        features = variant.objective.features
        assert features is not None, "a method of features"
        if taught_features(variant, rotated=rotated) == PCA_DIRECTIONS:
            advice = "Name it 'pca_directions', which says what is taught, or set student.basis: coordinates."
        elif features.loss in METHODS:
            advice = f"Name it '{features.loss}', or set objective.features.loss: correlation."
        else:
            advice = "Leave it out, or set objective.features.loss: correlation with basis: units."
        raise RecipeError(
            f"compare.methods: '{method}' promises units chosen by scores, and nothing here reads them: "
            f"{unread_scores_reason(variant, rotated=rotated)}. {advice}"
        )
    if method == "flexkd" and variant.scores.attribution in _CONTROLS:
        control = variant.scores.attribution
        raise RecipeError(
            f"compare.methods: 'flexkd' chooses units by the gradient, and scores.attribution is '{control}', a "
            f"control. Name it 'flexkd_{control}', or set scores.attribution: gradient."
        )


def _check_distinct(variants: dict[str, Recipe], *, can_rotate: bool, width: int | None) -> None:
    """Refuse a method that would repeat the run of another one exactly."""
    names: dict[str, str] = {}
    for method, variant in variants.items():
        settings: dict[str, Any] = variant.model_dump(mode="json")
        if not reads_scores(variant, rotated=is_rotated(variant, can_rotate=can_rotate)):
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
