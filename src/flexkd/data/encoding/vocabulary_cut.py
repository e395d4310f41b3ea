"""A smaller vocabulary out of a larger one: which tokens stay, and the tokenizer.json that knows these alone."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

from flexkd.errors import VocabularyError

_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens for single bytes, of a vocabulary that falls back on bytes."""


class Vocabulary(Protocol):
    """The model of a `tokenizer.json`: its tokens, what they are made of, and the same model with fewer of them."""

    tokens: Mapping[str, int]

    def coverage(self) -> set[int]:
        """Ids without which a text could be lost, as those of single bytes or characters."""

    def parts(self, token: str) -> set[int]:
        """Ids of the tokens that have to be known so that this one is made of a text, without its own."""

    def by_value(self) -> Sequence[int]:
        """All ids, those of the tokens that are most useful for any text first."""

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The model with the tokens that have a new id."""


class BytePairs:
    """Byte-pair encoding, of bytes or of characters."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        if model.get("continuing_subword_prefix"):
            raise _cannot_be_cut(f"its byte-pair encoding marks inner parts by '{model['continuing_subword_prefix']}'")
        self._model = model
        self._suffix: str = model.get("end_of_word_suffix") or ""
        self.tokens: Mapping[str, int] = model["vocab"]
        pairs = (_pair(merge) for merge in model["merges"])
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def coverage(self) -> set[int]:
        """All bytes, or all characters."""
        if self._model.get("byte_fallback"):
            present = {self.tokens[token] for token in _BYTES if token in self.tokens}
            if len(present) == len(_BYTES):
                return present
        return {number for token, number in self.tokens.items() if len(self._symbols(token)) == 1}

    def parts(self, token: str) -> set[int]:
        """What the merges pass on the way to this token."""
        symbols, passed = self._symbols(token), set(self._symbols(token))
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                # No merges make it: it is looked up whole (ignore_merges), or never met.
                return set()
            place = pairs.index(best)
            symbols[place : place + 2] = ["".join(best)]
            passed.add(symbols[place])
        return {self.tokens[part] for part in passed if part in self.tokens} - {self.tokens[token]}

    def by_value(self) -> Sequence[int]:
        """Tokens of earlier merges first, as they are more frequent where the merges were learnt."""
        ranks = {"".join(pair): rank for pair, rank in reversed(self._ranks.items())}
        return [self.tokens[token] for token in sorted(self.tokens, key=lambda token: ranks.get(token, -1))]

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Merges whose parts and result are all there."""
        present = {token: new_ids[number] for token, number in self.tokens.items() if number in new_ids}
        merges = [
            merge
            for merge, (left, right) in zip(self._model["merges"], self._ranks, strict=True)
            if left in present and right in present and left + right in present
        ]
        return {**self._model, "vocab": present, "merges": merges}

    def _symbols(self, token: str) -> list[str]:
        if not self._suffix or not token.endswith(self._suffix) or token == self._suffix:
            return list(token)
        text = token.removesuffix(self._suffix)
        return [*text[:-1], f"{text[-1]}{self._suffix}"]


class WordPieces:
    """The longest known piece first."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._prefix: str = model["continuing_subword_prefix"]
        self.tokens: Mapping[str, int] = model["vocab"]

    def coverage(self) -> set[int]:
        """Characters as a first and as a later piece, and all pieces with a character that is not there as one."""
        return _with_all_characters(self.tokens, ("", self._prefix))

    def parts(self, token: str) -> set[int]:
        """Nothing: a piece is found as it is."""
        return set()

    def by_value(self) -> Sequence[int]:
        """By id, as vocabularies of this kind are sorted by how frequent their words are."""
        return sorted(self.tokens.values())

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The pieces that stay."""
        present = {token: new_ids[number] for token, number in self.tokens.items() if number in new_ids}
        return {**self._model, "vocab": present}


class Unigrams:
    """The most likely split into tokens that each have a probability."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self.tokens: Mapping[str, int] = {token: number for number, (token, _) in enumerate(model["vocab"])}

    def coverage(self) -> set[int]:
        """All bytes where it falls back on them, else all characters, and the token for what is unknown."""
        unknown = {self._model["unk_id"]} if self._model.get("unk_id") is not None else set()
        present = {self.tokens[token] for token in _BYTES if token in self.tokens}
        if self._model.get("byte_fallback") and len(present) == len(_BYTES):
            return present | unknown
        return _with_all_characters(self.tokens, ("",)) | unknown

    def parts(self, token: str) -> set[int]:
        """Nothing: a token is found as it is."""
        return set()

    def by_value(self) -> Sequence[int]:
        """The most likely first."""
        scores = [score for _, score in self._model["vocab"]]
        return sorted(range(len(scores)), key=lambda number: -scores[number])

    def cut(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The tokens that stay, with the probabilities that they had."""
        vocabulary = [entry for number, entry in enumerate(self._model["vocab"]) if number in new_ids]
        unknown = self._model.get("unk_id")
        return {**self._model, "vocab": vocabulary, "unk_id": None if unknown is None else new_ids[unknown]}


_KINDS: Final[Mapping[str, Callable[[Mapping[str, Any]], Vocabulary]]] = {
    "BPE": BytePairs,
    "WordPiece": WordPieces,
    "Unigram": Unigrams,
}


def vocabulary_of(definition: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`.

    Raises:
        VocabularyError: Its kind cannot be cut without losing texts.
    """
    model = definition["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if "unk_id" in model else "WordPiece")
    if kind not in _KINDS:
        raise _cannot_be_cut(f"it is a {kind}, in which a word without a token of its own is lost")
    return _KINDS[kind](model)


def kept_tokens(
    definition: Mapping[str, Any], counts: Mapping[int, int], *, size: int | None, required: Collection[int] = ()
) -> list[int]:
    """Ids of the tokens that a smaller vocabulary keeps, ascending: a token's new id is its place among them.

    Kept are tokens that are added or special, those without which a text could be lost, and those that the training
    rows use, each with what it is made of. A text all of whose tokens are kept is split as before.

    Args:
        definition: The `tokenizer.json`.
        counts: Id to how often the training rows hold it.
        size: Number of tokens: the most frequent of the rows, then the most useful for any text. None: those that the
            rows use.
        required: Ids that stay in any case, as those that the model's config names.

    Raises:
        VocabularyError: The kind of vocabulary cannot be cut, or even what has to stay is more than `size`.
    """
    vocabulary = vocabulary_of(definition)
    names = {number: token for token, number in vocabulary.tokens.items()}
    added = {entry["id"] for entry in definition.get("added_tokens", ())}
    signs = {vocabulary.tokens[sign] for sign in _signs(definition) if sign in vocabulary.tokens}
    token_ids = {*added, *signs, *vocabulary.coverage(), *required}
    for number in list(token_ids):
        if number in names:
            token_ids |= vocabulary.parts(names[number])
    if size is not None and len(token_ids) > size:
        raise VocabularyError(
            f"student.vocabulary: {size:,} tokens are too few: characters, special tokens and those that the model's "
            f"config names are {len(token_ids):,}. Ask for at least that many, or for auto."
        )
    for number in _candidates(vocabulary, counts, size):
        if number in token_ids or number not in names:
            continue
        more = {number, *vocabulary.parts(names[number])} - token_ids
        if size is None or len(token_ids) + len(more) <= size:
            token_ids |= more
    return sorted(token_ids)


def check_embedded(token_ids: Collection[int], size: int | None) -> None:
    """Refuse a vocabulary with tokens that its model does not embed, whose rows there are none to cut out.

    Args:
        token_ids: Ids of all tokens.
        size: Number of tokens that the model embeds; None: not known.

    Raises:
        VocabularyError: It embeds fewer.
    """
    if size is not None and max(token_ids) >= size:
        raise VocabularyError(
            f"student.vocabulary: the teacher's tokenizer has a token with the id {max(token_ids)}, and the teacher "
            f"embeds {size} tokens. Remove student.vocabulary, or save the teacher with an embedding for each token."
        )


def _signs(definition: Mapping[str, Any]) -> set[str]:
    """Texts that stand for others between text and tokens, as U+2581 for a space: written as bytes they would stay."""
    signs: set[str] = set()
    steps = [definition.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, Mapping):
            signs |= {step[key] for key in ("content", "prepend", "replacement") if isinstance(step.get(key), str)}
            steps += [part for key in ("normalizers", "pretokenizers", "decoders") for part in step.get(key, ())]
    return signs


def _candidates(vocabulary: Vocabulary, counts: Mapping[int, int], size: int | None) -> Iterator[int]:
    """Tokens of the rows, the most frequent first, then, for a number of tokens, all others by their value."""
    yield from sorted(counts, key=lambda number: (-counts[number], number))
    if size is not None:
        yield from vocabulary.by_value()


def cut_definition(definition: Mapping[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
    """The `tokenizer.json` of a vocabulary that has only these tokens, numbered by their place."""
    new_ids = {number: place for place, number in enumerate(token_ids)}
    cut = copy.deepcopy(dict(definition))
    cut["model"] = vocabulary_of(definition).cut(new_ids)
    cut["added_tokens"] = [{**entry, "id": new_ids[entry["id"]]} for entry in definition.get("added_tokens", ())]
    cut["post_processor"] = _renumbered(definition.get("post_processor"), new_ids)
    # Settings of the last call, which name the old id of the padding.
    cut["truncation"] = cut["padding"] = None
    return cut


def _renumbered(processor: Any, new_ids: Mapping[int, int]) -> Any:
    """A post-processor with new ids: of templates, pairs of token and id, and sequences of processors."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_renumbered(part, new_ids) for part in changed["processors"]]
    if isinstance(changed.get("special_tokens"), Mapping):
        changed["special_tokens"] = {
            name: {**entry, "ids": [new_ids[number] for number in entry["ids"]]}
            for name, entry in changed["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in changed:
            token, number = changed[name]
            changed[name] = [token, new_ids[number]]
    return changed


def _with_all_characters(tokens: Mapping[str, int], prefixes: Sequence[str]) -> set[int]:
    """Single characters behind each of the prefixes, and tokens with a character that lacks one of these."""
    single: dict[str, set[str]] = {prefix: set() for prefix in prefixes}
    texts = {}
    for token, number in tokens.items():
        prefix = max(
            (prefix for prefix in prefixes if token.startswith(prefix) and token != prefix), key=len, default=""
        )
        texts[number] = token[len(prefix) :]
        if len(texts[number]) == 1:
            single[prefix].add(texts[number])
    alphabet = set.intersection(*single.values())
    return {number for number, text in texts.items() if len(text) == 1 or not alphabet.issuperset(text)}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two sides of a merge; older files write them in one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _cannot_be_cut(reason: str) -> VocabularyError:
    return VocabularyError(
        f"student.vocabulary: the teacher's vocabulary cannot be cut: {reason}. Remove student.vocabulary."
    )
