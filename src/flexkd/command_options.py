"""What commands share: exit codes, and options as the KEY=VALUE that stand behind them, checked like a recipe."""

import json
import shlex
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperGroup

from flexkd.errors import FlexKDError, RecipeError
from flexkd.run_files import COMPARISON_FILE, RECORD_FILE, SIZES_FILE

_ARGUMENTS: Final = "flexkd.arguments"


class CommandGroup(TyperGroup):
    """Exit codes of all commands: 2 for a user's mistake, 130 when interrupted, a traceback for a mistake of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and remember what was typed."""
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; say in one message what a user can mend."""
        try:
            return super().invoke(ctx)
        except FlexKDError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            command = shlex.join(["flexkd", *ctx.meta[_ARGUMENTS]])
            typer.echo(f"Interrupted. To continue where it stopped, run the same command: {command}", err=True)
            raise typer.Exit(130) from None


def compare_overrides(methods: str | None, seeds: str | None, search: list[str]) -> list[str]:
    """The options of `compare` as KEY=VALUE, so that they are checked and reported like values of the recipe."""
    overrides = [f"compare.methods=[{methods}]"] if methods is not None else []
    overrides += [f"compare.seeds=[{seeds}]"] if seeds is not None else []
    choices = []
    for text in search:
        key, equals, values = text.partition("=")
        if not key or not equals:
            raise RecipeError(f"--search: {text!r} is no KEY=V1,V2. Write it as training.learning_rate=1e-4,5e-4.")
        choices.append(f"{json.dumps(key)}: [{values}]")
    return overrides + ([f"compare.search={{{', '.join(choices)}}}"] if choices else [])


def sizes_overrides(sizes: str | None, seeds: str | None) -> list[str]:
    """The options of `sizes` as KEY=VALUE."""
    lists = {"values": sizes, "seeds": seeds}
    return [f"sizes.{key}=[{text}]" for key, text in lists.items() if text is not None]


def columns(texts: list[str]) -> dict[str, str]:
    """The options --column by what the column holds."""
    by_content = {}
    for text in texts:
        name, _, column = text.partition("=")
        if not name or not column:
            raise RecipeError(f"--column: {text!r} is no NAME=COLUMN. Write it as text=review.")
        by_content[name] = column
    return by_content


def record_file(run: Path) -> Path:
    """The record of a run folder, or of the folder of a comparison or of several sizes.

    Raises:
        RecipeError: The folder holds several of these.
    """
    if not run.is_dir():
        return run
    records = [run / name for name in (RECORD_FILE, COMPARISON_FILE, SIZES_FILE)]
    present = [record for record in records if record.exists()]
    if len(present) > 1:
        names = " and ".join(record.name for record in present)
        raise RecipeError(f"RUN: {run} holds {names}. Give the file that is meant, as {present[0]}.")
    return present[0] if present else records[0]


def print_version(is_requested: bool) -> bool:
    """Print the version where it was asked for, and stop."""
    if is_requested:
        from flexkd import __version__

        typer.echo(__version__)
        raise typer.Exit
    return is_requested
