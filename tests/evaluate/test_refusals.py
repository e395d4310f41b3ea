"""Batches, ids, labels and prompts of a script that do not fit are refused in words."""

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.errors import DataError, FlexKDError, RecipeError, ShapeError, UnsupportedModelError, VocabularyError
from flexkd.evaluate.classification import agreement, classification_metrics, predict
from flexkd.evaluate.generation import GenerationSettings, generate_answers
from flexkd.evaluate.likelihood import likelihoods
from tests.evaluate.language import STOP, language_model, word_tokenizer
from tests.tiny import tiny_batch, tiny_model

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.0]])


def test_R12_rows_keep_their_ids() -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    batch: dict[str, Any] = tiny_batch(model)
    assert predict(model, [{**batch, "example_id": torch.arange(4) + 10}]).ids == ("10", "11", "12", "13")
    with pytest.raises(DataError, match="example_id names 3 rows of 4"):
        predict(model, [{**batch, "example_id": ["a", "b", "c"]}])


def test_R12_a_batch_without_labels_has_none_whatever_labels_are() -> None:
    model = tiny_model("bert", num_hidden_layers=1)
    batch = tiny_batch(model)
    bare = {key: value for key, value in batch.items() if key != "labels"}
    for labels in (torch.rand(4), torch.rand(4, 3)):
        found = predict(model, [bare, {**batch, "labels": labels}]).labels
        assert found[:4].isnan().all()
        assert torch.equal(found[4:], labels)
    assert predict(model, [batch, bare]).labels[4:].tolist() == [-100] * 4


@pytest.mark.parametrize("ask", [predict, likelihoods])
def test_R12_batches_are_a_list_of_them(ask: Any) -> None:
    model = tiny_model("llama", "causal", num_hidden_layers=1)
    with pytest.raises(DataError, match=r"batches: one mapping was given\. Give a list"):
        inspect.unwrap(ask)(model, tiny_batch(model))
    if ask is predict:
        with pytest.raises(DataError, match="batches: there are none"):
            predict(model, [])


@pytest.mark.parametrize(
    ("labels", "problem", "error", "expected"),
    [
        (torch.tensor([0, 1, 7, 1]), "single_label", DataError, "7 is none of single_label, whose classes are 0 to 2"),
        (torch.tensor([0, 1, -1, 1]), "single_label", DataError, "-1 is none of single_label"),
        (torch.tensor([0.0, 1.0, 1.0, 1.0]), "single_label", RecipeError, "are float32 where each is a class of 3"),
        (torch.zeros(4, 1).long(), "single_label", ShapeError, "of shape [4, 1] for logits of [4, 3]"),
        (torch.zeros(3).long(), "single_label", ShapeError, "of shape [3] for logits of [4, 3]"),
        (torch.full((4, 3), -1.0), "multi_label", DataError, "-1 is none of multi_label"),
        (torch.full((4, 3), 0.5), "multi_label", DataError, "0.5 is none of multi_label"),
    ],
)
def test_R12_metrics_of_labels_that_do_not_exist_are_refused(
    labels: Tensor, problem: str, error: type[FlexKDError], expected: str
) -> None:
    with pytest.raises(error, match=re.escape(expected)):
        classification_metrics(LOGITS, labels, problem)


def test_R12_a_value_that_is_infinite_has_no_metric() -> None:
    with pytest.raises(DataError, match="inf is none of regression"):
        classification_metrics(LOGITS[:, :1], torch.tensor([0.0, 1.0, math.inf, 2.0]), "regression")


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_R12_agreement_never_broadcasts(problem: str) -> None:
    for teacher in (LOGITS[:1], LOGITS[:, :2], LOGITS[:, :1]):
        with pytest.raises(ShapeError, match=re.escape(f"of shape [4, 3], the teacher of {list(teacher.shape)}")):
            inspect.unwrap(agreement)(LOGITS, teacher, problem)


def test_R12_likelihoods_are_of_labels_that_the_outputs_hold() -> None:
    model = tiny_model("llama", "causal", num_hidden_layers=1)
    batch = tiny_batch(model)
    for size in (10, None):
        labels = batch["labels"] if size else torch.full_like(batch["labels"], 61)
        with pytest.raises(DataError, match=f"does not exist: outputs are 0 to {9 if size else 60}"):
            likelihoods(model, [{**batch, "labels": labels}], vocab_size=size)
    with pytest.raises(DataError, match="batch: no tensor 'labels'"):
        likelihoods(model, [{"input_ids": batch["input_ids"]}])
    classifier = tiny_model("bert", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"writes no text.*classification\.predict"):
        likelihoods(classifier, [tiny_batch(classifier)])


@pytest.mark.parametrize(
    ("prompts", "error", "expected"),
    [
        ([("a", [5]), ("a", [6])], DataError, "'a' appears twice"),
        ([("a", [5]), ("b", [])], DataError, "'b' has no tokens"),
        ([("a", [5, 999])], VocabularyError, "gives the id 999"),
    ],
)
def test_R04_prompts_that_no_answer_belongs_to_are_refused(
    prompts: list[tuple[str, list[int]]], error: type[FlexKDError], expected: str
) -> None:
    rows = [{"id": id_, "input_ids": ids} for id_, ids in prompts]
    model, tokenizer = language_model("llama"), word_tokenizer()
    with pytest.raises(error, match=re.escape(expected)):
        generate_answers(model, tokenizer, rows, GenerationSettings(2), stop_ids=(STOP,))


@pytest.mark.parametrize(
    "changes",
    [{"max_new_tokens": 0}, {"batch_size": 0}, {"num_beams": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 2.0}],
)
def test_R04_settings_that_decode_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"generation.*{next(iter(changes))}"):
        GenerationSettings(**{"max_new_tokens": 2, "do_sample": True, **changes})
