"""Tables for the terminal, all in one style, which hold in any width: what does not fit side by side is stacked."""

from collections.abc import Sequence
from typing import Any, Final

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from flexkd.display.text import filled, printable

EMPTY_CELL: Final = "-"
"""Stands in a table for a value that does not exist."""

_GAP: Final = 2
"""Columns between two cells."""
_SECTION: Final = None
_BELOW: Final = 4 * " "
"""Before a figure that has no room beside its heading."""


class FigureTable:
    """A table whose first column holds names and whose others hold figures, which are never broken.

    Where the figures and the longest word of the names do not fit beside each other, each row becomes a paragraph: the
    name, and below it every heading with its figure.

    Args:
        headings: One for each column; words of a heading stand one below the other.
    """

    def __init__(self, headings: Sequence[str]):
        self.headings = [printable(heading) for heading in headings]
        self.rows: list[tuple[str, ...] | None] = []

    def add_row(self, *cells: str) -> None:
        """Add a name with its figures."""
        self.rows.append(tuple(map(printable, cells)))

    def add_section(self) -> None:
        """A gap between the rows before and after."""
        self.rows.append(_SECTION)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        if self._least_width() <= options.max_width:
            yield self._side_by_side()
        else:
            yield from self._stacked(options.max_width)

    def _least_width(self) -> int:
        """What the figures need beside the longest word of the names."""
        cells = list(zip(self.headings, *filter(None, self.rows), strict=True))
        names = [word for name in cells[0] for word in name.split()]
        figures = [(*column[0].split(), *column[1:]) for column in cells[1:]]
        return sum(max(map(cell_len, column), default=0) for column in (names, *figures)) + _GAP * len(figures)

    def _side_by_side(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for index, heading in enumerate(self.headings):
            if index == 0:
                table.add_column(heading, vertical="bottom", overflow="fold")
            else:
                # One word a line: the widest table of figures then fits into 80 columns.
                lines = heading.replace(" ", "\n")
                table.add_column(lines, justify="right", vertical="bottom", no_wrap=True, overflow="fold")
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*row)
        return table

    def _stacked(self, width: int) -> Any:
        names = 2 + max(map(cell_len, self.headings[1:])) + _GAP
        figures = max(cell_len(figure) for row in filter(None, self.rows) for figure in row[1:])
        end = min(width, names + figures)
        for row in filter(None, self.rows):
            yield Text(row[0], style="bold", overflow="fold")
            for heading, figure in zip(self.headings[1:], row[1:], strict=True):
                name, room = f"  {heading}", end - names
                if cell_len(figure) <= room:
                    yield Text(f"{name}{' ' * (end - cell_len(name) - cell_len(figure))}{figure}")
                elif max(map(cell_len, figure.split())) <= room:
                    yield Text(filled(figure, width, start=f"{name:<{names}}", indent=" " * names))
                else:
                    yield Text(f"{name}\n{filled(figure, width, start=_BELOW, indent=_BELOW)}")
