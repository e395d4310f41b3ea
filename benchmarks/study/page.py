"""The page docs/results/PLAN/README.md: tables, contrasts and curves from the results, also from a part of them."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.study.plan import MAIN_PLAN, Plan, Setting
from benchmarks.study.plots import gain_plot, metric_plot
from benchmarks.study.results import Results, SettingResult
from benchmarks.study.rules import (
    Judgement,
    Verdict,
    contrasts_of,
    judgements,
    last_fall,
    planned_cells,
    values_of,
    verdicts,
)
from flexkd.files import written_whole

_WIDTH: Final = 120
_HEAD: Final = """# {title}

{question}

Written by `{command} page` from [cells.jsonl](cells.jsonl), one line a student. The list of students and
the rules stand in `benchmarks/study/plans/{name}.yaml`, which was committed before the first run. `{command} run`
runs what is missing (`--setting NAME` one setting alone, `--minutes N` for a while), and `{command} teacher`
trains the small teacher.
"""


def write_page(plan: Plan, results: Results, folder: Path) -> list[Path]:
    """Write the page and its plots into a folder; returns what was written."""
    written = []
    sections = []
    for name, setting in plan.settings.items():
        if name in results.settings and _finished(plan, results, name):
            plots = {"metric": metric_plot(plan, results, name)}
            if contrasts_of(plan, name):
                plots["gain"] = gain_plot(plan, results, name)
            for kind, svg in plots.items():
                path = folder / f"{name}-{kind}.svg"
                with written_whole(path) as partial:
                    partial.write_text(svg, encoding="utf-8")
                written.append(path)
            sections.append(setting_section(plan, results, name, setting))
    command = (
        "python -m benchmarks.study" if plan.name == MAIN_PLAN else f"python -m benchmarks.study --plan {plan.name}"
    )
    head = _HEAD.format(title=plan.title, question=_wrapped(plan.question.strip()), command=command, name=plan.name)
    text = "\n".join([head, _rules(plan), _state(plan, results), _answers(plan, results), *sections])
    page = folder / "README.md"
    with written_whole(page) as partial:
        partial.write_text(text, encoding="utf-8")
    return [page, *written]


def _finished(plan: Plan, results: Results, name: str) -> int:
    """Number of finished students of a setting's comparison."""
    setting = plan.settings[name]
    return sum(
        len(values_of(plan, results, name, mismatch, method, setting.metric))
        for mismatch in setting.widths
        for method in setting.methods
    )


def _rules(plan: Plan) -> str:
    contrasts = [f"- *{contrast.name}*: {contrast.question}" for contrast in plan.contrasts]
    rules = [_wrapped(f"{number}. {rule.strip()}", indent="   ") for number, rule in enumerate(plan.rules, 1)]
    return "\n".join(["## Contrasts and rules, named before the runs", "", *contrasts, "", *rules, ""])


def _state(plan: Plan, results: Results) -> str:
    hours = results.cpu_seconds / 3600
    lines = ["## What has been run", "", f"{hours:.1f} of {plan.cpu_hours:g} CPU-hours.", ""]
    rows = []
    for name, setting in plan.settings.items():
        finished = [cell for cell in results.cells if cell.setting == name]
        minutes = [results.cells[cell].cpu_seconds / 60 for cell in finished]
        commits = sorted({results.cells[cell].commit for cell in finished})
        machines = sorted({results.cells[cell].machine for cell in finished})
        teachers = len({results.cells[cell].teacher for cell in finished})
        measured = f"{statistics.fmean(minutes):.1f}" if minutes else f"{setting.cpu_minutes:g} expected"
        missing = sum(results.finished(plan, cell) is None for cell in planned_cells(plan, name))
        rows.append(
            (name, str(len(finished)), str(missing), measured, str(teachers), ", ".join(commits), "; ".join(machines))
        )
    titles = ("setting", "finished", "missing", "CPU minutes a student", "teachers", "commits", "machine")
    return "\n".join([*lines, *table(titles, rows), ""])


def _answers(plan: Plan, results: Results) -> str:
    """From which mismatch on each contrast holds, in every setting."""
    names = [name for name in plan.settings if _finished(plan, results, name)]
    if not names:
        return "## Answers\n\nNothing has been run yet.\n"
    by_setting = {name: verdicts(plan, results, name) for name in names}
    rows = [
        (contrast.name, *(_verdict(plan, results, name, contrast.name, by_setting[name]) for name in names))
        for contrast in plan.contrasts
    ]
    return "\n".join(["## Answers: from which mismatch on a contrast holds", "", *table(("", *names), rows), ""])


def _verdict(plan: Plan, results: Results, name: str, contrast: str, answers: dict[str, Verdict | None]) -> str:
    if contrast not in answers:
        return "not in this setting"
    verdict = answers[contrast]
    if verdict is not None:
        return f"{'better' if verdict.is_gain else 'worse'} from d/{verdict.mismatch} on"
    judged = [entry for entry in judgements(plan, results, name) if entry.contrast.name == contrast]
    return "at none" if all(entry.is_complete for entry in judged) else "seeds are missing"


def setting_section(plan: Plan, results: Results, name: str, setting: Setting) -> str:
    """The part of the page about one setting."""
    entry = results.settings[name]
    lines = [
        f"## {name}",
        "",
        f"`benchmarks/study/recipes/{setting.recipe}`, {', '.join(f'{n:,} {s}' for s, n in entry.rows.items())} rows. "
        f"{setting.metric}, {'smaller' if setting.sign < 0 else 'larger'} is better: mean, standard deviation over the "
        "seeds, and their number.",
        "",
        *_metric_table(plan, results, name, setting),
        "",
        f"![{setting.metric} of each method at each mismatch]({name}-metric.svg)",
        "",
        *_contrasts(plan, results, name),
        *_geometry_table(entry),
        *_search_lines(plan, results, name),
        *_convergence(plan, results, name, setting),
    ]
    return "\n".join(lines)


def _metric_table(plan: Plan, results: Results, name: str, setting: Setting) -> list[str]:
    entry = results.settings[name]
    others = [metric for metric in setting.also_shown if metric in entry.teacher and metric != setting.metric]
    titles = ["method", *(f"d/{mismatch} ({width})" for mismatch, width in setting.widths.items())]
    titles += [f"{metric} at d/{mismatch}" for metric in others for mismatch in setting.widths]
    metrics = [setting.metric] * len(setting.widths) + [metric for metric in others for _ in setting.widths]
    fixed = {"teacher": entry.teacher, setting.baseline: entry.baselines.get(setting.baseline, {})}
    rows = [(label, *(_number(values.get(metric)) for metric in metrics)) for label, values in fixed.items()]
    for method in setting.methods:
        values = [
            list(values_of(plan, results, name, mismatch, method, metric).values())
            for metric, mismatch in zip(metrics, [*setting.widths] * (1 + len(others)), strict=True)
        ]
        rows.append((method, *map(_spread, values)))
    return table(titles, rows)


def _contrasts(plan: Plan, results: Results, name: str) -> list[str]:
    """Table and picture of the contrasts; nothing where a setting has none."""
    if not contrasts_of(plan, name):
        return []
    picture = f"![Gain of each contrast at each mismatch]({name}-gain.svg)"
    return [*_contrast_table(judgements(plan, results, name)), "", picture, ""]


def _contrast_table(judged: Sequence[Judgement]) -> list[str]:
    titles = ("contrast", "mismatch", "gain", "95 % interval", "effect size", "exact p", "Holm", "better in")
    rows = []
    for entry in judged:
        seeds = f"{entry.num_better} of {entry.num_seeds}{'' if entry.is_complete else ', more to come'}"
        if entry.paired is None:
            rows.append((entry.contrast.name, f"d/{entry.mismatch}", *[""] * 5, seeds))
            continue
        paired = entry.paired
        rows.append((
            entry.contrast.name, f"d/{entry.mismatch}", f"{paired.difference:+.4f}",
            "none" if paired.low is None else f"{paired.low:+.4f} .. {paired.high:+.4f}",
            "" if paired.effect_size is None else f"{paired.effect_size:+.1f}",
            f"{paired.exact_p_value:.2g}", f"{entry.holm_p_value:.2g}", seeds,
        ))  # fmt: skip
    return table(titles, rows)


def _geometry_table(entry: SettingResult) -> list[str]:
    """How much of G each kind of cut keeps; nothing where it is not known."""
    if not entry.geometry:
        return []
    kinds = list(next(iter(entry.geometry.values())))
    rows = [(width, *(f"{shares[kind]:.2f}" for kind in kinds)) for width, shares in entry.geometry.items()]
    return ["Share of the teacher's functional form G that a cut keeps:", "", *table(("width", *kinds), rows), ""]


def _search_lines(plan: Plan, results: Results, name: str) -> list[str]:
    lines = []
    for search in plan.settings[name].searches:
        entry, best = plan.searches[search], results.best(plan, name, search)
        if best is None:
            lines.append(f"- {search}: not finished.")
            continue
        edge = best in (min(entry.values), max(entry.values))
        others = f", also for {', '.join(entry.methods)}" if entry.methods else ""
        warning = " It is at the edge of what was tried." if edge else ""
        tried = ", ".join(f"{value:g}" for value in entry.values)
        lines.append(_wrapped(f"- {search}: {entry.key} = {best:g} of {tried}{others}.{warning}", indent="  "))
    return ["Chosen on the validation rows, with a seed of their own:", "", *lines, ""] if lines else []


def _convergence(plan: Plan, results: Results, name: str, setting: Setting) -> list[str]:
    method = "fine_tuning" if "fine_tuning" in setting.methods else next(iter(setting.methods))
    falls = {mismatch: last_fall(plan, results, name, mismatch, method) for mismatch in setting.widths}
    stated = [f"{100 * fall:.1f} % at d/{mismatch}" for mismatch, fall in falls.items() if fall is not None]
    text = f"Validation loss of {method} in the last fifth of the steps fell by {', '.join(stated)}."
    return [text, ""] if stated else []


def _wrapped(text: str, indent: str = "") -> str:
    """A paragraph, or an entry of a list whose later lines are indented."""
    return textwrap.fill(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is text."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread} ({len(values)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
