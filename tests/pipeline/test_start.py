"""Where a student begins: its sizes, its weights, and which of its units meet which of the teacher's."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.core.selection import coverage_curve, select_units
from flexkd.models.forward.hidden import model_inputs, states_and_logits, token_mask
from flexkd.models.slicing.student import slice_student
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.pairing import build_objective, pair_layers
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import Start, start_student, start_units, student_sizes
from flexkd.recipe import Recipe, override_recipe
from flexkd.scoring.geometry import functional_geometry
from flexkd.scoring.selection_file import Selection, scores_hash
from tests.closeness import assert_close
from tests.job_files import job, write_tokenizer
from tests.tiny import tiny_model

WITHOUT_SHAPE = ("student.hidden_size=null", "student.num_layers=null")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("starting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def recipe(material: Path) -> Recipe:
    return job(material, teacher__fine_tune=None, training__precision="float32", teacher__precision="float32")


@pytest.fixture(scope="module")
def ready(recipe: Recipe) -> Job:
    """One job for all recipes of this module, which differ in student and objective alone."""
    return prepare(recipe)


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    return override_recipe(recipe, overrides)


def scored(ready: Job, recipe: Recipe, tmp_path: Path) -> Selection:
    return Run(ready, recipe, tmp_path).select()


def embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight.detach()


def test_sizes_are_those_of_the_recipe_or_derived_from_a_share(recipe: Recipe, ready: Job) -> None:
    assert student_sizes(recipe, ready.teacher) == {"hidden_size": 16, "num_layers": 2}
    derived = student_sizes(changed(recipe, *WITHOUT_SHAPE, "student.size=0.5"), ready.teacher)
    assert set(derived) >= {"hidden_size", "num_layers", "num_heads", "intermediate_size"}
    assert derived["hidden_size"] < 32
    tiny = student_sizes(changed(recipe, *WITHOUT_SHAPE, "student.max_parameters=9000"), ready.teacher)
    assert slice_student(ready.teacher, **tiny).num_parameters() <= 9000


@pytest.mark.parametrize("extra", [(), ("objective.features.coverage=0.3",), ("objective.features.units=5",)])
def test_a_sliced_student_learns_the_units_that_it_was_cut_from(
    recipe: Recipe, ready: Job, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """Its unit begins as the teacher's: their columns of the embeddings agree, pair by pair."""
    own = changed(recipe, *extra)
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert pair.units is not None
    assert torch.equal(pair.units.teacher, select_units(selection.scores[0], len(pair.units.teacher)))
    assert torch.equal(embeddings(student)[:, pair.units.student], embeddings(ready.teacher)[:, pair.units.teacher])
    assert (len(pair.units.student) < 16) == bool(extra)


def test_all_units_are_taught_where_the_student_is_as_wide_as_its_teacher(
    recipe: Recipe, ready: Job, tmp_path: Path
) -> None:
    own = changed(recipe, "student.hidden_size=null")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert pair.units is not None
    assert pair.units.student.tolist() == pair.units.teacher.tolist() == list(range(32))


@pytest.mark.parametrize("positions", ["tokens", "supervised"])
def test_matching_a_copy_of_the_teacher_finds_every_unit_itself(
    recipe: Recipe, ready: Job, tmp_path: Path, positions: str
) -> None:
    """Rows of both models stand in one order, whatever the positions: else the assignment would be another."""
    whole = (*WITHOUT_SHAPE, "objective.features.mapping=matched", f"objective.features.positions={positions}")
    own = changed(recipe, *whole)
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert pair.units is not None
    assert torch.equal(pair.units.student, pair.units.teacher)


def correlations(ready: Job, student: Any, layers: tuple[int, int]) -> Tensor:
    """Of every student unit with every teacher unit over all tokens of the first 16 rows, by torch.corrcoef."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in ready.batches("train", num_rows=16):
        for kept, model, layer in zip(found, (student, ready.teacher), layers, strict=True):
            inputs = model_inputs(model, batch)
            with torch.no_grad():
                states, _ = states_and_logits(model, inputs, (layer,))
            kept.append(states[layer][token_mask(inputs)].double())
    ours, theirs = (torch.cat(kept).T for kept in found)
    return torch.corrcoef(torch.cat([ours, theirs]))[: len(ours), len(ours) :]


def test_matched_pairs_correlate_better_than_any_swap_of_two(recipe: Recipe, ready: Job, tmp_path: Path) -> None:
    own = changed(recipe, "objective.features.mapping=matched", "objective.features.units=10")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert pair.units is not None
    mine, theirs = pair.units.student, pair.units.teacher
    assert sorted(theirs.tolist()) == select_units(selection.scores[0], 10).tolist()
    assert len(set(mine.tolist())) == 10
    values = correlations(ready, student, (-1, -1))
    for first in range(10):
        for second in range(first):
            kept = values[mine[first], theirs[first]] + values[mine[second], theirs[second]]
            swapped = values[mine[first], theirs[second]] + values[mine[second], theirs[first]]
            assert kept >= swapped - 1e-6


@pytest.mark.parametrize("mapping", ["index", "score"])
def test_a_student_from_a_config_meets_units_by_index_or_by_score(
    recipe: Recipe, ready: Job, tmp_path: Path, material: Path, mapping: str
) -> None:
    shape = material / "shape"
    tiny_model("bert", hidden_size=24, num_hidden_layers=2, num_labels=2).config.save_pretrained(shape)
    start = ("student.start=config", f"student.model={shape}", *WITHOUT_SHAPE)
    own = changed(recipe, *start, f"objective.features.mapping={mapping}")
    selection = scored(ready, own, tmp_path)
    assert start_units(ready, own, selection.scores) is None
    student = start_student(ready, own, None).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert pair.units is not None
    assert pair.units.student.tolist() == list(range(24))
    best = selection.scores[0].values.sort(descending=True).indices[:24].tolist()
    assert pair.units.teacher.tolist() == (sorted(best) if mapping == "index" else best)


def test_more_units_than_there_are_is_reported_with_all_three_numbers(
    recipe: Recipe, ready: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = changed(recipe, "objective.features.units=100")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    with caplog.at_level(logging.WARNING, logger="flexkd"):
        (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    assert "100 units requested, the student has 16 and the teacher 32" in caplog.text
    assert pair.units is not None
    assert len(pair.units.student) == 16


def test_a_layer_below_the_head_is_paired_by_its_own_scores(
    recipe: Recipe, ready: Job, tmp_path: Path, material: Path
) -> None:
    shape = material / "shape-16"
    tiny_model("bert", hidden_size=16, num_hidden_layers=2, num_labels=2).config.save_pretrained(shape)
    start = ("student.start=config", f"student.model={shape}", *WITHOUT_SHAPE)
    own = changed(recipe, *start, "scores.layer=[-1, 2]", "objective.features.layer_map={1: 2, -1: -1}")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, None).student
    pairs = {pair.teacher_layer: pair for pair in pair_layers(ready, own, Start(student, ()), selection)}
    for scores in selection.scores:
        pair = pairs[scores.layer]
        assert pair.units is not None
        assert torch.equal(pair.units.teacher, select_units(scores, 16))
    assert pairs[2].student_layer == 1
    assert not torch.equal(pairs[2].units.teacher, pairs[-1].units.teacher)


@pytest.mark.parametrize(
    ("layers", "cuts", "features"),
    [
        ((3, -1), -1, ()),
        ((2, 3), 3, ("objective.features.units=5",)),
        ((3, -1), -1, ("objective.features.coverage=0.3", "objective.features.layer_map={1: 2, -1: 3}")),
        ((3, -1), -1, ("objective.features.mapping=matched", "objective.features.layer_map={1: 3, -1: -1}")),
    ],
)
def test_R13_the_order_in_which_layers_are_scored_changes_nothing(
    recipe: Recipe, ready: Job, tmp_path: Path, layers: tuple[int, ...], cuts: int, features: tuple[str, ...]
) -> None:
    """The layer written first cut the student."""
    selections, weights = [], []
    for order in (layers, layers[::-1]):
        short = ("training.max_steps=2", "training.evaluations=1")
        variant = changed(recipe, f"scores.layer={list(order)}", *short, *features)
        run = Run(ready, variant, tmp_path / str(order))
        selection = run.select()
        assert [scores.layer for scores in selection.scores] == list(order)
        assert selection.start_units is not None
        assert torch.equal(selection.start_units, select_units(selection.scores_of(cuts), 16))
        start = run.start(selection)
        selection, objective = run.objective(start, selection)
        selections.append(Run(ready, variant, tmp_path / str(order)).select())
        weights.append(run.train(start, objective)[0].state_dict())
    one, two = selections
    assert one.start_units is not None
    assert not torch.equal(one.start_units, select_units(one.scores_of(next(n for n in layers if n != cuts)), 16))
    assert one.hash() == two.hash()
    assert one.cut_layer == two.cut_layer == cuts
    assert {scores_hash(scores) for scores in one.scores} == {scores_hash(scores) for scores in two.scores}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_R13_a_slice_is_taught_the_units_of_its_cut_at_a_layer_that_was_not_scored(
    recipe: Recipe, ready: Job, tmp_path: Path
) -> None:
    """A share is counted in the scores that choose the units, which are those of the cut."""
    features = ("objective.features.layer_map={1: 2, -1: -1}", "objective.features.coverage=0.3")
    run = Run(ready, changed(recipe, *features), tmp_path)
    selection = run.select()
    lower, upper = run.objective(run.start(selection), selection)[0].layers or ()
    assert lower.units is not None
    assert upper.units is not None
    units = upper.units.teacher
    assert torch.equal(lower.units.teacher, units)
    assert torch.equal(units, select_units(selection.cut_scores(), len(units)))
    shares = coverage_curve(selection.cut_scores())
    assert shares[len(units) - 2] < 0.3 <= shares[len(units) - 1]


@pytest.mark.parametrize("loss", ["projector", "cka"])
def test_losses_that_need_no_units_pair_layers_alone(recipe: Recipe, ready: Job, tmp_path: Path, loss: str) -> None:
    own = changed(recipe, f"objective.features.loss={loss}")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    state = torch.random.get_rng_state()
    layers = pair_layers(ready, own, Start(student, ()), selection)
    paired = replace(selection, layers=layers)
    goals = [build_objective(ready, own, Start(student, ()), paired) for _ in range(2)]
    other = build_objective(ready, changed(own, "training.seed=1"), Start(student, ()), paired)
    assert layers[0].units is None
    assert torch.equal(torch.random.get_rng_state(), state), "the draw of dropout would hang on the loss"
    if loss == "projector":
        first, second, third = (next(goal.parameters()) for goal in (*goals, other))
        assert first.shape == (32, 16)
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


def test_functional_cka_turns_the_teacher_by_the_root_of_its_geometry(
    recipe: Recipe, ready: Job, tmp_path: Path
) -> None:
    own = changed(recipe, "objective.features.loss=functional_cka")
    selection = scored(ready, own, tmp_path)
    student = start_student(ready, own, selection.start_units).student
    (pair,) = pair_layers(ready, own, Start(student, ()), selection)
    root = pair.teacher_basis
    assert root is not None
    assert root.shape == (32, 32)
    assert_close(root, root.T)
    geometry = functional_geometry(ready.teacher, ready.batches("train", num_rows=own.scores.rows))
    assert_close(root.double() @ root.double(), geometry, dtype=torch.float32)


@pytest.mark.parametrize("start", ["slice", "pretrained", "config"])
def test_A13_every_start_is_float32_in_eval_mode_and_says_so_in_its_config(
    material: Path, tmp_path: Path, start: str
) -> None:
    """From a teacher and a student that were saved in bfloat16."""
    half = material / "half"
    if not half.exists():
        tiny_model("bert", num_labels=2).to(torch.bfloat16).save_pretrained(half)
        write_tokenizer(half)
    changes = {"teacher__fine_tune": None, "teacher__model": str(half)}
    if start != "slice":
        changes |= {"student__start": start, "student__model": str(half)}
        changes |= {"student__hidden_size": None, "student__num_layers": None}
    own = job(material, **changes)
    ready = prepare(own)
    assert ready.teacher.dtype == torch.bfloat16
    begun = start_student(ready, own, scored(ready, own, tmp_path).start_units)
    assert {parameter.dtype for parameter in begun.student.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in begun.student.parameters())
    assert begun.student.config.dtype == torch.float32
    assert not begun.student.training
    assert begun.new_parameters == (("all",) if start == "config" else ())
    begun.student.save_pretrained(tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert '"dtype": "float32"' in config
    assert "bfloat16" not in config


@pytest.mark.parametrize("start", ["slice", "pretrained", "config"])
def test_a_start_hangs_on_the_seed_alone(
    recipe: Recipe, ready: Job, tmp_path: Path, material: Path, start: str
) -> None:
    """The same seed gives the same student, whatever was drawn before; another one another fresh student."""
    overrides = [f"student.start={start}"]
    if start != "slice":
        model = material / "five"
        tiny_model("distilbert", seed=5, num_labels=5).save_pretrained(model)
        overrides += [f"student.model={model}", f"student.tokenizer={material / 'teacher'}", *WITHOUT_SHAPE]
    own = changed(recipe, *overrides)
    selection = scored(ready, own, tmp_path)
    students = []
    for seed in (0, 0, 1):
        torch.rand(7)
        students.append(start_student(ready, changed(own, f"training.seed={seed}"), selection.start_units).student)
    weights = [torch.cat([p.detach().flatten() for p in student.parameters()]) for student in students]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2]) == (start == "slice")


def test_A05_a_pretrained_student_with_other_classes_reports_its_new_head(
    recipe: Recipe, ready: Job, material: Path
) -> None:
    model = material / "three"
    tiny_model("distilbert", num_labels=3).save_pretrained(model)
    tokenizer = material / "teacher"
    own = changed(
        recipe, "student.start=pretrained", f"student.model={model}", f"student.tokenizer={tokenizer}", *WITHOUT_SHAPE
    )
    begun = start_student(ready, own, None)
    assert begun.new_parameters == ("classifier.bias", "classifier.weight")
    assert begun.student.config.num_labels == 2
    assert begun.student.config.id2label == {0: "bad", 1: "good"}
    assert torch.equal(embeddings(begun.student), embeddings(tiny_model("distilbert", num_labels=3)))
