"""What nothing reads is not computed, and a name says what ran: scores on a start that they do not choose."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkd.errors import RecipeError
from flexkd.facts.methods import METHODS
from flexkd.models.slicing.calibration import calibrate
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import scores as scores_module
from flexkd.pipeline.compare import compare
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.pipeline.scores import calibration_of, geometry_at
from flexkd.pipeline.start import rotation_of
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.methods import check_comparison, compared_methods, method_recipe
from flexkd.recipe.taught_features import describe_cut, describe_taught, is_rotated, read_score_keys
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import Selection
from flexkd.scoring.shared_work import SharedWork
from tests.job_files import job, text_job, write_tokenizer
from tests.tiny import tiny_model

TANGENT = {
    "objective__features__basis": "directions",
    "objective__features__chosen_by": "scores",
    "objective__features__mapping": "matched",
}
ALL_KEYS = {"target", "attribution", "layer", "rows"}
BEST_DIRECTIONS = "the leading directions of variance and function added up"
SCORED_DIRECTIONS = "the PCA directions with the highest scores (variance times function)"


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
    ("changes", "can_rotate", "cut", "taught", "keys"),
    [
        ({}, True, BEST_DIRECTIONS, "the directions that it is cut along, by correlation", {"rows"}),
        ({}, False, "the units with the highest scores", "the units that it is cut along, by correlation", ALL_KEYS),
        (
            {"objective__features__mapping": "matched"},
            True,
            BEST_DIRECTIONS,
            "the directions that the output depends on most, paired by similarity, by correlation",
            {"rows"},
        ),
        (
            {"objective__features__mapping": "matched", "objective__features__basis": "units"},
            True,
            BEST_DIRECTIONS,
            "the units with the highest scores, paired by similarity, by correlation",
            ALL_KEYS,
        ),
        ({"objective__features__loss": "cka"}, True, BEST_DIRECTIONS, "whole states, by cka", {"rows"}),
        (
            {"objective__features__loss": "functional_cka", "student__chosen_by": "random"},
            True,
            "PCA directions chosen at random",
            "whole states, by functional_cka",
            {"rows"},
        ),
        (
            {"objective__features": None, "student__chosen_by": "variance"},
            True,
            "the PCA directions with the most variance",
            "no features",
            set(),
        ),
        ({"objective__features": None}, False, "the units with the highest scores", "no features", ALL_KEYS),
        (
            {**TANGENT, "student__chosen_by": "activation"},
            False,
            "the units with the largest mean activation",
            "the directions that the output depends on most, paired by similarity, by correlation",
            {"layer", "rows"},
        ),
        (
            {"student__basis": "coordinates", "student__chosen_by": "random"},
            True,
            "units chosen at random",
            "the units that it is cut along, by correlation",
            {"layer"},
        ),
        (
            {"student__chosen_by": "mixed"},
            True,
            BEST_DIRECTIONS,
            "the directions that it is cut along, by correlation",
            {"rows"},
        ),
        (
            {"student__chosen_by": "scores"},
            True,
            SCORED_DIRECTIONS,
            "the directions that it is cut along, by correlation",
            {"rows"},
        ),
        (
            {"scores__layer": "all"},
            True,
            "the PCA directions with the highest scores over all blocks (gradient times state)",
            "the directions that it is cut along, by correlation",
            {"rows", "layer", "target"},
        ),
    ],
)
def test_what_is_cut_and_taught_by_what_and_which_scores_that_reads(
    folder: Path, ready: Job, changes: dict[str, Any], can_rotate: bool, cut: str, taught: str, keys: set[str]
) -> None:
    recipe = text_recipe(folder, **changes)
    rotated = is_rotated(recipe, can_rotate=can_rotate)
    assert describe_cut(recipe, rotated=rotated) == f"cut out of the teacher along {cut}"
    assert describe_taught(recipe, rotated=rotated) == taught
    assert read_score_keys(recipe, rotated=rotated) == keys


@pytest.mark.parametrize("rows", [(16, 24), (24, 16), (13, 24)], ids=["fewer", "more", "uneven"])
def test_calibration_and_geometry_share_the_forwards_of_the_rows_that_both_read(
    folder: Path, ready: Job, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]
) -> None:
    """To the bit what a pass of its own gives each, in as many forwards as the longer of the two needs."""
    recipe = text_recipe(folder, student__calibration_rows=rows[0], scores__rows=rows[1])
    size = recipe.training.batch_size
    expected = calibrate(ready.teacher, ready.calibration(recipe))
    batches = list(ready.batches("train", num_rows=rows[1]))
    geometry = functional_geometry(ready.teacher, batches).float().double()
    alone = replace(ready, memo=SharedWork())
    forwards: list[int] = []
    hook = ready.teacher.base_model.register_forward_pre_hook(
        lambda *args: forwards.append(len(args[2]["input_ids"])), with_kwargs=True
    )
    rotation = rotation_of(alone, recipe, is_scored=True)
    monkeypatch.setattr(scores_module, "functional_geometry", lambda *_, **__: pytest.fail("read again"))
    shared = calibration_of(alone, recipe, geometry_follows=True)
    assert torch.equal(geometry_at(alone, recipe, -1), geometry)
    hook.remove()
    # Rows that fill no batch of the other are read by themselves; single rows prove things about the model.
    assert sum(forwards) - forwards.count(1) == max(rows) + (rows[0] % size if rows[0] < rows[1] else 0)
    assert rotation is not None
    for measured, values in ((shared.means, expected.means), (shared.moments, expected.moments)):
        assert measured.keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(measured[name], value), name
    assert shared.num_tokens == expected.num_tokens


def test_R13_scores_that_nothing_reads_are_not_computed(
    folder: Path, ready: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    plain, plain_geometry = scores_module.score_units, scores_module.functional_geometry
    monkeypatch.setattr(scores_module, "score_units", lambda *a, **o: calls.append("units") or plain(*a, **o))
    monkeypatch.setattr(
        scores_module, "functional_geometry", lambda *a, **o: calls.append("geometry") or plain_geometry(*a, **o)
    )
    by_variance = taught_by(ready, text_recipe(folder, student__chosen_by="variance"), folder / "variance")
    assert not calls
    assert by_variance.scores == ()
    assert "scores: nothing of this recipe reads them: the student is cut out of the teacher along" in caplog.text
    assert by_variance.start_directions is not None
    assert by_variance.start_directions.tolist() == list(range(16))
    recipe = text_recipe(folder)
    selection = taught_by(ready, recipe, folder / "unread")
    assert calls == ["geometry"]
    assert torch.equal(selection.start_directions, torch.arange(16))  # type: ignore[arg-type]
    assert selection.scores == ()
    assert selection.layers is not None
    assert selection.layers[0].describe() == "16 directions of layer -1 -> -1"
    again = Run(ready, recipe, folder / "unread").select()
    assert torch.equal(again.layers[0].teacher_basis, selection.layers[0].teacher_basis)  # type: ignore[index, arg-type]
    assert torch.equal(again.direction_scores.values, selection.direction_scores.values)  # type: ignore[union-attr]
    assert torch.equal(again.start_directions, selection.start_directions)  # type: ignore[arg-type]
    # The geometry is shared by the runs of a job, and the worst directions are those that the best leave.
    best, lowest = (
        taught_by(ready, text_recipe(folder, student__chosen_by=name), folder / name) for name in ("scores", "lowest")
    )
    assert sorted([*best.start_directions.tolist(), *lowest.start_directions.tolist()]) == list(range(32))  # type: ignore[union-attr]
    assert calls == ["geometry"]
    # Units of the same teacher are scored as ever.
    assert len(taught_by(ready, text_recipe(folder, student__basis="coordinates"), folder / "units").scores) == 1
    assert calls == ["geometry", "units"]
    # Whoever asks for scores gets them, and those of the directions.
    asked = pipeline.score(text_recipe(folder, output=str(folder / "asked")))
    assert [(record.of, len(record.values)) for record in asked] == [("units", 32), ("directions", 32)]


@pytest.mark.parametrize("chosen_by", ["auto", "scores", "variance", "lowest"])
def test_R13_a_share_of_directions_is_counted_in_what_ranks_them(folder: Path, ready: Job, chosen_by: str) -> None:
    changes = {"objective__features__coverage": 0.3, "student__chosen_by": chosen_by}
    selection = taught_by(ready, text_recipe(folder, **changes), folder / f"share-{chosen_by}")
    rotation = rotation_of(ready, text_recipe(folder, student__chosen_by=chosen_by))
    assert rotation is not None
    assert selection.direction_scores is not None
    values = selection.direction_scores.values.sort(descending=chosen_by != "lowest").values
    shares = values.cumsum(0) / values.sum()
    assert selection.layers is not None
    (pair,) = selection.layers
    assert pair.units is not None
    count = len(pair.units.student)
    assert count == 16 or shares[count - 1] >= 0.3
    assert count == 1 or shares[count - 2] < 0.3
    # The student's units that learn these are those that were cut along them.
    best = selection.direction_scores.values.argsort(descending=chosen_by != "lowest")[:count]
    assert selection.start_directions is not None
    assert set(selection.start_directions[pair.units.student].tolist()) == set(best.tolist())
    assert pair.teacher_basis is not None
    assert torch.equal(pair.teacher_basis, rotation.stream.directions(-1, best.sort().values))


def test_a_choice_of_what_is_taught_leaves_the_start_as_it_is_to_the_bit(folder: Path, ready: Job) -> None:
    recipe = text_recipe(folder)
    names = ("logit_kd", "scored_features", "random_features", "variance_features", "lowest_features", "flexkd_random")
    weights, taught = {}, {}
    for name in ("flexkd", *names):
        run = Run(ready, method_recipe(recipe, name), folder / f"taught-{name}")
        start = run.start(run.select())
        weights[name] = torch.cat([parameter.flatten() for parameter in start.student.parameters()])
        selection, _ = run.objective(start, run.select())
        taught[name] = selection.hash()
    assert all(torch.equal(weights[name], weights["flexkd"]) for name in names if name != "flexkd_random")
    assert not torch.equal(weights["flexkd_random"], weights["flexkd"])
    assert len(set(taught.values())) == len(taught)


@pytest.mark.parametrize("basis", ["rotated", "coordinates"])
def test_each_choice_cuts_another_student(folder: Path, ready: Job, basis: str) -> None:
    cuts: dict[str, list[int]] = {}
    for chosen_by in ("scores", "variance", "activation", "random", "lowest"):  # of one basis: mixed is another
        recipe = text_recipe(folder, student__basis=basis, student__chosen_by=chosen_by)
        selection = Run(ready, recipe, folder / f"{basis}-{chosen_by}").select()
        indices = selection.start_directions if basis == "rotated" else selection.start_units
        assert indices is not None
        cuts[chosen_by] = indices.tolist()
    assert sorted([*cuts["scores"], *cuts["lowest"]]) == list(range(32))
    different = {tuple(units) for units in cuts.values()}
    # The largest coordinates of a direction on average are nearly those with the most variance.
    assert len(different) >= 4


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


@pytest.mark.parametrize(
    ("changes", "methods", "message"),
    [
        (
            {"student__chosen_by": "variance"},
            ["logit_kd", "flexkd"],
            "compare.methods: 'flexkd' promises a choice by scores, and student.chosen_by makes it 'variance'. Name it "
            "'pca_directions', or set student.chosen_by: scores.",
        ),
        (
            {},
            ["pca_directions", "flexkd_variance"],
            "compare.methods: 'flexkd_variance' is the same run as 'pca_directions' under this recipe. Leave one of "
            "them out.",
        ),
        (
            {"objective__features__loss": "cka"},
            ["logit_kd", "flexkd_random"],
            "compare.methods: 'flexkd_random' promises units or directions chosen by chance, and whole states are "
            "taught (cka). Name it 'cka', or set objective.features.loss: correlation.",
        ),
        (
            {"objective__features__chosen_by": "lowest", "objective__features__mapping": "matched"},
            ["logit_kd", "flexkd"],
            "compare.methods: 'flexkd' promises a choice by scores, and objective.features.chosen_by makes it "
            "'lowest'. Name it 'lowest_features', or set objective.features.chosen_by: null.",
        ),
    ],
)
def test_R13_a_name_that_says_another_choice_is_refused_in_run_and_check_alike(
    folder: Path, changes: dict[str, Any], methods: list[str], message: str
) -> None:
    recipe = text_recipe(folder, **changes, compare={"methods": methods})
    with pytest.raises(RecipeError) as refused:
        compare(recipe)
    assert str(refused.value) == message
    assert preflight(recipe).problems == [message]


def test_every_choice_is_a_method_of_its_own_on_a_rotated_start(folder: Path) -> None:
    recipe = text_recipe(folder)
    # `flexkd` is `mixed_directions` here, `flexkd_variance` is `pca_directions`, and a lens needs blocks.
    repeated = ("mixed_directions", "flexkd_variance", "distill_lens")
    methods = [name for name in METHODS if name not in repeated]
    check_comparison(recipe, methods, (0, 1), can_rotate=True, width=32)
    blocks = text_recipe(folder, objective__features__layer_map={1: 2, 2: 4})
    check_comparison(blocks, ("flexkd", "distill_lens"), (0, 1), can_rotate=True, width=32)


def test_R13_the_default_methods_go_by_what_is_taught(folder: Path) -> None:
    rivals = ["fine_tuning", "logit_kd", "projector"]
    for chosen_by, rotated, plain in (
        ("auto", "flexkd", "flexkd"),
        ("scores", "flexkd", "flexkd"),
        ("variance", "pca_directions", "flexkd_variance"),
        ("lowest", "flexkd_lowest", "flexkd_lowest"),
    ):
        recipe = text_recipe(folder, student__chosen_by=chosen_by)
        assert compared_methods(recipe, (), can_rotate=True) == [*rivals, rotated]
        assert compared_methods(recipe, (), can_rotate=False) == [*rivals, plain]
    for changes, described in (
        ({"objective__features__loss": "cka"}, ["cka"]),
        ({"objective__features__loss": "projector"}, []),
        ({"objective__features__mapping": "matched", "objective__features__chosen_by": "random"}, ["random_features"]),
    ):
        methods = compared_methods(text_recipe(folder, **changes), (), can_rotate=True)
        assert methods == [*rivals, *described]
        check_comparison(text_recipe(folder, **changes), methods, (0, 1), can_rotate=True, width=32)


def test_a_student_that_is_not_cut_has_choices_of_what_it_is_taught_alone(folder: Path) -> None:
    start = {"start": "pretrained", "model": job(folder).teacher.model}
    recipe = job(folder, student=start)
    check_comparison(recipe, ["flexkd", "flexkd_random", "flexkd_lowest"], (0, 1), can_rotate=False)
    variant = method_recipe(recipe, "flexkd_random")
    assert variant.student == recipe.student
    assert describe_taught(variant, rotated=False) == "units chosen at random, paired in order, by correlation"
    with pytest.raises(RecipeError, match="'logit_kd_random' does not go with this recipe: student"):
        check_comparison(recipe, ["logit_kd", "logit_kd_random"], (0, 1), can_rotate=False)


@pytest.mark.parametrize("hidden_size", [32, None])
def test_R13_a_control_beside_a_student_of_full_width_is_refused_in_run_and_check_alike(
    folder: Path, hidden_size: int | None
) -> None:
    compared = {"compare": {"methods": ["flexkd", "fine_tuning", "flexkd_random"]}}
    recipe = job(folder, student__hidden_size=hidden_size, **compared)
    message = (
        "compare.methods: 'flexkd_random' is the same run as 'flexkd' under this recipe, for a student as wide as its "
        "teacher is cut by and taught everything, whatever is chosen. Leave one of them out."
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
        ({"objective__features__loss": "cka"}, ("cka", "flexkd"), "'flexkd' promises units or directions chosen by"),
        ({"scores__attribution": "variance"}, ("flexkd",), "Name it 'flexkd_variance', or set student.chosen_by: scor"),
        ({"student__chosen_by": "random"}, ("mse", "flexkd_random", "cosine"), ""),
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


def test_a_choice_by_function_is_refused_where_labels_are_no_distribution(folder: Path) -> None:
    """A Llama that predicts a number, whose student is to be cut along directions."""
    teacher = folder / "regressor"
    tiny_model("llama", num_labels=1).save_pretrained(teacher)
    write_tokenizer(teacher)
    changes = {"teacher__model": str(teacher), "student__basis": "rotated", "output": str(folder / "numbers")}
    by_default = job(folder, "regression", **changes)
    assert preflight(by_default).problems == []
    assert describe_cut(by_default, rotated=True).endswith("along the PCA directions with the most variance")
    recipe = job(folder, "regression", **changes, student__chosen_by="scores")
    message = (
        "student.chosen_by: 'scores' of directions is only defined for one class of several, not for regression. Use "
        "student.chosen_by: variance, or units (student.basis: coordinates)."
    )
    assert preflight(recipe).problems == [message]
    # Both pieces of advice, followed.
    for advice in ("student.chosen_by=variance", "student.basis=coordinates"):
        assert preflight(override_recipe(recipe, [advice])).problems == []
