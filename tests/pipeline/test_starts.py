"""A student learns from its share of the training rows, and its start is calibrated on it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexkd.data.encoding.drawn_rows import draw_rows
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.evaluate.cost import Cost
from flexkd.pipeline.distill import distill
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.recipe import override_recipe
from flexkd.tasks import classification
from flexkd.teacher.cache.manifest import Manifest
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import job


def ids_of(rows: list[EncodedRow]) -> list[str]:
    return [str(row["id"]) for row in rows]


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
    fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
    monkeypatch.setattr(classification, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
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
