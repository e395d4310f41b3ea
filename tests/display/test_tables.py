"""Tables and texts in any width: nothing is cut, no word and no figure is broken, no text acts on the terminal."""

import sys

import pytest

from flexkd.display.results import complain, show, show_entries
from flexkd.display.tables import FigureTable

HEADINGS = ["model", "accuracy", "parameters", "size (MB)", "examples/s", "95% interval"]
ROWS = [
    ("teacher", "0.8000", "22,700,000", "90.8", "250.0", "64.00 .. 66.00"),
    ("most frequent class", "0.4840", "-", "-", "-", "-"),
]


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    table = FigureTable(HEADINGS)
    for row in ROWS:
        table.add_row(*row)
    show(table)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("columns", [120, 80, 66])
def test_figures_stand_side_by_side_where_they_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    lines = printed(capsys, monkeypatch, columns)
    assert max(map(len, lines)) <= columns
    assert next(line for line in lines if "teacher" in line).split("  ")[-1] == "64.00 .. 66.00"
    ends = [line.index("22,700,000") + 10 for line in lines if "22,700,000" in line]
    assert [line.index("parameters") + 10 for line in lines if "parameters" in line] == ends, "to the right"


@pytest.mark.parametrize("columns", [55, 50, 34])
def test_they_are_stacked_where_they_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    lines = printed(capsys, monkeypatch, columns)
    assert lines == [
        "teacher",
        "  accuracy              0.8000",
        "  parameters        22,700,000",
        "  size (MB)               90.8",
        "  examples/s             250.0",
        "  95% interval  64.00 .. 66.00",
        "most frequent class",
        "  accuracy              0.4840",
        "  parameters                 -",
        "  size (MB)                  -",
        "  examples/s                 -",
        "  95% interval               -",
    ]


def test_a_long_text_in_a_stacked_table_goes_on_below_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = FigureTable(["model", "parameters", "shape"])
    table.add_row("teacher", "34,498", "bert, 4 layers x 32, 4 heads, 48 units")
    for columns, shown in (
        (40, f"  parameters  {'34,498':>26}\n  shape       bert, 4 layers x 32, 4\n              heads, 48 units\n"),
        (14, "  parameters\n    34,498\n  shape\n    bert, 4\n    layers x\n    32, 4\n    heads, 48\n    units\n"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        show(table)
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert "\n".join(lines) == f"teacher\n{shown}".rstrip()


def test_texts_stand_beside_or_below_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/a/path/that/is/longer/than/a/line"
    for columns, shown in (
        (40, f"plan        a word and\n            {path}\nrun folder  x\n"),
        (30, f"plan\n  a word and\n  {path}\nrun folder\n  x\n"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_entries([("plan", f"a word and {path}"), ("run folder", "x")])
        assert capsys.readouterr().out == shown
    monkeypatch.delenv("COLUMNS")
    show(f"a note {'of many words ' * 20}")
    assert capsys.readouterr().out.count("\n") == 1, "a reader of a pipe searches for words"


def test_an_error_is_broken_between_words_and_its_command_nowhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    command = "flexkd distill recipe.yaml training.epochs=3"
    complain("Interrupted. Run the same command:", command=command)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    complain("Interrupted. Run the same command:", command=command)
    assert capsys.readouterr().err == (
        f"Interrupted. Run the same command: {command}\nInterrupted. Run the same\n  command:\n{command}\n"
    )


def test_no_text_from_outside_acts_on_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    evil = "x\x1b[2J\x9b1m\r\u202e\ud800[red]"
    table = FigureTable(["label", evil])
    table.add_row(evil, evil)
    show(table)
    show(evil, bold=True)
    show_entries([(evil, evil)])
    out = capsys.readouterr().out
    assert out.count("x\\x1b[2J\\x9b1m\\r\\u202e\\ud800[red]") == 6
    assert not {"\x1b", "\x9b", "\r", "\u202e", "\ud800"} & set(out)
