"""What one run did, or one comparison, to and from JSON: the only thing that a report is drawn from."""

import dataclasses
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexkd.errors import ArtifactError

Number = int | float
"""Both kinds on purpose: a step is an int, and run-time type checks do not take an int for a float."""

FORMAT: Final = 1
LOWER_IS_BETTER: Final = frozenset({"calibration_error", "cut_share", "kl", "mse", "nll", "perplexity", "teacher_mse"})
"""The metrics in a record of which less is more; of all others a higher value is better."""

_Record = typing.TypeVar("_Record")
_NOT_FINITE: Final = {
    "nan": "not a number: the value is undefined, or came out of a 0/0 or an overflow",
    "inf": "above the largest float: an overflow",
    "-inf": "below the smallest float: an overflow, or the logarithm of 0",
}


def _write(record: object, path: str | Path) -> None:
    """Write strict JSON in UTF-8; a file that is already there is replaced whole or not at all.

    JSON has no NaN: such a value becomes null, and `not_finite` lists its path, what it was and why that happens.
    """
    target = Path(path)
    not_finite: list[dict[str, object]] = []
    content = typing.cast(dict[str, object], _plain(record, (), not_finite))
    text = json.dumps({**content, "not_finite": not_finite}, indent=1, ensure_ascii=False, allow_nan=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    # A lone surrogate (half an emoji in the user's data) has no UTF-8 form: it is written as a JSON escape.
    partial.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    os.replace(partial, target)


def _read(kind: type[_Record], path: str | Path) -> _Record:
    """Read what `_write` has written."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a record that flexkd has written."
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, it is not JSON ({error}). Run again, or restore a copy.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ArtifactError(
            f"{path}: record format {found!r} is not known, this version reads {FORMAT}. "
            "Use the flexkd that wrote it, or run again."
        )
    try:
        for entry in content.pop("not_finite"):
            _set(content, entry["path"], float(entry["value"]))
        return typing.cast(_Record, _build(kind, content, ""))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: damaged, its content is not that of a {kind.__name__} ({error}). Run again, or restore a copy."
        ) from error


def _plain(value: object, keys: tuple[str | int, ...], not_finite: list[dict[str, object]]) -> object:
    """Value as dicts, lists and JSON scalars; a float that JSON lacks becomes None and is added to `not_finite`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner, (*keys, key), not_finite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*keys, index), not_finite) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        name = str(float(value))
        not_finite.append({"path": list(keys), "value": name, "reason": _NOT_FINITE[name]})
        return None
    return value


def _set(content: typing.Any, keys: list[str | int], value: float) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def _build(kind: typing.Any, value: object, where: str) -> object:
    """A value of the annotated kind out of parsed JSON; ValueError with the place where it does not fit."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(typing.cast(type, kind), value, where)
    if kind is object:
        return value
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        allowed = typing.get_args(kind)
        if not any(type(value) is option for option in allowed):
            raise ValueError(f"{where} is {value!r}, expected {kind}")
        return value
    if not isinstance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r}, expected {kind}")
    if origin is list:
        (inner,) = typing.get_args(kind)
        return [
            _build(inner, entry, f"{where}[{index}]") for index, entry in enumerate(typing.cast(list[object], value))
        ]
    if origin is dict:
        inner = typing.get_args(kind)[1]
        return {
            key: _build(inner, entry, f"{where}.{key}") for key, entry in typing.cast(dict[str, object], value).items()
        }
    return value


def _build_dataclass(kind: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise ValueError(f"{where or kind.__name__} is {value!r}, expected an object")
    hints = typing.get_type_hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    needed = {entry.name for entry in dataclasses.fields(kind) if entry.default_factory is dataclasses.MISSING}
    missing = sorted(needed - value.keys())
    if unknown or missing:
        raise ValueError(f"{where or kind.__name__}: missing fields {missing}, unknown fields {unknown}")
    built = {name: _build(hints[name], entry, f"{where}.{name}".lstrip(".")) for name, entry in value.items()}
    return kind(**built)


@dataclass(frozen=True)
class ModelRecord:
    """One model as it was measured: `role` is teacher, student_before, student or baseline."""

    role: str
    name: str
    parameters: int
    bytes_on_disk: int
    hidden_size: int
    num_layers: int
    examples_per_second: Number | None
    peak_memory_bytes: int | None
    metrics: dict[str, Number | None]


@dataclass(frozen=True)
class ScoreRecord:
    """The unit scores of one teacher layer and the units that were taught."""

    layer: int
    target: str
    attribution: str
    values: list[Number]
    units: list[int]
    num_predictions: int
    effective_predictions: Number
    num_unused: int
    basis: str
    mapping: str
    selection_hash: str


@dataclass(frozen=True)
class Disagreement:
    """One example on which teacher and student differ; regression has no confidences."""

    id: str
    texts: list[str]
    label: str | None
    teacher: str
    student: str
    teacher_confidence: Number | None
    student_confidence: Number | None


@dataclass(frozen=True)
class AnswerExample:
    """One prompt and what each model answered, by role or by a baseline's name.

    `rouge` holds the rougeL of each answer, `cut` names the models whose answer the limit ended.
    """

    id: str
    prompt: str
    references: list[str]
    answers: dict[str, str]
    rouge: dict[str, Number | None]
    cut: list[str]


@dataclass(frozen=True)
class DataRecord:
    """Where the rows came from, how many there were, and which were left out for what reason."""

    sources: dict[str, str]
    rows: dict[str, int]
    skipped: dict[str, int]
    skipped_examples: list[str]
    labels: list[str]
    truncated: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class RunRecord:
    """Everything that one run did; the report and the model card are pure functions of it.

    `created` is an ISO time, `objective` the formula, `seconds` the time of each stage. Rows of `history` hold step,
    epoch, loss and, for each term of the objective, `<term>_raw` and `<term>_weighted`; rows of `evaluations` hold
    step, epoch, eval_loss and `eval_<metric>`. Language models have `answers` in place of `disagreements`, and
    `generation` says how they were decoded and how ROUGE was computed.
    """

    name: str
    created: str
    task: str
    problem: str
    metric: str
    objective: str
    recipe: dict[str, object]
    seed: int
    environment: dict[str, str]
    data: DataRecord
    models: list[ModelRecord]
    scores: list[ScoreRecord]
    history: list[dict[str, Number]]
    evaluations: list[dict[str, Number]]
    disagreements: list[Disagreement]
    new_parameters: list[str]
    notes: list[str]
    seconds: dict[str, Number]
    answers: list[AnswerExample] = field(default_factory=list)
    generation: dict[str, object] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, path: str | Path) -> None:
        """Write a run as strict JSON: NaN and infinities become null and are listed under `not_finite`.

        JSON keys are text: a dict with other keys does not come back equal.
        """
        _write(self, path)

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a run that `write` has written, equal to the one that was written.

        Raises:
            ArtifactError: No such file, damaged, of another format, or with other fields than this version's.
        """
        return _read(RunRecord, path)

    def model(self, role: str) -> ModelRecord | None:
        """The first model of a role."""
        return next((model for model in self.models if model.role == role), None)


@dataclass(frozen=True)
class CompareCell:
    """One method under one seed."""

    method: str
    seed: int
    metrics: dict[str, Number | None]
    seconds: Number


@dataclass(frozen=True)
class PairedDifference:
    """One method over all seeds: mean and sample standard deviation, and the paired difference to the reference.

    `low` and `high`: 95 % confidence interval of the mean difference. The reference itself has None in the last four.
    """

    method: str
    mean: Number | None
    std: Number | None
    difference: Number | None
    low: Number | None
    high: Number | None
    p_value: Number | None


@dataclass(frozen=True)
class CompareRecord:
    """Methods x seeds under one recipe, with paired statistics."""

    metric: str
    problem: str
    methods: list[str]
    seeds: list[int]
    cells: list[CompareCell]
    reference: str
    paired: list[PairedDifference]
    teacher: dict[str, Number | None]
    name: str = "comparison"
    created: str = ""
    recipe: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT

    def write(self, path: str | Path) -> None:
        """Write a comparison as strict JSON: NaN and infinities become null and are listed under `not_finite`.

        JSON keys are text: a dict with other keys does not come back equal.
        """
        _write(self, path)

    @classmethod
    def read(cls, path: str | Path) -> "CompareRecord":
        """Read a comparison that `write` has written, equal to the one that was written.

        Raises:
            ArtifactError: No such file, damaged, of another format, or with other fields than this version's.
        """
        return _read(CompareRecord, path)
