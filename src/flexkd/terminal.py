"""What a terminal shows of recipes and records: the plan of a run, and tables of rows, models, scores and methods."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from flexkd.compare_record import CompareRecord
from flexkd.data.examples.classification import ClassificationData, Example
from flexkd.data.examples.generation import GenerationData
from flexkd.display.results import show, show_entries
from flexkd.display.tables import EMPTY_CELL, FigureTable
from flexkd.evaluate.learning_curves import CURVE_REFERENCE, curve_metric, steps_to_reference
from flexkd.evaluate.row_contrasts import better_and_worse
from flexkd.evaluate.significance import changed_seeds_text, contrast_notes, seed_notes
from flexkd.facts.metrics import METRIC_FACTS, deviations, metric_label
from flexkd.facts.names import SINGLE_STACK_SIZES
from flexkd.preflight import Preflight
from flexkd.recipe import Recipe
from flexkd.record import AnswerExample, ModelRecord, Number, RunRecord, ScoreRecord, proper_interval
from flexkd.tuning_record import FAILED, PRUNED, TuningRecord

BAD_ROWS_SHOWN: Final = 20
_ROLES: Final = {"student_before": "student before"}
_DERIVED: Final = ("size", "max_parameters")
_MEGABYTE: Final = 1_000_000
_LONGEST_LINE: Final = 300


def print_plan(recipe: Recipe) -> None:
    """Print what a run is about to do."""
    student, teacher, training = recipe.student, recipe.teacher, recipe.training
    settings = {name: getattr(student, name) for name in (*SINGLE_STACK_SIZES, *_DERIVED)}
    sizes = [f"{name} {value}" for name, value in settings.items() if value is not None]
    starts = {"slice": "cut out of the teacher", "pretrained": f"{student.model}", "config": f"new, as {student.model}"}
    preparation = f", fine-tuned first for {teacher.fine_tune.epochs:g} epochs" if teacher.fine_tune else ""
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    length = length if training.early_stopping is None else f"at most {length}"
    plan = [
        ("teacher", f"{teacher.model}{preparation}"),
        ("student", ", ".join([starts[student.start], *sizes])),
        ("task", f"{recipe.task.type}, {recipe.task.problem}, judged by {recipe.task.metric}"),
        ("training", f"{length} of batches of {training.batch_size}, learning rate {training.learning_rate:g}"),
        ("run folder", recipe.output),
    ]
    show_entries(plan, is_result=False)


def print_preflight(result: Preflight) -> None:
    """Print rows by split and label, rows that cannot be used, and notes."""
    if isinstance(result.data, GenerationData):
        _print_texts(result.data)
    elif result.data is not None:
        _print_rows(result.data)
    if result.data is not None and result.data.bad_rows:
        _print_bad_rows(result.data)
    for note in result.notes:
        show(f"note: {note}")


def print_models(models: Sequence[ModelRecord], metric: str, notes: Sequence[str] = ()) -> None:
    """Print quality and costs of each model on a line, and the student's as a share of the teacher's.

    Args:
        models: Lines of the table.
        metric: The main metric.
        notes: Lines below the table.
    """
    metrics = _shown_metrics(models, metric)
    labels = [metric_label(name) for name in metrics]
    table = FigureTable(["model", *labels, "parameters", "size (MB)", "examples/s", "memory (MB)"])
    for model in models:
        qualities = [_decimals(model.metrics.get(name)) for name in metrics]
        table.add_row(_line_name(model), *qualities, *(_cost(value) for value in _costs(model)))
    teacher = next((model for model in models if model.role == "teacher"), None)
    student = next((model for model in models if model.role == "student"), None)
    if teacher is not None and student is not None:
        values, wholes = ([*map(model.metrics.get, metrics), *_costs(model)] for model in (student, teacher))
        table.add_section()
        table.add_row("of the teacher", *map(_ratio, values, wholes))
    show(table)
    _print_latencies(models)
    for note in notes:
        show(note)


def _print_latencies(models: Sequence[ModelRecord]) -> None:
    """Print how long each model takes for one row; nothing where that was not measured."""
    latencies = [(_line_name(model), model.latency) for model in models if model.latency is not None]
    if not latencies:
        return
    first = latencies[0][1]
    table = FigureTable(["model", "median (ms)", "95th percentile (ms)", *(["a token (ms)"] if first.tokens else [])])
    for name, latency in latencies:
        token = [_cost(latency.token_ms)] if first.tokens else []
        table.add_row(name, _cost(latency.median_ms), _cost(latency.p95_ms), *token)
    show(f"\n{first.describe()}")
    show(table)


def _line_name(model: ModelRecord) -> str:
    names = {"baseline": model.name, "rival": model.short_name}
    return names.get(model.role, _ROLES.get(model.role, model.role))


def _shown_metrics(models: Sequence[ModelRecord], metric: str) -> list[str]:
    """The main metric, and those of the metrics for terminals that were measured."""
    measured = {name for model in models for name in model.metrics}
    problem = "generation" if "perplexity" in measured else "single_label"
    names = (metric, *(facts.name for facts in METRIC_FACTS if facts.is_in_terminal and problem in facts.problems))
    return [name for name in dict.fromkeys(names) if name in measured]


def print_summary(record: RunRecord) -> None:
    """Print the closing table of a run, and answers of its models."""
    show(record.name, bold=True)
    notes = [record.choices] if record.choices else []
    notes += deviations(record.problem, [record.metric], record.recipe)
    print_models(record.models, record.metric, notes)
    if record.answers:
        print_answers(record.answers)


def print_answers(examples: Sequence[AnswerExample]) -> None:
    """Print up to three prompts with the answers of all models: the student's worst, its middle one, its best."""
    positions = sorted({0, len(examples) // 2, len(examples) - 1})
    show("answers, with their rougeL: the student's worst row, its middle one, its best", bold=True)
    for example in (examples[position] for position in positions):
        entries = [("prompt", _line(example.prompt))]
        entries += [("reference", _line(reference)) for reference in example.references[:1]]
        for who, answer in example.answers.items():
            score = example.rouge.get(who)
            text = _line(answer) or "(nothing)"
            cut = " (cut)" if who in example.cut else ""
            rouge = "" if score is None else f"  [{score:.2f}]"
            entries.append((_ROLES.get(who, who.replace("_", " ")), f"{text}{cut}{rouge}"))
        show()
        show_entries(entries)


def _line(text: str) -> str:
    """Text on one line of at most 300 characters; of a longer one its start and its end."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"


def print_scores(scores: Iterable[ScoreRecord]) -> None:
    """Print a table with one line for each scored layer, and for the directions of a cut."""
    table = FigureTable(
        ["of", "layer", "target", "attribution", "number", "chosen", "unused", "predictions", "effective"]
    )
    for score in scores:
        counts = (len(score.values), len(score.units), score.num_unused, score.num_predictions)
        effective = f"{score.effective_predictions:,.0f}"
        names = (score.of, str(score.layer), score.target, score.attribution)
        table.add_row(*names, *(f"{count:,}" for count in counts), effective)
    show(table)


def print_comparison(record: CompareRecord) -> None:
    """Print each method's mean and spread over the seeds, its paired difference to the reference, and all contrasts."""
    changed = changed_seeds_text(record)
    seeds = f"{len(record.seeds)} seeds{f' ({changed})' if changed else ''}"
    show(
        f"{record.metric} over {seeds}; differences to {record.reference}, seed by seed; the "
        "paired t p is not corrected, and judges none of them"
    )
    table = FigureTable(["method", "mean", "std", "difference", "95% interval", "paired t p"])
    for row in record.paired:
        difference = EMPTY_CELL if row.difference is None else f"{row.difference:+.4f}"
        table.add_row(
            row.method,
            _decimals(row.mean),
            _decimals(row.std),
            difference,
            _interval(row.low, row.high),
            _decimals(row.p_value),
        )
    show(table)
    if record.contrasts:
        show()
        show(_contrasts_table(record))
    for note in [*contrast_notes(record), *seed_notes(record)]:
        show(note)
    _print_row_contrasts(record)
    _print_steps(record)
    for name, metrics in {"teacher": record.teacher, **record.baselines}.items():
        if metrics.get(record.metric) is not None:
            show(f"{name}: {_decimals(metrics[record.metric])}")
    for note in [*deviations(record.problem, [record.metric], record.recipe), *record.notes]:
        show(note)


def _interval(low: Number | None, high: Number | None) -> str:
    ends = proper_interval(low, high)
    return EMPTY_CELL if ends is None else f"{ends[0]:+.4f} .. {ends[1]:+.4f}"


def _print_row_contrasts(record: CompareRecord) -> None:
    """Rows on which methods are better and worse; nothing where rows were not compared."""
    if not record.row_contrasts:
        return
    table = FigureTable(["contrast", *better_and_worse(record), "p over rows", "95% interval over rows"])
    for contrast in record.row_contrasts:
        counts = f"{contrast.better:,.1f}", f"{contrast.worse:,.1f}"
        interval = _interval(contrast.low, contrast.high)
        table.add_row(contrast.name, *counts, f"{contrast.p_value:.2g}", interval)
    first = record.row_contrasts[0]
    show(f"\nrows: {first.metric} of {first.rows:,} test rows, with the same seed")
    show(table)


def _print_steps(record: CompareRecord) -> None:
    """How soon each method was as good as logit KD at its end; nothing where that is not known."""
    rows = steps_to_reference(record)
    if not rows:
        return
    table = FigureTable(["method", "steps"])
    for steps in rows:
        table.add_row(steps.method, steps.describe())
    show(f"\nsteps to {CURVE_REFERENCE}'s final {curve_metric(record)} on the validation rows, seed by seed")
    show(table)


def print_tuning(record: TuningRecord) -> None:
    """Print for each method what its trials took, the best of them, and what was chosen."""
    show(f"{record.metric} of the validation rows, seed {record.seed}")
    table = FigureTable(["method", "trials", "stopped", "failed", "steps", "best"])
    for tuning in record.methods:
        states = Counter(trial.state for trial in tuning.trials)
        best = None if tuning.best is None else tuning.trials[tuning.best].value
        counts = (len(tuning.trials), states[PRUNED], states[FAILED], sum(trial.steps for trial in tuning.trials))
        table.add_row(tuning.method, *(f"{count:,}" for count in counts), _decimals(best))
    show(table)
    for note in record.notes:
        show(note)


def _contrasts_table(record: CompareRecord) -> FigureTable:
    """The exact test and the size of the effect of each contrast."""
    table = FigureTable(["contrast", "difference", "exact p", "Holm p", "effect size", "seeds needed"])
    for contrast in record.contrasts:
        p_values = (contrast.exact_p_value, contrast.holm_p_value)
        seeds_needed = record.seeds_needed(contrast)
        table.add_row(
            contrast.name,
            EMPTY_CELL if contrast.difference is None else f"{contrast.difference:+.4f}",
            *(EMPTY_CELL if value is None else f"{value:.2g}" for value in p_values),
            EMPTY_CELL if contrast.effect_size is None else f"{contrast.effect_size:+.2f}",
            EMPTY_CELL if seeds_needed is None else f"{seeds_needed:,}",
        )
    return table


def _print_rows(data: ClassificationData) -> None:
    """Print the number of rows by split, and for each of the first eight labels."""
    is_regression = data.labels.problem == "regression"
    names = () if is_regression else data.labels.names[:8]
    shows_unlabelled = is_regression or _unlabelled(data.train) > 0
    table = FigureTable(["split", "rows", *names, *(["without label"] if shows_unlabelled else [])])
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        counts = _label_counts(examples)
        cells = [f"{len(examples):,}", *(f"{counts[index]:,}" for index in range(len(names)))]
        if shows_unlabelled:
            cells.append(f"{_unlabelled(examples):,}")
        table.add_row(split, *cells)
    show(table)
    if len(data.labels.names) > len(names) > 0:
        show(f"and {len(data.labels.names) - len(names)} more labels")


def _label_counts(examples: Sequence[Example]) -> Counter[int]:
    """Rows of each class; a row with several flags counts for each of them."""
    counts: Counter[int] = Counter()
    for example in examples:
        if isinstance(example.label, tuple):
            counts.update(index for index, flag in enumerate(example.label) if flag)
        elif isinstance(example.label, int):
            counts[example.label] += 1
    return counts


def _unlabelled(examples: Sequence[Example]) -> int:
    return sum(example.label is None for example in examples)


def _print_texts(data: GenerationData) -> None:
    """Print rows by split, and the median length of their questions and answers in words."""
    table = FigureTable(["split", "rows", "words of a question", "words of an answer"])
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        questions = [
            " ".join([*(turn.content for turn in example.turns), example.document or ""]) for example in examples
        ]
        answers = [example.answer or "" for example in examples]
        medians = (statistics.median(len(text.split()) for text in texts) for texts in (questions, answers))
        table.add_row(split, f"{len(examples):,}", *(f"{median:g}" for median in medians))
    show(table)


def _print_bad_rows(data: ClassificationData | GenerationData) -> None:
    """Print the rows that cannot be used: where they are, and why."""
    count = len(data.bad_rows)
    show(f"{count:,} row{'s' * (count != 1)} cannot be used", bold=True)
    show_entries([(row.where, row.reason) for row in data.bad_rows[:BAD_ROWS_SHOWN]])
    if count > BAD_ROWS_SHOWN:
        show(f"and {count - BAD_ROWS_SHOWN:,} more")


def _costs(model: ModelRecord) -> list[float | int | None]:
    """Parameters, size in MB, examples per second and memory in MB; all None for a baseline without parameters."""
    memory = model.peak_memory_bytes
    if not model.parameters:
        return [None] * 4
    return [
        model.parameters,
        model.bytes_on_disk / _MEGABYTE,
        model.examples_per_second,
        None if memory is None else memory / _MEGABYTE,
    ]


def _cost(value: float | int | None) -> str:
    if value is None:
        return EMPTY_CELL
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _decimals(value: float | int | None) -> str:
    return EMPTY_CELL if value is None else f"{value:.4f}"


def _ratio(value: float | int | None, whole: float | int | None) -> str:
    return EMPTY_CELL if value is None or not whole else f"{value / whole:.2f}x"
