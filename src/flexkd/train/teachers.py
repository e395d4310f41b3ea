"""The teacher of a recipe as it is loaded: its head, its adapter, its number type."""

from transformers import PreTrainedModel

from flexkd.models.adapters import load_adapter
from flexkd.models.language import load_language_model
from flexkd.models.loading import Labels, check_teacher_labels, load_classifier, load_config
from flexkd.recipe.model_sections import TeacherSection

_WHERE = "teacher.model"


def classifying_teacher(section: TeacherSection, labels: Labels, *, fine_tunes: bool) -> PreTrainedModel:
    """A classifier with its own head, or with a new one for these labels where it is to learn the task first.

    Raises:
        VocabularyError: It is not to learn, and speaks of other labels.
    """
    if section.fine_tune is not None and fine_tunes:
        base, _ = load_classifier(section.model, labels, seed=section.fine_tune.seed, where=_WHERE)
        return _adapted(base, section)
    config = load_config(section.model, where=_WHERE)
    if section.adapter is None:
        check_teacher_labels(config, labels)
        return load_classifier(section.model, dtype=None, where=_WHERE)[0]
    # PEFT keeps no names of classes: a head that the adapter brings is taken to know those of the data, in their order.
    if config.num_labels == len(labels.names):
        check_teacher_labels(config, labels)
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
