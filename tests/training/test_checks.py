"""Models, objectives and batches that do not fit together are refused before the first step, with both numbers."""

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flexkd import FeatureTerm, LayerPair, LogitTerm, Objective, TaskTerm, UnitPairs, score_units
from flexkd.data.encoding.collation import Collator
from flexkd.errors import (
    DataError,
    FlexKDError,
    RecipeError,
    ShapeError,
    TrainingError,
    UnsupportedModelError,
    VocabularyError,
)
from flexkd.scoring.batches import check_batch
from flexkd.training.checks import check_label_spaces
from flexkd.training.trainer import DistillationTrainer
from tests.tiny import TinyTask, tiny_batch, tiny_model
from tests.training.language_rows import answer_rows
from tests.training.test_distillation_trainer import arguments, rows


def small(
    model_type: str = "bert", task: TinyTask = "classification", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    return tiny_model(model_type, task, seed=seed, num_hidden_layers=1, **changes)


def trainer_of(
    folder: Path, goal: Objective, student: PreTrainedModel, teacher: PreTrainedModel | None = None, **options: Any
) -> DistillationTrainer:
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=goal,
        args=arguments(folder, per_device_train_batch_size=4),
        train_dataset=options.pop("data", None) or rows(8),
        data_collator=options.pop("collator", None) or Collator(0),
        **options,
    )


SINGLE, MULTI, VALUE = "single_label_classification", "multi_label_classification", "regression"
NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ({"problem_type": SINGLE}, {"problem_type": MULTI}, f"was made for {MULTI}, the student for {SINGLE}"),
        ({}, {"num_labels": 5}, "has 5 labels, the student 3"),
        ({"num_labels": 2}, {}, "has 3 labels, the student 2"),
        (NAMES, {"id2label": {0: "good", 1: "fair", 2: "BAD"}}, "the same in another order"),
    ],
)
def test_R07_a_teacher_of_other_labels_is_refused_where_its_logits_are_read(
    tmp_path: Path, student: dict[str, Any], teacher: dict[str, Any], expected: str
) -> None:
    learner, master = small(**student), small(seed=1, **teacher)
    with pytest.raises(VocabularyError, match=f"teacher: .*{re.escape(expected)}"):
        trainer_of(tmp_path, Objective(TaskTerm(), LogitTerm()), learner, master)
    # Its states say nothing of labels.
    trainer_of(tmp_path, Objective(TaskTerm(), features=FeatureTerm()), learner, master)


def test_R07_labels_of_the_same_order_or_of_other_names_are_taken() -> None:
    config = small(**NAMES).config
    for names in (["Bad", "fair", "GOOD"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["one", "two", "three"]):
        check_label_spaces(config, small(id2label=dict(enumerate(names))).config)


def test_R07_a_teacher_of_another_problem_is_refused_beside_a_student_that_names_none(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=rf"'cross_entropy', but the teacher, Bert.*, was made for {MULTI}"):
        trainer_of(tmp_path, Objective(logits=LogitTerm()), small(), small(seed=1, problem_type=MULTI))


@pytest.mark.parametrize(
    ("problem", "labels", "right"),
    [(SINGLE, 3, "cross_entropy"), (MULTI, 3, "binary_cross_entropy"), (VALUE, 1, "mse")],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_R07_the_loss_is_that_of_the_students_problem(
    tmp_path: Path, problem: str, labels: int, right: str, loss: str
) -> None:
    student = small(problem_type=problem, num_labels=labels)
    if loss == right:
        trainer_of(tmp_path, Objective(TaskTerm(loss)), student)
        return
    with pytest.raises(VocabularyError, match=rf"objective\.task\.loss: '{loss}'.* made for {problem}.*'{right}'"):
        trainer_of(tmp_path, Objective(TaskTerm(loss)), student)


def test_R07_divergences_alone_are_compared_as_the_student_predicts(tmp_path: Path) -> None:
    student, teacher = (small(problem_type=MULTI, seed=seed) for seed in (1, 2))
    with pytest.raises(VocabularyError, match=r"Give TaskTerm\('binary_cross_entropy'\), with weight 0"):
        trainer_of(tmp_path, Objective(logits=LogitTerm()), student, teacher)
    trainer_of(tmp_path, Objective(TaskTerm("binary_cross_entropy", 0.0), LogitTerm()), student, teacher)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (("llama", "causal"), ("bert", "classification")),
        (("bert", "classification"), ("llama", "causal")),
        (("llama", "causal"), ("t5", "seq2seq")),
    ],
)
def test_R07_models_of_two_kinds_are_refused(tmp_path: Path, student: Any, teacher: Any) -> None:
    for goal in (Objective(logits=LogitTerm()), Objective(TaskTerm(), features=FeatureTerm())):
        with pytest.raises(UnsupportedModelError, match=r"teacher: .* is (a|an) .*, the student, .*, (a|an) "):
            trainer_of(tmp_path, goal, small(*student), tiny_model(*teacher))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("wide", ["student", "teacher"])
def test_R07_two_vocabularies_are_refused_and_the_shared_outputs_are_the_way_out(
    tmp_path: Path, wide: str, top_k: int | None
) -> None:
    student, teacher = (
        small("llama", "causal", vocab_size=70 if wide == name else 61) for name in ("student", "teacher")
    )
    numbers = (70, 61) if wide == "teacher" else (61, 70)
    with pytest.raises(
        VocabularyError, match="teacher: has {} outputs, the student {}. Name how many".format(*numbers)
    ):
        trainer_of(tmp_path, Objective(logits=LogitTerm(top_k=top_k)), student, teacher)
    goal = Objective(logits=LogitTerm(top_k=top_k, shared_outputs=61))
    trainer_of(tmp_path, goal, student, teacher, data=answer_rows(4)).train()


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (
            LayerPair(units=UnitPairs(torch.tensor([32]), torch.tensor([0]))),
            "unit 32 of the student, which has 32 units",
        ),
        (
            LayerPair(units=UnitPairs(torch.tensor([0]), torch.tensor([40]))),
            "unit 40 of the teacher, which has 32 units",
        ),
        (LayerPair(teacher_basis=torch.eye(16)), "is made for 16 units, but the teacher has 32 in layer -1"),
        (
            LayerPair(units=UnitPairs(torch.arange(3), torch.arange(3)), teacher_basis=torch.eye(32)[:, :2]),
            "unit 2 of the teacher, which has 2 directions",
        ),
        (LayerPair(student_layer=2), "has no layer 2. Layers are 1 to 1"),
        (LayerPair(teacher_layer=3), "has no layer 3. Layers are 1 to 1"),
        (LayerPair(teacher_layer=0), "has no layer 0. Layers are 1 to 1"),
    ],
)
def test_R07_units_layers_and_bases_are_those_of_the_models(tmp_path: Path, pair: LayerPair, expected: str) -> None:
    trainer = trainer_of(tmp_path, Objective(features=FeatureTerm(layers=(pair,))), small(), small(seed=1))
    with pytest.raises(ShapeError, match=re.escape(expected)):
        trainer.train()


def changed(batch: dict[str, torch.Tensor], name: str, value: Any) -> dict[str, Any]:
    return {key: one for key, one in {**batch, name: value}.items() if one is not None}


@pytest.mark.parametrize(
    ("task", "name", "value", "error", "expected"),
    [
        ("classification", "labels", None, DataError, "no tensor 'labels' (it has input_ids, "),
        ("classification", "input_ids", None, DataError, "no tensor 'input_ids'"),
        ("classification", "labels", torch.tensor([0, 1, 2]), ShapeError, "labels are [3] for ids of [4, 9]"),
        ("classification", "labels", torch.tensor([0, 1, 3, 2]), DataError, "the label 3 does not exist: student has"),
        ("classification", "labels", torch.tensor([0, -1, 2, 2]), DataError, "the label -1 does not exist"),
        (
            "classification",
            "attention_mask",
            torch.ones(4, 8),
            ShapeError,
            "attention_mask is [4, 8] for ids of [4, 9]",
        ),
        (
            "causal",
            "labels",
            torch.zeros(4).long(),
            ShapeError,
            "labels are [4] for ids of [4, 9]. Give one for each token",
        ),
        (
            "causal",
            "labels",
            torch.full((4, 9), 61),
            DataError,
            "the label 61 does not exist: student has the labels 0 to 60",
        ),
        ("causal", "input_ids", torch.full((4, 9), 61), VocabularyError, "gives the id 61, but it embeds 61 tokens"),
    ],
)
def test_R07_batches_fit_the_models_that_read_them(
    task: TinyTask, name: str, value: Any, error: type[FlexKDError], expected: str
) -> None:
    model = small("bert" if task == "classification" else "llama", task)
    batch = tiny_batch(model)
    check_batch(model, batch, where="student")
    with pytest.raises(error, match=re.escape(expected)):
        check_batch(model, changed(batch, name, value), where="student")
    # Scoring refuses by the same words.
    with pytest.raises(error, match=re.escape(expected.replace("student", "teacher"))):
        score_units(model, [changed(batch, name, value)])


def test_R07_the_trainer_looks_at_each_batch_of_both_models(tmp_path: Path) -> None:
    data = rows(8)
    data[-1]["labels"] = 7
    with pytest.raises(DataError, match="the label 7 does not exist: student has the labels 0 to 2"):
        trainer_of(tmp_path, Objective(TaskTerm()), small(), data=data).train()
    data = [{**row, "labels": 0, "teacher_input_ids": [60, 61]} for row in rows(8)]
    with pytest.raises(VocabularyError, match="teacher: its tokenizer gives the id 61, but it embeds 61"):
        trainer_of(
            tmp_path, Objective(logits=LogitTerm()), small(), small(seed=1), data=data, collator=Collator(0, 0)
        ).train()


@pytest.mark.parametrize("has_mask", [True, False])
def test_R07_padding_without_a_mask_is_said_once(
    tmp_path: Path, has_mask: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def collator(features: Any) -> dict[str, Any]:
        batch = Collator(0)(features)
        return batch if has_mask else changed(batch, "attention_mask", None)

    trainer = trainer_of(tmp_path, Objective(TaskTerm()), small(), collator=collator)
    trainer.args.max_steps = 2
    with caplog.at_level(logging.WARNING, "flexkd"):
        trainer.train()
    said = [record for record in caplog.records if "padding is read as text" in record.getMessage()]
    assert len(said) == (0 if has_mask else 1)


def test_R07_one_logit_teaches_nothing_and_is_refused(tmp_path: Path) -> None:
    student, teacher = small(num_labels=1), small(num_labels=1, seed=1)
    trainer = trainer_of(
        tmp_path, Objective(logits=LogitTerm()), student, teacher, data=[{**r, "labels": 0} for r in rows(8)]
    )
    with pytest.raises(ShapeError, match="1 output where classes are compared"):
        trainer.train()


@pytest.mark.parametrize("own_loss", [False, True])
def test_R07_independent_labels_lie_between_absent_and_present(tmp_path: Path, own_loss: bool) -> None:
    """-100 or -1 for "absent" has a loss without a lower end: it falls for ever."""
    student, goal = small(problem_type=None if own_loss else MULTI), Objective(TaskTerm("binary_cross_entropy"))
    for wrong in (-100.0, -1.0, 2.0, float("inf")):
        data = [{**row, "labels": [1.0, 0.5, wrong]} for row in rows(4)]
        with pytest.raises(DataError, match=rf"the label {wrong:g} is none of 'binary_cross_entropy'.* and NaN where"):
            trainer_of(tmp_path, goal, student, data=data).train()
    data = [{**row, "labels": [1.0, 0.5, float("nan")]} for row in rows(4)]
    trainer_of(tmp_path, goal, student, data=data).train()


def test_R07_a_value_to_learn_is_finite(tmp_path: Path) -> None:
    data = [{**row, "labels": float("inf")} for row in rows(4)]
    with pytest.raises(DataError, match="the label inf is none of 'mse'"):
        trainer_of(tmp_path, Objective(TaskTerm("mse")), small(num_labels=1, problem_type=VALUE), data=data).train()


def test_R07_the_top_of_a_classifier_is_refused_as_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"objective\.logits\.top_k: 2 is only for models that write"):
        trainer_of(tmp_path, Objective(logits=LogitTerm(top_k=2)), small(), small(seed=1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_ids": torch.full((4, 9), -100)}, "the id -100 is no token"),
        (
            {"input_ids": torch.zeros(4, 41).long(), "attention_mask": None},
            "rows of 41 tokens for teacher, which has 40",
        ),
        (
            {"input_ids": torch.zeros(0, 9).long(), "labels": torch.zeros(0).long(), "attention_mask": None},
            "are [0, 9]",
        ),
    ],
)
def test_R07_ids_are_ids_and_rows_fit_the_positions(changes: dict[str, Any], expected: str) -> None:
    batch = tiny_batch(small())
    for name, value in changes.items():
        batch = changed(batch, name, value)
    with pytest.raises(DataError, match=re.escape(expected)):
        score_units(small(), [batch])


def test_R07_scoring_takes_labels_in_any_storage_and_refuses_other_shapes() -> None:
    for problem, storages in ((SINGLE, (torch.int16, torch.uint8)), (MULTI, (torch.int64, torch.bool))):
        model = small(problem_type=problem)
        batch = tiny_batch(model, rows=8)
        right = score_units(model, [batch]).values
        for dtype in storages:
            assert torch.equal(score_units(model, [{**batch, "labels": batch["labels"].to(dtype)}]).values, right)
    batch = tiny_batch(small())
    for labels in (batch["labels"].float(), batch["labels"][:, None]):
        with pytest.raises(ShapeError, match=r"labels: are of shape \[4, 1\] for"):
            score_units(small(), [{**batch, "labels": labels}])
    with pytest.raises(DataError, match=r"batches: one mapping was given\. Give a list of them"):
        inspect.unwrap(score_units)(small(), batch)


def test_R07_a_text_run_without_labels_ends_in_words(tmp_path: Path) -> None:
    unlabelled = [{**row, "labels": [-100] * len(row["labels"])} for row in answer_rows(4)]
    goal, student, teacher = Objective(TaskTerm(), LogitTerm()), small("llama", "causal"), small("llama", "causal", 1)
    with pytest.raises(TrainingError, match="labels: all are -100 in every one of 1 steps"):
        trainer_of(tmp_path, goal, student, teacher, data=unlabelled).train()
    trainer = trainer_of(tmp_path, goal, student, teacher, data=[*unlabelled, *answer_rows(4)])
    trainer.args.max_steps = 2
    trainer.train()


@pytest.mark.parametrize("chunk", [0, -1, "of"])
def test_R07_chunks_of_logits_have_a_size(tmp_path: Path, chunk: int | str) -> None:
    with pytest.raises(RecipeError, match=rf"logit_chunk: must be 'auto', 'off' or .*, was {chunk!r}"):
        trainer_of(tmp_path, Objective(TaskTerm()), small("llama", "causal"), logit_chunk=chunk)
