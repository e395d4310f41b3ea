"""Checks of a batch: whether ids, labels and masks fit each other and the model that reads them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.tensors import IGNORE_INDEX, can_be_read
from flexkd.data.encoding.vocabulary import check_largest_id
from flexkd.errors import DataError, ShapeError
from flexkd.facts.losses import TASK_LOSS_FACTS, TASK_LOSS_OF_PROBLEM_TYPE
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.hidden import is_encoder_decoder, is_generative
from flexkd.models.forward.positions import has_soft_limit, position_limit


def check_batch(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    where: str = "model",
    as_teacher: bool = False,
    loss: str | None = None,
) -> None:
    """Refuse a batch that does not fit a model; values are checked only in tensors on the CPU.

    Args:
        model: Student or teacher.
        batch: From the collator.
        where: Name of the model in messages.
        as_teacher: Check the teacher's own encoding (`teacher_input_ids`, ...) if the batch has one.
        loss: Name of the loss against the labels; None: that of the model's problem.

    Raises:
        DataError: No labels, ids or rows, or a label that does not exist.
        ShapeError: Labels or mask of another shape than the rows.
        VocabularyError: A token that the model does not know.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"batch: is a {type(batch).__name__}. Give a list of mappings with input_ids and labels.")
    prefix = TEACHER_PREFIX if as_teacher and f"{TEACHER_PREFIX}input_ids" in batch else ""
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
        _check_numbers(labels, loss or TASK_LOSS_OF_PROBLEM_TYPE.get(str(model.config.problem_type), ""))


def _check_ids(model: PreTrainedModel, ids: Tensor, where: str) -> None:
    if int(ids.min()) < 0:
        raise DataError(f"batch: the id {int(ids.min())} is no token. Give ids from 0; {IGNORE_INDEX} is for labels.")
    check_largest_id(int(ids.max()), num_embedded_tokens(model), where=where)
    config = model.config.get_text_config(decoder=True).to_dict()
    limit = None if has_soft_limit(config) else position_limit(config)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(
            f"batch: rows of {ids.shape[1]} tokens for {where}, which has {limit} positions. Cut them (truncation of "
            "the tokenizer)."
        )


def _check_numbers(labels: Tensor, loss: str) -> None:
    """Refuse values that are infinite, or outside of 0 to 1 for independent labels; NaN is a missing label."""
    if loss not in TASK_LOSS_FACTS or TASK_LOSS_FACTS[loss].is_distribution:
        return
    values = labels[~labels.isnan()]
    wrong = values.isinf() | ((values < 0) | (values > 1) if loss == "binary_cross_entropy" else False)
    if bool(wrong.any()):
        limits = ", 0 (absent) to 1 (present)" if loss == "binary_cross_entropy" else ""
        raise DataError(
            f"batch: the label {values[wrong][0].item():g} is none of '{loss}'. Give finite numbers{limits}, and NaN "
            "where there is none."
        )


def _check_labels(model: PreTrainedModel, labels: Tensor, where: str) -> None:
    """Refuse classes and tokens that do not exist."""
    config: Any = model.config
    outputs: int = config.get_text_config(decoder=True).vocab_size if is_generative(model) else config.num_labels
    if not is_generative(model) and (outputs == 1 or labels.ndim > 1):
        return
    classes = labels[labels != IGNORE_INDEX]
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < outputs:
        wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
        raise DataError(
            f"batch: the label {wrong} does not exist: {where} has the labels 0 to {outputs - 1} ({IGNORE_INDEX} for "
            "none). Number the classes from 0, or give a head with more of them."
        )
