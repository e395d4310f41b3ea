"""What nothing reads is not computed, and a name says what ran: scores on a start that they do not choose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkd.errors import RecipeError
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import run as run_module
from flexkd.pipeline.compare import compare
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import rotation_of
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.methods import METHODS, check_comparison, compared_methods
from flexkd.recipe.taught_features import is_rotated, reads_scores, taught_features
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import Selection
from tests.job_files import job, text_job

TANGENT = {"objective__features__basis": "tangent", "objective__features__mapping": "matched"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("read")
        patch.setenv("FLEXKD_HOME", str(made / "home"))
        yield made


def text_recipe(folder: Path, **changes: Any) -> Recipe:
    """A llama that is cut along its own directions, as is the default where text is written."""
    exact = {"training__precision": "float32", "teacher__precision": "float32", "teacher__fine_tune": None}
    return text_job(folder / "llama", "llama", **{**exact, "output": str(folder / "run"), **changes})


@pytest.fixture(scope="module")
def ready(folder: Path) -> Job:
    (folder / "llama").mkdir()
    return prepare(text_recipe(folder))


def taught_by(ready: Job, recipe: Recipe, folder: Path) -> Selection:
    run = Run(ready, recipe, folder)
    selection = run.select()
    return run.objective(run.start(selection), selection)[0]


@pytest.mark.parametrize(
    ("changes", "can_rotate", "taught", "reads"),
    [
        ({}, True, "PCA directions", False),
        ({}, False, "scored units", True),
        ({"objective__features__mapping": "matched"}, True, "scored units", True),
        ({"objective__features__loss": "cka"}, True, "whole states", False),
        ({"objective__features__loss": "cka"}, False, "whole states", True),
        ({"objective__features__loss": "functional_cka"}, True, "whole states", False),
        ({"objective__features": None}, True, "nothing", False),
        ({"objective__features": None}, False, "nothing", True),
        (TANGENT, True, "tangent directions", False),
        ({"student__basis": "coordinates"}, True, "scored units", True),
    ],
)
def test_R13_what_is_taught_and_whether_scores_decide_anything(
    folder: Path, ready: Job, changes: dict[str, Any], can_rotate: bool, taught: str, reads: bool
) -> None:
    recipe = text_recipe(folder, **changes)
    rotated = is_rotated(recipe, can_rotate=can_rotate)
    assert taught_features(recipe, rotated=rotated) == taught
    assert reads_scores(recipe, rotated=rotated) == reads


def test_R13_scores_that_nothing_reads_are_not_computed(
    folder: Path, ready: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    plain = run_module.score_units
    monkeypatch.setattr(run_module, "score_units", lambda *args, **options: calls.append(1) or plain(*args, **options))
    recipe = text_recipe(folder)
    selection = taught_by(ready, recipe, folder / "unread")
    assert not calls
    assert selection.scores == ()
    assert (
        "scores: nothing of this recipe reads them: the student is cut along the teacher's own directions"
        in caplog.text
    )
    assert selection.layers is not None
    assert selection.layers[0].describe() == "16 directions of layer -1 -> -1"
    again = Run(ready, recipe, folder / "unread").select()
    assert again.scores == ()
    assert torch.equal(again.layers[0].teacher_basis, selection.layers[0].teacher_basis)  # type: ignore[index, arg-type]
    # Units of the same teacher are scored as ever.
    assert len(taught_by(ready, text_recipe(folder, student__basis="coordinates"), folder / "units").scores) == 1
    assert calls == [1]
    # Whoever asks for scores gets them.
    assert len(pipeline.score(text_recipe(folder, output=str(folder / "asked")))) == 1


def test_R13_a_share_of_directions_is_counted_in_directions(folder: Path, ready: Job) -> None:
    """It was counted in scored units, and so many directions were then taken."""
    selection = taught_by(ready, text_recipe(folder, objective__features__coverage=0.5), folder / "share")
    rotation = rotation_of(ready, text_recipe(folder))
    assert rotation is not None
    shares = rotation.energy.cumsum(0)
    assert selection.layers is not None
    units = selection.layers[0].units
    assert units is not None
    count = len(units.student)
    assert shares[count - 1] >= 0.5
    assert count == 1 or shares[count - 2] < 0.5


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("basis", ["auto", "coordinates"])
def test_R13_a_share_of_tangent_directions_is_what_they_hold_of_the_geometry(
    folder: Path, ready: Job, basis: str, share: float
) -> None:
    """Counted by what the taught directions themselves hold of the trace, in float64 and one by one."""
    changes = {**TANGENT, "objective__features__coverage": share, "student__basis": basis}
    recipe = text_recipe(folder, **changes)
    (pair,) = taught_by(ready, recipe, folder / f"tangent-{basis}-{share}").layers or ()
    assert pair.teacher_basis is not None
    assert pair.units is not None
    batches = list(ready.batches("train", num_rows=recipe.scores.rows))
    geometry = functional_geometry(ready.teacher, batches, layer=-1).double()
    directions = pair.teacher_basis.double()
    held = [float(column @ geometry @ column / geometry.trace()) for column in directions.T]
    count = len(pair.units.student)
    assert directions.shape == (32, count)
    assert count == 16 or sum(held) >= share - 1e-6
    assert sum(held[:-1]) < share


@pytest.mark.parametrize("method", ["flexkd", "flexkd_random", "flexkd_variance", "flexkd_activation"])
def test_R13_a_control_that_changes_nothing_is_refused_in_run_and_check_alike(folder: Path, method: str) -> None:
    recipe = override_recipe(text_recipe(folder), [f"compare={{methods: [logit_kd, {method}]}}"])
    message = (
        f"compare.methods: '{method}' promises units chosen by scores, and nothing here reads them: the student is cut "
        "along the teacher's own directions (PCA of its states), and PCA directions are taught. Name it "
        "'pca_directions', which says what is taught, or set student.basis: coordinates."
    )
    with pytest.raises(RecipeError) as refused:
        compare(recipe)
    assert str(refused.value) == message
    assert preflight(recipe).problems == [message]
    # Both pieces of advice, followed.
    named = override_recipe(recipe, ["compare={methods: [logit_kd, pca_directions]}"])
    cut = override_recipe(recipe, ["student.basis=coordinates"])
    assert preflight(named).problems == preflight(cut).problems == []


def test_R13_the_default_methods_go_by_what_is_taught(folder: Path) -> None:
    recipe = text_recipe(folder)
    rivals = ["fine_tuning", "logit_kd", "projector"]
    assert compared_methods(recipe, (), can_rotate=True) == [*rivals, "pca_directions"]
    assert compared_methods(recipe, (), can_rotate=False) == [*rivals, "flexkd"]
    variant = override_recipe(recipe, METHODS["pca_directions"])
    assert taught_features(variant, rotated=is_rotated(variant, can_rotate=True)) == "PCA directions"


@pytest.mark.parametrize("hidden_size", [32, None])
def test_R13_a_control_beside_a_student_of_full_width_is_refused_in_run_and_check_alike(
    folder: Path, hidden_size: int | None
) -> None:
    compared = {"compare": {"methods": ["flexkd", "fine_tuning", "flexkd_random"]}}
    recipe = job(folder, student__hidden_size=hidden_size, **compared)
    message = (
        "compare.methods: 'flexkd_random' is the same run as 'flexkd' under this recipe, for a student as wide as its "
        "teacher is taught every unit, whatever the scores. Leave one of them out."
    )
    with pytest.raises(RecipeError) as refused:
        compare(recipe)
    assert str(refused.value) == message
    assert preflight(recipe).problems == [message]
    fewer = job(folder, student__hidden_size=hidden_size, objective__features__units=8, **compared)
    assert preflight(fewer).problems == []


def test_R13_a_method_that_does_not_go_with_the_recipe_is_named(folder: Path) -> None:
    recipe = job(folder)
    start = {"start": "pretrained", "model": recipe.teacher.model}
    compared = job(folder, student=start, compare={"methods": ["logit_kd", "pca_directions"]})
    assert preflight(compared).problems == [
        "compare.methods: 'pca_directions' needs a teacher that can be turned into the basis of its own directions "
        "(RMSNorms right before what reads them, as in Llama or Qwen), and this one cannot. Leave it out."
    ]
    with pytest.raises(RecipeError) as refused:
        check_comparison(compared, ("logit_kd", "pca_directions"), (0, 1), can_rotate=True)
    assert str(refused.value) == (
        "compare.methods: 'pca_directions' does not go with this recipe: student.basis: 'rotated' is only for start: "
        "slice, not pretrained. Leave it out."
    )


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        ({}, ("pca_directions",), "'pca_directions' needs a teacher that can be turned"),
        ({"objective__features__loss": "cka"}, ("cka", "flexkd"), "'flexkd' is the same run as 'cka'"),
        (
            {"scores__attribution": "variance"},
            ("flexkd",),
            "Name it 'flexkd_variance', or set scores.attribution: grad",
        ),
        ({"scores__attribution": "random"}, ("mse", "flexkd_random", "cosine"), ""),
    ],
)
def test_R13_names_are_held_against_what_a_classifier_is_taught(
    folder: Path, changes: dict[str, Any], methods: tuple[str, ...], message: str
) -> None:
    recipe = job(folder, **changes)
    if not message:
        check_comparison(recipe, methods, (0, 1), can_rotate=False)
        return
    with pytest.raises(RecipeError, match=message):
        check_comparison(recipe, methods, (0, 1), can_rotate=False)


def test_R13_passes_that_cannot_have_enough_positions_are_refused_before_training(folder: Path, ready: Job) -> None:
    longest = max(sum(label != -100 for label in row["labels"]) for row in ready.splits["train"])
    assert longest < 8
    with pytest.raises(
        RecipeError, match=rf"the fullest of \d+ passes has {longest} positions \(supervised\), fewer than"
    ):
        prepare(text_recipe(folder, training__per_device_batch_size=1))
    # Its advice, followed.
    prepare(text_recipe(folder, training__per_device_batch_size=1, objective__features__positions="tokens"))
