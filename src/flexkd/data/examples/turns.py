"""Rows of instructions, chats and summaries, read into the turns before an answer, a document and right answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flexkd.data.examples.label_values import shown
from flexkd.data.examples.row_checks import row_fault, text_fault
from flexkd.data.sources.files import Row

Role = Literal["system", "user", "assistant"]
GenerationKind = Literal["instruction", "summarization"]

EMPTY_ANSWER: Final = "empty answer"
"""The reason of a bad row that a teacher could still answer."""

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
    """What one side of a conversation says."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Which column holds what.

    Attributes:
        prompt: What is asked, as one text.
        document: The text that the prompt is about and that may be shortened: a document to summarize, the context of
            an instruction. A row may leave it empty where there is a prompt.
        messages: A whole conversation in place of the other three; its last turn is the answer.
        answer: One text, or a list of texts that are all right.
        group: Rows with one value fall on one side of a split.
    """

    prompt: str | None = None
    document: str | None = None
    messages: str | None = None
    answer: str | None = None
    group: str | None = None

    @property
    def question(self) -> str:
        """The column without which no row can be read."""
        question = self.messages or self.prompt or self.document
        assert question is not None
        return question

    @property
    def columns(self) -> list[str]:
        """Columns that every source must have. Answers are judged row by row: some rows may be without."""
        named = (self.messages, self.prompt, self.document, self.group)
        return [column for column in named if column is not None]

    @property
    def read(self) -> list[str]:
        """Columns whose values count, where a source has them."""
        return self.columns + ([self.answer] if self.answer is not None else [])


@dataclass(frozen=True, slots=True)
class GoodAnswer:
    """A row that passed.

    Attributes:
        turns: What comes before the answer; empty where the row is a document alone.
        references: The right answers, the first of them to train on; empty where the row has none.
    """

    where: str
    turns: tuple[Turn, ...]
    document: str | None
    references: tuple[str, ...]
    group: str | None


def read_row(row: Row, layout: Layout) -> tuple[GoodAnswer | None, str | None]:
    """One row, or the reason why it cannot be used."""
    fault = row_fault(row, [] if layout.messages else [layout.question])
    group = None if layout.group is None else row.values.get(layout.group)
    if fault is None and layout.group is not None and _is_empty(group):
        fault = f"{layout.group} is empty"
    if fault is not None:
        return None, fault
    group = None if group is None else str(group)
    if layout.messages is not None:
        turns, references, fault = _conversation(row.values.get(layout.messages), layout.messages)
        return (None, fault) if fault else (GoodAnswer(row.where, turns, None, references, group), None)
    document, fault = _document(row, layout)
    references, answer_fault = _references(row, layout)
    if fault or answer_fault:
        return None, fault or answer_fault
    turns = () if layout.prompt is None else (Turn("user", str(row.values[layout.prompt]).strip()),)
    return GoodAnswer(row.where, turns, document, references, group), None


def _document(row: Row, layout: Layout) -> tuple[str | None, str | None]:
    if layout.document is None:
        return None, None
    value = row.values.get(layout.document)
    if layout.prompt is not None and (value is None or (isinstance(value, str) and not value.strip())):
        return None, None
    fault = text_fault(value)
    return (None, f"{layout.document} {fault}") if fault else (str(value).strip(), None)


def _references(row: Row, layout: Layout) -> tuple[tuple[str, ...], str | None]:
    assert layout.answer is not None
    value = row.values.get(layout.answer)
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if not _is_empty(text)]
    fault = next((fault for text in texts if (fault := text_fault(text))), None)
    if fault:
        return (), f"{layout.answer} {fault}"
    return tuple(dict.fromkeys(str(text).strip() for text in texts)), None


def _is_empty(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _conversation(value: object, column: str) -> tuple[tuple[Turn, ...], tuple[str, ...], str | None]:
    if not isinstance(value, list) or not value:
        return (), (), f"{column} is no list of turns: {shown(value)}"
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            return (), (), f"{column}: turn {number} is no object: {shown(turn)}"
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            return (), (), f"{column} has an unknown role: {shown(role)} in turn {number}. Known: {', '.join(_ROLES)}"
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
    """Chat templates demand that a system turn comes first and that the two sides take turns."""
    roles = [turn.role for turn in turns]
    sides = roles[1:] if roles[0] == "system" else roles
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(sides))]
    if not sides or sides != expected:
        return f"{column} does not go from user to assistant in turn: {', '.join(roles)}"
    return None
