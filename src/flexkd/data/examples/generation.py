"""Instruction and summarization data: rows to prompts with answers in three splits, and the rows that were left out."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from flexkd.data.examples.turns import EMPTY_ANSWER, GenerationColumns, GenerationKind, GoodGenerationRow, read_row
from flexkd.data.examples.turns import Turn as Turn
from flexkd.data.sources.rows import TableReader, read_table
from flexkd.data.sources.table import AUTO_FORMAT, Table, TextFormat
from flexkd.errors import DataError, unknown_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationExample:
    """One prompt with its reference answers.

    Attributes:
        id: Place in the source and a hash of the content: stable across runs, and changed by any change of the text.
        turns: Turns before the answer; empty where the document alone is the prompt.
        document: The text that the prompt is about, the only part that may be shortened to fit.
        answer: The text to train on; None where a teacher has not answered yet.
        references: All correct answers, with `answer` first.
    """

    id: str
    turns: tuple[Turn, ...]
    document: str | None
    answer: str | None
    references: tuple[str, ...]


@dataclass(frozen=True)
class GenerationData:
    """The three splits of a task, and the rows that are in none of them.

    Attributes:
        has_messages: Whether the rows are conversations, which only a chat template can render.
        sources: Where each split comes from, in words.
        fingerprint: Changes with any text of any split; not with the order of rows or the seed.
        notes: What a reader of the results should know, such as test prompts that are also in train.
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
    def num_rows(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    @property
    def skipped(self) -> dict[str, int]:
        """Number of bad rows by kind of fault."""
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
    text_format: TextFormat = AUTO_FORMAT,
    seed: int = 0,
    reader: TableReader = read_table,
) -> GenerationData:
    """Read, check and split the rows of an instruction or summarization task.

    Shares of train are split off by the hash of the prompt, or of the group: equal prompts go into one split, and a
    prompt stays in its split when rows are added or reordered. The size of a split is only close to its share.

    Args:
        train: Source, as in `read_rows`.
        validation: Source, or share of train.
        test: Source, or share of train.
        prompt: Column of the prompt; kind "instruction".
        context: Column of a text that the prompt refers to, which may be empty; kind "instruction".
        response: Column of the answer, or of a list of correct answers; kind "instruction".
        messages: Column of conversations in place of those three: lists of {role, content} or {from, value}.
        document: Column of the text to summarize; kind "summarization".
        summary: Column of the summary, or of a list of summaries; kind "summarization".
        group: Column; rows with the same value go into one split when shares are split off.
        where: Column -> value that the rows of every source must have.
        bad_rows: "skip_few" skips at most a tenth of the rows of a source, "skip" any number, "stop" none.
        unlabelled: "keep" keeps rows without an answer, for a teacher to answer; "skip" counts them as bad rows.
        max_rows: Largest number of rows used of each source, chosen by the hash of the prompts.
        text_format: Separator and encoding of text files.
        seed: Shuffles train; the order of the other splits is the same for every seed.
        reader: Reads a source.

    Raises:
        DataError: No rows, a missing column, no answers, an empty split, or more bad rows than `bad_rows` allows.
    """
    origins: dict[str, str | float] = {"train": train, "validation": validation, "test": test}
    files, shares = sources_and_shares(origins)
    if kind == "summarization":
        columns = GenerationColumns(document=document, answer=summary, group=group)
    elif messages is not None:
        columns = GenerationColumns(messages=messages, group=group)
    else:
        columns = GenerationColumns(prompt=prompt, document=context, answer=response, group=group)
    read = partial(reader, where=where, columns=columns.all, text_format=text_format)
    tables = {split: read(source, split=split) for split, source in files.items()}
    check_columns(files, tables, columns.required, lacking=dict.fromkeys(tables, columns.lacking))
    good, bad = _check_rows(tables, columns, files, unlabelled)
    report_bad_rows(bad, row_counts(tables), bad_rows)
    distinct, copies = _without_copies({split: [_hash_example(row) for row in rows] for split, rows in good.items()})
    pools = {split: limit_rows(rows, max_rows) for split, rows in distinct.items()}
    splits, _ = split_off_shares(pools, shares, "")
    check_no_empty_split(splits, origins)
    notes = [*overlap_notes(splits), *_copy_notes(copies)]
    for note in notes:
        logger.warning("data: %s", note)
    return GenerationData(
        **order_splits(splits, seed),
        kind=kind,
        has_messages=columns.messages is not None,
        bad_rows=(*(row for rows in bad.values() for row in rows), *copies),
        sources={split: describe_origin(source) for split, source in origins.items()},
        fingerprint=fingerprint(splits, kind),
        notes=tuple(notes),
    )


def _copy_notes(copies: Sequence[BadRow]) -> list[str]:
    count = f"{len(copies):,} rows are copies of another row and are left out"
    return [f"{count} (first {copies[0].where})."] if copies else []


def _check_rows(
    tables: Mapping[str, Table],
    columns: GenerationColumns,
    sources: Mapping[str, str],
    unlabelled: Literal["skip", "keep"],
) -> tuple[dict[str, list[GoodGenerationRow]], dict[str, list[BadRow]]]:
    good: dict[str, list[GoodGenerationRow]] = {split: [] for split in tables}
    bad: dict[str, list[BadRow]] = {split: [] for split in tables}
    for split, table in tables.items():
        unanswered: list[BadRow] = []
        for row in table.rows:
            good_row, reason = read_row(row, columns)
            if good_row is None:
                bad[split].append(BadRow(row.where, reason or ""))
            elif not good_row.references and unlabelled == "skip":
                unanswered.append(BadRow(row.where, EMPTY_ANSWER))
            else:
                good[split].append(good_row)
        if unanswered and not good[split]:
            column = columns.answer or columns.messages or ""
            hint = "" if column in table.columns else f" {unknown_name('data', 'column', column, table.columns)}"
            raise DataError(
                f"{sources[split]}: {len(unanswered):,} of {len(table.rows):,} rows have an empty answer"
                f" (first: {unanswered[0].where}), no row has one.{hint} Name the column of the answers, or let the"
                " teacher answer."
            )
        bad[split] += unanswered
    return good, bad


def _without_copies(
    pools: Mapping[str, Sequence[HashedExample[GenerationExample]]],
) -> tuple[dict[str, list[HashedExample[GenerationExample]]], list[BadRow]]:
    """Examples without those that repeat a prompt with its answers within one source, and the repeated rows."""
    distinct: dict[str, list[HashedExample[GenerationExample]]] = {split: [] for split in pools}
    copies: list[BadRow] = []
    for split, rows in pools.items():
        first_places: dict[bytes, str] = {}
        for entry in rows:
            first = first_places.setdefault(entry.identity, entry.place)
            if first == entry.place:
                distinct[split].append(entry)
            else:
                copies.append(BadRow(entry.place, f"copy: of {first}"))
    return distinct, copies


def _hash_example(row: GoodGenerationRow) -> HashedExample[GenerationExample]:
    texts = [f"{turn.role}\x1e{turn.content}" for turn in row.turns]
    texts = texts if row.document is None else [*texts, row.document]
    key = hash_texts(map(normalize, texts))
    side = key if row.group is None else hash_texts([row.group])
    content = json.dumps([texts, row.references])
    identity = hash_texts([content])
    answer = row.references[0] if row.references else None
    example = GenerationExample(f"{row.where}#{identity[:6].hex()}", row.turns, row.document, answer, row.references)
    return HashedExample(example, identity, key, side)
