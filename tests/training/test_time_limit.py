"""Training in minutes: a trial that leaves nothing behind, and a plan that a resumed run keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkd
from flexkd.core.losses.projector import Projector
from flexkd.data.encoding.collation import Collator
from flexkd.teacher.live import LiveTeacher
from flexkd.training import time_limit as pace
from flexkd.training.arguments import training_arguments
from flexkd.training.fit import TrainingPlan, ValidationMetrics, train
from flexkd.training.time_limit import TIMED_STEPS, planned_steps
from tests.pipeline.test_teacher_store import settings_of
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import rows

SETTINGS = settings_of(metric="nll", epochs=5.0, batch_size=4, max_minutes=1.0)


def lesson_of() -> TrainingPlan:
    """A student with dropout and a projector; 16 rows, 4 steps an epoch."""
    student = tiny_model("bert", seed=2, hidden_size=16, hidden_dropout_prob=0.1)
    pair = flexkd.LayerPair()
    features = flexkd.FeatureTerm("projector", 1.0, "tokens", (pair,), (Projector(16, 32),))
    objective = flexkd.Objective(flexkd.TaskTerm(), flexkd.LogitTerm(), features)
    return TrainingPlan(student, objective, rows(16), rows(8), Collator(0), ValidationMetrics("nll"), "student")


def state_of(training_plan: TrainingPlan) -> dict[str, Tensor]:
    assert training_plan.objective.modules is not None
    parts = {**training_plan.model.state_dict(), **training_plan.objective.modules.state_dict()}
    return {name: value.detach().clone() for name, value in parts.items()}


def teacher() -> LiveTeacher:
    return LiveTeacher(tiny_model("bert", seed=1))


def test_a_trial_takes_its_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and projectors are as before, though the trial moved them; nothing but the plan is written."""
    training_plan = lesson_of()
    before = state_of(training_plan)
    moved: list[bool] = []
    plain = TrainingPlan.trainer

    def watched(self: TrainingPlan, *args: Any, **options: Any) -> Any:
        trainer = plain(self, *args, **options)
        run = trainer.train

        def train(*args: Any, **options: Any) -> Any:
            found = run(*args, **options)
            after = state_of(training_plan)
            moved.extend(not torch.equal(after[name], value) for name, value in before.items())
            assert trainer.state.global_step == TIMED_STEPS
            return found

        trainer.train = train
        return trainer

    monkeypatch.setattr(TrainingPlan, "trainer", watched)
    planned_steps(training_plan, teacher(), SETTINGS, tmp_path / "run")
    # Parameters that nothing reads, such as the position ids of a buffer, stay where they are.
    assert sum(moved) > len(moved) / 2
    assert all(torch.equal(value, before[name]) for name, value in state_of(training_plan).items())
    assert not training_plan.model.training
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["steps.json"]


@pytest.mark.parametrize(
    ("seconds", "changes", "steps"),
    [
        (6.0, {}, 10),
        (0.001, {}, 20),
        (0.001, {"max_steps": 7}, 7),
        (1000.0, {}, 1),
        (6.0, {"max_minutes": 0.55}, 5),
    ],
)
def test_as_many_steps_as_fit_at_least_one_at_most_the_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, changes: dict[str, Any], steps: int
) -> None:
    monkeypatch.setattr(pace, "_seconds_a_step", lambda *_: seconds)
    planned = planned_steps(lesson_of(), None, replace(SETTINGS, **changes), tmp_path)
    assert planned.max_steps == steps
    assert planned == replace(SETTINGS, **{**changes, "max_steps": steps})
    assert json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["steps"] == steps


def test_the_plan_is_kept_and_no_plan_is_made_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_seconds_a_step", lambda *_: 6.0)
    first = planned_steps(lesson_of(), None, SETTINGS, tmp_path)
    monkeypatch.setattr(pace, "_seconds_a_step", lambda *_: pytest.fail("timed again"))
    assert planned_steps(lesson_of(), None, SETTINGS, tmp_path) == first
    unlimited = replace(SETTINGS, max_minutes=None)
    assert planned_steps(lesson_of(), None, unlimited, tmp_path / "other") is unlimited
    assert not (tmp_path / "other").exists()


def test_the_warm_up_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slow steps, then eight of 3 seconds: 20 of them fit into a minute."""

    class Stepping:
        def __init__(self, times: Any) -> None:
            self.times = times

        def train(self) -> None:
            self.times.ends.extend([100.0, 150.0, *(153.0 + 3.0 * index for index in range(8))])

    monkeypatch.setattr(TrainingPlan, "trainer", lambda self, teacher, arguments, *, callbacks: Stepping(callbacks[0]))
    planned = planned_steps(lesson_of(), None, replace(SETTINGS, epochs=50.0), tmp_path)
    assert planned.max_steps == 20


@pytest.mark.parametrize("minutes", [None, 0.001])
def test_a_trained_model_computes_in_the_precision_that_is_asked_of_it(tmp_path: Path, minutes: float | None) -> None:
    """Its logits are those of the same weights in a fresh model, not those under the run's autocast."""
    settings = replace(SETTINGS, metric="loss", precision="bfloat16", epochs=1.0, max_minutes=minutes)
    training_plan = lesson_of()
    planned = planned_steps(training_plan, teacher(), settings, tmp_path / "run")
    arguments = training_arguments(tmp_path / "run", planned, num_rows=len(training_plan.rows))
    trained: Any = train(training_plan, teacher(), arguments, fingerprints={}).student
    fresh = lesson_of().model.eval()
    fresh.load_state_dict(trained.state_dict())
    batch = {name: value for name, value in Collator(0)(rows(4)).items() if name != "example_id"}
    with torch.no_grad():
        assert torch.equal(trained(**batch).logits, fresh(**batch).logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert trained(**batch).logits.dtype == torch.bfloat16
