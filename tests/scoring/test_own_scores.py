"""Attributions of users: tried when they are registered, then measured like any other."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flexkd
from flexkd.errors import RecipeError, ScoreError
from flexkd.facts.own_scores import OWN_SCORES
from flexkd.pipeline import distill as pipeline
from tests.job_files import job
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    OWN_SCORES.clear()


@pytest.mark.parametrize("layer", [-1, 2])
def test_it_is_summed_over_positions_as_the_known_ones_are(layer: int) -> None:
    flexkd.register_score("mine", lambda gradients, states: (gradients * states).abs())
    teacher = tiny_model("bert", seed=1)
    batch = tiny_batch(teacher)
    scores = [
        flexkd.score_units(teacher, [batch], attribution=name, layer=layer)
        for name in ("mine", "gradient_x_activation")
    ]
    torch.testing.assert_close(scores[0].values, scores[1].values)
    assert scores[0].attribution == "mine"


def test_padding_counts_nothing_whatever_the_function_gives() -> None:
    flexkd.register_score("mine", lambda gradients, states: gradients.abs() + 1)
    teacher = tiny_model("bert", seed=1)
    batch = tiny_batch(teacher)
    plain = flexkd.score_units(teacher, [batch], attribution="gradient", layer=2)
    ones = flexkd.score_units(teacher, [batch], attribution="mine", layer=2)
    added = (ones.values - plain.values) * ones.num_predictions
    torch.testing.assert_close(added, torch.full_like(added, float(batch["attention_mask"].sum())))


def test_a_recipe_names_it(tmp_path: Path) -> None:
    plain = {"teacher__fine_tune": None, "teacher__allow_weak": True}
    with pytest.raises(RecipeError, match=re.escape("scores.attribution: unknown attribution 'mine'. Known: ")):
        job(tmp_path, **plain, scores__attribution="mine")
    flexkd.register_score("mine", lambda gradients, states: gradients.square().square())
    (record,) = pipeline.score(job(tmp_path, **plain, scores__attribution="mine"))
    assert record.attribution == "mine"


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("fisher", torch.add, "'fisher' is taken."),
        ("a b", torch.add, "'a b' is no name"),
        ("mine", lambda gradients: gradients, "'mine' raised TypeError ("),
        ("mine", lambda gradients, states: gradients, "'mine' returned tensor("),
        ("mine", lambda gradients, states: gradients.abs().sum(-1), "'mine' returned tensor("),
        ("mine", lambda gradients, states: 1.0, "'mine' returned 1.0."),
        ("mine", lambda gradients, states: gradients.abs() / 0, "'mine' returned tensor("),
        ("mine", lambda gradients, states: gradients.abs().softmax(1), "'mine' gives a position another number where"),
    ],
)
def test_what_is_no_score_is_refused(name: str, function: Callable[..., Any], words: str) -> None:
    with pytest.raises(ScoreError, match="^" + re.escape(f"register_score: {words}")):
        flexkd.register_score(name, function)
    assert not OWN_SCORES
