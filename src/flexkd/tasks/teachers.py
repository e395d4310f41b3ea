"""The teacher of a recipe as it is loaded: its head, its adapter, its number type."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.data.examples.labels import LabelSpace
from flexkd.data.examples.teacher_labels import ModelLabels, OutputOrder, model_labels, output_order
from flexkd.errors import VocabularyError
from flexkd.models.loading.adapters import load_adapter
from flexkd.models.loading.language import load_language_model
from flexkd.models.loading.pretrained import load_classifier, load_config
from flexkd.recipe.model_sections import TeacherSection

logger = logging.getLogger(__name__)

_WHERE = "teacher.model"


def label_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config.json says of the labels, from a loaded config."""
    return {name: getattr(config, name, None) for name in ("architectures", "id2label", "problem_type")}


def labels_of(config: PreTrainedConfig, *, where: str = _WHERE, source: str | None = None) -> ModelLabels:
    """The labels that a loaded config speaks of.

    Raises:
        VocabularyError: They do not count from 0 without a gap.
    """
    return model_labels(label_entries(config), where=where, source=source or str(config.name_or_path))


def learning_classifier(
    source: str, labels: LabelSpace, *, seed: int = 0, where: str
) -> tuple[PreTrainedModel, list[str]]:
    """A classifier that is to learn these labels; what its own head knows of them by name stays right.

    Returns:
        The model, and the names of its newly initialised weights.
    """
    model, fresh = load_classifier(source, labels, seed=seed, where=where)
    try:
        order = output_order(labels_of(load_config(source, where=where), where=where, source=source), labels)
    except VocabularyError:
        return model, fresh  # it learns other classes than it knew
    if not order.is_same and not fresh:
        _reorder_head(model, order)
        logger.info("%s", order.note)
    return model, fresh


def _reorder_head(model: PreTrainedModel, order: OutputOrder) -> None:
    """Puts the outputs of a classifier, whose last linear layer makes them, in the order of the data's classes."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if head.out_features != len(order.outputs):
        logger.warning("%s: its head starts with its classes in another order.", type(model).__name__)
        return
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[list(order.outputs)])


def classifying_teacher(section: TeacherSection, labels: LabelSpace, *, fine_tunes: bool) -> PreTrainedModel:
    """A classifier with its own head, or with a new one for these labels where it is to learn the task first.

    Raises:
        VocabularyError: It is not to learn, and speaks of other labels.
    """
    if section.fine_tune is not None and fine_tunes:
        seed = section.fine_tune.seed
        if section.adapter is None:
            return learning_classifier(section.model, labels, seed=seed, where=_WHERE)[0]
        base, _ = load_classifier(section.model, labels, seed=seed, where=_WHERE)
        return _adapted(base, section)
    if section.adapter is None:
        # The rows took the teacher's order when they were read; here it is only made sure.
        order = output_order(labels_of(load_config(section.model, where=_WHERE), source=section.model), labels)
        assert order.is_same, "rows are read in the order of the teacher's classes"
        return load_classifier(section.model, dtype=None, where=_WHERE)[0]
    base, lacking = load_classifier(section.model, labels, dtype=None, head="adapter", where=_WHERE)
    return load_adapter(base, section.adapter, brings=lacking)


def language_teacher(section: TeacherSection, *, fine_tunes: bool) -> PreTrainedModel:
    """A language model in its own number type, or in float32 where it is to learn the task first."""
    if section.fine_tune is not None and fine_tunes:
        return _adapted(load_language_model(section.model, where=_WHERE), section)
    quantization = section.quantization
    return _adapted(load_language_model(section.model, dtype=None, quantization=quantization, where=_WHERE), section)


def _adapted(model: PreTrainedModel, section: TeacherSection) -> PreTrainedModel:
    return model if section.adapter is None else load_adapter(model, section.adapter)
