"""What is said of a training while it runs, in place of the dictionaries that the Trainer prints."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flexkd.training.arguments import training_arguments
from flexkd.training.fit import ValidationMetrics, train
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
