"""Quantization of a teacher's signal to the number types that a cache stores, and the error that rounding adds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from flexkd.core.losses.logit import forward_kl
from flexkd.core.objective import Signal
from flexkd.core.outputs import Outputs, TopOutputs
from flexkd.errors import ArtifactError

FLOAT16: Final = "float16"
INT8: Final = "int8"

_STEPS: Final = 254
"""Steps between the smallest and the largest int8 in use, which encode a column's smallest and largest value."""

SHORT_INDICES: Final = 2**16
"""Largest number of outputs whose indices take two bytes."""

PREDICTIONS_AT_ONCE: Final = 64
"""Predictions of a language model whose log-probabilities are in memory at the same time."""

_OLD_NO_MASS: Final = -1e30
"""Stands for -inf in caches of earlier versions."""


@dataclass(frozen=True)
class RoundingError:
    """Sums over stored predictions; the names of the attributes are keys of the manifest file.

    Attributes:
        predictions: Number of predictions.
        held: Probability that the stored outputs cover, at the temperature of `TopRule`.
        nats: KL(exact || rounded).
    """

    predictions: int = 0
    held: float = 0.0
    nats: float = 0.0

    def __add__(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(self.predictions + other.predictions, self.held + other.held, self.nats + other.nats)


def stored_columns(values: Float[Tensor, "positions columns"], storage: str) -> dict[str, Tensor]:
    """Quantized columns of states, for the positions of one batch.

    In int8 each column is scaled and shifted so that its range covers the 255 steps, with the middle at 0.

    Raises:
        ArtifactError: A value is not finite, or too large for float16.
    """
    exact = values.float().cpu()
    if storage == FLOAT16:
        rounded = exact.half()
        if not bool(rounded.isfinite().all()):
            raise ArtifactError(
                f"teacher.cache: a state holds {float(exact.abs().nan_to_num(nan=torch.inf).max()):g}, which float16 "
                "does not. Use teacher.cache_storage: int8, or teacher.cache: never."
            )
        return {"columns": rounded}
    if not bool(exact.isfinite().all()):
        raise ArtifactError("teacher.cache: a state is not finite. Run the teacher in float32.")
    low, high = (exact.amin(0), exact.amax(0)) if len(exact) else (exact.new_zeros(exact.shape[1]),) * 2
    # Divided before the subtraction: the range itself may be larger than any float.
    scale = (high / _STEPS - low / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    offset = high / 2 + low / 2
    steps = ((exact - offset) / scale).round().clamp(-_STEPS // 2, _STEPS // 2).to(torch.int8)
    return {"columns": steps, "scale": scale[None], "offset": offset[None]}


def stored_outputs(outputs: Outputs, *, writes_text: bool, vocabulary: int) -> tuple[dict[str, Tensor], RoundingError]:
    """Quantized predictions of one batch, and their rounding error.

    A language model's predictions are stored as log-probabilities in float16, which are near 0, and thus exact, for
    the likely tokens. A classifier has few outputs, which stay in float32.

    Args:
        outputs: Logits, or their top.
        writes_text: Whether they are those of a language model.
        vocabulary: Number of outputs of the model, which decides the type of indices.
    """
    if isinstance(outputs, TopOutputs):
        return _stored_top(outputs, vocabulary)
    if not writes_text:
        exact = outputs[:].float().cpu()
        return {"logits": exact}, RoundingError(len(exact), float(len(exact)))
    parts, rounding_error = [], RoundingError()
    for first in range(0, max(len(outputs), 1), PREDICTIONS_AT_ONCE):
        logits = outputs[first : first + PREDICTIONS_AT_ONCE]
        assert isinstance(logits, Tensor), "the top is stored as a whole"
        log_probs = logits.float().cpu().log_softmax(-1)
        parts.append(_half(log_probs))
        nats = float(forward_kl(parts[-1].float(), log_probs).double().sum())
        rounding_error += RoundingError(len(logits), float(len(logits)), nats)
    return {"log_probs": torch.cat(parts)}, rounding_error


def _stored_top(top: TopOutputs, vocabulary: int) -> tuple[dict[str, Tensor], RoundingError]:
    log_probs, indices, log_tail = (tensor.cpu() for tensor in top.tensors())
    assert not indices.numel() or int(indices.max()) < vocabulary, "an index beyond the vocabulary"
    rounded = _half(log_probs)
    tail = log_tail.float()
    exact = torch.cat([log_probs.float(), tail[:, None]], 1)
    nats = forward_kl(torch.cat([rounded.float(), tail[:, None]], 1), exact).double().sum()
    mass = float(log_probs.double().exp().sum())
    short = torch.uint16 if vocabulary <= SHORT_INDICES else torch.int32
    tensors = {"log_probs": rounded, "indices": indices.to(short), "log_tail": tail}
    return tensors, RoundingError(len(tail), mass, float(nats))


def _half(log_probs: Tensor) -> Tensor:
    """Log-probabilities in float16; finite values stay finite, as -inf means that an output has no mass at all."""
    lowest = torch.finfo(torch.float16).min
    return torch.where(log_probs == -torch.inf, -torch.inf, log_probs.clamp(min=lowest)).half()


def read_tail(stored: Float[Tensor, " predictions"]) -> Float[Tensor, " predictions"]:
    """Log of the probability outside the top; caches of earlier versions hold -1e30 where there is none."""
    return torch.where(stored <= _OLD_NO_MASS, -torch.inf, stored)


def stored_signal(
    signal: Signal, storage: str, *, writes_text: bool, vocabulary: int
) -> tuple[dict[str, Tensor], RoundingError]:
    """The quantized signal of one batch, by the names of the tensors in a shard.

    Returns:
        Columns of each pair of layers as `columns.N` (in int8 with `scale.N` and `offset.N`, one row each), predictions
        as `logits` or `log_probs` (for the top with `indices` and `log_tail`); and the rounding error of these.
    """
    tensors: dict[str, Tensor] = {}
    for index, feature in enumerate(signal.features):
        tensors |= {f"{name}.{index}": value for name, value in stored_columns(feature, storage).items()}
    if signal.logits is None:
        return tensors, RoundingError()
    outputs, rounding_error = stored_outputs(signal.logits, writes_text=writes_text, vocabulary=vocabulary)
    return tensors | outputs, rounding_error


def read_columns(read: Callable[[str], Tensor], index: int, units: Tensor | None) -> Float[Tensor, "positions columns"]:
    """Columns of one row in float32.

    Args:
        read: Returns the row's part of a tensor, by the tensor's name.
        index: Index of the columns in `CachedColumns.columns`.
        units: Which of the columns, by position; None: all.
    """
    parts: Sequence[Tensor] = [read(f"columns.{index}")]
    if parts[0].dtype == torch.int8:
        parts = [*parts, read(f"scale.{index}"), read(f"offset.{index}")]
    if units is not None:
        parts = [part.index_select(-1, units) for part in parts]
    values = parts[0].float()
    return values if len(parts) == 1 else values * parts[1] + parts[2]
