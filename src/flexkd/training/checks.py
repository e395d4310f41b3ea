"""Whether student, teacher, objective and batches fit each other, checked before the first step."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.errors import RecipeError, UnsupportedModelError, VocabularyError
from flexkd.facts.losses import TASK_LOSS_OF_PROBLEM_TYPE
from flexkd.models.forward.hidden import is_encoder_decoder, is_generative
from flexkd.scoring.batches import check_batch
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher

logger = logging.getLogger(__name__)


def check_models(student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective) -> None:
    """Refuse models that do not predict the same things, as far as the objective compares them.

    Args:
        teacher: None where none runs, or none is read.

    Raises:
        UnsupportedModelError: One writes text where the other classifies, or one of them alone has an encoder.
        VocabularyError: Other kinds of problems, other numbers of outputs, or the same labels in another order.
        RecipeError: The objective reads the top of a classifier's outputs.
    """
    if objective.task is not None or objective.logits is not None:
        _check_problem("student", student, objective)
    if teacher is None or not objective.needs_teacher:
        return
    kinds = _kind(student), _kind(teacher)
    if kinds[0] != kinds[1]:
        raise UnsupportedModelError(
            f"teacher: {type(teacher).__name__} is {kinds[1]}, the student, {type(student).__name__}, {kinds[0]}, and "
            "their predictions cannot be compared. Give two models of one kind."
        )
    if objective.logits is None:
        return
    if not is_generative(student):
        if objective.logits.top_k is not None:
            raise RecipeError(
                f"objective.logits.top_k: {objective.logits.top_k} is only for models that write, not for "
                f"{type(student).__name__}. Leave it out."
            )
        check_label_spaces(student.config, teacher.config)
        _check_problem("teacher", teacher, objective)
    elif objective.logits.shared_outputs is None:
        check_vocabularies(student.config, teacher.config)


def _kind(model: PreTrainedModel) -> str:
    if not is_generative(model):
        return "a classifier"
    return "an encoder-decoder" if is_encoder_decoder(model) else "a decoder"


def _check_problem(name: str, model: PreTrainedModel, objective: Objective) -> None:
    problem = None if is_generative(model) else str(model.config.problem_type)
    expected = "cross_entropy" if problem is None else TASK_LOSS_OF_PROBLEM_TYPE.get(problem, objective.task_loss)
    if objective.task_loss != expected:
        what = "writes text" if problem is None else f"was made for {problem}"
        raise VocabularyError(
            f"objective.task.loss: '{objective.task_loss}', but the {name}, {type(model).__name__}, {what}, which is "
            f"learnt by '{expected}'. Give TaskTerm('{expected}'), with weight 0 where labels are not learnt."
        )


def check_label_spaces(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse classifiers whose outputs do not mean the same.

    Raises:
        VocabularyError: Another kind of problem, another number of labels, or the same names in another order.
    """
    problems = student.problem_type, teacher.problem_type
    if None not in problems and problems[0] != problems[1]:
        raise VocabularyError(
            f"teacher: was made for {problems[1]}, the student for {problems[0]}. Give both one problem_type, or leave "
            "out the logits term."
        )
    if student.num_labels != teacher.num_labels:
        raise VocabularyError(
            f"teacher: has {teacher.num_labels} labels, the student {student.num_labels}. Give both the same "
            "labels, or leave out the logits term."
        )
    student_names, teacher_names = _label_names(student), _label_names(teacher)
    folded = [name.casefold() for name in student_names], [name.casefold() for name in teacher_names]
    if folded[0] != folded[1] and sorted(folded[0]) == sorted(folded[1]):
        raise VocabularyError(
            f"teacher: its labels are {teacher_names}, the student's {student_names}: the same in another order. "
            "Make the student's head and labels in the teacher's order."
        )


def _label_names(config: PreTrainedConfig) -> list[str]:
    names: dict[Any, str] = config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(len(names))]


def check_vocabularies(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse language models with different numbers of outputs.

    Raises:
        VocabularyError: Names both numbers.
    """
    student_outputs = student.get_text_config(decoder=True).vocab_size
    teacher_outputs = teacher.get_text_config(decoder=True).vocab_size
    if student_outputs != teacher_outputs:
        raise VocabularyError(
            f"teacher: has {teacher_outputs} outputs, the student {student_outputs}. Name how many of the first are "
            "the same tokens in both (LogitTerm.shared_outputs), or take models of one vocabulary."
        )


class BatchCheck:
    """The checks of a trainer: `check_models` when it is created, `check_batch` for every batch.

    Warns once if padding is read as text.

    Args:
        teacher: Checked if it is a model that runs.

    Raises:
        UnsupportedModelError, VocabularyError: As `check_models`.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher | None, objective: Objective) -> None:
        runs = teacher.model if isinstance(teacher, LiveTeacher) and objective.needs_teacher else None
        check_models(student, runs, objective)
        self.student, self.teacher = student, runs
        # Labels that no term reads are not checked.
        self._loss = "none" if objective.task is None else objective.task_loss
        self._is_first = True

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Check one batch.

        Raises:
            FlexKDError: As `check_batch`.
        """
        check_batch(self.student, batch, where="student", loss=self._loss)
        if self.teacher is not None:
            check_batch(self.teacher, batch, where="teacher", as_teacher=True, loss=self._loss)
        if self._is_first and "attention_mask" not in batch and _ends_in_padding(self.student, batch["input_ids"]):
            logger.warning(
                "batch: no attention_mask, and rows end in the padding token %d: padding is read as text. Let the "
                "collator add the mask.",
                self.student.config.pad_token_id,
            )
        self._is_first = False


def _ends_in_padding(model: PreTrainedModel, ids: Tensor) -> bool:
    config = model.config.get_text_config(decoder=True)
    pad, ends = config.pad_token_id, config.eos_token_id
    # If the padding token is also the end of text, a row may rightly end in it.
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or not ids.numel():
        return False
    return bool((ids[:, [0, -1]] == pad).any())
