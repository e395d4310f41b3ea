"""One recipe at several sizes: cells that are kept and continued, students that are kept, and what the record says."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import flexkd
from flexkd.cli import app
from flexkd.errors import ArtifactError
from flexkd.evaluate.cost import Cost, weight_bytes
from flexkd.pipeline.run import Run
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.sizes import with_sizes
from flexkd.run_files import REPORT_FILE
from flexkd.sizes_record import SizesRecord
from flexkd.tasks import classification, generation
from flexkd.training import time_limit
from tests.job_files import job, text_job

FEW = {"student__calibration_rows": 8, "scores__rows": 8, "teacher__fine_tune__epochs": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sizes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        for task in (classification, generation):
            patch.setattr(task, "measure_costs", costs_of_weights)
        yield folder


def costs_of_weights(folders: list[Path], *_: Any, **__: Any) -> list[Cost]:
    """Sizes as they are; speed and memory are not measured, as that takes a process for each model."""
    sizes = [weight_bytes(folder) for folder in folders]
    return [Cost(size // 4, size, 1e6 / size, size, "cpu", "float32") for size in sizes]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders of all students that are trained from now on, in their order."""
    names: list[str] = []
    plain = Run.train

    def watched(self: Run, *arguments: Any, **options: Any) -> Any:
        names.append(self.folder.name)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Run, "train", watched)
    return names


def test_sizes_are_trained_once_kept_and_continued(material: Path, trained: list[str]) -> None:
    recipe = job(material, output=str(material / "layers"), sizes={"key": "num_layers", "values": [1, 2]}, **FEW)
    record = flexkd.sizes(recipe)
    assert (recipe.folder / REPORT_FILE).is_file(), "the command leaves a page, Python does not"
    assert trained == ["num_layers_2-0", "num_layers_1-0"], "the largest first"
    assert [result.model.num_layers for result in record.sizes] == [1, 2]
    assert record.sizes[0].model.parameters < record.sizes[1].model.parameters < record.teacher.parameters
    assert (record.key, record.seeds, record.interval_over, record.knee.size) == ("num_layers", [0], "rows", None)
    for result in record.sizes:
        student = AutoModelForSequenceClassification.from_pretrained(recipe.folder / result.folder)
        assert student.config.num_hidden_layers == result.value
        assert result.model.bytes_on_disk == weight_bytes(recipe.folder / result.folder)
        assert result.share == pytest.approx(result.model.metrics["accuracy"] / record.teacher.metrics["accuracy"])
        assert result.low is not None
        assert result.low <= result.model.metrics["accuracy"] <= result.high
    assert SizesRecord.read(recipe.folder / "sizes.json") == record
    # A student that is gone is trained again, and so is a size that is added; nothing else.
    trained.clear()
    shutil.rmtree(recipe.folder / record.sizes[0].folder)
    more = flexkd.sizes(recipe, values=[1, 2, 3])
    assert trained == ["num_layers_3-0", "num_layers_1-0"]
    assert [result.model.metrics for result in more.sizes[:2]] == [result.model.metrics for result in record.sizes]
    _check_another_recipe_is_refused(with_sizes(recipe))
    _check_the_command(recipe, trained)


def _check_the_command(recipe: Recipe, trained: list[str]) -> None:
    """The command line continues what Python began, prints the table and draws the page."""
    trained.clear()
    (recipe.folder.parent / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    logger = logging.getLogger("flexkd")
    before = list(logger.handlers), logger.level
    try:
        done = CliRunner().invoke(app, ["sizes", str(recipe.folder.parent / "recipe.yaml"), "--sizes", "1,3"])
    finally:
        logger.handlers, logger.level = before
    assert (done.exit_code, trained) == (0, [])
    printed = " ".join(done.stdout.split())
    assert " 1 1 x 16 " in printed
    assert "No knee: a knee shows from 4 sizes on." in printed
    assert f"students: {recipe.folder / 'sizes'}" in "".join(done.stdout.splitlines())
    assert "1 layer" in (recipe.folder / "report.html").read_text(encoding="utf-8")


def _check_another_recipe_is_refused(recipe: Recipe) -> None:
    other = override_recipe(recipe, ["training.max_steps=4"])
    (problem,) = preflight(other).problems
    assert "was made by another recipe or teacher (recipe.training.max_steps). Choose another output folder." in problem
    with pytest.raises(ArtifactError) as error:
        flexkd.sizes(other)
    assert str(error.value) == problem


def test_several_seeds_give_intervals_and_only_the_first_keeps_its_students(material: Path, trained: list[str]) -> None:
    recipe = job(material, output=str(material / "seeds"), **FEW)
    record = flexkd.sizes(recipe, values=[0.3, 0.6], seeds=[0, 1])
    assert trained == ["size_0.6-0", "size_0.3-0", "size_0.6-1", "size_0.3-1"]
    kept = sorted(path.parent.name for path in (recipe.folder / "sizes").glob("*/student"))
    assert kept == ["size_0.3-0", "size_0.6-0"]
    assert record.interval_over == "seeds"
    for result in record.sizes:
        values = [cell.metrics["accuracy"] for cell in record.cells if cell.method == result.name]
        assert result.model.metrics["accuracy"] == pytest.approx(fmean(values))
        assert result.model.parameters <= result.value * record.teacher.parameters
    # Each seed draws the rows of its start, as in a comparison.
    stored = json.loads((recipe.folder / "sizes" / "size_0.3-1" / "cell.json").read_text("utf-8"))
    assert stored["made_of"]["recipe"]["student"]["start_seed"] == 1


def test_under_a_time_limit_all_sizes_take_the_steps_of_the_largest(
    material: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = [10.0, 1.0]
    monkeypatch.setattr(time_limit, "_seconds_a_step", lambda *_: paces.pop(0))
    output = str(material / "minutes")
    training = {"training__max_minutes": 1, "training__max_steps": 60}
    recipe = job(material, output=output, sizes={"key": "num_layers", "values": [1, 2]}, **training, **FEW)
    record = flexkd.sizes(recipe)
    stored = {path.parent.name: json.loads(path.read_text("utf-8")) for path in Path(output).glob("sizes/*/cell.json")}
    assert {name: cell["steps"] for name, cell in stored.items()} == {"num_layers_1-0": 6, "num_layers_2-0": 6}
    assert paces == [1.0], "one trial, of the largest"
    trained.clear()
    assert flexkd.sizes(recipe).cells == record.cells
    assert trained == []
    note = "training.max_minutes = 1: every student takes 6 steps, as many as the first one has time for."
    assert note in record.notes


def test_a_language_model_has_sizes_too(material: Path) -> None:
    folder = material / "text"
    folder.mkdir()
    recipe = text_job(folder, output=str(folder / "run"), teacher__allow_weak=True, **FEW)
    record = flexkd.sizes(recipe, values=[0.4, 0.9])
    assert (record.metric, record.interval_over, record.rows) == ("rougeL", "rows", 4)
    assert [model.name for model in record.baselines] == ["first sentence"]
    assert all(result.model.metrics["nll"] is not None for result in record.sizes)
    likelihood = flexkd.sizes(
        override_recipe(recipe, ["task.metric=nll", f"output={folder / 'nll'}"]), values=[0.4, 0.9]
    )
    assert (likelihood.metric, likelihood.interval_over) == ("nll", "rows")
    for result in likelihood.sizes:
        assert result.low is not None
        assert result.high is not None
        assert result.low <= result.model.metrics["nll"] <= result.high


def test_check_says_which_students_the_sizes_are(material: Path) -> None:
    notes = preflight(job(material, sizes={"values": [0.3, 0.6]}, **FEW)).notes
    assert "sizes.values.0.3: a student of 2 layers x 16." in notes
