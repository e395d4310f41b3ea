"""What a seed draws for the start of a student: nothing, where the start reads all training rows anyway."""

from collections.abc import Iterator, Mapping

from flexkd.data.encoding.drawn_rows import num_drawn
from flexkd.facts.families.table import family_can_rotate
from flexkd.preflight.comparison import compared_recipes, starts_of
from flexkd.preflight.inputs import RecipeInputs
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import draws_at_random
from flexkd.recipe.taught_features import drawn_rows, is_rotated


def start_seed_notes(inputs: RecipeInputs) -> Iterator[str]:
    """A `student.start_seed` that draws all rows."""
    recipe, num_rows = inputs.recipe, _num_rows(inputs)
    if recipe.student.start_seed is None or num_rows is None:
        return
    keys = _read_whole([recipe], num_rows, can_rotate=_can_rotate(inputs))
    if keys:
        yield (
            f"student.start_seed: {recipe.student.start_seed} draws nothing for {_listed(keys)}: the start reads all "
            f"{num_rows:,} training rows. {_advice(keys, num_rows)}"
        )


def compared_start_notes(inputs: RecipeInputs) -> Iterator[str]:
    """What the seeds of the recipe's `compare` section share."""
    num_rows, variants = _num_rows(inputs), compared_recipes(inputs)
    if variants and num_rows is not None:
        yield from alike_starts(inputs.recipe, variants, num_rows, can_rotate=_can_rotate(inputs))


def alike_starts(recipe: Recipe, variants: Mapping[str, Recipe], num_rows: int, *, can_rotate: bool) -> Iterator[str]:
    """What all seeds of a comparison share though each is to draw its own: what reads all training rows.

    Args:
        recipe: That of the comparison.
        variants: The recipe of each method.
        num_rows: Training rows.
        can_rotate: Whether the teacher can be turned into the basis of its own directions.
    """
    if starts_of(recipe) != "by_seed":
        return
    recipes = list(variants.values())
    keys = _read_whole(recipes, num_rows, can_rotate=can_rotate)
    if not keys:
        return
    all_keys = {key for variant in recipes for key in _rows(variant, can_rotate=can_rotate)}
    is_all = keys.keys() == all_keys and not any(map(_starts_at_random, recipes))
    shared = "the starts of all seeds are the same, and their spread is that of the order of the rows and of dropout"
    yield (
        f"compare.starts: by_seed draws nothing for {_listed(keys)}: every seed reads all {num_rows:,} training rows"
        f"{f', so that {shared}' if is_all else ''}. {_advice(keys, num_rows)}"
    )


def _starts_at_random(recipe: Recipe) -> bool:
    return recipe.student.start == "config" or draws_at_random(recipe)


def _read_whole(recipes: list[Recipe], num_rows: int, *, can_rotate: bool) -> dict[str, int | None]:
    """The keys that let some start read all training rows, which are therefore the same for every seed."""
    return {
        key: rows
        for recipe in recipes
        if num_drawn(num_rows, recipe.data.train_share) == num_rows
        for key, rows in _rows(recipe, can_rotate=can_rotate).items()
        if rows is None or rows >= num_rows
    }


def _rows(recipe: Recipe, *, can_rotate: bool) -> dict[str, int | None]:
    return drawn_rows(recipe, rotated=is_rotated(recipe, can_rotate=can_rotate))


def _listed(keys: Mapping[str, int | None]) -> str:
    return " and ".join(f"{key} = {'null' if rows is None else rows}" for key, rows in keys.items())


def _advice(keys: Mapping[str, int | None], num_rows: int) -> str:
    return f"To draw them, give fewer: {' '.join(f'{key}={max(num_rows // 2, 1)}' for key in keys)}."


def _num_rows(inputs: RecipeInputs) -> int | None:
    return None if inputs.data is None else inputs.data.num_rows["train"]


def _can_rotate(inputs: RecipeInputs) -> bool:
    return inputs.teacher is not None and family_can_rotate(inputs.teacher.model_type)
