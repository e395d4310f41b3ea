"""A teacher that is always right is always right, however its classes and those of the rows are named and stored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from flexkd.data.examples.classification import ClassificationData
from flexkd.errors import VocabularyError
from flexkd.models.loading.pretrained import load_tokenizer
from flexkd.pipeline.job import Job, prepare
from flexkd.preflight import preflight, read_rows
from flexkd.recipe.model_sections import FineTune
from flexkd.tasks.classifiers import classifying_teacher
from tests.job_files import BAD, GOOD, job, sentences, write_tokenizer

WIDTH = 16


def write_oracle(folder: Path, *names: str, good: int, **config: Any) -> str:
    """A BERT that looks for words of praise, in any place of a text, and says it in the output `good`."""
    words = 4 + len(GOOD) + len(BAD) + 10
    settings = BertConfig(
        vocab_size=words, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=40, id2label=dict(enumerate(names)), hidden_act="relu", **config,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(settings).eval()
    praise = torch.zeros(WIDTH)
    praise[:2] = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        table = model.bert.embeddings.word_embeddings.weight
        table[4 : 4 + len(GOOD)] = praise
        table[4 + len(GOOD) : 4 + len(GOOD) + len(BAD)] = -praise
        # Queries and keys of zero look everywhere alike.
        attentions = [layer.attention for layer in model.bert.encoder.layer]
        matrices = [matrix for attention in attentions for matrix in (attention.self.value, attention.output.dense)]
        for matrix in (*matrices, model.bert.pooler.dense):
            matrix.weight.copy_(torch.eye(WIDTH))
        model.classifier.weight[good] = praise
        model.classifier.weight[1 - good] = -praise
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return str(folder)


def write_labelled(path: Path, bad: Any, good: Any) -> str:
    rows = [{"text": text, "label": good if kind else bad} for text, kind in sentences(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def recipe_of(folder: Path, oracle: str, rows: str, **changes: Any) -> Any:
    return job(folder, data__train=rows, teacher__model=oracle, teacher__fine_tune=None, **changes)


def metrics_of(ready: Job, model: PreTrainedModel) -> dict[str, float | None]:
    """As `flexkd evaluate` prints them."""
    results = ready.predict(model)
    return ready.task.metrics(results, prepare(ready.recipe).predict(ready.teacher))


@pytest.mark.parametrize(
    ("stored", "teacher", "names"),
    [
        ((0, 1), ("POSITIVE", "NEGATIVE"), ["negative", "positive"]),
        ((1, 2), ("LABEL_0", "LABEL_1"), ["negative", "positive"]),
        (("0", "1"), ("positive", "negative"), {0: "Negative", 1: "Positive"}),
        (("bad", "good"), ("good", "BAD"), None),
        (("bad", "good"), ("POSITIVE", "NEGATIVE"), {"good": "POSITIVE", "bad": "NEGATIVE"}),
    ],
)
def test_R02_a_right_teacher_is_right_for_any_storage_of_the_labels(
    tmp_path: Path, stored: tuple[Any, Any], teacher: tuple[str, str], names: Any
) -> None:
    good = next((place for place, name in enumerate(teacher) if name.casefold() in ("positive", "good")), 1)
    oracle = write_oracle(tmp_path / "oracle", *teacher, good=good)
    rows = write_labelled(tmp_path / "rows.jsonl", *stored)
    recipe = recipe_of(tmp_path, oracle, rows, **({} if names is None else {"data__label_names": names}))
    assert preflight(recipe).problems == []
    ready = prepare(recipe)
    assert metrics_of(ready, ready.teacher)["accuracy"] == 1.0


def test_R02_a_model_with_its_classes_in_another_order_is_judged_by_name(tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", 0, 1)
    oracle = write_oracle(tmp_path / "oracle", "negative", "positive", good=1)
    other = write_oracle(tmp_path / "other", "Positive", "Negative", good=0)
    ready = prepare(recipe_of(tmp_path, oracle, rows, data__label_names=["negative", "positive"]))
    model, _ = ready.task.loader.load(other, where="evaluate", own_head=True)
    metrics = metrics_of(ready.for_model(model, load_tokenizer(other)), model)
    assert (metrics["accuracy"], metrics["agreement"]) == (1.0, 1.0)
    unknown = write_oracle(tmp_path / "unknown", "negative", "x", good=1)
    model, _ = ready.task.loader.load(unknown, where="evaluate", own_head=True)
    model.config.id2label = {0: "positive", 1: "x"}
    with pytest.raises(VocabularyError, match=r"^evaluate: .* has the labels \['positive', 'x'\]"):
        ready.for_model(model, load_tokenizer(unknown))


def test_R02_a_student_with_its_classes_in_another_order_starts_with_what_it_knows(tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", "bad", "good")
    oracle = write_oracle(tmp_path / "oracle", "BAD", "GOOD", good=1)
    other = write_oracle(tmp_path / "other", "good", "bad", good=0)
    ready = prepare(recipe_of(tmp_path, oracle, rows))
    student, fresh = ready.task.loader.load(other, where="student.model")
    assert (student.config.id2label, fresh) == ({0: "bad", 1: "good"}, [])
    assert metrics_of(ready, student)["accuracy"] == 1.0
    fine_tuned = ready.recipe.teacher.model_copy(update={"model": other, "fine_tune": FineTune()})
    teacher = classifying_teacher(fine_tuned, ready.data.labels)  # type: ignore[union-attr]
    assert metrics_of(ready, teacher)["accuracy"] == 1.0


def test_R02_check_and_run_refuse_the_same_teacher_in_the_same_words(tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", "bad", "good")
    many = write_oracle(tmp_path / "oracle", "x", "y", good=1, problem_type="multi_label_classification")
    recipe = recipe_of(tmp_path, many, rows)
    (problem,) = preflight(recipe).problems
    assert "was made for multi_label_classification, the data are single_label_classification" in problem
    with pytest.raises(VocabularyError) as refusal:
        prepare(recipe)
    assert str(refusal.value) == problem


def test_R02_rows_are_read_again_for_a_teacher_that_the_check_could_not_see(tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "rows.jsonl", "bad", "good")
    recipe = recipe_of(tmp_path, write_oracle(tmp_path / "oracle", "good", "bad", good=0), rows)
    blind = replace(preflight(recipe), data=read_rows(recipe), teacher_labels=None)
    assert isinstance(blind.data, ClassificationData)
    assert blind.data.labels.names == ("bad", "good")
    with patch("flexkd.pipeline.job.preflight", return_value=blind):
        ready = prepare(recipe)
    assert ready.task.labels == ("good", "bad")
    assert any("taken by name" in note for note in ready.notes)
