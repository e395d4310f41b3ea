"""The classes of a classifier beside those of the data: which output of the model is which class."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from flexkd.data.examples.label_values import folded
from flexkd.errors import VocabularyError
from flexkd.facts.families.table import traits_of

_NUMBERED: Final = re.compile(r"(?:LABEL_)?\d+", re.ASCII | re.IGNORECASE)
_SHOWN: Final = 5


@dataclass(frozen=True)
class ModelLabels:
    """What a classifier says of itself in its config.

    Attributes:
        where: The recipe key, or the command, that names the model.
        source: How it is named there.
        names: One name for each output.
        problem_type: As transformers calls the kind of problem; None where the config does not say.
        may_be_replaced: Whether an adapter may bring a head of its own, whose classes no file names.
    """

    where: str
    source: str
    names: tuple[str, ...]
    problem_type: str | None = None
    may_be_replaced: bool = False

    @property
    def are_numbered(self) -> bool:
        """Whether the names only count the outputs, as LABEL_0."""
        return all(_NUMBERED.fullmatch(name) for name in self.names)


@runtime_checkable
class LabelsOfData(Protocol):
    """What the rows are labelled with."""

    @property
    def problem(self) -> str:
        """`single_label`, `multi_label` or `regression`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The label of index i is names[i]."""

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the names says something."""


@dataclass(frozen=True)
class OutputOrder:
    """How the outputs of a model and the classes of the data meet.

    Attributes:
        classes: For each output of the model, the index of its class in the data.
        note: What was taken for granted, or changed; None where the two agree by name.
    """

    classes: tuple[int, ...]
    note: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether output i is class i."""
        return self.classes == tuple(range(len(self.classes)))

    @property
    def outputs(self) -> tuple[int, ...]:
        """For each class of the data, the index of its output."""
        return tuple(sorted(range(len(self.classes)), key=self.classes.__getitem__))


def model_labels(config: Mapping[str, Any], *, where: str, source: str) -> ModelLabels:
    """The labels that a config.json, or the attributes of a config, speak of.

    Raises:
        VocabularyError: The names are no mapping, or do not count from 0 without a gap.
    """
    id2label, problem_type, number = config.get("id2label"), config.get("problem_type"), config.get("num_labels")
    if id2label is not None and not isinstance(id2label, Mapping):
        raise VocabularyError(
            f"{where}: '{source}' has a {type(id2label).__name__} as id2label in config.json, no mapping. Write the "
            "name of each output: {0: NAME, 1: NAME}."
        )
    if id2label is None or number not in (None, len(id2label)):
        # transformers counts itself where the config names none, and drops names that are not as many as it counts.
        numbers = range(int(number or traits_of(config).num_unnamed_labels))
        return ModelLabels(where, source, tuple(f"LABEL_{number}" for number in numbers), problem_type)
    names = {int(key): str(name) for key, name in id2label.items() if str(key).isdecimal()}
    if sorted(names) != list(range(len(id2label))):
        raise VocabularyError(
            f"{where}: '{source}' numbers its labels {_some(list(map(str, id2label)))} in id2label of config.json. "
            "Number them from 0 without a gap."
        )
    return ModelLabels(where, source, tuple(names[number] for number in range(len(names))), problem_type)


def output_order(model: ModelLabels, data: LabelsOfData) -> OutputOrder:
    """Finds the class of each output by name, in any case of its letters; by its place where names say nothing.

    Raises:
        VocabularyError: Another kind of problem, another number of classes, or names that leave it open which output
            is which class.
    """
    _check_problem(model, data)
    names, same = data.names, OutputOrder(tuple(range(len(data.names))))
    if len(model.names) != len(names) and model.may_be_replaced:
        return OutputOrder(same.classes, _in_order_note(model, names))
    if len(model.names) != len(names):
        raise _another_number(model, names)
    if data.problem == "regression" or model.names == names:
        return same
    for spell in (str, folded):
        data_names, model_names = [spell(name) for name in names], [spell(name) for name in model.names]
        if len(set(data_names)) == len(names) and sorted(data_names) == sorted(model_names):
            order = OutputOrder(tuple(data_names.index(name) for name in model_names))
            return order if order.is_same else OutputOrder(order.classes, _by_name_note(model, names))
    shared = set(data_names) & set(model_names)
    places = [one == other for one, other in zip(data_names, model_names, strict=True)]
    has_twins = len({*data_names}) + len({*model_names}) < 2 * len(names)
    in_place = data.is_ordered or model.are_numbered if not shared else sum(places) == len(shared) and not has_twins
    if not in_place:
        raise _open_order(model, names)
    return OutputOrder(same.classes, _in_order_note(model, names))


def _check_problem(model: ModelLabels, data: LabelsOfData) -> None:
    kind = data.problem if data.problem == "regression" else f"{data.problem}_classification"
    if model.problem_type not in (None, kind):
        raise VocabularyError(
            f"{model.where}: '{model.source}' was made for {model.problem_type}, the data are {kind}. "
            f"{_other_model(model)}"
        )


def _another_number(model: ModelLabels, names: Sequence[str]) -> VocabularyError:
    cure = _other_model(model)
    if len(names) > 1 and set(names) < set(model.names):
        cure = f"{cure} Or set data.label_names: {_some(model.names, most=50)}, of which some have no rows."
    elif model.names and model.are_numbered:
        cure = f"{cure} If its head has {len(names)} outputs, name them in id2label of its config.json."
    return VocabularyError(
        f"{model.where}: '{model.source}' has {len(model.names)} labels {_some(model.names)}, the data have "
        f"{len(names)} {_some(names)}. {cure}"
    )


def _open_order(model: ModelLabels, names: Sequence[str]) -> VocabularyError:
    pairs = ", ".join(f"{name!r}: {other!r}" for name, other in zip(names[:2], model.names[:2], strict=False))
    return VocabularyError(
        f"{model.where}: '{model.source}' has the labels {_some(model.names)}, the data {_some(names)}: it is open "
        "which is which. Set data.label_names to a mapping of each stored value to the model's name for it, "
        f"as {{{pairs}{', ...' if len(names) > 2 else ''}}} if these belong together."
    )


def _by_name_note(model: ModelLabels, names: Sequence[str]) -> str:
    return f"{model.where}: its labels {_some(model.names)} stand in another order than {_some(names)}: taken by name."


def _in_order_note(model: ModelLabels, names: Sequence[str]) -> str:
    labels = "the classes of its head, which have no names," if not model.names else f"its labels {_some(model.names)}"
    return (
        f"{model.where}: {labels} are taken for {_some(names)} of the data, in this order. If "
        "they differ, set data.label_names to a mapping of stored value to name, in the order of the model's outputs."
    )


def _other_model(model: ModelLabels) -> str:
    return "Use another model." if model.where == "evaluate" else "Set teacher.fine_tune, or use another teacher."


def _some(names: Sequence[str], most: int = _SHOWN) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return f"[{listed}, ...]" if len(names) > most else f"[{listed}]"
