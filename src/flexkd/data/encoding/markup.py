"""Special tokens inside the texts of rows: read as plain characters, so that no text can forge a turn or an end."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from flexkd.data.examples.generation import GenerationExample
from flexkd.data.examples.turns import Turn

# Two code points that Unicode bars from all text mark the start and end of each such token during rendering.
_OPEN: Final = chr(0xFDD0)
_CLOSE: Final = chr(0xFDD1)


class Markup:
    """Finds the special tokens of one tokenizer in texts, and encodes them as text.

    Args:
        tokenizer: A loaded tokenizer of transformers.
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
        """The first special token in a text; None where there is none."""
        # Few texts hold a character that special tokens begin with, so thousands of tokens are rarely searched for.
        if not any(character in text for character in self._first):
            return None
        match = self._pattern.search(text)
        return None if match is None else match[0]

    def first_of(self, example: GenerationExample) -> str | None:
        """The first special token in any text of an example; None where there is none."""
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
        """The text with a mark before and after each special token."""
        plain = text.replace(_OPEN, "").replace(_CLOSE, "")
        return self._pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", plain)

    def ids(self, marked: str) -> list[int]:
        """Token ids of a text in which marked special tokens are read as text, and all others as tokens."""
        ids: list[int] = []
        for index, piece in enumerate(self._marked.split(marked)):
            if piece:
                ids += self._as_text(piece) if index % 2 else self._inside(piece, is_first=not ids)
        return ids

    def _as_text(self, token: str) -> list[int]:
        ids = self._inside(token, is_first=False, split_special_tokens=True)
        if self._tokenizer.convert_tokens_to_ids(token) not in ids:
            return ids
        # The vocabulary may hold the whole token as a word, too; its parts are no special tokens.
        return self._inside(token[:1], is_first=False) + self._inside(token[1:], is_first=False)

    def _inside(self, text: str, *, is_first: bool, **options: Any) -> list[int]:
        """Token ids of a piece from the middle of a text; some tokenizers add a space to whatever begins a text."""
        if is_first:
            return self._plain(text, **options)
        newline, whole = self._plain("\n", **options), self._plain(f"\n{text}", **options)
        return whole[len(newline) :] if whole[: len(newline)] == newline else self._plain(text, **options)

    def _plain(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])


def markup_note(occurrences: Sequence[tuple[str, str]], read_as: Literal["text", "tokens"]) -> list[str]:
    """A note on rows with special tokens in their texts; empty where there are none.

    Args:
        occurrences: Id and first special token of each such row.
        read_as: How the tokens are read.
    """
    if not occurrences:
        return []
    where, token = occurrences[0]
    how = (
        "It is read as text and forges no turn, as a program that hands such a text to the model has to do; "
        "data.markup: tokens reads it as the token."
        if read_as == "text"
        else "It is read as the token, and may begin a turn or end an answer."
    )
    return [f"{len(occurrences):,} rows hold a special token in their texts (first {where}: {token!r}). {how}"]
