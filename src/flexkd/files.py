"""Paths as users write them, and files that are written whole or not at all."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flexkd.errors import RecipeError
from flexkd.processes import is_first

_VARIABLE: Final = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_POINTER: Final = b"version https://git-lfs"
_DRIVE: Final = re.compile(r"[A-Za-z]:[\\/]")
_LONGEST_NAME: Final = 255
"""Bytes in the name of a file or folder, on the file systems in use."""
_LONGEST_PATH: Final = 4095

IS_FILE: Final = "it is a file"
"""Reason of `why_not_writable` for a path that is a file."""


def local_path(text: str | Path, *, where: str) -> Path:
    """A path on this machine, as a recipe, an argument or an environment variable names it.

    `~` and `~user` at its start are the home folder of that user, `$NAME` and `${NAME}` are environment variables. A
    path that exists as it is written, with a dollar or a backslash in it, is not expanded.

    Args:
        text: Absolute, or relative to the working folder; a relative path stays relative.
        where: The recipe key, argument or variable, for messages.

    Raises:
        RecipeError: No such user or variable, a URL, or a path as Windows writes it on another system.

    Example:
        >>> local_path("runs/tiny/", where="output").as_posix()
        'runs/tiny'
    """
    written = str(text)
    if written.startswith("~"):
        try:
            written = str(Path(written).expanduser())
        except RuntimeError:
            raise RecipeError(f"{where}: '{text}': that user has no home folder. Write the path out.") from None
    if _is_literal(Path(written)):
        return Path(written)
    written = _VARIABLE.sub(lambda match: _variable(match[1] or match[2], where, str(text)), written)
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(written).parts):
        raise RecipeError(f"{where}: '{text}' holds a name of more than {_LONGEST_NAME} bytes. Shorten it.")
    if len(os.fsencode(written)) > _LONGEST_PATH:
        raise RecipeError(f"{where}: a path of more than {_LONGEST_PATH} bytes. Shorten it.")
    if any(ord(character) < 32 for character in written):
        raise RecipeError(f"{where}: {written!r} holds a line break or another control character. Remove it.")
    if _URL.match(written):
        raise RecipeError(f"{where}: '{text}' is a URL, not a path on this machine. Fetch it, then give its path.")
    if os.sep == "/" and ("\\" in written or _DRIVE.match(written)):
        plain = _DRIVE.sub("", written).replace("\\", "/")
        raise RecipeError(f"{where}: '{text}' is written as on Windows. Here '/' separates folders, as in '{plain}'.")
    return Path(written)


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; False also for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_pointer(file: Path) -> bool:
    """Whether a file is the pointer that Git LFS leaves in place of a file that was not fetched."""
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def why_not_writable(folder: Path) -> str:
    """Why a folder cannot be created or written into, as a clause; empty if it can. Nothing is created."""
    for place in (folder, *folder.absolute().parents):
        try:
            if place.is_dir():
                return "" if os.access(place, os.W_OK | os.X_OK) else f"'{place}' is not writable"
            if place.is_symlink() and not place.exists():
                return f"'{place}' is a link to '{place.readlink()}', which is not there"
            if place.exists():
                return IS_FILE if place == folder else f"'{place}' is a file"
        except OSError as error:
            return str(error.strerror)
    return ""


def output_file(text: str | Path, *, where: str) -> Path:
    """The path of a file that will be written, after a check that it can be; folders above it may be new.

    Args:
        text: As in `local_path`, like `where`.

    Raises:
        RecipeError: As `local_path`; or it is a folder, or cannot be written.
    """
    file = local_path(text, where=where)
    if file.is_dir():
        raise RecipeError(f"{where}: '{text}' is a folder. Name a file in it.")
    reason = why_not_writable(file.parent)
    if reason == IS_FILE:
        reason = f"'{file.parent}' is a file"
    elif not reason and file.exists() and not os.access(file, os.W_OK):
        reason = "it is not writable"
    if reason:
        raise RecipeError(f"{where}: '{text}' cannot be written: {reason}. Name another file.")
    return file


@contextmanager
def written_whole(path: str | Path, *, by_each: bool = False) -> Iterator[Path]:
    """Give a path to write to; the file replaces `path` when the block ends, or is removed when it raises.

    Folders above it are created. Of several processes that run a recipe together the first one writes; what the others
    write goes into a folder that is removed, as it is the same.

    Args:
        by_each: Each process has a `path` of its own.
    """
    target = Path(path)
    if not is_first() and not by_each:
        with tempfile.TemporaryDirectory(prefix="flexkd-") as scratch:
            yield Path(scratch, target.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _is_literal(path: Path) -> bool:
    """Whether a path exists as it is written, at least up to its last part with a dollar or a backslash."""
    unusual = [length for length, part in enumerate(path.parts, start=1) if "$" in part or "\\" in part]
    return is_there(path) or (bool(unusual) and is_there(Path(*path.parts[: unusual[-1]])))


def _variable(name: str, where: str, text: str) -> str:
    if name not in os.environ:
        raise RecipeError(
            f"{where}: '{text}': the environment variable {name!r} is not set. Set it, or write the path out."
        )
    return os.environ[name]
