"""A piece of work in a run folder: it holds the folder, and what the disk does not take is one error."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from flexkd.errors import ArtifactError, FlexKDError
from flexkd.files import writing
from flexkd.guards.locks import holder, locked
from flexkd.processes import alone, is_first, join
from flexkd.run_files import LOCK_FILE

_ADVICE: Final = "name another output"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class _Work:
    """What ends when a piece of work ends, and the folders that it holds."""

    stack: ExitStack
    folders: set[Path] = field(default_factory=set)


_current: Final[ContextVar[_Work | None]] = ContextVar("work", default=None)


def in_run_folder(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose first argument is a recipe, and that writes into its run folder, as the only one at a time.

    A folder in which another process works is refused first of all. It is held from `hold_folder` on, which follows the
    checks, so that a run which they refuse makes no folder; it is free again when the function ends. Functions that
    it calls may be such functions too.

    Raises:
        ArtifactError: Another process works in the folder.
        DiskError: The disk did not take a file.
    """

    @functools.wraps(work)
    def alone_in_folder(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        folder = _folder(args[0] if args else options.get("recipe"))
        if folder is None or _current.get() is not None:
            return work(*args, **options)
        join()
        alone(lambda: check_free(folder))
        with writing(folder), ExitStack() as stack:
            stack.callback(_current.reset, _current.set(_Work(stack)))
            return work(*args, **options)

    return alone_in_folder


def hold_folder(folder: Path) -> None:
    """Hold a run folder, which may be new, until the function of `in_run_folder` ends; outside of one nothing is held.

    Raises:
        ArtifactError: Another process works in it.
    """
    work = _current.get()
    if work is None or folder in work.folders or not is_first():
        return
    work.folders.add(folder)
    work.stack.enter_context(_held(folder))


def check_free(folder: Path) -> None:
    """Refuse a run folder in which another process works.

    Raises:
        ArtifactError: Names the process.
    """
    if other := holder(folder / LOCK_FILE):
        raise ArtifactError(f"{folder}: {other} works there. Wait for it, or {_ADVICE}.")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK_FILE, what=str(folder), advice=_ADVICE):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it stays where something was written
                folder.rmdir()


def _folder(recipe: Any) -> Path | None:
    """The run folder; None where it cannot be named, which the checks say with all else that is wrong."""
    try:
        return Path(recipe.folder)
    except (AttributeError, FlexKDError):
        return None
