"""What every attribution keeps on whole models; a new one joins by its name in ATTRIBUTIONS."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.scores import ATTRIBUTIONS, CONTROLS, GRADIENT_ATTRIBUTIONS, TARGETS
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.families import family_of
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.references.draws import permutation
from tests.tiny import tiny_batch, tiny_model

MODELS = [(name, family.tasks[-1]) for name, family in FAMILIES.items()]
every_attribution = pytest.mark.parametrize("attribution", ATTRIBUTIONS)
every_layer = pytest.mark.parametrize("layer", [-1, 2])


@pytest.fixture(autouse=True)
def _few_rows_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flexkd")


def permuted(model: PreTrainedModel, order: Tensor, fresh: PreTrainedModel) -> PreTrainedModel:
    """The same function with the units of its residual stream in another order, the head's columns with them."""
    family = family_of(model)
    with torch.no_grad():
        for (name, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
            value = parameter
            for axis, kind in enumerate(family.parameter_axes(name, model.config)):
                value = value.index_select(axis, order) if kind == "residual" else value
            other.copy_(value)
        for buffer, other in zip(model.buffers(), fresh.buffers(), strict=True):
            other.copy_(buffer)
    return fresh


@pytest.mark.parametrize(
    ("model_type", "task", "attribution"),
    [(*model, "gradient") for model in MODELS]
    + [(*model, name) for model in MODELS[::5] for name in ATTRIBUTIONS if name != "gradient"],
)
def test_permuting_units_permutes_scores(model_type: str, task: Any, attribution: str) -> None:
    model, order = tiny_model(model_type, task), permutation(32, seed=1)
    batch = tiny_batch(model)
    other = permuted(model, order, tiny_model(model_type, task, seed=1))
    found = [score_units(m, [batch], attribution=attribution, layer=[-1, 2]) for m in (model, other)]
    for plain, turned in zip(*found, strict=True):
        assert_close(turned.effective_predictions, plain.effective_predictions, dtype=torch.float32)
        # A random score belongs to the number of a unit and to nothing else.
        expected = plain.values if attribution == "random" else plain.values[order]
        # The norms add in another order: 1e-6 of the largest score measured.
        assert float((turned.values - expected).abs().max()) < 1e-5 * float(expected.max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attribution", GRADIENT_ATTRIBUTIONS)
def test_a_unit_that_no_output_reads_scores_exactly_nothing(attribution: str, target: str) -> None:
    unused = [0, 13, 31]
    for model, head in ((tiny_model("bert"), "bert.pooler.dense"), (tiny_model("llama", "causal"), "lm_head")):
        with torch.no_grad():
            model.get_submodule(head).weight[:, unused] = 0
        scores = score_units(model, [tiny_batch(model)], attribution=attribution, target=target)
        assert torch.nonzero(scores.values == 0).flatten().tolist() == unused
        assert scores.num_unused == 3


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_does_not_care_what_the_outputs_read(control: str) -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = score_units(model, [batch], attribution=control).values
    with torch.no_grad():
        model.bert.pooler.dense.weight[:, :16] = 0
    assert torch.equal(score_units(model, [batch], attribution=control).values, expected)


@every_layer
@every_attribution
def test_scores_of_all_rows_are_the_mean_of_their_parts(attribution: str, layer: int) -> None:
    model = tiny_model("llama", "causal")
    parts = [tiny_batch(model, rows=rows, seed=rows) for rows in (2, 5)]
    whole = score_units(model, parts, attribution=attribution, layer=layer)
    alone = [score_units(model, [part], attribution=attribution, layer=layer) for part in parts]
    counts = [scores.num_predictions for scores in alone]
    assert whole.num_predictions == sum(counts)
    mean = sum(scores.values * count for scores, count in zip(alone, counts, strict=True)) / sum(counts)
    if attribution == "variance":
        # The parts lie around means of their own: together they spread at least as much.
        assert (whole.values >= min(counts) / sum(counts) * mean).all()
    else:
        assert_close(whole.values, mean)


@pytest.mark.parametrize("attribution", [name for name in ATTRIBUTIONS if name != "random"])
def test_more_rows_only_narrow_the_scores(attribution: str) -> None:
    model = tiny_model("bert", vocab_size=200)
    batch = tiny_batch(model, rows=1024, length=6)

    def score(start: int, rows: int) -> Tensor:
        part = {key: value[start : start + rows] for key, value in batch.items()}
        return torch.stack([s.values for s in score_units(model, [part], attribution=attribution, layer=[-1, 2])])

    whole = score(0, 1024)
    errors = []
    for rows in (16, 64, 256):
        parts = [score(start, rows) for start in range(0, 1024, 256)]
        errors.append(sum((part - whole).norm(dim=1) for part in parts) / len(parts))
    # Four times the rows halve the error, give or take what chance adds.
    assert (errors[0] > 1.5 * errors[1]).all()
    assert (errors[1] > 1.5 * errors[2]).all()
    assert (errors[2] < 0.1 * whole.norm(dim=1)).all()


@every_attribution
def test_every_attribution_is_finite_not_negative_and_says_what_it_is(attribution: str) -> None:
    model = tiny_model("electra")
    scores = score_units(model, [tiny_batch(model)], attribution=attribution, target="logit", layer=3)
    assert (scores.values >= 0).all()
    assert scores.values.isfinite().all()
    assert (scores.attribution, scores.target, scores.layer, scores.num_predictions) == (attribution, "logit", 3, 4)
