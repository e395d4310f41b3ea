"""Instruction and summarization data: rows to examples with prompts, answers and splits, and what was left out."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flexkd.data.examples.row_checks import (
    BadRow,
    BadRowsPolicy,
    check_columns,
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
from flexkd.data.examples.turns import EMPTY_ANSWER, GenerationKind, GoodAnswer, Layout, read_row
from flexkd.data.examples.turns import Turn as Turn
from flexkd.data.sources.files import Table
from flexkd.data.sources.rows import read_table
from flexkd.errors import DataError, unknown_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationExample:
    """One question with its right answers.

    Attributes:
        id: Place and content: the same row has the same id in every run, a changed text another one.
        turns: What comes before the answer; empty where the document alone is the question.
        document: The text that the question is about, the one part that may be shortened to fit.
        answer: The text to train on; None where a teacher is still to give it.
        references: All right answers, `answer` the first of them.
    """

    id: str
    turns: tuple[Turn, ...]
    document: str | None
    answer: str | None
    references: tuple[str, ...]


@dataclass(frozen=True)
class GenerationData:
    """The three splits of a task and the account of its rows.

    Attributes:
        kind: "instruction" or "summarization".
        has_messages: Whether the rows are conversations, which only a chat template can render as they are.
        sources: Where each split comes from.
        fingerprint: Changes with any text of any split; not with the order of rows or the seed.
        notes: What a reader of the results has to know, such as test prompts that also stand in train.
    """

    train: tuple[GenerationExample, ...]
    validation: tuple[GenerationExample, ...]
    test: tuple[GenerationExample, ...]
    kind: GenerationKind
    has_messages: bool
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


def load_generation(
    *,
    train: str,
    validation: str | float,
    test: str | float,
    kind: GenerationKind,
    prompt: str = "prompt",
    context: str | None = None,
    response: str = "response",
    messages: str | None = None,
    document: str = "document",
    summary: str = "summary",
    group: str | None = None,
    where: Mapping[str, object] | None = None,
    bad_rows: BadRowsPolicy = "skip_few",
    unlabelled: Literal["skip", "keep"] = "skip",
    max_rows: int | None = None,
    seed: int = 0,
) -> GenerationData:
    """Reads, checks and splits the rows of an instruction or summarization task.

    A share of train is split off by the hash of the prompt, or of the group: equal prompts fall on one side, and a
    prompt stays on its side when rows are added or reordered. Its size therefore only comes close to the share.

    Args:
        train: Source as `read_rows` takes it.
        validation: Source, or share of train.
        test: Source, or share of train.
        prompt: Column of what is asked, as is `context` (a text the prompt speaks of, may be empty) and `response` (a
            text, or a list of right ones); for kind "instruction".
        messages: Column of conversations, in place of those three: lists of {role, content} or {from, value}.
        document: Column of the text, as is `summary`; for kind "summarization".
        group: Column whose rows of one value fall on one side when shares are split off.
        where: Column -> value that the rows of every source must have.
        bad_rows: "skip_few" skips at most a tenth of the rows of a source, "skip" any number, "stop" none.
        unlabelled: "keep" takes rows without an answer, for a teacher to answer them; else they are bad rows.
        max_rows: Uses at most so many rows of each source, chosen by the hash of the prompts.
        seed: Orders the train rows; the other splits have one order for all seeds.

    Raises:
        DataError: No rows, a missing column, no answers, an empty split, or more bad rows than `bad_rows` allows.
    """
    given: dict[str, str | float] = {"train": train, "validation": validation, "test": test}
    files, shares = sources_and_shares(given)
    if kind == "summarization":
        layout = Layout(document=document, answer=summary, group=group)
    elif messages is not None:
        layout = Layout(messages=messages, group=group)
    else:
        layout = Layout(prompt=prompt, document=context, answer=response, group=group)
    tables = {s: read_table(source, split=s, where=where, columns=layout.read) for s, source in files.items()}
    check_columns(files, tables, layout.columns)
    good, bad = _checked(tables, layout, files, unlabelled)
    report_bad_rows(bad, row_counts(tables), bad_rows)
    distinct, copies = _without_copies({split: [_keyed(row) for row in rows] for split, rows in good.items()})
    pools = {split: limited(rows, max_rows) for split, rows in distinct.items()}
    splits, _ = divided(pools, shares, "")
    check_no_empty_split(splits, given)
    notes = shared_texts(splits)
    if copies:
        notes.append(f"{len(copies):,} rows are copies of another row and are left out (first {copies[0].where}).")
    for note in notes:
        logger.warning("data: %s", note)
    return GenerationData(
        **ordered(splits, seed),
        kind=kind,
        has_messages=layout.messages is not None,
        bad_rows=(*(row for rows in bad.values() for row in rows), *copies),
        sources={split: described(source) for split, source in given.items()},
        fingerprint=fingerprint(splits, kind),
        notes=tuple(notes),
    )


def _checked(
    tables: Mapping[str, Table],
    layout: Layout,
    sources: Mapping[str, str],
    unlabelled: Literal["skip", "keep"],
) -> tuple[dict[str, list[GoodAnswer]], dict[str, list[BadRow]]]:
    good: dict[str, list[GoodAnswer]] = {split: [] for split in tables}
    bad: dict[str, list[BadRow]] = {split: [] for split in tables}
    for split, table in tables.items():
        without: list[BadRow] = []
        for row in table.rows:
            found, reason = read_row(row, layout)
            if found is None:
                bad[split].append(BadRow(row.where, reason or ""))
            elif not found.references and unlabelled == "skip":
                without.append(BadRow(row.where, EMPTY_ANSWER))
            else:
                good[split].append(found)
        if without and not good[split]:
            column = layout.answer or layout.messages or ""
            known = "" if column in table.columns else f" {unknown_name('data', 'column', column, table.columns)}"
            raise DataError(
                f"{sources[split]}: {len(without):,} of {len(table.rows):,} rows have an empty answer"
                f" (first: {without[0].where}), no row has one.{known} Name the column of the answers, or let the"
                " teacher answer."
            )
        bad[split] += without
    return good, bad


def _without_copies(
    pools: Mapping[str, Sequence[Keyed[GenerationExample]]],
) -> tuple[dict[str, list[Keyed[GenerationExample]]], list[BadRow]]:
    """Rows that repeat a question with its answers within one source would only weigh it twice."""
    distinct: dict[str, list[Keyed[GenerationExample]]] = {split: [] for split in pools}
    copies: list[BadRow] = []
    for split, rows in pools.items():
        seen: dict[bytes, str] = {}
        for keyed in rows:
            first = seen.setdefault(keyed.identity, keyed.place)
            if first == keyed.place:
                distinct[split].append(keyed)
            else:
                copies.append(BadRow(keyed.place, f"copy: of {first}"))
    return distinct, copies


def _keyed(row: GoodAnswer) -> Keyed[GenerationExample]:
    asked = [f"{turn.role}\x1e{turn.content}" for turn in row.turns]
    asked = asked if row.document is None else [*asked, row.document]
    key = hashed(map(normalized, asked))
    side = key if row.group is None else hashed([row.group])
    content = json.dumps([asked, row.references])
    identity = hashed([content])
    answer = row.references[0] if row.references else None
    example = GenerationExample(f"{row.where}#{identity[:6].hex()}", row.turns, row.document, answer, row.references)
    return Keyed(example, identity, key, side)
