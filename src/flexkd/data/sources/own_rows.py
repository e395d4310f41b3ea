"""Functions that bring rows, registered by name: those of users, and those whose rows are fetched once."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.sources.table import Row, Table
from flexkd.errors import DataError, RecipeError

OWN_PREFIX: Final = "own:"
"""Sources that begin with it are read by a function of this process."""

OWN_ROWS: Final[dict[str, Callable[[str], Iterable[Mapping[str, Any]]]]] = {}
"""Functions that read rows, by name."""


FETCHED: Final[dict[str, Callable[[Path], list[dict[str, str]]]]] = {}
"""Source -> function that fetches its rows, given an empty folder to work in."""


def register_fetched(source: str, function: Callable[[Path], list[dict[str, str]]]) -> None:
    """Make a function the source of rows that take long to fetch: it is called once, and its rows are kept on disk."""
    FETCHED[source] = function


def register_rows(name: str, function: Callable[[str], Iterable[Mapping[str, Any]]]) -> None:
    """Make a function the source of rows `own:NAME`, which a recipe names as `data.train`, `validation` or `test`.

    It is called with the split, train, validation or test, wherever rows are read, and gives the same rows each time:
    dicts of columns, as a line of a JSONL file holds them. Rows that changed are another run.

    Args:
        name: One that is registered again is replaced.
        function: For example of a database, or of a format of your own.

    Raises:
        RecipeError: The name is none, or the function cannot be called.

    Example:
        >>> register_rows("two", lambda split: [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
        >>> own_table("own:two", "train").columns
        ('text', 'label')
    """
    if not name.isidentifier():
        raise RecipeError(f"register_rows: {name!r} is no name. Write it of letters, digits and '_'.")
    if not callable(function):
        raise RecipeError(f"register_rows: {function!r:.60} cannot be called. Give a function of the split.")
    OWN_ROWS[name] = function


def own_table(source: str, split: str) -> Table:
    """The rows of a registered source.

    Raises:
        DataError: There is no such source in this process, or its function fails or gives something else than rows.
    """
    name = source.removeprefix(OWN_PREFIX)
    if name not in OWN_ROWS:
        names = f" Registered: {', '.join(sorted(OWN_ROWS))}." if OWN_ROWS else ""
        raise DataError(
            f"{source}: no rows of that name in this process.{names} Call flexkd.register_rows('{name}', function) "
            "before the recipe runs in Python, or give a file."
        )
    try:
        values = list(OWN_ROWS[name](split))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"{source}: its function raised {type(error).__name__} ({text}) for the split '{split}'. Let it take the "
            "split and return dicts."
        ) from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, Mapping) or not all(isinstance(column, str) for column in value):
            raise DataError(f"{source}: row {number} is {value!r:.80}. Let each row be a dict with names of columns.")
    columns = dict.fromkeys(column for value in values for column in value)
    return Table([Row(dict(value), f"{source}:row {number}") for number, value in enumerate(values, 1)], tuple(columns))
