"""The loss of one micro-batch: the teacher's signal, the student's forward, and the objective of both."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from flexkd.core.objective import Objective, ObjectiveValue, PredictionValue, Signal
from flexkd.core.outputs import HeadOutputs
from flexkd.models.forward.chunks import LogitChunks
from flexkd.models.forward.hidden import is_generative, model_inputs
from flexkd.teacher.live import read_signal, student_columns
from flexkd.teacher.signal import SignalRequest, Teacher
from flexkd.training.micro_batches import MICRO_BATCH, MicroBatch


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of one micro-batch.

    Attributes:
        value: The objective, whose `loss` a backward starts from.
        student: The student's signal; without logits where these were made in chunks.
        makes_chunks: Whether logits were computed in chunks, as whole ones would be too large.
    """

    value: ObjectiveValue
    student: Signal
    makes_chunks: bool


class DistillationStep:
    """Computes the loss of micro-batches; it needs no Trainer, so that a plan can measure the code that trains.

    Args:
        student: The model whose loss is computed; the caller runs the backward.
        teacher: None where the objective reads none.
        objective: What is minimised.
        logit_chunk: As in `DistillationTrainer`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None,
        objective: Objective,
        *,
        logit_chunk: int | str = "auto",
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.request = SignalRequest.of(objective)
        self.chunks = LogitChunks(student, logit_chunk)
        # Made once: a cache looks up what a request reads when it meets the request for the first time.
        self._faded_request = replace(self.request, layers=())
        self._reads = tuple((pair.student_layer, student_columns(pair)) for pair in self.request.layers)

    def at(self, step: int, num_steps: int) -> "DistillationStep":
        """The same under the objective of one optimizer step; as in `Objective.at`."""
        objective = self.objective.at(step, num_steps)
        if objective is self.objective:
            return self
        now = copy(self)
        now.objective = objective
        if objective.features is None:
            now.request, now._reads = self._faded_request, ()
        return now

    def __call__(
        self, batch: Mapping[str, Any], *, is_training: bool, forward: Callable[..., Any] | None = None
    ) -> MicroBatchLoss:
        """The loss of one micro-batch, with a graph where gradients are on.

        Args:
            batch: From `prepare_step`.
            is_training: False for an evaluation, which also measures the plain nats of a language model.
            forward: As in `read_signal`: the student as it is wrapped for several processes or for autocast.
        """
        # Where logits are made in chunks, the order of events is not the order of the lines:
        #
        #   teacher.signal        the teacher's side of the batch
        #   student's forward     blocks: hooks keep the states of the feature term
        #                         head: runs on one position; its hook picks the states of all predictions
        #                         behind the head: `use` makes logits, losses and their gradients, chunk by chunk
        #   objective             adds the feature term to what `use` left in `predictions`
        #   backward, by caller   continues from the gradients of those states
        micro: MicroBatch = batch[MICRO_BATCH]
        labels, counts = micro.labels, micro.counts
        teacher = None
        if self.objective.needs_teacher:
            assert self.teacher is not None, "checked when the step was made"
            teacher = micro.counted(self.teacher.signal(batch, self.request))
        teacher_outputs = None if teacher is None else teacher.logits
        nll = is_generative(self.student) and not is_training
        chunk_size = self.chunks.size(batch, len(labels))
        predictions: list[PredictionValue] = []

        def use(states: HeadOutputs) -> None:
            predictions.append(
                self.objective.predictions(states, teacher_outputs, labels, counts, chunk_size=chunk_size, nll=nll)
            )

        student = read_signal(
            self.student,
            model_inputs(self.student, batch),
            micro.positions,
            self._reads,
            forward=forward,
            use=None if chunk_size is None else use,
        )
        student = micro.counted(student)
        if chunk_size is None:
            predictions.append(self.objective.predictions(student.logits, teacher_outputs, labels, counts, nll=nll))
        value = self.objective(student, teacher, labels, counts, predictions[0])
        return MicroBatchLoss(value, student, chunk_size is not None)
