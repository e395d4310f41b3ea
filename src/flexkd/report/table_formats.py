"""Tables of results as CSV, LaTeX and Markdown; text of the user is text in each of them."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from flexkd.record import Number
from flexkd.report.result_tables import Cell, Column, Estimate, ResultTable
from flexkd.report.wording import byte_size, compact, duration, markdown_text, metric_text, milliseconds, speed

_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""With one of these a spreadsheet takes a cell for a formula; the last four are their full-width forms."""

_LATEX: Final = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u2193": r"$\downarrow$",
}
_MINUS: Final = re.compile(r"(?<![\w.])-(?=\d)")


def to_csv(table: ResultTable) -> str:
    """All columns and rows with all digits, an interval in two columns of its own; quoted as RFC 4180 asks.

    Text that a spreadsheet would run as a formula begins with an apostrophe.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    headings: list[str] = []
    for column in table.columns:
        headings += [column.name, *([f"{column.name}_low", f"{column.name}_high"] if column.has_interval else [])]
    writer.writerow(_plain(heading) for heading in headings)
    for row in (*table.rows, *table.details):
        cells: list[str] = []
        for cell in row:
            parts = (cell.value, cell.low, cell.high) if isinstance(cell, Estimate) else (cell,)
            cells += map(_plain, parts)
        writer.writerow(cells)
    return buffer.getvalue()


def _plain(value: str | Number | None) -> str:
    """A value as CSV holds it: a number with all its digits, nothing for what is not defined."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return repr(value)


def to_latex(table: ResultTable) -> str:
    """A `tabular` with the lines of the package booktabs, notes as comments."""
    columns = _printed(table)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{''.join('l' if column.kind == 'text' else 'r' for column in columns.values())}}}",
        r"\toprule",
        _latex_line(latex_text(column.heading) for column in columns.values()),
        r"\midrule",
        *(
            _latex_line(_MINUS.sub("$-$", latex_text(_shown(row[place], column))) for place, column in columns.items())
            for row in table.rows
        ),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"% {' '.join(note.split())}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    line = " & ".join(cells)
    # Behind the end of a row, LaTeX reads these as an argument of it.
    return ("{}" if line.startswith(("[", "*")) else "") + line + r" \\"


def latex_text(text: str) -> str:
    r"""Text of the user as text of LaTeX, on one line.

    Example:
        >>> latex_text(r"50% of \input{x} & more")
        '50\\% of \\textbackslash{}input\\{x\\} \\& more'
    """
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return "".join(_LATEX.get(letter, letter) for letter in line)


def to_markdown(table: ResultTable) -> str:
    """A table as GitHub reads it, notes below."""
    columns = _printed(table)
    rule = ["---" if column.kind == "text" else "---:" for column in columns.values()]
    rows = [[markdown_text(_shown(row[place], column)) for place, column in columns.items()] for row in table.rows]
    headings = [markdown_text(column.heading) for column in columns.values()]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
    notes = [f"\n{markdown_text(note)}" for note in table.notes]
    return "\n".join([*lines, *notes]) + "\n"


def _printed(table: ResultTable) -> dict[int, Column]:
    """Columns that are printed, by their place: those with a heading in which some row has something."""
    return {
        place: column
        for place, column in enumerate(table.columns)
        if column.heading and any(_shown(row[place], column) for row in table.rows)
    }


def _shown(cell: Cell, column: Column) -> str:
    """A cell for people: rounded, an interval in brackets."""
    if isinstance(cell, Estimate):
        value, ends = _figure(cell.value, column), (_figure(cell.low, column), _figure(cell.high, column))
        return f"{value} [{', '.join(ends)}]" if value and all(ends) else value
    return cell if isinstance(cell, str) else _figure(cell, column)


def _figure(value: Number | None, column: Column) -> str:
    is_defined = value is not None and math.isfinite(value)
    return _KINDS[column.kind](value) if is_defined and value is not None else ""


_KINDS: Final[Mapping[str, Callable[[Number], str]]] = {
    "text": str,
    "count": lambda value: compact(value) if value >= 10_000 else f"{value:,}",
    "metric": metric_text,
    "signed": lambda value: f"{value:+.3f}",
    "share": lambda value: f"{value:.1%}",
    "p_value": lambda value: f"{value:.2g}",
    "bytes": byte_size,
    "speed": speed,
    "milliseconds": milliseconds,
    "seconds": duration,
}

FORMATS: Final[Mapping[str, Callable[[ResultTable], str]]] = {"csv": to_csv, "latex": to_latex, "markdown": to_markdown}
"""How a table can be written, by the name of the option."""
