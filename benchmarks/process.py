"""One side of a row in a process of its own, which works on request: python -m benchmarks.process ROW SIDE."""

import argparse
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from benchmarks.pairs import Seconds

_STATUS: Final = Path("/proc/self")


class Process:
    """A waiting process of one side, with no memory and no threads of the other side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.peak_bytes = int(self._answer())

    def work(self) -> Seconds:
        """Do one unit of work, and measure it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("work\n")
            self._process.stdin.flush()
        wall, cpu = self._answer().split()
        return Seconds(float(wall), float(cpu))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended with code {self._process.wait()}")  # type: ignore[arg-type]
        return line


def silence_libraries() -> None:
    """Suppress log messages and warnings between the figures."""
    logging.getLogger("flexkd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def started(row: str, side: int, *, tiny: bool) -> Iterator[Process]:
    """Start a process and let it warm up, after which its peak memory is known."""
    command = [sys.executable, "-m", "benchmarks.process", row, str(side), *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def serve(row: str, side: int, answers: IO[str], *, tiny: bool) -> None:
    """Main function of the process: warm up, print the memory that it took, then work once for every line of stdin."""
    from benchmarks.table import ROWS

    entry = ROWS[row]
    with entry.sides[side](entry.setting.tiny() if tiny else entry.setting) as work:
        with suppress(OSError):
            # Resets the peak, as creating the models may have needed more memory than a step.
            (_STATUS / "clear_refs").write_text("5", encoding="utf-8")
        before = _resident("VmRSS")
        for _ in range(entry.warm_up):
            work()
        print(_resident("VmHWM") - before, file=answers, flush=True)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            print(time.perf_counter() - wall, time.process_time() - cpu, file=answers, flush=True)


def _resident(name: str) -> int:
    # Not `ru_maxrss`, which on Linux a child inherits from its parent.
    fields = dict(line.split(":", 1) for line in (_STATUS / "status").read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("side", type=int, choices=(0, 1))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    silence_libraries()
    # Libraries may print to stdout: that is redirected to stderr, so that the pipe carries answers alone.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(arguments.row, arguments.side, pipe, tiny=arguments.tiny)
