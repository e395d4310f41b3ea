"""What does not fit together is refused by every public loss and term, with both numbers and before it broadcasts."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd import losses
from flexkd.core.losses import BERNOULLI_LOSSES, FEATURE_LOSSES, LOGIT_LOSSES, REGRESSION_LOSSES, Projector
from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import TopOutputs, TopRule
from flexkd.core.selection import UnitPairs, pair_units, select_units, units_for_coverage
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import RecipeError, ScoreError, ShapeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from tests.closeness import assert_close
from tests.references.draws import classes, normal

Loss = Callable[..., Tensor]
ALL_LOGIT_LOSSES = [*LOGIT_LOSSES.values(), *BERNOULLI_LOSSES.values(), *REGRESSION_LOSSES.values()]
ANY_WIDTH = [
    FEATURE_LOSSES[name]
    for name, facts in FEATURE_LOSS_FACTS.items()
    if not facts.pairs_units and not facts.needs_projector and not facts.needs_heads
]


def test_R07_every_exported_loss_is_in_a_table() -> None:
    """What is exported beside the tables would go unchecked."""
    tables = {*ALL_LOGIT_LOSSES, *FEATURE_LOSSES.values()}
    exported = {getattr(losses, name) for name in losses.__all__ if name[0].islower()}
    assert exported == tables


@pytest.mark.parametrize(("first", "second"), [((4, 3), (4, 1)), ((4, 3), (1, 3)), ((4, 3), (3,)), ((2, 4, 3), (4, 3))])
@pytest.mark.parametrize("loss", ALL_LOGIT_LOSSES)
def test_R07_logits_of_other_shapes_never_broadcast(
    loss: Loss, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    for student, teacher in ((first, second), (second, first)):
        expected = f"of shape {list(student)}, the teacher of {list(teacher)}."
        with pytest.raises(ShapeError, match=re.escape(expected)):
            loss(torch.zeros(student), torch.zeros(teacher))
        with pytest.raises(ShapeError, match=re.escape(expected)):
            loss(teacher_logits=torch.zeros(teacher), student_logits=torch.zeros(student))


@pytest.mark.parametrize("loss", LOGIT_LOSSES.values())
@pytest.mark.parametrize("width", [0, 1])
def test_R07_one_class_alone_is_no_choice(loss: Loss, width: int) -> None:
    with pytest.raises(ShapeError, match=f"{width} output where classes are compared, of shape .*, {width}]"):
        loss(torch.zeros(4, width), torch.ones(4, width))
    for other in (*BERNOULLI_LOSSES.values(), *REGRESSION_LOSSES.values()):
        assert other(torch.zeros(4, 1), torch.ones(4, 1)).shape == (4,)


@pytest.mark.parametrize("loss", ALL_LOGIT_LOSSES)
def test_R07_logits_are_floating_point_numbers(loss: Loss) -> None:
    numbers, whole = torch.zeros(4, 3), torch.zeros(4, 3).long()
    for student, teacher in ((numbers, whole), (whole, numbers)):
        with pytest.raises(RecipeError, match=r"logits: are int64\. Give floating-point numbers"):
            loss(student, teacher)
    with pytest.raises(ShapeError):
        loss(torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [*LOGIT_LOSSES.values(), *BERNOULLI_LOSSES.values()])
def test_R07_a_temperature_is_a_number_above_zero(loss: Loss, temperature: float) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"temperature: must be above 0, was {temperature}.")):
        loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


@pytest.mark.parametrize("loss", FEATURE_LOSSES.values())
def test_R07_states_are_of_the_same_positions_and_paired_units(loss: Loss) -> None:
    student = normal(4, 5, 3, seed=1)
    for shape in ((4, 1, 3), (1, 5, 3), (5, 3), (4, 4, 3)):
        expected = f"the student's states are [4, 5, 3], the teacher's {list(shape)}. Give both the same positions."
        with pytest.raises(ShapeError, match=re.escape(expected)):
            loss(student, torch.zeros(shape))
    if loss in ANY_WIDTH:
        assert loss(student, normal(4, 5, 1, seed=2)).shape == (1,)
        return
    for width in (1, 2, 4):
        expected = f"features: 3 units of the student for {width} of the teacher"
        with pytest.raises(ShapeError, match=expected):
            loss(student, torch.zeros(4, 5, width))


@pytest.mark.parametrize("loss", FEATURE_LOSSES.values())
def test_R07_a_mask_has_one_boolean_for_each_position(loss: Loss) -> None:
    student, teacher = normal(4, 5, 3, seed=1), normal(4, 5, 3, seed=2)
    for shape in ((5,), (4,), (4, 1), (4, 5, 3), (1, 5)):
        with pytest.raises(ShapeError, match=re.escape(f"mask: is {list(shape)} for states of [4, 5, 3].")):
            loss(student, teacher, torch.ones(shape, dtype=torch.bool))
    for dtype in (torch.int64, torch.float32):
        with pytest.raises(RecipeError, match=r"mask: is .*, which chooses rows by number"):
            loss(student, teacher, mask=torch.ones(4, 5, dtype=dtype))
    with pytest.raises(RecipeError, match="features: are int64"):
        loss(student.long(), teacher)


@pytest.mark.parametrize(
    ("task", "logits", "labels", "expected"),
    [
        (TaskTerm(), (4, 3), torch.zeros(4), "labels: are float32 where each is a class of 3"),
        (TaskTerm(), (4, 3), torch.zeros(5).long(), "labels: are of shape [5] for logits of [4, 3]"),
        (TaskTerm(), (4, 3), torch.zeros(4, 1).long(), "labels: are of shape [4, 1] for logits of [4, 3]"),
        (TaskTerm(), (4, 1), torch.zeros(4).long(), "logits: 1 output where classes are compared"),
        (TaskTerm(label_smoothing=0.1), (4, 3), torch.zeros(4, 3), "labels: are float32 where"),
        (TaskTerm(label_smoothing=0.1), (4, 1), torch.zeros(4).long(), "logits: 1 output where"),
        (
            TaskTerm("binary_cross_entropy"),
            (4, 3),
            torch.zeros(3, 4),
            "labels: are of shape [3, 4] for outputs of [4, 3]",
        ),
        (TaskTerm("binary_cross_entropy"), (4, 3), torch.zeros(12), "labels: are of shape [12] for outputs of [4, 3]"),
        (TaskTerm("mse"), (4, 3), torch.zeros(4), "labels: are of shape [4] for outputs of [4, 3]"),
        (TaskTerm("mse"), (4, 1), torch.zeros(4, 2), "labels: are of shape [4, 2] for outputs of [4, 1]"),
    ],
)
def test_R07_labels_fit_their_logits(task: TaskTerm, logits: tuple[int, int], labels: Tensor, expected: str) -> None:
    with pytest.raises((ShapeError, RecipeError), match=re.escape(expected)):
        Objective(task)(Signal(torch.zeros(logits)), None, labels, StepCounts(4, 0, 0))


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_R07_an_objective_refuses_what_its_losses_refuse(loss: str, top_k: int | None) -> None:
    """With one-logit heads value and gradient would be 0; a teacher of other rows or outputs would be broadcast."""
    goal = Objective(logits=LogitTerm(loss, top_k=top_k))
    rule = LogitTerm(top_k=top_k).top
    for student, teacher in (((4, 3), (4, 5)), ((4, 5), (4, 3)), ((4, 3), (1, 3)), ((4, 3), (4, 1)), ((4, 1), (4, 1))):
        logits = torch.zeros(teacher)
        taught: Tensor | TopOutputs = logits if rule is None else rule(logits)
        if student == teacher == (4, 1) and top_k:
            continue
        with pytest.raises(ShapeError, match=r"logits: .*" + re.escape(str(list(student)))):
            goal(Signal(torch.zeros(student)), Signal(taught), torch.zeros(4).long(), StepCounts(4, 0, 0))


def test_R07_a_top_of_another_vocabulary_is_refused_by_number_and_not_by_an_index() -> None:
    top = TopRule(2)(normal(4, 9, seed=1))
    unknown = TopOutputs(*top.tensors())
    for taught in (top, unknown):
        taught.indices[0, 0] = 8
        for task in (None, TaskTerm()):
            with pytest.raises(ShapeError, match=re.escape("of shape [4, 5], the teacher of [4, 9]")):
                Objective(task, LogitTerm(top_k=2)).predictions(
                    torch.zeros(4, 5), taught, classes(4, num_classes=5, seed=2), StepCounts(4, 0, 0)
                )


@pytest.mark.parametrize("shared", [0, -2])
def test_R07_shared_outputs_are_some(shared: int) -> None:
    with pytest.raises(RecipeError, match=f"shared_outputs: must be 1 or more, was {shared}"):
        LogitTerm(shared_outputs=shared)


def test_R07_no_more_outputs_are_shared_than_there_are() -> None:
    for student, teacher, name in ((5, 9, "student"), (9, 5, "teacher")):
        with pytest.raises(ShapeError, match=f"shared_outputs: 7, but the {name} has 5 outputs"):
            LogitTerm(shared_outputs=7).values(LOGIT_LOSSES, torch.zeros(4, student), torch.zeros(4, teacher))


@pytest.mark.parametrize("name", ["correlation", "cross_correlation", "mse", "cosine", "cka", "projector"])
def test_R07_features_of_the_objective_are_pairs_of_the_same_positions(name: str) -> None:
    projectors = (Projector(3, 5),) if name == "projector" else ()
    goal = Objective(features=FeatureTerm(name, projectors=projectors))
    counts, labels = StepCounts(9, 9, 9), torch.zeros(9).long()

    def run(*shapes: tuple[int, int]) -> Any:
        student, teacher = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
        return goal(Signal(None, (student,)), Signal(None, (teacher,)), labels, counts, _nothing())

    with pytest.raises(ShapeError, match=r"\[9, .*\[8, .*same positions"):
        run((9, 3), (8, 5))
    for width in (1, 4):
        if name == "cka":
            assert run((9, 3), (9, width)).loss.isfinite()
        else:
            with pytest.raises(
                ShapeError, match=r"features: \d units of the student for (\d of the teacher|a Projector)"
            ):
                run((9, 3), (9, width))
    if name == "projector":
        with pytest.raises(ShapeError, match="features: 4 units of the student for a Projector from 3 to 5"):
            run((9, 4), (9, 5))


def _nothing() -> Any:
    return Objective(TaskTerm()).predictions(torch.zeros(9, 2), None, torch.full((9,), -100), StepCounts(9, 9, 9))


def test_R07_each_pair_of_layers_has_its_states() -> None:
    goal = Objective(features=FeatureTerm(layers=(LayerPair(), LayerPair(1, 1))))
    states = (normal(9, 3, seed=1),)
    with pytest.raises(ShapeError, match="2 pairs of layers, but states of 1 of the student and of 1 of the teacher"):
        goal(Signal(None, states), Signal(None, states), torch.zeros(9).long(), StepCounts(9, 9, 9), _nothing())


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([0], [1, 2, 3], "[1] of the student for [3] of the teacher"),
        ([0, 1, 2], [1], "[3] of the student for [1] of the teacher"),
        ([], [], "[0] of the student for [0] of the teacher"),
        ([[0]], [[1]], "[1, 1] of the student for [1, 1] of the teacher"),
        ([0, 1, 0], [1, 2, 3], "student unit 0 appears twice"),
        ([0, 1], [-1, 3], "-1 is no unit of the teacher"),
        ([0.0, 1.0], [1, 3], "of the student are torch.float32"),
        ([True, False], [1, 3], "of the student are torch.bool"),
    ],
)
def test_R07_units_are_pairs(student: list[Any], teacher: list[Any], expected: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(expected)):
        UnitPairs(torch.tensor(student), torch.tensor(teacher))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_R07_a_projector_has_two_widths(sizes: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"Projector: from {sizes[0]} to {sizes[1]} units"):
        Projector(*sizes)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_R07_a_weight_is_a_number_from_zero(value: float) -> None:
    states = normal(9, 3, seed=1)
    with pytest.raises(RecipeError, match=f"off_diagonal: must be 0 or above, was {value}"):
        losses.cross_correlation(states, states, off_diagonal=value)
    for term in (TaskTerm, LogitTerm, FeatureTerm):
        with pytest.raises(RecipeError, match=f"weight: must be 0 or above, was {value}"):
            term(weight=value)


def test_R07_a_mapping_without_what_it_reads_is_refused() -> None:
    units = torch.tensor([1, 4])
    with pytest.raises(RecipeError, match="mapping: 'score' pairs units by their scores"):
        pair_units(units, 3, mapping="score")
    with pytest.raises(RecipeError, match="mapping: 'matched' compares states"):
        pair_units(units, 3, mapping="matched", student_states=normal(9, 3, seed=1))
    for student, teacher in (((9, 3), (8, 2)), ((9, 4), (9, 2)), ((9, 3), (9, 5))):
        expected = f"mapping: states are {list(student)} of the student and {list(teacher)} of the teacher, for"
        with pytest.raises(ShapeError, match=re.escape(expected)):
            pair_units(
                units,
                3,
                mapping="matched",
                student_states=normal(*student, seed=1),
                teacher_states=normal(*teacher, seed=2),
            )


def test_R07_an_objective_that_reads_a_teacher_has_one() -> None:
    with pytest.raises(RecipeError, match="teacher: a term of the objective reads it"):
        Objective(logits=LogitTerm())(Signal(torch.zeros(4, 3)), None, torch.zeros(4).long())


@pytest.mark.parametrize("loss", FEATURE_LOSSES.values())
def test_R07_states_are_rows_of_units(loss: Loss) -> None:
    for shape in ((9,), (9, 0)):
        with pytest.raises(ShapeError, match=re.escape(f"the student's states are {list(shape)}. Give one row")):
            loss(torch.ones(shape), torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_R07_classes_are_whole_numbers_of_any_size(dtype: torch.dtype, smoothing: float) -> None:
    task, logits, labels = TaskTerm(label_smoothing=smoothing), normal(4, 3, seed=1), torch.tensor([0, 2, 1, 0])
    assert torch.equal(task.values(logits, labels.to(dtype)), task.values(logits, labels))


def test_R07_the_top_of_a_teacher_is_taken_also_of_whole_logits() -> None:
    student, teacher, labels = normal(4, 9, seed=1), normal(4, 9, seed=2), torch.zeros(4).long()
    term = LogitTerm(temperature=2.0, top_k=2, shared_outputs=8)
    assert term.top is not None
    values = [Objective(logits=term)(Signal(student), Signal(t), labels).loss for t in (teacher, term.top(teacher))]
    assert torch.equal(values[0], values[1])
    assert values[0] < Objective(logits=LogitTerm(temperature=2.0))(Signal(student), Signal(teacher), labels).loss


def test_R07_a_signal_holds_what_the_terms_read() -> None:
    logits, states, labels = normal(9, 3, seed=1), (normal(9, 5, seed=2),), torch.zeros(9).long()
    with pytest.raises(RecipeError, match="student: a term of the objective reads its logits, and its Signal has none"):
        Objective(TaskTerm())(Signal(), None, labels)
    with pytest.raises(RecipeError, match="teacher: the logits term reads its logits, and its Signal has none"):
        Objective(logits=LogitTerm())(Signal(logits), Signal(None, states), labels)
    value = Objective(features=FeatureTerm("mse"))(Signal(None, states), Signal(None, (0 * states[0],)), labels)
    assert_close(value.loss, states[0].square().mean())


def test_R07_terms_of_other_kinds_are_refused() -> None:
    # Run-time types would be told before; users have none.
    start = inspect.unwrap(Objective.__init__)
    for term in (LogitTerm(), FeatureTerm()):
        with pytest.raises(RecipeError, match=rf"objective\.task: must be a TaskTerm, was a {type(term).__name__}"):
            start(object.__new__(Objective), term)
    with pytest.raises(RecipeError, match=r"layers: must be a tuple of one LayerPair or more"):
        _made_of(FeatureTerm(), layers=LayerPair())
    with pytest.raises(ShapeError, match=r"units: of the student are a list\. Give a tensor"):
        _made_of(UnitPairs(torch.tensor([0]), torch.tensor([0])), student=[0])
    for basis in (torch.ones(32), torch.ones(32, 4).long()):
        with pytest.raises(ShapeError, match=re.escape(f"teacher_basis: is {basis.dtype} of shape")):
            LayerPair(teacher_basis=basis)


def _made_of(term: Any, **changes: Any) -> None:
    """What a user's dataclass does with values that run-time types would refuse."""
    for name, value in changes.items():
        object.__setattr__(term, name, value)
    term.__post_init__()


def test_R07_scores_are_one_number_a_unit_and_none_is_below_0() -> None:
    for scores in (torch.ones(4, 8), torch.ones(0), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=re.escape(f"scores: are of shape {list(scores.shape)}. Give")):
            select_units(scores, 1)
    with pytest.raises(ScoreError, match="-1 is below 0, and no share of a total"):
        units_for_coverage(torch.tensor([1.0, -1.0, 0.5]), 0.9)


@pytest.mark.parametrize(
    ("states", "expected"),
    [(normal(7, 4, seed=1), "7 positions are fewer than the 8"), (torch.full((9, 4), torch.nan), "not finite")],
)
def test_R07_matching_needs_states_that_have_a_correlation(states: Tensor, expected: str) -> None:
    with pytest.raises(ShapeError, match=f"mapping: .*{expected}"):
        pair_units(torch.arange(2), 4, mapping="matched", student_states=states, teacher_states=states[:, :2])
