"""Whether a recipe can be distilled at all of its sizes: their shapes, and finished students of an earlier call."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flexkd.errors import FlexKDError, RecipeError, ShapeError
from flexkd.facts.families.table import FAMILIES, family_can_rotate
from flexkd.preflight.comparison import stored_cell_errors, with_starts
from flexkd.preflight.inputs import RecipeInputs
from flexkd.recipe import Recipe
from flexkd.recipe.sizes import size_folder, size_place, sized_recipes, sizes_of
from flexkd.recipe.taught_features import is_rotated
from flexkd.run_files import SIZES_FOLDER

if TYPE_CHECKING:
    from flexkd.models.slicing.shape import StudentShape


def size_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The sizes go with the recipe, and are those of different students."""
    try:
        check_distinct({size: (shape.num_layers, shape.hidden_size) for size, shape in _shapes(inputs).items()})
    except RecipeError as error:
        yield error


def sized_variants(inputs: RecipeInputs) -> dict[str, Recipe]:
    """The recipe of each size by its place in messages; none where one of them does not go with the recipe."""
    try:
        return {} if inputs.recipe.sizes is None else size_places(sized_recipes(inputs.recipe))
    except RecipeError:
        return {}  # from `size_errors`


def size_places(variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of sizes, by their places in messages."""
    return {size_place(size): variant for size, variant in variants.items()}


def size_cell_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Finished students of an earlier call belong to the recipe, and under a time limit took equally many steps."""
    recipe = inputs.recipe
    if recipe.sizes is not None and (recipe.folder / SIZES_FOLDER).is_dir() and sized_variants(inputs):
        yield from stored_cell_errors(recipe, size_cells(recipe, with_starts(recipe, sized_recipes(recipe))))


def shape_notes(inputs: RecipeInputs) -> Iterator[str]:
    """The student of each size."""
    for size, shape in _shapes(inputs).items() if sized_variants(inputs) else ():
        yield f"{size_place(size)}: a student of {shape.num_layers} layers x {shape.hidden_size}."


def size_order(recipe: Recipe, variants: Mapping[str, Recipe]) -> list[tuple[str, int]]:
    """Size and seed of each student in the order in which they are trained: seed by seed, the largest first.

    What does not fit into memory shows at once then, and under a time limit every student has time for its steps.
    """
    return [(size, seed) for seed in sizes_of(recipe).seeds for size in [*variants][::-1]]


def size_cells(recipe: Recipe, variants: Mapping[str, Recipe]) -> dict[Path, tuple[Recipe, int]]:
    """Recipe and seed of each student by its folder."""
    return {size_folder(recipe, size, seed): (variants[size], seed) for size, seed in size_order(recipe, variants)}


def check_distinct(shapes: Mapping[str, tuple[int | None, int | None]]) -> None:
    """Refuse two sizes that come to the same student.

    Args:
        shapes: Layers and hidden size by size.

    Raises:
        RecipeError: Names both.
    """
    sizes: dict[tuple[int | None, int | None], str] = {}
    for size, shape in shapes.items():
        twin = sizes.setdefault(shape, size)
        if twin != size:
            raise RecipeError(
                f"sizes.values: {twin} and {size} come to the same student, {shape[0]} layers x {shape[1]}. Leave one "
                "of them out."
            )


def _shapes(inputs: RecipeInputs) -> dict[str, "StudentShape"]:
    """Shape of the student by size, where it is possible and known before the rows are read as tokens."""
    recipe, teacher = inputs.recipe, inputs.teacher
    if recipe.sizes is None or teacher is None or teacher.model_type not in FAMILIES or not teacher.has_config:
        return {}
    variants = sized_recipes(recipe)
    if recipe.student.vocabulary is not None and recipe.sizes.key == "size":
        return {}  # what a cut vocabulary frees is not known yet
    # The rules of a family's shapes are code: transformers is loaded only where there are sizes.
    from flexkd.models.loading.pretrained import load_config
    from flexkd.models.slicing.proportions import derive_shape
    from flexkd.models.slicing.shape import resolve_shape

    config = load_config(teacher.source, where="teacher.model")
    shapes = {}
    for size, variant in variants.items():
        section, rotated = variant.student, is_rotated(variant, can_rotate=family_can_rotate(teacher.model_type))
        try:
            if section.size is not None:
                shapes[size] = derive_shape(config, size=section.size, rotated=rotated)
            else:
                shapes[size] = resolve_shape(config, hidden_size=section.hidden_size, num_layers=section.num_layers)
        except ShapeError:
            continue  # `shape_errors` or `slice_errors` of that size say so
    return shapes
