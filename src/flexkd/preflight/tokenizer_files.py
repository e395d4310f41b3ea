"""Tokenizers read from their files without transformers: ids of texts, chat templates and special tokens."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexkd.data.encoding.tokenizers import DEFAULT, TokenizerInfo, markup_tokens, named_templates
from flexkd.errors import UnsupportedModelError
from flexkd.facts.names import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

_CLASSES_WITHOUT_DEFAULTS: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that bring no special tokens besides those in the files."""
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFile:
    """What a tokenizer.json holds, with the tokens that tokenizer_config.json adds.

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
        """Special tokens that the tokenizer adds to each text, or to each pair of texts."""
        return int(self.backend.num_special_tokens_to_add(pair))

    def encode(self, texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Token ids of texts, or of pairs of texts, with special tokens and without truncation."""
        batch = [text[0] if len(text) == 1 else text for text in texts]
        return [encoding.ids for encoding in self.backend.encode_batch(batch)]


def read_tokenizer(folder: Path, *, where: str) -> TokenizerFile | None:
    """The tokenizer of a folder; None where it has another form, which only transformers reads.

    Raises:
        UnsupportedModelError: The file is damaged.
    """
    file, settings = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return None
    modified = tuple(path.stat().st_mtime_ns for path in (file, settings) if path.is_file())
    try:
        return _read_tokenizer(file, settings, modified)
    except Exception as error:  # the library raises plain Exception
        first_line = next(iter(str(error).splitlines()), "no reason given")
        raise UnsupportedModelError(
            f"{where}: {file} cannot be read ({first_line}). Save the tokenizer again, or restore a copy."
        ) from None


@functools.lru_cache(maxsize=4)
def _read_tokenizer(file: Path, settings: Path, modified: tuple[int, ...]) -> TokenizerFile:
    """A tokenizer from its files; `modified` makes the cache forget files that have changed."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    added = content.get("added_tokens_decoder") if isinstance(content, dict) else None
    tokens = added.items() if isinstance(added, dict) else ()
    return TokenizerFile(backend, {str(token["content"]): int(number) for number, token in tokens})


def read_tokenizer_info(folder: Path, source: str) -> TokenizerInfo:
    """Chat templates and special tokens of the tokenizer in a folder.

    A special token that no file names is left out, or empty where the tokenizer's class may bring one by default.

    Args:
        folder: Of a saved tokenizer.
        source: How the recipe names it.
    """
    settings = _read_json(folder / TOKENIZER_CONFIG_FILE)
    stored = _read_json(folder / "special_tokens_map.json") | settings
    special = {name: _token_text(stored.get(name)) for name in _SPECIAL_TOKENS}
    names_all = settings.get("tokenizer_class") in _CLASSES_WITHOUT_DEFAULTS
    if names_all:
        special = {name: token for name, token in special.items() if token is not None}
        # A run may take it from the checkpoint.
        special.setdefault("eos_token", "")
    added = _added_tokens(settings) | _added_tokens(_read_json(folder / TOKENIZER_FILE))
    return TokenizerInfo(
        name=source,
        templates=_templates(folder, settings, source),
        special_tokens=special if names_all else {name: token or "" for name, token in special.items()},
        added_tokens=frozenset(added) | frozenset(token for token in special.values() if token),
        markup=markup_tokens({token for token, is_special in added.items() if is_special}),
    )


def _templates(folder: Path, settings: Mapping[str, Any], source: str) -> dict[str, str]:
    """Chat templates by name, from the config and from the files beside it, which come before it."""
    stored = settings.get("chat_template")
    templates: dict[str, Any] = {}
    if stored and not isinstance(stored, list):
        templates[DEFAULT] = stored
    elif stored:
        pairs = [(entry.get("name"), entry.get("template")) for entry in stored if isinstance(entry, Mapping)]
        templates |= {str(name): text for name, text in pairs if isinstance(text, str)}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8", errors="replace")
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates[DEFAULT] = file.read_text(encoding="utf-8", errors="replace")
    return named_templates(templates, source)


def _added_tokens(stored: Mapping[str, Any]) -> dict[str, bool]:
    """Added tokens, and whether each is special: a list in tokenizer.json, a mapping in tokenizer_config.json."""
    tokens = stored.get("added_tokens_decoder") or stored.get("added_tokens") or ()
    entries = tokens.values() if isinstance(tokens, Mapping) else tokens
    return {
        str(entry["content"]): bool(entry.get("special"))
        for entry in entries
        if isinstance(entry, Mapping) and "content" in entry
    }


def _token_text(token: object) -> str | None:
    """A token that is stored as its text, or as an object with its text as content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; empty where it cannot be read, which is reported where the file is loaded."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
