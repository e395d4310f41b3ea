"""Early stopping: the step at which a run ends, the checkpoint that it keeps, and what a killed run makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainerCallback

import flexkd
from flexkd.data.encoding.collation import Collator
from flexkd.pipeline import distill as pipeline
from flexkd.run_files import CHECKPOINTS_FOLDER
from flexkd.teacher.live import LiveTeacher
from flexkd.training.arguments import training_arguments
from flexkd.training.early_stopping import EarlyStopping
from flexkd.training.fit import TrainingPlan, ValidationMetrics, train
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import count_optimizer_steps, fixed_costs, job
from tests.pipeline.test_teacher_store import settings_of
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import rows

SETTINGS = settings_of(
    metric="nll", max_steps=24, batch_size=4, evaluations=12, learning_rate=0.002, keep_checkpoints=2
)
RULE = EarlyStopping(patience=3, metric="nll")


def log_of(values: list[float], metric: str = "nll") -> list[dict[str, Any]]:
    """Evaluations at steps 10, 20, ..., with a line of the training between them."""
    lines = [{f"eval_{metric}": value, "step": 10 * (index + 1)} for index, value in enumerate(values)]
    return [entry for line in lines for entry in ({"loss": 1.0, "step": line["step"]}, line)]


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "ends"),
    [
        ([3, 2, 1], 1, 0.0, False),
        ([3, 2, 2], 1, 0.0, True),  # as good is no improvement
        ([3, 2, 2.5, 1.9], 2, 0.0, False),
        ([3, 2, 2.5, 1.9], 2, 0.2, True),  # better, but by less than min_delta
        ([3, 2.9, 2.8, 2.7], 2, 0.25, False),  # small gains add up: the last is 0.3 below the first
        ([math.nan, 2, 1], 1, 0.0, False),
        ([2, math.nan], 1, 0.0, True),
        ([math.nan, math.nan], 2, 0.0, True),
        ([], 1, 0.0, False),
    ],
)
def test_a_run_ends_when_nothing_has_improved_for_so_long(
    values: list[float], patience: int, min_delta: float, ends: bool
) -> None:
    assert EarlyStopping(patience, "nll", min_delta).ends(log_of(values)) is ends
    rising = EarlyStopping(patience, "accuracy", min_delta)
    assert rising.ends(log_of([-value for value in values], "accuracy")) is ends


def test_the_decision_survives_the_json_of_a_checkpoint() -> None:
    log = log_of([2, math.nan, 2 - 1e-16])
    assert EarlyStopping(2, "nll").ends(json.loads(json.dumps(log)))


def test_the_note_says_when_and_why() -> None:
    assert EarlyStopping(2, "nll").note(log_of([3, 2, 2, 2])) == (
        "training.early_stopping: ended after step 40: nll had not improved since step 20, for 2 evaluations. The "
        "student is that of the best evaluation."
    )
    assert EarlyStopping(2, "nll").note(log_of([3, 2, 1])) is None
    assert "had not improved at all" in str(EarlyStopping(1, "nll").note(log_of([math.nan])))


def test_a_run_that_cannot_end_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """As where a limit in minutes leaves fewer steps than the recipe has evaluations."""
    RULE.tell(24, 2)
    assert not caplog.records
    RULE.tell(4, 1)
    assert "3 evaluations without an improvement end none of the 4 steps, as step 4 is the first" in caplog.text


def plan_of() -> TrainingPlan:
    """A student whose nll falls, rises for three evaluations, and falls again."""
    student = tiny_model("bert", seed=7, hidden_size=16, hidden_dropout_prob=0.1)
    objective = flexkd.Objective(flexkd.TaskTerm(), flexkd.LogitTerm())
    metrics = ValidationMetrics("nll", of_outputs=nll)
    return TrainingPlan(student, objective, rows(16), rows(8), Collator(0), metrics, "student")


def nll(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"nll": float(F.cross_entropy(logits, labels))}


class _Kill(TrainerCallback):
    """Ends the process' work right after a checkpoint, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder: Path, *callbacks: TrainerCallback, rule: EarlyStopping | None = RULE) -> DistillationTrainer:
    arguments = training_arguments(folder, SETTINGS, num_rows=16)
    teacher = LiveTeacher(tiny_model("bert", seed=1))
    return train(plan_of(), teacher, arguments, fingerprints={}, early_stopping=rule, callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> DistillationTrainer:
    return run(tmp_path_factory.mktemp("whole"))


def losses(trainer: DistillationTrainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_nll"]) for entry in trainer.state.log_history if "eval_nll" in entry]


def test_it_ends_early_and_keeps_the_best_checkpoint(whole: DistillationTrainer) -> None:
    ended = whole.state.global_step
    values = dict(losses(whole))
    best = min(values, key=lambda step: values[step])
    assert list(values)[-1] == ended < SETTINGS.steps(16)
    assert ended == best + 3 * 2, "three evaluations, two steps apart, after the best one"
    best_folder = Path(str(whole.args.output_dir)) / f"checkpoint-{best}"
    stored = load_file(best_folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in whole.student.named_parameters())


def test_without_it_the_same_run_takes_all_steps(tmp_path: Path, whole: DistillationTrainer) -> None:
    """Schedule and rows are those of all steps: what early stopping cuts off is the end, and nothing else."""
    unlimited = run(tmp_path, rule=None)
    assert unlimited.state.global_step == SETTINGS.steps(16)
    assert losses(unlimited)[: len(losses(whole))] == losses(whole)


@pytest.mark.parametrize("before_the_end", [0, 2, 8])
def test_a_killed_run_ends_at_the_same_step(
    tmp_path: Path, whole: DistillationTrainer, before_the_end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint at which it ends, one before it, and before the best one."""
    ended, expected = whole.state.global_step, losses(whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, _Kill(ended - before_the_end))
    steps = count_optimizer_steps(monkeypatch)
    resumed = run(tmp_path)
    assert len(steps) == before_the_end
    assert resumed.state.global_step == ended
    assert losses(resumed) == expected
    for (name, one), two in zip(whole.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_recipe_ends_early_says_so_and_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a schedule, a fade, and a metric that watches other figures than the one that chooses."""
    fixed_costs(monkeypatch)
    steps = count_optimizer_steps(monkeypatch)
    recipe = job(
        tmp_path,
        teacher__fine_tune=None,
        teacher__allow_weak=True,
        training__max_steps=30,
        training__evaluations=10,
        training__schedule="cosine",
        training__early_stopping={"patience": 2, "metric": "nll", "min_delta": 10},
        objective__features__fade=0.5,
    )
    record = pipeline.distill(recipe)
    assert len(steps) == 9, "the first evaluation improves on nothing, the next two by less than 10 nats"
    assert [entry["step"] for entry in record.evaluations] == [3, 6, 9]
    assert "training.early_stopping: ended after step 9: nll had not improved since step 3" in " ".join(record.notes)
    assert [name.name for name in sorted((recipe.folder / CHECKPOINTS_FOLDER).iterdir())][-1] == "checkpoint-9"
    again = pipeline.distill(recipe)
    assert len(steps) == 9
    assert again.models[2].metrics == record.models[2].metrics
