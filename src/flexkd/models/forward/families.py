"""The row of the families table that describes a model, and the task that the model is built for."""

from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.row import CLASS_SUFFIXES, WHAT_TO_DO, Family, Task
from flexkd.facts.families.table import FAMILIES


def family_of(model_or_config: PreTrainedModel | PreTrainedConfig) -> Family:
    """The row of a model's architecture.

    Raises:
        UnsupportedModelError: No row has this model_type.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"models.families: no row for model_type '{config.model_type}'. Known: {', '.join(sorted(FAMILIES))}. "
            f"{WHAT_TO_DO}."
        )
    return family


def task_of(model: PreTrainedModel) -> Task:
    """The task that a model is built for.

    Raises:
        UnsupportedModelError: The family's row does not describe this kind of head.
    """
    family = family_of(model)
    for task in family.tasks:
        if type(model).__name__.endswith(CLASS_SUFFIXES[task]):
            return task
    if type(model).__name__.endswith(CLASS_SUFFIXES["classification"]):
        raise UnsupportedModelError(
            f"models.families: no classifier can be cut out of a '{family.model_type}' model "
            f"({type(model).__name__}). {WHAT_TO_DO}."
        )
    suffixes = ", ".join(suffix for task in family.tasks for suffix in CLASS_SUFFIXES[task])
    raise UnsupportedModelError(
        f"models.families: {type(model).__name__} has a head that flexkd cannot slice. Known for "
        f"'{family.model_type}': classes that end in {suffixes}. Load it as one of these."
    )
