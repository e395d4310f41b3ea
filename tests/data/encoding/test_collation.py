from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from flexkd.data.encoding.classification import encode
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.classification import Example, LabelSpace


def encoded_rows(*rows: list[int], **columns: list[Any]) -> list[dict[str, Any]]:
    created = []
    for index, ids in enumerate(rows):
        row = {"id": f"row {index}", "labels": index, "input_ids": ids, "attention_mask": [1] * len(ids)}
        created.append(row | {name: values[index] for name, values in columns.items()})
    return created


@pytest.mark.parametrize("has_mask", [True, False])
def test_D01_pad_that_is_also_end_of_text_stays_visible(has_mask: bool) -> None:
    rows = encoded_rows([3, 4, 2], [3, 2])
    if not has_mask:
        rows = [{key: row[key] for key in ("id", "labels", "input_ids")} for row in rows]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 2], [3, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["labels"].dtype == torch.long


def test_D04_left_and_right_padding_hold_the_same_tokens_and_the_mask_is_always_there() -> None:
    rows = encoded_rows([5, 6, 7], [8], token_type_ids=[[0, 0, 1], [1]])
    right, left = Collator(0)(rows), Collator(0, padding_side="left")(rows)
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]
    for key in ("input_ids", "token_type_ids"):
        assert left[key][left["attention_mask"].bool()].tolist() == right[key][right["attention_mask"].bool()].tolist()
    assert Collator(0)(encoded_rows([5, 6]))["attention_mask"].tolist() == [[1, 1]]


def test_D14_the_teachers_own_encoding_is_padded_apart() -> None:
    teacher: dict[str, list[Any]] = {
        "teacher_input_ids": [[7], [7, 8, 9]],
        "teacher_attention_mask": [[1], [1, 1, 1]],
        "teacher_token_type_ids": [[1], [0, 0, 1]],
    }
    batch = Collator(pad_token_id=0, teacher_pad_token_id=1)(encoded_rows([3, 4], [5], **teacher))
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert batch["teacher_input_ids"].tolist() == [[7, 1, 1], [7, 8, 9]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["teacher_token_type_ids"].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_D15_every_other_key_survives() -> None:
    columns: dict[str, list[Any]] = {
        "teacher_topk": [[0.5, 0.25], [1.0, 0.0]],
        "teacher_logits": [torch.ones(2, 3), torch.zeros(2, 3)],
        "stored": [np.zeros(2), np.ones(2)],
        "ragged": [[1], [1, 2]],
        "language": ["en", "de"],
        "nothing": [None, None],
    }
    batch = Collator(0)(encoded_rows([3], [4], **columns))
    assert batch["example_id"] == ["row 0", "row 1"]
    assert "id" not in batch
    assert batch["teacher_topk"].tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert batch["teacher_topk"].dtype == torch.float32
    assert batch["teacher_logits"].shape == (2, 2, 3)
    assert batch["stored"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert {key: batch[key] for key in ("ragged", "language", "nothing")} == {
        key: columns[key] for key in ("ragged", "language", "nothing")
    }


def test_labels_of_each_problem() -> None:
    def labels(*values: object) -> torch.Tensor:
        result = Collator(0)([{"input_ids": [1], "labels": value} for value in values])["labels"]
        assert isinstance(result, torch.Tensor)
        return result

    assert labels(1, -100).tolist() == [1, -100]
    regression = labels(2.5, float("nan"))
    assert regression.dtype == torch.float32
    assert regression.isnan().tolist() == [False, True]
    assert labels([1.0, 0.0], [float("nan")] * 2).isnan().tolist() == [[False, False], [True, True]]


def test_length_is_rounded_up_to_a_multiple() -> None:
    assert Collator(0, multiple=8)(encoded_rows([1] * 9, [2]))["input_ids"].shape == (2, 16)
    assert Collator(0, multiple=8)(encoded_rows([1] * 8, [2]))["input_ids"].shape == (2, 8)


def test_D03_a_decoder_without_pad_token_reads_a_padded_batch_as_it_reads_single_rows() -> None:
    """The case's own batch of 2: without a pad token the model refuses it."""
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "a", "b", "c", "d"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=6, bos_token_id=None, eos_token_id=1, **shape)).eval()
    rows = [Example("1", ("a b c d",), 0), Example("2", ("d",), 1)]
    encoded = encode(rows, tokenizer, labels=LabelSpace("single_label", ("no", "yes")), max_length=8)
    single = [model(torch.tensor([row["input_ids"]])).logits[0] for row in encoded.rows]
    assert ensure_pad_token(tokenizer) is not None
    assert tokenizer.pad_token_id == 1
    model.config.pad_token_id = tokenizer.pad_token_id
    for side in ("right", "left"):
        batch = Collator(tokenizer.pad_token_id, padding_side=side)(encoded.rows)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logits, torch.stack(single), rtol=1e-5, atol=1e-6)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 6


def answers(*rows: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    return [
        {"id": f"row {n}", "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        for n, (ids, labels) in enumerate(rows)
    ]


def test_D01_M17_labels_of_answers_keep_the_end_and_hide_the_padding() -> None:
    rows = answers(([3, 4, 2], [-100, 4, 2]), ([3, 2], [-100, 2]))
    batch = Collator(pad_token_id=2, multiple=4)(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 2, 2], [3, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 4, 2, -100], [-100, 2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    left = Collator(pad_token_id=2, padding_side="left")(rows)
    assert left["labels"].tolist() == [[-100, 4, 2], [-100, -100, 2]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert (left["labels"] != -100).sum() == (batch["labels"] != -100).sum() == 3


def test_M16_labels_of_an_encoder_decoder_have_a_length_of_their_own() -> None:
    rows = answers(([3, 4, 5, 2], [7, 2]), ([3, 2], [7, 8, 2]), ([3, 4], [7, 2]))
    batch = Collator(pad_token_id=0, seq2seq=True, padding_side="left")(rows)
    assert batch["input_ids"].shape == (3, 4)
    assert batch["labels"].tolist() == [[7, 2, -100], [7, 8, 2], [7, 2, -100]]
    assert Collator(pad_token_id=0, seq2seq=True, multiple=8)(rows)["labels"].shape == (3, 8)
    with pytest.raises(AssertionError, match="row 0: a decoder's labels stand beside its tokens"):
        Collator(pad_token_id=0)(rows)
