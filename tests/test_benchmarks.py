"""The benchmarks measure what they say: ratios of pairs, verdicts, one step at a time, sides that learn the same."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel

from benchmarks import house, objectives, sides
from benchmarks.machine import commit
from benchmarks.page import measured, page
from benchmarks.pairs import Ratio, Seconds, pairs_of
from benchmarks.process import Process, started
from benchmarks.reading import Reading
from benchmarks.setting import Setting, student_of
from benchmarks.sources import House
from benchmarks.stepping import stepwise
from benchmarks.table import ROWS, Side

TINY = Setting(0.25).tiny()


def test_a_commit_has_a_plus_where_files_were_changed_but_for_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, code = tmp_path / "docs" / "results" / "cells.jsonl", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    for file in (results, code):
        file.write_text("before\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], check=True)
    name = commit()
    assert len(name) >= 7
    results.write_text("after\n", encoding="utf-8")
    assert commit() == name
    code.write_text("after\n", encoding="utf-8")
    assert commit() == f"{name}+"


def test_a_ratio_is_the_median_of_pairs_and_its_interval_holds_it() -> None:
    ratio = Ratio.of([2.0, 4.0, 9.0], [1.0, 2.0, 3.0], 2)
    assert (ratio.first, ratio.second, ratio.value, ratio.low, ratio.high) == (4.0, 2.0, 2.0, 2.0, 3.0)
    assert (ratio.pairs, ratio.processes) == (3, 2)
    assert [ratio.verdict(bar) for bar in (3.0, 2.5, 1.9)] == ["met", "open", "missed"]


def test_what_does_not_come_in_pairs_has_an_interval_that_holds_every_ratio() -> None:
    ratio = Ratio.from_end_to_end([3.0, 1.0, 2.0], [4.0, 8.0, 5.0])
    assert (ratio.first, ratio.second, ratio.value, ratio.low, ratio.high) == (2.0, 5.0, 0.4, 0.125, 0.75)


def test_sides_of_pairs_take_turns_at_going_first() -> None:
    calls: list[str] = []

    def side(name: str, wall: float) -> Callable[[], Seconds]:
        def work() -> Seconds:
            calls.append(name)
            return Seconds(wall, 0.0)

        return work

    pairs = pairs_of(side("a", 1.0), side("b", 2.0), 3)
    assert "".join(calls) == "ab" + "ba" + "ab"
    assert [(above.wall, below.wall) for above, below in pairs] == [(1.0, 2.0)] * 3


@pytest.mark.slow
def test_a_side_works_in_a_process_of_its_own() -> None:
    with started("chunked-1", 0, tiny=True) as process:
        assert process.peak_bytes > 0
        seconds = process.work()
        assert seconds.wall > 0
        assert seconds.cpu > 0


def test_a_process_that_ends_without_an_answer_is_named_with_its_code() -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    ended = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with ended, pytest.raises(SystemExit, match=r"SystemExit\(3\) ended with code 3"):
        Process(ended)


def test_a_training_stands_still_between_steps_and_ends() -> None:
    trainer = sides.our_trainer(TINY, student_of(TINY), objectives.fine_tuning(TINY), None)
    with stepwise(trainer) as step:
        assert trainer.state.global_step == 0
        for expected in (1, 2):
            step()
            assert trainer.state.global_step == expected


def test_what_goes_wrong_in_a_training_is_raised_where_the_step_was_asked_for() -> None:
    trainer = sides.our_trainer(TINY, student_of(TINY), objectives.fine_tuning(TINY), None)

    def fails(*_: object, **__: object) -> None:
        raise ValueError("no rows")

    trainer.training_step = fails  # type: ignore[method-assign]
    with stepwise(trainer) as step, pytest.raises(ValueError, match="no rows"):
        step()


def weights_after(side: Side, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The student's weights after two steps of a side."""
    students = []

    def recorded_student(of: Setting) -> PreTrainedModel:
        students.append(student_of(of))
        return students[-1]

    monkeypatch.setattr(sides, "student_of", recorded_student)
    with side(setting) as work:
        for _ in range(2):
            work()
    (student,) = students
    return parameters_to_vector(student.parameters()).detach()


def test_our_trainer_and_the_plain_loops_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ratio of their times would be meaningless: the same losses, rows, clipping and optimizer."""
    start = parameters_to_vector(student_of(TINY).parameters()).detach()
    of_trainer, *of_loops = (
        weights_after(ROWS[row].sides[side], TINY, monkeypatch) - start
        for row, side in (("trainer-0.12", 0), ("trainer-0.12", 1), ("plain-0.12", 1))
    )
    assert of_trainer.norm() > 0
    for of_loop in of_loops:
        # Adam takes a whole step along the smallest gradient, whose sign may depend on the last bit of a bfloat16.
        assert (of_loop - of_trainer).norm() < 0.01 * of_trainer.norm()


@pytest.mark.parametrize("name", ["scoring-0.12", "projector-1", "chunked-1", "cached-0.12", "run-1", "small"])
def test_both_sides_of_a_row_run(name: str) -> None:
    for side in ROWS[name].sides:
        with side(TINY) as work:
            work()


def test_a_page_shows_bar_ratio_and_verdict_of_every_measure() -> None:
    ratio = Ratio(1.5, 2.0, 0.75, 0.7, 0.79, 20, 3)
    bytes_ratio = Ratio(2.0**20, 2.0**22, 0.25, 0.2, 0.6, 3, 3)
    entry = measured({"wall": ratio, "memory": bytes_ratio}, commit="abc", date="2026-11-25")
    values = {"commit": "abc", "date": "2026-11-25", "values": [0.2, 0.4, 0.3]}
    text = page({"machine": {"cores": "2"}, "rows": {"gkd-1": entry, "peak": values}})
    assert "- cores: 2" in text
    assert "| 1 | wall time | 0.8 | 0.750 | 0.700 .. 0.790 | met | 1.5 s | 2 s | 20 in 3 |" in text
    assert "| 1 | memory | 0.5 | 0.250 | 0.200 .. 0.600 | open | 1 MiB | 4 MiB | 3 in 3 |" in text
    assert "| 0.3 | 0.2 .. 0.4 |" in text


HOUSE = {
    "__init__": '"""A house."""\n',
    "facts": '"""Facts."""\n\nSIZE = 3\n_INNER = 4\n',
    "pipeline/__init__": '"""Runs."""\n',
    "pipeline/start": '''"""Starts."""

from flexkd.facts import SIZE


class Start:
    """A start."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def units(self) -> int:
        # A comment.
        return sum(one for one in self.rows)
''',
    "pipeline/scores": '''"""Scores."""

from flexkd.pipeline.start import Start

SIZE = 3


def select(start: Start, rows: tuple[int, ...]) -> Start:
    """A start again."""
    return start
''',
    "pipeline/distill": '''"""A run."""

from flexkd.pipeline.scores import select
from flexkd.pipeline.start import Start


def distill(rows: list[int]) -> int:
    start = Start(rows)
    start = select(start, tuple(rows))
    return start.units()
''',
}


def test_the_figures_of_a_house_are_counted(tmp_path: Path) -> None:
    for name, text in HOUSE.items():
        path = tmp_path / "src" / "flexkd" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    tree = House(tmp_path)
    assert tree.inner_floors() == {"pipeline": 3}
    assert tree.depths == {
        "": 0,
        "facts": 0,
        "pipeline": 0,
        "pipeline.start": 1,
        "pipeline.scores": 2,
        "pipeline.distill": 3,
    }
    assert house.forbidden_locals(tree) == {"pipeline.start:12 units": ["one"]}
    assert house.copies(tree) == {"SIZE = 3": ["facts", "pipeline.scores"]}
    assert house.annotations_of(tree, "rows") == {"list[int]", "tuple[int, ...]"}
    figures = house.figures(tree)
    assert figures["files"] == "6"
    assert figures["functions"] == "4"
    assert figures["functions with a forbidden local"] == "1"
    reading = Reading(tree)
    assert reading.modules == ["pipeline.distill", "pipeline.start", "pipeline.scores", "pipeline.start"]
    assert (reading.files, reading.climbs) == (["pipeline.distill", "pipeline.start", "pipeline.scores"], 1)
