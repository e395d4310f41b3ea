"""The pass over all rows before any model is loaded: which rows are good, which are bad, and why."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flexkd.data.examples.label_classes import LabelNames
from flexkd.data.examples.label_values import short_repr
from flexkd.data.examples.labels import Label, LabelCell, LabelColumn, LabelSpace, ParsedLabel, read_labels
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.data.sources.table import Row, Table, column_problems
from flexkd.errors import DataError

logger = logging.getLogger(__name__)

MAXIMUM_CHARACTERS: Final = 999_999
"""A row with a longer text is bad: it is likely a whole file or an unclosed quote, and would stall the tokenizer."""

MOST_BAD_ROWS: Final = 0.1
"""Share of the rows of a source that may be bad; with more, the source was likely misread and is refused."""

BadRowsPolicy = Literal["skip_few", "skip", "stop"]
"""What to do with bad rows: skip at most a tenth of a source, skip any number, or stop at any."""

_SHOWN: Final = 10
_PLACES: Final = 3


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not used.

    Attributes:
        reason: The kind of fault, then ": " and the value where there is one.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class GoodRow:
    """A row that can be used, with its label."""

    where: str
    texts: tuple[str, ...]
    label: Label | None


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Good and bad rows by split, and the classes of the labels."""

    good: Mapping[str, Sequence[GoodRow]]
    bad: Mapping[str, Sequence[BadRow]]
    labels: LabelSpace
    label_notes: tuple[str, ...] = ()


def check_columns(
    sources: Mapping[str, str],
    tables: Mapping[str, Table],
    columns: Sequence[str],
    *,
    lacking: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Refuse sources that lack a column, in all or in some of their files; all of them in one message.

    Args:
        lacking: Split -> columns that some of the files of its source may lack.
    """
    problems = []
    for split, table in tables.items():
        by_file = table.columns_by_file or {sources[split]: table.columns}
        for column in columns:
            everywhere = column not in (lacking or {}).get(split, ())
            for problem in column_problems(column, by_file, "data", everywhere=everywhere):
                problems.append(f"{sources[split]}: {problem}{_separator_hint(table)}")
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _separator_hint(table: Table) -> str:
    header = table.columns[0] if len(table.columns) == 1 and not table.is_typed else ""
    mark = next((mark for mark in ",;\t|" if mark in header), None)
    advice = "Name the file .csv, or correct data.separator."
    return f" The whole header is one column that holds {mark!r}: is that the separator? {advice}" if mark else ""


def check_rows(
    tables: Mapping[str, Table],
    *,
    texts: Sequence[str],
    label: str,
    problem: str,
    label_names: LabelNames | None,
    unlabelled: Literal["skip", "keep"],
    teacher: ModelLabels | None = None,
) -> CheckedRows:
    """Check every row of every split.

    Args:
        texts: Column of the first text and, for sentence pairs, of the second.
        label: Column of the label.
        unlabelled: "keep" accepts rows without a label in the training split.
        teacher: Labels of a teacher that is used without fine-tuning.

    Raises:
        DataError: The labels as a whole make no sense.
        VocabularyError: The labels do not fit the teacher's.
    """
    faults = {split: [row_fault(row, texts) for row in table.rows] for split, table in tables.items()}
    columns = [_label_column(table, faults[split], label) for split, table in tables.items()]
    parsed = read_labels(columns, column=label, problem=problem, label_names=label_names, teacher=teacher)
    if parsed.mapping:
        logger.info("data.label: %s", parsed.mapping)
    good: dict[str, list[GoodRow]] = {split: [] for split in tables}
    bad: dict[str, list[BadRow]] = {split: [] for split in tables}
    for (split, table), column in zip(tables.items(), parsed.labels, strict=True):
        labels = iter(column)
        for row, fault in zip(table.rows, faults[split], strict=True):
            target = ParsedLabel(None, fault) if fault is not None else next(labels)
            is_kept = target.is_missing and unlabelled == "keep" and split == "train"
            if target.reason is not None and not is_kept:
                bad[split].append(BadRow(row.where, target.reason))
            else:
                good[split].append(GoodRow(row.where, tuple(str(row.values[text]) for text in texts), target.label))
    return CheckedRows(good, bad, parsed.space, parsed.notes)


def count_reasons(bad_rows: Sequence[BadRow]) -> dict[str, int]:
    """Number of bad rows by kind of fault, the most frequent first."""
    return {kind: len(rows) for kind, rows in _by_kind(bad_rows).items()}


def row_counts(tables: Mapping[str, Table]) -> dict[str, int]:
    """Number of rows of each source, good and bad."""
    return {split: len(table.rows) for split, table in tables.items()}


def report_bad_rows(
    bad_rows: Mapping[str, Sequence[BadRow]],
    sizes: Mapping[str, int],
    policy: BadRowsPolicy,
    *,
    label: str | None = None,
) -> None:
    """Log the bad rows that are skipped, or refuse them.

    Args:
        bad_rows: By split; under "" where all splits are checked together.
        sizes: Number of rows, good and bad, under the same names.
        policy: "skip_few" refuses more than a tenth of the rows of a source, "stop" any, "skip" only all of them.
        label: Column of the labels, which rows may lack on purpose.

    Raises:
        DataError: There are more bad rows than the policy allows, or no good row.
    """
    everywhere = [row for rows in bad_rows.values() for row in rows]
    if not everywhere:
        return
    num_rows = sum(sizes.values())
    count = f"{len(everywhere):,} of {num_rows:,} rows"
    if policy == "stop" or len(everywhere) == num_rows:
        advice = (
            "Correct them, or set bad_rows: skip." if len(everywhere) < num_rows else "Nothing is left; correct them."
        )
        raise DataError(_listing(f"data: {count} are bad. {advice}", everywhere))
    if policy == "skip_few":
        over = [split for split, rows in bad_rows.items() if len(rows) > MOST_BAD_ROWS * sizes[split]]
        if over:
            raise DataError("\n".join(_too_many(split, bad_rows[split], sizes[split], label) for split in over))
    kinds = [f"{kind}: {len(rows):,}, first {rows[0].where}" for kind, rows in _by_kind(everywhere).items()]
    logger.warning("data: %s are skipped (%s). Set bad_rows: stop to refuse them.", count, "; ".join(kinds))


def _too_many(split: str, bad_rows: Sequence[BadRow], num_rows: int, label: str | None) -> str:
    kinds = _by_kind(bad_rows)
    is_unlabelled = split == "train" and any(f"{label} is {why}" in kinds for why in ("null", "empty", "NaN"))
    keep = ", or data.unlabelled: keep to learn rows without a label from the teacher alone" if is_unlabelled else ""
    where = f"data.{split}" if split else "data"
    headline = (
        f"{where}: {len(bad_rows):,} of {num_rows:,} rows cannot be used, more than a tenth. Correct them, or set"
        f" data.bad_rows: skip to go on without them{keep}."
    )
    return "\n".join([headline, *(f"  {len(rows):,} x {rows[0].reason} ({_places(rows)})" for rows in kinds.values())])


def _places(bad_rows: Sequence[BadRow]) -> str:
    return ", ".join(row.where for row in bad_rows[:_PLACES]) + (", ..." if len(bad_rows) > _PLACES else "")


def _by_kind(bad_rows: Sequence[BadRow]) -> dict[str, list[BadRow]]:
    """Bad rows by kind of fault, the most frequent first."""
    kinds: dict[str, list[BadRow]] = {}
    for row in bad_rows:
        kinds.setdefault(row.reason.partition(": ")[0], []).append(row)
    return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


def _listing(headline: str, bad_rows: Sequence[BadRow]) -> str:
    lines = [f"  {row.where}: {row.reason}" for row in bad_rows[:_SHOWN]]
    more = [f"  and {len(bad_rows) - _SHOWN:,} more"] if len(bad_rows) > _SHOWN else []
    return "\n".join([headline, *lines, *more])


def _label_column(table: Table, faults: Sequence[str | None], label: str) -> LabelColumn:
    values = [
        LabelCell(row.values.get(label), row.where)
        for row, fault in zip(table.rows, faults, strict=True)
        if fault is None
    ]
    return LabelColumn(values, table.is_typed, tuple(table.class_names.get(label, ())))


def row_fault(row: Row, columns: Sequence[str]) -> str | None:
    """Why a row cannot be used: it could not be read, or a text in it is not usable; None where it can be used."""
    if row.problem is not None:
        return row.problem
    for column in columns:
        fault = text_fault(row.values.get(column))
        if fault is not None:
            return f"{column} {fault}"
    return None


def text_fault(text: object) -> str | None:
    """Why a value cannot be used as a text; None where it can be used."""
    if text is None or (isinstance(text, float) and math.isnan(text)):
        return "is null"
    if not isinstance(text, str):
        return f"is not text: {type(text).__name__} {short_repr(text)}"
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
