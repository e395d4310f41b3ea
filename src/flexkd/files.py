"""Paths as users write them, files that are written whole or not at all, and what a disk does not take."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flexkd.errors import DiskError, FlexKDError, RecipeError
from flexkd.processes import is_first

_VARIABLE: Final = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_POINTER: Final = b"version https://git-lfs"
_DRIVE: Final = re.compile(r"[A-Za-z]:[\\/]")
_LONGEST_NAME: Final = 255
"""Bytes in the name of a file or folder, on the file systems in use."""
_LONGEST_PATH: Final = 4095

_CURES: Final = {
    errno.ENOSPC: "Free some space there",
    errno.EDQUOT: "Free some of your quota there",
    errno.EFBIG: "Raise the limit of this process (ulimit -f), or use a file system that takes larger files",
    errno.EROFS: "Mount it so that it can be written",
    errno.EACCES: "Change its rights (ls -ld shows them)",
    errno.EPERM: "Change its rights (ls -ld shows them)",
}
"""Errors that no program can mend, each with what a user can do."""
_RUST_ERROR: Final = re.compile(r"\bos error (\d+)\b")
"""In messages of safetensors and tokenizers, which raise no OSError."""
_TORCH_ERROR: Final = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.DOTALL)
"""In messages of torch.save, which do not say why: mostly there is no space left."""

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
    partial = target.with_name(f"{target.name}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, whatever a library raises where the disk does not take a file is one error.

    Args:
        path: A file or folder that is written, for errors that name none.

    Raises:
        DiskError: Names the file, why, how much is free, and what to do.
    """
    try:
        yield
    except Exception as error:
        translated = disk_error(error, path)
        if translated is None:
            raise
        raise translated from error


def disk_error(error: BaseException, path: Path) -> DiskError | None:
    """The error of flexkd for one that the disk is to blame for; None for any other.

    Args:
        error: Of Python, or of a library that is written in another language.
        path: As in `writing`.
    """
    number = None if isinstance(error, FlexKDError) else _number_of(error)
    if number is None:
        return None
    name = error.filename if isinstance(error, OSError) else None
    place = Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else path
    reason = os.strerror(number)
    if number in (errno.ENOSPC, errno.EDQUOT):
        existing = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
        reason += f" ({shutil.disk_usage(existing).free / 1e6:,.1f} MB are free)"
    translated = DiskError(
        f"{place}: {reason}. {_CURES[number]}, then run the same again: it goes on where it stopped."
    )
    translated.errno = number
    return translated


def _number_of(error: BaseException) -> int | None:
    """The number of an error of the disk, from the error, its text or what caused it."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _CURES else None
    text = str(error)
    if match := _RUST_ERROR.search(text):
        return int(match[1]) if int(match[1]) in _CURES else None
    if _TORCH_ERROR.search(text):
        return errno.ENOSPC
    return None if error.__cause__ is None else _number_of(error.__cause__)


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
