"""Measure the rows of the table and write docs/benchmarks.md: python -m benchmarks [ROW ...] [--pairs N]."""

import argparse
import datetime
from typing import Any

from benchmarks.machine import commit, machine
from benchmarks.page import measured, read_record, write
from benchmarks.pairs import Ratio, Seconds, pairs_of
from benchmarks.process import silence_libraries, started
from benchmarks.table import ROWS, VALUES, Row


def main() -> None:
    """Measure the selected rows one by one, and update the page after each."""
    arguments = _arguments()
    all_names = [*ROWS, *VALUES]
    names = [name for name in all_names if not arguments.rows or name.startswith(tuple(arguments.rows))]
    if not names:
        raise SystemExit(f"no row begins with {' or '.join(arguments.rows)}. Known: {', '.join(all_names)}.")
    silence_libraries()
    # Figures from another machine or other versions do not compare with those of this one.
    record, this_machine = read_record(), machine()
    if _fixed(record["machine"]) != _fixed(this_machine):
        record = {"machine": this_machine, "rows": {}}
    for name in names:
        entry = _measure(name, arguments)
        if not arguments.tiny:
            entries = {**record["rows"], name: entry}
            record["rows"] = {row: entries[row] for row in all_names if row in entries}
            write(record)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="beginning of the names of rows; none: all rows")
    parser.add_argument("--pairs", type=int, default=20, help="pairs for each row (20)")
    parser.add_argument("--processes", type=int, default=3, help="processes for each side (3)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, nothing is written: to see that it runs")
    return parser.parse_args()


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit()}
    if name in VALUES:
        value = VALUES[name]
        figures = value.measure(value.setting.tiny() if arguments.tiny else value.setting, arguments.pairs)
        print(f"{name}: {sorted(figures)[len(figures) // 2]:.3g}", flush=True)
        return {**stamp, "values": figures}
    ratios = _ratios(name, ROWS[name], arguments)
    for measure, ratio in ratios.items():
        print(f"{name} {measure}: {ratio.value:.3f} ({ratio.low:.3f} .. {ratio.high:.3f})", flush=True)
    return measured(ratios, **stamp)


def _ratios(name: str, row: Row, arguments: argparse.Namespace) -> dict[str, Ratio]:
    memory: list[tuple[float, float]] = []
    pairs: list[tuple[Seconds, Seconds]] = []
    for turn in range(arguments.processes):
        with started(name, 0, tiny=arguments.tiny) as first, started(name, 1, tiny=arguments.tiny) as second:
            memory.append((first.peak_bytes, second.peak_bytes))
            if "time" in row.bars:
                remaining_turns = arguments.processes - turn
                pairs += pairs_of(first.work, second.work, -(-(arguments.pairs - len(pairs)) // remaining_turns))
    ratios = {}
    if pairs:
        above, below = zip(*pairs, strict=True)
        for measure in Seconds._fields:
            sides = ([getattr(seconds, measure) for seconds in side] for side in (above, below))
            ratios[measure] = Ratio.of(*sides, len(memory))
    if "memory" in row.bars:
        ratios["memory"] = Ratio.from_end_to_end(*zip(*memory, strict=True))
    return ratios


def _fixed(facts: dict[str, str]) -> dict[str, str]:
    """The facts that do not change from one measurement to the next."""
    return {name: value for name, value in facts.items() if name != "bfloat16"}


if __name__ == "__main__":
    main()
