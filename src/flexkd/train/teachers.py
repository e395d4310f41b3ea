"""The teacher of a recipe as it is loaded: its head, its adapter, its number type."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.data.labels import LabelSpace
from flexkd.data.teacher_labels import ModelLabels, model_labels, output_order
from flexkd.models.adapters import load_adapter
from flexkd.models.language import load_language_model
from flexkd.models.loading import load_classifier, load_config
from flexkd.recipe.model_sections import TeacherSection

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


def classifying_teacher(section: TeacherSection, labels: LabelSpace, *, fine_tunes: bool) -> PreTrainedModel:
    """A classifier with its own head, or with a new one for these labels where it is to learn the task first.

    Raises:
        VocabularyError: It is not to learn, and speaks of other labels.
    """
    if section.fine_tune is not None and fine_tunes:
        base, _ = load_classifier(section.model, labels, seed=section.fine_tune.seed, where=_WHERE)
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
