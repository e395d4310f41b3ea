"""Scores against a slow derivation that takes the whole graph of each row, in float64 and without a hook of ours."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.scores import ATTRIBUTIONS, TARGETS
from flexkd.core.selection import select_units
from flexkd.errors import ScoreError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.hidden import model_inputs
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.references import scores as reference
from tests.tiny import tiny_batch, tiny_model

CLASSIFIERS = sorted(name for name, family in FAMILIES.items() if "classification" in family.tasks)
CAUSAL = [(name, tied) for name in ("llama", "qwen2", "qwen3") for tied in (False, True)]
LAYERS = [-1, 2]
Row = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _few_rows_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flexkd")


def rows_of(batch: Mapping[str, Tensor]) -> Iterator[Row]:
    """Each row alone, its padding cut away."""
    for index, mask in enumerate(batch["attention_mask"].bool()):
        yield {
            key: value[index][mask][None] if value.shape == batch["attention_mask"].shape else value[index : index + 1]
            for key, value in batch.items()
        }


def target_of(logits: Tensor, row: Row, target: str) -> tuple[Tensor, int]:
    """y of one row and its number of predictions, written out."""
    labels = row["labels"][0]
    if labels.is_floating_point():
        signs = {"log_prob": 2 * labels - 1, "logit": 2 * labels - 1, "predicted_logit": logits[0].detach().sign()}
        if logits.shape[-1] == 1:
            return logits.sum(), 1
        values = signs[target] * logits[0]
        # log p of a label is log sigmoid(z) when it is there, and log sigmoid(-z) when it is not.
        return (F.logsigmoid(values) if target == "log_prob" else values).sum(), 1
    if labels.ndim == 0:
        pairs = [(logits[0], int(labels))]
    else:
        pairs = [(logits[0, t], int(labels[t + 1])) for t in range(len(labels) - 1) if labels[t + 1] != -100]
    values = []
    for z, label in pairs:
        named = int(z.argmax()) if target == "predicted_logit" else label
        values.append(z[named] - (z.exp().sum().log() if target == "log_prob" else z.mean()))
    return torch.stack(values).sum(), len(values)


def slow_scores(model: PreTrainedModel, batch: Mapping[str, Tensor], target: str, name: str) -> list[Tensor]:
    """`(1 / predictions) sum over positions` of an attribution, from one backward through the whole model a row.

    Of each of `LAYERS`.
    """
    model = model.double()
    totals, predictions = torch.zeros(len(LAYERS), 32, dtype=torch.float64), 0
    for row in rows_of(batch):
        outputs = model(**model_inputs(model, row), output_hidden_states=True)
        y, count = target_of(outputs.logits, row, target)
        states = [outputs.hidden_states[layer] for layer in LAYERS]
        for total, state, gradient in zip(totals, states, torch.autograd.grad(y, states), strict=True):
            total += torch.tensor(reference.attribution(gradient[0].numpy(), state[0].detach().numpy(), name)).sum(0)
        predictions += count
    return list(totals / predictions)


def batches_of(batch: Mapping[str, Any], size: int, order: list[int] | None = None) -> list[dict[str, Any]]:
    indices = torch.tensor(order if order is not None else range(len(batch["input_ids"])))
    return [{key: value[part] for key, value in batch.items()} for part in indices.split(size)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_A05_classifiers_agree_with_the_whole_graph_in_float64(model_type: str, target: str) -> None:
    model = tiny_model(model_type)
    batch = tiny_batch(model, rows=6)
    of_layers = score_units(model, batches_of(batch, 4), target=target, layer=LAYERS)
    expected = slow_scores(model, batch, target, "gradient")
    for layer, scores, values in zip(LAYERS, of_layers, expected, strict=True):
        assert_close(scores.values, values, dtype=torch.float32)
        assert (scores.num_predictions, scores.target) == (6, target)
        assert (scores.attribution, scores.layer) == ("gradient", layer)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("model_type", "tied"), CAUSAL)
def test_causal_models_agree_with_the_whole_graph_in_float64(model_type: str, tied: bool, target: str) -> None:
    model = tiny_model(model_type, "causal", tie_word_embeddings=tied)
    batch = tiny_batch(model)
    of_layers = score_units(model, batches_of(batch, 3), target=target, layer=LAYERS)
    # Labels of a row meet in one state below the head: gradients of up to 60, added in another order.
    for scores, expected in zip(of_layers, slow_scores(model, batch, target, "gradient"), strict=True):
        torch.testing.assert_close(scores.values, expected, rtol=2e-5, atol=1e-6)
        assert scores.num_predictions == int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("attribution", ["gradient", "gradient_x_activation", "fisher"])
@pytest.mark.parametrize(("model_type", "task"), [("bert", "classification"), ("llama", "causal")])
def test_attributions_agree_with_the_whole_graph(model_type: str, task: Any, attribution: str, layer: int) -> None:
    model = tiny_model(model_type, task)
    batch = tiny_batch(model)
    scores = score_units(model, [batch], attribution=attribution, layer=layer)
    expected = slow_scores(model, batch, "log_prob", attribution)[LAYERS.index(layer)]
    torch.testing.assert_close(scores.values, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("problem", "outputs"), [("multi_label_classification", 4), ("regression", 1)], ids=["multi_label", "regression"]
)
def test_independent_labels_and_values_agree_with_the_whole_graph(
    problem: str, outputs: int, target: str, layer: int
) -> None:
    model = tiny_model("roberta", problem_type=problem, num_labels=outputs)
    batch = tiny_batch(model, rows=5)
    scores = score_units(model, [batch], target=target, layer=layer)
    expected = slow_scores(model, batch, target, "gradient")[LAYERS.index(layer)]
    assert_close(scores.values, expected, dtype=torch.float32)
    # A value in a column of its own is the same label.
    if outputs == 1:
        columns = {**batch, "labels": batch["labels"][:, None]}
        assert_close(score_units(model.float(), [columns], target=target, layer=layer).values, scores.values)


def labels_of(problem: str, rows: int) -> Tensor:
    if problem == "single_label_classification":
        return torch.arange(rows) % 3
    return torch.arange(rows) / rows if problem == "regression" else torch.eye(3)[torch.arange(rows) % 3]


@pytest.mark.parametrize("attribution", [name for name in ATTRIBUTIONS if name != "random"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_rows_without_a_label_are_as_if_they_were_not_there(problem: str, layer: int, attribution: str) -> None:
    model = tiny_model("bert", problem_type=problem, num_labels=1 if problem == "regression" else 3)
    batch = {**tiny_batch(model, rows=6), "labels": labels_of(problem, 6)}
    kept = batches_of(batch, 9, [0, 2, 5])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][[1, 3, 4]] = -100 if problem == "single_label_classification" else float("nan")
    whole, part = (
        score_units(model, given, layer=layer, attribution=attribution) for given in (batches_of(batch, 4), kept)
    )
    assert_close(whole.values, part.values, dtype=torch.float32)
    assert whole.num_predictions == part.num_predictions == 3
    assert whole.effective_predictions == pytest.approx(part.effective_predictions, rel=1e-5)


def test_M01_batches_without_a_label_are_passed_over_and_none_at_all_is_an_error() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert_close(score_units(model, [empty, batch, empty]).values, score_units(model, [batch]).values)
    with pytest.raises(ScoreError, match="Give rows with labels"):
        score_units(model, [empty])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("control", ["activation", "variance"])
@pytest.mark.parametrize(("model_type", "task"), [("bert", "classification"), ("llama", "causal")])
def test_controls_look_at_the_states_alone(model_type: str, task: Any, control: str, layer: int) -> None:
    model = tiny_model(model_type, task)
    batch = tiny_batch(model)
    outputs = model(**model_inputs(model, batch), output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    if layer == -1:
        mask = torch.zeros_like(mask)
        if task == "causal":
            mask[:, :-1] = batch["labels"][:, 1:] != -100
        else:
            mask[:, 0] = True
    states = outputs.hidden_states[layer][mask].detach().double()
    scores = score_units(model, [batch], attribution=control, layer=layer)
    expected = {"activation": states.abs().sum(0) / scores.num_predictions, "variance": states.var(0, unbiased=False)}
    assert_close(scores.values, expected[control], dtype=torch.float32)


def test_F09_a_certain_prediction_counts_for_the_controls() -> None:
    model = tiny_model("bert")
    batch = {**tiny_batch(model), "labels": torch.zeros(4, dtype=torch.long)}
    with torch.no_grad():
        model.classifier.bias[0] = 300.0
    plain = {"attribution": "activation", "target": "logit"}
    assert_close(
        score_units(model, [batch], attribution="activation").values, score_units(model, [batch], **plain).values
    )


@pytest.mark.parametrize("task", ["classification", "causal"])
@pytest.mark.parametrize("attribution", ["gradient", "variance"])
def test_F10_batches_of_1_3_and_8_in_any_order_score_alike(task: Any, attribution: str) -> None:
    model = tiny_model("llama", task)
    batch = tiny_batch(model, rows=8)
    wide = {
        key: F.pad(value, (0, 6), value=-100 if key == "labels" else 0) if value.ndim == 2 else value
        for key, value in batch.items()
    }
    ways = [
        batches_of(batch, 8),
        batches_of(batch, 3),
        batches_of(batch, 1, [5, 3, 0, 7, 6, 1, 2, 4]),
        batches_of(wide, 3),
    ]
    found = [score_units(model, way, attribution=attribution, layer=[1, -1]) for way in ways]
    for other in found[1:]:
        for one, two in zip(other, found[0], strict=True):
            # Sums of other lengths round the states in other digits, which cancel in some gradients.
            torch.testing.assert_close(one.values, two.values, rtol=2e-5, atol=1e-6)
            assert one.num_predictions == two.num_predictions
            assert torch.equal(select_units(one, 8), select_units(two, 8))


def test_effective_predictions_are_kishs_number_of_the_rows() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model, rows=6)
    alone = [float(score_units(model, [row]).values.sum()) for row in batches_of(batch, 1)]
    assert score_units(model, [batch]).effective_predictions == pytest.approx(reference.kish(alone), rel=1e-5)


def test_a_teacher_is_scored_on_its_own_encoding() -> None:
    model = tiny_model("llama")
    own = tiny_batch(model, seed=1, length=7)
    batch = {**tiny_batch(model, seed=2), **{f"teacher_{k}": v for k, v in own.items()}, "example_id": ["a"] * 4}
    expected = score_units(model, [{**own, "labels": batch["labels"]}])
    assert torch.equal(score_units(model, [batch]).values, expected.values)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("model_type", "task"), [("bert", "classification"), ("llama", "causal")])
def test_F06_scores_under_no_grad_and_inference_mode_are_the_same(model_type: str, task: Any, layer: int) -> None:
    model = tiny_model(model_type, task).requires_grad_(False)
    batch = tiny_batch(model)
    expected = score_units(model, [batch], layer=layer).values
    for surroundings in (torch.no_grad(), torch.inference_mode()):
        with surroundings:
            made_inside = {key: value.clone() for key, value in batch.items()}
            assert torch.equal(score_units(model, [batch], layer=layer).values, expected)
            assert torch.equal(score_units(model, [made_inside], layer=layer).values, expected)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("model_type", "head", "norm"),
    [
        ("roberta", "classifier.dense", "roberta.encoder.layer.3.output.LayerNorm"),
        ("distilbert", "pre_classifier", "distilbert.transformer.layer.3.output_layer_norm"),
        ("llama", "score", "model.norm"),
        ("qwen2", "lm_head", "model.norm"),
    ],
)
def test_the_gradient_finds_exactly_the_planted_units_and_no_control_does(
    model_type: str, head: str, norm: str, target: str
) -> None:
    model = tiny_model(model_type, "causal" if head == "lm_head" else "classification")
    planted = [2, 9, 10, 21, 31]
    silent = torch.ones(32, dtype=torch.bool)
    silent[planted] = False
    with torch.no_grad():
        model.get_submodule(head).weight[:, silent] = 0
        # What nobody reads is loud, and what is read is nearly still.
        model.get_submodule(norm).weight[silent] = 20.0
        model.get_submodule(norm).weight[planted] = 0.1
    batches = [tiny_batch(model, rows=12, seed=seed) for seed in range(2)]
    scores = score_units(model, batches, target=target)
    assert torch.nonzero(scores.values).flatten().tolist() == select_units(scores, 5).tolist() == planted
    for control in ("activation", "variance", "random"):
        chosen = set(select_units(score_units(model, batches, attribution=control), 5).tolist())
        assert len(chosen & set(planted)) <= (2 if control == "random" else 0)
