"""What is said of seeds that draw nothing for a start, as it reads all training rows: and whether it is true."""

from pathlib import Path

import pytest
from torch import Tensor

from flexkd.compare_record import CompareRecord
from flexkd.pipeline.compare import compare
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.preflight import preflight
from flexkd.preflight.comparison import cell_recipe, compared_recipes, with_starts
from flexkd.preflight.inputs import read_inputs
from flexkd.recipe import Recipe, override_recipe
from flexkd.report.page import write_compare_report
from tests.job_files import job

EXACT = {"teacher__fine_tune": None, "teacher__precision": "float32", "training__precision": "float32"}
COMPARED = {"methods": ["logit_kd", "flexkd"], "seeds": [0, 1, 2, 3, 4, 5]}
ALL_ROWS = {"student__calibration_rows": 74, "scores__rows": None}
SAME_STARTS = (
    "compare.starts: by_seed draws nothing for student.calibration_rows = 74 and scores.rows = null: every seed reads "
    "all 74 training rows, so that the starts of all seeds are the same, and their spread is that of the order of the "
    "rows and of dropout. To draw them, give fewer: student.calibration_rows=37 scores.rows=37."
)


def notes_of(recipe: Recipe, key: str = "compare.starts") -> list[str]:
    result = preflight(recipe)
    assert not result.problems
    return [note for note in result.notes if note.startswith(key)]


def weights_of_starts(recipe: Recipe, folder: Path) -> list[dict[str, Tensor]]:
    """The weights of the first two seeds' students before they learn."""
    ready = prepare(recipe)
    variant = with_starts(recipe, compared_recipes(read_inputs(recipe, [])))["flexkd"]
    starts = []
    for seed in (0, 1):
        run = Run(ready, cell_recipe(variant, seed, folder / str(seed))[0], folder / str(seed))
        starts.append(run.start(run.select()).student.state_dict())
    return starts


def are_close(starts: list[dict[str, Tensor]]) -> bool:
    return all(tensor.allclose(starts[1][name], atol=1e-6) for name, tensor in starts[0].items())


def test_starts_that_read_all_rows_are_said_to_be_the_same_and_are(tmp_path: Path) -> None:
    recipe = job(tmp_path, **EXACT, **ALL_ROWS, compare=COMPARED)
    assert notes_of(recipe) == [SAME_STARTS]
    assert are_close(weights_of_starts(recipe, tmp_path / "same"))
    advice = SAME_STARTS.partition("give fewer: ")[2].removesuffix(".").split()
    advised = override_recipe(recipe, advice)
    assert notes_of(advised) == []
    assert not are_close(weights_of_starts(advised, tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student__calibration_rows": 73, "scores__rows": 73}, None),
        (
            {"student__calibration_rows": 16},
            "scores.rows = 2000: every seed reads all 74 training rows. To draw them, give fewer: scores.rows=37.",
        ),
        (
            {"scores__rows": 8, "student__calibration_rows": 500},
            "student.calibration_rows = 500: every seed reads all 74 training rows. To draw them, give fewer: "
            "student.calibration_rows=37.",
        ),
        # A share of the rows is another one for each seed, however few of it are read.
        ({**ALL_ROWS, "data__train_share": 0.5}, None),
        ({**ALL_ROWS, "data__train_share": 1.0}, SAME_STARTS.partition("nothing for ")[2]),
        ({**ALL_ROWS, "compare": {**COMPARED, "starts": "shared"}}, None),
        # Random units are drawn by the seed itself, and no row is scored for them.
        (
            {"student__chosen_by": "random", "compare": {**COMPARED, "methods": ["logit_kd", "flexkd_random"]}},
            None,
        ),
        (
            {**ALL_ROWS, "student__chosen_by": "random", "compare": {"methods": ["logit_kd", "flexkd_random"]}},
            "student.calibration_rows = 74: every seed reads all 74 training rows. To draw them, give fewer: "
            "student.calibration_rows=37.",
        ),
    ],
)
def test_a_key_is_named_that_reads_all_rows(changes: dict[str, object], words: str | None, tmp_path: Path) -> None:
    notes = notes_of(job(tmp_path, **{**EXACT, "compare": COMPARED, **changes}))
    assert notes == ([] if words is None else [f"compare.starts: by_seed draws nothing for {words}"])


def test_a_start_seed_of_one_run_that_draws_all_rows_is_named(tmp_path: Path) -> None:
    recipe = job(tmp_path, **EXACT, student__start_seed=5, scores__rows=80)
    assert notes_of(recipe, "student.start_seed") == [
        "student.start_seed: 5 draws nothing for scores.rows = 80: the start reads all 74 training rows. To draw them, "
        "give fewer: scores.rows=37."
    ]
    assert notes_of(override_recipe(recipe, ["scores.rows=37"]), "student.start_seed") == []


def test_a_comparison_says_it_in_its_record_and_on_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    recipe = job(tmp_path, **EXACT, **ALL_ROWS, training__max_steps=1, training__evaluations=1)
    with caplog.at_level("WARNING", logger="flexkd"):
        compare(recipe, methods=("logit_kd", "flexkd"), seeds=(0, 1))
    assert SAME_STARTS in caplog.messages
    record = CompareRecord.read(recipe.folder / "compare.json")
    assert record.notes.count(SAME_STARTS) == 1
    write_compare_report(record, tmp_path / "page.html")
    assert "by_seed draws nothing for student.calibration_rows" in (tmp_path / "page.html").read_text("utf-8")
