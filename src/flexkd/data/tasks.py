"""Classification data: rows to examples with ids, labels and splits, and what was left out on the way."""

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flexkd.data.labels import Label
from flexkd.data.labels import LabelSpace as LabelSpace
from flexkd.data.sources import read_table
from flexkd.data.validation import BadRow as BadRow
from flexkd.data.validation import GoodRow, check_columns, check_rows, count_reasons, report_bad_rows
from flexkd.errors import DataError

logger = logging.getLogger(__name__)

_SPLITS: Final = ("train", "validation", "test")
_WHOLE: Final = 2**64


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
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: LabelSpace
    bad_rows: tuple[BadRow, ...]
    sources: dict[str, str]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> dict[str, int]:
        """Examples in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows by kind of fault."""
        return count_reasons(self.bad_rows)


@dataclass(frozen=True)
class _KeyedExample:
    """An example with two hashes of its texts.

    Attributes:
        identity: Of the texts as they stand.
        key: Of the texts without case and spacing: it decides the split, and tells copies.
    """

    example: Example
    identity: bytes
    key: bytes

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends on the texts alone."""
        return int.from_bytes(self.key[:8], "big") / _WHOLE


def load_classification(
    *,
    train: str,
    validation: str | float,
    test: str | float,
    text: str,
    text_pair: str | None,
    label: str,
    problem: str = "single_label",
    label_names: Sequence[str] | None = None,
    where: Mapping[str, object] | None = None,
    bad_rows: Literal["skip", "stop"] = "skip",
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
        where: Column -> value that the rows of every source must have.
        unlabelled: "keep" takes rows without a label into train, with label None; elsewhere they are bad rows.
        max_rows: Uses at most so many rows of each source, chosen by the hash of the texts.
        seed: Orders the train rows; the other splits have one order for all seeds.

    Raises:
        DataError: No rows, a missing column, labels that make no sense, one class only, an empty split, or, with
            bad_rows "stop", any bad row.
    """
    given: dict[str, str | float] = {"train": train, "validation": validation, "test": test}
    files = {split: source for split, source in given.items() if isinstance(source, str)}
    shares = {split: share for split, share in given.items() if not isinstance(share, str)}
    _check_shares(shares)
    tables = {split: read_table(source, split=split, where=where) for split, source in files.items()}
    texts = [text] if text_pair is None else [text, text_pair]
    check_columns(files, tables, [*texts, label])
    checked = check_rows(
        tables, texts=texts, label=label, problem=problem, label_names=label_names, unlabelled=unlabelled
    )
    report_bad_rows(checked.bad, sum(len(table.rows) for table in tables.values()), bad_rows)
    pools = {split: _limited([_keyed(row) for row in rows], max_rows) for split, rows in checked.good.items()}
    splits, held_back = _divided(pools, shares, label)
    _check_splits(splits, given, label, checked.labels)
    notes = [*_shared_texts(splits), *_missing_classes(splits["train"], checked.labels)]
    for note in notes:
        logger.warning("data: %s", note)
    fingerprint = _fingerprint(splits, checked.labels)
    # One order of the texts, whatever the order of the rows in the source.
    ordered = {split: [keyed.example for keyed in sorted(rows, key=_order)] for split, rows in splits.items()}
    random.Random(seed).shuffle(ordered["train"])
    return ClassificationData(
        **{split: tuple(examples) for split, examples in ordered.items()},
        labels=checked.labels,
        bad_rows=(*checked.bad, *held_back),
        sources={split: _described(source) for split, source in given.items()},
        fingerprint=fingerprint,
        notes=tuple(notes),
    )


def _check_shares(shares: Mapping[str, float]) -> None:
    for split, share in shares.items():
        if not 0 < share < 1:
            raise DataError(f"data.{split}: {share} is no share of train. Give a number between 0 and 1, or a source.")
    if sum(shares.values()) >= 1:
        raise DataError(f"data.validation and data.test: {sum(shares.values()):g} of train leaves nothing to train on.")


def _described(source: str | float) -> str:
    return source if isinstance(source, str) else f"{source:g} of train, by the hash of the texts"


def _keyed(row: GoodRow) -> _KeyedExample:
    content = "\x1f".join((str(len(row.texts[0])), *row.texts))
    identity = hashlib.blake2b(content.encode(), digest_size=16).digest()
    normal = "\x1f".join(map(_normalized, row.texts))
    key = hashlib.blake2b(normal.encode(), digest_size=16).digest()
    return _KeyedExample(Example(f"{row.where}#{identity[:6].hex()}", row.texts, row.label), identity, key)


def _normalized(text: str) -> str:
    """The text without the case and spacing in which copies of it often differ: they belong on one side of a split."""
    folded = text.casefold()
    # The space is the only printable white space, so that most texts need no splitting.
    return folded.strip() if folded.isprintable() and "  " not in folded else " ".join(folded.split())


def _order(keyed: _KeyedExample) -> tuple[bytes, str]:
    # The half of the hash that the split does not use, so that neither choice leans on the other.
    return keyed.key[8:], keyed.example.id


def _limited(rows: Sequence[_KeyedExample], max_rows: int | None) -> list[_KeyedExample]:
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    return sorted(rows, key=_order)[:max_rows]


def _divided(
    pools: Mapping[str, list[_KeyedExample]], shares: Mapping[str, float], label: str
) -> tuple[dict[str, list[_KeyedExample]], list[BadRow]]:
    """Moves the shares out of train; a row without a label stays, unless its text now stands on another side."""
    splits = {split: list(pools.get(split, [])) for split in _SPLITS}
    unlabelled = [keyed for keyed in splits["train"] if keyed.example.label is None]
    labelled = [keyed for keyed in splits["train"] if keyed.example.label is not None]
    splits["train"] = []
    for keyed in labelled:
        place = keyed.share
        for split, share in shares.items():
            if place < share:
                splits[split].append(keyed)
                break
            place -= share
        else:
            splits["train"].append(keyed)
    taken = {keyed.key for split in shares for keyed in splits[split]}
    splits["train"] += [keyed for keyed in unlabelled if keyed.key not in taken]
    held_back = [keyed.example for keyed in unlabelled if keyed.key in taken]
    reason = f"{label} is null: its text stands in validation or test"
    return splits, [BadRow(example.id.partition("#")[0], reason) for example in held_back]


def _check_splits(
    splits: Mapping[str, Sequence[_KeyedExample]], given: Mapping[str, str | float], label: str, labels: LabelSpace
) -> None:
    total = sum(map(len, splits.values()))
    for split, rows in splits.items():
        if not rows:
            source = _described(given[split])
            raise DataError(f"data.{split}: no row is left ({source}; {total:,} good rows in all). Give more rows.")
    found = {keyed.example.label for keyed in splits["train"]} - {None}
    if len(found) < 2:
        only = next(iter(found), None)
        name = labels.names[only] if isinstance(only, int) else only
        raise DataError(
            f"data.train: every row has the same {label}, {name!r}, so there is nothing to learn."
            " Check data.label and data.where, or give rows of at least two."
        )


def _shared_texts(splits: Mapping[str, Sequence[_KeyedExample]]) -> list[str]:
    notes = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        keys = {keyed.key for keyed in splits[other]}
        shared = [keyed.example.id.partition("#")[0] for keyed in splits[split] if keyed.key in keys]
        if shared:
            count = f"{len(shared):,} of {len(splits[split]):,} rows of {split}"
            notes.append(f"{count} also stand in {other}, by their texts (first {shared[0]}).")
    return notes


def _missing_classes(train: Sequence[_KeyedExample], labels: LabelSpace) -> list[str]:
    if labels.problem != "single_label":
        return []
    counts = Counter(keyed.example.label for keyed in train)
    return [f"class '{name}' has no row in train." for index, name in enumerate(labels.names) if not counts[index]]


def _fingerprint(splits: Mapping[str, Sequence[_KeyedExample]], labels: LabelSpace) -> str:
    total = hashlib.blake2b(repr((labels.problem, labels.names)).encode(), digest_size=16)
    for split, rows in splits.items():
        total.update(f"{split}:{len(rows)}".encode())
        for line in sorted(keyed.identity + repr(keyed.example.label).encode() for keyed in rows):
            total.update(line)
    return total.hexdigest()
