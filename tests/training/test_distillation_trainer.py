"""The trainer: exact counts, loud failures, a teacher that is left alone, and checkpoints that resume."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback, TrainingArguments

from flexkd.core.losses import Projector
from flexkd.core.objective import Objective, Signal
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import ArtifactError, RecipeError, TrainingError
from flexkd.models.slicing.student import slice_student
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_model

UNITS = torch.arange(0, 32, 2)


def rows(count: int = 16, *, unlabelled: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Rows of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for index in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = torch.randint(4, 61, (length,), generator=generator).tolist()
        found.append({"id": f"row-{index}", "input_ids": ids, "labels": -100 if index in unlabelled else index % 3})
    return found


def teacher_model(**overrides: Any) -> PreTrainedModel:
    return tiny_model("bert", seed=1, num_hidden_layers=3, **overrides)


def student_model(*, dropout: float = 0.0) -> PreTrainedModel:
    teacher = teacher_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return slice_student(teacher, units=UNITS, num_layers=2)


def objective(*, features: float = 1.0, task: float = 1.0, logits: float = 1.0, loss: str = "correlation") -> Objective:
    pair = LayerPair.of_units(UNITS) if loss != "projector" else LayerPair()
    projectors = (Projector(16, 32),) if loss == "projector" else ()
    return Objective(
        TaskTerm(weight=task),
        LogitTerm(weight=logits, temperature=2.0),
        FeatureTerm(loss, features, "tokens", (pair,), projectors),
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def trainer_of(folder: Path, goal: Objective, data: list[dict[str, Any]], **options: Any) -> DistillationTrainer:
    changes = options.pop("arguments", {})
    return DistillationTrainer(
        model=options.pop("model", None) or student_model(),
        teacher=options.pop("teacher", None) or teacher_model(),
        objective=goal,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data,
        data_collator=Collator(0),
        **options,
    )


def logs_of(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def first_log(trainer: DistillationTrainer) -> dict[str, float]:
    return logs_of(trainer)[0]


@pytest.mark.parametrize("unlabelled", [(), (0, 5)])
def test_M03_splits_of_one_step_agree_in_loss_and_gradient(tmp_path: Path, unlabelled: Sequence[int]) -> None:
    found = []
    for size, accumulation in ((16, 1), (4, 4), (1, 16)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, objective(features=0), rows(unlabelled=unlabelled), arguments=changes)
        trainer.train()
        found.append(first_log(trainer))
    for other in found[1:]:
        for name in ("loss", "grad_norm", "task_raw", "logits_raw", "logits_weighted"):
            assert_close(other[name], found[0][name], dtype=torch.float32)


def test_F04_a_correlation_is_of_one_micro_batch_and_the_log_says_how_large(tmp_path: Path) -> None:
    tokens = sum(len(row["input_ids"]) for row in rows())
    for size, accumulation in ((16, 1), (4, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = trainer_of(tmp_path, objective(), rows(), arguments=changes)
        trainer.train()
        assert first_log(trainer)["feature_positions"] == tokens / accumulation


def test_L06_parts_are_logged_and_add_up_over_a_window(tmp_path: Path) -> None:
    changes = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "logging_steps": 3,
    }
    trainer = trainer_of(tmp_path, objective(features=0.7, task=0.3), rows(), arguments=changes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        parts = entry["task_weighted"] + entry["logits_weighted"] + entry["features_weighted"]
        assert abs(parts - entry["loss"]) < 1e-6
        assert entry["task_weighted"] == pytest.approx(0.3 * entry["task_raw"])
        assert entry["logits_weighted"] == pytest.approx(4 * entry["logits_raw"])


def test_M01_a_step_without_labels_learns_from_the_teacher_alone(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective(features=0), rows(unlabelled=range(16)))
    trainer.train()
    entry = first_log(trainer)
    assert entry["task_raw"] == 0
    assert entry["logits_raw"] > 0
    assert entry["loss"] == pytest.approx(entry["logits_weighted"])


class Poisoned(nn.Module):
    """Passes states on; from the given call on, as NaN."""

    def __init__(self, inner: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, states: Tensor) -> Tensor:
        self.calls -= 1
        out: Tensor = self.inner(states)
        return out * float("nan") if self.calls < 0 else out


def test_M02_a_step_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    student = student_model()
    student.classifier = Poisoned(student.classifier, 2)
    changes = {"per_device_train_batch_size": 4, "max_steps": 6}
    trainer = trainer_of(tmp_path, objective(), rows(), model=student, arguments=changes)
    snapshots: list[Tensor] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        snapshots.append(student.bert.embeddings.word_embeddings.weight.detach().clone())
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        with pytest.raises(TrainingError, match=r"step 3: task_raw, logits_raw is not finite .*examples row-\d+"):
            trainer.train()
    assert len(snapshots) == 2
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, snapshots[-1])
    assert trainer.args.logging_nan_inf_filter is False


def test_M02_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    student = student_model()
    before = student.classifier.weight.detach().clone()
    student.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (inf|nan)"):
        trainer_of(tmp_path, objective(), rows(), model=student).train()
    assert torch.equal(student.classifier.weight, before)


def test_L04_the_teachers_output_reaches_the_students_gradient(tmp_path: Path) -> None:
    norms = []
    for shift in (0.0, 3.0):
        teacher = teacher_model()
        with torch.no_grad():
            teacher.classifier.bias[0] += shift
        trainer = trainer_of(tmp_path, objective(features=0), rows(), teacher=teacher)
        trainer.train()
        norms.append(first_log(trainer)["grad_norm"])
    assert abs(norms[0] - norms[1]) > 1e-3


def test_E09_evaluation_computes_the_training_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective(features=0), rows(), arguments={"learning_rate": 0.0})
    trainer.train()
    trained = first_log(trainer)
    for size in (16, 5):
        trainer.args.per_device_eval_batch_size = size
        evaluated = trainer.evaluate()
        for name in ("loss", "task_raw", "logits_raw", "logits_weighted"):
            assert_close(evaluated[f"eval_{name}"], trained[name], dtype=torch.float32)


def test_L05_train_evaluate_and_predict_work(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective(), rows())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows(5)).predictions.shape == (5, 3)


def test_D15_extra_columns_reach_the_trainer_and_never_the_model(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watching:
        def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
            seen.append(set(batch))
            return LiveTeacher(teacher_model()).signal(batch, request)

    data = [{**row, "teacher_topk": [1, 2]} for row in rows()]
    trainer_of(tmp_path, objective(), data, teacher=Watching()).train()
    assert {"teacher_topk", "example_id"} <= seen[0]


def test_S03_Y02_the_teacher_stays_in_eval_mode_frozen_and_unchanged(tmp_path: Path) -> None:
    teacher = teacher_model(hidden_dropout_prob=0.3)
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes: list[bool] = []
    teacher.register_forward_hook(lambda module, *_: modes.append(any(m.training for m in module.modules())))
    trainer = trainer_of(tmp_path, objective(), rows(), teacher=teacher, arguments={"max_steps": 10})
    trainer.train()
    assert len(modes) == 10
    assert not any(modes)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}


def test_F02_R13_too_few_positions_skip_the_term_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # One row of 16 tokens, and seven of three: one step of four has enough.
    short = [
        {**row, "input_ids": (row["input_ids"] * 8)[: 16 if index == 0 else 3]} for index, row in enumerate(rows(8))
    ]
    changes = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 4}
    trainer = trainer_of(tmp_path, objective(), short, arguments=changes)
    trainer.train()
    entry = first_log(trainer)
    assert entry["skipped_feature_terms"] == 3
    assert entry["loss"] == pytest.approx(
        entry["task_weighted"] + entry["logits_weighted"] + entry["features_weighted"], abs=1e-6
    )
    warnings = [line.getMessage() for line in caplog.records if "feature term skipped" in line.getMessage()]
    assert warnings == ["feature term skipped: 6 positions in one pass are fewer than the 8 that correlation needs."]


@pytest.mark.parametrize(("max_steps", "ends"), [(2, 2), (40, 20)])
def test_R13_a_run_whose_feature_term_is_skipped_in_every_step_ends(tmp_path: Path, max_steps: int, ends: int) -> None:
    short = [{**row, "input_ids": row["input_ids"][:3]} for row in rows(4)]
    changes = {"per_device_train_batch_size": 2, "max_steps": max_steps}
    trainer = trainer_of(tmp_path, objective(), short, arguments=changes)
    with pytest.raises(TrainingError, match=f"skipped in every one of {ends} steps, so that no features are taught"):
        trainer.train()
    assert trainer.state.global_step == ends - 1, "before that step is taken"


def checkpointed(folder: Path, stop: int | None, **options: Any) -> tuple[DistillationTrainer, list[str]]:
    """24 steps of 2 rows over 3 epochs; with `stop`, interrupted after that checkpoint."""
    order: list[str] = []

    class Recording(Collator):
        def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            order.extend(str(row["id"]) for row in features)
            return super().__call__(features)

    changes = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "max_steps": -1,
        "save_strategy": "steps",
        "save_steps": 11,
        "train_sampling_strategy": options.pop("sampling", "random"),
    }
    trainer = trainer_of(folder, options.pop("goal", None) or objective(), rows(), arguments=changes, **options)
    trainer.data_collator = Recording(0)
    if stop is not None:

        class Stop(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                control.should_training_stop = True
                return control

        trainer.add_callback(Stop())
    return trainer, order


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_S01_resumed_training_equals_uninterrupted_training(tmp_path: Path, sampling: str) -> None:
    whole, order = checkpointed(tmp_path / "whole", None, sampling=sampling, model=student_model(dropout=0.1))
    whole.train()
    first, _ = checkpointed(tmp_path / "parts", 11, sampling=sampling, model=student_model(dropout=0.1))
    first.train()
    assert first.state.global_step == 11
    second, rest = checkpointed(tmp_path / "parts", None, sampling=sampling, model=student_model(dropout=0.1))
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-11"))
    assert rest[-26:] == order[-26:]
    assert len(set(order[:16])) == 16
    for (name, one), two in zip(whole.student.named_parameters(), second.student.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_S02_a_checkpoint_holds_the_student_and_the_projector_apart(tmp_path: Path) -> None:
    trainer, _ = checkpointed(tmp_path, 11, goal=objective(loss="projector"))
    start = next(trainer.objective.parameters()).detach().clone()
    trainer.train()
    assert not torch.equal(next(trainer.objective.parameters()), start)
    folder = tmp_path / "checkpoint-11"
    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.num_parameters() == student_model().num_parameters()
    with safe_open(folder / "objective.safetensors", "pt") as file:
        assert any("map.weight" in name for name in file.keys())  # noqa: SIM118 - no mapping
    resumed, _ = checkpointed(tmp_path, None, goal=objective(loss="projector"))
    resumed._load_from_checkpoint(str(folder))
    assert all(
        torch.equal(one, two)
        for one, two in zip(resumed.objective.parameters(), trainer.objective.parameters(), strict=True)
    )


def test_F18_a_checkpoint_of_other_units_or_another_teacher_is_refused(tmp_path: Path) -> None:
    trainer, _ = checkpointed(tmp_path, 11, fingerprints={"teacher": "one"})
    trainer.train()
    folder = str(tmp_path / "checkpoint-11")
    other, _ = checkpointed(tmp_path, None, fingerprints={"teacher": "two"})
    with pytest.raises(ArtifactError, match=re.escape("teacher was 'one' and is 'two' now")):
        other.train(resume_from_checkpoint=folder)
    units = Objective(TaskTerm(), LogitTerm(temperature=2.0), FeatureTerm(layers=(LayerPair.of_units(UNITS + 1),)))
    shifted, _ = checkpointed(tmp_path, None, goal=units, fingerprints={"teacher": "one"})
    with pytest.raises(ArtifactError, match=re.escape("'pairs.0.teacher_units' differs")):
        shifted.train(resume_from_checkpoint=folder)


def test_A13_twenty_steps_in_bfloat16_change_the_weights(tmp_path: Path) -> None:
    student = student_model()
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    changes = {"bf16": True, "learning_rate": 1e-5, "max_steps": 20}
    trainer_of(tmp_path, objective(), rows(), model=student, arguments=changes).train()
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    changed = [not torch.equal(value, before[name]) for name, value in student.named_parameters()]
    assert sum(changed) / len(changed) >= 0.99


def test_S09_the_saved_config_keeps_its_switches(tmp_path: Path) -> None:
    student = student_model()
    student.config.output_hidden_states = False
    trainer = trainer_of(tmp_path, objective(), rows(), model=student)
    trainer.train()
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert loaded.config.output_hidden_states is False
    assert loaded.config.use_cache == student_model().config.use_cache


def test_X05_implicit_data_parallel_is_refused(tmp_path: Path) -> None:
    settings = arguments(tmp_path)
    settings._n_gpu = 2
    with pytest.raises(RecipeError, match=r"2 GPUs in one process .* 'accelerate launch'"):
        DistillationTrainer(model=student_model(), teacher=teacher_model(), objective=objective(), args=settings)


def test_L04_an_objective_that_reads_a_teacher_needs_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="teacher: the objective reads one"):
        DistillationTrainer(model=student_model(), objective=objective(), args=arguments(tmp_path))


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_projector_learns_at_its_own_rate_under_the_schedule_of_the_student(
    tmp_path: Path, rate: float | None
) -> None:
    goal = objective(loss="projector")
    assert goal.features is not None
    goal = Objective(goal.task, goal.logits, replace(goal.features, projector_learning_rate=rate))
    assert goal.formula().endswith(", tokens)" if rate is None else ", tokens, learning_rate=0.5)")
    changes = {"learning_rate": 1e-4, "max_steps": 4, "lr_scheduler_type": "linear"}
    trainer = trainer_of(tmp_path, goal, rows(), arguments=changes)
    rates: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append((self.param_groups[0]["lr"], self.param_groups[-1]["lr"]))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        trainer.train()
    assert [pair[0] for pair in rates] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])
    factor = 1 if rate is None else rate / 1e-4
    assert [pair[1] for pair in rates] == pytest.approx([factor * pair[0] for pair in rates])


def test_projector_gradients_start_each_step_from_zero(tmp_path: Path) -> None:
    goal = objective(loss="projector", task=0, logits=0)
    norms: list[float] = []
    trainer = trainer_of(tmp_path, goal, rows(), arguments={"learning_rate": 0.0, "max_steps": 3})
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms.append(float(next(goal.parameters()).grad.norm()))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        trainer.train()
    assert len(norms) == 3
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


class CountingTeacher:
    """A live teacher that remembers whether states were requested of it."""

    def __init__(self) -> None:
        self.live = LiveTeacher(teacher_model())
        self.reads_states: list[bool] = []

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        self.reads_states.append(bool(request.layers))
        return self.live.signal(batch, request)


def fading(fade: float | None, *, features: float = 0.8) -> Objective:
    goal = objective(features=features)
    assert goal.features is not None
    return Objective(goal.task, goal.logits, replace(goal.features, fade=fade))


def test_a_feature_term_fades_in_a_line_and_then_costs_nothing(tmp_path: Path) -> None:
    """Weights .8, .6, .4, .2 in the first half of 8 accumulated steps; then no state is read of either model."""
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 8}
    teacher = CountingTeacher()
    trainer = trainer_of(tmp_path, fading(0.5), rows(), teacher=teacher, arguments=changes)
    trainer.train()
    assert teacher.reads_states == [True] * 16 + [False] * 16
    logs = logs_of(trainer)
    assert [entry["features_weight"] for entry in logs] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])
    for entry in logs[:4]:
        assert entry["features_weighted"] == pytest.approx(entry["features_weight"] * entry["features_raw"])
    for entry in logs:
        weighted = sum(value for name, value in entry.items() if name.endswith("_weighted"))
        assert weighted == pytest.approx(entry["loss"], abs=1e-6)
    assert all("features_raw" not in entry and "feature_positions" not in entry for entry in logs[4:])


def test_the_first_step_of_a_fade_is_that_of_a_constant_weight_and_a_late_one_that_of_logit_kd(tmp_path: Path) -> None:
    """The entry of a window says the mean of the term over the steps that have it."""
    constant, plain, faded = (
        trainer_of(tmp_path, goal, rows(), arguments={"max_steps": 2, "learning_rate": 0.0})
        for goal in (fading(None), objective(features=0.0), fading(0.5))
    )
    for trainer in (constant, plain, faded):
        trainer.train()
    first, second = logs_of(faded)
    for name in ("loss", "grad_norm", "features_raw"):
        assert first[name] == logs_of(constant)[0][name]
    for name in ("loss", "grad_norm"):
        assert second[name] == logs_of(plain)[1][name]
    window = trainer_of(
        tmp_path, fading(0.5), rows(), arguments={"max_steps": 2, "logging_steps": 2, "learning_rate": 0}
    )
    window.train()
    assert first_log(window)["features_raw"] == pytest.approx(first["features_raw"])
    assert first_log(window)["features_weighted"] == pytest.approx(first["features_weighted"] / 2)
