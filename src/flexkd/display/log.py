"""The log of a command: on the terminal as much as was asked for, in the log file of the run folder every line."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Final

from flexkd.display.text import fitted, printable
from flexkd.processes import speaks

RESULTS: Final = "flexkd.display.results"
"""Logger of what standard output or standard error shows by itself: its lines go to the log file alone."""

_LIBRARIES: Final = ("transformers", "datasets", "accelerate", "huggingface_hub", "httpx")
_WARNINGS: Final = "py.warnings"
"""Logger of `warnings`, where Python sends them to the log."""

_logger = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    """Messages as they are, warnings with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _TerminalHandler(logging.Handler):
    """Standard error: above a bar, and in a terminal with lines broken between words, in a pipe nowhere."""

    def __init__(self, level: int):
        super().__init__(level)
        self.addFilter(lambda record: record.name != RESULTS)

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(fitted(self.format(record), sys.stderr), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _RunFileHandler(logging.Handler):
    """The log file of a run folder, once that is there: a run that is refused makes no folder, and no file in it."""

    def __init__(self, file: Path):
        super().__init__(logging.DEBUG)
        self.file = file
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created).isoformat(" ", "seconds")
        self._lines.append(f"{time} {self.format(record)}\n")
        if not self.file.parent.is_dir():
            return
        lines, self._lines = self._lines, []
        try:
            with self.file.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
        except OSError as error:
            # Without it, this very warning would be written to the file, and fail.
            logging.getLogger("flexkd").removeHandler(self)
            _logger.warning("%s: cannot be written (%s); the terminal alone shows what follows.", self.file, error)


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send flexkd's log to standard error; other libraries log warnings and errors only, and draw no bars in a pipe.

    Args:
        verbose: Show details too, with the time and the module of each line.
        quiet: Show warnings and errors alone, and no bars.
    """
    level = logging.DEBUG if verbose else logging.INFO
    terminal = _TerminalHandler(logging.ERROR if not speaks() else logging.WARNING if quiet else level)
    terminal.setFormatter(_Formatter("%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s"))
    logger = logging.getLogger("flexkd")
    logger.handlers = [terminal]
    logger.setLevel(level)
    logging.getLogger(_WARNINGS).handlers = [terminal]
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING if speaks() else logging.ERROR)
        library.handlers = [handler for handler in library.handlers if not isinstance(handler, _RunFileHandler)]
    # These libraries set their level again when they are imported, and decide on their bars, from these variables.
    for variable in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(variable, "warning" if speaks() else "error")
    if not shows_bars():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def keep_log(file: Path, command: str) -> None:
    """Append every line of this process to a file, whatever the terminal shows: to be called after `set_up_logging`.

    Args:
        file: In a run folder, which may not be there yet.
        command: What was typed; the first line.
    """
    if not speaks():
        return
    handler = _RunFileHandler(file)
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("flexkd")
    logger.setLevel(logging.DEBUG)
    for name in ("flexkd", _WARNINGS, *_LIBRARIES):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger(RESULTS).debug("$ %s", command)


def shows_bars() -> bool:
    """Whether progress is a bar: in a terminal or a notebook, unless quiet was asked for; else it is lines."""
    in_notebook = "ipykernel" in sys.modules
    return not is_quiet() and speaks() and (in_notebook or sys.stderr.isatty())


def is_quiet() -> bool:
    """Whether the user asked for warnings, errors and results alone."""
    handlers = logging.getLogger("flexkd").handlers
    return any(isinstance(handler, _TerminalHandler) and handler.level > logging.INFO for handler in handlers)
