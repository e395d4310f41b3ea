"""Measure the rows of the table and write docs/benchmarks.md: python -m benchmarks [ROW ...] [--pairs N]."""

import argparse
import datetime
from typing import Any

from benchmarks.machine import commit, machine
from benchmarks.page import measured, read_record, write
from benchmarks.pairs import Ratio, Seconds, pairs_of
from benchmarks.process import hush, started
from benchmarks.table import ROWS, VALUES, Row


def main() -> None:
    """Measure what was asked for, a row at a time; each stands on the page as soon as it is done."""
    asked = _arguments()
    known = [*ROWS, *VALUES]
    names = [one for one in known if not asked.rows or any(one.startswith(start) for start in asked.rows)]
    if not names:
        raise SystemExit(f"no row begins with {' or '.join(asked.rows)}. Known: {', '.join(known)}.")
    hush()
    # Figures of another machine or of other versions would stand beside figures that they do not compare with.
    record, here = read_record(), machine()
    if _fixed(record["machine"]) != _fixed(here):
        record = {"machine": here, "rows": {}}
    for name in names:
        entry = _measure(name, asked)
        if not asked.tiny:
            record["rows"] = {
                one: {**record["rows"], name: entry}[one] for one in known if one in {*record["rows"], name}
            }
            write(record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows whose name begins so; none: all")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of each row (20)")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each side (3)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, nothing written: to see that it runs")
    return parser.parse_args()


def _measure(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit()}
    if name in VALUES:
        value = VALUES[name]
        found = value.measure(value.setting.tiny() if asked.tiny else value.setting, asked.pairs)
        print(f"{name}: {sorted(found)[len(found) // 2]:.3g}", flush=True)
        return {**stamp, "values": found}
    ratios = _ratios(name, ROWS[name], asked)
    for measure, ratio in ratios.items():
        print(f"{name} {measure}: {ratio.value:.3f} ({ratio.low:.3f} .. {ratio.high:.3f})", flush=True)
    return measured(ratios, **stamp)


def _ratios(name: str, row: Row, asked: argparse.Namespace) -> dict[str, Ratio]:
    memory: list[tuple[float, float]] = []
    pairs: list[tuple[Seconds, Seconds]] = []
    for turn in range(asked.processes):
        with started(name, 0, tiny=asked.tiny) as first, started(name, 1, tiny=asked.tiny) as second:
            memory.append((first.peak_bytes, second.peak_bytes))
            if "time" in row.bars:
                pairs += pairs_of(first.work, second.work, -(-(asked.pairs - len(pairs)) // (asked.processes - turn)))
    ratios = {
        measure: Ratio.of(
            *zip(*((getattr(a, measure), getattr(b, measure)) for a, b in pairs), strict=True), len(memory)
        )
        for measure in Seconds._fields
        if pairs
    }
    if "memory" in row.bars:
        ratios["memory"] = Ratio.from_end_to_end(*zip(*memory, strict=True))
    return ratios


def _fixed(facts: dict[str, str]) -> dict[str, str]:
    """All but what is measured anew each time."""
    return {name: value for name, value in facts.items() if name != "bfloat16"}


if __name__ == "__main__":
    main()
