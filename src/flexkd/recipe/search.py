"""What `flexkd tune` tries for each method: the values of the recipe, or a space for methods of any kind."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Final

from flexkd.facts.losses import FEATURE_LOSS_FACTS, WITHOUT_TEMPERATURE
from flexkd.recipe.loading import override_recipe
from flexkd.recipe.messages import takes_whole_numbers
from flexkd.recipe.overrides import parse_override
from flexkd.recipe.schema import Recipe
from flexkd.recipe.training_sections import CompareSection, SearchRange

_WIDEN: Final = {
    False: "add values beyond it to compare.search. Finished trials are kept.",
    True: "widen it in compare.search and raise compare.trials. Finished trials are kept.",
}
"""What to do about a value at the edge of a list, and of a range."""

Space = Mapping[str, tuple[Any, ...] | SearchRange]
"""Recipe key -> the values to try, or the range that they are drawn from."""

DEFAULT_SPACE: Final[Space] = {
    "training.learning_rate": SearchRange(low=1e-5, high=1e-2, log=True),
    "objective.features.weight": SearchRange(low=1e-3, high=10, log=True),
    "objective.logits.temperature": SearchRange(low=1, high=8, log=True),
    "objective.features.projector.learning_rate": SearchRange(low=1e-4, high=1e-1, log=True),
}
DEFAULT_TRIALS: Final = 12

_PROJECTOR: Final = "objective.features.projector."
_OUTER_SHARE: Final = 0.1
"""A value in the outer tenth of its range is reported: a better one may lie beyond."""


def with_search(recipe: Recipe, search: Mapping[str, Any] | None = None, *, trials: int | None = None) -> Recipe:
    """The recipe with another search than its own.

    Args:
        search: As `compare.search`: recipe key to the values to try, or to a range as {"low": 1e-5, "high": 1e-2};
            None: the recipe's.
        trials: As `compare.trials`; None: the recipe's.

    Raises:
        RecipeError: A key or value that the recipe would not take.
    """
    overrides = [] if trials is None else [f"compare.trials={json.dumps(trials)}"]
    if search is not None:
        choices = {key: values if isinstance(values, Mapping) else list(values) for key, values in search.items()}
        overrides.append(f"compare.search={json.dumps(choices)}")
    return override_recipe(recipe, overrides) if overrides else recipe


def tries_every_combination(recipe: Recipe) -> bool:
    """Whether the recipe searches lists alone and limits the number of trials nowhere."""
    section = recipe.compare
    return bool(section and section.search and section.trials is None and not has_ranges(section.search))


def prunes(recipe: Recipe) -> bool:
    """Whether trials that fall behind are stopped: by default where not every combination is tried."""
    section = recipe.compare or CompareSection()
    return not tries_every_combination(recipe) if section.pruning is None else section.pruning


def has_ranges(space: Space) -> bool:
    """Whether values are drawn and not only listed."""
    return any(isinstance(values, SearchRange) for values in space.values())


def method_space(recipe: Recipe, method: str, variant: Recipe) -> Space:
    """What is tried for one method: keys of sections that it has, and that its definition in the recipe does not set.

    Args:
        recipe: Its `compare.search` is the space of every method; where it is empty, `DEFAULT_SPACE` is.
        method: Name of the method.
        variant: The recipe of the method.
    """
    section = recipe.compare or CompareSection()
    if section.search:
        return {key: values for key, values in section.search.items() if _has_section(variant, key)}
    keys_set = [parse_override(text).path for text in section.definitions.get(method, ())]
    return {
        key: values
        for key, values in DEFAULT_SPACE.items()
        if _is_taught(variant, key) and not any(tuple(key.split("."))[: len(path)] == path for path in keys_set)
    }


def num_trials(recipe: Recipe, space: Space) -> int:
    """Trials of one method: the same for all methods, but no more than there are combinations of lists."""
    limit = None if tries_every_combination(recipe) else DEFAULT_TRIALS
    if recipe.compare and recipe.compare.trials is not None:
        limit = recipe.compare.trials
    if not space:
        return 0
    if has_ranges(space):
        return limit or DEFAULT_TRIALS
    count = len(combinations(space))
    return count if limit is None else min(count, limit)


def lists_of(space: Space) -> dict[str, tuple[Any, ...]]:
    """The keys of a space whose values are listed."""
    return {key: values for key, values in space.items() if isinstance(values, tuple)}


def combinations(space: Space) -> list[dict[str, Any]]:
    """All combinations of the listed values, in the order in which the recipe lists them; none twice."""
    lists = {key: tuple(dict.fromkeys(values)) for key, values in lists_of(space).items()}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def is_in(space: Space, values: Mapping[str, Any]) -> bool:
    """Whether values of an earlier trial could be tried in this space as well."""
    return values.keys() == space.keys() and all(holds(space[key], value) for key, value in values.items())


def holds(choices: tuple[Any, ...] | SearchRange, value: Any) -> bool:
    """Whether a value is among the choices of a key."""
    if isinstance(choices, tuple):
        return value in choices
    if not isinstance(value, int | float) or not choices.low <= value <= choices.high:
        return False
    steps = 0.0 if choices.step is None else (value - choices.low) / choices.step
    return math.isclose(steps, round(steps), abs_tol=1e-6)


def edges(space: Space, values: Mapping[str, Any]) -> list[str]:
    """Which of the chosen values lie at an edge of what was tried, in sentences."""
    sentences = []
    for key, choices in space.items():
        end = _edge(choices, values[key])
        if end:
            sentences.append(f"{key} = {values[key]} is {end}: {_WIDEN[isinstance(choices, SearchRange)]}")
    return sentences


def _edge(choices: tuple[Any, ...] | SearchRange, value: Any) -> str:
    """At which edge of the choices a value lies; empty where others lie on both sides, or they are no numbers."""
    if isinstance(choices, SearchRange):
        scale = math.log if choices.log else float
        share = (scale(value) - scale(choices.low)) / (scale(choices.high) - scale(choices.low))
        if _OUTER_SHARE < share < 1 - _OUTER_SHARE:
            return ""
        return f"at the {'lower' if share <= _OUTER_SHARE else 'upper'} end of its range"
    numbers = {choice for choice in choices if isinstance(choice, int | float) and not isinstance(choice, bool)}
    if value not in numbers or len(numbers) < 2:
        return ""
    return {min(numbers): "the lowest tried", max(numbers): "the highest tried"}.get(value, "")


def drawn_number(key: str, number: float, choices: SearchRange) -> int | float:
    """A number drawn from a range as the recipe takes it: whole where the key is, else rounded to three digits."""
    if takes_whole_numbers(tuple(key.split("."))):
        return round(number)
    digits = 3 if choices.step is None else 10
    return min(max(float(f"{number:.{digits}g}"), choices.low), choices.high)


def _has_section(variant: Recipe, key: str) -> bool:
    """Whether a method's recipe has the section of a key; setting the key would otherwise create the section.

    A projector without a section has one with the defaults.
    """
    if key.startswith(_PROJECTOR):
        features = variant.objective.features
        return features is not None and FEATURE_LOSS_FACTS[features.loss].needs_projector
    return isinstance(value_at(variant.model_dump(mode="json"), key.rpartition(".")[0]), dict)


def _is_taught(variant: Recipe, key: str) -> bool:
    """Whether a key of the default space changes anything for a method."""
    if not _has_section(variant, key):
        return False
    if key == "objective.logits.temperature":
        logits = variant.objective.logits
        return logits is not None and logits.weight > 0 and logits.loss not in WITHOUT_TEMPERATURE
    features = variant.objective.features
    return not key.startswith("objective.features.") or (features is not None and features.weight > 0)


def value_at(settings: Any, key: str) -> Any:
    """The value of a dotted key in the settings of a recipe; None where a section on the way is missing."""
    for step in key.split("."):
        settings = settings.get(step) if isinstance(settings, dict) else None
    return settings
