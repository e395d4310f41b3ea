"""What commands share: exit codes, the log, and options as the KEY=VALUE behind them, checked like a recipe."""

import functools
import inspect
import json
import logging
import shlex
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from flexkd.display.log import RESULTS, keep_log, set_up_logging
from flexkd.errors import DiskError, FlexKDError, FollowedError, RecipeError
from flexkd.facts.methods import METHODS
from flexkd.facts.names import TASKS
from flexkd.files import writing
from flexkd.processes import leave, num_launched
from flexkd.run_files import COMPARISON_FILE, LOG_FILE, RECORD_FILE, SIZES_FILE

_typed: ContextVar[str] = ContextVar("typed", default="flexkd")


def completed(words: Collection[str]) -> Callable[[str], list[str]]:
    """The words that a shell completes what was typed to, one or several with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        chosen = before.split(",")
        return [f"{before}{comma}{word}" for word in words if word.startswith(last) and word not in chosen]

    return complete


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe of flexkd.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace those of the recipe.")
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run Python code that the recipe names.")]
TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="One of those named above.", autocompletion=completed(TASKS))
]
# There is a demo of each task.
DemoName = Annotated[
    str, typer.Argument(metavar="NAME", help="One of the three named above.", autocompletion=completed(TASKS))
]
DeviceName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="here (this machine, timed for a second), a100, h100, h200, l4 or rtx4090.",
        autocompletion=completed(("here", "a100", "h100", "h200", "l4", "rtx4090")),
    ),
]
METHOD_NAMES: Final = f"Built-in methods: {', '.join(METHODS)}."
MethodNames = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Built-in methods, which are named below, or those that the recipe defines.",
        autocompletion=completed(METHODS),
    ),
]
_LOG_OPTIONS: Final = {
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Show errors, warnings and the result alone.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Show more, with times and module names.")],
}


class CommandGroup(TyperGroup):
    """Exit codes of all commands: 2 for a user's mistake, 130 when interrupted, a traceback for a mistake of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and remember what was typed."""
        _typed.set(shlex.join(["flexkd", *args]))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; say in one message what a user can mend."""
        from flexkd.display.results import complain

        is_done = False
        try:
            # What was not said of a file of its own is said of this folder.
            with _terminated_as_interrupted(), writing(Path.cwd()):
                result = super().invoke(ctx)
            is_done = True
            return result
        except FollowedError:
            raise typer.Exit(2) from None
        except DiskError as error:
            complain(f"{error}\nThe command:", command=_typed.get())
            raise typer.Exit(2) from None
        except FlexKDError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("Interrupted. To continue where it stopped, run the same command:", command=_typed.get())
            raise typer.Exit(130) from None
        finally:
            leave(failed=not is_done)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within it SIGTERM, which batch systems and containers send, interrupts as Ctrl-C does.

    Not in several processes: one that waits for the others could not take it, and its launcher would wait in vain.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or num_launched() > 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def logged(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options --quiet and --verbose, which sets up its log before anything else."""

    @functools.wraps(command)
    def with_log(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        if quiet and verbose:
            raise RecipeError("--quiet, --verbose: one says less and one says more. Give one of them.")
        set_up_logging(verbose=verbose, quiet=quiet)
        try:
            command(*args, **options)
        except (FlexKDError, typer.Exit, typer.Abort):
            raise
        except Exception:
            # The terminal shows it as Python does.
            logging.getLogger(RESULTS).exception("a mistake of flexkd")
            raise

    signature = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _LOG_OPTIONS.items()
    ]
    with_log.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    return with_log


def keep_log_in(folder: Path) -> None:
    """Keep every line of this command in the log file of a run folder."""
    keep_log(folder / LOG_FILE, _typed.get())


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

        typer.echo(f"flexkd {__version__}")
        raise typer.Exit
    return is_requested
