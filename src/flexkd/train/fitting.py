"""Whether student, teacher, objective and batches speak of the same things, asked before anything is learnt."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.tensors import IGNORE_INDEX, can_be_read
from flexkd.data.vocabulary import check_largest_id
from flexkd.errors import DataError, RecipeError, ShapeError, UnsupportedModelError, VocabularyError
from flexkd.models.embeddings import num_embedded_tokens
from flexkd.models.hidden import TEACHER_PREFIX, is_encoder_decoder, is_generative
from flexkd.models.positions import is_rotary, position_limit
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import Teacher

logger = logging.getLogger(__name__)

LOSS_OF_PROBLEM: Final = {
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
    "regression": "mse",
}
"""The loss against labels that the config of a classifier stands for."""


def check_models(student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective) -> None:
    """Refuse models that do not predict the same things, as far as the objective compares them.

    Args:
        student: Of transformers.
        teacher: None where none runs, or none is read.
        objective: What is minimised.

    Raises:
        UnsupportedModelError: One writes text where the other classifies, or one of them alone has an encoder.
        VocabularyError: Other kinds of problems, other numbers of outputs, or the same labels in another order.
        RecipeError: The top of a classifier's outputs is asked for.
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
    expected = "cross_entropy" if problem is None else LOSS_OF_PROBLEM.get(problem, objective.task_loss)
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
    ours, theirs = _label_names(student), _label_names(teacher)
    folded = [name.casefold() for name in ours], [name.casefold() for name in theirs]
    if folded[0] != folded[1] and sorted(folded[0]) == sorted(folded[1]):
        raise VocabularyError(
            f"teacher: its labels are {theirs}, the student's {ours}: the same in another order. Make the student's "
            "head and labels in the teacher's order."
        )


def _label_names(config: PreTrainedConfig) -> list[str]:
    names: dict[Any, str] = config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(len(names))]


def check_vocabularies(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse language models with unequally many outputs.

    Raises:
        VocabularyError: Names both numbers.
    """
    ours, theirs = (config.get_text_config(decoder=True).vocab_size for config in (student, teacher))
    if ours != theirs:
        raise VocabularyError(
            f"teacher: has {theirs} outputs, the student {ours}. Name how many of the first are the same tokens in "
            "both (LogitTerm.shared_outputs), or take models of one vocabulary."
        )


def check_batch(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    where: str = "model",
    own: bool = False,
    loss: str | None = None,
) -> None:
    """Refuse a batch that a model cannot be read with; values are looked at while they are on the CPU.

    Args:
        model: Student or teacher.
        batch: As the collator made it.
        where: Names the model.
        own: Look at the teacher's own encoding (`teacher_input_ids`, ...) where there is one.
        loss: Against the labels; None: that of the model's problem.

    Raises:
        DataError: No labels, ids or rows, or a label that does not exist.
        ShapeError: Labels or mask of another shape than the rows.
        VocabularyError: A token that the model does not know.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"batch: is a {type(batch).__name__}. Give a list of mappings with input_ids and labels.")
    prefix = TEACHER_PREFIX if own and f"{TEACHER_PREFIX}input_ids" in batch else ""
    for name in (f"{prefix}input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            raise DataError(
                f"batch: no tensor '{name}' (it has {', '.join(batch) or 'nothing'}). Let the collator add it."
            )
    ids, labels = batch[f"{prefix}input_ids"], batch["labels"]
    mask = batch.get(f"{prefix}attention_mask")
    if mask is not None and mask.shape[:2] != ids.shape:
        raise ShapeError(
            f"batch: attention_mask is {list(mask.shape)} for ids of {list(ids.shape)}. Give one for each id."
        )
    by_token = is_generative(model) and not is_encoder_decoder(model)
    if labels.ndim == 0 or len(labels) != len(ids) or (by_token and labels.shape != ids.shape):
        raise ShapeError(
            f"batch: labels are {list(labels.shape)} for ids of {list(ids.shape)}. Give one for each "
            f"{'token' if by_token else 'row'}."
        )
    if not ids.numel():
        raise DataError(f"batch: its ids are {list(ids.shape)}, so that there is nothing to read. Leave it out.")
    if can_be_read(ids):
        _check_ids(model, ids, where)
    if can_be_read(labels) and not labels.is_floating_point():
        _check_labels(model, labels, where)
    if can_be_read(labels) and not is_generative(model):
        _check_numbers(labels, loss or LOSS_OF_PROBLEM.get(str(model.config.problem_type), ""))


def _check_ids(model: PreTrainedModel, ids: Tensor, where: str) -> None:
    if int(ids.min()) < 0:
        raise DataError(f"batch: the id {int(ids.min())} is no token. Give ids from 0; {IGNORE_INDEX} is for labels.")
    check_largest_id(int(ids.max()), num_embedded_tokens(model), where=where)
    config = model.config.get_text_config(decoder=True).to_dict()
    limit = None if is_rotary(config) else position_limit(config)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(
            f"batch: rows of {ids.shape[1]} tokens for {where}, which has {limit} positions. Cut them (truncation of "
            "the tokenizer)."
        )


def _check_numbers(labels: Tensor, loss: str) -> None:
    """Labels that are numbers are finite, and those that are there or not lie between 0 and 1; NaN is none."""
    if loss not in ("binary_cross_entropy", "mse"):
        return
    known = labels[~labels.isnan()]
    wrong = known.isinf() | ((known < 0) | (known > 1) if loss == "binary_cross_entropy" else False)
    if bool(wrong.any()):
        limits = ", 0 (absent) to 1 (present)" if loss == "binary_cross_entropy" else ""
        raise DataError(
            f"batch: the label {known[wrong][0].item():g} is none of '{loss}'. Give finite numbers{limits}, and NaN "
            "where there is none."
        )


def _check_labels(model: PreTrainedModel, labels: Tensor, where: str) -> None:
    """Whole numbers: classes, tokens, or independent labels of 0 and 1."""
    config: Any = model.config
    outputs: int = config.get_text_config(decoder=True).vocab_size if is_generative(model) else config.num_labels
    if not is_generative(model) and (outputs == 1 or labels.ndim > 1):
        return
    known = labels[labels != IGNORE_INDEX]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < outputs:
        wrong = int(known.min()) if int(known.min()) < 0 else int(known.max())
        raise DataError(
            f"batch: the label {wrong} does not exist: {where} has the labels 0 to {outputs - 1} ({IGNORE_INDEX} for "
            "none). Number the classes from 0, or give a head with more of them."
        )


class BatchCheck:
    """Of a trainer: `check_models` when it is made, `check_batch` for all that its models read.

    Where padding is read as text there is one warning.

    Args:
        student: Of transformers.
        teacher: Looked at where it is a model that runs.
        objective: What is minimised.

    Raises:
        UnsupportedModelError, VocabularyError: As `check_models`.
    """

    def __init__(self, student: PreTrainedModel, teacher: Teacher | None, objective: Objective) -> None:
        runs = teacher.model if isinstance(teacher, LiveTeacher) and objective.needs_teacher else None
        check_models(student, runs, objective)
        self.student, self.teacher = student, runs
        # Labels that no term reads may be anything.
        self._loss = "none" if objective.task is None else objective.task_loss
        self._is_first = True

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Look at one batch.

        Raises:
            FlexKDError: As `check_batch`.
        """
        check_batch(self.student, batch, where="student", loss=self._loss)
        if self.teacher is not None:
            check_batch(self.teacher, batch, where="teacher", own=True, loss=self._loss)
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
    # Where it is the end of a text as well, a row may end in it.
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or not ids.numel():
        return False
    return bool((ids[:, [0, -1]] == pad).any())
