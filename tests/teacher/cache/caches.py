"""Caches of tiny teachers: rows of a batch, requests, and teachers that count what they are asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Signal
from flexkd.core.outputs import TopRule
from flexkd.core.terms import LayerPair
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.writer import CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from tests.training.language_rows import answer_rows, collator_of

MADE_OF = {"teacher": "a", "tokenizer": "b"}


class Counting(LiveTeacher):
    """Keeps the ids of the rows that it is asked about, and breaks off after so many batches."""

    def __init__(self, model: PreTrainedModel, *, breaks_after: int | None = None) -> None:
        super().__init__(model)
        self.asked: list[list[str]] = []
        self.breaks_after = breaks_after

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        if self.breaks_after is not None and len(self.asked) > self.breaks_after:
            raise KeyboardInterrupt
        self.asked.append(list(batch["example_id"]))
        return super().signal(batch, request)


def request_of(
    units: Sequence[int] | None = (1, 5, 6, 30),
    positions: str = "tokens",
    *,
    top: TopRule | None = None,
    basis: Tensor | None = None,
    logits: bool = True,
    layer: int = -1,
) -> SignalRequest:
    """A request for predictions and these units of a layer; None: all units."""
    pair = (
        LayerPair(teacher_layer=layer, teacher_basis=basis)
        if units is None
        else LayerPair.of_units(torch.tensor(units), teacher_layer=layer)
    )
    return SignalRequest(logits, (pair,), positions, top)


def cache_of(
    folder: Path,
    teacher: LiveTeacher | PreTrainedModel,
    request: SignalRequest,
    rows: Sequence[Mapping[str, Any]] | None = None,
    *,
    storage: str = "float16",
    made_of: Mapping[str, str] = MADE_OF,
) -> CachedTeacher:
    """A cache of made-up answers, or of these rows."""
    live = LiveTeacher(teacher) if isinstance(teacher, PreTrainedModel) else teacher
    seq2seq = bool(live.model.config.is_encoder_decoder)
    rows = answer_rows(8, seq2seq=seq2seq) if rows is None else rows
    return CachePlan(live, request, rows, collator_of(live.model), storage).build(folder, made_of)
