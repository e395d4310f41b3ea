"""The charts of a run, out of its record, and for each that cannot be drawn the reason why."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flexkd.facts.metrics import LOWER_IS_BETTER, metric_label
from flexkd.facts.names import ALL_LAYERS
from flexkd.record import ModelRecord, Number, RunRecord, ScoreRecord
from flexkd.report.charts import Line, Point, best_chart, coverage_chart, lines_chart, quality_chart, scores_chart
from flexkd.report.wording import DIRECTION_SCORES, ROLES, metric_heading, model_label

_TERM_COLOURS: Final = {"task": "task", "logits": "teacher", "features": "student"}
_ROLE_COLOURS: Final = {
    "teacher": "teacher",
    "student_before": "before",
    "student": "student",
    "rival": "rival",
    "baseline": "baseline",
}


@dataclass(frozen=True)
class Chart:
    """One chart for the page; without `svg`, its `caption` is the reason why it cannot be drawn."""

    name: str
    title: str
    svg: str | None
    caption: str


def labelled_models(record: RunRecord) -> list[tuple[ModelRecord, str, str]]:
    """Each model with its label and, for a student, the label of the model that it started as."""
    labels = [(model, model_label(model)) for model in record.models]
    return [(model, label, ROLES["student_before"] if model.role == "student" else "") for model, label in labels]


def cost_charts(models: Sequence[tuple[ModelRecord, str, str]], metric: str, prefix: str) -> list[Chart]:
    """Quality against size, speed and, where it was measured, latency, of the models of `labelled_models`."""
    # Parameters in int8 are as many as before, so that only the disk shows them smaller.
    size: tuple[str, Callable[[ModelRecord], Number | None]] = ("parameters", lambda model: model.parameters)
    if any(model.role == "rival" for model, _, _ in models):
        size = ("bytes of weights on disk", lambda model: model.bytes_on_disk)
    axes: list[tuple[str, str, str, Callable[[ModelRecord], Number | None]]] = [
        ("size", size[0], "up and left is better", size[1]),
        ("speed", "examples a second", "up and right is better", lambda model: model.examples_per_second),
    ]
    latencies = [model.latency for model, _, _ in models if model.latency is not None]
    if latencies:
        of = "answer" if latencies[0].tokens else "row"
        axes.append(("latency", f"milliseconds of one {of}, median", "up and left is better", _median_latency))
    lower = metric in LOWER_IS_BETTER
    measured = [
        (model, label, start, float(quality))
        for model, label, start in models
        if (quality := model.metrics.get(metric)) is not None and math.isfinite(quality)
    ]
    # Baselines that need no model cost nothing: they are horizontal lines, not points.
    levels = [(label, quality) for model, label, _, quality in measured if not model.parameters]
    charts = []
    for short, x_label, better, cost in axes:
        points = [
            Point(label, float(x), quality, _ROLE_COLOURS.get(model.role, "ink"), start or None)
            for model, label, start, quality in measured
            if model.parameters and (x := cost(model)) is not None
        ]
        title, name = f"Quality against {short}", f"{prefix}quality-{short}"
        if len(points) < 2:
            charts.append(Chart(name, title, None, f"fewer than two models have both {metric} and {x_label}."))
            continue
        svg = quality_chart(points, x_label=x_label, y_label=metric_label(metric), name=name, levels=levels)
        caption = better.replace("up", "down") if lower else better
        charts.append(Chart(name, title, svg, caption[0].upper() + caption[1:] + "."))
    return charts


def _median_latency(model: ModelRecord) -> Number | None:
    return None if model.latency is None else model.latency.median_ms


def _series(entries: Sequence[Mapping[str, Number]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, from the entries of the log in which it is finite."""
    logged = [entry for entry in entries if key in entry and math.isfinite(entry[key])]
    points = [(float(entry["step"]), float(entry[key])) for entry in logged]
    return [step for step, _ in points], [value for _, value in points]


def logged_terms(record: RunRecord, kind: str) -> list[str]:
    """Terms of the objective with at least two logged values, raw or weighted as `kind` says."""
    keys = dict.fromkeys(key for row in record.history for key in row)
    terms = [key.removesuffix(f"_{kind}") for key in keys if key.endswith(f"_{kind}")]
    return [term for term in terms if len(_series(record.history, f"{term}_{kind}")[0]) > 1]


def loss_chart(record: RunRecord, kind: str, prefix: str) -> Chart:
    """Each term of the objective over the steps, raw or weighted; the total loss beside the weighted ones."""
    title = "Loss, term by term" if kind == "weighted" else "Loss terms, raw"
    name = f"{prefix}loss-{kind}"
    lines = [
        Line(term, *_series(record.history, f"{term}_{kind}"), _TERM_COLOURS.get(term, "baseline"))
        for term in logged_terms(record, kind)
    ]
    total = _series(record.history, "loss")
    if kind == "weighted" and len(total[0]) > 1:
        lines.append(Line("total", *total, "ink", strong=True))
    if not lines:
        return Chart(name, title, None, "the history holds fewer than two logged steps.")
    num_broken = sum(not math.isfinite(row.get("loss", 0.0)) for row in record.history)
    caption = "Each curve is a term times its weight; together they are the total. " if kind == "weighted" else ""
    caption += f"{len(record.history):,} logged rows, last at step {record.history[-1]['step']:,}."
    caption += f" {num_broken} rows with a loss that is not finite are not drawn." if num_broken else ""
    svg = lines_chart(lines, x_label="optimizer step", y_label=f"loss ({kind})", name=name)
    return Chart(name, title, svg, caption)


def evaluation_chart(record: RunRecord, prefix: str) -> Chart:
    """The main metric on the validation split over the steps; the nll where no answers were generated there."""
    series = {metric: _series(record.evaluations, f"eval_{metric}") for metric in (record.metric, "nll")}
    metric = next((metric for metric, (steps, _) in series.items() if len(steps) > 1), record.metric)
    name, title = f"{prefix}evaluation", f"Validation {metric_label(metric)} while training"
    steps, values = series[metric]
    if len(steps) < 2:
        return Chart(name, title, None, "the run was evaluated fewer than twice.")
    pick = min if metric in LOWER_IS_BETTER else max
    best = values.index(pick(values))
    svg = best_chart(Line(metric, steps, values, "student"), best, y_label=metric_heading(metric), name=name)
    return Chart(name, title, svg, f"{len(steps)} evaluations; the ring marks the best one.")


def score_charts(scores: Sequence[ScoreRecord], prefix: str) -> list[Chart]:
    """How few units of each scored layer, or directions, hold most of the score, and which of them were selected."""
    if not scores:
        return [Chart(f"{prefix}scores", "Scores", None, "this run scored neither units nor directions.")]
    charts = []
    for index, score in enumerate(scores):
        layer = {-1: "the head's input", ALL_LAYERS: "all blocks"}.get(score.layer, f"layer {score.layer}")
        what = f"directions of {layer}" if score.of == "directions" else layer
        name = f"{prefix}scores-{index}"
        are_units_missing = score.basis == "units" and not score.units
        if are_units_missing or sum(score.values) <= 0 or not all(map(math.isfinite, score.values)):
            charts.append(
                Chart(name, f"Unit scores of {layer}", None, "the record holds no usable scores or no units.")
            )
            continue
        curve = coverage_chart(score.values, score.units, of=score.of, name=f"{name}-coverage")
        bars = scores_chart(score.values, score.units, of=score.of, y_label=_score_label(score), name=f"{name}-sorted")
        title = f"How few {score.of} hold the score: {what}"
        charts.append(Chart(f"{name}-coverage", title, curve, _coverage_caption(score)))
        charts.append(Chart(f"{name}-sorted", f"Sorted scores: {what}", bars, _score_source(score)))
    return charts


def _coverage_caption(score: ScoreRecord) -> str:
    """How many units or directions hold most of the score, and whether they are what is taught."""
    count = _num_units_for(score.values, 0.9)
    taught = "Directions of its states are taught, not these units. "
    return (
        f"90% of the score is held by {count:,} of {len(score.values):,} {score.of}; {score.num_unused:,} are unused. "
        f"{taught if score.basis == 'directions' and score.of == 'units' else ''}"
        f"Basis {score.basis}, mapping {score.mapping}, selection {score.selection_hash[:12]}"
        f"{f', scores {score.scores_hash[:12]}' if score.scores_hash else ''}."
    )


def _score_source(score: ScoreRecord) -> str:
    """What the scores are, and what they were measured on."""
    if score.of == "directions":
        return f"Chosen by {score.attribution}: {_score_label(score)}{_over_layers(score)}."
    return (
        f"{score.attribution} of {score.target}, {score.num_predictions:,} predictions "
        f"(effective number: {score.effective_predictions:,.0f}){_over_layers(score)}."
    )


def _over_layers(score: ScoreRecord) -> str:
    """How scores of all blocks become one, for a caption; empty for those of one layer."""
    return "; of each block as a share of its total, mean over the blocks" if score.layer == ALL_LAYERS else ""


def _score_label(score: ScoreRecord) -> str:
    """What a score is, for the axis of a chart."""
    over_layers = score.layer == ALL_LAYERS
    if score.of == "directions" and over_layers:
        return "share of mean |gradient x state|"
    if score.of == "directions":
        return DIRECTION_SCORES.get(score.attribution, score.attribution)
    forms = {
        "gradient": "mean |gradient|",
        "gradient_x_activation": "mean |gradient x activation|",
        "fisher": "mean gradient\u00b2",
    }
    form = forms.get(score.attribution, score.attribution)
    return f"score (share of {form})" if over_layers else f"score ({form})"


def _num_units_for(values: Sequence[Number], share: float) -> int:
    """The fewest units that hold a share of the score."""
    target, total = share * sum(values), 0.0
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        total += value
        if total >= target:
            return count
    return len(values)
