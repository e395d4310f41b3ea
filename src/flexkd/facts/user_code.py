"""Functions of users that figures depend on: a metric, a loss, a score; and a short hash of what each of them does."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

METRIC_KEY: Final = "task.metric"
LOSS_KEY: Final = "objective.features.loss"
SCORE_KEY: Final = "scores.attribution"
"""Keys of a recipe that may name such a function."""

_HASHES: Final[dict[tuple[str, str], str]] = {}
"""By key and name, of the functions of this process."""


def note_function(key: str, name: str, function: Callable[..., Any]) -> None:
    """Remember what a function does that a recipe may name under a key."""
    _HASHES[key, name] = function_hash(function)


def function_hash(function: Callable[..., Any]) -> str:
    """A short hash of the text of a function; of its compiled form where it has no text of its own, as a lambda.

    Functions that it calls are no part of it.

    Example:
        >>> function_hash(lambda a, b: a + b) == function_hash(lambda a, b: a - b)
        False
    """
    code, text = getattr(function, "__code__", None), type(function).__qualname__
    has_text = getattr(function, "__name__", "") != "<lambda>"
    try:
        text = inspect.getsource(inspect.unwrap(function)) if has_text else text
    except (OSError, TypeError):
        has_text = False
    if code is not None and not has_text:
        # The text of a function within the function would have its address.
        constants = [value for value in code.co_consts if not inspect.iscode(value)]
        text = repr((code.co_code.hex(), code.co_names, constants))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def function_hashes(names: Mapping[str, str]) -> dict[str, str]:
    """Hashes of the functions of users among the names that a recipe has under its keys, by key and `(code)`."""
    return {f"{key} (code)": _HASHES[key, name] for key, name in names.items() if (key, name) in _HASHES}
