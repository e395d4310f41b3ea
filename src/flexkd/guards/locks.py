"""Locks that end with their process: one at a time writes into a folder, and the others are told which one it is."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from flexkd.errors import ArtifactError
from flexkd.files import writing
from flexkd.processes import is_first

logger = logging.getLogger(__name__)

_PROBE: Final = 0.2
"""Seconds in which whoever only asks has let go of a lock again."""
_LAST_BREATH: Final = 10.0
"""Seconds in which the workers of a process that was killed end; they are forks of it, and hold what it held."""


@contextmanager
def locked(lock: Path, *, what: str, advice: str) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards; of several processes of one run the first holds it for all.

    The system frees the lock when its process ends, however it ends. It holds on one machine, and on file systems that
    share locks.

    Args:
        lock: The file; the folder that it lies in is there.
        what: What is written under the lock: the beginning of the message.
        advice: What else the user can do than wait.

    Raises:
        ArtifactError: Another process holds it; names that process and its machine.
    """
    if not is_first():
        yield
        return
    with writing(lock):
        handle, other = _attempt(lock)
    if other:
        raise ArtifactError(f"{what}: {other} works there. Wait for it, or {advice}.")
    try:
        yield
    finally:
        # On Windows a file that is open stays.
        with suppress(OSError):
            lock.unlink()
        handle.release()


@contextmanager
def awaited(lock: Path, *, what: str) -> Iterator[None]:
    """Hold a lock file as soon as nobody else does; logs for whom it waits. The file stays.

    Args:
        lock: As in `locked`.
        what: What is made under the lock, once for all that need it.
    """
    if not is_first():
        yield
        return
    with writing(lock):
        handle, other = _attempt(lock)
        if other:
            logger.info("%s: %s is making it; waiting, to use what it has made", what, other)
            handle.acquire()
            _sign(lock)
    try:
        yield
    finally:
        handle.release()


def holder(lock: Path) -> str:
    """Who holds a lock file, as `process 12 on node3`; empty if nobody does."""
    try:
        if not lock.is_file():
            return ""
        handle, other = _attempt(lock, signs=False)
    except OSError:  # of a folder that cannot be written, of which other checks speak
        return ""
    if not other:
        handle.release()
    return other


def _attempt(lock: Path, *, signs: bool = True) -> tuple[FileLock, str]:
    """A lock, and who has it in place of this process; empty if this one has it now."""
    handle = FileLock(lock)
    # Read first: old versions of filelock empty the file even where they do not get the lock.
    signature = _signature(lock)
    try:
        handle.acquire(timeout=_LAST_BREATH if _has_ended(signature) else _PROBE)
    except Timeout:
        process, _, host = (signature or _signature(lock)).partition(" ")
        return handle, f"process {process} on {host}" if host else "another process"
    if signs:
        _sign(lock)
    return handle, ""


def _sign(lock: Path) -> None:
    with suppress(OSError):  # a full disk, or Windows, where the bytes of the file are locked
        lock.write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")


def _signature(lock: Path) -> str:
    """What the holder of a lock has written into it; empty where it cannot be read."""
    with suppress(OSError, ValueError):
        return lock.read_text(encoding="utf-8").strip()
    return ""


def _has_ended(signature: str) -> bool:
    """Whether the process that signed ran on this machine and is gone."""
    process, _, host = signature.partition(" ")
    if os.name != "posix" or not process.isdigit() or host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
