"""Sentences of a text, and the first one: the summary that every summarizer has to beat."""

import re
from typing import Final

_END: Final = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[]*[^\W_a-z])  # before a capital, a digit, another script
      | (?<=[\u3002\uff01\uff1f])                                     # full stops that no space follows
      | \s*\n\s*\n\s*                                                 # a new paragraph
    """,
    re.VERBOSE,
)
_ABBREVIATION: Final = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|No|Fig)|\b[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """Sentences in order, each on one line; without a list of abbreviations for every language it is a good guess.

    Example:
        >>> sentences("A tool for e.g. Debian. It is small.")
        ['A tool for e.g. Debian.', 'It is small.']
    """
    found: list[str] = []
    for part in _END.split(text):
        line = " ".join(part.split())
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] = f"{found[-1]} {line}"
        elif line:
            found.append(line)
    return found


def first_sentence(document: str) -> str:
    """The first sentence of a document; empty where there is none."""
    return next(iter(sentences(document)), "")
