"""A model as it is asked for answers: in eval mode, without gradients, in a precision, and left as it was found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from flexkd.errors import RecipeError, unknown_name
from flexkd.models.modes import eval_mode

_DTYPES: Final = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def inference(model: PreTrainedModel, precision: str = "float32") -> Iterator[None]:
    """Within it the model is in eval mode and no gradient is kept; afterwards each module has its own mode again.

    Args:
        model: On any device, in any mode.
        precision: float32 runs the model as it is, bfloat16 and float16 under autocast.
    """
    if precision not in _DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, _DTYPES))
    dtype = _DTYPES[precision]
    with eval_mode(model), torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        yield


def row_ids(batch: Mapping[str, Any], start: int, rows: int) -> Sequence[str]:
    """The `example_id` of a batch's rows, or numbers from `start` on where it has none."""
    ids = batch.get("example_id")
    return ids if isinstance(ids, list | tuple) else [str(number) for number in range(start, start + rows)]
