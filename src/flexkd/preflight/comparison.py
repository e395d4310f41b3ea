"""The comparison that a recipe describes: methods and seeds that mean something under it."""

from collections.abc import Iterator

from flexkd.errors import FlexKDError, RecipeError
from flexkd.facts.families.table import family_turns
from flexkd.preflight.evidence import Evidence
from flexkd.recipe.methods import check_comparison, compared_methods, compared_seeds


def comparison_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """What `flexkd compare` refuses, where the recipe has a section for it."""
    recipe, teacher = evidence.recipe, evidence.models.get("teacher.model")
    if recipe.compare is None or teacher is None:
        return
    turns = family_turns(teacher.model_type) if teacher.model_type else None
    try:
        methods, seeds = compared_methods(recipe, (), turns=turns), compared_seeds(recipe, ())
        check_comparison(recipe, methods, seeds, turns=turns, width=teacher.size("hidden_size"))
    except RecipeError as error:
        yield error
