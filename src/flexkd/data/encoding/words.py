"""What chat templates and texts need to know of a tokenizer, whether it is loaded or read from its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from flexkd.errors import VocabularyError

DEFAULT: Final = "default"
"""Name of the template that is used where a tokenizer brings several."""

_SHORTEST_MARKUP: Final = 3


@dataclass(frozen=True)
class Words:
    """A tokenizer without its vocabulary.

    Attributes:
        name: Its path or hub id.
        templates: Chat templates by name; most tokenizers have one, called default.
        special_tokens: As a template sees them: bos_token, eos_token and others.
        added_tokens: Tokens that are found in a text before all others, special or not.
        markup: The special ones that a text may hold as text: a word of one or two characters is none.
        begins: Whether it begins a text with its BOS; None where only the loaded tokenizer knows.
    """

    name: str
    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: frozenset[str] = frozenset()
    markup: frozenset[str] = frozenset()
    begins: bool | None = None

    @property
    def bos(self) -> str:
        """The token that begins a text; empty where there is none."""
        return str(self.special_tokens.get("bos_token") or "")

    @property
    def eos(self) -> str | None:
        """The token that ends a text."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else str(token)


def words_of(tokenizer: Any) -> Words:
    """Of a tokenizer of transformers; `Words` stay as they are."""
    if isinstance(tokenizer, Words):
        return tokenizer
    name = str(tokenizer.name_or_path or type(tokenizer).__name__)
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    special = set(map(str, tokenizer.all_special_tokens))
    bos = tokenizer.bos_token_id
    return Words(
        name=name,
        templates=templates_of(tokenizer.chat_template, name),
        special_tokens=dict(tokenizer.special_tokens_map),
        added_tokens=frozenset(added) | special,
        markup=markup_of({token for token, is_special in added.items() if is_special} | special),
        begins=bos is not None and _ids_of_a(tokenizer)[:1] == [bos],
    )


def templates_of(template: object, name: str) -> dict[str, str]:
    """Chat templates by name, of what a tokenizer holds: one, several by name, or none.

    Raises:
        VocabularyError: One is no text.
    """
    templates: dict[str, Any] = (
        dict(template) if isinstance(template, Mapping) else {DEFAULT: template} if template else {}
    )
    for one in templates.values():
        if not isinstance(one, str):
            raise VocabularyError(
                f"tokenizer '{name}': its chat_template is a {type(one).__name__}, not a Jinja template. Write one, or "
                "remove the entry from its tokenizer_config.json."
            )
    return templates


def special_tokens_of(tokenizer: Any) -> Mapping[str, Any]:
    """Those that a template sees."""
    return tokenizer.special_tokens if isinstance(tokenizer, Words) else dict(tokenizer.special_tokens_map)


def _ids_of_a(tokenizer: Any) -> list[int]:
    """Ids of the text "a" with all that the tokenizer adds; a call of it would change its settings of truncation."""
    if not tokenizer.is_fast:
        return list(tokenizer("a", add_special_tokens=True)["input_ids"])
    encoded = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    return [token for token, counts in zip(encoded.ids, encoded.attention_mask, strict=True) if counts]


def markup_of(special: set[str]) -> frozenset[str]:
    """Special tokens that would be taken for more than text inside a text."""
    return frozenset(token for token in special if len(token) >= _SHORTEST_MARKUP and not token.isspace())
