"""Rows to train, validation and test by the hash of their texts, the same in every run and for every order of rows."""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar, runtime_checkable

from flexkd.data.examples.row_checks import BadRow
from flexkd.errors import DataError
from flexkd.facts.names import SPLITS

_WHOLE: Final = 2**64


@runtime_checkable
class _WithId(Protocol):
    """What every kind of example has: its place and content."""

    @property
    def id(self) -> str: ...


ExampleT = TypeVar("ExampleT", bound=_WithId)


@dataclass(frozen=True)
class Keyed(Generic[ExampleT]):
    """An example with the hashes that place it.

    Attributes:
        identity: Of everything that the example holds: the fingerprint of the data is made of these.
        key: Of the texts that a model is asked about, without case and spacing: it tells copies.
        side: Of what decides the split: the key, or the group that a row belongs to.
        may_leave: False: the row is never moved out of train (it has nothing that could be scored).
    """

    example: ExampleT
    identity: bytes
    key: bytes
    side: bytes
    may_leave: bool = True

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends on the texts, or on the group, alone."""
        return int.from_bytes(self.side[:8], "big") / _WHOLE

    @property
    def place(self) -> str:
        """Where the row stands in its source."""
        return self.example.id.partition("#")[0]


def hashed(texts: Iterable[str]) -> bytes:
    """Hash of texts in their order."""
    return hashlib.blake2b("\x1f".join(texts).encode(), digest_size=16).digest()


def normalized(text: str) -> str:
    """The text without the case and spacing in which copies of it often differ: they belong on one side of a split."""
    folded = text.casefold()
    # The space is the only printable white space, so that most texts need no splitting.
    return folded.strip() if folded.isprintable() and "  " not in folded else " ".join(folded.split())


def sources_and_shares(given: Mapping[str, str | float]) -> tuple[dict[str, str], dict[str, float]]:
    """The splits that have a source of their own, and those that are a share of train.

    Raises:
        DataError: A share is none, or the shares leave nothing to train on.
    """
    sources = {split: source for split, source in given.items() if isinstance(source, str)}
    shares = {split: share for split, share in given.items() if not isinstance(share, str)}
    for split, share in shares.items():
        if not 0 < share < 1:
            raise DataError(f"data.{split}: {share} is no share of train. Give a number between 0 and 1, or a source.")
    if sum(shares.values()) >= 1:
        raise DataError(f"data.validation and data.test: {sum(shares.values()):g} of train leaves nothing to train on.")
    return sources, shares


def described(source: str | float) -> str:
    """Where a split comes from, in words."""
    return source if isinstance(source, str) else f"{source:g} of train, by the hash of the texts"


def limited(rows: Sequence[Keyed[ExampleT]], max_rows: int | None) -> list[Keyed[ExampleT]]:
    """At most `max_rows`, chosen by the hash of the texts: the same ones in every order, a subset of any more."""
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    return sorted(rows, key=_order)[:max_rows]


def divided(
    pools: Mapping[str, Sequence[Keyed[ExampleT]]], shares: Mapping[str, float], held_back: str
) -> tuple[dict[str, list[Keyed[ExampleT]]], list[BadRow]]:
    """Moves the shares out of train; a row that may not leave stays, unless its text now stands on another side.

    Args:
        held_back: The reason that is given for a row that may neither leave nor stay.

    Returns:
        The three splits, and the rows that are in none of them.
    """
    splits = {split: list(pools.get(split, [])) for split in SPLITS}
    staying = [keyed for keyed in splits["train"] if not keyed.may_leave]
    moving = [keyed for keyed in splits["train"] if keyed.may_leave]
    splits["train"] = []
    for keyed in moving:
        place = keyed.share
        for split, share in shares.items():
            if place < share:
                splits[split].append(keyed)
                break
            place -= share
        else:
            splits["train"].append(keyed)
    taken = {keyed.key for split in shares for keyed in splits[split]}
    splits["train"] += [keyed for keyed in staying if keyed.key not in taken]
    return splits, [BadRow(keyed.place, held_back) for keyed in staying if keyed.key in taken]


def check_no_empty_split(splits: Mapping[str, Sequence[Keyed[ExampleT]]], given: Mapping[str, str | float]) -> None:
    """Refuses a split without rows.

    Raises:
        DataError: Names the split and where it comes from.
    """
    total = sum(map(len, splits.values()))
    for split, rows in splits.items():
        if not rows:
            source = described(given[split])
            raise DataError(f"data.{split}: no row is left ({source}; {total:,} good rows in all). Give more rows.")


def shared_texts(splits: Mapping[str, Sequence[Keyed[ExampleT]]]) -> list[str]:
    """Notes on texts that stand in more than one split."""
    notes = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        keys = {keyed.key for keyed in splits[other]}
        shared = [keyed.place for keyed in splits[split] if keyed.key in keys]
        if shared:
            count = f"{len(shared):,} of {len(splits[split]):,} rows of {split}"
            notes.append(f"{count} also stand in {other}, by their texts (first {shared[0]}).")
    return notes


def fingerprint(splits: Mapping[str, Sequence[Keyed[ExampleT]]], header: object) -> str:
    """Changes with any row of any split, not with their order.

    Args:
        header: What else it depends on, such as the names of the labels.
    """
    total = hashlib.blake2b(repr(header).encode(), digest_size=16)
    for split, rows in splits.items():
        total.update(f"{split}:{len(rows)}".encode())
        for line in sorted(keyed.identity for keyed in rows):
            total.update(line)
    return total.hexdigest()


def ordered(splits: Mapping[str, Sequence[Keyed[ExampleT]]], seed: int) -> dict[str, tuple[ExampleT, ...]]:
    """One order of the texts, whatever the order of the rows in the source; the seed shuffles train alone."""
    examples = {split: [keyed.example for keyed in sorted(rows, key=_order)] for split, rows in splits.items()}
    random.Random(seed).shuffle(examples["train"])
    return {split: tuple(rows) for split, rows in examples.items()}


def _order(keyed: Keyed[ExampleT]) -> tuple[bytes, bytes, str]:
    # The half of the hash that the split does not use, so that neither choice leans on the other.
    return keyed.key[8:], keyed.identity, keyed.example.id
