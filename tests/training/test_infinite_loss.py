"""A loss that is infinite stops the step and says which term, which output and which rows; equal masks train on."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.objective import Objective
from flexkd.core.outputs import entropies_of
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.errors import TrainingError
from flexkd.training.trainer import DistillationTrainer
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import (
    arguments,
    first_log,
    rows,
    student_model,
    teacher_model,
    trainer_of,
)

INFINITY = float("inf")


def blinded(model: PreTrainedModel, output: int) -> PreTrainedModel:
    """A model whose head rules an output out."""
    head: Any = model.get_output_embeddings()
    if head is None:
        head = model.classifier
    elif head.bias is None:
        head.bias = nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[output] = -INFINITY
    return model


def writer(seed: int) -> PreTrainedModel:
    return tiny_model("llama", "causal", seed=seed, hidden_size=16, num_hidden_layers=2)


def text_trainer(folder: Path, goal: Objective, chunk: int | str, **models: PreTrainedModel) -> DistillationTrainer:
    student = models["student"]
    return DistillationTrainer(
        model=student,
        teacher=models["teacher"],
        objective=goal,
        args=arguments(folder),
        logit_chunk=chunk,
        train_dataset=answer_rows(),
        eval_dataset=answer_rows(),
        data_collator=collator_of(student),
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_R06_a_class_that_only_the_student_rules_out_stops_the_step(tmp_path: Path, accumulation: int) -> None:
    student = blinded(student_model(), 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    trainer = trainer_of(tmp_path, Objective(logits=LogitTerm()), rows(), model=student, arguments=changes)
    expected = (
        r"step 1: logits_raw is infinite\. row 'row-\d+', prediction 0: class 1 has no probability for the student "
        r"\(a logit of -inf\) and 0\.\d+ for the teacher; .*; and 1 more predictions\. No optimizer step was taken"
    )
    with pytest.raises(TrainingError, match=expected):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_R06_the_advice_works(tmp_path: Path) -> None:
    for name, both in (("jensen_shannon", False), ("skew_kl", False), ("total_variation", False), ("forward_kl", True)):
        teacher = blinded(teacher_model(), 1) if both else teacher_model()
        student = blinded(student_model(), 1)
        trainer = trainer_of(tmp_path, Objective(logits=LogitTerm(name)), rows(), model=student, teacher=teacher)
        trainer.train()
        entry = first_log(trainer)
        assert 0 < entry["loss"] < 10
        # Total variation is flat where the student gives every output that it does not rule out more than the teacher.
        assert name == "total_variation" or entry["grad_norm"] > 0
        assert 0 <= entry["grad_norm"] < 100


def test_R06_the_teachers_blind_class_is_named_where_the_student_pays_for_it(tmp_path: Path) -> None:
    teacher = blinded(teacher_model(), 2)
    trainer = trainer_of(tmp_path, Objective(logits=LogitTerm("reverse_kl")), rows(), teacher=teacher)
    with pytest.raises(TrainingError, match=r"class 2 has no probability for the teacher .* for the student"):
        trainer.train()


def test_R06_a_label_that_the_student_rules_out_is_named(tmp_path: Path) -> None:
    for smoothing, reason in (
        (0.0, "is the label, and"),
        (0.1, "(is the label|has a share of the smoothed label), and"),
    ):
        goal = Objective(TaskTerm(label_smoothing=smoothing))
        trainer = trainer_of(tmp_path, goal, rows(), model=blinded(student_model(), 1))
        with pytest.raises(TrainingError, match=rf"step 1: task_raw is infinite\. row 'row-\d+', .*: class 1 {reason}"):
            trainer.train()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("chunk", [3, "off"])
def test_R06_a_token_that_only_the_student_rules_out_is_named_with_its_row(
    tmp_path: Path, chunk: int | str, top_k: int | None
) -> None:
    teacher = blinded(writer(1), 7)
    with torch.no_grad():
        # Likely for the teacher, so that it stands in each top.
        teacher.get_output_embeddings().bias[7] = 5.0  # type: ignore[index]
    goal = Objective(logits=LogitTerm(top_k=top_k))
    trainer = text_trainer(tmp_path, goal, chunk, student=blinded(writer(2), 7), teacher=teacher)
    expected = r"logits_raw is infinite\. row 'row-\d+', prediction 0: token 7 has no probability for the student"
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(TrainingError, match=expected):
            run()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("name", sorted(LOGIT_LOSSES))
def test_R06_a_token_that_both_rule_out_is_trained_around(tmp_path: Path, name: str, top_k: int | None) -> None:
    goal = Objective(logits=LogitTerm(name, top_k=top_k))
    models = {"student": blinded(writer(2), 7), "teacher": blinded(writer(1), 7)}
    figures = []
    for chunk in (3, "off"):
        trainer = text_trainer(tmp_path, goal, chunk, **models)
        found = trainer.evaluate()
        assert trainer._step.chunks._outputs == (61 if chunk == 3 else None), "the head is known, mask and all"
        figures.append(found["eval_logits_raw"])
    assert 0 < figures[0] < 10
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def named_predictions(trainer: DistillationTrainer, *, trains: bool) -> list[int]:
    with pytest.raises(TrainingError, match=r"logits_raw is infinite") as stopped:
        (trainer.train if trains else trainer.evaluate)()
    assert "more predictions" not in str(stopped.value)
    return sorted(int(number) for number in re.findall(r"prediction (\d+):", str(stopped.value)))


def least_certain(logits: Tensor, count: int) -> list[int]:
    return sorted(entropies_of(logits).topk(count).indices.tolist())


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("chunk", [3, "off"])
def test_only_predictions_that_entered_the_loss_are_named(tmp_path: Path, chunk: int | str, trains: bool) -> None:
    student, goal = blinded(writer(2), 7), Objective(logits=LogitTerm(entropy_share=0.1))

    def trainer() -> DistillationTrainer:
        fresh = text_trainer(tmp_path, goal, chunk, student=student, teacher=writer(1))
        # One batch holds all of them.
        fresh.train_dataset = fresh.eval_dataset = answer_rows(6)
        return fresh

    loader = trainer().get_train_dataloader() if trains else trainer().get_eval_dataloader()
    batch = next(iter(loader))
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = student.eval()(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100]
    assert named_predictions(trainer(), trains=trains) == least_certain(logits, math.ceil(0.1 * len(logits)))


def test_only_rows_of_a_classifier_that_entered_the_loss_are_named(tmp_path: Path) -> None:
    student, data = blinded(student_model(), 1), rows()
    trainer = trainer_of(tmp_path, Objective(logits=LogitTerm(entropy_share=0.125)), data, model=student)
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        logits = student.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert named_predictions(trainer, trains=False) == least_certain(logits, 2)
