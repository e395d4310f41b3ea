"""Rows of a start: drawn by its seed, nested, and a share of them is all that a student sees."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.encoding.encoded import EncodedRow
from flexkd.pipeline.distill import distill
from flexkd.pipeline.drawn_rows import draw_rows
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.recipe import override_recipe
from flexkd.teacher.cache.manifest import Manifest
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import job


def numbered(count: int) -> list[EncodedRow]:
    rows: list[Any] = [{"id": str(index), "input_ids": [index], "labels": 0} for index in range(count)]
    return rows


def ids_of(rows: list[EncodedRow]) -> list[str]:
    return [str(row["id"]) for row in rows]


def test_a_smaller_share_is_part_of_a_larger_one_and_training_keeps_the_order() -> None:
    rows = numbered(40)
    small, large, every = (draw_rows(rows, seed=3, share=share) for share in (0.05, 0.26, None))
    assert [len(drawn.first) for drawn in (small, large, every)] == [2, 11, 40]
    assert ids_of(large.first)[:2] == ids_of(small.first)
    assert ids_of(every.first)[:11] == ids_of(large.first)
    assert every.training == rows
    assert ids_of(large.training) == sorted(ids_of(large.first), key=int)
    assert ids_of(draw_rows(rows, seed=4, share=0.26).first) != ids_of(large.first)
    assert draw_rows(rows, seed=None, share=0.25).first == rows[:10]


def test_a_student_learns_from_its_share_and_is_calibrated_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds all rows, so that students of other seeds read it too."""
    seen: set[str] = set()
    plain = DistillationTrainer.compute_loss

    def watched(self: DistillationTrainer, model: Any, inputs: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        if model.training:
            seen.update(inputs["example_id"])
        return plain(self, model, inputs, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    changes = {"teacher__fine_tune": None, "training__max_steps": 4, "teacher__cache": "always"}
    recipe = job(tmp_path, data__train_share=0.25, student__start_seed=5, **changes)
    record = distill(recipe)
    every_row = prepare(override_recipe(recipe, ["data.train_share=null", "student.start_seed=null"])).splits
    drawn = draw_rows(every_row["train"], seed=5, share=0.25)
    assert seen == set(ids_of(drawn.training))
    assert "data.train_share: students learn from 0.25 of the training rows, the teacher from all." in record.notes
    (manifest,) = (recipe.folder / "cache").glob("*/*.json")
    answered = sum(entry.rows for entry in Manifest.read(manifest.parent).entries if entry is not None)
    assert answered == len(every_row["train"]) + len(every_row["validation"])
    run = Run(prepare(recipe), recipe, recipe.folder)
    calibration = [id_ for batch in run.job.batches("train", num_rows=4) for id_ in batch["example_id"]]
    assert calibration == ids_of(drawn.first)[:4]
    settings = run.made_of
    assert (settings["student.start_seed"], settings["data.train_share"]) == ("5", "0.25")
    assert json.loads((recipe.folder / "record.json").read_text("utf-8"))["recipe"]["data"]["train_share"] == 0.25
