"""Feature losses of users: tried when they are registered, then taught like any other."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexkd
from flexkd.core.losses import FEATURE_LOSSES
from flexkd.costs import planning
from flexkd.errors import RecipeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS, FeatureLossFacts
from flexkd.pipeline import distill as pipeline
from tests.job_files import fixed_costs, job

FACTS = FeatureLossFacts(name="mine", pairs_units=True)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    for table in (FEATURE_LOSSES, FEATURE_LOSS_FACTS):
        table.pop("mine", None)  # type: ignore[attr-defined]


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).square().mean(0)


def test_a_run_learns_by_it_as_by_the_loss_that_it_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_costs(monkeypatch)
    flexkd.register_loss(FACTS, squares)
    plain = {"teacher__fine_tune": None, "teacher__allow_weak": True, "training__max_steps": 2}
    histories = []
    for name in ("mine", "mse"):
        recipe = job(tmp_path, **plain, objective__features__loss=name, output=str(tmp_path / name))
        histories.append([entry["features_raw"] for entry in pipeline.distill(recipe).history])
        planning.plan(recipe, "h100")
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_a_mask_chooses_positions_and_no_gradient_reaches_the_teacher() -> None:
    flexkd.register_loss(FACTS, squares)
    student, teacher = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    mask = torch.rand(2, 5) > 0.3
    value = FEATURE_LOSSES["mine"](student, teacher, mask)
    torch.testing.assert_close(value, FEATURE_LOSSES["mse"](student, teacher, mask))
    value.sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("function", "begin"),
    [
        (lambda student: student, "register_loss: 'mine' raised TypeError ("),
        (lambda student, teacher: 1.0, "register_loss: 'mine' returned 1.0, not finite values of 0 or 1 axes."),
        (lambda student, teacher: student - teacher, "register_loss: 'mine' returned tensor("),
        (lambda student, teacher: student.mean() * torch.nan, "register_loss: 'mine' returned tensor(nan"),
        (lambda student, teacher: teacher.mean(0), "register_loss: 'mine' raised RuntimeError ("),
        (lambda student, teacher: (0 * student).sum(), "register_loss: 'mine' has no finite gradient to the student"),
    ],
)
def test_a_function_that_teaches_nothing_is_refused(function: Callable[..., Any], begin: str) -> None:
    with pytest.raises(RecipeError, match="^" + re.escape(begin)):
        flexkd.register_loss(FACTS, function)
    assert "mine" not in FEATURE_LOSS_FACTS


def test_names_and_facts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for facts, words in (
        (FeatureLossFacts(name="mse"), "'mse' is taken"),
        (FeatureLossFacts(name="a b"), "'a b' is no name"),
        (FeatureLossFacts(name="mine", needs_projector=True), "has needs_projector, which is more than a function"),
    ):
        with pytest.raises(RecipeError, match=re.escape(words)):
            flexkd.register_loss(facts, squares)
    with pytest.raises(RecipeError, match=re.escape("objective.features.loss: unknown loss 'mine'. Known: ")):
        job(tmp_path, objective__features__loss="mine")
