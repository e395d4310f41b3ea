"""Classification and regression data: rows to labelled examples in three splits, and the rows that were left out."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flexkd.data.examples.label_classes import LabelNames, one_class_error
from flexkd.data.examples.labels import Label
from flexkd.data.examples.labels import LabelSpace as LabelSpace
from flexkd.data.examples.row_checks import BadRow as BadRow
from flexkd.data.examples.row_checks import (
    BadRowsPolicy,
    GoodRow,
    check_columns,
    check_rows,
    count_reasons,
    report_bad_rows,
    row_counts,
)
from flexkd.data.examples.splitting import (
    HashedExample,
    check_no_empty_split,
    describe_origin,
    fingerprint,
    hash_texts,
    limit_rows,
    normalize,
    order_splits,
    overlap_notes,
    sources_and_shares,
    split_off_shares,
)
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.data.sources.rows import TableReader, read_table
from flexkd.data.sources.table import AUTO_FORMAT, TextFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, with its label.

    Attributes:
        id: Place in the source and a hash of the content: stable across runs, and changed by any change of the text.
        label: Class index, value, or one flag per class; None where the row has no label.
    """

    id: str
    texts: tuple[str, ...]
    label: Label | None


@dataclass(frozen=True)
class ClassificationData:
    """The three splits of a task, and the rows that are in none of them.

    Attributes:
        sources: Where each split comes from, in words.
        fingerprint: Changes with any text, label or label name of any split; not with the order of rows or the seed.
        notes: What a reader of the results should know, such as test texts that are also in train.
        label_notes: What was concluded about the classes.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: LabelSpace
    bad_rows: tuple[BadRow, ...]
    sources: dict[str, str]
    fingerprint: str
    notes: tuple[str, ...] = ()
    label_notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def skipped(self) -> dict[str, int]:
        """Number of bad rows by kind of fault."""
        return count_reasons(self.bad_rows)


def load_classification(
    *,
    train: str,
    validation: str | float,
    test: str | float,
    text: str,
    text_pair: str | None,
    label: str,
    problem: str = "single_label",
    label_names: LabelNames | None = None,
    teacher: ModelLabels | None = None,
    where: Mapping[str, object] | None = None,
    bad_rows: BadRowsPolicy = "skip_few",
    unlabelled: Literal["skip", "keep"] = "skip",
    max_rows: int | None = None,
    text_format: TextFormat = AUTO_FORMAT,
    seed: int = 0,
    reader: TableReader = read_table,
) -> ClassificationData:
    """Read, check and split the rows of a classification or regression task.

    Shares of train are split off by the hash of the texts: equal texts go into one split, and a text stays in its split
    when rows are added or reordered. The size of a split is therefore only close to its share.

    Args:
        train: Source, as in `read_rows`.
        validation: Source, or share of train.
        test: Source, or share of train.
        text: Column of the first text; `text_pair` is the column of the second text of sentence pairs.
        label: Column of the label.
        problem: "single_label", "multi_label" or "regression".
        label_names: The classes in their order, or for each stored value the name of its class.
        teacher: Labels of a teacher that is used without fine-tuning; classes with its names take its order.
        where: Column -> value that the rows of every source must have.
        bad_rows: "skip_few" skips at most a tenth of the rows of a source, "skip" any number, "stop" none.
        unlabelled: "keep" puts rows without a label into train, with label None; in other splits they are bad rows.
        max_rows: Largest number of rows used of each source, chosen by the hash of the texts.
        text_format: Separator and encoding of text files.
        seed: Shuffles train; the order of the other splits is the same for every seed.
        reader: Reads a source.

    Raises:
        DataError: No rows, a missing column, labels that make no sense, one class only, an empty split, or more bad
            rows than `bad_rows` allows.
        VocabularyError: The classes do not fit the teacher's labels.
    """
    origins: dict[str, str | float] = {"train": train, "validation": validation, "test": test}
    files, shares = sources_and_shares(origins)
    texts = [text] if text_pair is None else [text, text_pair]
    read = partial(reader, where=where, columns=[*texts, label], text_format=text_format)
    tables = {split: read(source, split=split) for split, source in files.items()}
    check_columns(files, tables, [*texts, label], lacking={"train": [label]} if unlabelled == "keep" else None)
    checked = check_rows(
        tables,
        texts=texts,
        label=label,
        problem=problem,
        label_names=label_names,
        unlabelled=unlabelled,
        teacher=teacher,
    )
    report_bad_rows(checked.bad, row_counts(tables), bad_rows, label=label)
    pools = {split: limit_rows([_hash_example(row) for row in rows], max_rows) for split, rows in checked.good.items()}
    splits, held_back = split_off_shares(pools, shares, f"{label} is null: its text is in validation or test")
    check_no_empty_split(splits, origins)
    _check_labels(splits["train"], label, checked.labels)
    notes = _notes(splits, checked.labels)
    return ClassificationData(
        **order_splits(splits, seed),
        labels=checked.labels,
        bad_rows=(*(row for rows in checked.bad.values() for row in rows), *held_back),
        sources={split: describe_origin(source) for split, source in origins.items()},
        fingerprint=fingerprint(splits, (checked.labels.problem, checked.labels.names)),
        notes=notes,
        label_notes=checked.label_notes,
    )


def _hash_example(row: GoodRow) -> HashedExample[Example]:
    content = (str(len(row.texts[0])), *row.texts)
    key = hash_texts(map(normalize, row.texts))
    example = Example(f"{row.where}#{hash_texts(content)[:6].hex()}", row.texts, row.label)
    identity = hash_texts(content) + repr(row.label).encode()
    return HashedExample(example, identity, key, side=key, may_leave=row.label is not None)


def _check_labels(train: Sequence[HashedExample[Example]], label: str, labels: LabelSpace) -> None:
    distinct = {entry.example.label for entry in train} - {None}
    if len(distinct) < 2:
        label_value = next(iter(distinct), None)
        name = labels.names[label_value] if isinstance(label_value, int) else label_value
        raise one_class_error("data.train", label, name)


def _notes(splits: Mapping[str, Sequence[HashedExample[Example]]], labels: LabelSpace) -> tuple[str, ...]:
    notes = (*overlap_notes(splits), *_missing_classes(splits["train"], labels))
    for note in notes:
        logger.warning("data: %s", note)
    return notes


def _missing_classes(train: Sequence[HashedExample[Example]], labels: LabelSpace) -> list[str]:
    if labels.problem != "single_label":
        return []
    counts = Counter(entry.example.label for entry in train)
    return [f"class '{name}' has no row in train." for index, name in enumerate(labels.names) if not counts[index]]
