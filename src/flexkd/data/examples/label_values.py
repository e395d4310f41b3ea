"""One cell of a label column parsed the same way for every type of file: as a number, a text or a truth value."""

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
    """One parsed cell of the label column.

    Attributes:
        value: The cell as the source stores it.
        kind: "integer", "float", "boolean", "text", "missing", or the name of a type that cannot be a label.
        text: The cell as text without surrounding white space; for a missing label, the kind of empty cell.
        digits: The digits of a whole number without decimals: "01" for "01.0", "1" for 1.0.
        number: The value of a whole number.
    """

    value: object
    kind: str
    text: str
    digits: str | None = None
    number: int | None = None

    @property
    def is_text(self) -> bool:
        """Whether the source stores the cell as text."""
        return isinstance(self.value, str)

    @property
    def spelling(self) -> str:
        """The spelling of the class, independent of the type of the column: "1" for 1, 1.0 and "1.0"."""
        return self.digits or self.text

    def described(self) -> str:
        """Kind and value, for a message."""
        kind = "text" if self.is_text and self.kind in ("integer", "float", "boolean") else self.kind
        return f"{kind} {short_repr(self.value)}"


def stored_labels(values: Sequence[object], *, is_typed: bool) -> list[StoredLabel]:
    """Parse the label cells of one source.

    Where a typed source holds both numbers and texts that look like numbers, the less frequent of the two are not
    read as numbers: such a column is damaged, and only its author can tell how.

    Args:
        values: Cells of the label column, one a row.
        is_typed: False for CSV and TSV, where each cell is text.
    """
    if not is_typed:
        # In CSV an empty cell is the only way to write a missing label.
        values = [None if value is None or not str(value).strip() else str(value) for value in values]
    labels = [stored_label(value) for value in values]
    stored_as_text = Counter(label.is_text for label in labels if label.number is not None)
    if stored_as_text[True] and stored_as_text[False]:
        texts_are_fewer = stored_as_text[True] <= stored_as_text[False]
        labels = [
            replace(label, kind="text" if texts_are_fewer else "number", digits=None, number=None)
            if label.number is not None and label.is_text == texts_are_fewer
            else label
            for label in labels
        ]
    return labels


def stored_label(value: object) -> StoredLabel:
    """Parse one cell."""
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
    return StoredLabel(value, type(value).__name__, short_repr(value))


def fold_case(text: str) -> str:
    """The text in lower case and normalized code points, in which spellings of one name often differ."""
    return normalize("NFC", text.strip()).casefold()


def is_number(text: str) -> bool:
    """Whether a text is a whole number."""
    return _WHOLE.fullmatch(text.strip()) is not None


def short_repr(value: object) -> str:
    """A value as a message shows it: ASCII, at most 40 characters."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _of_number(value: float | Decimal) -> StoredLabel:
    if math.isnan(value):
        return StoredLabel(value, "missing", "NaN")
    if math.isinf(value) or value != int(value):
        return StoredLabel(value, "float", str(value))
    # A column with gaps is stored as floats, so a whole float is a class number.
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
