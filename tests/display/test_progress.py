"""Progress: bars that fit their terminal, lines at a growing distance, and cells that are counted."""

import logging
import sys
from collections.abc import Callable

import pytest

from flexkd.display import progress as module
from flexkd.display.progress import Countdown, Progress, Tracked, part


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines that a pipe shows, so far."""
    caplog.set_level(logging.INFO, "flexkd")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_pipe_gets_lines_at_a_growing_distance(
    clock: Callable[[float], None], lines: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with part("cell 3 of 12"), Progress("student's answers", 5000, "rows", done=1000) as progress:
        for _ in range(4000):
            clock(1)
            progress.advance()
    assert lines()[:2] == [
        "cell 3 of 12, student's answers: 1,010 of 5,000 rows, 1.0 rows/s, 66 min left",
        "cell 3 of 12, student's answers: 1,020 of 5,000 rows, 1.0 rows/s, 66 min left",
    ]
    assert len(lines()) < 90
    assert "5,000 of" not in lines()[-1], "what is done is told by the next stage"
    assert capsys.readouterr() == ("", "")


def test_short_work_says_nothing(lines: Callable[[], list[str]]) -> None:
    items = Tracked([1, 2, 3], "scores")
    assert (len(items), list(items), list(items)) == (3, [1, 2, 3], [1, 2, 3])
    assert lines() == []


@pytest.mark.parametrize(
    ("columns", "bar"),
    [
        (100, "cell 3 of 12, student  20% |"),
        (72, "cell 3 of 12, student  20/100, 2.0 steps/s, 40 s left, loss 1.25"),
        (56, "cell 3 of 12, student  20/100, 40 s left, loss 1.25"),
        (45, "cell 3 of 12, student  20/100, 40 s left"),
        (30, "20/100, 40 s left"),
    ],
)
def test_a_bar_leaves_out_what_a_narrow_terminal_has_no_room_for(
    monkeypatch: pytest.MonkeyPatch, columns: int, bar: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with part("cell 3 of 12"), Progress("student", 100, "steps") as progress:
        progress.note("loss 1.25")
        entries = {"n": 20, "elapsed": 10.0, "ncols": columns}
        monkeypatch.setattr(module.tqdm, "format_dict", {"initial": 0, "total": 100, "prefix": progress.what} | entries)
        drawn = module.tqdm.format_meter(**progress._bar.format_dict)
    assert drawn.startswith(bar)
    assert len(drawn) <= columns


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_bar_that_was_drawn_for_its_note_is_wiped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None], seconds: float
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("student", 100, "steps") as progress:
        clock(seconds)
        progress.note("validating 1/1", at_once=True)
    shown = capsys.readouterr().err
    assert ("validating 1/1" in shown) is (seconds > 0)
    assert shown.split("\r")[-1].strip() == "", "what follows begins on an empty line"


def test_cells_are_counted_and_their_time_is_that_of_finished_ones_of_their_kind(
    lines: Callable[[], list[str]],
) -> None:
    countdown = Countdown("cell", ["fine_tuning", "flexkd"] * 3)
    for number, (name, seconds) in enumerate([("fine_tuning", 60.0), ("flexkd", 600.0)] * 3):
        with countdown.next(f"{name}, seed {number // 2}", is_finished=number == 2):
            pass
        countdown.finished(seconds)
    assert lines() == [
        "cell 1 of 6: fine_tuning, seed 0",
        "cell 2 of 6: flexkd, seed 0; about 5 min left",
        "cell 4 of 6: flexkd, seed 1; about 21 min left",
        "cell 5 of 6: fine_tuning, seed 2; about 11 min left",
        "cell 6 of 6: flexkd, seed 2; about 10 min left",
    ]
