import re

import pytest

from flexkd.data.encoding.vocabulary import SharedVocabulary, check_labels, compare_vocabularies
from flexkd.errors import VocabularyError
from tests.data.encoding.byte_tokenizers import SPECIALS, byte_tokenizer

SIZE = 256 + len(SPECIALS)
TOKENIZER = byte_tokenizer()


def test_M14_padded_outputs_are_cut_to_the_real_tokens_and_told() -> None:
    assert compare_vocabularies(TOKENIZER, byte_tokenizer(), SIZE, SIZE) == SharedVocabulary(SIZE)
    shared = compare_vocabularies(TOKENIZER, byte_tokenizer(), SIZE + 128, SIZE + 57)
    assert shared.size == SIZE
    assert shared.note == (
        f"the teacher has {SIZE + 128} outputs, the student {SIZE + 57}, and both know {SIZE} tokens: 128 columns of"
        " the teacher and 57 of the student are cut before probabilities are taken."
    )
    assert compare_vocabularies(TOKENIZER, TOKENIZER, SIZE, SIZE + 5).size == SIZE


def test_D11_tokens_that_only_one_has_at_the_end_are_cut() -> None:
    more = byte_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>", "<|c|>"]})
    assert len(more) == SIZE + 3
    assert compare_vocabularies(more, TOKENIZER, SIZE + 3, SIZE).size == SIZE
    assert compare_vocabularies(TOKENIZER, more, SIZE, SIZE + 3).size == SIZE


def test_D11_equal_sizes_with_swapped_tokens_are_refused_with_the_first_ones() -> None:
    swapped = byte_tokenizer(specials=("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", *SPECIALS[5:]))
    with pytest.raises(VocabularyError) as caught:
        compare_vocabularies(TOKENIZER, swapped, SIZE, SIZE)
    message = str(caught.value)
    assert message.startswith(
        f"teacher and student disagree on 2 of {SIZE} tokens (id 3, '<|user|>' vs '<|system|>'; id 4, '<|system|>' vs"
    )
    assert "classification works" in message
    assert "flexkd generate" in message
    other = byte_tokenizer(specials=("<s>", "</s>", "<pad>", "<|x|>"), additional_special_tokens=[])
    with pytest.raises(VocabularyError, match=re.escape("; ...)")) as caught:
        compare_vocabularies(TOKENIZER, other, SIZE, SIZE)
    assert str(caught.value).count(" vs ") == 5


def test_M14_a_label_beyond_the_cut_is_refused() -> None:
    shared = SharedVocabulary(10)
    check_labels([{"id": "a", "labels": [-100, 9]}, {"id": "b", "labels": []}], shared)
    with pytest.raises(VocabularyError, match=r"^b: the answer holds token 10, but teacher and student share only 10"):
        check_labels([{"id": "a", "labels": [-100, 9]}, {"id": "b", "labels": [10]}], shared)
