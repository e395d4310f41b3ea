"""Tokenizers: their chat templates and special tokens, their padding and truncation, and whether two are the same."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from flexkd.errors import VocabularyError

if TYPE_CHECKING:  # `check` reads tokenizers from their files without loading transformers
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT: Final = "default"
"""Name of the template that is used where a tokenizer brings several."""

_SHORTEST_MARKUP: Final = 3
_PAD_NAMES: Final = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|PAD_TOKEN|>", "<|vision_pad|>")


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer without its vocabulary, as it can be read from its files alone.

    Attributes:
        name: Path or hub id.
        templates: Chat templates by name; most tokenizers have one, called default.
        special_tokens: As a chat template sees them: bos_token, eos_token and others.
        added_tokens: Tokens that are matched in a text before all others, special or not.
        markup: Special tokens that may be in a text as text; those of one or two characters are left out.
        adds_bos: Whether it begins every text with its BOS; None where only the loaded tokenizer can tell.
    """

    name: str
    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    added_tokens: frozenset[str] = frozenset()
    markup: frozenset[str] = frozenset()
    adds_bos: bool | None = None

    @property
    def bos(self) -> str:
        """The token that begins a text; empty where there is none."""
        return str(self.special_tokens.get("bos_token") or "")

    @property
    def eos(self) -> str | None:
        """The token that ends a text."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else str(token)


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """The info of a loaded tokenizer; a `TokenizerInfo` is returned as it is."""
    if isinstance(tokenizer, TokenizerInfo):
        return tokenizer
    name = str(tokenizer.name_or_path or type(tokenizer).__name__)
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    special = set(map(str, tokenizer.all_special_tokens))
    bos = tokenizer.bos_token_id
    return TokenizerInfo(
        name=name,
        templates=named_templates(tokenizer.chat_template, name),
        special_tokens=dict(tokenizer.special_tokens_map),
        added_tokens=frozenset(added) | special,
        markup=markup_tokens({token for token, is_special in added.items() if is_special} | special),
        adds_bos=bos is not None and _ids_of_a(tokenizer)[:1] == [bos],
    )


def named_templates(template: object, name: str) -> dict[str, str]:
    """Chat templates by name.

    Args:
        template: The `chat_template` of a tokenizer: one template, a mapping of several, or None.
        name: Names the tokenizer in errors.

    Raises:
        VocabularyError: A template is not text.
    """
    templates: dict[str, Any] = (
        dict(template) if isinstance(template, Mapping) else {DEFAULT: template} if template else {}
    )
    for source in templates.values():
        if not isinstance(source, str):
            raise VocabularyError(
                f"tokenizer '{name}': its chat_template is a {type(source).__name__}, not a Jinja template. Write one, "
                "or remove the entry from its tokenizer_config.json."
            )
    return templates


def template_tokens(tokenizer: Any) -> Mapping[str, Any]:
    """The special tokens that a chat template sees, by name."""
    return tokenizer.special_tokens if isinstance(tokenizer, TokenizerInfo) else dict(tokenizer.special_tokens_map)


def _ids_of_a(tokenizer: Any) -> list[int]:
    """Ids of the text "a" with everything the tokenizer adds; calling it would change its truncation settings."""
    if not tokenizer.is_fast:
        return list(tokenizer("a", add_special_tokens=True)["input_ids"])
    encoded = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    return [token for token, counts in zip(encoded.ids, encoded.attention_mask, strict=True) if counts]


def markup_tokens(special: set[str]) -> frozenset[str]:
    """Special tokens that a text may hold by accident and that would then be read as tokens."""
    return frozenset(token for token in special if len(token) >= _SHORTEST_MARKUP and not token.isspace())


def same_tokenizer(first: "PreTrainedTokenizerBase", second: "PreTrainedTokenizerBase") -> bool:
    """Whether two tokenizers give every text the same ids and pad with the same id on the same side."""
    if first is second:
        return True
    if first.pad_token_id != second.pad_token_id or first.padding_side != second.padding_side:
        return False
    if first.is_fast and second.is_fast:
        return _definition(first) == _definition(second)
    # Slow tokenizers keep their rules in code, so that only class, vocabulary and settings can be compared.
    settings = [(type(t), t.get_vocab(), t.special_tokens_map, _plain_settings(t)) for t in (first, second)]
    return settings[0] == settings[1]


def ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Give a tokenizer without a pad token one from its own vocabulary, which never grows.

    Padding is masked by length, so any token would do for attention. But a decoder with a classification head finds
    the last token of a row by the pad id: best is a token that no text holds, next the end of text. The caller writes
    `tokenizer.pad_token_id` to the configuration of each model that reads the padded batch.

    Returns:
        The choice and its reason, as logged; None where the tokenizer has a pad token.

    Raises:
        VocabularyError: The vocabulary has no token to pad with.
    """
    if tokenizer.pad_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    reserved = next((name for name in _PAD_NAMES if name in vocabulary), None)
    choices = (
        (reserved, "the vocabulary reserves it for padding"),
        (tokenizer.eos_token, "the vocabulary reserves none for padding, and texts do not hold the end of text"),
        (tokenizer.unk_token, "the vocabulary has neither a token for padding nor one for the end of text"),
    )
    token, reason = next(((token, why) for token, why in choices if token in vocabulary), (None, ""))
    if token is None:
        raise VocabularyError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: no pad, end-of-text or unknown token."
            " Set pad_token in its folder to a token of its vocabulary."
        )
    size = len(tokenizer)
    tokenizer.pad_token = str(token)
    assert len(tokenizer) == size
    message = f"pad token set to '{token}' (id {tokenizer.pad_token_id}): {reason}"
    logger.warning("tokenizer %s: %s.", tokenizer.name_or_path or type(tokenizer).__name__, message)
    return message


@contextmanager
def truncating_right(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Truncate at the end, whatever the tokenizer's default; its state, saved with the student, is restored after."""
    side = tokenizer.truncation_side
    fast: Any = tokenizer
    backend = fast.backend_tokenizer if tokenizer.is_fast else None
    truncation, padding = (backend.truncation, backend.padding) if backend else (None, None)
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side = side
        if backend:
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _definition(tokenizer: Any) -> dict[str, Any]:
    """All rules and the vocabulary, without the padding and truncation that the last call set."""
    stored: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in stored.items() if key not in ("truncation", "padding", "version")}


def _plain_settings(tokenizer: "PreTrainedTokenizerBase") -> dict[str, object]:
    return {
        key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool | int) or value is None
    }
