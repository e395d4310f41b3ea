"""Functions of users that figures depend on: a metric, a loss, a score; and a short hash of what each of them does."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
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
    """A short hash of the text of a function, or of its compiled form where it has no text of its own, as a lambda.

    What it calls, and what it holds from outside, is no part of it. Of a partial function the values that it gives are;
    an object that is called counts by the text of its class.

    Example:
        >>> function_hash(lambda a, b: a + b) == function_hash(lambda a, b: a - b)
        False
        >>> function_hash(partial(round, ndigits=1)) == function_hash(partial(round, ndigits=2))
        False
    """
    return hashlib.blake2b(_text(function).encode(), digest_size=8).hexdigest()


def _text(function: Any) -> str:
    if isinstance(function, partial):
        return f"{_text(function.func)} {_plain(function.args)} {_plain(tuple(function.keywords.items()))}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None and code.co_name == "<lambda>":
        return _plain(code)
    try:
        return inspect.getsource(inspect.unwrap(function) if code is not None else type(function))
    except (OSError, TypeError):
        # In a console, or compiled by another language.
        return _plain(code) if code is not None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _plain(value: Any) -> str:
    """A constant as text that is the same in every process: no address, no order of a set."""
    if inspect.iscode(value):
        return f"{value.co_code.hex()} {value.co_names} {_plain(value.co_consts)}"
    if isinstance(value, tuple | list):
        return f"({' '.join(map(_plain, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{' '.join(sorted(map(_plain, value)))}}}"
    return repr(value) if isinstance(value, str | bytes | int | float | complex | None) else type(value).__qualname__


def function_hashes(names: Mapping[str, str]) -> dict[str, str]:
    """Hashes of the functions of users among the names that a recipe has under its keys, by key and `(code)`."""
    return {f"{key} (code)": _HASHES[key, name] for key, name in names.items() if (key, name) in _HASHES}
