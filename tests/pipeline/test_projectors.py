"""Projectors of a run: the scale of their targets, where they begin, and how fast they learn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.core.losses import Projector
from flexkd.core.objective import Objective
from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.pipeline import projectors
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import Start
from flexkd.pipeline.states import calibration_states
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.methods import method_recipe
from flexkd.scoring.selection_file import Selection
from tests.closeness import assert_close
from tests.job_files import job, text_job

EXACT = {"training__precision": "float32", "teacher__precision": "float32", "teacher__fine_tune": None}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("projectors")
        patch.setenv("FLEXKD_HOME", str(path / "home"))
        yield path


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Job:
    (folder / "bert").mkdir()
    return prepare(job(folder / "bert", **EXACT, output=str(folder / "run")))


@pytest.fixture(scope="module")
def writer(folder: Path) -> Job:
    """A llama that is cut along its own directions."""
    (folder / "llama").mkdir()
    return prepare(text_job(folder / "llama", "llama", **EXACT, output=str(folder / "text")))


def prepared(ready: Job, recipe: Recipe, folder: Path) -> tuple[Start, Selection, Objective, Projector]:
    run = Run(ready, recipe, folder)
    selection = run.select()
    start = run.start(selection)
    selection, objective = run.objective(start, selection)
    assert objective.features is not None
    return start, selection, objective, objective.features.projectors[0]


def standardized(states: Tensor) -> Tensor:
    deviation = states.double().std(0, correction=0)
    return (states.double() / deviation).float()


def test_a_projector_of_units_begins_with_the_cut_and_learns_at_its_own_rate(
    classifier: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = method_recipe(classifier.recipe, "projector_exact")
    _, selection, objective, projector = prepared(classifier, recipe, tmp_path)
    states = calibration_states(classifier, recipe, classifier.teacher, -1, as_teacher=True)
    units, goal = selection.start_units, standardized(states)
    assert units is not None
    projected = projector(states[:, units])
    torch.testing.assert_close(projected[:, units], goal[:, units], rtol=1e-4, atol=1e-4)
    # The other units are predicted: nearer than by their mean.
    assert (projected - goal).square().mean() < (goal.mean(0) - goal).square().mean()
    assert objective.features is not None
    assert objective.features.projector_learning_rate == 1e-3
    # Another run of the folder reads the scale of the targets from it.
    monkeypatch.setattr(projectors, "unit_variance_basis", lambda *_: pytest.fail("measured again"))
    _, again, _, same = prepared(classifier, recipe, tmp_path)
    assert again.hash() == selection.hash()
    assert torch.equal(same.map.weight, projector.map.weight)


def test_a_projector_of_directions_begins_with_the_way_back_to_the_teachers_units(writer: Job, tmp_path: Path) -> None:
    recipe = override_recipe(method_recipe(writer.recipe, "projector_exact"), ["objective.features.layer_map={1: 1}"])
    start, _, _, projector = prepared(writer, recipe, tmp_path)
    assert start.stream is not None
    assert start.directions is not None
    states = calibration_states(writer, recipe, writer.teacher, 1, as_teacher=True)
    directions, deviation = start.stream.directions(1, start.directions), states.std(0, correction=0)
    back = projector(states @ directions) * deviation
    torch.testing.assert_close(back @ directions, states @ directions, rtol=1e-3, atol=1e-3)


def test_a_projector_of_heads_gives_the_students_predictions_through_the_teachers_head(
    writer: Job, tmp_path: Path
) -> None:
    recipe = method_recipe(writer.recipe, "projector_heads")
    start, selection, _, projector = prepared(writer, recipe, tmp_path)
    assert selection.layers is not None
    basis = selection.layers[0].teacher_basis
    assert basis is not None
    head, own = (model.get_output_embeddings().weight.detach() for model in (writer.teacher, start.student))
    weight = (projector.map.weight.T.double() / basis.diagonal().double()).detach()
    # Least squares: what the teacher's head cannot say is orthogonal to all that it can.
    rest = weight @ head.double().T - own.double().T
    assert_close(rest @ head.double(), torch.zeros(16, 32, dtype=torch.float64), dtype=torch.float32)
    writer.teacher.config.final_logit_softcapping = 2.0
    try:
        with pytest.raises(
            UnsupportedModelError, match="one linear map, and the teacher, a llama, caps its logits at 2"
        ):
            Run(writer, recipe, tmp_path).objective(start, selection)
    finally:
        del writer.teacher.config.final_logit_softcapping


def test_a_recipe_without_the_new_keys_learns_as_before(
    classifier: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Projector, "begin_with", lambda *_: pytest.fail("its start is random"))
    _, selection, objective, _ = prepared(classifier, method_recipe(classifier.recipe, "projector"), tmp_path)
    assert selection.layers is not None
    assert selection.layers[0].teacher_basis is None
    assert objective.features is not None
    assert objective.features.projector_learning_rate is None


def test_a_recipe_of_a_lens_reads_the_heads_of_both_models(writer: Job, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names the states that the heads read"):
        override_recipe(writer.recipe, ["objective.features.loss=distill_lens"])
    recipe = override_recipe(writer.recipe, ["objective.features={loss: distill_lens, layer_map: {1: 2}}"])
    run = Run(writer, recipe, tmp_path)
    selection = run.select()
    start = run.start(selection)
    _, objective = run.objective(start, selection)
    assert objective.features is not None
    states = calibration_states(writer, recipe, writer.teacher, 2, as_teacher=True)[:3]
    teacher: Any = writer.teacher
    expected = teacher.lm_head(teacher.model.norm(states))
    assert_close(objective.features.lenses[1].read(states, 2)[:], expected.detach())
    assert objective.features.lenses[0].head().module is start.student.get_output_embeddings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["projector={start: cut}"], "projector: correlation has no projector. Set it to null"),
        (["loss=projector", "projector={start: heads}"], "'heads' needs heads with an output for each token"),
        (["loss=projector", "projector={learning_rate: 0}"], "projector.learning_rate: "),
    ],
)
def test_settings_without_a_projector_or_a_start_are_refused(classifier: Job, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override_recipe(classifier.recipe, [f"objective.features.{change}" for change in changes])
    assert message in str(caught.value)


def test_a_start_that_the_student_or_the_layers_do_not_have_is_refused(writer: Job, folder: Path) -> None:
    features = "objective.features={loss: projector, projector: {start: %s}, layer_map: {1: 1}}"
    with pytest.raises(RecipeError, match=r"'heads' maps the states that the heads read, \{-1: -1\}"):
        override_recipe(writer.recipe, [features % "heads"])
    loaded: dict[str, Any] = {"start": "pretrained", "model": str(folder / "llama" / "teacher")}
    student = [f"student.{key}={value}" for key, value in loaded.items()]
    shape = ["student.hidden_size=null", "student.num_layers=null"]
    with pytest.raises(RecipeError, match="'cut' needs a student that is cut from its teacher, not start: pretrained"):
        override_recipe(writer.recipe, [features % "cut", *student, *shape])
