"""The log of a command: what the terminal shows of it, and the file of the run folder that has all of it."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkd.display.log import keep_log, set_up_logging, shows_bars
from flexkd.display.results import complain, say, show, show_entries
from flexkd.display.tables import FigureTable

LIBRARIES = ("transformers", "datasets", "accelerate", "huggingface_hub", "httpx", "py.warnings")
log = logging.getLogger("flexkd.test")


@pytest.fixture(autouse=True)
def _log_of_libraries() -> Iterator[None]:
    """What `set_up_logging` changes besides the log of flexkd, which every test finds as it was."""
    before = [(logger, list(logger.handlers), logger.level) for logger in map(logging.getLogger, LIBRARIES)]
    yield
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ["told", "[bold]warned"]),
        ({"verbose": True}, ["said", "told", "[bold]warned"]),
        ({"quiet": True}, ["[bold]warned"]),
    ],
)
def test_the_log_is_ours_and_other_libraries_only_warn(
    capsys: pytest.CaptureFixture[str], options: dict[str, bool], shown: list[str]
) -> None:
    set_up_logging(**options)
    log.debug("said")
    log.info("told")
    log.warning("[bold]warned")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [word for word in ("said", "told", "[bold]warned") if word in captured.err] == shown
    assert captured.err.count("warning: ") == 1
    assert not logging.getLogger("transformers.trainer").isEnabledFor(logging.INFO)
    assert not logging.getLogger("datasets").isEnabledFor(logging.INFO)


def test_the_file_has_every_line_whatever_the_terminal_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    set_up_logging(quiet=True)
    file = tmp_path / "run" / "flexkd.log"
    keep_log(file, "flexkd distill recipe.yaml")
    log.debug("a detail")
    assert not file.parent.exists(), "a run that is refused leaves no folder"
    file.parent.mkdir()
    log.info("a stage ...")
    log.warning("a label: \x1b[31mred\x07")
    logging.getLogger("transformers.trainer").warning("of a library")
    show("the name", bold=True)
    table = FigureTable(["model", "accuracy"])
    table.add_row("teacher", "0.8")
    show(table)
    show_entries([("teacher", "a model")], is_result=False)
    say("page: report.html")
    complain("it stopped")
    content = file.read_text(encoding="utf-8")
    lines = [line[20:] if line[:4].isdigit() else line for line in content.splitlines()]
    assert lines[:6] == [
        "$ flexkd distill recipe.yaml",
        "a detail",
        "a stage ...",
        "warning: a label: \\x1b[31mred\\x07",
        "warning: of a library",
        "the name",
    ]
    assert [line for line in lines[6:] if line.strip(" \u2500")] == [
        "model    accuracy", "teacher       0.8", "teacher  a model", "page: report.html", "it stopped",
    ]  # fmt: skip
    assert "\x1b" not in content
    captured = capsys.readouterr()
    assert "a model" not in captured.out, "what is planned is no result"
    assert "teacher" in captured.out
    assert captured.err.splitlines()[-2:] == ["warning: a label: \\x1b[31mred\\x07", "it stopped"]


def test_a_second_command_goes_on_below_and_other_processes_keep_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flexkd.log"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        set_up_logging()
        keep_log(file, "flexkd distill")
        log.info("told by %s", rank)
        say("done")
    assert [line[20:] for line in file.read_text(encoding="utf-8").splitlines()] == [
        "$ flexkd distill", "told by 0", "done", "$ flexkd distill", "told by 0", "done",
    ]  # fmt: skip
    assert capsys.readouterr() == ("done\ndone\n", "told by 0\ntold by 0\n")


def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    keep_log(tmp_path, "flexkd distill")
    log.info("told")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: cannot be written ([Errno 21] Is a directory: '{tmp_path}'); the terminal alone shows "
        "what follows.",
        "told",
    ]


def test_lines_end_between_words_in_a_terminal_and_nowhere_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_logging()
    path = f"/{'folder/' * 8}"
    text = f"a line about {path} and what is there"
    log.info(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    log.info(text)
    assert capsys.readouterr().err == f"a line about\n  {path}\n  and what is there\n"


def test_bars_are_for_terminals_and_for_who_has_not_asked_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_logging()
    assert not shows_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shows_bars()
    set_up_logging(quiet=True)
    assert not shows_bars()
