"""States for loops of one's own: what transformers returns, and a proof that the last of them makes the logits."""

from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from flexkd import states
from flexkd.errors import ShapeError, UnsupportedModelError
from flexkd.models.forward.hidden import model_inputs
from tests.models.forward.test_hidden import every_causal_model, every_classifier, num_hooks
from tests.tiny import tiny_batch, tiny_model


@every_classifier
def test_the_states_of_a_classifier_are_those_of_its_blocks_and_the_last_makes_its_logits(model_type: str) -> None:
    model = tiny_model(model_type).train()
    inputs = model_inputs(model, tiny_batch(model))
    with states(model, [2, -1]) as read:
        logits = model(**inputs).logits
    assert read[-1].shape[:2] == inputs["input_ids"].shape
    (gradient,) = torch.autograd.grad(logits.sum(), read[-1], retain_graph=True)
    assert gradient.any()
    (gradient,) = torch.autograd.grad(read[-1].square().sum(), read[2])
    assert gradient.any()
    assert num_hooks(model) == 0
    assert model.training


@every_causal_model
def test_the_states_of_a_language_model_are_what_its_head_reads(model_type: str) -> None:
    model = tiny_model(model_type, "causal")
    inputs = model_inputs(model, tiny_batch(model))
    with states(model) as read:
        outputs = model(**inputs, output_hidden_states=True)
    assert torch.equal(read[-1], outputs.hidden_states[-1])


class BertThatSkips(BertForSequenceClassification):
    """Its logits read the embeddings too."""

    def forward(self, input_ids: Any = None, **inputs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **inputs)
        outputs.logits = outputs.logits + self.bert.embeddings(input_ids)[:, 0, :1]
        return outputs


def test_a_model_whose_logits_are_made_of_more_than_its_last_state_is_refused() -> None:
    model = BertThatSkips(tiny_model("bert").config).eval()
    inputs = model_inputs(model, tiny_batch(model))
    with pytest.raises(UnsupportedModelError, match=r"BertThatSkips: its logits .* or not of it alone"), states(model):
        model(**inputs)
    assert num_hooks(model) == 0
    with states(model, [1]) as read:
        model(**inputs)
    assert list(read) == [1]


def test_one_row_is_enough_for_the_proof_and_one_proof_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("distilbert")
    inputs = {name: value[:1] for name, value in model_inputs(model, tiny_batch(model)).items()}
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for expected in (3, 4):
        with states(model) as read:
            model(**inputs)
        assert len(calls) == expected
    assert not read[-1].isnan().any()


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ShapeError, match="has no layer 9"), states(tiny_model("bert"), [9]):
        pass
