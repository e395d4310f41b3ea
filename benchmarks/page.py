"""The page docs/benchmarks.md, written from the record docs/benchmarks.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.pairs import Ratio
from benchmarks.table import ROWS, VALUES

_DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
_RECORD: Final = _DOCS / "benchmarks.json"

_HEAD: Final = """# Benchmarks

What flexkd costs against its rivals, as ratios: below 1 is less. `make bench` measures it anew and writes this page;
`make bench ARGS="gkd chunked --pairs 30"` some rows of it.

Both sides of a row have the same models (SmolLM2-135M's shape as the teacher, a student of 16 layers x 288, random
weights), rows, attention (eager), autocast (bfloat16) and optimizer, without gradient checkpointing. *f* is the share
of supervised positions. Each side has a process of its own, several times anew. *Time*: the two processes take turns,
and the order changes from pair to pair; median of the ratios, with a 95 % bootstrap interval over the pairs; *20 in 3*
are 20 pairs in three such pairs of processes. *Memory*: highest resident memory of a process in its first steps (three
at most) less that before them; the interval is from end to end. A bar is *met* or *missed* where the whole interval
lies on one side of it, else *open*. Both sides keep freed memory as the `flexkd` command does for its own process
(`src/flexkd/allocator.py`). The interval draws pairs, not processes, whose levels differ by some per cent: a verdict
with a smaller margin is weak. cached-0.12 and trainer-0.12 were open in 20 pairs and are shown as they were in a
second, longer run (docs/log.md has the first). run-0.12 has two batches an epoch, run-1 four.

Rows *in 1* were measured in an older way: both sides in one process, where the side that was made first was, on
the row that was looked at, 3 to 4 % faster than itself; memory in three processes each; freed memory not kept.

TRL's chunked divergence has a kernel for CUDA; here its code for other devices runs, which multiplies in float32.
"""


def read_record() -> dict[str, Any]:
    """The stored measurements: the machine, and the rows by name."""
    return json.loads(_RECORD.read_text(encoding="utf-8")) if _RECORD.is_file() else {"machine": {}, "rows": {}}


def write(record: Mapping[str, Any]) -> None:
    """Write record and page."""
    _RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (_DOCS / "benchmarks.md").write_text(page(record), encoding="utf-8")


def measured(ratios: Mapping[str, Ratio], *, commit: str, date: str) -> dict[str, Any]:
    """Entry of one row for the record."""
    return {"commit": commit, "date": date, "measures": {name: asdict(ratio) for name, ratio in ratios.items()}}


def page(record: Mapping[str, Any]) -> str:
    """Text of the page."""
    machine = "\n".join(f"- {name}: {value}" for name, value in record["machine"].items())
    lines = [
        "| ratio | f | of | at most | measured | 95 % interval | | above | below | pairs | date, commit | row |",
        "|---|---:|---|---:|---:|---|---|---:|---:|---:|---|---|",
    ]
    for name, entry in record["rows"].items():
        if name in ROWS:
            lines += [_line(name, measure, Ratio(**ratio), entry) for measure, ratio in entry["measures"].items()]
    figures = [
        "| figure | at most | measured | lowest .. highest | date, commit | row |",
        "|---|---:|---:|---|---|---|",
    ]
    figures += [_figure(name, entry) for name, entry in record["rows"].items() if name in VALUES]
    return "\n".join(
        [_HEAD, "## Machine and versions", "", machine, "", "## Ratios", "", *lines, "", "## Figures", "", *figures, ""]
    )


def _line(name: str, measure: str, ratio: Ratio, entry: Mapping[str, Any]) -> str:
    row = ROWS[name]
    bar = row.bars.get(measure if measure == "memory" else "time", math.inf)
    cells = [
        row.title,
        f"{row.setting.share:g}",
        measure if measure == "memory" else f"{measure} time",
        "" if bar == math.inf else f"{bar:g}",
        f"{ratio.value:.3f}",
        f"{ratio.low:.3f} .. {ratio.high:.3f}",
        "" if bar == math.inf else ratio.verdict(bar),
        *(_amount(measure, side) for side in (ratio.first, ratio.second)),
        f"{ratio.pairs} in {ratio.processes}",
        f"{entry['date']}, {entry['commit']}",
        f"`{name}`",
    ]
    return f"| {' | '.join(cells)} |"


def _figure(name: str, entry: Mapping[str, Any]) -> str:
    value, figures = VALUES[name], sorted(entry["values"])
    cells = [
        value.title,
        "" if value.bar is None else f"{value.bar:g}",
        f"{figures[len(figures) // 2]:.3g}",
        f"{figures[0]:.3g} .. {figures[-1]:.3g}",
        f"{entry['date']}, {entry['commit']}",
        f"`{name}`",
    ]
    return f"| {' | '.join(cells)} |"


def _amount(measure: str, amount: float) -> str:
    return f"{amount / 2**20:,.0f} MiB" if measure == "memory" else f"{amount:.3g} s"
