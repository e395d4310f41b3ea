"""Classification data: rows to examples with ids, labels and splits, and what was left out on the way."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    Keyed,
    check_no_empty_split,
    described,
    divided,
    fingerprint,
    hashed,
    limited,
    normalized,
    ordered,
    shared_texts,
    sources_and_shares,
)
from flexkd.data.examples.teacher_labels import ModelLabels
from flexkd.data.sources.rows import read_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, with its label.

    Attributes:
        id: Place and content: the same row has the same id in every run, a changed text another one.
        label: Class index, value, or one flag per class; None where the row has no label.
    """

    id: str
    texts: tuple[str, ...]
    label: Label | None


@dataclass(frozen=True)
class ClassificationData:
    """The three splits of a task and the account of its rows.

    Attributes:
        sources: Where each split comes from.
        fingerprint: Changes with any text, label or label name of any split; not with the order of rows or the seed.
        notes: What a reader of the results has to know, such as test texts that also stand in train.
        label_notes: What was concluded of the classes.
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
    def rows(self) -> dict[str, int]:
        """Examples in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows by kind of fault."""
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
    seed: int = 0,
) -> ClassificationData:
    """Reads, checks and splits the rows of a classification or regression task.

    A share of train is split off by the hash of the texts: equal texts fall on one side, and a text stays on its side
    when rows are added or reordered. Its size therefore only comes close to the share.

    Args:
        train: Source as `read_rows` takes it.
        validation: Source, or share of train.
        test: Source, or share of train.
        label_names: The classes in their order, or for each stored value the name of its class.
        teacher: The labels of a teacher that is used as it is: classes of its names take its order.
        where: Column -> value that the rows of every source must have.
        bad_rows: "skip_few" skips at most a tenth of the rows of a source, "skip" any number, "stop" none.
        unlabelled: "keep" takes rows without a label into train, with label None; elsewhere they are bad rows.
        max_rows: Uses at most so many rows of each source, chosen by the hash of the texts.
        seed: Orders the train rows; the other splits have one order for all seeds.

    Raises:
        DataError: No rows, a missing column, labels that make no sense, one class only, an empty split, or more bad
            rows than `bad_rows` allows.
        VocabularyError: The classes are not the teacher's.
    """
    given: dict[str, str | float] = {"train": train, "validation": validation, "test": test}
    files, shares = sources_and_shares(given)
    texts = [text] if text_pair is None else [text, text_pair]
    named = [*texts, label]
    tables = {s: read_table(source, split=s, where=where, columns=named) for s, source in files.items()}
    check_columns(files, tables, named)
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
    pools = {split: limited([_keyed(row) for row in rows], max_rows) for split, rows in checked.good.items()}
    splits, held_back = divided(pools, shares, f"{label} is null: its text stands in validation or test")
    check_no_empty_split(splits, given)
    _check_labels(splits["train"], label, checked.labels)
    notes = [*shared_texts(splits), *_missing_classes(splits["train"], checked.labels)]
    for note in notes:
        logger.warning("data: %s", note)
    return ClassificationData(
        **ordered(splits, seed),
        labels=checked.labels,
        bad_rows=(*(row for rows in checked.bad.values() for row in rows), *held_back),
        sources={split: described(source) for split, source in given.items()},
        fingerprint=fingerprint(splits, (checked.labels.problem, checked.labels.names)),
        notes=tuple(notes),
        label_notes=checked.label_notes,
    )


def _keyed(row: GoodRow) -> Keyed[Example]:
    content = (str(len(row.texts[0])), *row.texts)
    key = hashed(map(normalized, row.texts))
    example = Example(f"{row.where}#{hashed(content)[:6].hex()}", row.texts, row.label)
    identity = hashed(content) + repr(row.label).encode()
    return Keyed(example, identity, key, side=key, may_leave=row.label is not None)


def _check_labels(train: Sequence[Keyed[Example]], label: str, labels: LabelSpace) -> None:
    found = {keyed.example.label for keyed in train} - {None}
    if len(found) < 2:
        only = next(iter(found), None)
        name = labels.names[only] if isinstance(only, int) else only
        raise one_class_error("data.train", label, name)


def _missing_classes(train: Sequence[Keyed[Example]], labels: LabelSpace) -> list[str]:
    if labels.problem != "single_label":
        return []
    counts = Counter(keyed.example.label for keyed in train)
    return [f"class '{name}' has no row in train." for index, name in enumerate(labels.names) if not counts[index]]
