"""Language models are read without whole logits, and what is read is what whole logits say."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from flexkd.core.scores import ATTRIBUTIONS, TARGETS
from flexkd.models.forward import head
from flexkd.scoring import teacher_graph
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.tiny import VOCABULARY, TinyTask, tiny_batch, tiny_model

CHUNKS = [1, 3, 1000]
MODELS = [
    pytest.param("gemma2", "causal", {"num_hidden_layers": 2}, id="soft-cap"),
    pytest.param("granite", "causal", {"num_hidden_layers": 2}, id="scale"),
    pytest.param("bart", "seq2seq", {"encoder_layers": 1, "decoder_layers": 2}, id="bias"),
]


@pytest.fixture(autouse=True)
def _few_rows_are_meant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="flexkd")


def agree(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int] = CHUNKS, **options: Any
) -> None:
    """Scores from chunks are those from the logits that the model's own code makes."""
    batch = tiny_batch(model)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_graph, "head_is_known", lambda *_, who: False)
        whole = score_units(model, [batch], layer=[-1, 1], **options)
    for predictions in sizes:
        monkeypatch.setattr(teacher_graph, "CHUNK_SIZE", predictions)
        for one, two in zip(score_units(model, [batch], layer=[-1, 1], **options), whole, strict=True):
            # Gradients of up to 60 below the head, added in another order.
            torch.testing.assert_close(one.values, two.values, rtol=2e-5, atol=1e-6)
            assert one.num_predictions == two.num_predictions
            assert one.effective_predictions == pytest.approx(two.effective_predictions, rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("model_type", "task", "sizes"), MODELS)
def test_A01_chunked_scores_are_the_whole_ones(
    model_type: str, task: TinyTask, sizes: dict[str, int], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree(tiny_model(model_type, task, **sizes), monkeypatch, target=target)


@pytest.mark.parametrize("attribution", ATTRIBUTIONS)
def test_chunked_attributions_are_the_whole_ones(attribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", "causal", num_hidden_layers=2)
    agree(model, monkeypatch, sizes=[3], attribution=attribution)


class Adapted(nn.Module):
    """A head with a low-rank update beside it, whose weight alone is not what it applies."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, VOCABULARY, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.inner(states) + self.up(self.down(states))
        return output


@pytest.mark.parametrize("target", TARGETS)
def test_a_head_that_is_no_plain_matrix_is_run_as_a_module(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", "causal", tie_word_embeddings=False, num_hidden_layers=2)
    model.lm_head = Adapted(model.lm_head)
    agree(model, monkeypatch, sizes=[3], target=target)


def test_A01_logits_that_the_head_does_not_explain_are_taken_from_the_model() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)

    def twice(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    handle = model.register_forward_hook(twice)
    found = score_units(model, [batch])
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert_close(found.values, score_units(model, [batch]).values, dtype=torch.float32)


class Widest(TorchDispatchMode):
    """The most rows of logits in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        # The head's transposed weight has 32 rows.
        if isinstance(output, Tensor) and output.shape[-1:] == (VOCABULARY,) and output.shape[-2:] != (32, VOCABULARY):
            self.rows = max(self.rows, output.numel() // VOCABULARY)
        return output


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize(("model_type", "task", "sizes"), MODELS)
def test_no_more_logits_stand_in_memory_than_a_chunk(
    model_type: str, task: TinyTask, sizes: dict[str, int], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type, task, **sizes)
    batch = tiny_batch(model)
    monkeypatch.setattr(teacher_graph, "CHUNK_SIZE", 3)
    monkeypatch.setattr(head, "_PROVED_POSITIONS", 3)
    with Widest() as widest:
        scores = score_units(model, [batch], layer=layer)
    assert widest.rows == 3
    assert scores.num_predictions > 12


def test_at_the_head_no_block_has_a_graph() -> None:
    model = tiny_model("llama", "causal")
    seen: list[bool] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    score_units(model, [tiny_batch(model)])
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(("model_type", "task"), [("bert", "classification"), ("llama", "causal")])
def test_autocast_scores_lie_near_the_exact_ones(model_type: str, task: TinyTask) -> None:
    model = tiny_model(model_type, task)
    batch = tiny_batch(model, rows=16)
    types: set[torch.dtype] = set()
    model.get_submodule(
        "classifier" if task == "classification" else "model.layers.0.mlp.up_proj"
    ).register_forward_hook(lambda _, __, output: types.add(output.dtype))
    exact = score_units(model, [batch], layer=[-1, 2])
    assert types == {torch.float32}
    for one, two in zip(score_units(model, [batch], layer=[-1, 2], precision=torch.bfloat16), exact, strict=True):
        # Eight bits of mantissa through four layers.
        assert 0 < float((one.values - two.values).norm() / two.values.norm()) < 2e-2
    assert types == {torch.float32, torch.bfloat16}


def test_the_teacher_gets_its_own_head_back() -> None:
    """The tied one, in its own type, after batches that were read with a head that is cast once."""
    model = tiny_model("llama", "causal", tie_word_embeddings=True)
    own = model.lm_head.weight
    score_units(model, [tiny_batch(model)] * 2, precision=torch.bfloat16)
    assert model.lm_head.weight is own is model.model.embed_tokens.weight
    assert own.dtype == torch.float32
