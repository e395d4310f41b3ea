"""Compiled blocks: the same states, losses and gradients, hooks that see what they saw, and nothing left behind."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.models.forward import compilation
from flexkd.models.forward.compilation import check_compiler, compiled_blocks
from flexkd.models.forward.hidden import HEAD_INPUT, hooked_states, model_inputs
from tests.closeness import assert_close
from tests.tiny import TinyTask, tiny_batch, tiny_model

# Dynamo looks at the gradient of every input: https://github.com/pytorch/pytorch/issues/138333
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

STILL: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 3},
    "gemma2": {"num_hidden_layers": 3},
    "t5": {"dropout_rate": 0.0, "num_layers": 1, "num_decoder_layers": 3},
}
CASES: list[tuple[str, TinyTask]] = [("bert", "classification"), ("gemma2", "causal"), ("t5", "seq2seq")]


def states_and_gradient(model: Any, length: int) -> tuple[dict[int, Tensor], Tensor]:
    """With a hook that reads one block and one that doubles the state behind another."""
    model.zero_grad()
    batch = tiny_batch(model, length=length, seed=length)
    with hooked_states(model, {2: None, 3: lambda state: 2 * state, HEAD_INPUT: None}) as states:
        logits = model(
            **model_inputs(model, batch), **({} if model.config.model_type == "bert" else {"use_cache": False})
        ).logits
    (logits.square().mean() + states[2].square().mean()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {layer: state.detach() for layer, state in states.items()}, torch.cat(gradients)


@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_hooks_see_compiled_blocks_as_they_see_plain_ones(model_type: str, task: TinyTask) -> None:
    model = tiny_model(model_type, task, **STILL[model_type]).train()
    expected = [states_and_gradient(model, length) for length in (9, 12)]
    names = set(model.state_dict())
    compiled: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    with compiled_blocks(model, backend=counting):
        found = [states_and_gradient(model, length) for length in (9, 12)]
    assert compiled
    for (states, gradient), (wanted, reference) in zip(found, expected, strict=True):
        assert states.keys() == wanted.keys() == {2, 3, HEAD_INPUT}
        for layer in wanted:
            assert_close(states[layer], wanted[layer])
        assert_close(gradient, reference)
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_blocks_is_not_compiled_in_silence() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="Linear: none of its modules is marked as a block"),
        compiled_blocks(torch.nn.Linear(2, 2)),
    ):
        pass


def test_a_machine_that_cannot_compile_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Any) -> Any:
        def run(_: Tensor) -> Tensor:
            raise OSError("No working C++ compiler found\nand much more")

        return run

    monkeypatch.setattr(compilation.torch, "compile", failing)
    message = "training.compile: torch cannot compile here (No working C++ compiler found). Set it to false"
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_compiler(torch.device("cpu"))
