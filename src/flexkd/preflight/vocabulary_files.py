"""Tokenizers as their tokenizer.json holds them, read without transformers."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkd.errors import UnsupportedModelError


@dataclass(frozen=True)
class TokenizerFile:
    """What a tokenizer.json says, with the tokens that tokenizer_config.json adds.

    Attributes:
        backend: A `tokenizers.Tokenizer`.
        added: Tokens to ids.
    """

    backend: Any
    added: Mapping[str, int]

    def get_vocab(self) -> dict[str, int]:
        """Tokens to ids."""
        return {**self.backend.get_vocab(with_added_tokens=True), **self.added}

    def num_special(self, *, pair: bool) -> int:
        """Tokens that stand in every row besides its text."""
        return int(self.backend.num_special_tokens_to_add(pair))

    def rows(self, texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Ids of texts, or of pairs of texts, of their whole length."""
        asked = [text[0] if len(text) == 1 else text for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch(asked)]


@functools.lru_cache(maxsize=4)
def _read(file: Path, settings: Path, changed: tuple[int, ...]) -> TokenizerFile:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    added = content.get("added_tokens_decoder") if isinstance(content, dict) else None
    tokens = added.items() if isinstance(added, dict) else ()
    return TokenizerFile(backend, {str(token["content"]): int(number) for number, token in tokens})


def read_tokenizer(folder: Path, *, where: str) -> TokenizerFile | None:
    """The tokenizer of a folder; None where it has another form, which only transformers reads.

    Raises:
        UnsupportedModelError: The file is damaged.
    """
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    changed = tuple(path.stat().st_mtime_ns for path in (file, settings) if path.is_file())
    try:
        return _read(file, settings, changed)
    except Exception as error:  # what the library raises has no type of its own
        first = next(iter(str(error).splitlines()), "no reason given")
        raise UnsupportedModelError(
            f"{where}: {file} cannot be read ({first}). Save the tokenizer again, or restore a copy."
        ) from None
