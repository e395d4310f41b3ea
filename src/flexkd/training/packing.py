"""Packing the rows of a batch into one sequence, after a test that no model lets them attend to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.errors import RecipeError
from flexkd.models.forward.hidden import is_causal, model_inputs, states_and_logits, supervised_mask
from flexkd.models.forward.kinds import packing_error
from flexkd.models.forward.modes import eval_mode

_TESTED_ROWS: Final = 4


def packing_collator(
    collator: Collator,
    models: Mapping[str, PreTrainedModel],
    rows: Sequence[EncodedRow],
    *,
    precision: torch.dtype | None = None,
) -> Collator:
    """A collator that packs, after a test that every model gives the same logits for some rows packed and unpacked.

    Args:
        collator: The collator that pads these rows.
        models: Models by their name in messages.
        rows: The first few are tested.
        precision: Autocast to this type, as training does.

    Raises:
        RecipeError: A model is no decoder, or its attention does not keep packed rows apart.
    """
    packing = replace(collator, packed=True)
    tested_rows = list(islice((row for row in rows if len(row["input_ids"]) > 1), _TESTED_ROWS))
    for name, model in models.items():
        if not is_causal(model):
            raise packing_error(name, type(model).__name__)
        padded, packed = (_logits(model, collate(tested_rows), precision) for collate in (collator, packing))
        gap = float((packed - padded).norm() / padded.norm())
        # Rows that are kept apart differ by rounding alone; rows that see each other differ in every digit.
        if not gap <= (1e-4 if precision is None and model.dtype in (torch.float32, torch.float64) else 2e-2):
            raise RecipeError(
                f"training.packing: the {name}, {type(model).__name__} with {model.config._attn_implementation} "
                f"attention, lets packed rows see each other (its logits differ by {gap:.1%}). Set it to false, or "
                "give a model whose attention goes by position_ids."
            )
    return packing


def _logits(model: PreTrainedModel, batch: Mapping[str, Any], precision: torch.dtype | None) -> Tensor:
    """Logits at all supervised positions, row by row, in eval mode."""
    batch = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    inputs = model_inputs(model, batch)
    autocast = torch.autocast(model.device.type, precision, enabled=precision is not None)
    with eval_mode(model), torch.no_grad(), autocast:
        positions = supervised_mask(model, inputs, batch["labels"])
        return states_and_logits(model, inputs, (), positions=positions)[1].double()
