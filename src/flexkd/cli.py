"""The command line: parse, call one function, print."""

import json
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flexkd.allocator import keep_pages
from flexkd.command_options import (
    METHOD_NAMES,
    AllowCode,
    CommandGroup,
    DemoName,
    DeviceName,
    MethodNames,
    Overrides,
    RecipePath,
    TaskName,
    columns,
    compare_overrides,
    completed,
    keep_log_in,
    logged,
    print_version,
    record_file,
    sizes_overrides,
)
from flexkd.data.sources.table import TextFormat
from flexkd.display.results import say, show
from flexkd.files import local_path, output_file
from flexkd.processes import check_one_process, join
from flexkd.run_files import (
    REPORT_FILE,
    SIZES_FOLDER,
    STUDENT_FOLDER,
    TUNING_FILE,
)

app = typer.Typer(
    cls=CommandGroup,
    name="flexkd",
    help="Distil a teacher into a smaller student of any hidden size, and see whether it was worth it.",
    epilog="A recipe is one YAML file. KEY=VALUE changes one of its values, as in training.learning_rate=1e-4.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def _flexkd(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # OpenMP reads it when torch is loaded. Its busy waiting makes two threads slower than one on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
@logged
def init(
    task: TaskName,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="Your rows: a file, a folder or a hub id.")] = None,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe for your rows: classification, instruction, summarization, or a named recipe of flexkd."""
    from flexkd.draft.recipe_text import write_draft

    file = output_file(output, where="--output")
    say(write_draft(file, task, data, overrides or ()))
    say(f"written: {output}. Next: flexkd check {shlex.quote(str(output))}")


@app.command()
@logged
def check(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Find every problem in a recipe, its models' folders and its rows, without loading anything heavy."""
    from flexkd import preflight
    from flexkd.terminal import print_preflight

    result = preflight.check(_recipe(recipe, overrides, allow_code))
    print_preflight(result)
    result.raise_errors()
    say(f"{recipe}: no problems found")


@app.command()
@logged
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    device: DeviceName = "here",
    processes: Annotated[int, typer.Option(metavar="N", min=1, help="Processes, each with such a device.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="They divide the weights of a model that trains, too.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Predict from configs alone what a run will cost in memory and time, and whether it fits on a device."""
    checked = _recipe(recipe, overrides, allow_code)
    from flexkd.costs import planning
    from flexkd.costs.printing import print_run_plan

    print_run_plan(planning.plan(checked, device, processes=processes, is_divided=fsdp))


@app.command()
@logged
def score(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Score how much the task uses each unit of the teacher, and keep the scores in the run folder."""
    from flexkd.terminal import print_scores

    checked = _job(recipe, overrides, allow_code)
    from flexkd.pipeline import distill as pipeline

    print_scores(pipeline.score(checked))


@app.command()
@logged
def distill(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Do the whole job: teacher, scores, student, training, evaluation, report."""
    _distill(_job(recipe, overrides, allow_code))


@app.command()
@logged
def cache(
    recipe: RecipePath,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check an existing cache: its files, and its answers to some rows.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run the teacher once on all rows and keep its answers on disk, where `distill` finds them (teacher.cache)."""
    checked = _job(recipe, overrides, allow_code)
    from flexkd.pipeline.sharing import cache_answers, verify_answers

    if not verify:
        say(f"cache: {cache_answers(checked).describe()}")
        return
    cached, verification = verify_answers(checked)
    say(f"cache: {cached.describe()}\nverified: {verification}")


@app.command()
@logged
def generate(recipe: RecipePath, overrides: Overrides = None, allow_code: AllowCode = False) -> None:
    """Write the teacher's answers to the training rows, for a recipe that trains on them (data.teacher_answers)."""
    checked = _job(recipe, overrides, allow_code)
    from flexkd.pipeline.answering import answer_training_rows

    path = answer_training_rows(checked)
    say(f"answers: {path}\nto train on them: data.teacher_answers={path}")


@app.command()
@logged
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="teacher, student, or any model: a folder or a hub id.",
            autocompletion=completed(("teacher", "student")),
        ),
    ],
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_code: AllowCode = False,
) -> None:
    """Measure a model on the recipe's task: its quality and what it costs."""
    from flexkd.terminal import print_models

    checked = _job(recipe, overrides, allow_code)
    from flexkd.facts.metrics import deviations
    from flexkd.pipeline import distill as pipeline

    metric, problem = checked.task.metric, checked.task.problem
    print_models([pipeline.evaluate(model, checked)], metric, deviations(problem, [metric], checked.model_dump()))


@app.command()
@logged
def predict(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The student folder of a run.")],
    source: Annotated[str, typer.Argument(metavar="FILE", help="Rows to answer: a file, a folder or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="The file that is written.")
    ] = Path("predictions.jsonl"),
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="Which column holds a text, as text=body; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of a forward pass.")] = 32,
    separator: Annotated[str, typer.Option(metavar="NAME", help="Between columns, as in a recipe.")] = "auto",
    encoding: Annotated[str, typer.Option(metavar="NAME", help="Of a text file, as in a recipe.")] = "auto",
) -> None:
    """Let a finished student answer new rows without labels: one JSON line a row, into predictions.jsonl."""
    options: dict[str, Any] = {"columns": columns(column or []), "text_format": TextFormat(separator, encoding)}
    from flexkd.predict.files import predict_file
    from flexkd.predict.student import load_student

    check_one_process("predict")
    file = output_file(output, where="--output")
    path = predict_file(load_student(student), source, file, batch_size=batch_size, **options)
    say(f"predictions: {path}")


@app.command()
@logged
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or the student folder in it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, as owner/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new one. Default: as the hub decides.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Default: the main branch.")] = None,
) -> None:
    """Upload a finished student with its model card to the Hugging Face hub; a run does it itself with push_to_hub."""
    from flexkd.report import delivery

    check_one_process("push")
    say(f"uploaded: {delivery.push(run, repo, private=private, revision=revision)}")


@app.command(epilog=METHOD_NAMES)
@logged
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: MethodNames = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the student, as 0,1,2.")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of a key to try for every method; may be repeated."),
    ] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help="Give each method the values that `tune` chose.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run methods x seeds with the same data, steps and budget, and compare them paired by seed."""
    from flexkd.terminal import print_comparison

    checked = _job(recipe, [*(overrides or ()), *compare_overrides(methods, seeds, search or [])], allow_code)
    from flexkd.report import delivery

    print_comparison(delivery.compare(checked, tuned=tuned))
    say(f"page: {checked.folder / REPORT_FILE}")


@app.command(epilog=METHOD_NAMES)
@logged
def tune(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: MethodNames = None,
    trials: Annotated[
        str | None, typer.Option(metavar="N", help="Number of students that are trained for each method.")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Search the values of each method on the validation rows, with as many trials for each (needs flexkd[tune])."""
    from flexkd.terminal import print_tuning

    more = [f"compare.trials={trials}"] if trials is not None else []
    checked = _job(recipe, [*(overrides or ()), *compare_overrides(methods, None, []), *more], allow_code)
    from flexkd.pipeline.search import tuning

    print_tuning(tuning.tune(checked))
    say(f"values: {checked.folder / TUNING_FILE}\nto compare methods with them: flexkd compare RECIPE --tuned")


@app.command()
@logged
def sizes(
    recipe: RecipePath,
    overrides: Overrides = None,
    values: Annotated[
        str | None,
        typer.Option("--sizes", metavar="V1,V2", help="Sizes, as 0.1,0.5; of student.size, or of sizes.key."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the student, as 0,1,2.")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Distil one recipe at several sizes: quality against size and speed, and the smallest that keeps enough."""
    checked = _job(recipe, [*(overrides or ()), *sizes_overrides(values, seeds)], allow_code)
    from flexkd.report import delivery
    from flexkd.report.size_table import print_sizes

    print_sizes(delivery.sizes(checked))
    say(f"students: {checked.folder / SIZES_FOLDER}\npage: {checked.folder / REPORT_FILE}")


@app.command()
@logged
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or their record.json.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page; by default report.html in the run folder, or in this folder for several runs.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="csv, latex or markdown: a table with intervals in place of the page."),
    ] = None,
) -> None:
    """Draw the page of a run, of several runs, of a comparison or of sizes again from its record, or make a table."""
    from flexkd.report.page import draw

    files = [record_file(local_path(run, where="RUN")) for run in runs]
    target = output_file(output, where="--output") if output is not None else None
    say(draw(files, target, form))


@app.command()
@logged
def schema() -> None:
    """Print the JSON schema of a recipe, with which an editor completes keys and marks mistakes."""
    from flexkd.reference.json_schema import recipe_schema

    say(json.dumps(recipe_schema(), indent=2))


@app.command()
@logged
def demo(
    name: DemoName,
    overrides: Overrides = None,
) -> None:
    """Run a complete example with a real model and rows: classification, instruction or summarization."""
    from flexkd.demo import demo_recipe

    recipe = demo_recipe(name, overrides or ())
    keep_log_in(recipe.folder)
    _distill(recipe)


# Recipe is not imported for its type alone: --help has to answer at once.
def _recipe(path: Path, overrides: Sequence[str] | None, allow_code: bool) -> Any:
    """The checked recipe of a command, whose processes meet first: one of them then says what is wrong with it."""
    from flexkd.recipe import load_recipe

    join()
    return load_recipe(path, overrides or (), allow_code=allow_code)


def _job(path: Path, overrides: Sequence[str] | None, allow_code: bool) -> Any:
    """The checked recipe of a command that works in the run folder, where it keeps its log."""
    recipe = _recipe(path, overrides, allow_code)
    keep_log_in(recipe.folder)
    return recipe


def _distill(recipe: Any) -> None:
    """Say what will be done, do the whole job, and say what came of it."""
    from flexkd.terminal import print_plan, print_summary

    print_plan(recipe)
    from flexkd.report.delivery import finished_run, upload
    from flexkd.report.verdicts import verdict

    record = finished_run(recipe)
    print_summary(record)
    show(str(verdict(record)))
    say(f"student: {recipe.folder / STUDENT_FOLDER}\npage: {recipe.folder / REPORT_FILE}")
    if url := upload(recipe):
        say(f"uploaded: {url}")


def main() -> None:
    """Entry point of the `flexkd` command."""
    keep_pages()
    logging.captureWarnings(True)
    app()
