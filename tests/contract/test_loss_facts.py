"""What the rows of `facts/losses.py` say is so: a new loss joins by its row there."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from flexkd.core.losses import FEATURE_LOSSES, LOGIT_LOSSES, MINIMUM_POSITIONS, Projector
from flexkd.core.losses.feature import UNIT_STATISTICS
from flexkd.core.losses.logit import LOGIT_LOSSES_BY_TASK
from flexkd.core.objective import Objective, ObjectiveValue, Signal, StepCounts
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import FlexKDError, RecipeError, ShapeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS, LOGIT_LOSSES_OF, TASK_LOSS_FACTS, TASK_LOSS_OF
from flexkd.models.slicing.student import slice_student
from flexkd.recipe import load_recipe
from flexkd.teacher.cache.quantization import stored_columns
from tests.closeness import assert_close
from tests.core.signals import feature_term
from tests.references import alignment, correlation, distances, divergences
from tests.references.differences import numerical_gradient
from tests.references.draws import normal
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import rows, trainer_of

REFERENCES = {**alignment.REFERENCES, **correlation.REFERENCES, **distances.REFERENCES}
RECIPE = """\
name: job
data: {train: rows.csv}
teacher: {model: teachers/big, cache: ./answers}
student: {hidden_size: 192, num_layers: 3}
"""
WITH_HEADS = {True: ("task.type=summarization", "objective.features.layer_map={1: 2}")}
"""Overrides for a loss that reads the states of blocks with a head over tokens."""
INFINITY = float("inf")
every_feature_loss = pytest.mark.parametrize("name", FEATURE_LOSS_FACTS)
every_logit_loss = pytest.mark.parametrize("name", LOGIT_LOSS_FACTS)
every_task_loss = pytest.mark.parametrize("name", TASK_LOSS_FACTS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which recipes are read."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def problems_of(*overrides: str) -> str:
    """What is wrong with the recipe; "" where nothing is."""
    try:
        load_recipe("recipe.yaml", overrides)
    except RecipeError as error:
        return str(error)
    return ""


def feature_objective(name: str, student_width: int, teacher_width: int) -> Objective:
    """The feature term alone, with what its loss needs."""
    return Objective(features=feature_term(name, student_width, teacher_width))


def value_of(objective: Objective, student: Tensor, teacher: Tensor, step_positions: int = 0) -> ObjectiveValue:
    """The objective of some states."""
    count = len(student)
    labels = torch.zeros(0, dtype=torch.long)
    counts = StepCounts(1, step_positions or count, count)
    return objective(Signal(None, (student,)), Signal(None, (teacher,)), labels, counts)


def test_rows_and_functions_have_the_same_names() -> None:
    assert list(FEATURE_LOSSES) == list(FEATURE_LOSS_FACTS)
    assert set(UNIT_STATISTICS) == {name for name, facts in FEATURE_LOSS_FACTS.items() if facts.has_live_units}
    assert {task: set(functions) for task, functions in LOGIT_LOSSES_BY_TASK.items()} == {
        task: {name for name, facts in LOGIT_LOSS_FACTS.items() if task in facts.task_losses}
        for task in TASK_LOSS_FACTS
    }
    for table in (FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS, TASK_LOSS_FACTS):
        assert all(facts.name == name for name, facts in table.items())


@every_feature_loss
def test_a_loss_of_features_is_its_second_derivation(name: str) -> None:
    student, teacher = normal(12, 3, seed=1, scale=2.0), normal(12, 3, seed=2)
    leaf = student.clone().requires_grad_()
    values = FEATURE_LOSSES[name](leaf, teacher)
    # Alignment is a small difference of large sums.
    tolerance = 2e-5
    expected = torch.as_tensor(REFERENCES[name](student, teacher)).float().reshape(-1)
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    slope = numerical_gradient(lambda x: float(np.sum(REFERENCES[name](x, teacher))), student.double().numpy())
    gradient = torch.autograd.grad(values.sum(), leaf)[0]
    torch.testing.assert_close(gradient, torch.as_tensor(slope).float(), rtol=1e-4, atol=1e-5)


@every_feature_loss
def test_a_loss_of_paired_units_refuses_other_widths_and_a_loss_of_states_does_not(name: str) -> None:
    student, teacher = normal(20, 3, seed=3), normal(20, 5, seed=4)
    if FEATURE_LOSS_FACTS[name].pairs_units:
        with pytest.raises(ShapeError, match="3 units of the student for 5 of the teacher"):
            value_of(feature_objective(name, 3, 5), student, teacher)
    else:
        assert value_of(feature_objective(name, 3, 5), student, teacher).loss > 0


@every_feature_loss
def test_one_step_trains_a_student_of_half_the_width(tmp_path: Path, name: str) -> None:
    facts, units = FEATURE_LOSS_FACTS[name], torch.arange(0, 32, 2)
    teacher = tiny_model("bert", seed=1)
    student = slice_student(teacher, units=units, num_layers=2)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    pair = LayerPair.of_units(units) if facts.pairs_units else LayerPair()
    if facts.needs_geometry:
        pair = LayerPair(teacher_basis=torch.eye(32))
    goal = Objective(features=feature_term(name, 16, 32, layers=(pair,)))
    trainer = trainer_of(tmp_path, goal, rows(), model=student, teacher=teacher)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "features_raw" in entry]
    assert entry["features_raw"] > 0
    after = student.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())


@every_feature_loss
def test_M03_a_statistic_skips_few_positions_and_any_other_loss_adds_up(name: str) -> None:
    few = MINIMUM_POSITIONS - 1
    student, teacher = normal(2 * few, 3, seed=5), normal(2 * few, 3, seed=6)
    objective = feature_objective(name, 3, 3)
    whole = value_of(objective, student, teacher)
    parts = [value_of(objective, student[p], teacher[p], 2 * few) for p in (slice(few), slice(few, None))]
    if FEATURE_LOSS_FACTS[name].is_statistic:
        halves = FEATURE_LOSSES[name](student[:few], teacher[:few]) + FEATURE_LOSSES[name](student[few:], teacher[few:])
        assert abs(float(halves.mean() / 2 - whole.loss)) > 1e-3
        assert [float(part.loss) for part in parts] == [0, 0]
        assert [float(part.counts["skipped_feature_terms"]) for part in parts] == [1, 1]
    else:
        assert_close(parts[0].loss + parts[1].loss, whole.loss)
        assert not any("skipped_feature_terms" in part.counts for part in parts)


@every_feature_loss
def test_F01_the_mean_is_over_live_units_where_a_unit_can_be_dead(name: str) -> None:
    student, teacher = normal(20, 4, seed=7), normal(20, 4, seed=8)
    teacher[:, 1] = 3.0
    facts = FEATURE_LOSS_FACTS[name]
    objective = feature_objective(name, 4, 4)
    value = value_of(objective, student, teacher)
    assert ("dead_teacher_units" in value.counts) is facts.has_live_units
    if facts.has_live_units:
        assert value.counts["dead_teacher_units"] == 1
        assert_close(value.loss, FEATURE_LOSSES[name](student, teacher)[[0, 2, 3]].mean())
    elif not facts.needs_projector and not facts.needs_heads:
        assert_close(value.loss, FEATURE_LOSSES[name](student, teacher).mean())


@every_feature_loss
def test_a_cache_in_int8_is_accepted_where_rounded_columns_mean_the_same(folder: Path, name: str) -> None:
    accepted = FEATURE_LOSS_FACTS[name].fits_int8
    settings = f"objective.features.loss={name}", *WITH_HEADS.get(FEATURE_LOSS_FACTS[name].needs_heads, ())
    problems = problems_of(*settings, "teacher.cache_storage=int8")
    assert problems_of(*settings, "teacher.cache_storage=float16") == ""
    assert (f"teacher.cache_storage: 'int8' is too coarse for {name}" in problems) is not accepted
    assert bool(problems) is not accepted
    if accepted:
        # Units of very different scale, as the states of a teacher have them.
        teacher = normal(400, 6, seed=9) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0, 1000.0])
        student = teacher + teacher.std(0) * normal(400, 6, seed=10)
        stored = stored_columns(teacher, "int8")
        rounded = stored["columns"] * stored["scale"] + stored["offset"]
        # Rounding costs an exact copy next to nothing, and changes little for any other student.
        assert FEATURE_LOSSES[name](teacher, rounded).abs().max() < 1e-3
        exact = FEATURE_LOSSES[name](student, teacher).mean()
        torch.testing.assert_close(FEATURE_LOSSES[name](student, rounded).mean(), exact, rtol=0.01, atol=0.001)


@every_feature_loss
def test_projectors_and_lenses_are_given_where_they_are_needed(name: str) -> None:
    term = feature_term(name)
    other = () if term.projectors else (Projector(4, 4),)
    with pytest.raises(RecipeError, match=f"projectors: {len(other)} for loss '{name}'"):
        replace(term, projectors=other)
    lenses = () if term.lenses else feature_term("distill_lens").lenses
    with pytest.raises(RecipeError, match=f"lenses: {len(lenses)} for loss '{name}'"):
        replace(term, lenses=lenses)


@every_feature_loss
def test_a_recipe_takes_the_name_and_the_keys_that_are_read(folder: Path, name: str) -> None:
    loss = f"objective.features.loss={name}"
    assert problems_of(loss, *WITH_HEADS.get(FEATURE_LOSS_FACTS[name].needs_heads, ())) == ""
    refused = FEATURE_LOSS_FACTS[name].needs_geometry
    for key, value in (("units", "8"), ("coverage", "0.5")):
        problem = f"objective.features.{key}: {value} is not used by {name}, which selects nothing."
        assert (problem in problems_of(loss, f"objective.features.{key}={value}")) is refused
    directions = problems_of(loss, "objective.features.basis=directions", "objective.features.mapping=matched")
    is_whole = not FEATURE_LOSS_FACTS[name].pairs_units
    assert (f"'directions' is not used by {name}, which compares whole states" in directions) is is_whole


@every_feature_loss
def test_a_loss_that_reads_no_values_runs_without_storage(name: str) -> None:
    with FakeTensorMode():
        student, teacher = torch.empty(20, 4, requires_grad=True), torch.empty(20, 4)
        if FEATURE_LOSS_FACTS[name].reads_values:
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                FEATURE_LOSSES[name](student, teacher).sum().backward()
        else:
            FEATURE_LOSSES[name](student, teacher).sum().backward()
            assert student.grad is not None


@every_feature_loss
def test_an_unknown_name_is_answered_with_this_one(folder: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"Known: .*{name}"):
        FeatureTerm("no loss")
    assert name in problems_of("objective.features.loss=none")


@pytest.mark.parametrize("problem", TASK_LOSS_OF)
@every_logit_loss
def test_a_loss_of_logits_is_for_the_problems_that_it_fits(folder: Path, name: str, problem: str) -> None:
    fits = problem in LOGIT_LOSS_FACTS[name].problems
    assert fits is (name in LOGIT_LOSSES_OF[problem])
    task = ("task.type=instruction",) if problem == "generation" else (f"task.problem={problem}",)
    problems = problems_of(*task, f"objective.logits={{loss: {name}, temperature: 1}}", "objective.features=null")
    assert (f"{name!r} does not fit {problem}" in problems) is not fits
    terms = TaskTerm(TASK_LOSS_OF[problem]), LogitTerm(name)
    if fits:
        assert Objective(*terms).needs_teacher
    else:
        with pytest.raises(RecipeError, match=f"unknown loss '{name}'"):
            Objective(*terms)


@every_logit_loss
def test_M08_the_power_of_the_temperature_keeps_the_size_of_the_gradient(folder: Path, name: str) -> None:
    facts = LOGIT_LOSS_FACTS[name]
    if facts.temperature_exponent == 0:
        with pytest.raises(RecipeError, match=f"temperature: has no meaning for '{name}', was 2"):
            LogitTerm(name, temperature=2)
        problems = problems_of(f"objective.logits={{loss: {name}, temperature: 2}}")
        assert f"objective.logits.temperature: 2.0 is not used by {name}" in problems
        return
    student, teacher = normal(32, 10, seed=11), normal(32, 10, seed=12)
    sizes = []
    for temperature in (16.0, 64.0):
        term, leaf = LogitTerm(name, temperature=temperature), student.clone().requires_grad_()
        scaled = term.scale * term.values(LOGIT_LOSSES, leaf, teacher).sum()
        sizes.append(float(torch.autograd.grad(scaled, leaf)[0].norm()))
    # An exponent that is wrong by one would make one of them four times the other.
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("option", ["alpha", "beta"])
@every_logit_loss
def test_a_setting_is_taken_by_the_losses_that_have_it(folder: Path, name: str, option: str) -> None:
    facts = LOGIT_LOSS_FACTS[name]
    taken = option in facts.options
    functions = [functions[name] for functions in LOGIT_LOSSES_BY_TASK.values() if name in functions]
    assert all((option in inspect.signature(function).parameters) is taken for function in functions)
    problems = problems_of(f"objective.logits={{loss: {name}, temperature: 1, {option}: 0.5}}")
    assert (f"objective.logits.{option}: 0.5 belongs to" in problems) is not taken
    if taken:
        assert LogitTerm(name, **{option: 0.5}).options == {option: 0.5}  # type: ignore[arg-type]
    else:
        with pytest.raises(RecipeError, match=f"{option}: not used by '{name}'"):
            LogitTerm(name, **{option: 0.5})  # type: ignore[arg-type]


@every_logit_loss
def test_the_likeliest_outputs_stand_for_all_of_a_distribution(name: str) -> None:
    if not LOGIT_LOSS_FACTS[name].fits_top_k:
        with pytest.raises(RecipeError, match=f"top_k: 3 for loss '{name}'"):
            LogitTerm(name, top_k=3)
        return
    student, teacher = normal(6, 9, seed=13), normal(6, 9, seed=14)
    values = LogitTerm(name, top_k=3).values(LOGIT_LOSSES, student, teacher)
    whole = LogitTerm(name).values(LOGIT_LOSSES, student, teacher)
    assert (values >= -1e-6).all()
    assert (values <= whole + 1e-6).all()


@every_logit_loss
def test_an_infinite_loss_is_infinite_on_the_side_that_the_row_says(name: str) -> None:
    facts = LOGIT_LOSS_FACTS[name]
    if name not in LOGIT_LOSSES:
        assert not facts.is_reverse
        return
    ruled_out, plain = torch.tensor([[-INFINITY, 0.0, 1.0]]), torch.zeros(1, 3)
    both_sides = torch.cat([LOGIT_LOSSES[name](ruled_out, plain), LOGIT_LOSSES[name](plain, ruled_out)])
    assert bool(both_sides.isfinite().all()) is facts.is_finite
    options = dict.fromkeys(facts.options, 0)
    student_rules_out = bool(LOGIT_LOSSES[name](ruled_out, plain, **options).isinf())
    teacher_rules_out = bool(LOGIT_LOSSES[name](plain, ruled_out, **options).isinf())
    assert student_rules_out <= (not facts.is_reverse)
    assert teacher_rules_out <= facts.is_reverse


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_loss_of_logits_is_its_second_derivation(name: str) -> None:
    student, teacher = normal(4, 6, seed=15, scale=2.0), normal(4, 6, seed=16, scale=2.0)
    parameters = inspect.signature(LOGIT_LOSSES[name]).parameters
    (share,) = [parameters[option].default for option in LOGIT_LOSS_FACTS[name].options] or [0.0]
    expected = divergences.rows(name, student, teacher, 2.0, share)
    assert_close(LOGIT_LOSSES[name](student, teacher, 2.0), expected)


@every_task_loss
def test_smoothing_and_classes_belong_to_distributions(folder: Path, name: str) -> None:
    facts = TASK_LOSS_FACTS[name]
    logits, numbers = normal(4, 3, seed=17), normal(4, 3, seed=18).sigmoid()
    if facts.is_distribution:
        assert TaskTerm(name, label_smoothing=0.1).values(logits, torch.zeros(4, dtype=torch.long)).shape == (4,)
    else:
        assert TaskTerm(name).values(logits, numbers).shape == (4,)
        with pytest.raises(RecipeError, match=re.escape(f"label_smoothing: not used by '{name}'")):
            TaskTerm(name, label_smoothing=0.1)
    for problem in facts.problems:
        task = "task.type=instruction" if problem == "generation" else f"task.problem={problem}"
        smoothing = problems_of(task, "objective.logits=null", "objective.task.label_smoothing=0.1")
        assert (f"only for single_label, not {problem}" in smoothing) is not facts.is_distribution


@every_task_loss
def test_a_loss_against_labels_has_losses_of_logits(name: str) -> None:
    assert LOGIT_LOSSES_BY_TASK[name]
    with pytest.raises(FlexKDError, match="Known: .*" + name):
        TaskTerm("no loss")
