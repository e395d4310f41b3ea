"""The trainer of language models: answers of unequal lengths, nats a token, evaluations that say what training says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Objective, Signal
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import TinyTask, tiny_model
from tests.training.language_rows import answer_rows, collator_of, wider_copy
from tests.training.test_distillation_trainer import arguments, first_log

KINDS: dict[str, TinyTask] = {"llama": "causal", "t5": "seq2seq"}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "t5": {"num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0},
}
WIDTH: dict[str, dict[str, Any]] = {"llama": {"hidden_size": 16, "num_hidden_layers": 2}, "t5": {"d_model": 16}}


def student_of(kind: str) -> PreTrainedModel:
    return tiny_model(kind, KINDS[kind], seed=2, **SIZES[kind], **WIDTH[kind])


def teacher_of(kind: str) -> PreTrainedModel:
    return tiny_model(kind, KINDS[kind], seed=1, **SIZES[kind])


def goal_of(positions: str = "supervised", *, smoothing: float = 0.0) -> Objective:
    pair = LayerPair.of_units(torch.arange(0, 32, 2))
    return Objective(
        TaskTerm(weight=0.5, label_smoothing=smoothing),
        LogitTerm(weight=0.7, temperature=2.0),
        FeatureTerm("mse", 1.0, positions, (pair,)),
    )


def trainer_of(
    folder: Path, kind: str, goal: Objective, logit_chunk: int | str = "auto", **changes: Any
) -> DistillationTrainer:
    rows = answer_rows(seq2seq=kind == "t5")
    student = student_of(kind)
    return DistillationTrainer(
        model=student,
        teacher=teacher_of(kind),
        objective=goal,
        args=arguments(folder, learning_rate=1e-9, **changes),
        logit_chunk=logit_chunk,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator_of(student),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["tokens", "supervised"])
def test_M03_answers_of_unequal_lengths_do_not_see_the_split(tmp_path: Path, kind: str, positions: str) -> None:
    found = []
    for size, accumulation, chunk in ((16, 1, "off"), (4, 4, "auto"), (1, 16, 2), (16, 1, 7)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, kind, goal_of(positions, smoothing=0.1), chunk, **changes)
        trainer.train()
        found.append(first_log(trainer))
    names = [name for name in found[0] if name.endswith(("_raw", "_weighted"))] + ["loss", "grad_norm"]
    assert len(names) == 8
    for other in found[1:]:
        for name in names:
            assert_close(other[name], found[0][name], dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_M05_M10_chunks_change_no_weight_of_a_step(tmp_path: Path, kind: str, top_k: int | None) -> None:
    """All weights after a step of plain SGD, so that each gradient is seen as large as it is."""
    found = []
    for chunk in ("off", 1, 4):
        goal = Objective(TaskTerm(weight=0.5), LogitTerm(weight=0.7, temperature=2.0, top_k=top_k))
        trainer = trainer_of(tmp_path, kind, goal, chunk, optim="sgd", max_grad_norm=0.0)
        trainer.args.learning_rate = 0.5
        trainer.train()
        found.append(trainer.student.state_dict())
    start = student_of(kind).state_dict()
    assert not torch.equal(found[0]["lm_head.weight"], start["lm_head.weight"])
    for other in found[1:]:
        for name, weight in found[0].items():
            assert_close(other[name], weight)


@pytest.mark.parametrize("chunk", ["off", 2])
def test_M03_the_least_certain_predictions_of_all_passes_make_one_mean(tmp_path: Path, chunk: int | str) -> None:
    """Rows of unequal lengths one by one: the choice is the same in any order, and in an evaluation."""
    goal = Objective(TaskTerm(weight=0.5), LogitTerm(weight=0.7, entropy_share=0.3))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "per_device_eval_batch_size": 1}
    trainer = trainer_of(tmp_path, "llama", goal, chunk, **split)
    evaluated = trainer.evaluate()
    trainer.train()
    entry = first_log(trainer)
    for name in ("loss", "task_raw", "logits_raw", "logits_weighted"):
        assert_close(evaluated[f"eval_{name}"], entry[name], dtype=torch.float32)
    # By hand: the mean of the divergence over the rounded-up share of each row.
    values: list[Tensor] = []
    for row in answer_rows():
        inputs, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            sides = [
                model(inputs).logits[0, :-1][labels[1:] != -100] for model in (student_of("llama"), teacher_of("llama"))
            ]
        p, q = (side.double().softmax(-1) for side in sides[::-1])
        divergence, entropy = (p * (p / q).log()).sum(-1), -(q * q.log()).sum(-1)
        values.extend(divergence[entropy.argsort(descending=True)[: -(-3 * len(q) // 10)]])
    assert_close(entry["logits_raw"], torch.stack(values).mean().float(), dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_M10_a_head_is_proved_and_used_in_the_precision_of_the_training(tmp_path: Path, kind: str) -> None:
    """The trainer puts its autocast around the model's forward, and nowhere else."""
    found = []
    for chunk in ("off", 4):
        trainer = trainer_of(tmp_path, kind, goal_of(), chunk, bf16=True)
        trainer.train()
        found.append(first_log(trainer))
    for name in ("loss", "task_raw", "logits_raw", "grad_norm"):
        assert_close(found[1][name], found[0][name], dtype=torch.bfloat16)


def nats_by_transformers(model: PreTrainedModel, rows: list[dict[str, Any]]) -> float:
    """Nats a token by the model's own loss, each row alone: no padding, no batch of ours."""
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        count = sum(label != -100 for label in row["labels"])
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", ["off", 3])
def test_E09_an_evaluation_of_the_training_rows_says_what_the_step_said(
    tmp_path: Path, kind: str, chunk: int | str
) -> None:
    """Without dropout and with a last batch of one row; the nll is that of the labels, smoothed or not."""
    trainer = trainer_of(tmp_path, kind, goal_of(smoothing=0.5), chunk, per_device_eval_batch_size=5)
    found = trainer.evaluate()
    trainer.train()
    entry = first_log(trainer)
    for name in ("loss", "task_raw", "logits_raw", "features_raw", "logits_weighted"):
        assert_close(found[f"eval_{name}"], entry[name], dtype=torch.float32)
    rows = answer_rows(seq2seq=kind == "t5")
    assert_close(found["eval_nll"], nats_by_transformers(student_of(kind), rows), dtype=torch.float32)
    assert abs(found["eval_task_raw"] - found["eval_nll"]) > 5e-4, "else nothing was smoothed"


def wide(vocabulary: int) -> PreTrainedModel:
    return wider_copy("llama", seed=1, vocabulary=vocabulary)


def test_M14_padded_outputs_of_a_vocabulary_take_no_probability(tmp_path: Path) -> None:
    """The shared logits are the same, so the divergence is 0; the task still sees every output of the student."""
    student, rows = wide(64), answer_rows()
    trainer = DistillationTrainer(
        model=student,
        teacher=wide(61),
        objective=Objective(TaskTerm(), LogitTerm(shared_outputs=61)),
        args=arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator_of(student),
    )
    found = trainer.evaluate()
    assert found["eval_logits_raw"] == pytest.approx(0.0, abs=1e-6)
    assert_close(found["eval_nll"], nats_by_transformers(student, rows), dtype=torch.float32)
    assert found["eval_nll"] > nats_by_transformers(wide(61), rows) + 1e-3


def test_M14_only_the_shared_outputs_enter_a_divergence() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(5, 9, requires_grad=True), torch.randn(5, 8)
    labels = torch.randint(0, 9, (5,))
    goal = Objective(logits=LogitTerm(shared_outputs=6))
    value = goal(Signal(ours, ()), Signal(theirs, ()), labels)
    expected = F.kl_div(ours[:, :6].log_softmax(-1), theirs[:, :6].log_softmax(-1), log_target=True, reduction="sum")
    assert_close(value.loss, expected / 5)
    value.loss.backward()
    gradient: Tensor | None = ours.grad
    assert gradient is not None
    assert float(gradient[:, 6:].abs().max()) == 0
