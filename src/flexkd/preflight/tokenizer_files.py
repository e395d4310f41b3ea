"""What the files of a tokenizer say of its chat template and special tokens, read without loading it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.encoding.tokenizers import DEFAULT, TokenizerInfo, markup_tokens, named_templates

_WITHOUT_DEFAULTS: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_words(folder: Path, source: str) -> TokenizerInfo:
    """The words of the tokenizer in a folder; what is not written there stays out, or empty where a template asks it.

    Args:
        folder: Of a saved tokenizer.
        source: How the recipe names it.
    """
    settings = _json(folder / "tokenizer_config.json")
    stored = _json(folder / "special_tokens_map.json") | settings
    special = {name: _content(stored.get(name)) for name in _TOKENS}
    # Other classes of tokenizers bring tokens that no file names.
    names_all = settings.get("tokenizer_class") in _WITHOUT_DEFAULTS
    if names_all:
        special = {name: token for name, token in special.items() if token is not None}
        # A run may take it from the checkpoint.
        special.setdefault("eos_token", "")
    added = _added_tokens(settings) | _added_tokens(_json(folder / "tokenizer.json"))
    return TokenizerInfo(
        name=source,
        templates=_templates(folder, settings, source),
        special_tokens=special if names_all else {name: token or "" for name, token in special.items()},
        added_tokens=frozenset(added) | frozenset(token for token in special.values() if token),
        markup=markup_tokens({token for token, is_special in added.items() if is_special}),
    )


def _templates(folder: Path, settings: Mapping[str, Any], source: str) -> dict[str, str]:
    stored = settings.get("chat_template")
    templates: dict[str, Any] = {}
    if stored and not isinstance(stored, list):
        templates[DEFAULT] = stored
    elif stored:
        pairs = [(one.get("name"), one.get("template")) for one in stored if isinstance(one, Mapping)]
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
    rows = tokens.values() if isinstance(tokens, Mapping) else tokens
    return {
        str(row["content"]): bool(row.get("special")) for row in rows if isinstance(row, Mapping) and "content" in row
    }


def _content(token: object) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what cannot be read is said where it is loaded
        return {}
    return content if isinstance(content, dict) else {}
