"""The file of results: one JSON object a line, appended when a cell is finished and never rewritten."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.study.plan import HERE, Cell, Plan, digest_of, search_cells
from flexkd.facts.metrics import LOWER_IS_BETTER
from flexkd.facts.names import VALIDATION_PREFIX

RESULTS: Final = HERE.parents[1] / "docs" / "results"
"""A folder for each plan, with its file of results and its page."""


@dataclass(frozen=True)
class CellResult:
    """What one finished cell left.

    Attributes:
        digest: From `digest_of`: the settings that it was made with.
        values: Recipe key to the value that a search chose for it, or that it tried.
        metrics: By name; None where a metric is not defined.
        evaluations: Step and metric values of each evaluation on the validation rows.
        selection: Hash of what the student was cut along and taught; empty where the method has none.
        scores: Hash of the scores that chose it; empty where none did.
        teacher: Fingerprint of the teacher; one that is trained on another machine may differ in its last digits.
        machine: Instruction set, cores and threads.
    """

    cell: Cell
    digest: str
    values: dict[str, float]
    metrics: dict[str, float | None]
    steps: int
    seconds: float
    cpu_seconds: float
    evaluations: list[dict[str, float]] = field(default_factory=list)
    selection: str = ""
    scores: str = ""
    teacher: str = ""
    commit: str = ""
    machine: str = ""
    created: str = ""

    @property
    def validation(self) -> float:
        """The value by which a search chooses, the larger the better."""
        name = next(name for name in self.metrics if name.startswith(VALIDATION_PREFIX))
        value = self.metrics[name]
        sign = -1 if name.removeprefix(VALIDATION_PREFIX) in LOWER_IS_BETTER else 1
        return float("-inf") if value is None else sign * value

    @property
    def last_fall(self) -> float | None:
        """Share by which the validation loss fell in the last fifth of the steps; None where it is not known."""
        points = [(entry["step"], entry["eval_loss"]) for entry in self.evaluations if "eval_loss" in entry]
        before = [loss for step, loss in points if step <= 0.8 * self.steps]
        return 1 - points[-1][1] / before[-1] if before and len(points) > len(before) else None


@dataclass(frozen=True)
class SettingResult:
    """What is true of a setting besides its students.

    Attributes:
        teacher: Metrics of the teacher.
        baselines: Metrics of what needs no model, by name.
        rows: Number of rows by split.
        geometry: Student width to the shares of the functional form G that a cut of that width keeps, by kind of cut.
    """

    setting: str
    teacher: dict[str, float | None]
    baselines: dict[str, dict[str, float | None]]
    rows: dict[str, int]
    geometry: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    commit: str = ""
    machine: str = ""
    created: str = ""


@dataclass(frozen=True)
class Results:
    """Everything in a results file; of two entries for one thing the later counts."""

    cells: Mapping[Cell, CellResult]
    settings: Mapping[str, SettingResult]
    cpu_seconds: float

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a results file; a line that a killed run left half-written is passed over."""
        cells: dict[Cell, CellResult] = {}
        settings: dict[str, SettingResult] = {}
        seconds = 0.0
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                entry: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                continue
            seconds += entry["cpu_seconds"]
            if "cell" in entry:
                cell = Cell(**entry.pop("cell"))
                cells[cell] = CellResult(cell=cell, **entry)
            else:
                settings[entry["setting"]] = SettingResult(**entry)
        return cls(cells, settings, seconds)

    def values_for(self, plan: Plan, setting: str, method: str) -> dict[str, float] | None:
        """The values that the searches of a setting chose for a method; None while one of them is not finished."""
        return self._values(plan, setting, method, plan.settings[setting].searches)

    def values_before(self, plan: Plan, cell: Cell) -> dict[str, float] | None:
        """The values that earlier searches chose for a cell of a search."""
        searches = plan.settings[cell.setting].searches
        return self._values(plan, cell.setting, cell.method, searches[: searches.index(cell.search)])

    def _values(self, plan: Plan, setting: str, method: str, searches: Sequence[str]) -> dict[str, float] | None:
        values: dict[str, float] = {}
        for search in searches:
            if plan.searches[search].applies_to(method):
                best = self.best(plan, setting, search)
                if best is None:
                    return None
                values[plan.searches[search].key] = best
        return values

    def best(self, plan: Plan, setting: str, search: str) -> float | None:
        """The value of a search that is best on the validation rows; None while one of them is missing."""
        results = [self.finished(plan, cell) for cell in search_cells(plan, setting, search)]
        finished = [result for result in results if result is not None]
        if len(finished) < len(results):
            return None
        return max(finished, key=lambda result: result.validation).cell.value

    def finished(self, plan: Plan, cell: Cell) -> CellResult | None:
        """The result of a cell, if it was made with the settings that the plan has now."""
        result = self.cells.get(cell)
        values = self.values_before(plan, cell) if cell.search else self.values_for(plan, cell.setting, cell.method)
        if result is None or values is None:
            return None
        return result if result.digest == digest_of(plan, cell, values) else None


def results_file(plan_name: str) -> Path:
    """Where the results of a plan are."""
    return RESULTS / plan_name / "cells.jsonl"


def append(path: Path, result: CellResult | SettingResult) -> None:
    """Add an entry, as a line of its own even behind one that was left half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        is_whole = file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
        # In one call, so that lines of two processes do not mix.
        file.write((b"" if is_whole else b"\n") + json.dumps(asdict(result), allow_nan=False).encode() + b"\n")
