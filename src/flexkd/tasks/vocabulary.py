"""Teacher, tokenizer and rows for students that know only some of the teacher's tokens."""

import logging
import statistics
from dataclasses import dataclass, replace
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.cut_tokenizers import cut_tokenizer, token_counts
from flexkd.data.encoding.vocabulary_cut import check_embedded
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.evaluate.classification import classification_metrics, predict
from flexkd.evaluate.inference import evenly_spaced
from flexkd.evaluate.likelihood import likelihoods
from flexkd.facts.families.table import TRAITS
from flexkd.facts.names import SPLITS
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.loading.pretrained import load_config
from flexkd.models.slicing.vocabulary import cut_vocabulary, named_ids
from flexkd.recipe import Recipe
from flexkd.tasks.opening import open_task
from flexkd.tasks.task import Task
from flexkd.vocabulary_record import VocabularyRecord

logger = logging.getLogger(__name__)

_VALIDATED_ROWS: Final = 128
_BATCH_SIZE: Final = 32


@dataclass(frozen=True)
class CutVocabulary:
    """What changes where students know some of the teacher's tokens.

    Attributes:
        teacher: Reads the students' ids, and predicts over the tokens that they know; shares its other weights with the
            whole teacher.
        tokenizer: Of teacher and students.
        task: The rows in those tokens.
        whole_task: The same rows in all tokens of the teacher.
        data: The rows of both.
        record: How many tokens there are, and how many a row takes.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task[Any]
    whole_task: Task[Any]
    data: ClassificationData | GenerationData
    record: VocabularyRecord


def cut_to_vocabulary(
    recipe: Recipe,
    data: ClassificationData | GenerationData,
    task: Task[Any],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> CutVocabulary:
    """Cut teacher and tokenizer to the tokens of `student.vocabulary`.

    Raises:
        VocabularyError: The teacher's vocabulary cannot be cut, or not to so few tokens.
    """
    check_embedded(tokenizer.get_vocab().values(), num_embedded_tokens(teacher))
    size, traits = recipe.student.vocabulary, TRAITS.get(teacher.config.model_type)
    # Where positions are counted from the padding's id, that id must stay.
    counts_padding = traits is not None and traits.positions == "after_padding"
    cut = cut_tokenizer(
        tokenizer,
        token_counts(task.encode().splits["train"], with_labels=isinstance(data, GenerationData)),
        size=size if isinstance(size, int) else None,
        required=_named_ids(recipe, teacher),
        required_below=1 + tokenizer.pad_token_id if counts_padding else 0,
    )
    cut_teacher = cut_vocabulary(teacher, cut.token_ids, num_tokens=1 + max(tokenizer.get_vocab().values()))
    cut_teacher.config.pad_token_id = cut.tokenizer.pad_token_id
    cut_task = _opened(recipe, data, cut.tokenizer, cut_teacher)
    missing = _missing_test_rows(task, cut_task)
    if missing:
        # All models are asked the same rows.
        tests: Any = tuple(example for example in data.test if example.id not in missing)
        data = replace(data, test=tests)
        task = _opened(recipe, data, tokenizer, teacher)
        cut_task = _opened(recipe, data, cut.tokenizer, cut_teacher)
    record = VocabularyRecord(
        tokens=len(cut.token_ids),
        teacher_tokens=len(tokenizer),
        tokens_a_row={split: _mean_length(cut_task, split) for split in SPLITS},
        teacher_tokens_a_row={split: _mean_length(task, split) for split in SPLITS},
        teacher_nll=_nats_a_row(recipe, cut_task, cut_teacher),
        whole_teacher_nll=_nats_a_row(recipe, task, teacher),
    )
    logger.info("%s", record.describe())
    return CutVocabulary(cut_teacher, cut.tokenizer, cut_task, task, data, record)


def _named_ids(recipe: Recipe, teacher: PreTrainedModel) -> set[int]:
    """Ids that the teacher's configs name, and that of a classifier with weights of its own, which reads by them."""
    size = teacher.config.get_text_config().vocab_size
    ids = named_ids(teacher.config, teacher.generation_config if teacher.can_generate() else None, size=size)
    if recipe.student.start == "config" and recipe.generation is None:
        assert recipe.student.model is not None, "checked by the recipe"
        ids |= named_ids(load_config(recipe.student.model, where="student.model"), size=size)
    return ids


def _opened(
    recipe: Recipe,
    data: ClassificationData | GenerationData,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
) -> Task[Any]:
    """The task of rows that teacher and students read with one tokenizer, after the check of the teacher's config."""
    task, _ = open_task(recipe, data, tokenizer, tokenizer, {"teacher": teacher.config})
    # A classifier may read the row's end by its id, which the task has to know.
    task.check_config("teacher", teacher.config)
    return task


def _missing_test_rows(whole: Task[Any], cut: Task[Any]) -> set[str]:
    """Ids of the test rows that fit the length limits in one of two splits into tokens alone."""
    first, second = (set(task.encode().ids("test")) for task in (whole, cut))
    missing = first ^ second
    if missing:
        logger.warning(
            "student.vocabulary: %d test rows fit data.max_length in one of the two splits into tokens alone, and are "
            "left out.",
            len(missing),
        )
    return missing


def _nats_a_row(recipe: Recipe, task: Task[Any], teacher: PreTrainedModel) -> float | None:
    """Mean negative log-likelihood of a validation row's label or answer; None for regression, or without rows."""
    encoded, precision = task.encode(), resolve_precision(recipe.teacher.precision)
    rows = evenly_spaced(encoded.splits["validation"], _VALIDATED_ROWS)
    batches = encoded.collated(rows, batch_size=_BATCH_SIZE)
    if not rows or recipe.task.problem == "regression":
        return None
    if recipe.generation is not None:
        return statistics.fmean(row.nll for row in likelihoods(teacher, batches, precision=precision))
    predictions = predict(teacher, batches, precision=precision, as_teacher=True)
    return classification_metrics(predictions.logits, predictions.labels, recipe.task.problem)["nll"]


def _mean_length(task: Task[Any], split: str) -> float:
    """Mean number of tokens of a row's input; for a decoder those of the answer are among them."""
    lengths = [len(row["input_ids"]) for row in task.encode().splits[split]]
    return statistics.fmean(lengths) if lengths else 0.0
