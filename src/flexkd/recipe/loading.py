"""From a YAML file and the command line to a Recipe, or to every problem at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexkd.errors import RecipeError
from flexkd.files import local_path
from flexkd.recipe.document import Document, read_document, read_recipe_text, shown, write_yaml
from flexkd.recipe.messages import field_path, key_fields, problems_of, unknown_key_text
from flexkd.recipe.overrides import WHERE, Override, parse_overrides, removed, replaced
from flexkd.recipe.problem import BrokenRulesError, RecipeProblem, dotted
from flexkd.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        overrides: KEY=VALUE, like training.learning_rate=1e-4; the value is YAML, and null leaves a section out.

    Raises:
        RecipeError: With every problem, one a line: `FILE:LINE: key.path: what is wrong. What to do.`
    """
    return _load(read_recipe_text(local_path(path, where="recipe")), str(path), overrides)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some values changed, checked as a whole again.

    Raises:
        RecipeError: With every problem, one a line.
    """
    return _load(recipe.to_yaml(), recipe.name, overrides)


def _load(text: str, where: str, overrides: Sequence[str]) -> Recipe:
    document = read_document(text, where)
    if not isinstance(document.value, dict):
        raise RecipeError(_no_recipe_text(document, where))
    parsed, messages = parse_overrides(overrides)
    lines = [(1, index, message) for index, message in enumerate(messages)]
    for path, line, first in document.duplicates:
        message = f"{where}:{line}: {dotted(path)}: stands twice, first in line {first}. Keep one."
        lines.append((0, line, message))
    data = document.value
    for override in parsed:
        try:
            data = replaced(data, override.path, override.value)
        except RecipeError as error:
            lines.append((1, 0, f"{WHERE}: {dotted(override.path)}: the recipe {error}"))
    recipe, problems = check_values(data)
    lines.extend(_line(problem, document, where, parsed) for problem in problems)
    if lines or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(message for *_, message in sorted(lines, key=lambda line: line[:2]))))
    return recipe


def check_values(data: Any) -> tuple[Recipe | None, list[RecipeProblem]]:
    """The recipe, or every problem of its values.

    Pydantic runs the rules between keys only when each key alone is right. So that they are reported together,
    what is wrong is taken out or filled in until the rules run; those that read a wrong key are left out.
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
            problems.extend(problem for problem in broken.problems if not any(_touches(wrong, problem)))
            return None, problems
        found = [problem for detail in details for problem in problems_of(detail)]
        problems.extend(problem for problem in found if not any(_is_below(problem.path, path) for path in wrong))
        before = data
        for detail in details:
            place = _place(detail["loc"])
            wrong.add(place)
            data = replaced(data, place, _stand_in(place)) if detail["type"] == "missing" else removed(data, place)
        if data == before:  # cannot be mended any further
            return None, problems


def _place(loc: Sequence[str | int]) -> tuple[str, ...]:
    """The key to take out: an unknown key itself, but the whole value where one item of a list or mapping is wrong."""
    place = tuple(str(step) for step in loc)
    known = field_path(place)
    return known if known and not _is_section(known) else place


def _stand_in(place: tuple[str, ...]) -> Any:
    """Something of the right kind for a missing key; all keys that must be given are text or sections."""
    return {} if _is_section(place) else "to be filled in"


def _is_section(path: tuple[str, ...]) -> bool:
    return any(len(name) > len(path) and name[: len(path)] == path for name in key_fields())


def _touches(wrong: set[tuple[str, ...]], problem: RecipeProblem) -> Iterator[bool]:
    for read in problem.reads:
        yield any(_is_below(read, path) or _is_below(path, read) for path in wrong)


def _is_below(path: Sequence[str | int], above: Sequence[str | int]) -> bool:
    return tuple(map(str, path[: len(above)])) == tuple(map(str, above))


def _search_problems(recipe: Recipe, data: Any) -> Iterator[RecipeProblem]:
    """Each value of compare.search must make a recipe, before the first of many runs."""
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
            _, problems = check_values(removed(replaced(data, path, value), ("compare",)))
            for problem in problems:
                yield RecipeProblem(place, f"{shown(value)} leads to {dotted(problem.path)}: {problem.text}")


def _line(
    problem: RecipeProblem, document: Document, where: str, overrides: Sequence[Override]
) -> tuple[int, int, str]:
    """Order and text of one problem; one that an override brought in is the command line's."""
    text = f"{dotted(problem.path)}: {problem.text}"
    for read in (problem.path, *problem.reads):
        for index, override in enumerate(overrides):
            if override.covers(read) or (read != problem.path and _is_below(override.path, read)):
                return 1, index, f"{WHERE}: {text}"
    # A default that does not fit is best seen at the key that it does not fit to.
    place = next((read for read in (problem.path, *problem.reads) if document.holds(read)), problem.path)
    line = document.line(place)
    return 0, line, f"{where}:{line}: {text}"


def _no_recipe_text(document: Document, where: str) -> str:
    example = write_yaml({"name": "my-student"}).strip()
    if document.value is None:
        return f"{where}:1: the file is empty. Write keys and values, as {example}."
    kind = "a list" if isinstance(document.value, list) else "a single value"
    return f"{where}:{document.line(())}: {kind} stands at the top. Write keys and values, as {example}."
