"""The terms of an objective that read outputs: predictions against their labels and against the teacher's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexkd.core.losses.chunked import chunked_sums, weighted_sum
from flexkd.core.losses.logit import LogitLoss
from flexkd.core.outputs import HeadOutputs, Outputs, TopOutputs, entropies_of, predictions_at
from flexkd.core.tensors import graph_zero, num_processes
from flexkd.core.terms import LogitTerm, TaskTerm


@dataclass(frozen=True)
class StepCounts:
    """Divisors of one optimizer step, over all its micro-batches and processes, counted before the first backward.

    Attributes:
        predictions: T, all predictions of the step.
        positions: n, all chosen positions of the step.
        micro_positions: n_m, those of this micro-batch over all processes.
        distilled: Predictions of the step that the logit term is computed at; None: all of them.
    """

    predictions: int
    positions: int
    micro_positions: int
    distilled: int | None = None

    def of(self, part: str) -> int:
        """The number of predictions that a part of the loss is a mean over."""
        return self.predictions if self.distilled is None or not part.startswith("logits") else self.distilled


@dataclass(frozen=True)
class PredictionValue:
    """Task and logit terms of one micro-batch.

    Attributes:
        loss: This process's share of their weighted sum.
        parts: As in `ObjectiveValue`; on request with `nll_sum`, the nats of all labels without smoothing or weights.
        distilled: Indices of the predictions that the logit term was computed at; None: all of them.
    """

    loss: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    distilled: Int64[Tensor, " chosen"] | None = None


@dataclass(frozen=True)
class PredictionTerms:
    """Task and logit terms of an objective, for the predictions of one micro-batch.

    Attributes:
        task: None: no term reads the labels.
        logits: None: no term reads the teacher's outputs.
        registry: The functions of the logit losses, by name.
        nll: Whether the nats of the labels are measured besides.
    """

    task: TaskTerm | None
    logits: LogitTerm | None
    registry: Mapping[str, LogitLoss]
    nll: bool = False

    @property
    def are_none(self) -> bool:
        """Whether nothing reads the student's outputs."""
        return self.task is None and self.logits is None and not self.nll

    def value(
        self,
        student: Tensor | HeadOutputs,
        teacher: Outputs | None,
        labels: Tensor,
        counts: StepCounts,
        *,
        chunk_size: int | None = None,
    ) -> PredictionValue:
        """The terms of one micro-batch; arguments as in `Objective.predictions`.

        With an `entropy_share` the logit term is computed at the predictions of which the student is least certain.
        Their entropies are measured while the other terms are computed; the teacher's logits of all other predictions
        are never made.
        """
        term = self.logits
        num_distilled = None if term is None else term.num_distilled(len(labels))
        if term is None or num_distilled is None:
            return self._sums(student, teacher, labels, counts, chunk_size)
        entropies: list[Tensor] = []

        def watch(logits: Tensor) -> None:
            entropies.append(entropies_of(logits))

        others, learns = replace(self, logits=None), self.task is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns):
            first = student if learns else _detached(student)
            value = others._sums(first, None, labels, counts, chunk_size, watch=watch)
        # Without a prediction there is nothing to choose from.
        indices = torch.cat(entropies).topk(num_distilled).indices if num_distilled else labels[:0].long()
        assert teacher is not None, "the logit term reads it"
        distilled = replace(self, task=None, nll=False)._sums(
            predictions_at(student, indices), predictions_at(teacher, indices), labels[indices], counts, chunk_size
        )
        return PredictionValue(value.loss + distilled.loss, {**value.parts, **distilled.parts}, indices)

    def _sums(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: Tensor,
        counts: StepCounts,
        chunk_size: int | None,
        *,
        watch: Callable[[Tensor], None] | None = None,
    ) -> PredictionValue:
        """Sums over all predictions, divided by the counts.

        Args:
            watch: Called with the logits of each chunk, in order and without a graph.
        """
        # Each process holds its share of a sum over all predictions; DistributedDataParallel averages gradients.
        weights: dict[str, float] = {}
        if self.task is not None:
            weights["task"] = self.task.weight * _share(counts, "task")
        if self.logits is not None:
            weights["logits"] = self.logits.weight * self.logits.scale * _share(counts, "logits")
        if self.nll:
            weights["nll_sum"] = 0.0

        def terms(logits: Tensor, chunk: slice) -> Tensor:
            if watch is not None:
                watch(logits.detach())
            return self._terms(logits, None if teacher is None else teacher[chunk], labels[chunk])

        assert isinstance(student, Tensor | HeadOutputs), "a student has all its outputs"
        device = student.states.device if isinstance(student, HeadOutputs) else student.device
        factors = torch.tensor(list(weights.values()), dtype=torch.float32).to(device, non_blocking=True)
        if isinstance(student, HeadOutputs):
            loss, sums = chunked_sums(student, terms, factors, chunk_size=chunk_size or max(len(student), 1))
        else:
            values = terms(student, slice(None)).sum(-1)
            loss, sums = weighted_sum(factors, values) + graph_zero((student,)), values.detach()
        parts: dict[str, Tensor] = {}
        for (name, weight), value in zip(weights.items(), sums, strict=True):
            if name == "nll_sum":
                parts[name] = value
            else:
                parts |= {f"{name}_raw": value * _share(counts, name), f"{name}_weighted": value * weight}
        return PredictionValue(loss, parts)

    def _terms(
        self, student: Float[Tensor, "rows outputs"], teacher: Tensor | TopOutputs | None, labels: Tensor
    ) -> Float[Tensor, "terms rows"]:
        """Value of each term for each prediction, without weights."""
        values: list[Tensor] = []
        task, kd = self.task, self.logits
        if task and kd and task.is_plain and isinstance(teacher, TopOutputs) and kd.reads_raw_logits(student.shape[-1]):
            values.extend(kd.values_with_labels(self.registry, student, teacher, labels))
        else:
            if task is not None:
                values.append(task.values(student, labels))
            if kd is not None:
                assert teacher is not None
                values.append(kd.values(self.registry, student, teacher))
        if self.nll:
            values.append(TaskTerm().values(student.detach(), labels))
        return torch.stack(values) if values else student.new_zeros(0, len(student), dtype=torch.float32)


def _share(counts: StepCounts, part: str) -> float:
    return num_processes() / max(counts.of(part), 1)


def _detached(student: Tensor | HeadOutputs) -> Tensor | HeadOutputs:
    return replace(student, states=student.states.detach()) if isinstance(student, HeadOutputs) else student.detach()
