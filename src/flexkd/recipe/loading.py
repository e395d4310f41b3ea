"""A YAML file and the overrides of the command line to a checked Recipe, or to all problems at once."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from flexkd.errors import RecipeError
from flexkd.facts.own_metrics import load_code
from flexkd.files import is_there, local_path
from flexkd.packages import shipped_recipes
from flexkd.recipe.document import Document, KeyPath, read_document, read_recipe_text, short_repr, write_yaml
from flexkd.recipe.messages import field_path, key_fields, problems_of, takes_whole_numbers, unknown_key_text
from flexkd.recipe.overrides import WHERE, Override, parse_override, parse_overrides, with_value, without_key
from flexkd.recipe.problem import BrokenRulesError, RecipeProblem, dotted
from flexkd.recipe.renamed import renamed
from flexkd.recipe.schema import Recipe
from flexkd.recipe.training_sections import SearchRange

logger = logging.getLogger(__name__)

_METHODS: Final[KeyPath] = ("compare", "methods")
_PROJECTOR: Final[KeyPath] = ("objective", "features", "projector")
_WITH_PROJECTOR: Final = {"loss": "projector"}
_SHARED_KEYS: Final[tuple[KeyPath, ...]] = (
    ("name",), ("output",), ("task",), ("data",), ("generation",), ("teacher",), ("compare",), ("sizes",),
    ("push_to_hub",), ("rivals",),
    ("training", "seed"), ("training", "precision"), ("training", "max_minutes"), ("training", "early_stopping"),
)  # fmt: skip
"""What all students of a comparison have in common: rows, teacher, precision, time; `compare.seeds` sets the seed."""
_SHARED_STARTS: Final[tuple[KeyPath, ...]] = (
    ("student", "start"), ("student", "model"), ("student", "tokenizer"), ("student", "vocabulary"),
)  # fmt: skip
"""Keys that may change how rows are tokenized, which is done once for all methods."""
_STEPS: Final[tuple[KeyPath, ...]] = (("training", "epochs"), ("training", "max_steps"), ("training", "batch_size"))
"""Keys that decide how many steps a student takes, besides `training.max_minutes`."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file, or the name of a recipe that comes with flexkd, as classification/sst2 or
            demo/classification.
        overrides: KEY=VALUE, like training.learning_rate=1e-4; the value is YAML, and null leaves a section out.
        allow_code: Import and run the code that it names: task.metric, as module:function. Without it such a recipe is
            refused.

    Raises:
        RecipeError: The recipe has problems; lists all, one a line: `FILE:LINE: key.path: what is wrong. What to do.`
    """
    where = str(path)
    file = local_path(path, where="recipe")
    if not is_there(file):
        file = shipped_recipes().get(where, file)
    document = read_document(read_recipe_text(file), where)
    if not isinstance(document.value, dict):
        raise RecipeError(_no_recipe_text(document, where))
    repeated = [
        (0, line, f"{where}:{line}: {dotted(key)}: appears twice, first in line {first}. Keep one.")
        for key, line, first in document.duplicates
    ]
    recipe = _checked(document.value, overrides, where, lambda: document, repeated, allow_code=allow_code)
    for message in _old_names(document.value, where, overrides):
        logger.warning(message)
    return recipe


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with some values changed, checked again as a whole.

    Raises:
        RecipeError: The recipe has problems; all are listed, one a line.
    """
    # Only messages need the lines of a YAML text, which takes far longer to read than values take to check.
    return _checked(recipe.to_values(), overrides, recipe.name, lambda: read_document(recipe.to_yaml(), recipe.name))


def _checked(
    data: Any,
    overrides: Sequence[str],
    where: str,
    read: Callable[[], Document],
    repeated: Sequence[tuple[int, int, str]] = (),
    *,
    allow_code: bool = False,
) -> Recipe:
    """The recipe of values and overrides.

    Args:
        where: Names the values in messages.
        read: Gives the document of these values, for messages.
        repeated: Messages on keys that the document repeats, each after its sort key.
    """
    parsed, messages = parse_overrides(overrides)
    lines = [*repeated, *((1, index, message) for index, message in enumerate(messages))]
    for override in parsed:
        try:
            data = with_value(data, override.path, _with_definitions(override, data))
        except RecipeError as error:
            lines.append((1, 0, f"{WHERE}: {dotted(override.path)}: the recipe {error}"))
    if allow_code:
        load_code(data)
    recipe, problems = check_values(data)
    if problems:
        document = read()
        lines.extend(_line(problem, document, where, parsed) for problem in problems)
    if lines or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(message for *_, message in sorted(lines, key=lambda line: line[:2]))))
    return recipe


def _old_names(value: Any, where: str, overrides: Sequence[str]) -> Iterator[str]:
    """Which names of earlier versions a valid recipe, its overrides or its own methods use."""
    yield from (f"{where}: {message}" for message in renamed(value)[1])
    parsed = parse_overrides(overrides)[0]
    for override in parsed:
        value = with_value(renamed(value)[0], override.path, _with_definitions(override, value))
        yield from (f"{WHERE}: {message}" for message in renamed(value)[1])
    methods = (value.get("compare") or {}).get("methods")
    for method, texts in methods.items() if isinstance(methods, Mapping) else ():
        changed = {key: section for key, section in renamed(value)[0].items() if key != "compare"}
        for override in parse_overrides(texts or ())[0]:
            changed = with_value(renamed(changed)[0], override.path, override.value)
            yield from (f"compare.methods.{method}: {message}" for message in renamed(changed)[1])


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
                problems = [*_method_problems(recipe), *_search_problems(recipe, data)]
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
    """A valid value for a missing key; required keys are sections or text, among it the name of a repository."""
    return {} if _is_section(place) else "to-be-filled-in"


def _is_section(path: tuple[str, ...]) -> bool:
    return any(len(name) > len(path) and name[: len(path)] == path for name in key_fields())


def _follows_from(problem: RecipeProblem, wrong: set[tuple[str, ...]]) -> bool:
    """Whether a problem follows from a key that is wrong itself."""
    return any(_is_below(key, path) or _is_below(path, key) for key in problem.reads for path in wrong)


def _is_below(path: Sequence[str | int], above: Sequence[str | int]) -> bool:
    return tuple(map(str, path[: len(above)])) == tuple(map(str, above))


def _with_definitions(override: Override, data: Any) -> Any:
    """The value of an override; names for `compare.methods` keep what the recipe says these methods change."""
    section = data.get("compare")
    methods = section.get("methods") if isinstance(section, Mapping) else None
    names = override.value
    if override.path != _METHODS or not isinstance(methods, Mapping) or not isinstance(names, list):
        return names
    # A list in which something is wrong stays one, for the message about it.
    is_valid = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return {name: methods.get(name) for name in names} if is_valid else names


def _method_problems(recipe: Recipe) -> Iterator[RecipeProblem]:
    """Problems of the methods that a recipe defines, each of which must make a valid recipe before the first run."""
    definitions = {} if recipe.compare is None else recipe.compare.definitions
    for method, texts in definitions.items():
        problems: dict[int, str] = {}
        for position, text in _override_problems(recipe, texts):
            problems.setdefault(position, text)
        for position, text in sorted(problems.items()):
            yield RecipeProblem((*_METHODS, method, position), text)


def _override_problems(recipe: Recipe, texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Positions in a list of KEY=VALUE, each with what is wrong there; an override may have several problems."""
    plain = recipe.model_copy(update={"compare": None})
    values: Any = plain.model_dump()
    overrides: dict[int, Override] = {}
    for position, text in enumerate(texts):
        try:
            override = parse_override(text)
        except RecipeError as error:
            yield position, str(error).removeprefix(f"{WHERE}: ")
            continue
        if override.path in [earlier.path for earlier in overrides.values()]:
            yield position, f"{dotted(override.path)}: given twice. Keep one."
        overrides[position] = override
        try:
            values = with_value(values, override.path, override.value)
        except RecipeError as error:
            yield position, f"{dotted(override.path)}: the recipe {error}"
    changed, problems = check_values(values)
    for problem in problems:
        position = _position(overrides, (problem.path, *problem.reads))
        yield position, f"{short_repr(texts[position])} leads to {dotted(problem.path)}: {problem.text}"
    if changed is None:
        return
    for path in (*_shared_keys(recipe), *_SHARED_STARTS):
        if _value_at(changed, path) != _value_at(plain, path):
            position = _position(overrides, (path,))
            yield position, f"{short_repr(texts[position])} changes {dotted(path)}. {_shared_text(path)}"


def _position(overrides: Mapping[int, Override], keys: Sequence[KeyPath]) -> int:
    """Position of the first override that sets one of the keys, else a value below one, else of the last one."""
    above = [position for key in keys for position, override in overrides.items() if override.covers(key)]
    below = [position for key in keys for position, override in overrides.items() if _is_below(override.path, key)]
    return next(iter([*above, *below, max(overrides)]))


def _shared_keys(recipe: Recipe) -> tuple[KeyPath, ...]:
    """Keys whose values are the same for all students of a comparison."""
    return (*_SHARED_KEYS, *(_STEPS if recipe.training.max_minutes is not None else ()))


def _shared_text(path: KeyPath) -> str:
    """Why the value of a key is the same for all students of a comparison, and what to do."""
    if path in _STEPS:
        return "All students take the steps that training.max_minutes gives the first. Set it to null, with max_steps."
    return "All students of a comparison share it. Change it in the recipe itself, or leave it out."


def _value_at(recipe: Recipe, path: KeyPath) -> Any:
    value: Any = recipe
    for step in path:
        value = getattr(value, str(step))
    return value


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
        if isinstance(values, tuple) and not values:
            yield RecipeProblem(place, "[] gives nothing to try. Give values, as [1e-4, 5e-4].")
            continue
        shared = next((above for above in _shared_keys(recipe) if _is_below(path, above)), None)
        if shared is not None:
            yield RecipeProblem(place, f"every method would be tried under the same value. {_shared_text(shared)}")
            continue
        for method, texts in recipe.compare.definitions.items():
            if any(_is_below(path, text.partition("=")[0].strip().split(".")) for text in texts):
                text = f"'{method}' of compare.methods sets a value of its own. Leave one of the two out."
                yield RecipeProblem(place, text)
        # The recipe itself may teach without a projector, and one of the methods with it.
        base = with_value(data, _PROJECTOR[:-1], _WITH_PROJECTOR) if path[: len(_PROJECTOR)] == _PROJECTOR else data
        for value in _tried_values(path, values):
            _, problems = check_values(without_key(with_value(base, path, value), ("compare",)))
            for problem in problems:
                yield RecipeProblem(place, f"{short_repr(value)} leads to {dotted(problem.path)}: {problem.text}")


def _tried_values(path: KeyPath, choices: tuple[Any, ...] | SearchRange) -> tuple[Any, ...]:
    """Values that a search may try at a key: those of its list, or the ends of its range and its first step."""
    if isinstance(choices, tuple):
        return choices
    numbers = (choices.low, choices.last, *(() if choices.step is None else (choices.low + choices.step,)))
    is_whole = takes_whole_numbers(path)
    return tuple(int(number) if is_whole and number.is_integer() else number for number in numbers)


def _line(
    problem: RecipeProblem, document: Document, where: str, overrides: Sequence[Override]
) -> tuple[int, int, str]:
    """Sort key and message of one problem; a problem caused by an override is reported on the command line."""
    text = f"{dotted(problem.path)}: {problem.text}"
    for key in (problem.path, *problem.reads):
        for index, override in enumerate(overrides):
            if _is_definition(problem.path, override):
                continue
            if override.covers(key) or (key != problem.path and _is_below(override.path, key)):
                return 1, index, f"{WHERE}: {text}"
    # A default has no line of its own; the line is then that of a key which the default does not fit.
    place = next((key for key in (problem.path, *problem.reads) if document.holds(key)), problem.path)
    line = document.line(place)
    return 0, line, f"{where}:{line}: {text}"


def _is_definition(path: KeyPath, override: Override) -> bool:
    """Whether an override names methods, and the path leads into what the recipe says that one of them changes."""
    is_named = isinstance(override.value, list) and override.path == _METHODS
    return is_named and path[:2] == _METHODS and len(path) > 2 and isinstance(path[2], str)


def _no_recipe_text(document: Document, where: str) -> str:
    example = write_yaml({"name": "my-student"}).strip()
    if document.value is None:
        return f"{where}:1: the file is empty. Write keys and values, as {example}."
    kind = "a list" if isinstance(document.value, list) else "a single value"
    return f"{where}:{document.line(())}: {kind} is at the top. Write keys and values, as {example}."
