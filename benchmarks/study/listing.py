"""The list of students in the terminal: how many there are, what they cost, and whether their recipes are valid."""

import statistics
from pathlib import Path

from benchmarks.study.plan import Plan, setting_recipe
from benchmarks.study.results import Results
from benchmarks.study.rules import planned_cells
from benchmarks.study.running import has_teacher, on_this_machine
from flexkd.preflight import preflight


def listing(plan: Plan, results: Results) -> str:
    """A line for each setting and the sum: students, CPU minutes of each (measured where some are finished), hours."""
    lines = [f"{'setting':<16}{'students':>9}{'finished':>9}{'CPU min each':>14}{'CPU hours':>11}"]
    total = 0.0
    for name, setting in plan.settings.items():
        seconds = [result.cpu_seconds for cell, result in results.cells.items() if cell.setting == name]
        minutes = statistics.fmean(seconds) / 60 if seconds else setting.cpu_minutes
        planned = len(planned_cells(plan, name))
        hours = planned * minutes / 60
        total += hours
        measured = f"{minutes:.2f}" if seconds else f"{minutes:.2f} planned"
        lines.append(f"{name:<16}{planned:>9}{len(seconds):>9}{measured:>14}{hours:>11.1f}")
    lines.append(f"{'in all':<48}{total:>11.1f} of {plan.cpu_hours:g}")
    return "\n".join(lines)


def problems(plan: Plan, work: Path) -> list[str]:
    """What `flexkd check` says against the recipes of the study, for every setting and width."""
    lines = []
    for name, setting in plan.settings.items():
        recipes = {mismatch: setting_recipe(plan, name, mismatch) for mismatch in setting.widths}
        if not has_teacher(recipes[setting.search_mismatch]):
            lines.append(
                f"{name}: not checked, as its teacher is missing. Train it: python -m benchmarks.study teacher"
            )
            continue
        for mismatch, recipe in recipes.items():
            checks = preflight(on_this_machine(recipe, work))
            lines += [f"{name} d/{mismatch}: {problem}" for problem in checks.problems]
    return lines
