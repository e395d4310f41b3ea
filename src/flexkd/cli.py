"""The command line: parse, call one function, print."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flexkd.errors import FlexKDError, RecipeError

_ARGUMENTS = "flexkd.arguments"


class _Commands(TyperGroup):
    """Gives every command the same ends: 2 for a user's mistake, 130 when interrupted, a traceback for ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FlexKDError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            command = shlex.join(["flexkd", *ctx.meta[_ARGUMENTS]])
            typer.echo(f"Interrupted. To go on where it stopped, run the same command: {command}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="flexkd",
    help="Distil a teacher into a smaller student of any hidden size, and see whether it was worth it.",
    epilog="A recipe is one YAML file. KEY=VALUE changes one of its values, as in training.learning_rate=1e-4.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that stand in for the recipe's.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, with times and places.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from flexkd import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _flexkd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # OpenMP reads it when torch is loaded. Its busy waiting makes two threads slower than one on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Find every problem of a recipe, its models' folders and its rows, without loading anything heavy."""
    from flexkd.preflight import preflight
    from flexkd.recipe import load_recipe
    from flexkd.terminal import print_preflight, set_up_logging

    set_up_logging(verbose=verbose)
    found = preflight(load_recipe(recipe, overrides or ()))
    print_preflight(found)
    found.raise_errors()
    typer.echo(f"{recipe}: no problems found")


@app.command()
def score(recipe: RecipePath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Score how much the task uses each unit of the teacher, and keep the scores in the run folder."""
    from flexkd.recipe import load_recipe
    from flexkd.terminal import print_scores, set_up_logging

    set_up_logging(verbose=verbose)
    checked = load_recipe(recipe, overrides or ())
    from flexkd.train import pipeline

    print_scores(pipeline.score(checked))


@app.command()
def distill(recipe: RecipePath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Do the whole job: teacher, scores, student, training, evaluation, report."""
    from flexkd.recipe import load_recipe
    from flexkd.terminal import print_plan, print_summary, set_up_logging

    set_up_logging(verbose=verbose)
    checked = load_recipe(recipe, overrides or ())
    print_plan(checked)
    from flexkd.train import pipeline

    print_summary(pipeline.distill(checked))
    typer.echo(f"student, report and record: {checked.output}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="teacher, student, or any model: a folder or a hub id.")],
    recipe: RecipePath,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Measure a model under the recipe's task: its quality and what it costs."""
    from flexkd.recipe import load_recipe
    from flexkd.terminal import print_models, set_up_logging

    set_up_logging(verbose=verbose)
    checked = load_recipe(recipe, overrides or ())
    from flexkd.train import pipeline

    print_models([pipeline.evaluate(model, checked)], checked.task.metric)


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Annotated[str | None, typer.Option(help="Methods, as A,B.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the student, as 0,1,2.")] = None,
    search: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="Values to try for every method; may be repeated.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run methods x seeds with the same data, steps and budget, and compare them in pairs."""
    from flexkd.recipe import load_recipe
    from flexkd.terminal import print_comparison, set_up_logging

    set_up_logging(verbose=verbose)
    checked = load_recipe(recipe, [*(overrides or ()), *_compare_overrides(methods, seeds, search or [])])
    from flexkd.compare import compare as run_comparison
    from flexkd.recipe.sections import CompareSection

    settings = checked.compare or CompareSection()
    compared = run_comparison(checked, methods=settings.methods, seeds=settings.seeds, search=settings.search)
    print_comparison(compared)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, or their record.json.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; report.html in the run folder, or here for several."),
    ] = None,
) -> None:
    """Draw the page again from the records of runs, without training."""
    from flexkd.record import RunRecord
    from flexkd.report.page import write_report

    records = [RunRecord.read(run / "record.json" if run.is_dir() else run) for run in runs]
    folder = (runs[0] if runs[0].is_dir() else runs[0].parent) if len(runs) == 1 else Path()
    page = output or folder / "report.html"
    write_report(records, page)
    typer.echo(str(page))


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="classification")],
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Run a whole job on real rows that an ordinary package carries."""
    from flexkd.terminal import print_summary, set_up_logging

    set_up_logging(verbose=verbose)
    from flexkd.demo import run_demo

    print_summary(run_demo(name, overrides or []))


def _compare_overrides(methods: str | None, seeds: str | None, search: list[str]) -> list[str]:
    """The options of `compare` as recipe values, so that they are checked and reported like those."""
    overrides = [f"compare.methods=[{methods}]"] if methods is not None else []
    overrides += [f"compare.seeds=[{seeds}]"] if seeds is not None else []
    choices = []
    for text in search:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise RecipeError(f"--search: {text!r} is no KEY=V1,V2. Write it as training.learning_rate=1e-4,5e-4.")
        choices.append(f"{json.dumps(key)}: [{values}]")
    return overrides + ([f"compare.search={{{', '.join(choices)}}}"] if choices else [])


def main() -> None:
    """Entry point of the `flexkd` command."""
    app()
