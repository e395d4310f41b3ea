"""A teacher that runs once on each row and remembers what it said."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexkd.core.objective import Signal
from flexkd.teacher.signal import SignalRequest, Teacher


@dataclass(frozen=True)
class Extents:
    """For each row of a batch, how many of its positions the features have, and how many predictions it makes."""

    features: list[int]
    predictions: list[int]


@dataclass(frozen=True)
class _Row:
    """The signal of one row: logits of its predictions, and the taught columns of its positions for each pair."""

    logits: Tensor | None
    features: tuple[Tensor, ...]


class RememberingTeacher:
    """Asks another teacher about rows it has not seen, and answers from memory afterwards.

    Rows are found by their `example_id`, never by order. A remembered state was computed in the batch in which the
    row was first seen; in half precision other padding rounds its last digits in another way.

    It serves one request: units, layers and positions are part of what is remembered.

    Args:
        teacher: Asked once for each row.
        request: What will be asked.
        extents: How many rows of a signal belong to each row of a batch.
    """

    def __init__(
        self, teacher: Teacher, request: SignalRequest, extents: Callable[[Mapping[str, Any]], Extents]
    ) -> None:
        self.teacher = teacher
        self._extents = extents
        self._key = request.key()
        self._request = request
        self._rows: dict[str, _Row] = {}

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        """The signal of a batch, as the other teacher would give it."""
        if request is not self._request:
            assert request.key() == self._key, "one memory serves one request"
            self._request = request
        ids: list[str] = batch["example_id"]
        if any(id_ not in self._rows for id_ in ids):
            signal = self.teacher.signal(batch, request)
            self._remember(ids, batch, request, signal)
            return signal
        return self._recall(ids, batch["input_ids"].device, request)

    def _remember(self, ids: list[str], batch: Mapping[str, Any], request: SignalRequest, signal: Signal) -> None:
        extents = self._extents(batch)
        features = [part.cpu().split(extents.features) for part in signal.features]
        whole = None if signal.logits is None else signal.logits[slice(None)]
        assert whole is None or isinstance(whole, Tensor), "remembers whole logits"
        logits = None if whole is None else whole.cpu().split(extents.predictions)
        for index, id_ in enumerate(ids):
            # Clones: a row must not keep the whole batch alive.
            self._rows[id_] = _Row(
                None if logits is None else logits[index].clone(), tuple(part[index].clone() for part in features)
            )

    def _recall(self, ids: list[str], device: torch.device, request: SignalRequest) -> Signal:
        rows = [self._rows[id_] for id_ in ids]
        logits = torch.cat([row.logits for row in rows if row.logits is not None]) if request.logits else None
        features = (torch.cat(parts).to(device) for parts in zip(*(row.features for row in rows), strict=True))
        return Signal(None if logits is None else logits.to(device), tuple(features))
