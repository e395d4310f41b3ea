"""Loading the classifiers of a run: heads, adapters, and labels in the order of the data."""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.data.examples.labels import LabelSpace
from flexkd.data.examples.teacher_labels import ModelLabels, OutputOrder, label_entries, model_labels, output_order
from flexkd.errors import VocabularyError
from flexkd.models.loading.adapters import load_adapter
from flexkd.models.loading.pretrained import fresh_classifier, label_settings, load_classifier, load_config
from flexkd.recipe.model_sections import TeacherSection
from flexkd.tasks.task import TEACHER_KEY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierLoader:
    """A `ModelLoader` of classifiers and regressors.

    Attributes:
        section: The recipe's teacher.
        labels: Labels of the data, which the head of every model gets.
    """

    section: TeacherSection
    labels: LabelSpace

    def load_teacher(self) -> PreTrainedModel:
        """The teacher with its own head, or with a new one for the labels of the data."""
        return classifying_teacher(self.section, self.labels)

    def load(
        self, source: str, *, where: str, seed: int = 0, own_head: bool = False
    ) -> tuple[PreTrainedModel, list[str]]:
        """A classifier with a head for the labels of the data, or with its own."""
        if own_head:
            return load_classifier(source, seed=seed, where=where)
        return learning_classifier(source, self.labels, seed=seed, where=where)

    def fresh(self, source: str, sizes: dict[str, int], *, seed: int) -> PreTrainedModel:
        """A classifier with random weights."""
        return fresh_classifier(source, self.labels, sizes, seed=seed)

    def make_ready(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Write the names of the labels."""
        for key, value in label_settings(self.labels).items():
            setattr(student.config, key, value)

    def notes_on_model(self, model: PreTrainedModel, *, where: str) -> tuple[str, ...]:
        """No notes: what is unusual about a classifier is reported when it is loaded."""
        return ()


def labels_of(config: PreTrainedConfig, *, where: str = TEACHER_KEY, source: str | None = None) -> ModelLabels:
    """The labels that a loaded config names.

    Raises:
        VocabularyError: They do not count from 0 without a gap.
    """
    return model_labels(label_entries(config), where=where, source=source or str(config.name_or_path))


def learning_classifier(
    source: str, labels: LabelSpace, *, seed: int = 0, where: str
) -> tuple[PreTrainedModel, list[str]]:
    """A classifier that will be trained on these labels; outputs that its head has for them keep their meaning.

    Returns:
        The model, and the names of its newly initialised weights.
    """
    model, fresh = load_classifier(source, labels, seed=seed, where=where)
    try:
        order = output_order(labels_of(load_config(source, where=where), where=where, source=source), labels)
    except VocabularyError:
        return model, fresh  # its head had other classes, and will learn those of the data
    if not order.is_same and not fresh:
        _reorder_head(model, order)
        logger.info("%s", order.note)
    return model, fresh


def _reorder_head(model: PreTrainedModel, order: OutputOrder) -> None:
    """Put the outputs of a classifier, which its last linear layer computes, in the order of the data's classes."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    if head.out_features != len(order.outputs):
        logger.warning("%s: its head starts with its classes in another order.", type(model).__name__)
        return
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[list(order.outputs)])


def classifying_teacher(section: TeacherSection, labels: LabelSpace) -> PreTrainedModel:
    """A classifier with its own head, or with a new one for these labels where it is to learn the task first.

    Raises:
        VocabularyError: It is not fine-tuned, and has other labels.
    """
    if section.fine_tune is not None:
        seed = section.fine_tune.seed
        if section.adapter is None:
            return learning_classifier(section.model, labels, seed=seed, where=TEACHER_KEY)[0]
        base, _ = load_classifier(section.model, labels, seed=seed, where=TEACHER_KEY)
        return load_adapter(base, section.adapter)
    if section.adapter is None:
        # The rows were given the teacher's order of classes when they were read.
        order = output_order(labels_of(load_config(section.model, where=TEACHER_KEY), source=section.model), labels)
        assert order.is_same, "rows are read in the order of the teacher's classes"
        return load_classifier(section.model, dtype=None, where=TEACHER_KEY)[0]
    base, lacking = load_classifier(section.model, labels, dtype=None, head="adapter", where=TEACHER_KEY)
    return load_adapter(base, section.adapter, brings=lacking)
