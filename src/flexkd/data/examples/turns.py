"""Rows of instructions, conversations and summaries, read into turns, a document and reference answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flexkd.data.examples.label_values import short_repr
from flexkd.data.examples.row_checks import row_fault, text_fault
from flexkd.data.sources.table import Row

Role = Literal["system", "user", "assistant"]
GenerationKind = Literal["instruction", "summarization"]

EMPTY_ANSWER: Final = "empty answer"
"""The reason given for a row without an answer, which a teacher could still answer."""

_ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class GenerationColumns:
    """Names of the columns of a generation task.

    Attributes:
        prompt: The prompt as one text.
        document: The text that the prompt is about and that may be shortened: a document to summarize, or the context
            of an instruction. It may be empty in a row that has a prompt.
        messages: A whole conversation in place of the other three; its last turn is the answer.
        answer: One text, or a list of texts that are all correct.
        group: Rows with the same value go into one split.
    """

    prompt: str | None = None
    document: str | None = None
    messages: str | None = None
    answer: str | None = None
    group: str | None = None

    @property
    def main(self) -> str:
        """The column that every row needs."""
        main = self.messages or self.prompt or self.document
        assert main is not None
        return main

    @property
    def required(self) -> list[str]:
        """Columns that every source must have; answers are checked row by row, since some rows may have none."""
        columns = (self.messages, self.prompt, self.document, self.group)
        return [column for column in columns if column is not None]

    @property
    def lacking(self) -> list[str]:
        """Of these, the context of an instruction, which is empty in all rows of some files."""
        return [self.document] if self.document is not None and self.prompt is not None else []

    @property
    def all(self) -> list[str]:
        """All columns that are read, where a source has them."""
        return self.required + ([self.answer] if self.answer is not None else [])


@dataclass(frozen=True, slots=True)
class GoodGenerationRow:
    """A row that can be used.

    Attributes:
        turns: Turns before the answer; empty where the row is a document alone.
        references: All correct answers, the first to train on; empty where the row has none.
    """

    where: str
    turns: tuple[Turn, ...]
    document: str | None
    references: tuple[str, ...]
    group: str | None


def read_row(row: Row, columns: GenerationColumns) -> tuple[GoodGenerationRow | None, str | None]:
    """The content of a row, or None and the reason why it cannot be used."""
    fault = row_fault(row, [] if columns.messages else [columns.main])
    group = None if columns.group is None else row.values.get(columns.group)
    if fault is None and columns.group is not None and _is_empty(group):
        fault = f"{columns.group} is empty"
    if fault is not None:
        return None, fault
    group = None if group is None else str(group)
    if columns.messages is not None:
        turns, references, fault = _conversation(row.values.get(columns.messages), columns.messages)
        return (None, fault) if fault else (GoodGenerationRow(row.where, turns, None, references, group), None)
    document, fault = _document(row, columns)
    references, answer_fault = _references(row, columns)
    if fault or answer_fault:
        return None, fault or answer_fault
    turns = () if columns.prompt is None else (Turn("user", str(row.values[columns.prompt]).strip()),)
    return GoodGenerationRow(row.where, turns, document, references, group), None


def _document(row: Row, columns: GenerationColumns) -> tuple[str | None, str | None]:
    if columns.document is None:
        return None, None
    value = row.values.get(columns.document)
    if columns.prompt is not None and (value is None or (isinstance(value, str) and not value.strip())):
        return None, None
    fault = text_fault(value)
    return (None, f"{columns.document} {fault}") if fault else (str(value).strip(), None)


def _references(row: Row, columns: GenerationColumns) -> tuple[tuple[str, ...], str | None]:
    assert columns.answer is not None
    value = row.values.get(columns.answer)
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if not _is_empty(text)]
    fault = next((fault for text in texts if (fault := text_fault(text))), None)
    if fault:
        return (), f"{columns.answer} {fault}"
    return tuple(dict.fromkeys(str(text).strip() for text in texts)), None


def _is_empty(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _conversation(value: object, column: str) -> tuple[tuple[Turn, ...], tuple[str, ...], str | None]:
    if not isinstance(value, list) or not value:
        return (), (), f"{column} is no list of turns: {short_repr(value)}"
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            return (), (), f"{column}: turn {number} is no object: {short_repr(turn)}"
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            unknown = f"{column} has an unknown role: {short_repr(role)} in turn {number}"
            return (), (), f"{unknown}. Known: {', '.join(_ROLES)}"
        is_answer = number == len(value) and _ROLES[role] == "assistant"
        fault = None if is_answer and _is_empty(content) else text_fault(content)
        if fault:
            return (), (), f"{column} has a turn that {fault}: turn {number}"
        turns.append(Turn(_ROLES[role], "" if content is None else str(content).strip()))
    fault = _order_fault(turns, column)
    if fault:
        return (), (), fault
    if turns[-1].role != "assistant":
        return tuple(turns), (), None
    return tuple(turns[:-1]), (turns[-1].content,) if turns[-1].content else (), None


def _order_fault(turns: Sequence[Turn], column: str) -> str | None:
    """Why a chat template would refuse the order of turns: system first, if at all, then user and assistant in turn."""
    roles = [turn.role for turn in turns]
    sides = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(sides))]
    if not sides or sides != expected:
        return f"{column} does not go from user to assistant in turn: {', '.join(roles)}"
    return None
