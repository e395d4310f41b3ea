"""The logit lens of a language model: its final norm and its head, applied to the output of any block."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.losses.lens import Lens
from flexkd.core.outputs import Head
from flexkd.core.tensors import has_storage
from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.head import check_head, head_of
from flexkd.models.forward.hidden import (
    HEAD_INPUT,
    is_causal,
    num_layers,
    states_and_logits,
    supervised_mask,
    token_mask,
)
from flexkd.models.forward.modes import eval_mode

_TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of states that rounding explains; in 16 bits it is 2 %."""


def lens_of(model: PreTrainedModel, *, learns: bool, shared_outputs: int | None = None) -> Lens:
    """The lens of a decoder.

    Args:
        learns: Whether gradients flow to its norm and head; those of a teacher have none, and stay where they are.
        shared_outputs: As in `LogitTerm`.

    Raises:
        UnsupportedModelError: It is no decoder, or the norm before its head is not known.
    """
    path = _norm_path(model)

    def norm(states: Tensor) -> Tensor:
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return _run_beside(model.get_submodule(path), states)

    def head() -> Head:
        whole = head_of(model)
        if learns:
            return whole
        module: Any = whole.module

        def frozen(states: Tensor) -> Tensor:
            with torch.no_grad():
                return _run_beside(module, states)

        return Head(frozen, whole.finish)

    return Lens(norm, head, int(model.config.get_text_config().vocab_size), shared_outputs)


def _norm_path(model: PreTrainedModel) -> str:
    family = FAMILIES.get(model.config.model_type)
    path = None if family is None or not is_causal(model) else family.final_norm
    if path is None or getattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) is None:
        raise UnsupportedModelError(
            f"objective.features.loss: 'distill_lens' reads the states of a block with the norm before the head, and "
            f"{type(model).__name__} is no decoder for which it is known. Use another loss, as cka."
        )
    return path


def _run_beside(module: nn.Module, states: Tensor) -> Tensor:
    """The module where its weights are and in their type; its result where the states are."""
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else states.dtype
    output: Tensor = module(states.to(weight.device, dtype))
    return output.to(states.device)


def check_lens(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
    """Prove on the first row of a batch that behind the last block the lens reads what the head reads.

    Raises:
        UnsupportedModelError: Something else lies between the last block and the head, or behind the head.
    """
    if not all(has_storage(value) for value in inputs.values()):
        # A plan of a run has no numbers to compare.
        return
    check_head(model, inputs)
    lens, row = lens_of(model, learns=False), {name: value[:1] for name, value in inputs.items()}
    last, positions = num_layers(model), supervised_mask(model, row, labels[:1])
    with eval_mode(model), torch.no_grad():
        states, _ = states_and_logits(model, row, (last, HEAD_INPUT), positions=positions)
        real = token_mask(row)
        expected = states[HEAD_INPUT][real].double()
        reading = lens.read(states[last][real], last).states.double()
    if reading.shape == expected.shape:
        gap = float((reading - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
        if gap <= _TOLERANCE.get(model.dtype, 2e-2):
            return
    raise UnsupportedModelError(
        f"objective.features.loss: 'distill_lens' needs a head that reads the final norm of the last block, and "
        f"{type(model).__name__} does more between the two. Use another loss, as cka."
    )
