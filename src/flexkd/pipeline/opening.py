"""Tokenizers and task of a recipe, opened before any weights are loaded."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.answer_ends import ensure_end_token
from flexkd.data.encoding.tokenizers import same_tokenizer
from flexkd.data.encoding.vocabulary import check_largest_id, compare_vocabularies
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.evaluate.stopping import source_ends
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.kinds import check_kinds
from flexkd.models.loading.pretrained import load_tokenizer
from flexkd.recipe import Recipe
from flexkd.tasks.classification import ClassificationTask
from flexkd.tasks.generation import GenerationTask
from flexkd.tasks.task import Task

logger = logging.getLogger(__name__)


def load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The teacher's and the student's tokenizer; one object where both are the same."""
    teacher = load_tokenizer(recipe.teacher.tokenizer or recipe.teacher.model, where="teacher.tokenizer")
    if recipe.generation is not None:
        _ensure_end(teacher, recipe.teacher.model, "teacher.model")
    source = recipe.student.tokenizer or (recipe.student.model if recipe.student.start == "pretrained" else None)
    if source is None:
        return teacher, teacher
    student = load_tokenizer(source, where="student.tokenizer")
    if recipe.generation is not None:
        _ensure_end(student, recipe.student.model or recipe.teacher.model, "student.model")
    is_same = same_tokenizer(teacher, student) and teacher.chat_template == student.chat_template
    return teacher, teacher if is_same else student


def _ensure_end(tokenizer: PreTrainedTokenizerBase, source: str, where: str) -> None:
    """Give a tokenizer that names no end of text the one of its checkpoint."""
    note = ensure_end_token(tokenizer, source_ends(source, where=where)) if tokenizer.eos_token is None else None
    if note is not None:
        logger.warning("%s", note)


def open_task(
    recipe: Recipe,
    data: ClassificationData | GenerationData,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, PreTrainedConfig],
) -> tuple[Task[Any], list[str]]:
    """The task of a recipe over its rows, and what a reader has to know about the two vocabularies.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: The same object where both models read one encoding.
        configs: Of `teacher` and, where it is loaded or made from a config, `student`.

    Raises:
        UnsupportedModelError: One model is an encoder-decoder and the other is not.
        VocabularyError: The tokenizers have other tokens.
    """
    if isinstance(data, ClassificationData):
        return ClassificationTask(recipe, data, tokenizer, teacher_tokenizer), []
    kinds = {name: bool(config.is_encoder_decoder) for name, config in configs.items()}
    check_kinds(kinds)
    shared, notes = None, []
    if recipe.student.start == "pretrained" or tokenizer is not teacher_tokenizer:
        # A fresh student has as many outputs as its teacher, whatever tokenizer it reads with.
        student = "student" if recipe.student.start == "pretrained" else "teacher"
        sizes = [int(configs[name].get_text_config().vocab_size) for name in ("teacher", student)]
        vocabulary = compare_vocabularies(teacher_tokenizer, tokenizer, *sizes)
        shared = vocabulary.size if len({vocabulary.size, *sizes}) > 1 else None
        notes = [] if vocabulary.note is None else [vocabulary.note]
        for note in notes:
            logger.warning("%s", note)
    task = GenerationTask(recipe, data, tokenizer, teacher_tokenizer, seq2seq=kinds["teacher"], shared_outputs=shared)
    return task, notes


def check_ids(model: PreTrainedModel, splits: Mapping[str, Sequence[Mapping[str, Any]]], *, where: str) -> None:
    """Refuse rows with ids that a model has no embedding for.

    Raises:
        VocabularyError: The tokenizer is another model's.
    """
    largest = max(max(row["input_ids"]) for rows in splits.values() for row in rows)
    check_largest_id(largest, num_embedded_tokens(model), where=where)
