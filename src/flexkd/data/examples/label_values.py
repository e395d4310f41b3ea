"""One label as a file stores it to what it says, the same for every type of file: a number, a text, a truth value."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Final
from unicodedata import normalize

_WHOLE: Final = re.compile(r"([+-]?\d{1,400})(?:\.0*)?", re.ASCII)
# With an exponent only as programs print floats: 1E3 may well be a code.
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+|\d\.\d+[eE][+-]\d+)", re.ASCII)
_TRUTH: Final = ("false", "true")


@dataclass(frozen=True, slots=True)
class StoredLabel:
    """What one cell of the label column says.

    Attributes:
        value: The cell as it was read.
        kind: "integer", "float", "boolean", "text", "missing", or the name of a type that is no label.
        text: How it is written, without white space around it: the reason where it is missing.
        digits: Its digits without decimals, where it is a whole number: "01" of "01.0", "1" of 1.0.
        number: Its value, where it is a whole number.
    """

    value: object
    kind: str
    text: str
    digits: str | None = None
    number: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether the file stores it as text."""
        return isinstance(self.value, str)

    @property
    def spelling(self) -> str:
        """How the class is written, whatever the type of the column: 1 of 1, 1.0 and "1.0"."""
        return self.digits or self.text

    def described(self) -> str:
        """Kind and value, for a message."""
        kind = "text" if self.is_text and self.kind in ("integer", "float", "boolean") else self.kind
        return f"{kind} {shown(self.value)}"


def stored_labels(values: Sequence[object], *, is_typed: bool) -> list[StoredLabel]:
    """What the cells of one source say.

    In a typed source that holds numbers as well as texts that look like numbers, the fewer of them are no numbers:
    such a column is damaged, and only its reader can tell how.

    Args:
        values: Cells of the label column, one a row.
        is_typed: False for CSV and TSV, where each cell is text.
    """
    if not is_typed:
        # In CSV an empty cell is the only way to say that there is none.
        values = [None if value is None or not str(value).strip() else str(value) for value in values]
    labels = [stored_label(value) for value in values]
    stored_as_text = Counter(label.is_text for label in labels if label.number is not None)
    if stored_as_text[True] and stored_as_text[False]:
        fewer = stored_as_text[True] <= stored_as_text[False]
        labels = [
            replace(label, kind="text" if fewer else "number", digits=None, number=None)
            if label.number is not None and label.is_text == fewer
            else label
            for label in labels
        ]
    return labels


def stored_label(value: object) -> StoredLabel:
    """What one cell says."""
    if value is None:
        return StoredLabel(value, "missing", "null")
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bool):
        return StoredLabel(value, "boolean", str(value).lower())
    if isinstance(value, int):
        return StoredLabel(value, "integer", str(value), str(value), value)
    if isinstance(value, float | Decimal):
        return _of_number(value)
    return StoredLabel(value, type(value).__name__, shown(value))


def folded(text: str) -> str:
    """The text without the case and the choice of code points in which spellings of one name differ."""
    return normalize("NFC", text.strip()).casefold()


def is_number(text: str) -> bool:
    """Whether a text is a whole number."""
    return _WHOLE.fullmatch(text.strip()) is not None


def shown(value: object) -> str:
    """A value for a message: ASCII, at most 40 characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _of_number(value: float | Decimal) -> StoredLabel:
    if math.isnan(value):
        return StoredLabel(value, "missing", "NaN")
    if math.isinf(value) or value != int(value):
        return StoredLabel(value, "float", str(value))
    # A column with gaps is stored as floats, so that a whole one is a class number.
    return StoredLabel(value, "integer", str(int(value)), str(int(value)), int(value))


@lru_cache(maxsize=4096)
def _of_text(value: str) -> StoredLabel:
    text = value.strip()
    if not text:
        return StoredLabel(value, "missing", "empty")
    if text.casefold() == "nan":
        return StoredLabel(value, "missing", "NaN")
    whole = _WHOLE.fullmatch(text)
    if whole:
        return StoredLabel(value, "integer", text, whole[1], int(whole[1]))
    if _NUMBER.fullmatch(text):
        number = _of_number(float(text))
        return replace(number, value=value, text=text)
    if text.casefold() in _TRUTH:
        return StoredLabel(value, "boolean", text)
    return StoredLabel(value, "text" if _can_be_written(text) else "half of a surrogate pair", text)


def _can_be_written(text: str) -> bool:
    """False for half of a surrogate pair, which JSON may hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
