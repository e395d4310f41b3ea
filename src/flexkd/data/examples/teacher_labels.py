"""Labels of a trained classifier matched to the classes of the data: which output is which class."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

from flexkd.data.examples.label_values import fold_case
from flexkd.errors import VocabularyError
from flexkd.facts.families.table import traits_of

_NUMBERED: Final = re.compile(r"(?:LABEL_)?\d+", re.ASCII | re.IGNORECASE)
_LABELS_SHOWN: Final = 5


@dataclass(frozen=True)
class ModelLabels:
    """The labels that a classifier names in its config.

    Attributes:
        where: The recipe key, or the command, that names the model.
        source: The name or path given there.
        names: One name for each output.
        problem_type: The kind of problem, in the words of transformers; None where the config does not say.
        may_be_replaced: Whether an adapter may bring its own head, whose classes no file names.
    """

    where: str
    source: str
    names: tuple[str, ...]
    problem_type: str | None = None
    may_be_replaced: bool = False

    @property
    def are_numbered(self) -> bool:
        """Whether the names only number the outputs, like LABEL_0."""
        return all(_NUMBERED.fullmatch(name) for name in self.names)


@runtime_checkable
class LabelsOfData(Protocol):
    """The classes of the data."""

    @property
    def problem(self) -> str:
        """`single_label`, `multi_label` or `regression`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The label of index i is names[i]."""

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the names has a meaning."""


@dataclass(frozen=True)
class OutputOrder:
    """Which output of a model is which class of the data.

    Attributes:
        classes: For each output of the model, the index of its class in the data.
        note: What was assumed or reordered; None where names and order agree.
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


def label_entries(config: Any) -> dict[str, Any]:
    """The entries of a loaded config that describe its labels, as config.json has them."""
    return {name: getattr(config, name, None) for name in ("architectures", "id2label", "problem_type")}


def model_labels(config: Mapping[str, Any], *, where: str, source: str) -> ModelLabels:
    """The labels in the content of a config.json, or in the attributes of a config.

    Raises:
        VocabularyError: id2label is no mapping, or does not number the outputs from 0 without a gap.
    """
    id2label, problem_type, number = config.get("id2label"), config.get("problem_type"), config.get("num_labels")
    if id2label is not None and not isinstance(id2label, Mapping):
        raise VocabularyError(
            f"{where}: '{source}' has a {type(id2label).__name__} as id2label in config.json, no mapping. Write the "
            "name of each output: {0: NAME, 1: NAME}."
        )
    if id2label is None or number not in (None, len(id2label)):
        # transformers numbers the labels itself where the config names none, or not as many as num_labels.
        numbers = range(int(number or traits_of(config).num_unnamed_labels))
        return ModelLabels(where, source, tuple(f"LABEL_{number}" for number in numbers), problem_type)
    names = {int(key): str(name) for key, name in id2label.items() if str(key).isdecimal()}
    if sorted(names) != list(range(len(id2label))):
        raise VocabularyError(
            f"{where}: '{source}' numbers its labels {_listed(list(map(str, id2label)))} in id2label of config.json. "
            "Number them from 0 without a gap."
        )
    return ModelLabels(where, source, tuple(names[number] for number in range(len(names))), problem_type)


def output_order(model: ModelLabels, data: LabelsOfData) -> OutputOrder:
    """Match outputs to classes by name, ignoring case, or by position where the names mean nothing.

    Raises:
        VocabularyError: The kind of problem or the number of classes differs, or the names do not tell which output is
            which class.
    """
    _check_problem(model, data)
    names, in_order = data.names, OutputOrder(tuple(range(len(data.names))))
    if len(model.names) != len(names) and model.may_be_replaced:
        return OutputOrder(in_order.classes, _in_order_note(model, names))
    if len(model.names) != len(names):
        raise _number_of_labels_error(model, names)
    if data.problem == "regression" or model.names == names:
        return in_order
    for spell in (str, fold_case):
        data_names, model_names = [spell(name) for name in names], [spell(name) for name in model.names]
        if len(set(data_names)) == len(names) and sorted(data_names) == sorted(model_names):
            order = OutputOrder(tuple(data_names.index(name) for name in model_names))
            return order if order.is_same else OutputOrder(order.classes, _by_name_note(model, names))
    shared = set(data_names) & set(model_names)
    if not shared:
        matches_by_position = data.is_ordered or model.are_numbered
    else:
        num_equal = sum(data_name == name for data_name, name in zip(data_names, model_names, strict=True))
        has_twins = len({*data_names}) + len({*model_names}) < 2 * len(names)
        matches_by_position = num_equal == len(shared) and not has_twins
    if not matches_by_position:
        raise _open_order_error(model, names)
    return OutputOrder(in_order.classes, _in_order_note(model, names))


def _check_problem(model: ModelLabels, data: LabelsOfData) -> None:
    kind = data.problem if data.problem == "regression" else f"{data.problem}_classification"
    if model.problem_type not in (None, kind):
        raise VocabularyError(
            f"{model.where}: '{model.source}' was made for {model.problem_type}, the data are {kind}. "
            f"{_other_model_advice(model)}"
        )


def _number_of_labels_error(model: ModelLabels, names: Sequence[str]) -> VocabularyError:
    advice = _other_model_advice(model)
    if len(names) > 1 and set(names) < set(model.names):
        advice = f"{advice} Or set data.label_names: {_listed(model.names, most=50)}, of which some have no rows."
    elif model.names and model.are_numbered:
        advice = f"{advice} If its head has {len(names)} outputs, name them in id2label of its config.json."
    return VocabularyError(
        f"{model.where}: '{model.source}' has {len(model.names)} labels {_listed(model.names)}, the data have "
        f"{len(names)} {_listed(names)}. {advice}"
    )


def _open_order_error(model: ModelLabels, names: Sequence[str]) -> VocabularyError:
    pairs = ", ".join(f"{name!r}: {model_name!r}" for name, model_name in zip(names[:2], model.names[:2], strict=False))
    return VocabularyError(
        f"{model.where}: '{model.source}' has the labels {_listed(model.names)}, the data {_listed(names)}: it is not "
        "clear which is which. Set data.label_names to a mapping of each stored value to the model's name for it, "
        f"as {{{pairs}{', ...' if len(names) > 2 else ''}}} if these belong together."
    )


def _by_name_note(model: ModelLabels, names: Sequence[str]) -> str:
    return (
        f"{model.where}: its labels {_listed(model.names)} are in another order than {_listed(names)}: taken by name."
    )


def _in_order_note(model: ModelLabels, names: Sequence[str]) -> str:
    labels = (
        "the classes of its head, which have no names," if not model.names else f"its labels {_listed(model.names)}"
    )
    return (
        f"{model.where}: {labels} are taken for {_listed(names)} of the data, in this order. If "
        "they differ, set data.label_names to a mapping of stored value to name, in the order of the model's outputs."
    )


def _other_model_advice(model: ModelLabels) -> str:
    return "Use another model." if model.where == "evaluate" else "Set teacher.fine_tune, or use another teacher."


def _listed(names: Sequence[str], most: int = _LABELS_SHOWN) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return f"[{listed}, ...]" if len(names) > most else f"[{listed}]"
