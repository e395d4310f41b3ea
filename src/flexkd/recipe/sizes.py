"""One recipe at several sizes: the recipe of each, which differs from the others in one key of its student alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from flexkd.errors import RecipeError
from flexkd.facts.names import SIZE_NAMES
from flexkd.recipe.loading import override_recipe
from flexkd.recipe.rules import unequal_steps_text
from flexkd.recipe.schema import Recipe
from flexkd.recipe.training_sections import SizesSection
from flexkd.run_files import SIZES_FOLDER
from flexkd.sizes_record import number_text

_DEFAULT_VALUES: Final = (0.1, 0.2, 0.35, 0.5)

_FOLLOWING: Final = {
    "size": ("max_parameters", *SIZE_NAMES),
    "hidden_size": ("size", "max_parameters", "num_heads", "num_key_value_heads", "intermediate_size"),
    "num_layers": ("size", "max_parameters", "num_encoder_layers"),
}
"""Key that the sizes differ in -> keys of the recipe's student that follow from it, and are left out."""


def with_sizes(recipe: Recipe, values: Sequence[float] = (), seeds: Sequence[int] = ()) -> Recipe:
    """The recipe with a section `sizes`, whose values and seeds are those that are given here, if any.

    Raises:
        RecipeError: They break a rule of the section.
    """
    section: dict[str, Any] = {} if recipe.sizes is None else recipe.sizes.model_dump(mode="json")
    changes = {"values": list(values), "seeds": list(seeds)}
    section |= {name: numbers for name, numbers in changes.items() if numbers}
    return override_recipe(recipe, [f"sizes={json.dumps(section)}"])


def sizes_of(recipe: Recipe) -> SizesSection:
    """The section of a recipe that has one, with the values and seeds that it leaves to the defaults."""
    section = recipe.sizes
    assert section is not None, "from with_sizes, or of a recipe that has the section"
    values, seeds = section.values or _DEFAULT_VALUES, section.seeds or (recipe.training.seed,)
    return section.model_copy(update={"values": tuple(sorted(values)), "seeds": tuple(seeds)})


def sized_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each size, by its value as text, ascending.

    Raises:
        RecipeError: A size does not go with the recipe, or its training may stop early.
    """
    section = sizes_of(recipe)
    if fault := unequal_steps_text(recipe.training, "of several sizes"):
        raise RecipeError(fault)
    plain = recipe.model_copy(update={"sizes": None, "compare": None})
    emptied = [f"student.{name}=null" for name in _FOLLOWING[section.key] if getattr(recipe.student, name) is not None]
    recipes = {}
    for size in map(number_text, section.values):
        try:
            recipes[size] = override_recipe(plain, [*emptied, f"student.{section.key}={size}"])
        except RecipeError as error:
            reason = str(error).splitlines()[0].removeprefix("command line: ")
            raise RecipeError(f"{size_place(size)}: does not go with this recipe: {reason}") from None
    return recipes


def size_place(size: str) -> str:
    """A size, as text, as the place of a message."""
    return f"sizes.values.{size}"


def size_folder(recipe: Recipe, size: str, seed: int) -> Path:
    """Where the student of one size and seed is kept."""
    return recipe.folder / SIZES_FOLDER / f"{sizes_of(recipe).key}_{size}-{seed}"
