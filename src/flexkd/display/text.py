"""Text as a terminal may show it: what would act on the terminal is written out, lines end between words."""

import re
import shutil
import textwrap
from typing import Final, TextIO

_ACTING: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tabs and line ends, marks that turn the direction of writing, and halves of a pair."""


def printable(text: str) -> str:
    r"""The text with each character that a terminal would obey, or could not write, in the form of an escape.

    A label or a row may hold anything: a code that clears the screen, or a mark after which letters run backwards.

    Example:
        >>> print(printable("good\x1b[2J, bad\r"))
        good\x1b[2J, bad\r
    """
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def fitted(text: str, stream: TextIO) -> str:
    """Lines as a stream shows them: in a terminal broken between words, in a pipe, which is searched, nowhere."""
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    return "\n".join(filled(line, width, indent="  ") for line in text.split("\n"))


def filled(text: str, width: int | None, *, start: str = "", indent: str = "") -> str:
    """A text on lines of a width, broken between words; a longer word stays whole, for it is a path or a name.

    Args:
        text: On one line.
        width: None: one line.
        start: Before the first line.
        indent: Before all others.
    """
    if width is None or len(start) + len(text) <= width:
        return f"{start}{text}"
    return textwrap.fill(
        text, width, initial_indent=start, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
