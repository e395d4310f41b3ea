"""The memory that one unit of work needs, each time in a fresh process: python -m benchmarks.memory ROW SIDE."""

import argparse
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from benchmarks.pairs import Ratio

CALLS: Final = 3
"""Calls of the work in one process: the second is the first with an optimizer's state and gradients to go."""

_PROCESS: Final = Path("/proc/self")


def memory_ratio(row: str, processes: int, *, tiny: bool) -> Ratio:
    """Peak bytes of one side over the other, the processes of both in turn; the interval is from end to end."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(processes):
        for side in (0, 1):
            found[side].append(float(_measured(row, side, tiny=tiny)))
    first, second = (sorted(side) for side in found)
    middle = processes // 2
    low, high = first[0] / second[-1], first[-1] / second[0]
    return Ratio(first[middle], second[middle], first[middle] / second[middle], low, high, processes)


def _measured(row: str, side: int, *, tiny: bool) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", row, str(side), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def peak_bytes(row: str, side: int, *, tiny: bool) -> int:
    """Highest resident memory of the work less what was resident before it."""
    from benchmarks.table import ROWS

    found = ROWS[row]
    with found.sides[side](found.setting.tiny() if tiny else found.setting) as work:
        with suppress(OSError):
            # The peak so far is forgotten: making the models may have needed more.
            (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")
        before = _resident("VmRSS")
        for _ in range(CALLS):
            work()
        return _resident("VmHWM") - before


def _resident(name: str) -> int:
    # Not `ru_maxrss`: Linux hands that of the parent on to its children.
    fields = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("side", type=int, choices=(0, 1))
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    print(peak_bytes(chosen.row, chosen.side, tiny=chosen.tiny))
