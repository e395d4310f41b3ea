"""What a trainer must get right beyond one plain step: hand-made sums, evaluation, second runs, other models."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from flexkd.core.losses import LOGIT_LOSSES
from flexkd.core.objective import Objective, Signal
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import TrainingError
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import (
    UNITS,
    arguments,
    first_log,
    logs_of,
    objective,
    rows,
    student_model,
    teacher_model,
    trainer_of,
)


def weighted_sum(entry: Mapping[str, float]) -> float:
    return sum(value for name, value in entry.items() if name.endswith("_weighted"))


def logits_one_by_one(model: PreTrainedModel, data: Sequence[Mapping[str, Any]]) -> Tensor:
    """Of each row alone, so that no padding is there; float64."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data]).double()


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (4, 4), (2, 8)])
def test_M01_a_step_with_unlabelled_micro_batches_is_the_sum_made_by_hand(
    tmp_path: Path, size: int, accumulation: int
) -> None:
    """Rows 0 to 7 have no label: with 4 rows each, half of the micro-batches have none at all."""
    data = rows(unlabelled=range(8))
    student, teacher = student_model(), teacher_model()
    ours, theirs = logits_one_by_one(student, data), logits_one_by_one(teacher, data)
    labels = torch.tensor([row["labels"] for row in data])
    task = F.cross_entropy(ours[8:], labels[8:], reduction="sum") / 16
    p, q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
    logits = (p.exp() * (p - q)).sum() / 16
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    goal = objective(features=0, task=0.5, logits=0.7)
    trainer = trainer_of(tmp_path, goal, data, model=student, teacher=teacher, arguments=changes)
    trainer.train()
    entry = first_log(trainer)
    assert_close(entry["task_raw"], float(task), dtype=torch.float32)
    assert_close(entry["logits_raw"], float(logits), dtype=torch.float32)
    assert_close(entry["loss"], float(0.5 * task + 0.7 * 4 * logits), dtype=torch.float32)


def test_M01_only_labels_and_no_label_in_the_step_leaves_zero_and_finite_weights(tmp_path: Path) -> None:
    student = student_model()
    trainer = trainer_of(tmp_path, Objective(TaskTerm()), rows(unlabelled=range(16)), model=student)
    trainer.train()
    assert first_log(trainer)["loss"] == 0
    assert first_log(trainer)["grad_norm"] == 0
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


class FixedTeacher:
    """The signal of a live teacher, changed."""

    def __init__(self, change: Any) -> None:
        self.live, self.change, self.calls = LiveTeacher(teacher_model()), change, 0

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        self.calls += 1
        return self.change(self.live.signal(batch, request), self.calls)


@pytest.mark.parametrize("part", ["logits", "features"])
def test_M02_a_teacher_that_is_not_finite_is_named_with_its_examples(tmp_path: Path, part: str) -> None:
    def poisoned(signal: Signal, call: int) -> Signal:
        assert signal.logits is not None
        if call < 3:
            return signal
        factors = {"logits": 1.0, "features": 1.0, part: float("nan")}
        return Signal(signal.logits[:] * factors["logits"], (signal.features[0] * factors["features"],))

    student = student_model()
    changes = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    seen: list[str] = []

    class Recording(Collator):
        def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            seen.append(", ".join(str(row["id"]) for row in features))
            return super().__call__(features)

    trainer = trainer_of(
        tmp_path, objective(), rows(), model=student, teacher=FixedTeacher(poisoned), arguments=changes
    )
    trainer.data_collator = Recording(0)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"step 3: {part}_raw is not finite (from the loss or the teacher; examples {seen[2]})")
    after_two = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, after_two[name]) for name, value in student.state_dict().items())


def test_M02_a_projectors_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    goal, student = objective(loss="projector"), student_model()
    before = [p.detach().clone() for p in (*goal.parameters(), *student.parameters())]
    next(goal.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="step 1: the gradient norm is nan"):
        trainer_of(tmp_path, goal, rows(), model=student).train()
    now = (*goal.parameters(), *student.parameters())
    assert all(torch.equal(one, two) for one, two in zip(now, before, strict=True))


@pytest.mark.parametrize("loss", ["mse", "cosine", "projector"])
@pytest.mark.parametrize("size", [16, 5])
def test_E09_additive_feature_terms_are_evaluated_as_they_are_trained(tmp_path: Path, loss: str, size: int) -> None:
    """Batches of 5 rows leave a short last one, and differ in how many tokens they hold."""
    changes = {"learning_rate": 0.0, "per_device_eval_batch_size": size}
    trainer = trainer_of(tmp_path, objective(loss=loss, features=0.6), rows(), arguments=changes)
    trainer.train()
    trained, evaluated = first_log(trainer), trainer.evaluate()
    names = ["loss", *(name for name in trained if name.endswith(("_raw", "_weighted")))]
    assert len(names) == 7
    for name in names:
        assert_close(evaluated[f"eval_{name}"], trained[name], dtype=torch.float32)


def test_E09_a_statistic_is_evaluated_as_it_is_trained_on_the_same_batches(tmp_path: Path) -> None:
    changes = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    order: list[int] = []

    class Recording(Collator):
        def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            order.extend(int(row["id"].partition("-")[2]) for row in features)
            return super().__call__(features)

    data = rows()
    trainer = trainer_of(tmp_path, objective(), data, arguments=changes)
    trainer.data_collator = Recording(0)
    trainer.train()
    trainer.args.per_device_eval_batch_size = 4
    evaluated = trainer.evaluate([data[index] for index in order[:16]])
    for name in ("loss", "features_raw", "features_weighted"):
        assert_close(evaluated[f"eval_{name}"], first_log(trainer)[name], dtype=torch.float32)


def test_L06_parts_add_up_after_a_resume_and_in_a_second_run(tmp_path: Path) -> None:
    """A log that begins in the middle of a window, or after another run, holds the steps of this run alone."""

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = True
            return control

    changes = {"per_device_train_batch_size": 4, "max_steps": 11, "logging_steps": 3}
    saving = {**changes, "save_strategy": "steps", "save_steps": 4}
    first = trainer_of(tmp_path, objective(), rows(), arguments=saving, callbacks=[Stop()])
    first.train()
    resumed = trainer_of(tmp_path, objective(), rows(), arguments=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["step"] for entry in logs_of(resumed)] == [3, 6, 9]
    for entry in logs_of(resumed):
        assert abs(weighted_sum(entry) - entry["loss"]) < 1e-6
    resumed.train()
    assert [entry["step"] for entry in logs_of(resumed)] == [3, 6, 9]
    for entry in logs_of(resumed):
        assert abs(weighted_sum(entry) - entry["loss"]) < 1e-6


def test_L06_the_short_last_window_of_an_epoch_is_a_step_of_its_own(tmp_path: Path) -> None:
    """Ten rows of 2 with an accumulation of 4: one step of 8 rows, one of 2."""
    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "learning_rate": 0.0,
    }
    data, student = rows(10), student_model()
    trainer = trainer_of(tmp_path, objective(features=0, logits=0), data, model=student, arguments=changes)
    trainer.train()
    first, second = logs_of(trainer)
    losses = F.cross_entropy(
        logits_one_by_one(student, data), torch.tensor([row["labels"] for row in data]), reduction="sum"
    )
    assert_close(8 * first["loss"] + 2 * second["loss"], float(losses), dtype=torch.float32)
    assert first["loss"] == pytest.approx(first["task_weighted"])
    assert second["loss"] == pytest.approx(second["task_weighted"])


@pytest.mark.parametrize("loss", sorted(LOGIT_LOSSES))
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, loss: str) -> None:
    """Invariant 1 through the whole trainer: values and gradient of all distillation terms are 0."""
    everything = LayerPair.of_units(torch.arange(32))
    goal = Objective(
        None, LogitTerm(loss, temperature=2.0), FeatureTerm(layers=(everything, LayerPair(2, 2, everything.units)))
    )
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trainer = trainer_of(tmp_path, goal, rows(), model=teacher_model(**quiet))
    trainer.train()
    entry = first_log(trainer)
    assert abs(entry["logits_raw"]) < 1e-6
    assert abs(entry["features_raw"]) < 1e-6
    assert entry["grad_norm"] < 1e-4


@pytest.mark.parametrize("loss", ["correlation", "cka", "projector"])
def test_padding_changes_neither_loss_nor_gradient(tmp_path: Path, loss: str) -> None:
    """Invariant 2 through the whole trainer: batches of 11 and of 36 positions."""
    found = []
    for multiple in (1, 36):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, objective(loss=loss), rows())
        trainer.data_collator = Collator(0, multiple=multiple)
        trainer.train()
        found.append(first_log(trainer))
    for name in ("loss", "grad_norm", "features_raw", "logits_raw"):
        assert_close(found[1][name], found[0][name], dtype=torch.float32)


def test_D15_the_student_is_called_with_nothing_but_what_its_forward_takes(tmp_path: Path) -> None:
    student = student_model()
    accepted = set(inspect.signature(type(student).forward).parameters) - {"labels"}
    calls: list[set[str]] = []
    student.register_forward_pre_hook(lambda _, __, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    data = [{**row, "teacher_topk": [1, 2], "text": "film"} for row in rows()]
    trainer = trainer_of(tmp_path, objective(), data, model=student)
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 2
    assert all({"input_ids", "attention_mask"} <= call <= accepted for call in calls)


@pytest.mark.parametrize("student_type", ["distilbert", "electra", "llama"])
def test_A05_students_of_another_architecture_learn_from_a_bert(tmp_path: Path, student_type: str) -> None:
    student = tiny_model(student_type, seed=4)
    pair = LayerPair(-1, -1, UnitPairs(torch.arange(16), UNITS))
    goal = Objective(TaskTerm(), LogitTerm(temperature=2.0), FeatureTerm(layers=(pair,)))
    trainer = trainer_of(tmp_path, goal, rows(), model=student, arguments={"max_steps": 8, "learning_rate": 3e-3})
    trainer.train()
    logs = logs_of(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert logs[-1]["features_raw"] < logs[0]["features_raw"]


def test_S09_a_config_without_the_switch_of_a_cache_gets_none(tmp_path: Path) -> None:
    """Encoders have no `use_cache`; the Trainer writes its own wish into every config."""
    student = tiny_model("distilbert")
    before = student.config.to_dict()
    assert "use_cache" not in before
    trainer_of(tmp_path, Objective(TaskTerm(), LogitTerm()), rows(), model=student).train()
    assert student.config.to_dict() == before


def test_F17_gradient_checkpointing_changes_no_gradient_at_any_layer(tmp_path: Path) -> None:
    taught = LayerPair.of_units(UNITS).units
    goal = Objective(TaskTerm(), LogitTerm(), FeatureTerm(layers=(LayerPair(1, 2, taught), LayerPair(-1, -1, taught))))
    found = []
    for switched in (False, True):
        student = student_model()
        if switched:
            student.activation_checkpointing_enable()
        trainer = trainer_of(tmp_path, goal, rows(), model=student)
        trainer.train()
        assert student.bert.encoder.layer[0].gradient_checkpointing == switched
        found.append(first_log(trainer))
    for name in ("loss", "grad_norm", "features_raw"):
        assert_close(found[1][name], found[0][name], dtype=torch.float32)


def test_the_seed_of_the_data_is_its_own_even_when_it_is_zero(tmp_path: Path) -> None:
    orders = []
    for seed in (5, 6):
        settings = {"train_sampling_strategy": "group_by_length", "data_seed": 0, "seed": seed}
        trainer = trainer_of(tmp_path, objective(), rows(), arguments=settings)
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1]
    other = trainer_of(tmp_path, objective(), rows(), arguments={**settings, "data_seed": 1})
    assert list(other._get_train_sampler()) != orders[0]


def test_L04_without_teacher_terms_no_teacher_is_asked(tmp_path: Path) -> None:
    def refused(signal: Signal, call: int) -> Signal:
        pytest.fail("asked")

    trainer_of(tmp_path, Objective(TaskTerm()), rows(), teacher=FixedTeacher(refused)).train()
    trainer = DistillationTrainer(
        model=student_model(),
        objective=Objective(TaskTerm()),
        args=arguments(tmp_path),
        train_dataset=rows(),
        data_collator=Collator(0),
    )
    trainer.train()
    assert set(first_log(trainer)) >= {"task_raw", "task_weighted"}
    assert "logits_raw" not in first_log(trainer)


def test_L05_predictions_are_the_students_own_logits_in_order(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective(), rows(), arguments={"per_device_eval_batch_size": 3})
    trainer.train()
    output = trainer.predict(rows(7))
    assert_close(torch.tensor(output.predictions), logits_one_by_one(trainer.student.eval(), rows(7)))
    assert output.label_ids.tolist() == [row["labels"] for row in rows(7)]
    assert output.metrics["test_loss"] > 0
