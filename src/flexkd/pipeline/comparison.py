"""What the students of a comparison or of a search share: methods and seeds that can be compared, and one teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexkd.facts.families.table import family_can_rotate
from flexkd.models.loading.pretrained import load_config
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.start import rotation_of
from flexkd.preflight.comparison import method_places, with_starts
from flexkd.preflight.run_folder import continued
from flexkd.processes import in_turn, join
from flexkd.recipe import Recipe
from flexkd.recipe.methods import check_comparison, compared_methods, compared_seeds, method_recipe
from flexkd.recipe.taught_features import may_rotate


@dataclass(frozen=True)
class Comparison:
    """Methods x seeds under one job.

    Attributes:
        variants: Recipe of each method, in their order.
    """

    job: Job
    variants: dict[str, Recipe]
    seeds: list[int]


def compared_variants(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, Recipe], list[int]]:
    """The recipe of each method and the seeds, checked as far as they can be before anything is loaded.

    Args:
        methods: Names of methods; empty: the recipe's, or the default ones.
        seeds: Seeds of the students; empty: the recipe's, or `DEFAULT_SEEDS`.

    Raises:
        RecipeError: As `check_comparison`.
    """
    recipe, _ = continued(recipe)
    can_rotate, width = _teacher_facts(recipe)
    methods, seeds = compared_methods(recipe, methods, can_rotate=can_rotate), compared_seeds(recipe, seeds)
    check_comparison(recipe, methods, seeds, can_rotate=can_rotate, width=width)
    return with_starts(recipe, {method: method_recipe(recipe, method) for method in methods}), list(seeds)


def prepare_comparison(
    recipe: Recipe, variants: dict[str, Recipe], seeds: Sequence[int], *, students: int
) -> Comparison:
    """Check everything else that can be checked, then load rows and teacher.

    Args:
        variants: From `compared_variants`, as the seeds.
        students: Number of students of each method.

    Raises:
        RecipeError: As `check_comparison`.
        FlexKDError: As `pipeline.job.prepare`.
    """
    places = method_places(variants)
    job = prepare(recipe, students=len(variants) * students, resumes="comparison", variants=places)
    # Whether a teacher can be rotated is first read from its family and now from its forward: the methods have to hold
    # for both, or one of them would teach something else than its name says.
    can_rotate, width = _teacher_facts(recipe)
    rotations = [rotation_of(job, variant) for variant in variants.values() if may_rotate(variant)]
    check_comparison(job.recipe, list(variants), seeds, can_rotate=can_rotate and None not in rotations, width=width)
    return Comparison(job, variants, list(seeds))


def _teacher_facts(recipe: Recipe) -> tuple[bool, int | None]:
    """Whether the teacher's family can be rotated, and its hidden size where its config says it."""
    join()
    with in_turn():  # the first process may have to convert it
        config = load_config(recipe.teacher.model, where="teacher.model")
    return family_can_rotate(config.model_type), getattr(config, "hidden_size", None)
