"""The methods of `flexkd compare`: what each changes in a recipe, and which of them make sense for it."""

from collections.abc import Sequence
from typing import Any, Final

from flexkd.errors import RecipeError, unknown_name
from flexkd.facts.methods import CHOICES, METHODS, WITHOUT_FEATURES
from flexkd.facts.seeds import fewest_seeds
from flexkd.recipe.loading import override_recipe
from flexkd.recipe.rules import unequal_steps_text
from flexkd.recipe.schema import Recipe
from flexkd.recipe.taught_features import (
    Choice,
    cut_choice,
    is_rotated,
    keys_of,
    keys_of_loss,
    takes_all_units,
    taught_choice,
    teaches_all_units,
)

DEFAULT_SEEDS: Final = (0, 1, 2)

_DEFAULT_METHODS: Final = ("fine_tuning", "logit_kd", "projector")
_ROTATED: Final = ("pca_directions", "scored_directions", "mixed_directions")
_BY_GRADIENT: Final = ("scores", "mixed")
"""Choices that gradients take part in: `flexkd` is either."""
_CUT_AND_TAUGHT: Final = {"flexkd": _BY_GRADIENT, **{f"flexkd_{choice}": (choice,) for choice in CHOICES}}
"""Method -> what its name says that both the cut and what is taught are chosen by."""
_TAUGHT: Final = {"scored_features": ("scores",), **{f"{choice}_features": (choice,) for choice in CHOICES}}
"""Method -> what its name says that what is taught is chosen by."""


def compared_methods(recipe: Recipe, methods: Sequence[str], *, can_rotate: bool | None) -> list[str]:
    """The requested methods; if none, those of the recipe; if none, the baselines and the recipe's own method.

    Args:
        methods: Requested methods, may be empty.
        can_rotate: Whether the teacher can be rotated into the basis of its directions; None: not known.
    """
    section = recipe.compare
    described = described_method(recipe, can_rotate=bool(can_rotate))
    by_default = dict.fromkeys((*_DEFAULT_METHODS, described))
    return list(methods or (section.methods if section else ()) or by_default)


def described_method(recipe: Recipe, *, can_rotate: bool) -> str:
    """The name of what the recipe itself does: `flexkd` where scores choose, else the method of its choice or loss."""
    rotated, features = is_rotated(recipe, can_rotate=can_rotate), recipe.objective.features
    cut, taught = cut_choice(recipe, rotated=rotated), taught_choice(recipe, rotated=rotated)
    if taught is None:
        is_named = features is not None and features.weight > 0 and features.loss in METHODS
        return features.loss if features is not None and is_named else "flexkd"
    if cut is None:
        return "flexkd" if taught.chosen_by in _BY_GRADIENT else f"flexkd_{taught.chosen_by}"
    return _name_of(cut if taught.chosen_by == cut.chosen_by else taught)


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
    return _changed(recipe, method, definitions[method] if method in definitions else _overrides(recipe, method))


def _overrides(recipe: Recipe, method: str) -> tuple[str, ...]:
    """What a built-in method changes: for a student that is not cut, the choice is that of what is taught."""
    if recipe.student.start != "slice" and method in _CUT_AND_TAUGHT:
        return tuple(text.replace("student.", "objective.features.") for text in METHODS[method])
    return METHODS[method]


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
            than two seeds; training may stop early; a contrast is repeated or names a method that is not compared; a
            method needs features where none are taught, or scores where nothing reads them; or two methods would be the
            same run.
    """
    if fault := unequal_steps_text(recipe.training, "of a comparison"):
        raise RecipeError(fault)
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(set(values)) < len(values):
            raise RecipeError(f"compare.{name}: {list(values)} names one twice. Name each once.")
    _check_names(recipe, methods)
    if len(seeds) < 2:
        fewest = fewest_seeds(len(compared_contrasts(recipe, methods)))
        raise RecipeError(
            f"compare.seeds: {list(seeds)} cannot be compared in pairs. Give two or more; {fewest} or more are needed "
            "for a difference that can be significant."
        )
    _check_contrasts(recipe, methods)
    _check_features(recipe, methods)
    for method in _ROTATED:
        if can_rotate is False and method in methods and method not in _definitions(recipe):
            raise RecipeError(
                f"compare.methods: '{method}' needs a teacher that can be turned into the basis of its own directions "
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
    built_in_overrides = _overrides(recipe, method)
    if method_recipe(recipe, method) == _changed(recipe, method, built_in_overrides):
        return
    built_in, defined = (", ".join(each) or "nothing" for each in (built_in_overrides, _definitions(recipe)[method]))
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
    """Refuse a method whose name says that something chooses what is taught, or the cut, where it does not."""
    promised = _CUT_AND_TAUGHT.get(method, _TAUGHT.get(method))
    if promised is None:
        return
    features = variant.objective.features
    assert features is not None, "a method of features"
    taught = taught_choice(variant, rotated=rotated)
    if taught is None:
        advice = (
            f"Name it '{features.loss}', or set objective.features.loss: correlation."
            if features.loss in METHODS
            else "Leave it out, or set objective.features.loss: correlation."
        )
        raise RecipeError(
            f"compare.methods: '{method}' promises units or directions chosen by {_words(promised[0])}, and whole "
            f"states are taught ({features.loss}). {advice}"
        )
    cut = cut_choice(variant, rotated=rotated) if method in _CUT_AND_TAUGHT else None
    for choice, key in ((cut, "student.chosen_by"), (taught, "objective.features.chosen_by")):
        if choice is not None and choice.chosen_by not in promised:
            is_null = key != "student.chosen_by" and variant.student.start == "slice"
            remedy = "null" if is_null else promised[0]
            raise RecipeError(
                f"compare.methods: '{method}' promises a choice by {_words(promised[0])}, and {key} makes it "
                f"'{choice.chosen_by}'. Name it '{_name_of(choice)}', or set {key}: {remedy}."
            )


def _words(chosen_by: str) -> str:
    return {"scores": "scores", "lowest": "the lowest scores", "random": "chance"}.get(chosen_by, chosen_by)


def _name_of(choice: Choice) -> str:
    """The method whose name says what a choice is."""
    if choice.kind == "directions" and choice.is_cut and choice.chosen_by == "variance":
        return "pca_directions"
    if choice.is_cut:
        return "flexkd" if choice.chosen_by in _BY_GRADIENT else f"flexkd_{choice.chosen_by}"
    return next(name for name, promised in _TAUGHT.items() if choice.chosen_by in promised)


def _check_distinct(variants: dict[str, Recipe], *, can_rotate: bool, width: int | None) -> None:
    """Refuse a method that would repeat the run of another one exactly."""
    names: dict[str, str] = {}
    for method, variant in variants.items():
        rotated = is_rotated(variant, can_rotate=can_rotate)
        twin = names.setdefault(repr(_deciding(variant, rotated=rotated, width=width)), method)
        if twin != method:
            why = ", for a student as wide as its teacher is cut by and taught everything, whatever is chosen"
            raise RecipeError(
                f"compare.methods: '{method}' is the same run as '{twin}' under this recipe"
                f"{why if teaches_all_units(variant, width=width) else ''}. Leave one of them out."
            )


def _deciding(variant: Recipe, *, rotated: bool, width: int | None) -> dict[str, Any]:
    """The settings of a method that decide its run, with what it cuts by and teaches in place of the keys."""
    settings: dict[str, Any] = variant.model_dump(mode="json")
    cut, taught = cut_choice(variant, rotated=rotated), taught_choice(variant, rotated=rotated)
    deciding_cut = None if takes_all_units(variant, width=width) and (cut and cut.chosen_by) != "mixed" else cut
    # Where everything is taught, it is the same whatever ranks it.
    is_ranked = taught is None or not (taught.is_cut or taught.kind == "units")
    deciding_taught = taught if is_ranked or not teaches_all_units(variant, width=width) else None
    read = keys_of_loss(variant).union(keys_of(deciding_cut), keys_of(deciding_taught))
    settings["scores"] = {key: value for key, value in settings["scores"].items() if key in read}
    choices: dict[str, object] = {"cut": deciding_cut, "taught": deciding_taught, "whole": taught is None}
    for name in ("basis", "chosen_by", "function_share"):
        settings["student"].pop(name)
    if cut is not None and cut.chosen_by == "mixed":
        choices["share"] = variant.student.function_share
    features = settings["objective"]["features"]
    if features is not None:
        for name in ("basis", "chosen_by", *(("mapping", "units", "coverage") if taught is None else ())):
            features.pop(name)
    return {**settings, "rotated": rotated, "choices": choices}
