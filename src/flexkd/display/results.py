"""What a command says when it is done: text and tables on standard output, and the same in the log file."""

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.text import Text

from flexkd.display.log import RESULTS, is_quiet
from flexkd.display.tables import FigureTable
from flexkd.display.text import filled, fitted, printable
from flexkd.processes import may_complain, speaks

_logger = logging.getLogger(RESULTS)

_FILE_WIDTH: Final = 120
_PLAIN: Final[dict[str, Any]] = {"markup": False, "highlight": False, "emoji": False}
"""No text is taken for markup, such as "[bold]"."""
_SHORTEST_TEXT: Final = 24
"""Columns that a text beside its name needs; with fewer it stands below."""


def say(text: str) -> None:
    """Print lines as they are: paths and commands in them can be copied."""
    if speaks():
        sys.stdout.write(f"{printable(text)}\n")
        sys.stdout.flush()
    _keep(text)


def complain(text: str, *, command: str = "") -> None:
    """Print an error on standard error; of several processes with an error one prints it.

    Args:
        text: What is wrong, and what to do.
        command: What to type then: in a terminal on a line of its own that is not broken, so that it can be copied.
    """
    if may_complain():
        shown = fitted(printable(text), sys.stderr)
        gap = "\n" if sys.stderr.isatty() else " "
        sys.stderr.write(f"{shown}{gap}{printable(command)}\n" if command else f"{shown}\n")
        sys.stderr.flush()
    _keep(f"{text} {command}".rstrip())


def show(content: str | FigureTable = "", *, bold: bool = False) -> None:
    """Print a table, or a text whose lines are broken between words where the terminal ends, and nowhere in a pipe."""
    _show(content, style="bold" if bold else None)


def show_entries(entries: Sequence[tuple[str, str]], *, is_result: bool = True) -> None:
    """Print texts with their names before them.

    Args:
        entries: Name and text of each.
        is_result: False: not shown to who asked for the result alone.
    """
    _show(_Entries(entries), is_shown=is_result or not is_quiet())


class _Entries:
    """Texts in a column of their own behind their names, or below them where there is no room for two columns."""

    def __init__(self, entries: Sequence[tuple[str, str]]):
        self._entries = [(printable(name), printable(text)) for name, text in entries]

    def __rich_console__(self, console: Console, _: object) -> Any:
        indent = max(len(name) for name, _ in self._entries) + 2
        width = _text_width(console)
        is_narrow = width is not None and width - indent < _SHORTEST_TEXT
        for name, text in self._entries:
            if is_narrow:
                shown = f"{name}\n{filled(text, width, start='  ', indent='  ')}"
            else:
                shown = filled(text, width, start=f"{name:<{indent}}", indent=" " * indent)
            line = Text(shown)
            line.stylize("bold", 0, len(name))
            yield line


def _show(content: "str | FigureTable | _Entries", *, style: str | None = None, is_shown: bool = True) -> None:
    # Rich would break a word that is longer than a line; the lines of a text are broken here, or not at all.
    is_text = isinstance(content, str | _Entries)
    if speaks() and is_shown:
        console = Console(**_PLAIN)
        console.print(_printed(content, _text_width(console)), style=style, soft_wrap=is_text)
    if _logger.isEnabledFor(logging.DEBUG):
        file = io.StringIO()
        Console(file=file, width=_FILE_WIDTH, color_system=None, **_PLAIN).print(_printed(content), soft_wrap=is_text)
        _keep("\n".join(line.rstrip() for line in file.getvalue().splitlines()))


def _keep(text: str) -> None:
    """A line for the log file; a table begins below the time."""
    _logger.debug("%s%s", "\n" * ("\n" in text), text)


def _printed(content: "str | FigureTable | _Entries", width: int | None = None) -> RenderableType:
    """A text as lines of a width; a list item goes on below its first word. Tables and entries do it for themselves."""
    if not isinstance(content, str):
        return content
    lines = printable(content).split("\n")
    return "\n".join(filled(line, width, indent="  " if line.startswith("- ") else "") for line in lines)


def _text_width(console: Console) -> int | None:
    """Where lines of text are broken; None in a pipe, whose reader may search for words."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else None
