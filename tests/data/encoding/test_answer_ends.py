"""One rule for the tokens that end an answer, from all that a checkpoint may say."""

import re
from typing import Any

import pytest

from flexkd.data.encoding.answer_ends import CheckpointEnds, answer_ends, checkpoint_ends, ensure_end_token
from flexkd.errors import UnsupportedModelError, VocabularyError
from tests.data.encoding.byte_tokenizers import byte_tokenizer
from tests.evaluate.language import STOP, word_tokenizer
from tests.tiny import VOCABULARY

SAID = "generation_config.eos_token_id"


def ends(generation_config: dict[str, Any], config: dict[str, Any], default: Any = None) -> tuple[int, ...]:
    return checkpoint_ends(generation_config, config, default=default).ids


@pytest.mark.parametrize(
    ("generation_config", "config", "default", "ids"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 2}, 2, (2, 7)),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, 2, (7,)),
        ({"eos_token_id": (7, 2, 7)}, {}, 2, (7, 2)),
        # Without a generation_config, or with one that names no end, the config says it.
        ({}, {"eos_token_id": [5, 6]}, 2, (5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": 5}, 2, (5,)),
        ({}, {"text_config": {"eos_token_id": [1, 106]}}, 1, (1, 106)),
        ({}, {"decoder": {"eos_token_id": 9}}, None, (9,)),
        ({}, {"eos_token_id": None, "text_config": {}}, None, ()),
        ({"eos_token_id": -1}, {"eos_token_id": -1}, None, ()),
        ({"eos_token_id": []}, {}, None, ()),
        # Set in code on a model whose generation_config was made of its config.
        ({"eos_token_id": [2, 7], "_from_model_config": True}, {}, 2, (2, 7)),
    ],
)
def test_R04_the_checkpoint_names_its_ends(
    generation_config: dict[str, Any], config: dict[str, Any], default: Any, ids: tuple[int, ...]
) -> None:
    result = checkpoint_ends(generation_config, config, default=default)
    assert (result.ids, result.is_default) == (ids, not ids)


@pytest.mark.parametrize("generation_config", [{}, {"eos_token_id": 9, "_from_model_config": True}])
def test_R04_what_only_the_class_of_a_config_says_is_a_default(generation_config: dict[str, Any]) -> None:
    result = checkpoint_ends(generation_config, {}, default=9)
    assert (result.ids, result.is_default) == ((9,), True)
    # An ordinary word of the vocabulary ends no answer by default; a special token does.
    assert answer_ends("w2", word_tokenizer(), result, num_tokens=VOCABULARY).ids == (STOP,)
    start = CheckpointEnds((1,), is_default=True)
    assert answer_ends("w2", word_tokenizer(), start, num_tokens=VOCABULARY) == answer_ends(
        "w2", word_tokenizer(), CheckpointEnds((1, 9), is_default=True), num_tokens=VOCABULARY
    )


@pytest.mark.parametrize("value", ["</s>", [2, "7"], True, [2.0], {"eos": 2}])
def test_R04_an_end_that_is_no_number_is_refused(value: Any) -> None:
    said = re.escape(f"teacher.model: {SAID}: {value!r} are no token ids. Give the number of a token, or a list.")
    with pytest.raises(UnsupportedModelError, match=said):
        checkpoint_ends({"eos_token_id": value}, {}, where="teacher.model")


def test_R04_all_that_end_an_answer_the_one_that_is_trained_first() -> None:
    result = answer_ends("w8", word_tokenizer(), CheckpointEnds((2, 7), SAID), num_tokens=VOCABULARY, where="teacher")
    assert result.ids == (8, 2, 7)
    assert result.notes == (
        f"teacher: {SAID}: 7 ('w7') is an ordinary token of the tokenizer, and answers end there, as the checkpoint "
        "says.",
        f"teacher: {SAID} is [2, 7], and rows teach answers to end with 'w8' (id 8). Each of them ends an answer.",
    )
    assert answer_ends("w2", word_tokenizer(), CheckpointEnds((2,)), num_tokens=VOCABULARY).notes == ()


def test_R04_an_id_that_is_no_token_ends_nothing_and_is_said() -> None:
    result = answer_ends("w2", word_tokenizer(), CheckpointEnds((2, 99), SAID), num_tokens=VOCABULARY)
    assert result.ids == (2,)
    assert result.notes == (f"model: {SAID}: 99 is none of its {VOCABULARY} tokens, and ends nothing.",)
    with pytest.raises(VocabularyError, match=re.escape("model: answers end with 'w9' (id 9), but it embeds 9 tokens")):
        answer_ends("w9", word_tokenizer(), CheckpointEnds(), num_tokens=9)


def test_R04_stop_strings_are_named_for_they_end_nothing_here() -> None:
    checkpoint = checkpoint_ends({"eos_token_id": 2, "stop_strings": "User:"}, {})
    result = answer_ends("w2", word_tokenizer(), checkpoint, num_tokens=VOCABULARY)
    assert result.notes == ("model: generation_config.stop_strings ['User:'] are not used: answers end at tokens.",)


def test_R04_a_tokenizer_without_an_end_takes_the_one_of_its_checkpoint() -> None:
    tokenizer = byte_tokenizer(eos_token=None)
    assert ensure_end_token(tokenizer, CheckpointEnds()) is None
    assert tokenizer.eos_token is None
    size, words = len(tokenizer), tokenizer.convert_tokens_to_ids(["a", "</s>"])
    # Only by default: "a" may be any word. Said by the checkpoint, what is out of the vocabulary is passed over.
    assert ensure_end_token(tokenizer, CheckpointEnds((words[0],), is_default=True)) is None
    note = ensure_end_token(tokenizer, CheckpointEnds((size, words[1]), SAID))
    assert note is not None
    assert f"it names no end of text; '</s>' (id {words[1]}) is taken, as {SAID} says." in note
    assert (tokenizer.eos_token, len(tokenizer)) == ("</s>", size)
    assert ensure_end_token(tokenizer, CheckpointEnds((words[0],))) is None, "it has one"
