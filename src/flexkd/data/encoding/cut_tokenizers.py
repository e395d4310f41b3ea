"""A tokenizer with fewer tokens, as plain transformers loads it."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.encoding.vocabulary_cut import cut_definition, kept_tokens
from flexkd.errors import VocabularyError
from flexkd.facts.names import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN_CLASS: Final = "PreTrainedTokenizerFast"
"""The class that reads a tokenizer.json as it stands."""


@dataclass(frozen=True)
class CutTokenizer:
    """A tokenizer that knows some of the tokens of another.

    Attributes:
        token_ids: The other's ids of its tokens, ascending: token i is the other's token `token_ids[i]`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    token_ids: tuple[int, ...]


def token_counts(rows: Iterable[EncodedRow], *, with_labels: bool) -> Counter[int]:
    """How often rows hold each token.

    Args:
        with_labels: Labels are tokens too, as where text is written.
    """
    counts: Counter[int] = Counter()
    for row in rows:
        counts.update(row["input_ids"])
        if with_labels:
            counts.update(label for label in row["labels"] if label != IGNORE_INDEX)
    return counts


def cut_tokenizer(
    tokenizer: "PreTrainedTokenizerBase",
    counts: Counter[int],
    *,
    size: int | None,
    required: Collection[int] = (),
    required_below: int = 0,
) -> CutTokenizer:
    """A tokenizer that knows the most useful tokens of another, with its rules, template and special tokens.

    A text all of whose tokens are kept is split as before, others take more tokens; none is lost that was not before.

    Args:
        counts: From `token_counts`, of the training rows.
        size: As in `kept_tokens`.
        required: Ids that stay in any case.
        required_below: So do all ids below this one, so that they keep their numbers.

    Raises:
        VocabularyError: The tokenizer is not defined by a tokenizer.json, or its kind cannot be cut.
    """
    if not tokenizer.is_fast:
        raise VocabularyError(
            f"student.vocabulary: the teacher's tokenizer ({type(tokenizer).__name__}) is not defined by a "
            "tokenizer.json, and only such a vocabulary can be cut. Remove student.vocabulary."
        )
    fast: Any = tokenizer
    definition = json.loads(fast.backend_tokenizer.to_str())
    special = {int(number) for number in tokenizer.all_special_ids}
    vocabulary_ids = set(tokenizer.get_vocab().values())
    lowest = range(required_below)
    token_ids = kept_tokens(definition, counts, size=size, required=(special | {*required, *lowest}) & vocabulary_ids)
    cut = cut_definition(definition, token_ids)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    expected = {names[number]: place for place, number in enumerate(token_ids)}
    loaded = _loaded(tokenizer, cut)
    if loaded.get_vocab() != expected:
        raise VocabularyError(
            f"student.vocabulary: the ids of the teacher's tokenizer ({type(tokenizer).__name__}) cannot be made "
            "consecutive, as its added tokens lie between the others. Remove student.vocabulary."
        )
    return CutTokenizer(loaded, tuple(token_ids))


def _loaded(tokenizer: "PreTrainedTokenizerBase", definition: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a definition, of the same class unless that class would change the definition."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        config_file = folder / TOKENIZER_CONFIG_FILE
        config = json.loads(config_file.read_text(encoding="utf-8"))
        # Ids of the whole vocabulary; those of the tokenizer.json count.
        config.pop("added_tokens_decoder", None)
        for path in folder.iterdir():
            if path.suffix in (".txt", ".model") or path.name in ("vocab.json", "merges.txt", "added_tokens.json"):
                path.unlink()
        (folder / TOKENIZER_FILE).write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
        for class_name in (config.get("tokenizer_class", _PLAIN_CLASS), _PLAIN_CLASS):
            config_file.write_text(json.dumps({**config, "tokenizer_class": class_name}), encoding="utf-8")
            loaded = _from_folder(folder)
            if loaded is not None and _has_definition(loaded, definition):
                break
    assert loaded is not None, "the plain class reads every tokenizer.json"
    loaded.name_or_path = tokenizer.name_or_path
    return loaded


def _from_folder(folder: Path) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception:  # classes that need other files raise what they like
        return None
    return tokenizer


def _has_definition(tokenizer: Any, definition: dict[str, Any]) -> bool:
    """Whether a loaded tokenizer does what its tokenizer.json said, padding and truncation aside."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    names = ("model", "normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
    return all(stored.get(name) == definition.get(name) for name in names)
