"""Stages of a process: their time, and the most memory that it held in each, not in an earlier one."""

import logging
from pathlib import Path

import pytest
import torch

from flexkd.evaluate.cost import resident_bytes
from flexkd.pipeline import stages as stages_module
from flexkd.pipeline.stages import Stages


def test_each_stage_has_a_time_and_a_peak_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flexkd")
    stages, size = Stages(), 300_000_000
    before = resident_bytes()[0]
    with stages.stage("large"):
        torch.ones(size // 4).sum()
    with stages.stage("small"):
        pass
    assert list(stages.seconds) == list(stages.peaks) == ["large", "small"]
    assert stages.peaks["large"] > before + 0.9 * size
    assert stages.peaks["small"] < stages.peaks["large"] - 0.5 * size
    assert 0 <= stages.seconds["small"] < stages.seconds["large"]
    assert [record.message for record in caplog.records] == ["large ...", "small ..."]


def test_where_a_peak_cannot_begin_anew_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest of all stages so far would be no figure of the stage."""
    monkeypatch.setattr(stages_module, "_CLEAR_REFS", tmp_path)
    stages = Stages()
    with stages.stage("only"):
        pass
    assert list(stages.seconds) == ["only"]
    assert stages.peaks == {}
