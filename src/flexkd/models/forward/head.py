"""Language models split at the head: the states before it, and the head with what the model does to its output."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from flexkd.core.outputs import Head, HeadOutputs
from flexkd.core.tensors import has_storage
from flexkd.errors import UnsupportedModelError
from flexkd.facts.heads import logit_change
from flexkd.models.forward.hidden import (
    HEAD_INPUT,
    check_layout,
    hooked_states,
    states_and_logits,
    states_at,
    token_mask,
)
from flexkd.models.forward.modes import eval_mode

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of logits that rounding explains; in 16 bits it is 2 %."""

_PROVED_POSITIONS: Final = 16
"""Positions on which a head is checked; their logits are in memory together."""


def head_of(model: PreTrainedModel) -> Head:
    """The head of a language model, as its config describes it; `check_head` proves it on a batch."""
    module: Any = model.get_output_embeddings()
    weight, bias = (module.weight, module.bias) if _is_plain_linear(module) else (None, None)
    return Head(module, _finish(model), weight, bias)


def head_is_known(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, who: str) -> bool:
    """Whether `check_head` passes; where it does not, the log says that the model's logits are in memory whole.

    Args:
        who: Names the model in the log, as teacher or student.
    """
    try:
        check_head(model, inputs)
    except UnsupportedModelError as error:
        logger.info("%s: whole logits are in memory. %s", who, error)
        return False
    return True


def check_head(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Prove on the first tokens of a batch that `head_of` computes what the model computes.

    Raises:
        UnsupportedModelError: It does not: the model does something to its logits that no known config key describes.
    """
    if not all(has_storage(value) for value in inputs.values()):
        # A plan of a run has no numbers to compare.
        return
    row = {name: value[:1] for name, value in inputs.items()}
    real = token_mask(row)
    first_positions = real & (real.cumsum(1) <= _PROVED_POSITIONS)

    # A trainer may wrap the forward alone in autocast, so that it is on only inside it.
    def use(outputs: HeadOutputs) -> tuple[Tensor, bool]:
        return outputs[slice(None)], torch.is_autocast_enabled(first_positions.device.type)

    with eval_mode(model), torch.no_grad():
        expected = states_and_logits(model, row, (), positions=first_positions)[1]
        logits, is_autocast = states_before_head(model, row, (), positions=first_positions, use=use)[1]
    if _differ_by_rounding(model, logits, expected, is_autocast=is_autocast):
        return
    raise UnsupportedModelError(
        f"{type(model).__name__}: its logits are not what its head makes of the state before it, with any scale, cap "
        "or bias that is known. Switch the chunked logits off (training.logit_chunk: off)."
    )


def _differ_by_rounding(
    model: PreTrainedModel,
    logits: Float[Tensor, "rows made"],
    expected: Float[Tensor, "rows outputs"],
    *,
    is_autocast: bool,
) -> bool:
    if logits.shape != expected.shape:
        return False
    # What both rule out (-inf) is the same; the difference of two infinities is no number.
    differs = logits != expected
    logits, expected = logits.double().where(differs, 0), expected.double()
    size = expected.where(expected != -torch.inf, 0).norm().clamp(min=torch.finfo(torch.float64).tiny)
    gap = float((logits - expected.where(differs, 0)).norm() / size)
    return gap <= (2e-2 if is_autocast else _TOLERANCE.get(model.dtype, 2e-2))


def _is_plain_linear(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    # A subclass may compute in another way (adapters, packed weights), and a sharded weight is no whole one.
    return (
        _is_linear(module)
        and (type(weight) is nn.Parameter or not has_storage(weight))
        and weight.is_floating_point()
        and not nn.utils.parametrize.is_parametrized(module)
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear itself; FSDP puts a class of its own in front, which computes nothing else."""
    kinds = type(module).__mro__
    return kinds[0] is nn.Linear or (isinstance(module, FSDPModule) and kinds[2] is nn.Linear)


def _finish(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    change, bias = logit_change(model.config), _bias_beside(model)
    factor, cap = change.factor, change.cap
    if factor == 1.0 and cap is None and bias is None:
        return None

    def finish(logits: Tensor) -> Tensor:
        scaled = logits if factor == 1.0 else logits * factor
        capped = scaled if cap is None else torch.tanh(scaled / cap) * cap
        return capped if bias is None else capped + bias.to(capped)

    return finish


def _bias_beside(model: PreTrainedModel) -> Float[Tensor, "1 outputs"] | None:
    """The bias that BART and its descendants keep beside their head."""
    bias: Tensor | None = getattr(model, "final_logits_bias", None)
    return bias


def linear_head(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "outputs hidden"], Float[Tensor, " outputs"]] | None:
    """Weight and bias that make a model's logits from the state before its head; None where no linear map does."""
    head, change = head_of(model), logit_change(model.config)
    if head.weight is None or change.cap is not None:
        return None
    weight = head.weight.detach().float().cpu() * change.factor
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().float().cpu() * change.factor
    beside = _bias_beside(model)
    return weight, bias if beside is None else bias + beside.detach().float().cpu().flatten()


def states_before_head(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Iterable[int],
    *,
    positions: Bool[Tensor, "batch seq"] | Int[Tensor, " predictions"],
    use: Callable[[HeadOutputs], Result],
    forward: Callable[..., Any] | None = None,
) -> tuple[dict[int, Float[Tensor, "batch seq hidden"]], Result]:
    """One forward of a language model that computes the logits of one position only; see `hidden.states_and_logits`.

    Order of events: the hook before the head picks the states at `positions` and passes a single position on; the head
    runs on that; the hook behind the head removes both hooks and calls `use`, which may call the head again; the
    model's forward ends.

    Args:
        positions: Supervised positions, as in `states_at`.
        use: Called with the states of these positions and the head while the model's forward still runs, so that
            sharded or wrapped weights are gathered; its result is returned.
    """
    layers = list(layers)
    head_states: list[Tensor] = []
    results: list[Result] = []
    states: dict[int, Tensor] = {}
    head: nn.Module = model.get_output_embeddings()

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if HEAD_INPUT in layers:
            states[HEAD_INPUT] = args[0]
        head_states.append(states_at(args[0], positions))
        return (args[0][:1, :1], *args[1:])

    def after(*_: Any) -> None:
        # The head is called again from here.
        hooks.close()
        results.append(use(HeadOutputs(head_states[0], head_of(model))))

    with ExitStack() as hooks, hooked_states(model, dict.fromkeys(at for at in layers if at != HEAD_INPUT)) as below:
        hooks.callback(head.register_forward_pre_hook(before).remove)
        hooks.callback(head.register_forward_hook(after).remove)
        (model if forward is None else forward)(**inputs, use_cache=False)
    states.update(below)
    check_layout(model, inputs, states, layers)
    return states, results[0]
