"""The one pass over all rows before any model is loaded: which are good, which are bad and why."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flexkd.data.files import Row, Table
from flexkd.data.labels import Label, LabelSpace, LabelValue, label_reader, parsed_labels, shown
from flexkd.errors import DataError, unknown_name

logger = logging.getLogger(__name__)

MAXIMUM_CHARACTERS: Final = 999_999
"""A longer text is a bad row: at this size it is a whole file or a broken quote, and one row stalls a tokenizer."""

_SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not used.

    Attributes:
        reason: What kind of fault, then ": " and the value where there is one.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class GoodRow:
    """A row that passed, with the meaning of its label."""

    where: str
    texts: tuple[str, ...]
    label: Label | None


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """What the pass found, by split."""

    good: Mapping[str, Sequence[GoodRow]]
    bad: Sequence[BadRow]
    labels: LabelSpace


def check_columns(sources: Mapping[str, str], tables: Mapping[str, Table], columns: Sequence[str]) -> None:
    """Refuses sources that lack a column, all of them in one message."""
    problems = []
    for split, table in tables.items():
        # A table in which no row could be read has no columns; its rows are judged one by one.
        for column in columns if table.columns else ():
            if column not in table.columns:
                message = unknown_name("data", "column", column, table.columns)
                problems.append(f"{sources[split]}: {message}{_separator_hint(table)}")
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _separator_hint(table: Table) -> str:
    only = table.columns[0] if len(table.columns) == 1 and not table.is_typed else ""
    mark = next((mark for mark in ",;\t|" if mark in only), None)
    return f" The whole header is one column that holds {mark!r}: is the file separated by that?" if mark else ""


def check_rows(
    tables: Mapping[str, Table],
    *,
    texts: Sequence[str],
    label: str,
    problem: str,
    label_names: Sequence[str] | None,
    unlabelled: Literal["skip", "keep"],
) -> CheckedRows:
    """Judges every row of every split.

    Args:
        texts: The columns of the first and, in pair tasks, the second text.
        unlabelled: "keep" lets rows without a label pass in the training split.
    """
    faults = {split: [row_fault(row, texts) for row in table.rows] for split, table in tables.items()}
    values = {
        split: _label_values(table, faults[split], label, problem, label_names or ()) for split, table in tables.items()
    }
    stored_names = next((names for t in tables.values() if (names := t.class_names.get(label))), None)
    space, read = label_reader(
        [value for column in values.values() for value in column],
        column=label,
        problem=problem,
        label_names=label_names,
        stored_names=stored_names,
    )
    good: dict[str, list[GoodRow]] = {split: [] for split in tables}
    bad: list[BadRow] = []
    for split, table in tables.items():
        labels = iter(values[split])
        for row, fault in zip(table.rows, faults[split], strict=True):
            if fault is not None:
                bad.append(BadRow(row.where, fault))
                continue
            target, reason = read(next(labels).value)
            if target is None and reason is None and (unlabelled == "skip" or split != "train"):
                reason = f"{label} is null"
            if reason is not None:
                bad.append(BadRow(row.where, reason))
            else:
                good[split].append(GoodRow(row.where, tuple(str(row.values[text]) for text in texts), target))
    return CheckedRows(good, bad, space)


def count_reasons(bad_rows: Sequence[BadRow]) -> dict[str, int]:
    """How many rows each kind of fault took, the most frequent first."""
    return dict(Counter(row.reason.partition(": ")[0] for row in bad_rows).most_common())


def report_bad_rows(bad_rows: Sequence[BadRow], num_rows: int, policy: Literal["skip", "stop"]) -> None:
    """Logs what is skipped; with the policy "stop", or when no row is left, refuses it.

    Args:
        num_rows: All rows that were read, good and bad.
    """
    if not bad_rows:
        return
    count = f"{len(bad_rows):,} of {num_rows:,} rows"
    if policy == "stop" or len(bad_rows) == num_rows:
        lines = [f"  {row.where}: {row.reason}" for row in bad_rows[:_SHOWN]]
        more = [f"  and {len(bad_rows) - _SHOWN:,} more"] if len(bad_rows) > _SHOWN else []
        cure = "Correct them, or set bad_rows: skip." if len(bad_rows) < num_rows else "Nothing is left; correct them."
        raise DataError("\n".join([f"data: {count} are bad. {cure}", *lines, *more]))
    first: dict[str, str] = {}
    for row in bad_rows:
        first.setdefault(row.reason.partition(": ")[0], row.where)
    kinds = [f"{kind}: {number:,}, first {first[kind]}" for kind, number in count_reasons(bad_rows).items()]
    logger.warning("data: %s are skipped (%s). Set bad_rows: stop to refuse them.", count, "; ".join(kinds))


def _label_values(
    table: Table, faults: Sequence[str | None], label: str, problem: str, label_names: Sequence[str]
) -> list[LabelValue]:
    values = [
        LabelValue(row.values.get(label), row.where)
        for row, fault in zip(table.rows, faults, strict=True)
        if fault is None
    ]
    return values if table.is_typed else parsed_labels(values, problem, label_names)


def row_fault(row: Row, columns: Sequence[str]) -> str | None:
    """Why a row cannot be used: it could not be read, or one of its texts is none; None where it can."""
    if row.problem is not None:
        return row.problem
    for column in columns:
        fault = text_fault(row.values.get(column))
        if fault is not None:
            return f"{column} {fault}"
    return None


def text_fault(text: object) -> str | None:
    """Why a value cannot be used as a text; None where it can."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return "is null"
    if not isinstance(text, str):
        return f"is not text: {type(text).__name__} {shown(text)}"
    if not text:
        return "is empty"
    if len(text) > MAXIMUM_CHARACTERS:
        return f"is too long: {len(text):,} characters, at most {MAXIMUM_CHARACTERS:,}"
    stripped = text.strip()
    if not stripped:
        return "is only whitespace"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"holds half of a surrogate pair: U+{ord(text[error.start]):04X} at character {error.start + 1}"
    is_visible = stripped[0].isprintable() or any(c.isprintable() and not c.isspace() for c in stripped)
    return None if is_visible else "has no visible character"
