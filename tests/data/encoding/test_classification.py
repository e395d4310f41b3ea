import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flexkd.data.encoding.classification import encode, encode_for_both
from flexkd.data.encoding.encoded import Cut
from flexkd.data.encoding.tokenizers import ensure_pad_token, same_tokenizer
from flexkd.data.encoding.vocabulary import check_lengths
from flexkd.data.examples.classification import Example, LabelSpace
from flexkd.errors import DataError, VocabularyError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]
CLASSES = LabelSpace("single_label", ("no", "yes"))


def make_tokenizer(
    words: Sequence[str] = WORDS, *, types: bool = True, template: bool = True, **options: Any
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    if template:
        special = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    settings: dict[str, object] = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_input_names": names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(settings | options))


def example(*texts: str, label: object = 1, name: str = "a:1#0") -> Example:
    return Example(name, texts, label)  # type: ignore[arg-type]


def test_features_of_single_texts() -> None:
    encoded = encode([example("a b"), example("c", label=None)], make_tokenizer(), labels=CLASSES, max_length=8)
    assert encoded.rows == [
        {"id": "a:1#0", "labels": 1, "input_ids": [2, 4, 5, 3], "attention_mask": [1] * 4, "token_type_ids": [0] * 4},
        {"id": "a:1#0", "labels": -100, "input_ids": [2, 6, 3], "attention_mask": [1] * 3, "token_type_ids": [0] * 3},
    ]
    assert (encoded.cut, encoded.teacher_cut) == (Cut(0, 0.0), None)


def test_labels_of_other_problems() -> None:
    def labels(space: LabelSpace, *values: object) -> list[object]:
        rows = [example("a", label=value) for value in values]
        return [row["labels"] for row in encode(rows, make_tokenizer(), labels=space, max_length=8).rows]

    regression = labels(LabelSpace("regression", ("score",)), 2.5, None)
    assert regression[0] == 2.5
    assert regression[1] != regression[1]
    flags = labels(LabelSpace("multi_label", ("x", "y")), (1.0, 0.0), None)
    assert flags[0] == [1.0, 0.0]
    assert [str(value) for value in flags[1]] == ["nan", "nan"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("side", ["right", "left"])
def test_D18_texts_are_cut_at_the_end_and_counted(side: str) -> None:
    tokenizer = make_tokenizer(truncation_side=side)
    rows = [example("a b c d e"), example("a b"), example("e d c b")]
    encoded = encode(rows, tokenizer, labels=CLASSES, max_length=5)
    assert [row["input_ids"] for row in encoded.rows] == [[2, 4, 5, 6, 3], [2, 4, 5, 3], [2, 8, 7, 6, 3]]
    assert encoded.cut == Cut(num_rows=2, mean_lost_tokens=1.5)
    assert all(
        len(row["attention_mask"]) == len(row["token_type_ids"]) == len(row["input_ids"]) for row in encoded.rows
    )
    assert tokenizer.truncation_side == side
    assert tokenizer.backend_tokenizer.truncation is None


def test_D18_pairs_lose_the_longer_text_first() -> None:
    encoded = encode([example("a b c d", "e a")], make_tokenizer(), labels=CLASSES, max_length=7)
    assert encoded.rows[0]["input_ids"] == [2, 4, 5, 3, 8, 4, 3]
    assert encoded.rows[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert encoded.cut == Cut(1, 2.0)


def test_the_tokenizer_keeps_its_own_state() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    before = tokenizer.backend_tokenizer.to_str()
    encoded = encode([example("a b c d e")], tokenizer, labels=CLASSES, max_length=6)
    assert encoded.rows[0]["input_ids"] == [2, 4, 5, 6, 7, 3]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_no_room_and_no_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.max_length: 2 leaves no room beside 2 special tokens"):
        encode([example("a")], make_tokenizer(), labels=CLASSES, max_length=2)
    rows = [example("a"), example(" ", name="a:7#1")]
    with pytest.raises(DataError, match="a:7#1: the tokenizer finds no token in this row"):
        encode(rows, make_tokenizer(template=False), labels=CLASSES, max_length=2)
    assert encode([], make_tokenizer(), labels=CLASSES, max_length=8).rows == []


def test_D14_a_shared_encoding_keeps_the_segments_that_only_the_teacher_takes() -> None:
    student, teacher = make_tokenizer(types=False), make_tokenizer(types=True)
    assert same_tokenizer(student, teacher)
    encoded = encode_for_both([example("a", "b")], student, teacher, labels=CLASSES, max_length=8)
    assert encoded.rows[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert not [key for key in encoded.rows[0] if key.startswith("teacher_")]
    assert encoded.teacher_cut is None
    neither = encode_for_both([example("a", "b")], student, student, labels=CLASSES, max_length=8)
    assert "token_type_ids" not in neither.rows[0]
    asked = encode_for_both([example("a", "b")], student, student, labels=CLASSES, max_length=8, token_type_ids=True)
    assert asked.rows[0]["token_type_ids"] == [0, 0, 0, 1, 1]


def test_D14_each_model_gets_the_encoding_of_its_own_tokenizer() -> None:
    student, teacher = make_tokenizer(types=False), make_tokenizer([*WORDS[:4], "x", *WORDS[4:]])
    assert not same_tokenizer(student, teacher)
    encoded = encode_for_both([example("a b c", "d")], student, teacher, labels=CLASSES, max_length=6)
    assert encoded.rows == [
        {
            "id": "a:1#0",
            "labels": 1,
            "input_ids": [2, 4, 5, 3, 7, 3],
            "attention_mask": [1] * 6,
            "teacher_input_ids": [2, 5, 6, 3, 8, 3],
            "teacher_attention_mask": [1] * 6,
            "teacher_token_type_ids": [0, 0, 0, 0, 1, 1],
        }
    ]
    assert (encoded.cut, encoded.teacher_cut) == (Cut(1, 1.0), Cut(1, 1.0))


def test_D11_same_tokenizer_looks_at_ids_rules_and_pad_not_at_the_last_call() -> None:
    first, second = make_tokenizer(), make_tokenizer()
    second(["a", "b c"], truncation=True, max_length=3, padding=True)
    assert same_tokenizer(first, second)
    assert not same_tokenizer(first, make_tokenizer(template=False))
    assert not same_tokenizer(first, make_tokenizer(pad_token="[UNK]"))
    assert not same_tokenizer(first, make_tokenizer(padding_side="left"))
    swapped = [*WORDS[:4], "b", "a", *WORDS[6:]]
    assert not same_tokenizer(first, make_tokenizer(swapped))


def test_D17_the_model_with_too_few_positions_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check_lengths(8, {"teacher 'big'": 16, "student 'small'": 8, "student 'rotary'": None})
    message = (
        r"^data\.max_length: 12 tokens are too many: student 'small' reads 8, other reads 10\. Set it to 8 or less\.$"
    )
    with pytest.raises(DataError, match=message):
        check_lengths(12, {"teacher 'big'": 16, "student 'small'": 8, "other": 10})
    assert caplog.messages == []
    check_lengths(12, {}, soft_limits={"student 'rotary'": 8, "teacher 'rotary'": 12, "unknown": None})
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("data.max_length: 12 tokens, but student 'rotary' was trained on 8:")


@pytest.mark.parametrize(
    ("words", "options", "token", "why"),
    [
        (["<pad>", *WORDS[1:]], {"eos_token": "[SEP]"}, "<pad>", "reserves it for padding"),
        (["z", *WORDS[1:]], {"eos_token": "[SEP]"}, "[SEP]", "texts do not hold the end of text"),
        (["z", *WORDS[1:]], {}, "[UNK]", "neither a token for padding nor one for the end of text"),
    ],
)
def test_D03_a_missing_pad_token_is_chosen_and_said(
    words: list[str], options: dict[str, Any], token: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(words, pad_token=None, **options)
    size = len(tokenizer)
    message = ensure_pad_token(tokenizer)
    assert message is not None
    assert message.startswith(f"pad token set to '{token}' (id {words.index(token)}): ")
    assert why in message
    assert caplog.records[0].levelno == logging.WARNING
    assert message in caplog.messages[0]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (token, words.index(token))
    assert len(tokenizer) == size
    assert ensure_pad_token(tokenizer) is None


def test_D03_a_vocabulary_without_any_choice_is_refused() -> None:
    tokenizer = make_tokenizer(["z", *WORDS[1:]], pad_token=None, unk_token=None)
    with pytest.raises(VocabularyError, match="no pad, end-of-text or unknown token"):
        ensure_pad_token(tokenizer)


def test_all_rows_go_to_the_tokenizer_in_one_call_and_the_long_ones_in_another() -> None:
    class CountingTokenizer(PreTrainedTokenizerFast):
        calls: ClassVar[list[int]] = []

        def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
            self.calls.append(len(text))
            return super().__call__(text, *args, **options)

    tokenizer = make_tokenizer()
    tokenizer.__class__ = CountingTokenizer
    rows = [example("a b c d e" if index % 100 else "a " * 50) for index in range(1000)]
    encoded = encode(rows, tokenizer, labels=CLASSES, max_length=10)
    assert CountingTokenizer.calls == [1000, 10]
    assert encoded.cut == Cut(10, 42.0)
