"""Positions, labels and counts of micro-batches, computed for an optimizer step while its batches are on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Signal, StepCounts
from flexkd.core.tensors import num_processes
from flexkd.core.terms import LogitTerm
from flexkd.models.forward.hidden import model_inputs, prediction_labels
from flexkd.teacher.live import batch_positions
from flexkd.teacher.signal import PREFETCHED, BatchPositions, PrefetchingTeacher, SignalRequest, Teacher
from flexkd.training.row_sharing import ROUND

MICRO_BATCH: Final = "micro_batch"
"""Entry of a batch that `prepare_step` adds."""


@dataclass(frozen=True)
class MicroBatch:
    """What training reads of one batch.

    Attributes:
        positions: Positions of the student that are read, as indices.
        labels: One for each prediction.
        counts: Counts of the whole step, by which losses are divided.
        stands_in: Whether the batch has no row of this process, which only takes part because others wait for it.
    """

    positions: BatchPositions
    labels: Shaped[Tensor, " predictions *classes"]
    counts: StepCounts
    stands_in: bool = False

    def counted(self, signal: Signal) -> Signal:
        """The part of a model's signal that counts: nothing of a batch that stands in."""
        if not self.stands_in:
            return signal
        logits = None if signal.logits is None else signal.logits[:0]
        return Signal(logits, tuple(feature[:0] for feature in signal.features))


def prepare_step(
    student: PreTrainedModel,
    teacher: Teacher | None,
    batches: Sequence[Mapping[str, Any]],
    request: SignalRequest,
    device: torch.device,
    logits: LogitTerm | None = None,
) -> list[dict[str, Any]]:
    """All batches of one optimizer step on a device, each with its `MicroBatch`.

    Everything is counted where the batches are. With batches on the CPU this waits for no device, except for one sum
    over processes where there are several.

    Args:
        logits: The logit term, which may be computed at some predictions alone; None: there is none.
    """
    counted: list[tuple[BatchPositions, Tensor, bool]] = []
    for batch in batches:
        masks = batch_positions(student, model_inputs(student, batch), batch["labels"], request)
        labels = prediction_labels(student, batch["labels"], masks.supervised)
        stands_in = ROUND in batch and batch[ROUND].num_local == 0
        positions = masks.indices()
        counted.append((positions.empty(), labels[:0], True) if stands_in else (positions, labels, False))
    local = [
        (len(labels), _num_positions(positions.features), _num_distilled(logits, len(labels)))
        for positions, labels, _ in counted
    ]
    counts = _step_counts(local, device)
    moved = []
    for batch, (positions, labels, stands_in), count in zip(batches, counted, counts, strict=True):
        entries = {key: _moved(value, device) for key, value in batch.items()}
        entries[MICRO_BATCH] = MicroBatch(_moved(positions, device), _moved(labels, device), count, stands_in)
        if isinstance(teacher, PrefetchingTeacher):
            entries[PREFETCHED] = teacher.prefetch(batch, request)
        moved.append(entries)
    return moved


def _num_positions(positions: Tensor | None) -> int:
    return 0 if positions is None else len(positions)


def _num_distilled(logits: LogitTerm | None, predictions: int) -> int:
    number = None if logits is None else logits.num_distilled(predictions)
    return predictions if number is None else number


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor | BatchPositions) else value


def _step_counts(local: Sequence[tuple[int, int, int]], device: torch.device) -> list[StepCounts]:
    """Counts of the step, from the predictions, positions and distilled ones of each micro-batch of this process."""
    if num_processes() > 1 and local:
        summed = torch.tensor(local, device=device)
        dist.all_reduce(summed)
        local = summed.tolist()
    predictions, positions, distilled = (sum(column) for column in zip(*local, strict=True)) if local else (0, 0, 0)
    return [StepCounts(predictions, positions, micro_positions, distilled) for _, micro_positions, _ in local]
