"""Numbers and results in words, and tables of them, the same on the page, in its charts and on the model card."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.record import LatencyRecord, ModelRecord, Number, RunRecord

ROLES: Final = {
    "teacher": "teacher",
    "student_before": "student before",
    "student": "student after",
    "rival": "rival",
    "baseline": "baseline",
}

_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>#|~$&!])")
_FEWEST_ROWS: Final = 100
"""With fewer test rows, a single one is more than a percent."""
_WIDEST_SHARE: Final = 0.2
"""Of an interval of a share that still goes with a percentage."""
_NARROW_SHARE: Final = 0.05
"""Of an interval of a share up to which tenths of a percent are shown."""

_OWN_NAMES: Final = ("rival", "baseline")
"""Roles of which a run may have several models, which therefore go by their names."""

DIRECTION_SCORES: Final = {
    "scores": "variance x function (how much the output depends on it)",
    "lowest": "variance x function (how much the output depends on it)",
    "variance": "share of the variance",
    "activation": "mean |activation|",
    "random": "random number",
    "mixed": "variance + function, by the share of the recipe",
}
"""What the directions of a cut were chosen by, as `student.chosen_by` names it, in words."""


def model_label(model: ModelRecord) -> str:
    """What a model is called in charts and sentences: its role, or its name where its role may have several.

    Example:
        >>> model_label(ModelRecord("rival", "models/small", 1, 4, 8, 2, None, None, {}))
        'small'
    """
    if model.role not in _OWN_NAMES:
        return ROLES.get(model.role, model.role)
    return model.short_name if model.role == "rival" else model.name


def markdown_text(text: str) -> str:
    """Text of the user as one line of Markdown that is read as text."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names, with a number behind each that occurs more than once.

    Example:
        >>> distinct_names(["a", "b", "a"])
        ['a #1', 'b', 'a #2']
    """
    return [
        name if names.count(name) == 1 else f"{name} #{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    cells: Sequence[str]
    note: str = ""
    mark: bool = False


@dataclass(frozen=True)
class Table:
    """Column headings, that of the first column included, and rows.

    Attributes:
        groups: Headings above those of the columns, each over so many of them; none where it is empty.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()


def compact(value: Number) -> str:
    """A count that reads at a glance.

    Example:
        >>> [compact(value) for value in (0, 950, 12_500, 22_713_986, 7e9)]
        ['0', '950', '12.5k', '22.7M', '7B']
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def byte_size(value: Number | None) -> str:
    """Bytes in decimal units.

    Example:
        >>> [byte_size(value) for value in (None, 512, 29_331_768, 2.5e9)]
        ['n/a', '512 B', '29.3 MB', '2.50 GB']
    """
    if value is None:
        return "n/a"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def metric_text(value: Number | None) -> str:
    """The value of a metric.

    Example:
        >>> [metric_text(value) for value in (None, 0.8412, 0.0, 0.00004, 123.456)]
        ['n/a', '0.841', '0.000', '4.0e-05', '123.5']
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def speed(value: Number | None) -> str:
    """Examples per second."""
    return "n/a" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def milliseconds(value: Number) -> str:
    """Milliseconds with three digits.

    Example:
        >>> [milliseconds(value) for value in (0.4213, 27.16, 812.4, 2345.6)]
        ['0.42', '27.2', '812', '2,346']
    """
    return f"{value:,.0f}" if value >= 1000 else _three_digits(value)


def latency_cell(latency: LatencyRecord | None) -> str:
    """Median and 95th percentile of one row, and the time of a token where text is written.

    Example:
        >>> latency_cell(LatencyRecord(16, 800.0, 912.0, tokens=16))
        '800 / 912 (50.0 a token)'
    """
    if latency is None:
        return "n/a"
    token = "" if latency.token_ms is None else f" ({milliseconds(latency.token_ms)} a token)"
    return f"{milliseconds(latency.median_ms)} / {milliseconds(latency.p95_ms)}{token}"


def latency_text(record: RunRecord) -> str:
    """What the latencies of a run are, in words; empty where none was measured."""
    latency = next((model.latency for model in record.models if model.latency is not None), None)
    return "" if latency is None else latency.describe()


def duration(seconds: Number) -> str:
    """A duration in the two units that matter.

    Example:
        >>> [duration(value) for value in (0.31, 95, 152, 1234, 7260)]
        ['0.3 s', '95.0 s', '2 min 32 s', '21 min', '2 h 1 min']
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def metric_heading(name: str) -> str:
    """The name of a metric as a heading; an arrow down marks those of which less is better."""
    return metric_label(name) + (" \u2193" if name in LOWER_IS_BETTER else "")


def factor(ratio: float) -> str:
    """A ratio as a multiple.

    Example:
        >>> [factor(value) for value in (0.84, 3.098, 22.6, 340.2)]
        ['0.84x', '3.1x', '23x', '340x']
    """
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


@dataclass(frozen=True)
class Kept:
    """The student's main metric as a share of the teacher's.

    Attributes:
        ends: Of its 95 % interval over test rows; empty where there is none.
        rows: Number of test rows; None where it is not known.
    """

    share: float
    ends: tuple[Number, ...]
    rows: int | None

    @property
    def rows_are_few(self) -> bool:
        """Whether a percentage would say more than the rows do."""
        is_wide = bool(self.ends) and self.ends[1] - self.ends[0] > _WIDEST_SHARE
        return is_wide or (self.rows is not None and self.rows < _FEWEST_ROWS)

    @property
    def text(self) -> str:
        """The share, with a decimal where other rows would hardly change it."""
        return self._percent(self.share)

    @property
    def interval(self) -> str:
        """The interval; empty where there is none."""
        return " to ".join(self._percent(end) for end in self.ends)

    def _percent(self, value: Number) -> str:
        is_narrow = not self.ends or self.ends[1] - self.ends[0] <= _NARROW_SHARE
        return f"{value:.1%}" if is_narrow else f"{value:.0%}"


def kept(record: RunRecord) -> Kept | None:
    """What the student keeps of the teacher's main metric; None where a ratio says nothing."""
    teacher, student = (main_metric(record, role) for role in ("teacher", "student"))
    if teacher is None or student is None or teacher <= 0 or record.metric in LOWER_IS_BETTER:
        return None
    intervals = record.intervals
    rows = record.data.rows.get("test") if record.generation is None else record.generation.rows
    if intervals is None:
        return Kept(student / teacher, (), rows)
    return Kept(student / teacher, tuple(intervals.share), intervals.rows)


def kept_text(record: RunRecord) -> str:
    """What the student keeps, with its interval, for the cell of a table; empty where a ratio says nothing."""
    share = kept(record)
    if share is None:
        return ""
    interval = f" ({share.interval})" if share.ends else ""
    return f"too few rows{interval}" if share.rows_are_few else f"{share.text}{interval}"


def interval_text(ends: Sequence[Number], *, signed: bool = False) -> str:
    """Both ends of an interval; empty where there is none.

    Example:
        >>> interval_text([0.731, 0.7894]), interval_text([-0.02, 0.01], signed=True), interval_text([])
        ('0.731 to 0.789', '-0.020 to +0.010', '')
    """
    return " to ".join(f"{end:+.3f}" if signed else metric_text(end) for end in ends)


def model_interval(record: RunRecord, model: ModelRecord) -> list[Number]:
    """Ends of the interval of a model's main metric; empty where there is none."""
    if record.intervals is None or model.metrics.get(record.metric) is None:
        return []
    name = model.name if model.role in _OWN_NAMES else model.role
    ends = record.intervals.models
    return ends.get(name) or ends.get(name.replace(" ", "_")) or []


def intervals_note(record: RunRecord) -> str:
    """What the intervals of a run are, in a few sentences; empty where it has none."""
    intervals = record.intervals
    if intervals is None:
        return ""
    return (
        f"95% intervals of {metric_label(record.metric)} over {intervals.rows:,} test rows: what other rows of the "
        f"same kind could change, and not what another seed would. {intervals.description}"
    )


def main_metric(record: RunRecord, role: str) -> Number | None:
    """The main metric of a run for the first model of a role; None where it is not defined."""
    model = record.model(role)
    value = None if model is None else model.metrics.get(record.metric)
    return None if value is None or not math.isfinite(value) else value


def size_ratio(teacher: ModelRecord, student: ModelRecord) -> str:
    """How many times fewer, or more, parameters the student has."""
    if student.parameters == teacher.parameters:
        return "as many parameters"
    if student.parameters < teacher.parameters:
        return f"{factor(teacher.parameters / student.parameters)} fewer parameters"
    return f"{factor(student.parameters / teacher.parameters)} as many parameters"


def _three_digits(value: float) -> str:
    """A number below 1,000 with three significant digits."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
