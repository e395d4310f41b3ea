"""The missing cells of the study, one by one, each written down before the next begins."""

import datetime
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock, Timeout

from benchmarks.machine import commit
from benchmarks.study.geometry import shares_of_geometry
from benchmarks.study.plan import (
    STUDY_SECTIONS,
    STUDY_TEACHER,
    Cell,
    Plan,
    blocks,
    cells,
    digest_of,
    recipe_of,
    search_cells,
    setting_recipe,
)
from benchmarks.study.results import CellResult, Results, SettingResult, append
from benchmarks.study.sections import sections_file
from benchmarks.study.teacher import Documents, TeacherSettings, language_model, teacher_folder
from flexkd.facts.names import CONFIG_FILE
from flexkd.pipeline.cells import run_cell
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import describe_baselines
from flexkd.pipeline.run import Run
from flexkd.pipeline.sharing import share_answers
from flexkd.preflight.comparison import cell_recipe
from flexkd.recipe import Recipe, override_recipe
from flexkd.run_files import CELL_FILE
from flexkd.scoring.selection_file import Selection, directions_hash, scores_hash

logger = logging.getLogger(__name__)

WORK: Final = Path("runs/study")
_SECONDS_A_MINUTE: Final = 60


@dataclass(frozen=True)
class OpenSetting:
    """A setting whose teacher and rows are loaded, for the cells of all its widths."""

    job: Job
    teacher_results: Any


@dataclass
class Study:
    """The plan, its results file, and the settings that were opened by this process.

    Attributes:
        work: Folder for teachers' answers, checkpoints and locks.
    """

    plan: Plan
    results_file: Path
    work: Path = WORK
    _cpu_mark: float = field(default_factory=lambda: cpu_seconds(), init=False)
    _open: dict[str, OpenSetting] = field(default_factory=dict, init=False)

    @property
    def results(self) -> Results:
        """The results so far, those of other processes too."""
        return Results.read(self.results_file)

    def run(self, *, minutes: float | None = None, settings: Sequence[str] = ()) -> list[Cell]:
        """Run missing cells in the order of the plan until none is left, or the next one would not fit.

        A cell is begun only if as much time is left as cells of its setting take, in minutes and of the plan's hours.
        Processes that run at the same time take turns block by block.

        Args:
            minutes: Wall time; None: no limit.
            settings: Names of settings; empty: all.

        Returns:
            The cells that it finished.
        """
        stop = None if minutes is None else time.monotonic() + minutes * _SECONDS_A_MINUTE
        finished: list[Cell] = []
        while True:
            num_before = len(finished)
            for name, seed in blocks(self.plan, settings):
                with self._claim(name, seed) as is_ours:
                    is_next = is_ours and (seed == 0 or not self._has_open_search(name))
                    if is_next and not self._run_block(name, seed, stop, finished):
                        return finished
            # What another process worked on may have to be finished: it may have been killed.
            if len(finished) == num_before:
                return finished

    def _run_block(self, name: str, seed: int, stop: float | None, finished: list[Cell]) -> bool:
        """Run the missing cells of a setting with one seed; false if there is no time for one."""
        missing = self._missing_of(name, seed)
        if missing and self._fits(missing[0], stop):
            missing = self._missing_of(name, seed, teacher=self._opened(name).job.fingerprints["teacher"])
            share_answers(self._opened(name).job, [self._recipe(cell, {}) for cell in missing])
        for cell in missing:
            if not self._fits(cell, stop):
                return False
            self._run(cell)
            finished.append(cell)
        return True

    def missing(self, settings: Sequence[str] = ()) -> list[Cell]:
        """The cells that are still to be run, those of searches first."""
        results, names = self.results, list(settings or self.plan.settings)
        return [
            cell
            for name in names
            for cell in [*self._searches(name), *cells(self.plan, name)]
            if results.finished(self.plan, cell) is None
        ]

    def describe_setting(self, name: str) -> str:
        """Teacher and trivial baselines of a setting, in a few lines; the teacher is trained unless it was before."""
        self._opened(name)
        entry = self.results.settings[name]
        metrics = {"teacher": entry.teacher, **entry.baselines}
        lines = [f"{label}: {', '.join(_shown(values))}" for label, values in metrics.items()]
        return "\n".join([*lines, *(f"width {width}: {shares}" for width, shares in entry.geometry.items())])

    def _searches(self, name: str) -> list[Cell]:
        return [cell for search in self.plan.settings[name].searches for cell in search_cells(self.plan, name, search)]

    def _missing_of(self, name: str, seed: int, *, teacher: str | None = None) -> list[Cell]:
        """The missing cells of a setting with one seed; before the first seed, those of its searches.

        Args:
            teacher: Fingerprint of the teacher. If any student of the comparison is missing, those of other teachers
                are missing too, as the students of a seed are compared with each other. None: any teacher will do.
        """
        results, first = self.results, self._searches(name) if seed == 0 else []
        listed = [cell for cell in cells(self.plan, name) if cell.seed == seed]
        finished = {cell: results.finished(self.plan, cell) for cell in [*first, *listed]}
        missing = {cell for cell, result in finished.items() if result is None}
        if teacher is not None and not missing.isdisjoint(listed):
            missing |= {cell for cell in listed if cell not in missing and results.cells[cell].teacher != teacher}
        return [cell for cell in finished if cell in missing]

    def _has_open_search(self, name: str) -> bool:
        """Whether a search of a setting is still under way."""
        results = self.results
        return any(results.best(self.plan, name, search) is None for search in self.plan.settings[name].searches)

    def _recipe(self, cell: Cell, values: Mapping[str, float]) -> Recipe:
        recipe = self._opened(cell.setting).job.recipe
        places = {"output": recipe.output, "data.train": recipe.data.train, "teacher.model": recipe.teacher.model}
        overrides = [f"{key}={json.dumps(place)}" for key, place in places.items()]
        return override_recipe(recipe_of(self.plan, cell, values), overrides)

    def _claim(self, name: str, seed: int) -> "_Claim":
        return _Claim(self.work / "locks" / f"{name}-{seed}")

    def _fits(self, cell: Cell, stop: float | None) -> bool:
        """Whether there is as much time left as cells of this setting and width have taken."""
        setting, results = self.plan.settings[cell.setting], self.results
        if results.cpu_seconds / 3600 + setting.cpu_minutes / 60 > self.plan.cpu_hours:
            logger.warning("study: %.1f of %g CPU-hours are spent", results.cpu_seconds / 3600, self.plan.cpu_hours)
            return False
        times = [result.seconds for done, result in results.cells.items() if _alike(done, cell)]
        expected = max(times, default=setting.cpu_minutes * _SECONDS_A_MINUTE)
        return stop is None or time.monotonic() + expected <= stop

    def _values(self, cell: Cell) -> dict[str, float]:
        results = self.results
        values = results.values_before(self.plan, cell) if cell.search else None
        values = results.values_for(self.plan, cell.setting, cell.method) if values is None else values
        assert values is not None, "searches come first"
        return values

    def _run(self, cell: Cell) -> None:
        """Train and evaluate one student, and write down its result."""
        opened = self._opened(cell.setting)
        values = self._values(cell)
        recipe, digest = self._recipe(cell, values), digest_of(self.plan, cell, values)
        folder = opened.job.recipe.folder / cell.name / digest
        began = time.perf_counter()
        done = run_cell(opened.job, opened.teacher_results, recipe, cell.method, cell.seed, folder)
        seconds = time.perf_counter() - began
        selection = Run(opened.job, cell_recipe(recipe, cell.seed, folder)[0], folder).select()
        stored = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
        result = CellResult(
            cell=cell,
            digest=digest,
            values=values if cell.value is None else {**values, self.plan.searches[cell.search].key: cell.value},
            metrics={name: None if value is None else float(value) for name, value in done.metrics.items()},
            evaluations=[{name: float(value) for name, value in entry.items()} for entry in done.evaluations],
            steps=int(stored["steps"]),
            seconds=round(seconds, 1),
            cpu_seconds=self._spent(),
            selection=selection.hash(),
            scores=_hash_of_scores(selection),
            teacher=opened.job.fingerprints["teacher"],
            commit=commit(),
            machine=machine(),
            created=now(),
        )
        append(self.results_file, result)
        metric = self.plan.settings[cell.setting].metric
        logger.info(
            "%s %s: %s %s, %.0f s; in the last fifth of the steps the validation loss fell by %s",
            cell.setting, cell.name, metric, done.metrics[metric], seconds,
            "an unknown share" if result.last_fall is None else f"{result.last_fall:.1%}",
        )  # fmt: skip

    def _spent(self) -> float:
        """CPU seconds since the last entry, so that those of all entries together are what was spent."""
        before, self._cpu_mark = self._cpu_mark, cpu_seconds()
        return round(self._cpu_mark - before, 1)

    def _opened(self, name: str) -> OpenSetting:
        """A setting with its teacher and rows; opened by one process at a time, as it may train the teacher."""
        if name not in self._open:
            (self.work / "locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self.work / "locks" / name):
                self._open[name] = self._open_now(name)
        return self._open[name]

    def _open_now(self, name: str) -> OpenSetting:
        setting = self.plan.settings[name]
        plain = override_recipe(setting_recipe(self.plan, name, setting.search_mismatch), ["compare=null"])
        job = prepare(on_this_machine(plain, self.work), students=len(cells(self.plan, name)))
        predictions = job.predict(job.teacher)
        if name not in self.results.settings:
            baselines = describe_baselines(job, job.task.baselines(), predictions)
            result = SettingResult(
                setting=name,
                teacher=_numbers(job.task.metrics(predictions, predictions)),
                baselines={model.name: _numbers(model.metrics) for model in baselines},
                rows={split: len(rows) for split, rows in job.splits.items()},
                geometry=shares_of_geometry(job, list(setting.widths.values())),
                cpu_seconds=self._spent(),
                commit=commit(),
                machine=machine(),
                created=now(),
            )
            append(self.results_file, result)
        return OpenSetting(job, predictions)


class _Claim:
    """A block that no other process works on; released when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path)

    def __enter__(self) -> bool:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def on_this_machine(recipe: Recipe, work: Path) -> Recipe:
    """The recipe with the teacher and the rows that the study makes itself; they are made now unless they are there."""
    overrides = [f"output={json.dumps(str(work / recipe.name))}"]
    if recipe.data.train == STUDY_SECTIONS:
        overrides.append(f"data.train={json.dumps(str(sections_file()))}")
    if recipe.teacher.model == STUDY_TEACHER:
        folder = language_model(TeacherSettings(), Documents.of(recipe))
        overrides.append(f"teacher.model={json.dumps(str(folder))}")
    return override_recipe(recipe, overrides)


def has_teacher(recipe: Recipe) -> bool:
    """Whether the recipe's teacher need not be trained first."""
    if recipe.teacher.model != STUDY_TEACHER:
        return True
    return (teacher_folder(TeacherSettings(), Documents.of(recipe)) / CONFIG_FILE).is_file()


def machine() -> str:
    """What decides the last digits of a result: instruction set, cores and threads."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def now() -> str:
    """The time as ISO text."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cpu_seconds() -> float:
    """CPU time of this process and of those it waited for, over all cores."""
    return sum(os.times()[:4])


def _hash_of_scores(selection: Selection) -> str:
    """Hashes of the scores of units and directions that chose something; empty where none did."""
    hashes = [scores_hash(scores) for scores in selection.scores]
    directions = selection.direction_scores
    return " ".join([*hashes, *([] if directions is None else [directions_hash(directions.values)])])


def _alike(first: Cell, second: Cell) -> bool:
    return (first.setting, first.mismatch) == (second.setting, second.mismatch)


def _shown(values: Mapping[str, float | None]) -> list[str]:
    return [f"{name} {value:.3f}" for name, value in values.items() if value is not None]


def _numbers(metrics: Any) -> dict[str, float | None]:
    return {name: None if value is None else float(value) for name, value in metrics.items()}
