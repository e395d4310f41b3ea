"""Which blocks of a causal language model can be removed, by the loss that skipping them costs on labelled rows."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.errors import DataError, ShapeError, UnsupportedModelError
from flexkd.models.forward.families import family_of
from flexkd.models.forward.hidden import is_causal, model_inputs, prediction_labels, states_and_logits, supervised_mask
from flexkd.models.forward.modes import eval_mode
from flexkd.models.slicing.shape import shape_of


def layers_by_loss(
    teacher: PreTrainedModel, batches: Iterable[Mapping[str, Any]], num_layers: int, *, at_once: int = 1
) -> list[int]:
    """The blocks to keep when blocks are removed one by one, each time that without which the loss is lowest.

    What a block is worth depends on which others are left, so each round skips every remaining block in turn on top of
    those already removed. That takes about `(N^2 - num_layers^2) / 2` passes over the batches for N blocks: some dozen
    rows are enough. `slice_student` takes the result as `layers`.

    Args:
        batches: Labelled rows as in `score_units`.
        num_layers: Blocks to keep.
        at_once: Blocks removed in one round, those whose loss alone is lowest; more makes fewer passes.

    Returns:
        Numbers of the kept layers, counted from 1, ascending; of two alike the earlier one stays.

    Raises:
        ShapeError: The teacher has fewer blocks than num_layers.
        DataError: No row has a label.
        UnsupportedModelError: Not a causal language model.
    """
    if not is_causal(teacher):
        raise UnsupportedModelError(
            f"layers: {type(teacher).__name__} is no causal language model, and only its loss has been tried as a "
            "judge of blocks. Leave layers out."
        )
    total = shape_of(teacher.config).num_layers
    if not 1 <= num_layers <= total:
        raise ShapeError(f"layers: cannot keep {num_layers} of the teacher's {total}. Ask for 1 to {total}.")
    batches = list(batches)
    remaining = list(range(1, total + 1))
    while len(remaining) > num_layers:
        losses = skip_losses(teacher, batches, skipped=set(range(1, total + 1)) - set(remaining))
        candidates = sorted(remaining, key=lambda layer: (losses[layer - 1].item(), -layer))
        for layer in candidates[: min(at_once, len(remaining) - num_layers)]:
            remaining.remove(layer)
    return remaining


def skip_losses(
    teacher: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, skipped: Collection[int] = ()
) -> Float64[Tensor, " layers"]:
    """Loss in nats per label without each block: its input becomes its output.

    Args:
        batches: Labelled rows as in `score_units`.
        skipped: Layers, counted from 1, that are skipped in any case; their place holds the loss with these alone.

    Raises:
        DataError: No row has a label.
    """
    losses = []
    before = None
    for layer in range(1, shape_of(teacher.config).num_layers + 1):
        if layer in skipped:
            before = _loss(teacher, batches, skipped) if before is None else before
            losses.append(before)
        else:
            losses.append(_loss(teacher, batches, {*skipped, layer}))
    return torch.tensor(losses, dtype=torch.float64)


def _loss(teacher: PreTrainedModel, batches: Sequence[Mapping[str, Any]], skipped: Collection[int]) -> float:
    total, count = 0.0, 0
    with eval_mode(teacher), torch.no_grad(), _skipping(teacher, skipped):
        for batch in batches:
            inputs = {name: value.to(teacher.device) for name, value in model_inputs(teacher, batch).items()}
            labels = batch["labels"].to(teacher.device)
            positions = supervised_mask(teacher, inputs, labels)
            _, logits = states_and_logits(teacher, inputs, (), positions=positions)
            total += F.cross_entropy(
                logits.float(), prediction_labels(teacher, labels, positions), reduction="sum"
            ).item()
            count += int(positions.sum())
    if count == 0:
        raise DataError("layers: no row of the calibration batches has a label. Give labelled rows.")
    return total / count


@contextmanager
def _skipping(teacher: PreTrainedModel, skipped: Collection[int]) -> Iterator[None]:
    """Within the context the blocks return their input; they still run, since they may keep a cache."""
    family = family_of(teacher)

    def pass_input_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return state if isinstance(output, Tensor) else (state, *output[1:])

    hooks = []
    try:
        for layer in skipped:
            block = teacher.get_submodule(family.block_path(layer - 1))
            hooks.append(block.register_forward_hook(pass_input_on, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
