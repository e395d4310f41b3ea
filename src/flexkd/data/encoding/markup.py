"""Special tokens that stand in a text of the data: read as the characters they are, never as a turn or an end."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.turns import Turn

# Two code points that Unicode keeps from all text stand around each such token while a template is rendered.
_OPEN: Final = chr(0xFDD0)
_CLOSE: Final = chr(0xFDD1)


class Markup:
    """The special tokens of one tokenizer as they may stand in texts.

    Args:
        tokenizer: Of transformers.
        tokens: As `TokenizerInfo.markup`.
    """

    def __init__(self, tokenizer: Any, tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._tokens = sorted(tokens, key=len, reverse=True)
        self._first = {token[0] for token in self._tokens}
        pattern = "|".join(map(re.escape, self._tokens)) or "(?!)"
        self._pattern = re.compile(pattern)
        self._marked = re.compile(f"{_OPEN}({pattern}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    def first_in(self, text: str) -> str | None:
        """The first special token that stands in a text."""
        # Few texts hold the character that most special tokens begin with: a search for thousands of them is rare.
        if not any(character in text for character in self._first):
            return None
        match = self._pattern.search(text)
        return None if match is None else match[0]

    def first_of(self, example: GenerationExample) -> str | None:
        """The first special token in any text of a row."""
        texts = [*(turn.content for turn in example.turns), example.document or "", example.answer or ""]
        return next((token for text in texts if (token := self.first_in(text)) is not None), None)

    def marked(self, example: GenerationExample) -> GenerationExample | None:
        """The example with its special tokens marked; None where its prompt holds none."""
        texts = [turn.content for turn in example.turns] + [example.document or ""]
        if not any(map(self.first_in, texts)):
            return None
        turns = tuple(Turn(turn.role, self.mark(turn.content)) for turn in example.turns)
        document = None if example.document is None else self.mark(example.document)
        return replace(example, turns=turns, document=document)

    def mark(self, text: str) -> str:
        """The text with a sign before and after each special token."""
        plain = text.replace(_OPEN, "").replace(_CLOSE, "")
        return self._pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", plain)

    def ids(self, marked: str) -> list[int]:
        """Ids of a text in which only the tokens that are not marked are special."""
        ids: list[int] = []
        for index, piece in enumerate(self._marked.split(marked)):
            if piece:
                ids += self._as_text(piece) if index % 2 else self._inside(piece, is_first=not ids)
        return ids

    def _as_text(self, token: str) -> list[int]:
        ids = self._inside(token, is_first=False, split_special_tokens=True)
        if self._tokenizer.convert_tokens_to_ids(token) not in ids:
            return ids
        # A vocabulary may hold the token as a word, too: its parts are none.
        return self._inside(token[:1], is_first=False) + self._inside(token[1:], is_first=False)

    def _inside(self, text: str, *, is_first: bool, **options: Any) -> list[int]:
        """Ids of a piece from the middle of a text: some tokenizers write a space before whatever begins."""
        if is_first:
            return self._plain(text, **options)
        before, whole = self._plain("\n", **options), self._plain(f"\n{text}", **options)
        return whole[len(before) :] if whole[: len(before)] == before else self._plain(text, **options)

    def _plain(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def markup_note(rows: Sequence[tuple[str, str]], read_as: Literal["text", "tokens"]) -> list[str]:
    """What a reader has to know of rows, given by id and special token; nothing where there are none."""
    if not rows:
        return []
    where, token = rows[0]
    how = (
        "It is read as text and forges no turn, as a program that hands such a text to the model has to do; "
        "data.markup: tokens reads it as the token."
        if read_as == "text"
        else "It is read as the token, and may begin a turn or end an answer."
    )
    return [f"{len(rows):,} rows hold a special token in their texts (first {where}: {token!r}). {how}"]
