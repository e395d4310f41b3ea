"""Tables for the terminal, all in one style."""

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

EMPTY_CELL: Final = "-"
"""Stands in a table for a value that does not exist."""


def open_console() -> Console:
    """The terminal as a console that never takes text from data, such as "[bold]", for markup."""
    return Console(markup=False, highlight=False, emoji=False)


def empty_table(columns: Sequence[str]) -> Table:
    """An empty table whose first column holds names and whose others hold figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        # One word a line: the widest table of figures then fits into 80 columns.
        heading = column if index == 0 else column.replace(" ", "\n")
        table.add_column(heading, justify="left" if index == 0 else "right", vertical="bottom", overflow="fold")
    return table
