"""What a terminal shows of recipes and records, as text."""

import pytest

from flexkd.compare_record import CompareCell, CompareRecord, Contrast, PairedDifference
from flexkd.data.examples.classification import ClassificationData, Example
from flexkd.data.examples.row_checks import BadRow
from flexkd.preflight import Preflight
from flexkd.record import ModelRecord, ScoreRecord
from flexkd.terminal import (
    print_comparison,
    print_models,
    print_plan,
    print_preflight,
    print_scores,
    print_summary,
)
from tests.test_record import run_record


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def model(role: str, accuracy: float | None, parameters: int, **changes: object) -> ModelRecord:
    values = {"examples_per_second": 250.0, "peak_memory_bytes": 200_000_000, **changes}
    metrics = {"accuracy": accuracy, "nll": 0.5, "agreement": 0.9 if role != "teacher" else None}
    return ModelRecord(role, role, parameters, parameters * 4, 8, 2, metrics=metrics, **values)  # type: ignore[arg-type]


TEACHER = model("teacher", 0.8, 22_700_000)
STUDENT = model("student", 0.76, 5_675_000, examples_per_second=1000.0, peak_memory_bytes=None)


def rows(printed: str) -> list[list[str]]:
    """Cells of the lines of a table, split where two spaces stand."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]


def test_E10_the_closing_table_sets_the_student_beside_its_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(run_record(models=[TEACHER, model("student_before", 0.5, 5_675_000), STUDENT]))
    printed = rows(capsys.readouterr().out)
    assert printed[0] == ["tiny"]
    assert [cells for cells in printed[1:] if len(cells) > 1] == [
        ["size", "memory"],
        ["model", "accuracy", "agreement", "parameters", "(MB)", "examples/s", "(MB)"],
        ["teacher", "0.8000", "-", "22,700,000", "90.8", "250.0", "200.0"],
        ["student before", "0.5000", "0.9000", "5,675,000", "22.7", "250.0", "200.0"],
        ["student", "0.7600", "0.9000", "5,675,000", "22.7", "1,000.0", "-"],
        ["of the teacher", "0.95x", "-", "0.25x", "0.25x", "4.00x", "-"],
    ]


def test_a_metric_that_is_undefined_or_0_has_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    print_models([model("teacher", 0.0, 8), model("student", None, 4)], "accuracy")
    last = [cells for cells in rows(capsys.readouterr().out) if len(cells) > 1][-1]
    assert last[:4] == ["of the teacher", "-", "-", "0.50x"]


def test_headings_stay_whole_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_models([TEACHER, model("student_before", 0.5, 5_675_000), STUDENT], "accuracy")
    lines = capsys.readouterr().out.splitlines()
    assert {"accuracy", "agreement", "parameters", "size", "examples/s", "memory", "200.0"} <= {
        word for line in lines for word in line.split()
    }
    assert any(line.split()[:3] == ["student", "before", "0.5000"] for line in lines)
    assert max(map(len, lines)) <= 80


def test_one_model_is_shown_without_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    print_models([STUDENT], "accuracy")
    assert "of the teacher" not in capsys.readouterr().out


def test_scores_name_unused_units(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores(
        [ScoreRecord(-1, "log_prob", "gradient", [0.5, 0.2, 0.0], [0, 1], 2000, 1500.4, 1, "units", "index", "h")]
    )
    assert ["units", "-1", "log_prob", "gradient", "3", "2", "1", "2,000", "1,500"] in rows(capsys.readouterr().out)


def test_a_comparison_shows_mean_spread_and_paired_difference(capsys: pytest.CaptureFixture[str]) -> None:
    paired = [
        PairedDifference("fine_tuning", 0.75, 0.01, None, None, None, None),
        PairedDifference("flexkd", 0.76, 0.02, 0.01, -0.005, 0.025, 0.04),
        PairedDifference("broken", None, None, None, None, None, None),
    ]
    print_comparison(
        CompareRecord(
            "accuracy", "single_label", [], [0, 1, 2], [], "fine_tuning", paired, {"accuracy": 0.8}, notes=["mine: [b]"]
        )
    )
    printed = capsys.readouterr().out
    assert printed.startswith("accuracy over 3 seeds; differences to fine_tuning, seed by seed")
    table = rows(printed)
    assert ["fine_tuning", "0.7500", "0.0100", "-", "-", "-"] in table
    assert ["flexkd", "0.7600", "0.0200", "+0.0100", "-0.0050 .. +0.0250", "0.0400"] in table
    assert ["broken", "-", "-", "-", "-", "-"] in table
    assert ["teacher: 0.8000"] in table
    assert printed.endswith("mine: [b]\n")


def test_contrasts_stand_below_the_methods_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    contrasts = [
        Contrast("flexkd_activation", "fine_tuning", 0.01, 0.0, 0.02, 0.04, 0.03125, 0.0625, 0.9, 12),
        Contrast("cka", "flexkd"),
    ]
    paired = [PairedDifference("fine_tuning", 0.75, 0.01, None, None, None, None)]
    print_comparison(
        CompareRecord(
            "accuracy",
            "single_label",
            [],
            list(range(6)),
            [],
            "fine_tuning",
            paired,
            {},
            contrasts=contrasts,
            level=0.05,
            smallest_p_value=1 / 32,
            fewest_seeds=7,
        )
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    table = [" ".join(line.split()) for line in printed.splitlines()]
    assert "flexkd_activation against fine_tuning +0.0100 0.031 0.062 +0.90 12" in table
    assert "cka against flexkd - - - - -" in table
    assert "with fewer than 7 seeds, chance alone may explain any difference." in " ".join(printed.split())


def test_a_comparison_with_logit_kd_says_how_soon_its_final_value_was_reached(
    capsys: pytest.CaptureFixture[str],
) -> None:
    curves = {"logit_kd": (3.0, 2.0, 1.0), "flexkd": (2.0, 1.0, 0.5)}
    cells = [
        CompareCell(method, seed, {}, 1.0, [{"step": 10 * (i + 1), "eval_nll": v} for i, v in enumerate(values)])
        for method, values in curves.items()
        for seed in (0, 1)
    ]
    print_comparison(CompareRecord("rougeL", "generation", list(curves), [0, 1], cells, "logit_kd", [], {}))
    table = rows(capsys.readouterr().out)
    assert ["steps to logit_kd's final nll on the validation rows, seed by seed"] in table
    assert ["flexkd", "20 (20 to 20)"] in table
    assert ["logit_kd", "30 (30 to 30)"] in table


def data(labels: list[object], problem: str = "single_label", bad: int = 0) -> ClassificationData:
    from flexkd.data.examples.classification import LabelSpace

    examples = tuple(Example(str(index), ("text",), label) for index, label in enumerate(labels))  # type: ignore[arg-type]
    bad_rows = tuple(BadRow(f"rows.csv:{line}", "label is null: [red]x[/red]") for line in range(bad))
    names = ("value",) if problem == "regression" else ("bad", "good")
    return ClassificationData(examples, examples[:1], examples[:2], LabelSpace(problem, names), bad_rows, {}, "f")


@pytest.mark.parametrize(
    ("labels", "problem", "header", "train"),
    [
        ([1, 0, 1], "single_label", ["split", "rows", "bad", "good"], ["train", "3", "1", "2"]),
        (
            [1, None, 1],
            "single_label",
            ["split", "rows", "bad", "good", "label"],
            ["train", "3", "0", "2", "1"],
        ),
        ([(1.0, 1.0), (0.0, 1.0)], "multi_label", ["split", "rows", "bad", "good"], ["train", "2", "1", "2"]),
        ([0.5, 1.5, None], "regression", ["split", "rows", "label"], ["train", "3", "1"]),
    ],
)
def test_rows_are_counted_by_split_and_label(
    capsys: pytest.CaptureFixture[str], labels: list[object], problem: str, header: list[str], train: list[str]
) -> None:
    print_preflight(Preflight((), ("a note",), data(labels, problem)))
    printed = rows(capsys.readouterr().out)
    assert header in printed
    assert train in printed
    assert ["note: a note"] in printed


def test_D16_the_first_bad_rows_are_shown_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    print_preflight(Preflight((), (), data([0, 1], bad=23)))
    printed = capsys.readouterr().out
    assert "23 rows cannot be used" in printed
    assert printed.count("label is null: [red]x[/red]") == 20
    assert "and 3 more" in printed


def test_the_plan_names_what_will_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    from flexkd.recipe import Recipe

    values = {
        "name": "job",
        "data": {"train": "a.csv"},
        "teacher": {"model": "big", "fine_tune": {"epochs": 2}},
        "student": {"hidden_size": 24},
        "training": {"max_steps": 50},
    }
    print_plan(Recipe.model_validate(values))
    printed = rows(capsys.readouterr().out)
    assert ["teacher", "big, fine-tuned first for 2 epochs"] in printed
    assert ["student", "cut out of the teacher, hidden_size 24"] in printed
    assert ["training", "50 steps of batches of 32, learning rate 0.0005"] in printed
    assert ["run folder", "runs/job"] in printed
