"""Whether a comparison can run: its methods and seeds, and finished students of an earlier one in the same folder."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexkd.errors import ArtifactError, FlexKDError, RecipeError
from flexkd.facts.families.table import family_can_rotate
from flexkd.preflight.inputs import RecipeInputs
from flexkd.preflight.run_folder import is_cut_along_earlier_directions, student_settings
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.fingerprints import cut_settings, user_code
from flexkd.recipe.methods import check_comparison, compared_methods, compared_seeds, method_recipe
from flexkd.run_files import CELL_FILE, CELLS_FOLDER, SELECTION_FILE, TUNING_FILE
from flexkd.strict_json import damage_named, read_object


def comparison_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The methods and seeds of the recipe's `compare` section can be compared."""
    recipe, teacher = inputs.recipe, inputs.models.get("teacher.model")
    if recipe.compare is None or teacher is None:
        return
    can_rotate = family_can_rotate(teacher.model_type) if teacher.model_type else None
    try:
        methods, seeds = compared_methods(recipe, (), can_rotate=can_rotate), compared_seeds(recipe, ())
        check_comparison(recipe, methods, seeds, can_rotate=can_rotate, width=teacher.size("hidden_size"))
    except RecipeError as error:
        yield error


def compared_recipes(inputs: RecipeInputs) -> dict[str, Recipe]:
    """The recipe of each method of the `compare` section; none where these methods cannot be compared."""
    recipe, teacher = inputs.recipe, inputs.models.get("teacher.model")
    if recipe.compare is None or teacher is None or any(comparison_errors(inputs)):
        return {}
    can_rotate = family_can_rotate(teacher.model_type) if teacher.model_type else None
    return {method: method_recipe(recipe, method) for method in compared_methods(recipe, (), can_rotate=can_rotate)}


def method_places(variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of methods, by their places in messages."""
    return {f"compare.methods.{method}": variant for method, variant in variants.items()}


def cell_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Finished students of an earlier comparison belong to this one; after a search their values are not known here."""
    recipe = inputs.recipe
    if recipe.compare is None or not (recipe.folder / CELLS_FOLDER).is_dir():
        return
    if recipe.compare.search or (recipe.folder / TUNING_FILE).is_file():
        return
    variants, seeds = with_starts(recipe, compared_recipes(inputs)), compared_seeds(recipe, ())
    cells = {
        cell_folder(recipe.folder, method, seed): (variant, seed)
        for method, variant in variants.items()
        for seed in seeds
    }
    yield from stored_cell_errors(recipe, cells)


def stored_cell_errors(recipe: Recipe, cells: Mapping[Path, tuple[Recipe, int]]) -> Iterator[FlexKDError]:
    """Finished students belong to these recipes; where a time limit decides on the steps, they took equally many.

    Args:
        recipe: That of the job.
        cells: Recipe and seed of each student by its folder.
    """
    try:
        for folder, (variant, seed) in cells.items():
            if (folder / CELL_FILE).is_file():
                stored = read_object(folder / CELL_FILE, "made_of")["made_of"]
                now = cell_recipe(variant, seed, folder)[1]
                with damage_named(folder / CELL_FILE):
                    check_cell(folder / CELL_FILE, {"recipe": stored["recipe"]}, {"recipe": now})
        if recipe.training.max_minutes is not None:
            equal_steps(finished_steps(cells))
    except ArtifactError as error:
        yield error


def with_starts(recipe: Recipe, variants: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes of methods with what `compare.starts` says about the starts of their students, for `cell_recipe`.

    Args:
        recipe: That of the comparison; its folder may hold students of an earlier version, which shared one start.
    """
    change = f"compare={{starts: {starts_of(recipe)}}}"
    return {method: override_recipe(variant, [change]) for method, variant in variants.items()}


def starts_of(recipe: Recipe) -> str:
    """What the seeds of a comparison are, by_seed or shared, as in `compare.starts`."""
    if recipe.compare is not None and recipe.compare.starts is not None:
        return recipe.compare.starts
    is_shared = any(student.get("start_seed") is None for student in student_settings(recipe.folder))
    return "shared" if is_shared else "by_seed"


def cell_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a comparison keeps the student of one method and seed."""
    return folder / CELLS_FOLDER / f"{method}-{seed}"


def finished_steps(folders: Iterable[Path]) -> dict[str, int | None]:
    """Optimizer steps of each finished student in these folders; None where an earlier version made it.

    Earlier versions did not write steps down.
    """
    finished = [cell for cell in folders if (cell / CELL_FILE).is_file()]
    steps: dict[str, int | None] = {}
    for cell in finished:
        with damage_named(cell / CELL_FILE):
            number = read_object(cell / CELL_FILE).get("steps")
            steps[cell.name] = None if number is None else int(number)
    return steps


def equal_steps(steps: Mapping[str, int | None]) -> int | None:
    """The number of steps that all finished students of a comparison took; None where none of them says it.

    Args:
        steps: From `finished_steps`.

    Raises:
        ArtifactError: Two of them took different numbers; names both.
    """
    numbers: dict[int, str] = {}
    for name, number in steps.items():
        if number is not None:
            numbers.setdefault(number, name)
    if len(numbers) > 1:
        (first, name), (second, other) = list(numbers.items())[:2]
        raise ArtifactError(
            f"training.max_minutes: the finished students {name} and {other} took {first} and {second} steps, which "
            "cannot be compared. Delete one of the two folders, or choose another output folder."
        )
    return next(iter(numbers), None)


def cell_recipe(recipe: Recipe, seed: int, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of one student of a comparison, and those of its settings that decide the student's metrics."""
    draws = recipe.compare is not None and recipe.compare.starts == "by_seed"
    start = [f"student.start_seed={seed}"] if draws else []
    cell = override_recipe(recipe, [f"training.seed={seed}", *start, f"output={json.dumps(str(folder))}"])
    code = user_code(cell)
    return cell, {**_deciding_settings(cell), **({"code": code} if code else {})}


def check_cell(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a finished student that belongs to another comparison.

    The recipe in a cell of an earlier version lacks the keys that came later: they are filled with their defaults.

    Args:
        path: The cell's file.
        stored: What the cell was made of: `recipe`, and fingerprints by name.
        now: What it would be made of now.

    Raises:
        ArtifactError: It was made of something else; names what differs.
    """
    selection = path.parent / SELECTION_FILE
    by_variance = selection.is_file() and is_cut_along_earlier_directions(selection)
    before, after = (
        {**made_of, "recipe": _with_defaults(made_of["recipe"], by_variance=by_variance)} for made_of in (stored, now)
    )
    differing = _differing_keys(before, json.loads(json.dumps(after)))
    if differing:
        raise ArtifactError(
            f"{path}: was made by another recipe or teacher ({', '.join(differing[:5])}). Choose another output folder."
        )


def _with_defaults(settings: Mapping[str, Any], *, by_variance: bool) -> Any:
    """Settings of a cell, with defaults for keys that they lack; unchanged where this version refuses them.

    Args:
        settings: As the cell or the comparison has them.
        by_variance: An earlier version made the cell, and cut its student along the directions with most variance.
    """
    values: dict[str, Any] = {"name": "cell", "output": "cell", **json.loads(json.dumps(settings))}
    code = {"code": values.pop("code")} if "code" in values else {}
    student = {"chosen_by": "variance" if by_variance else "scores", **values["student"]}
    if student["chosen_by"] != "mixed":
        student.pop("function_share", None)
    values["student"] = student
    try:
        recipe = Recipe.model_validate(values)
    except ValueError:
        return settings
    return {**_deciding_settings(recipe), **code}


def _differing_keys(before: Any, after: Any, at: str = "") -> list[str]:
    """Dotted names of the entries that differ."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return [] if before == after else [at]
    keys = sorted(before.keys() | after.keys())
    return [
        name for key in keys for name in _differing_keys(before.get(key), after.get(key), f"{at}.{key}".lstrip("."))
    ]


def _deciding_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that decide the metrics of a student."""
    other_commands = {"compare", "sizes", "push_to_hub", "rivals"}
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude={"name", "output", *other_commands})
    # These two decide whether a run starts, not what comes out of it; the rows that are read have a fingerprint.
    del settings["teacher"]["allow_weak"]
    del settings["data"]["bad_rows"]
    del settings["student"]["function_share"]
    settings["student"] |= cut_settings(recipe)
    return settings
