"""Metrics of users: registered by name or loaded as code where that is allowed, called in one way, and checked."""

import importlib
import logging
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final

from flexkd.errors import RecipeError
from flexkd.facts.metrics import LOSS, LOWER_IS_BETTER, METRIC_FACTS
from flexkd.facts.user_code import METRIC_KEY, note_function

logger = logging.getLogger(__name__)

CODE_SIGN: Final = ":"
"""Stands between module and function in the name of a metric that is code; no other name has it."""

NOT_ALLOWED: Final = (
    "is code on this machine, which a recipe does not run by itself. Read it, then allow it: --allow-code on the "
    "command line, load_recipe(..., allow_code=True) in Python."
)
"""What is said of code that was not allowed, after its name."""


@dataclass(frozen=True)
class OwnMetric:
    """A metric that is no row of `METRIC_FACTS`.

    Attributes:
        function: Of what is right and what a model says, as in `register_metric`; gives a number.
    """

    function: Callable[[Any, Any], Any]
    higher_is_better: bool


OWN_METRICS: Final[dict[str, OwnMetric]] = {}
"""Metrics of this process by name."""


def register_metric(name: str, function: Callable[[Any, Any], Any], *, higher_is_better: bool = True) -> None:
    """Make a function a metric, which a recipe then names as `task.metric`.

    It is called with what is right and with what a model says, in the order of scikit-learn. These are numpy arrays:
    class indices `[rows]`, of several labels a row 0 or 1 `[rows, classes]`, numbers `[rows]` in a regression. Where
    text is written, they are the references of each row, a list of lists of texts, and the answers, a list of texts.
    A result that is not finite counts as undefined. Before a recipe trains, the function is called with right answers
    and with the same answer for every row.

    Args:
        name: Not that of another metric; one that is registered again is replaced.
        function: For example `sklearn.metrics.balanced_accuracy_score`.
        higher_is_better: Of two models the one with the larger value is better.

    Raises:
        RecipeError: The name cannot name a metric, or the function cannot be called.

    Example:
        >>> register_metric("share_right", lambda labels, predictions: (labels == predictions).mean())
    """
    known_names = {LOSS, *(facts.name for facts in METRIC_FACTS)}
    if name in known_names or not name.isidentifier():
        reason = "is a metric of flexkd" if name in known_names else "is no name: letters, digits and '_'"
        raise RecipeError(f"register_metric: {name!r} {reason}. Choose another name.")
    if not callable(function):
        raise RecipeError(f"register_metric: {function!r} cannot be called. Give a function of labels and predictions.")
    add_metric(name, function, higher_is_better=higher_is_better)


def add_metric(name: str, function: Callable[[Any, Any], Any], *, higher_is_better: bool) -> None:
    """As `register_metric`, under any name."""
    OWN_METRICS[name] = OwnMetric(function, higher_is_better)
    note_function(METRIC_KEY, name, function)
    declare_direction({"task": {"metric": name, "higher_is_better": higher_is_better}})


def declare_direction(recipe: Mapping[str, Any]) -> None:
    """Make known which way the own metric of a recipe, as plain data, is better; its function may not be here."""
    task = recipe.get("task")
    if isinstance(task, Mapping) and task.get("higher_is_better") is not None:
        change = LOWER_IS_BETTER.discard if task["higher_is_better"] else LOWER_IS_BETTER.add
        change(str(task.get("metric")))


def own_values(name: str, truth: Any, predictions: Any) -> dict[str, float | None]:
    """The value of an own metric by its name, None without rows or where it is not finite; empty for others.

    Raises:
        RecipeError: The function raises, or gives something that is no number.
    """
    if name not in OWN_METRICS:
        return {}
    if not len(truth):
        return {name: None}
    value = _called(name, truth, predictions)
    if not math.isfinite(value):
        logger.warning("%s is not defined: it gives %s on %d rows. Recorded as null.", name, value, len(truth))
        return {name: None}
    return {name: value}


def check_metric(name: str, truth: Any, constant: Any) -> None:
    """Call an own metric as a run will do, before it begins.

    Args:
        truth: What is right in some rows; said to be what a model says too.
        constant: The same answer for each of them.

    Raises:
        RecipeError: As `own_values`; or the metric of right answers is not finite.
    """
    if name not in OWN_METRICS or not len(truth):
        return
    right = truth if not isinstance(truth, list) else [references[0] for references in truth]
    value = _called(name, truth, right)
    if not math.isfinite(value):
        raise RecipeError(
            f"task.metric: '{name}' gives {value} where all of {len(truth)} validation rows are answered right. Let it "
            "give a finite number."
        )
    _called(name, truth, constant)


def _called(name: str, truth: Any, predictions: Any) -> float:
    where = f"task.metric: '{name}'"
    called = f"when called with what is right and what a model says of {len(truth)} rows"
    try:
        value = OWN_METRICS[name].function(truth, predictions)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"{where} raised {type(error).__name__} ({text}) {called}. Let it take two arguments, as "
            "register_metric says, and return a number."
        ) from error
    value = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise RecipeError(f"{where} returned {value!r:.100}, which is no number, {called}. Let it return one number.")
    return float(value)


def load_code(values: Any) -> None:
    """Import the code that a recipe names, a metric as `module:function`, and make it known under that name.

    The working folder is searched first, as `python -m` does.

    Args:
        values: Of the recipe; what is wrong with anything else in them is for others to say.

    Raises:
        RecipeError: There is no such module or function, or it cannot be imported.
    """
    task = values.get("task") if isinstance(values, Mapping) else None
    name = task.get("metric") if isinstance(task, Mapping) else None
    if not isinstance(task, Mapping) or not isinstance(name, str) or CODE_SIGN not in name:
        return
    module, _, attribute = name.partition(CODE_SIGN)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"task.metric: '{name}' cannot be loaded ({type(error).__name__}: {text}). Write module:function, of a "
            "module that is installed or lies in the working folder."
        ) from error
    if not callable(function):
        raise RecipeError(f"task.metric: '{name}' is {function!r:.60}, which cannot be called. Name a function.")
    add_metric(name, function, higher_is_better=task.get("higher_is_better") is not False)


def code_of(metric: str) -> str:
    """The code behind the name of a metric, with the file that it lies in; empty where the recipe runs none."""
    if CODE_SIGN not in metric or metric not in OWN_METRICS:
        return ""
    module = sys.modules.get(metric.partition(CODE_SIGN)[0])
    return f"task.metric: '{metric}', of {getattr(module, '__file__', None) or 'a module without a file'}"
