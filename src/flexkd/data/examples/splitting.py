"""Examples to train, validation and test by the hash of their texts, independent of run and row order."""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar, runtime_checkable

from flexkd.data.examples.row_checks import BadRow
from flexkd.errors import DataError
from flexkd.facts.names import SPLITS

_NUM_HASHES: Final = 2**64


@runtime_checkable
class _WithId(Protocol):
    """An example of any kind of task."""

    @property
    def id(self) -> str: ...


ExampleT = TypeVar("ExampleT", bound=_WithId)


@dataclass(frozen=True)
class HashedExample(Generic[ExampleT]):
    """An example with the hashes that decide its split.

    Attributes:
        identity: Hash of the whole content of the example; the fingerprint of the data is made from these.
        key: Hash of the texts that a model reads, without case and spacing: equal keys are copies of one text.
        side: Hash that decides the split: the key, or the hash of the group that a row belongs to.
        may_leave: Whether the example may move out of train; one without a label cannot be scored, so it may not.
    """

    example: ExampleT
    identity: bytes
    key: bytes
    side: bytes
    may_leave: bool = True

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends only on the texts, or on the group."""
        return int.from_bytes(self.side[:8], "big") / _NUM_HASHES

    @property
    def place(self) -> str:
        """File and line of the row, or source and row number."""
        return self.example.id.partition("#")[0]


def hash_texts(texts: Iterable[str]) -> bytes:
    """Hash of several texts in their order."""
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=16).digest()


def normalize(text: str) -> str:
    """The text without case and extra spacing, in which copies of one text often differ."""
    folded = text.casefold()
    # The space is the only printable white space, so most texts need no splitting.
    return folded.strip() if folded.isprintable() and "  " not in folded else " ".join(folded.split())


def sources_and_shares(origins: Mapping[str, str | float]) -> tuple[dict[str, str], dict[str, float]]:
    """Splits that are read from a source, and splits that are a share of train.

    Args:
        origins: Split -> its source, or its share of train.

    Raises:
        DataError: A share is not between 0 and 1, or the shares leave nothing to train on.
    """
    sources = {split: source for split, source in origins.items() if isinstance(source, str)}
    shares = {split: share for split, share in origins.items() if not isinstance(share, str)}
    for split, share in shares.items():
        if not 0 < share < 1:
            raise DataError(f"data.{split}: {share} is no share of train. Give a number between 0 and 1, or a source.")
    if sum(shares.values()) >= 1:
        raise DataError(f"data.validation and data.test: {sum(shares.values()):g} of train leaves nothing to train on.")
    return sources, shares


def describe_origin(origin: str | float) -> str:
    """Where a split comes from, in words."""
    return origin if isinstance(origin, str) else f"{origin:g} of train, by the hash of the texts"


def limit_rows(examples: Sequence[HashedExample[ExampleT]], max_rows: int | None) -> list[HashedExample[ExampleT]]:
    """At most `max_rows` examples, chosen by the hash of their texts, so that a smaller number gives a subset."""
    if max_rows is None or len(examples) <= max_rows:
        return list(examples)
    return sorted(examples, key=_order)[:max_rows]


def split_off_shares(
    pools: Mapping[str, Sequence[HashedExample[ExampleT]]], shares: Mapping[str, float], held_back: str
) -> tuple[dict[str, list[HashedExample[ExampleT]]], list[BadRow]]:
    """Move shares of train into the other splits.

    An example that may not leave stays in train, unless a copy of its text has moved to another split.

    Args:
        pools: Examples of each split that has a source.
        shares: Split -> share of train that moves there.
        held_back: The reason given for an example that can neither leave nor stay.

    Returns:
        The three splits, and the rows that are in none of them.
    """
    splits = {split: list(pools.get(split, [])) for split in SPLITS}
    staying = [entry for entry in splits["train"] if not entry.may_leave]
    moving = [entry for entry in splits["train"] if entry.may_leave]
    splits["train"] = []
    for entry in moving:
        position = entry.share
        for split, share in shares.items():
            if position < share:
                splits[split].append(entry)
                break
            position -= share
        else:
            splits["train"].append(entry)
    moved_keys = {entry.key for split in shares for entry in splits[split]}
    splits["train"] += [entry for entry in staying if entry.key not in moved_keys]
    return splits, [BadRow(entry.place, held_back) for entry in staying if entry.key in moved_keys]


def check_no_empty_split(
    splits: Mapping[str, Sequence[HashedExample[ExampleT]]], origins: Mapping[str, str | float]
) -> None:
    """Refuse a split without rows.

    Raises:
        DataError: Names the split and where it comes from.
    """
    total = sum(map(len, splits.values()))
    for split, examples in splits.items():
        if not examples:
            source = describe_origin(origins[split])
            raise DataError(f"data.{split}: no row is left ({source}; {total:,} good rows in all). Give more rows.")


def overlap_notes(splits: Mapping[str, Sequence[HashedExample[ExampleT]]]) -> list[str]:
    """Notes on texts that are in more than one split."""
    notes = []
    for split, earlier_split in (("validation", "train"), ("test", "train"), ("test", "validation")):
        keys = {entry.key for entry in splits[earlier_split]}
        shared = [entry.place for entry in splits[split] if entry.key in keys]
        if shared:
            count = f"{len(shared):,} of {len(splits[split]):,} rows of {split}"
            notes.append(f"{count} are also in {earlier_split}, by their texts (first {shared[0]}).")
    return notes


def fingerprint(splits: Mapping[str, Sequence[HashedExample[ExampleT]]], header: object) -> str:
    """A hash that changes with any example of any split, but not with their order.

    Args:
        header: Anything else the hash depends on, such as the names of the labels.
    """
    digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
    for split, examples in splits.items():
        digest.update(f"{split}:{len(examples)}".encode())
        for identity in sorted(entry.identity for entry in examples):
            digest.update(identity)
    return digest.hexdigest()


def order_splits(splits: Mapping[str, Sequence[HashedExample[ExampleT]]], seed: int) -> dict[str, tuple[ExampleT, ...]]:
    """Examples in an order that does not depend on the order of the source; only train is shuffled by the seed."""
    examples = {split: [entry.example for entry in sorted(pool, key=_order)] for split, pool in splits.items()}
    random.Random(seed).shuffle(examples["train"])
    return {split: tuple(rows) for split, rows in examples.items()}


def _order(entry: HashedExample[ExampleT]) -> tuple[bytes, bytes, str]:
    # The half of the hash that the split does not use, so that the two choices are independent.
    return entry.key[8:], entry.identity, entry.example.id
