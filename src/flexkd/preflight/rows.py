"""The rows of a recipe, read and checked for its kind of task."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from flexkd.data.examples.classification import ClassificationData, load_classification
from flexkd.data.examples.generation import GenerationData, load_generation
from flexkd.data.examples.teacher_labels import ModelLabels, model_labels
from flexkd.data.sources.rows import TableReader, is_remote, joined_sources, read_table
from flexkd.data.sources.table import TextFormat
from flexkd.facts.names import SPLITS
from flexkd.facts.own_metrics import check_metric
from flexkd.preflight.model_files import is_classifier
from flexkd.recipe import Recipe

_TRIED_ROWS: Final = 256


def remote_sources(recipe: Recipe) -> dict[str, str]:
    """Splits whose rows are on the hub or not fetched yet, which cannot be read without a network."""
    sources = {split: getattr(recipe.data, split) for split in SPLITS}
    return {
        split: source
        for split, source in sources.items()
        if isinstance(source, str) and any(map(is_remote, joined_sources(source)))
    }


def teacher_labels(recipe: Recipe, config: Mapping[str, Any] | None) -> ModelLabels | None:
    """The classes of a teacher that is used as it is and has a head; the labels of the rows take their order.

    Args:
        recipe: Names the teacher.
        config: The teacher's config.json, or the attributes of its config; None where it is not on this machine.

    Raises:
        VocabularyError: The labels in its config are not numbered.
    """
    if config is None or recipe.task.type != "classification" or recipe.teacher.fine_tune is not None:
        return None
    is_adapted = recipe.teacher.adapter is not None
    if is_classifier(config):
        labels = model_labels(config, where="teacher.model", source=recipe.teacher.model)
        return replace(labels, may_be_replaced=is_adapted)
    # A config without a head has label names by default, which say nothing; an adapter may bring the head.
    return ModelLabels("teacher.adapter", str(recipe.teacher.adapter), (), may_be_replaced=True) if is_adapted else None


def check_own_metric(recipe: Recipe, data: ClassificationData | GenerationData) -> None:
    """Call the recipe's own metric, if it has one, on right answers and on equal answers to some validation rows.

    Raises:
        RecipeError: It raises, or gives something that cannot choose a checkpoint.
    """
    if isinstance(data, GenerationData):
        references = [list(example.references) for example in data.validation if example.references][:_TRIED_ROWS]
        check_metric(recipe.task.metric, references, [""] * len(references))
        return
    labels = [example.label for example in data.validation if example.label is not None][:_TRIED_ROWS]
    truth = np.asarray(labels, dtype=np.float64 if recipe.task.problem == "regression" else np.int64)
    check_metric(recipe.task.metric, truth, np.repeat(truth[:1], len(truth), axis=0))


def read_rows(
    recipe: Recipe, teacher: ModelLabels | None = None, *, reader: TableReader = read_table
) -> ClassificationData | GenerationData:
    """The rows of a recipe, wherever they are.

    Their order does not depend on `training.seed`: students of all seeds share one teacher and one set of scored rows.

    Args:
        recipe: Names the rows and the task.
        teacher: Classes of the teacher, from `teacher_labels`.
        reader: Reads a source.

    Raises:
        DataError: As `load_classification` and `load_generation`.
        VocabularyError: The classes of the rows are not the teacher's.
    """
    data = recipe.data
    text_format = TextFormat(data.separator, data.encoding)
    if recipe.task.type == "classification":
        return load_classification(
            train=data.train,
            validation=data.validation,
            test=data.test,
            text=data.text,
            text_pair=data.text_pair,
            label=data.label,
            problem=recipe.task.problem,
            label_names=data.label_names,
            teacher=teacher,
            where=data.where,
            bad_rows=data.bad_rows,
            unlabelled=data.unlabelled,
            max_rows=data.max_rows,
            text_format=text_format,
            reader=reader,
        )
    return load_generation(
        train=data.train,
        validation=data.validation,
        test=data.test,
        kind=recipe.task.type,
        prompt=data.prompt,
        context=data.context,
        response=data.response,
        messages=data.messages,
        document=data.document,
        summary=data.summary,
        group=data.group,
        where=data.where,
        bad_rows=data.bad_rows,
        max_rows=data.max_rows,
        text_format=text_format,
        reader=reader,
    )
