"""What a person sees in the terminal: the plan, the log, tables of rows, models, scores and methods."""

import logging
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from rich import box
from rich.table import Table
from rich.text import Text

from flexkd.data.examples.classification import ClassificationData, Example
from flexkd.data.examples.generation import GenerationData
from flexkd.facts.metrics import METRIC_FACTS, deviations, metric_label
from flexkd.preflight import Preflight
from flexkd.recipe import Recipe
from flexkd.record import AnswerExample, CompareRecord, ModelRecord, RunRecord, ScoreRecord
from flexkd.tables import empty_table, open_console

BAD_ROWS_SHOWN: Final = 20
_ROLES: Final = {"student_before": "student before"}
_SHAPE: Final = ("hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size")
_DERIVED: Final = ("size", "max_parameters")
_MEGABYTE: Final = 1_000_000
_NOTHING: Final = "-"
_LONGEST_LINE: Final = 300


class _Lines(logging.Formatter):
    """News as it is, warnings by name; not wrapped, so that a path in a saved log stays whole."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def set_up_logging(*, verbose: bool = False) -> None:
    """Send flexkd's log to the standard error; other libraries speak up from warnings on.

    Args:
        verbose: Show details too, and when and where each line was logged.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s"))
    logger = logging.getLogger("flexkd")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in ("transformers", "datasets", "accelerate", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The two set their level anew when they are imported, from these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("DATASETS_VERBOSITY", "warning")


def print_plan(recipe: Recipe) -> None:
    """What a run is about to do, before it starts."""
    student, teacher, training = recipe.student, recipe.teacher, recipe.training
    sizes = [f"{name} {value}" for name in (*_SHAPE, *_DERIVED) if (value := getattr(student, name)) is not None]
    starts = {"slice": "cut out of the teacher", "pretrained": f"{student.model}", "config": f"new, as {student.model}"}
    first = f", fine-tuned first for {teacher.fine_tune.epochs:g} epochs" if teacher.fine_tune else ""
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    plan = Table.grid(padding=(0, 2))
    for name, value in (
        ("teacher", f"{teacher.model}{first}"),
        ("student", ", ".join([starts[student.start], *sizes])),
        ("task", f"{recipe.task.type}, {recipe.task.problem}, judged by {recipe.task.metric}"),
        ("training", f"{length} of batches of {training.batch_size}, learning rate {training.learning_rate:g}"),
        ("run folder", recipe.output),
    ):
        plan.add_row(Text(name, style="bold"), value)
    open_console().print(plan)


def print_preflight(found: Preflight) -> None:
    """Rows by split and label, rows that cannot be used, and notes."""
    console = open_console()
    if found.data is not None:
        table = _texts_table(found.data) if isinstance(found.data, GenerationData) else _rows_table(found.data)
        console.print(table)
        if found.data.bad_rows:
            console.print(_bad_rows_table(found.data))
    for note in found.notes:
        console.print(f"note: {note}")


def print_models(models: Sequence[ModelRecord], metric: str, notes: Sequence[str] = ()) -> None:
    """One line a model: its quality beside what it costs, and the student's share of the teacher.

    Args:
        models: Lines of the table.
        metric: The main one.
        notes: Lines below it.
    """
    metrics = _shown_metrics(models, metric)
    named = [metric_label(name) for name in metrics]
    table = empty_table(["model", *named, "parameters", "size (MB)", "examples/s", "memory (MB)"])
    for model in models:
        qualities = [_decimals(model.metrics.get(name)) for name in metrics]
        name = model.name if model.role == "baseline" else _ROLES.get(model.role, model.role)
        table.add_row(name, *qualities, *(_cost(value) for value in _costs(model)))
    teacher = next((model for model in models if model.role == "teacher"), None)
    student = next((model for model in models if model.role == "student"), None)
    if teacher is not None and student is not None:
        values, wholes = ([*map(model.metrics.get, metrics), *_costs(model)] for model in (student, teacher))
        table.add_section()
        table.add_row("of the teacher", *map(_ratio, values, wholes))
    console = open_console()
    console.print(table)
    for note in notes:
        console.print(note)


def _shown_metrics(models: Sequence[ModelRecord], metric: str) -> list[str]:
    """The main metric and agreement; of language models how likely they find the references, too."""
    found = {name for model in models for name in model.metrics}
    problem = "generation" if "perplexity" in found else "single_label"
    names = (metric, *(row.name for row in METRIC_FACTS if row.is_in_terminal and problem in row.problems))
    return [name for name in dict.fromkeys(names) if name in found]


def print_summary(record: RunRecord) -> None:
    """The closing table of a run, and what its models answered."""
    open_console().print(Text(record.name, style="bold"))
    print_models(record.models, record.metric, deviations(record.problem, [record.metric], record.recipe))
    if record.answers:
        print_answers(record.answers)


def print_answers(examples: Sequence[AnswerExample]) -> None:
    """Prompts with the answers of all models, from the student's worst to its best, at most three of them."""
    places = sorted({0, len(examples) // 2, len(examples) - 1})
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for example in (examples[place] for place in places):
        table.add_row("", "")
        table.add_row(Text("prompt", style="bold"), _line(example.prompt))
        for reference in example.references[:1]:
            table.add_row("reference", _line(reference))
        for who, answer in example.answers.items():
            score = example.rouge.get(who)
            said = _line(answer) or "(nothing)"
            cut = " (cut)" if who in example.cut else ""
            shown = "" if score is None else f"  [{score:.2f}]"
            table.add_row(_ROLES.get(who, who.replace("_", " ")), f"{said}{cut}{shown}")
    console = open_console()
    console.print("answers, with their rougeL: the student's worst row, its middle one, its best", style="bold")
    console.print(table)


def _line(text: str) -> str:
    """One line of at most 300 characters; of a longer one, its start and its end."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"


def print_scores(scores: Iterable[ScoreRecord]) -> None:
    """One line a scored layer."""
    table = empty_table(["layer", "target", "attribution", "units", "taught", "unused", "predictions", "effective"])
    for score in scores:
        counts = (len(score.values), len(score.units), score.num_unused, score.num_predictions)
        effective = f"{score.effective_predictions:,.0f}"
        table.add_row(str(score.layer), score.target, score.attribution, *(f"{count:,}" for count in counts), effective)
    open_console().print(table)


def print_comparison(record: CompareRecord) -> None:
    """Methods by mean and spread over the seeds, and their paired difference to the reference."""
    console = open_console()
    console.print(f"{record.metric} over {len(record.seeds)} seeds; differences to {record.reference}, seed by seed")
    table = empty_table(["method", "mean", "std", "difference", "95% interval", "p"])
    for row in record.paired:
        known = row.low is not None and row.high is not None
        interval = f"{row.low:+.4f} .. {row.high:+.4f}" if known else _NOTHING
        difference = _NOTHING if row.difference is None else f"{row.difference:+.4f}"
        table.add_row(row.method, _decimals(row.mean), _decimals(row.std), difference, interval, _decimals(row.p_value))
    console.print(table)
    for name, metrics in {"teacher": record.teacher, **record.baselines}.items():
        if metrics.get(record.metric) is not None:
            console.print(f"{name}: {_decimals(metrics[record.metric])}")
    for note in deviations(record.problem, [record.metric], record.recipe):
        console.print(note)


def _rows_table(data: ClassificationData) -> Table:
    is_regression = data.labels.problem == "regression"
    names = () if is_regression else data.labels.names[:8]
    table = empty_table(
        ["split", "rows", *names, *(["without label"] if is_regression or _unlabelled(data.train) else [])]
    )
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        counts = _label_counts(examples)
        cells = [f"{len(examples):,}", *(f"{counts[index]:,}" for index in range(len(names)))]
        table.add_row(split, *cells, *([f"{_unlabelled(examples):,}"] if len(table.columns) > len(cells) + 1 else []))
    if len(data.labels.names) > len(names) > 0:
        table.caption = f"and {len(data.labels.names) - len(names)} more labels"
    return table


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


def _texts_table(data: GenerationData) -> Table:
    """Rows by split, and how long in words the middle one of their questions and answers is."""
    table = empty_table(["split", "rows", "words of a question", "words of an answer"])
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        questions = [" ".join([*(turn.content for turn in one.turns), one.document or ""]) for one in examples]
        answers = [one.answer or "" for one in examples]
        medians = (statistics.median(len(text.split()) for text in texts) for texts in (questions, answers))
        table.add_row(split, f"{len(examples):,}", *(f"{median:g}" for median in medians))
    return table


def _bad_rows_table(data: ClassificationData | GenerationData) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=f"{len(data.bad_rows):,} rows cannot be used"
    )
    table.add_column("where", overflow="fold")
    table.add_column("why", overflow="fold")
    for row in data.bad_rows[:BAD_ROWS_SHOWN]:
        table.add_row(row.where, row.reason)
    if len(data.bad_rows) > BAD_ROWS_SHOWN:
        table.caption = f"and {len(data.bad_rows) - BAD_ROWS_SHOWN:,} more"
    return table


def _costs(model: ModelRecord) -> list[float | int | None]:
    memory = model.peak_memory_bytes
    if not model.parameters:  # a rule, which costs nothing
        return [None] * 4
    return [
        model.parameters,
        model.bytes_on_disk / _MEGABYTE,
        model.examples_per_second,
        None if memory is None else memory / _MEGABYTE,
    ]


def _cost(value: float | int | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _decimals(value: float | int | None) -> str:
    return _NOTHING if value is None else f"{value:.4f}"


def _ratio(value: float | int | None, whole: float | int | None) -> str:
    return _NOTHING if value is None or not whole else f"{value / whole:.2f}x"
