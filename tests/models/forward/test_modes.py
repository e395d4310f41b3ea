"""Modes of modules: each is as it was after every call that needs eval mode, whoever makes the call."""

import ast
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import LogitTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import ShapeError
from flexkd.evaluate.inference import inference
from flexkd.models.forward.head import check_head
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.forward.modes import eval_mode
from flexkd.scoring.frozen import frozen_eval
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.packing import packing_collator
from tests.source_tree import modules
from tests.tiny import tiny_batch, tiny_model
from tests.training.language_rows import answer_rows

REQUEST = SignalRequest.of(Objective(logits=LogitTerm()))


def within_frozen(model: PreTrainedModel) -> None:
    with frozen_eval(model):
        assert not any(module.training for module in model.modules())


def within_inference(model: PreTrainedModel) -> None:
    with inference(model):
        assert not any(module.training for module in model.modules())


CALLS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "teacher": lambda model: LiveTeacher(model).signal(tiny_batch(model), REQUEST),
    "head": lambda model: check_head(model, model_inputs(model, tiny_batch(model))),
    "packing": lambda model: packing_collator(Collator(0), {"teacher": model}, answer_rows(4)),
    "scores": within_frozen,
    "evaluation": within_inference,
}


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("call", CALLS)
def test_R08_every_module_has_its_own_mode_after_a_call(call: str) -> None:
    """A block in eval mode inside a model that trains, and the other way round."""
    for training in (True, False):
        model = tiny_model("llama", "causal", num_hidden_layers=2, attention_dropout=0.3).train(training)
        model.model.layers[1].train(not training)
        before = modes_of(model)
        CALLS[call](model)
        assert modes_of(model) == before


class Merging(nn.Module):
    """Does more in `train` than to set a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.merged = nn.Dropout(), False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)


def failing(model: Any) -> None:
    assert model[0].merged
    raise ShapeError


def test_R08_modes_are_restored_after_an_error_and_by_the_modules_own_switch() -> None:
    model = nn.Sequential(Merging(), nn.Dropout()).train()
    model[0].inner.eval()
    before = modes_of(model)
    with pytest.raises(ShapeError), eval_mode(model):
        failing(model)
    assert modes_of(model) == before
    assert not model[0].merged


def test_R08_modes_are_restored_in_one_place() -> None:
    for name, module in modules().items():
        stores = [
            node
            for node in ast.walk(module.tree())
            if isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Store)
        ]
        assert not stores or name == "flexkd.models.forward.modes", f"{module.where} sets a mode: use eval_mode"
