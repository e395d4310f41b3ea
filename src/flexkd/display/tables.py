"""Tables for the terminal, all in one style, which hold in any width: what does not fit side by side is stacked."""

from collections.abc import Sequence
from typing import Any, Final

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from flexkd.display.text import printable

EMPTY_CELL: Final = "-"
"""Stands in a table for a value that does not exist."""

_GAP: Final = 2
"""Columns between two cells."""
_SECTION: Final = None


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
            yield from self._stacked()

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

    def _stacked(self) -> Any:
        for row in filter(None, self.rows):
            yield Text(row[0], style="bold", overflow="fold")
            table = Table.grid(padding=(0, _GAP, 0, 0))
            table.add_column(overflow="fold", min_width=max(map(cell_len, self.headings[1:])))
            table.add_column(justify="right", overflow="fold", min_width=self._widest_figure())
            for heading, figure in zip(self.headings[1:], row[1:], strict=True):
                table.add_row(f"  {heading}", figure)
            yield table

    def _widest_figure(self) -> int:
        return max(cell_len(figure) for row in filter(None, self.rows) for figure in row[1:])
