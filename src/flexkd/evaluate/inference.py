"""A model as it is asked for answers: in eval mode, without gradients, in a precision, and left as it was found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from flexkd.errors import DataError, RecipeError, unknown_name
from flexkd.models.forward.autocast import DTYPES, autocast_dtype
from flexkd.models.forward.modes import eval_mode


@contextmanager
def inference(model: PreTrainedModel, precision: str = "float32") -> Iterator[None]:
    """Within it the model is in eval mode and no gradient is kept; afterwards each module has its own mode again.

    Args:
        model: On any device, in any mode.
        precision: float32 runs the model as it is, bfloat16 and float16 under autocast.
    """
    if precision not in DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, DTYPES))
    dtype = autocast_dtype(precision)
    with eval_mode(model), torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        yield


def each_batch(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches.

    Raises:
        DataError: One mapping in the place of a list of them.
    """
    if isinstance(batches, Mapping):
        raise DataError("batches: one mapping was given. Give a list of them, [batch].")
    yield from batches


def row_ids(batch: Mapping[str, Any], start: int, rows: int) -> Sequence[str]:
    """The `example_id` of a batch's rows, or numbers from `start` on where it has none.

    Raises:
        DataError: Not one for each row.
    """
    ids = batch.get("example_id")
    if ids is None:
        return [str(number) for number in range(start, start + rows)]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    if len(ids) != rows:
        raise DataError(f"batch: example_id names {len(ids)} rows of {rows}. Give one for each, or leave it out.")
    return [str(one) for one in ids]
