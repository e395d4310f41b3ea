"""A teacher's signal in the number types in which a cache stores it, and what their rounding costs."""

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
"""Distance of the highest and the lowest int8 that are used, which stand for a column's largest and smallest value."""

SHORT_INDICES: Final = 2**16
"""Most outputs whose indices take two bytes."""
_TOGETHER: Final = 64
_OLD_NO_MASS: Final = -1e30


@dataclass(frozen=True)
class RoundingError:
    """Sums over stored predictions.

    Attributes:
        predictions: How many.
        held: Probability that the stored outputs hold at the rule's temperature.
        nats: KL(exact || rounded).
    """

    predictions: int = 0
    held: float = 0.0
    nats: float = 0.0

    def __add__(self, other: "RoundingError") -> "RoundingError":
        return RoundingError(self.predictions + other.predictions, self.held + other.held, self.nats + other.nats)


def stored_columns(values: Float[Tensor, "positions columns"], storage: str) -> dict[str, Tensor]:
    """Columns of states as they are stored, the positions of one batch.

    In int8 each column is standardised: the middle of its range becomes 0, and its range all 255 steps.

    Raises:
        ArtifactError: A value is not finite, or float16 cannot hold it.
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
    # Halves, for a range may be larger than any float.
    scale = (high / _STEPS - low / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    offset = high / 2 + low / 2
    steps = ((exact - offset) / scale).round().clamp(-_STEPS // 2, _STEPS // 2).to(torch.int8)
    return {"columns": steps, "scale": scale[None], "offset": offset[None]}


def stored_outputs(outputs: Outputs, *, writes_text: bool, vocabulary: int) -> tuple[dict[str, Tensor], RoundingError]:
    """Predictions as they are stored, and what is lost by it.

    A language model's are log-probabilities in float16: after the logsumexp is taken off, they are near 0 where it
    matters. A classifier has few outputs, which stay float32.

    Args:
        outputs: Of one batch.
        writes_text: Whether a language model made them.
        vocabulary: Outputs of the model; the type of an index hangs on it.
    """
    if isinstance(outputs, TopOutputs):
        return _stored_top(outputs, vocabulary)
    if not writes_text:
        exact = outputs[:].float().cpu()
        return {"logits": exact}, RoundingError(len(exact), float(len(exact)))
    parts, fidelity = [], RoundingError()
    for first in range(0, max(len(outputs), 1), _TOGETHER):
        some = outputs[first : first + _TOGETHER]
        assert isinstance(some, Tensor), "the top is stored as one"
        log_probs = some.float().cpu().log_softmax(-1)
        parts.append(_half(log_probs))
        nats = float(forward_kl(parts[-1].float(), log_probs).double().sum())
        fidelity += RoundingError(len(some), float(len(some)), nats)
    return {"log_probs": torch.cat(parts)}, fidelity


def _stored_top(top: TopOutputs, vocabulary: int) -> tuple[dict[str, Tensor], RoundingError]:
    log_probs, indices, log_tail = (one.cpu() for one in top.tensors())
    assert not indices.numel() or int(indices.max()) < vocabulary, "an index beyond the vocabulary"
    rounded = _half(log_probs)
    tail = log_tail.float()
    exact = torch.cat([log_probs.float(), tail[:, None]], 1)
    nats = forward_kl(torch.cat([rounded.float(), tail[:, None]], 1), exact).double().sum()
    held = float(log_probs.double().exp().sum())
    short = torch.uint16 if vocabulary <= SHORT_INDICES else torch.int32
    tensors = {"log_probs": rounded, "indices": indices.to(short), "log_tail": tail}
    return tensors, RoundingError(len(tail), held, float(nats))


def _half(log_probs: Tensor) -> Tensor:
    """In float16, where what is finite stays finite: -inf says that an output has no mass at all."""
    lowest = torch.finfo(torch.float16).min
    return torch.where(log_probs == -torch.inf, -torch.inf, log_probs.clamp(min=lowest)).half()


def read_tail(stored: Float[Tensor, " predictions"]) -> Float[Tensor, " predictions"]:
    """The log of the mass beside a top; older caches hold -1e30 where there is none."""
    return torch.where(stored <= _OLD_NO_MASS, -torch.inf, stored)


def stored_signal(
    signal: Signal, storage: str, *, writes_text: bool, vocabulary: int
) -> tuple[dict[str, Tensor], RoundingError]:
    """The tensors of one batch by the names that they have in a shard.

    Returns:
        Columns of each entry of the request's layers as `columns.N` (in int8 with `scale.N` and `offset.N`, one row),
        predictions as `logits` or `log_probs` (of the top with `indices` and `log_tail`); and what is lost.
    """
    tensors: dict[str, Tensor] = {}
    for index, feature in enumerate(signal.features):
        tensors |= {f"{name}.{index}": value for name, value in stored_columns(feature, storage).items()}
    if signal.logits is None:
        return tensors, RoundingError()
    outputs, fidelity = stored_outputs(signal.logits, writes_text=writes_text, vocabulary=vocabulary)
    return tensors | outputs, fidelity


def read_columns(read: Callable[[str], Tensor], index: int, units: Tensor | None) -> Float[Tensor, "positions columns"]:
    """Columns of one row in float32.

    Args:
        read: The row's part of a tensor by its name.
        index: Of the columns.
        units: Which of them; None: all.
    """
    chosen: Sequence[Tensor] = [read(f"columns.{index}")]
    if chosen[0].dtype == torch.int8:
        chosen = [*chosen, read(f"scale.{index}"), read(f"offset.{index}")]
    if units is not None:
        chosen = [one.index_select(-1, units) for one in chosen]
    values = chosen[0].float()
    return values if len(chosen) == 1 else values * chosen[1] + chosen[2]
