"""One side of a row in a process of its own, which works when it is told to: python -m benchmarks.process ROW SIDE."""

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
    """A side that waits: nothing of the other one, no memory, no thread, is in its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.peak_bytes = int(self._answer())

    def work(self) -> Seconds:
        """One unit of work."""
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


def hush() -> None:
    """What libraries would say beside the figures."""
    logging.getLogger("flexkd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def started(row: str, side: int, *, tiny: bool) -> Iterator[Process]:
    """A process that is warm; its peak memory, less what stood in memory before the first call, is known."""
    command = [sys.executable, "-m", "benchmarks.process", row, str(side), *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def serve(row: str, side: int, answers: IO[str], *, tiny: bool) -> None:
    """The process's own part: warm up, tell the memory it took, then a unit of work for every line that comes."""
    from benchmarks.table import ROWS

    found = ROWS[row]
    with found.sides[side](found.setting.tiny() if tiny else found.setting) as work:
        with suppress(OSError):
            # The peak so far is forgotten: making the models may have needed more.
            (_STATUS / "clear_refs").write_text("5", encoding="utf-8")
        before = _resident("VmRSS")
        for _ in range(found.warm_up):
            work()
        print(_resident("VmHWM") - before, file=answers, flush=True)
        for _ in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            print(time.perf_counter() - wall, time.process_time() - cpu, file=answers, flush=True)


def _resident(name: str) -> int:
    # Not `ru_maxrss`: Linux hands that of the parent on to its children.
    fields = dict(line.split(":", 1) for line in (_STATUS / "status").read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("side", type=int, choices=(0, 1))
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    hush()
    # Libraries may print what they like: it goes where the errors go, answers keep the pipe for themselves.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(chosen.row, chosen.side, pipe, tiny=chosen.tiny)
