"""Comparisons of students that write: one teacher asked once, one rotation, a search that reads validation alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkd.compare_record import CompareRecord
from flexkd.pipeline import start as starting
from flexkd.pipeline.compare import compare
from flexkd.teacher.live import LiveTeacher
from tests.job_files import text_job

METHODS = ("fine_tuning", "logit_kd", "projector", "cka", "pca_directions")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("compare-text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield folder


def recipe_of(material: Path, name: str, **changes: Any) -> Any:
    quick = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
    plain = {"output": str(material / name), "generation__rows": 2, "training__evaluations": 1}
    return text_job(material, **{**plain, **quick, **changes})


def test_E07_cells_of_a_text_task_share_one_teacher_and_one_rotation(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    turned: list[int] = []
    plain_signal, plain_rotation = LiveTeacher.signal, starting.rotate_teacher

    def signal(self: LiveTeacher, batch: Any, request: Any) -> Any:
        asked.extend(batch["example_id"])
        return plain_signal(self, batch, request)

    def rotation(*args: Any, **options: Any) -> Any:
        turned.append(1)
        return plain_rotation(*args, **options)

    monkeypatch.setattr(LiveTeacher, "signal", signal)
    monkeypatch.setattr(starting, "rotate_teacher", rotation)
    record = compare(recipe_of(material, "all"), methods=METHODS, seeds=(0, 1))
    # Two bases: of variance alone for pca_directions, of variance and function for the others.
    assert len(turned) <= 2 * 5, "once for all, and for each seed before and while its students learn"
    # Logits alone, with whole states (projector and cka), with directions: all of it in one pass, after one row that
    # shows the shapes.
    assert len(asked) == len(set(asked)) + 1, "a row was asked twice"
    assert [(cell.method, cell.seed) for cell in record.cells] == [(m, s) for s in (0, 1) for m in METHODS]
    assert CompareRecord.read(material / "all" / "compare.json") == record
    for cell in record.cells:
        assert {"rougeL", "nll", "perplexity", "token_agreement", "kl", "validation_nll"} <= set(cell.metrics)
    assert record.metric == "rougeL"
    assert record.teacher["kl"] == pytest.approx(0.0, abs=1e-6)
    by_method = {cell.method: cell.metrics["nll"] for cell in record.cells if cell.seed == 0}
    assert len(set(by_method.values())) == len(METHODS), "two methods trained the same student"
    differences = {row.method: row.difference for row in record.paired if row.difference is not None}
    assert {row.method for row in record.row_contrasts} == set(differences)
    for row in record.row_contrasts:
        assert (row.metric, row.rows, row.reference) == ("rougeL", 2, "fine_tuning")
        assert row.difference == pytest.approx(differences[row.method])


def test_the_search_of_a_text_task_takes_the_lowest_validation_nll(material: Path) -> None:
    grid = {"training.learning_rate": [1e-9, 3e-3]}
    record = compare(
        recipe_of(material, "searched", training__max_steps=2),
        methods=("fine_tuning", "logit_kd"),
        seeds=(0, 1),
        search=grid,
    )
    for method in ("fine_tuning", "logit_kd"):
        found = [
            json.loads((material / "searched" / "search" / method / str(index) / "trial.json").read_text("utf-8"))
            for index in range(2)
        ]
        values = [trial["value"] for trial in found]
        assert values[1] < values[0], "a rate of nothing learns nothing"
        assert f"{method}: training.learning_rate = 0.003" in " ".join(record.notes)
