"""A plan as tables in the terminal."""

from typing import Final

from flexkd.core.tensors import Number
from flexkd.costs.result import Plan, StageWork
from flexkd.display.results import show
from flexkd.display.tables import EMPTY_CELL, FigureTable

_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def print_run_plan(plan: Plan) -> None:
    """Print sizes, memory, other settings, caches, operations, time, assumptions, and whether the run fits."""
    processes = "" if plan.processes == 1 else f"{plan.processes} processes"
    processes += {True: " that share ", False: ", each "}[plan.device.is_cpu] if processes else ""
    show(f"{plan.name} on {processes}{plan.device.name}, {_size(plan.device.memory)}", bold=True)
    models = FigureTable(["model", "parameters", "shape"])
    for model in plan.models:
        models.add_row(model.role, f"{model.parameters:,}", model.shape)
    show(models)
    _print_memory(plan)
    _print_work(plan)
    if plan.sizes:
        _print_sizes(plan)
    show("assumptions", bold=True)
    for line in plan.assumptions:
        show(f"- {line}")
    worst = max(plan.memory, key=lambda stage: stage.peak)
    word = "fits" if plan.fits else "does not fit"
    verdict = f"{word}: {_size(plan.peak)} at most ({worst.name}), {_size(plan.room)} to use"
    show(verdict, bold=True)


def _print_memory(plan: Plan) -> None:
    table = FigureTable(["memory", *(stage.name for stage in plan.memory)])
    names = dict.fromkeys(name for stage in plan.memory for name in stage.parts)
    for name in sorted(names, key=lambda name: not name.endswith("weights")):
        sizes = [stage.parts.get(name, 0) for stage in plan.memory]
        if any(sizes):
            table.add_row(name, *map(_size, sizes))
    table.add_section()
    table.add_row("together at most", *(_size(stage.peak) for stage in plan.memory))
    show(table)
    training = next(stage.peak for stage in plan.memory if stage.name == "training")
    for knob in plan.knobs:
        verb = "saves" if knob.peak < training else "costs"
        change = _size(abs(knob.peak - training))
        show(f"{knob.setting}: {verb} {change} of the training's {_size(training)}")
    for form, size in plan.cache.items():
        show(f"cache of the teacher's answers, {form}: {_size(size)}")


def _print_work(plan: Plan) -> None:
    table = FigureTable(["work", "TFLOP", "time"])
    for work in plan.units:
        table.add_row(work.name, *_cells(work))
    if plan.work:
        table.add_section()
        for work in plan.work:
            table.add_row(work.name, *_cells(work))
        table.add_section()
        flops, seconds = sum(work.flops for work in plan.work), sum(work.seconds for work in plan.work)
        table.add_row("the whole run", *_cells(StageWork("", flops, seconds)))
    show(table)
    if plan.processes > 1:
        show(f"network: each process sends {_size(plan.network)} a step of the student, to add up gradients")
    if not plan.work:
        steps = "" if plan.steps is None else f"training: {plan.steps:,} steps; "
        show(f"{steps}the time of the whole run is not known without the number of rows")


def _print_sizes(plan: Plan) -> None:
    """Print the students of `flexkd sizes`, and the time of them all."""
    table = FigureTable(["size", "shape", "parameters", "training memory", "time a seed"])
    for size in plan.sizes:
        seconds = EMPTY_CELL if size.seconds is None else _time(size.seconds)
        table.add_row(size.size, size.shape, f"{size.parameters:,}", _size(size.peak), seconds)
    show(table)
    times = [size.seconds for size in plan.sizes if size.seconds is not None]
    if len(times) == len(plan.sizes):
        seeds = f"{plan.seeds} seed{'s' * (plan.seeds != 1)}"
        show(f"flexkd sizes: {len(times)} sizes x {seeds}, {_time(plan.seeds * sum(times))} after the teacher's stages")


def _cells(work: StageWork) -> tuple[str, str]:
    return _figure(work.flops / 1e12), f"{_time(work.seconds)}{' (limit)' if work.is_limited else ''}"


def _figure(value: Number) -> str:
    """Three significant digits; from 100 on, whole numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(size: Number) -> str:
    if not size:
        return EMPTY_CELL
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit), (1, "B"))
    return f"{_figure(size / unit)} {name}"


def _time(seconds: Number) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{_figure(seconds / 3600)} h"
