"""A YAML file and the overrides of the command line to a checked Recipe, or to all problems at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexkd.errors import RecipeError
from flexkd.files import local_path
from flexkd.recipe.document import Document, read_document, read_recipe_text, short_repr, write_yaml
from flexkd.recipe.messages import field_path, key_fields, problems_of, unknown_key_text
from flexkd.recipe.overrides import WHERE, Override, parse_overrides, with_value, without_key
from flexkd.recipe.problem import BrokenRulesError, RecipeProblem, dotted
from flexkd.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        overrides: KEY=VALUE, like training.learning_rate=1e-4; the value is YAML, and null leaves a section out.

    Raises:
        RecipeError: The recipe has problems; lists all, one a line: `FILE:LINE: key.path: what is wrong. What to do.`
    """
    return _load(read_recipe_text(local_path(path, where="recipe")), str(path), overrides)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some values changed, checked again as a whole.

    Raises:
        RecipeError: The recipe has problems; all are listed, one a line.
    """
    return _load(recipe.to_yaml(), recipe.name, overrides)


def _load(text: str, where: str, overrides: Sequence[str]) -> Recipe:
    document = read_document(text, where)
    if not isinstance(document.value, dict):
        raise RecipeError(_no_recipe_text(document, where))
    parsed, messages = parse_overrides(overrides)
    lines = [(1, index, message) for index, message in enumerate(messages)]
    for path, line, first in document.duplicates:
        message = f"{where}:{line}: {dotted(path)}: appears twice, first in line {first}. Keep one."
        lines.append((0, line, message))
    data = document.value
    for override in parsed:
        try:
            data = with_value(data, override.path, override.value)
        except RecipeError as error:
            lines.append((1, 0, f"{WHERE}: {dotted(override.path)}: the recipe {error}"))
    recipe, problems = check_values(data)
    lines.extend(_line(problem, document, where, parsed) for problem in problems)
    if lines or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(message for *_, message in sorted(lines, key=lambda line: line[:2]))))
    return recipe


def check_values(data: Any) -> tuple[Recipe | None, list[RecipeProblem]]:
    """The recipe and no problems, or None and every problem of its values.

    Pydantic runs the rules between keys only when each key alone is valid. To report everything together, wrong keys
    are removed and missing ones filled in until the rules run; problems that follow from a wrong key are left out.
    """
    problems: list[RecipeProblem] = []
    wrong: set[tuple[str, ...]] = set()
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            if not problems:
                problems = list(_search_problems(recipe, data))
            return (None if problems else recipe), problems
        broken = details[0].get("ctx", {}).get("error")
        if isinstance(broken, BrokenRulesError):
            problems.extend(problem for problem in broken.problems if not _follows_from(problem, wrong))
            return None, problems
        key_problems = [problem for detail in details for problem in problems_of(detail)]
        problems.extend(problem for problem in key_problems if not any(_is_below(problem.path, path) for path in wrong))
        previous_data = data
        for detail in details:
            place = _place(detail["loc"])
            wrong.add(place)
            is_missing = detail["type"] == "missing"
            data = with_value(data, place, _stand_in(place)) if is_missing else without_key(data, place)
        if data == previous_data:  # nothing more can be removed or filled in
            return None, problems


def _place(loc: Sequence[str | int]) -> tuple[str, ...]:
    """The key to remove: an unknown key itself, or the whole value where one item of a list or mapping is wrong."""
    place = tuple(str(step) for step in loc)
    field = field_path(place)
    return field if field and not _is_section(field) else place


def _stand_in(place: tuple[str, ...]) -> Any:
    """A value of the right kind for a missing key; all required keys are text or sections."""
    return {} if _is_section(place) else "to be filled in"


def _is_section(path: tuple[str, ...]) -> bool:
    return any(len(name) > len(path) and name[: len(path)] == path for name in key_fields())


def _follows_from(problem: RecipeProblem, wrong: set[tuple[str, ...]]) -> bool:
    """Whether a problem follows from a key that is wrong itself."""
    return any(_is_below(key, path) or _is_below(path, key) for key in problem.reads for path in wrong)


def _is_below(path: Sequence[str | int], above: Sequence[str | int]) -> bool:
    return tuple(map(str, path[: len(above)])) == tuple(map(str, above))


def _search_problems(recipe: Recipe, data: Any) -> Iterator[RecipeProblem]:
    """Problems of the values of compare.search, each of which must make a valid recipe before the first run."""
    if recipe.compare is None:
        return
    for key, values in recipe.compare.search.items():
        path = tuple(key.split("."))
        place = ("compare", "search", key)
        if not field_path(path) or (field_path(path) != path and _is_section(field_path(path))):
            yield RecipeProblem(place, unknown_key_text(path))
            continue
        if not values:
            yield RecipeProblem(place, "[] gives nothing to try. Give values, as [1e-4, 5e-4].")
        for value in values:
            _, problems = check_values(without_key(with_value(data, path, value), ("compare",)))
            for problem in problems:
                yield RecipeProblem(place, f"{short_repr(value)} leads to {dotted(problem.path)}: {problem.text}")


def _line(
    problem: RecipeProblem, document: Document, where: str, overrides: Sequence[Override]
) -> tuple[int, int, str]:
    """Sort key and message of one problem; a problem caused by an override is reported on the command line."""
    text = f"{dotted(problem.path)}: {problem.text}"
    for key in (problem.path, *problem.reads):
        for index, override in enumerate(overrides):
            if override.covers(key) or (key != problem.path and _is_below(override.path, key)):
                return 1, index, f"{WHERE}: {text}"
    # A default has no line of its own; the line is then that of a key which the default does not fit.
    place = next((key for key in (problem.path, *problem.reads) if document.holds(key)), problem.path)
    line = document.line(place)
    return 0, line, f"{where}:{line}: {text}"


def _no_recipe_text(document: Document, where: str) -> str:
    example = write_yaml({"name": "my-student"}).strip()
    if document.value is None:
        return f"{where}:1: the file is empty. Write keys and values, as {example}."
    kind = "a list" if isinstance(document.value, list) else "a single value"
    return f"{where}:{document.line(())}: {kind} is at the top. Write keys and values, as {example}."
