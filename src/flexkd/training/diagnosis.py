"""Why a loss is infinite: the rows of a batch, and the outputs that only one of two models rules out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flexkd.core.losses.logit import LOGIT_LOSSES_BY_TASK
from flexkd.core.objective import Objective
from flexkd.core.outputs import Outputs, TopOutputs, at_top
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.facts.losses import LOGIT_LOSS_FACTS, TASK_LOSS_FACTS
from flexkd.models.forward.hidden import is_generative, model_inputs
from flexkd.teacher.live import counts_of_rows, read_signal
from flexkd.training.micro_batches import MICRO_BATCH, MicroBatch

_DIAGNOSED_AT_ONCE: Final = 64
_SHOWN: Final = 3


@dataclass(frozen=True)
class Impossible:
    """An output that one side rules out where the other does not.

    Attributes:
        prediction: Index of the prediction in the batch.
        output: Token or class; None: all of them, or all but the teacher's likeliest.
        reason: What each side predicts for it.
    """

    prediction: int
    output: int | None
    reason: str


def infinite_predictions(
    student: PreTrainedModel,
    objective: Objective,
    batch: Mapping[str, Any],
    answers: Outputs | None,
    terms: Collection[str],
    *,
    distilled: Int64[Tensor, " chosen"] | None,
    makes_chunks: bool,
) -> str:
    """Rows and outputs that make a term of a batch infinite, in words; "" if none is found.

    The student runs once more, without gradients, except where its weights are sharded: other processes would wait.

    Args:
        student: Before the optimizer's step.
        batch: On the device of the student, with its `MicroBatch`.
        answers: The teacher's outputs.
        terms: The infinite terms: `task`, `logits`.
        distilled: Indices of the predictions that entered the logit term; None: all of them.
        makes_chunks: Whether whole logits would be too large for the memory.
    """
    if any(isinstance(parameter, DTensor) for parameter in student.parameters()):
        return ""
    micro: MicroBatch = batch[MICRO_BATCH]
    impossible: list[Impossible] = []
    is_distilled = torch.full((len(micro.labels),), distilled is None, device=micro.labels.device)
    if distilled is not None:
        is_distilled[distilled] = True

    def look(outputs: Outputs) -> None:
        for first in range(0, len(micro.labels), _DIAGNOSED_AT_ONCE):
            part = slice(first, first + _DIAGNOSED_AT_ONCE)
            logits, teacher = outputs[part], None if answers is None else answers[part]
            assert isinstance(logits, Tensor), "a student has all its outputs"
            impossible.extend(
                Impossible(first + entry.prediction, entry.output, entry.reason)
                for entry in _impossible(
                    objective, logits.float(), teacher, micro.labels[part], is_distilled[part], terms
                )
            )

    with torch.no_grad():
        inputs = model_inputs(student, batch)
        use = look if makes_chunks else None
        signal = read_signal(student, inputs, micro.positions, (), use=use)
        if signal.logits is not None:
            look(signal.logits)
    return _in_words(impossible, _row_names(student, batch, micro), "token" if is_generative(student) else "class")


def _impossible(
    objective: Objective,
    logits: Tensor,
    teacher: Tensor | TopOutputs | None,
    labels: Tensor,
    is_distilled: Tensor,
    terms: Collection[str],
) -> list[Impossible]:
    impossible: list[Impossible] = []
    if objective.task is not None and "task" in terms:
        impossible += _of_labels(objective.task, logits, labels)
    if objective.logits is not None and teacher is not None and "logits" in terms:
        entries = _of_teacher(objective.logits, logits, teacher, objective.task_loss)
        impossible += [entry for entry in entries if is_distilled[entry.prediction]]
    return impossible


def _of_labels(task: TaskTerm, logits: Tensor, labels: Tensor) -> list[Impossible]:
    values = task.values(logits, labels)
    if not TASK_LOSS_FACTS[task.loss].is_distribution:
        return [Impossible(int(row), None, "its logits are not finite") for row in (~values.isfinite()).nonzero()]
    impossible = []
    for row in (~values.isfinite() & (labels != IGNORE_INDEX)).nonzero()[:, 0].tolist():
        label = int(labels[row])
        if float(logits[row, label]) == -torch.inf:
            impossible.append(Impossible(row, label, "is the label, and the student's logit is -inf"))
        elif task.label_smoothing and bool((logits[row] == -torch.inf).any()):
            blind = int((logits[row] == -torch.inf).nonzero()[0])
            impossible.append(
                Impossible(row, blind, "has a share of the smoothed label, and the student's logit is -inf")
            )
    return impossible


def _of_teacher(term: LogitTerm, logits: Tensor, teacher: Tensor | TopOutputs, loss: str) -> list[Impossible]:
    values = term.values(LOGIT_LOSSES_BY_TASK[loss], logits, teacher)
    student, other = _both_sides(term, logits, teacher, is_distribution=TASK_LOSS_FACTS[loss].is_distribution)
    reverse = LOGIT_LOSS_FACTS[term.loss].is_reverse or term.beta == 1
    blind, seeing, names = student, other, ("student", "teacher")
    if reverse:
        blind, seeing, names = other, student, ("teacher", "student")
    impossible = []
    for row in (~values.isfinite()).nonzero()[:, 0].tolist():
        gaps = ((blind[row] == 0) & (seeing[row] > 0)).nonzero()[:, 0]
        if not len(gaps):
            # One side is no distribution: it has NaN or inf among its logits.
            continue
        likeliest = int(gaps[seeing[row, gaps].argmax()])
        share = float(seeing[row, likeliest])
        output: int | None = likeliest
        if isinstance(teacher, TopOutputs):
            output = int(teacher.indices[row, likeliest]) if likeliest < teacher.indices.shape[1] else None
        reason = f"has no probability for the {names[0]} (a logit of -inf) and {share:.3g} for the {names[1]}"
        impossible.append(Impossible(row, output, reason))
    return impossible


def _both_sides(
    term: LogitTerm, logits: Tensor, teacher: Tensor | TopOutputs, *, is_distribution: bool
) -> tuple[Tensor, Tensor]:
    """Probabilities of student and teacher."""
    student = logits[..., : term.shared_outputs]
    if isinstance(teacher, TopOutputs):
        return at_top(student, teacher).exp(), teacher.categories().exp()
    sides = (student / term.temperature, teacher[..., : term.shared_outputs].float() / term.temperature)
    return tuple(logits.softmax(-1) if is_distribution else logits.sigmoid() for logits in sides)  # type: ignore[return-value]


def _row_names(student: PreTrainedModel, batch: Mapping[str, Any], micro: MicroBatch) -> list[str]:
    """The row of each prediction."""
    labels: Tensor = batch["labels"]
    names = [str(name) for name in batch.get("example_id", range(len(labels)))]
    if not is_generative(student):
        return names
    assert micro.positions.supervised is not None, "a language model predicts at its supervised positions"
    mask = torch.zeros(labels.numel(), dtype=torch.bool)
    mask[micro.positions.supervised.cpu()] = True
    counts = counts_of_rows(mask.reshape(labels.shape), batch)
    return [name for name, count in zip(names, counts, strict=False) for _ in range(count)]


def _in_words(impossible: list[Impossible], row_names: list[str], kind: str) -> str:
    if not impossible:
        return ""
    texts = []
    for entry in impossible[:_SHOWN]:
        output = "" if entry.output is None else f"{kind} {entry.output} "
        texts.append(f"row '{row_names[entry.prediction]}', prediction {entry.prediction}: {output}{entry.reason}")
    more = len(impossible) - len(texts)
    return "; ".join(texts) + (f"; and {more} more predictions" if more > 0 else "")
