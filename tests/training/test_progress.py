"""What is said of a training while it runs, in place of the dictionaries that the Trainer prints."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from flexkd.training.arguments import training_arguments
from flexkd.training.fit import ValidationMetrics, train
from flexkd.training.progress import TrainingProgress
from tests.pipeline.test_teacher_store import settings_of
from tests.training.test_early_stopping import nll
from tests.training.test_time_limit import lesson_of, teacher

FIGURE = r"\d[\d.e+-]*"
PARTS = f"loss {FIGURE} = task {FIGURE} \\+ logits {FIGURE} \\+ features {FIGURE}"
PACE = r"[\d.,]+ (steps/s|s/step)"


def test_a_training_says_its_loss_parts_rate_pace_and_time_left_and_prints_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Logged steps are details in so short a run, evaluations are for all; the second call resumes after step 2."""
    caplog.set_level(logging.DEBUG, "flexkd.display")
    settings = settings_of(metric="nll", max_steps=4, evaluations=2, batch_size=4, logging_steps=2)
    for _ in range(2):
        arguments = training_arguments(tmp_path, settings, num_rows=16)
        plan = replace(lesson_of(), validation_metrics=ValidationMetrics("nll", of_outputs=nll))
        train(plan, teacher(), arguments, fingerprints={})
    expected = [
        (logging.DEBUG, f"student: step 2 of 4, {PARTS}, lr {FIGURE}, {PACE}, \\d+ s left"),
        (logging.INFO, f"student: step 2 of 4, validation: nll {FIGURE}, {PARTS}"),
        (logging.DEBUG, f"student: step 4 of 4, {PARTS}, lr {FIGURE}, {PACE}"),
        (logging.INFO, f"student: step 4 of 4, validation: nll {FIGURE}, {PARTS}"),
    ]
    expected += expected[2:]
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert len(said) == len(expected)
    for (level, line), (expected_level, pattern) in zip(said, expected, strict=True):
        assert level == expected_level
        assert re.fullmatch(pattern, line), line
    assert capfd.readouterr() == ("", "")


def test_in_a_pipe_a_line_is_due_every_ten_seconds_whether_or_not_there_is_a_loss_to_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss every second step of 3 seconds: it is told from time to time; with none for long, the step alone is."""
    now = [0.0]
    monkeypatch.setattr("flexkd.display.progress.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "flexkd.display")
    arguments = training_arguments(tmp_path, settings_of(metric="nll", max_steps=20), num_rows=16)
    state, control = TrainerState(max_steps=20), TrainerControl()
    with TrainingProgress("student") as progress:
        progress.on_train_begin(arguments, state, control)
        for step in range(1, 15):
            now[0] += 3
            state.global_step, control.should_log = step, step < 10 and step % 2 == 0
            progress.on_step_end(arguments, state, control)
            if control.should_log:
                logs = {"loss": 0.5, "task_weighted": 0.5, "learning_rate": 1e-3}
                progress.on_log(arguments, state, control, logs=logs)
    assert [record.getMessage() for record in caplog.records] == [
        "student: step 4 of 20, loss 0.5, lr 1.00e-03, 3.0 s/step, 48 s left",
        "student: step 8 of 20, loss 0.5, lr 1.00e-03, 3.0 s/step, 36 s left",
        "student: 12 of 20 steps, 3.0 s/step, 24 s left",
    ]
