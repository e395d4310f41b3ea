"""Record of `flexkd sizes`, to and from JSON: what each size costs and keeps, and the knee of the curve."""

from dataclasses import dataclass, field

from flexkd.compare_record import CompareCell
from flexkd.record import ModelRecord
from flexkd.strict_json import FORMAT, Number, Record, StoredRecord


def number_text(value: Number) -> str:
    """A number of a recipe in all its digits, whole ones without a point.

    Example:
        >>> [number_text(value) for value in (0.35, 1048576.0, 12)]
        ['0.35', '1048576', '12']
    """
    return str(int(value)) if float(value).is_integer() else repr(float(value))


@dataclass(frozen=True)
class SizeResult(Record):
    """The students of one size.

    Attributes:
        name: The value as text, as in `SizesRecord.cells`.
        value: Of the key that the sizes differ in.
        model: Costs of the student, and its metrics as means over the seeds; None where a seed has none.
        low: Lower end of the 95 % interval of the main metric; None where there is none.
        high: Upper end.
        share: The main metric as a share of the teacher's; None where a ratio says nothing, as the next two.
        share_low: Lower end of its 95 % interval.
        share_high: Upper end.
        behind_low: Lower end of the 95 % interval of what the largest size is better by; None of that one itself, and
            where there are no intervals.
        behind_high: Upper end.
        folder: The student of the first seed, below the folder of the record.
    """

    name: str
    value: Number
    model: ModelRecord
    low: Number | None = None
    high: Number | None = None
    share: Number | None = None
    share_low: Number | None = None
    share_high: Number | None = None
    behind_low: Number | None = None
    behind_high: Number | None = None
    folder: str = ""


@dataclass(frozen=True)
class Knee(Record):
    """The knee of quality against parameters.

    Attributes:
        size: Name of the size at the knee; None where there is no knee.
        reason: Why there is none; empty where there is one.
        repeats: In how many of `trials` the curve has its knee at the same size.
        trials: Curves of single seeds, or of test rows that were drawn again.
    """

    size: str | None
    reason: str = ""
    repeats: int = 0
    trials: int = 0


@dataclass(frozen=True)
class SizesRecord(StoredRecord):
    """One recipe distilled at several sizes, ascending by size.

    Attributes:
        key: Key of the recipe's section `student` that the sizes differ in.
        keep: Share of the teacher's main metric that a student has to keep.
        teacher: With its costs.
        baselines: What needs no model.
        interval_over: What the intervals are over: `seeds`, `rows`, or nothing where there are none.
        rows: Test rows that were drawn again for intervals over rows; else 0.
    """

    metric: str
    problem: str
    key: str
    keep: Number
    seeds: list[int]
    sizes: list[SizeResult]
    cells: list[CompareCell]
    teacher: ModelRecord
    baselines: list[ModelRecord]
    knee: Knee
    interval_over: str = ""
    rows: int = 0
    name: str = "sizes"
    created: str = ""
    recipe: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    format: int = FORMAT
