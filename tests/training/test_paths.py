"""A trainer's divergence by whole logits, by chunks and by the teacher's top, against the models' own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.teacher.live import _UNKNOWN_HEAD, LiveTeacher
from flexkd.training.trainer import DistillationTrainer
from tests.tiny import TinyTask, tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import arguments

# What each does to its head's output, and config keys that make much of it.
HEADS: dict[str, tuple[str, TinyTask, dict[str, Any]]] = {
    "scale": ("granite", "causal", {"logits_scaling": 4.0}),
    "cap": ("gemma2", "causal", {"final_logit_softcapping": 1.5}),
    "bias": ("bart", "seq2seq", {"dropout": 0.0}),
}
TOP = 5


def model_of(head: str, seed: int, **changes: Any) -> PreTrainedModel:
    kind, task, keys = HEADS[head]
    model = tiny_model(kind, task, seed=seed, **{**keys, **changes})
    if head == "bias":
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(seed)).mul_(3)  # type: ignore[operator, union-attr]
    return model


def own_logits(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Of each prediction, by the model's own forward; float64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**inputs, labels=labels).logits[labels != -100].double()
        return model(**inputs).logits[:, :-1][labels[:, 1:] != -100].double()


def divergence(student: Tensor, teacher: Tensor, temperature: float, top_k: int | None) -> float:
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    if top_k is not None:
        indices = log_p.topk(top_k, -1).indices
        log_p, log_q = (
            torch.cat([one.gather(-1, indices), one.scatter(-1, indices, -torch.inf).logsumexp(-1, True)], -1)
            for one in (log_p, log_q)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def evaluated(
    folder: Path, goal: Objective, chunk: int | str, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[dict[str, float], DistillationTrainer]:
    data = answer_rows(8, seq2seq=bool(student.config.is_encoder_decoder))
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=goal,
        args=arguments(folder),
        logit_chunk=chunk,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator_of(student),
    )
    return trainer.evaluate(), trainer


@pytest.mark.parametrize("top_k", [None, TOP])
@pytest.mark.parametrize("chunk", [3, "off"])
@pytest.mark.parametrize("head", HEADS)
def test_M10_a_trainer_compares_what_the_models_say_by_every_path(
    tmp_path: Path, head: str, chunk: int | str, top_k: int | None
) -> None:
    student, teacher = model_of(head, 1), model_of(head, 2)
    goal = Objective(TaskTerm(), LogitTerm(temperature=2.0, top_k=top_k))
    found, trainer = evaluated(tmp_path, goal, chunk, student, teacher)
    batch = collator_of(student)(answer_rows(8, seq2seq=head == "bias"))
    ours, theirs = own_logits(student, batch), own_logits(teacher, batch)
    assert found["eval_logits_raw"] == pytest.approx(divergence(ours, theirs, 2.0, top_k), rel=1e-4)
    labels = batch["labels"] if head == "bias" else batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(ours, labels[labels != -100])
    assert found["eval_task_raw"] == pytest.approx(float(nll), rel=1e-4)
    assert found["eval_nll"] == pytest.approx(float(nll), rel=1e-4)
    # Neither side fell back to whole logits.
    assert (trainer._step.chunks._outputs == 61) == (chunk == 3)
    assert isinstance(trainer.teacher, LiveTeacher)
    assert trainer.teacher._head not in (None, _UNKNOWN_HEAD)


@pytest.mark.parametrize("top_k", [None, TOP])
@pytest.mark.parametrize("chunk", [3, "off"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_M14_a_trainer_cuts_what_is_not_shared_by_every_path(
    tmp_path: Path, chunk: int | str, top_k: int | None, temperature: float
) -> None:
    student, teacher = model_of("scale", 1, vocab_size=70), model_of("scale", 2, vocab_size=67)
    goal = Objective(TaskTerm(), LogitTerm(temperature=temperature, top_k=top_k, shared_outputs=61))
    found, _ = evaluated(tmp_path, goal, chunk, student, teacher)
    batch = collator_of(student)(answer_rows(8))
    ours, theirs = own_logits(student, batch), own_logits(teacher, batch)
    expected = divergence(ours[:, :61], theirs[:, :61], temperature, top_k)
    assert found["eval_logits_raw"] == pytest.approx(expected, rel=1e-4)
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(ours, labels[labels != -100])
    assert found["eval_task_raw"] == pytest.approx(float(nll), rel=1e-4)


@pytest.mark.parametrize("top_k", [None, TOP])
@pytest.mark.parametrize("chunk", [3, "off"])
def test_M13_a_trainer_of_half_models_loses_nothing_after_the_logits(
    tmp_path: Path, chunk: int | str, top_k: int | None
) -> None:
    """The models' own logits in bfloat16, and float64 from there on."""
    student, teacher = (model_of("scale", seed).bfloat16() for seed in (1, 2))
    goal = Objective(TaskTerm(), LogitTerm(top_k=top_k))
    found, _ = evaluated(tmp_path, goal, chunk, student, teacher)
    batch = collator_of(student)(answer_rows(8))
    ours, theirs = own_logits(student, batch), own_logits(teacher, batch)
    assert found["eval_logits_raw"] == pytest.approx(divergence(ours, theirs, 1.0, top_k), rel=2e-4)
