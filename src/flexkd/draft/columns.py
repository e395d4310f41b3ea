"""What the columns of a table hold, and which of them a task needs: by their names, else by their values."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from flexkd.data.sources.rows import Table
from flexkd.errors import DataError

_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "sentence", "review", "content", "body", "comment", "message", "tweet", "question", "title"),
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "rating", "score", "y"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "request"),
    "context": ("context", "input", "passage", "document"),
    "response": ("response", "output", "answer", "completion", "reply", "target"),
    "messages": ("messages", "conversation", "conversations", "chat"),
    "document": ("document", "article", "text", "dialogue", "description", "body", "content", "source"),
    "summary": ("summary", "highlights", "abstract", "synopsis", "headline", "title", "target"),
}
"""Role -> names of columns that have it, the most telling first."""
_PAIRS: Final = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
"""Columns that are two texts of one row."""
_MOST_CLASSES: Final = 100
_ROWS_A_CLASS: Final = 2
"""A column is read as classes only if it has this many rows for each, on average."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        values: Its values in the order of the rows, those that are missing left out.
    """

    name: str
    values: Sequence[Any]

    @cached_property
    def is_text(self) -> bool:
        """Whether all values are texts, and one of them has more than one word."""
        return self._are(str) and any(len(value.split()) > 1 for value in self.values)

    @cached_property
    def is_chat(self) -> bool:
        """Whether every value is a list of messages."""
        return self._are(list) and all(isinstance(turn, Mapping) for value in self.values for turn in value)

    @cached_property
    def words(self) -> Sequence[int]:
        """Words of each value, ascending; of a list of texts those of the first, of a chat those of all turns."""
        return sorted(len(_text_of(value).split()) for value in self.values)

    @cached_property
    def answer_words(self) -> Sequence[int]:
        """Words of each answer, ascending: of a chat those of its last turn."""
        if not self.is_chat:
            return self.words
        return sorted(len(_text_of(value[-1:]).split()) for value in self.values)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each value stands in the column."""
        return Counter(map(str, self.values))

    @cached_property
    def has_classes(self) -> bool:
        """Whether the values may be classes: at least two, and few for so many rows."""
        if not self.values or self._are(list) or self._are(dict):
            return False
        return 2 <= len(self.counts) <= min(_MOST_CLASSES, max(2, len(self.values) // _ROWS_A_CLASS))

    @cached_property
    def has_numbers(self) -> bool:
        """Whether every value is a number, or the text of one."""
        return bool(self.values) and all(_is_number(value) for value in self.values)

    def _are(self, kind: type) -> bool:
        return bool(self.values) and all(isinstance(value, kind) for value in self.values)


def columns_of(table: Table) -> dict[str, Column]:
    """The columns of a table by name."""
    return {
        name: Column(name, [value for row in table.rows if not _is_missing(value := row.values.get(name))])
        for name in table.columns
    }


def roles_of(task: str, columns: Mapping[str, Column], named: Mapping[str, str]) -> dict[str, str]:
    """Which column holds what a task needs: role, as a key of `data` names it, to the column.

    Args:
        task: classification, instruction or summarization.
        named: Roles whose column the user has named.

    Raises:
        DataError: A named column is not there, or no column fits a role that the task needs.
    """
    for role, name in named.items():
        if name not in columns:
            raise DataError(f"data.{role}: there is no column {name!r}. Columns: {', '.join(columns)}.")
    finders = {"classification": _classification, "instruction": _instruction, "summarization": _summarization}
    return finders[task](columns, dict(named))


def _classification(columns: Mapping[str, Column], roles: dict[str, str]) -> dict[str, str]:
    if not roles.keys() & {"text", "text_pair"}:
        pair = next((pair for pair in _PAIRS if columns.keys() >= set(pair)), None)
        if pair is not None:
            roles = {**roles, "text": pair[0], "text_pair": pair[1]}
    if "text" not in roles:
        roles["text"] = _chosen("text", [column for column in _free(columns, roles) if column.is_text], columns)
    if "label" not in roles:
        labels = [column for column in _free(columns, roles) if column.values and not column.is_chat]
        by_name = [column for column in labels if column.name.lower() in _NAMES["label"]]
        by_value = [column for column in labels if column.has_classes]
        roles["label"] = _chosen("label", by_name or by_value, columns, fewest=True)
    return roles


def _instruction(columns: Mapping[str, Column], roles: dict[str, str]) -> dict[str, str]:
    chats = [column for column in columns.values() if column.is_chat]
    if "messages" in roles or (chats and not roles.keys() & {"prompt", "response"}):
        return {"messages": _chosen("messages", chats, columns), **roles}
    roles = _with_texts(("response", "prompt"), columns, roles)
    context = _by_name("context", _answers_or_texts(columns, roles))
    return roles if context is None else {"context": context.name, **roles}


def _summarization(columns: Mapping[str, Column], roles: dict[str, str]) -> dict[str, str]:
    # Of two texts without a telling name the longer one is the document.
    return _with_texts(("document", "summary"), columns, roles)


def _with_texts(needed: Sequence[str], columns: Mapping[str, Column], roles: Mapping[str, str]) -> dict[str, str]:
    """The roles with a column for each of these texts, one after the other."""
    complete = dict(roles)
    for role in needed:
        if role not in complete:
            complete[role] = _chosen(role, _answers_or_texts(columns, complete), columns)
    return complete


def _answers_or_texts(columns: Mapping[str, Column], roles: Mapping[str, str]) -> list[Column]:
    """Columns without a role whose values are texts, or lists of them."""
    return [
        column
        for column in _free(columns, roles)
        if column.values and all(isinstance(value, str | list) for value in column.values) and not column.is_chat
    ]


def _free(columns: Mapping[str, Column], roles: Mapping[str, str]) -> Iterable[Column]:
    return (column for name, column in columns.items() if name not in roles.values())


def _chosen(role: str, candidates: Sequence[Column], columns: Collection[str], *, fewest: bool = False) -> str:
    """The column of a role: by its name, else the one with the fewest values, or with the longest texts."""
    by_name = _by_name(role, candidates)
    if by_name is not None:
        return by_name.name
    if not candidates:
        raise DataError(
            f"data.{role}: no column looks like it. Columns: {', '.join(columns)}. Name it: data.{role}=COLUMN."
        )
    if fewest:
        return min(candidates, key=lambda column: len(column.counts)).name
    return max(candidates, key=lambda column: sum(column.words) / len(column.words)).name


def _by_name(role: str, candidates: Iterable[Column]) -> Column | None:
    by_name = {column.name.lower(): column for column in candidates}
    return next((by_name[name] for name in _NAMES[role] if name in by_name), None)


def _text_of(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    turns = [turn for turn in value if isinstance(turn, Mapping)]
    return " ".join(str(part) for turn in turns for part in turn.values()) if turns else str(value[0] if value else "")


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
