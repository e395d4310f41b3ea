"""Inference with any model: eval mode, precision, ids of rows, and selections of rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from flexkd.errors import DataError, RecipeError, unknown_name
from flexkd.models.forward.autocast import DTYPES, autocast_dtype
from flexkd.models.forward.modes import eval_mode
from flexkd.models.loading.int8 import computes_in_int8

Item = TypeVar("Item")


@contextmanager
def inference(model: PreTrainedModel, precision: str = "float32") -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in its former mode.

    Args:
        model: On any device, in any mode.
        precision: float32 runs the model as it is, bfloat16 and float16 under autocast; a copy in int8 always runs as
            it is.
    """
    if precision not in DTYPES:
        raise RecipeError(unknown_name("precision", "precision", precision, DTYPES))
    dtype = None if computes_in_int8(model) else autocast_dtype(precision)
    with eval_mode(model), torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        yield


def each_batch(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Iterate over batches.

    Raises:
        DataError: A single batch in place of a list of them.
    """
    if isinstance(batches, Mapping):
        raise DataError("batches: one mapping was given. Give a list of them, [batch].")
    yield from batches


def row_ids(batch: Mapping[str, Any], start: int, num_rows: int) -> Sequence[str]:
    """The `example_id` of each row of a batch; numbers from `start` on if the batch has none.

    Raises:
        DataError: The number of ids is not the number of rows.
    """
    ids = batch.get("example_id")
    if ids is None:
        return [str(number) for number in range(start, start + num_rows)]
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    if len(ids) != num_rows:
        raise DataError(f"batch: example_id names {len(ids)} rows of {num_rows}. Give one for each, or leave it out.")
    return [str(id_) for id_ in ids]


def evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items at equal distances, as a split may be sorted by its labels.

    Example:
        >>> evenly_spaced(["a", "b", "c", "d"], 2)
        ['a', 'c']
    """
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]
