"""The task of a recipe on its rows, for the tokenizers of its models."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flexkd.data.encoding.vocabulary import compare_vocabularies
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.models.forward.kinds import check_kinds
from flexkd.preflight import check_own_metric
from flexkd.recipe import Recipe
from flexkd.tasks.classification import ClassificationTask
from flexkd.tasks.generation import GenerationTask
from flexkd.tasks.task import Task

logger = logging.getLogger(__name__)


def open_task(
    recipe: Recipe,
    data: ClassificationData | GenerationData,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, PreTrainedConfig],
) -> tuple[Task[Any], list[str]]:
    """The task of a recipe on its rows, and notes on the two vocabularies.

    Args:
        tokenizer: The student's.
        teacher_tokenizer: The teacher's; the same object where both models read one encoding.
        configs: Configs of `teacher` and, where the recipe names a model for it, `student`.

    Raises:
        UnsupportedModelError: One model is an encoder-decoder and the other is not.
        VocabularyError: The tokenizers have other tokens.
        RecipeError: The metric is the user's own, and cannot be used.
    """
    check_own_metric(recipe, data)  # rows of the hub are read here first
    if isinstance(data, ClassificationData):
        return ClassificationTask(recipe, data, tokenizer, teacher_tokenizer), []
    kinds = {name: bool(config.is_encoder_decoder) for name, config in configs.items()}
    check_kinds(kinds)
    shared, notes = None, []
    if recipe.student.start == "pretrained" or tokenizer is not teacher_tokenizer:
        # A student that is not pretrained has as many outputs as its teacher, whatever tokenizer it reads with.
        student = "student" if recipe.student.start == "pretrained" else "teacher"
        sizes = [int(configs[name].get_text_config().vocab_size) for name in ("teacher", student)]
        vocabulary = compare_vocabularies(teacher_tokenizer, tokenizer, *sizes)
        shared = vocabulary.size if len({vocabulary.size, *sizes}) > 1 else None
        notes = [] if vocabulary.note is None else [vocabulary.note]
        for note in notes:
            logger.warning("%s", note)
    task = GenerationTask(recipe, data, tokenizer, teacher_tokenizer, seq2seq=kinds["teacher"], shared_outputs=shared)
    return task, notes
