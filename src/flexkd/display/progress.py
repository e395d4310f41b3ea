"""How far a piece of work has come: a bar in a terminal, now and then a line in a pipe and in the log file."""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Generic, Self, TypeVar, cast

from tqdm.auto import tqdm

from flexkd.display.durations import duration_text, rate_text
from flexkd.display.log import shows_bars
from flexkd.display.text import printable

_logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

_SHORTEST_SILENCE: Final = 10.0
"""Seconds before the first line, and at least between two lines: shorter work says nothing in a pipe."""
_LONGEST_SILENCE: Final = 300.0
_SHARE: Final = 0.05
"""Of the time that has passed, the time until the next line: an hour has some 60 lines."""
_DELAY: Final = 0.3
"""Seconds before a bar appears: what is done by then draws none."""

_BAR_PLACE: Final = "|" + 10 * "\0" + "|"
"""Where a bar is drawn, as long as the shortest one."""

_part: ContextVar[str] = ContextVar("part", default="")


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that says rates and times as the lines do, and leaves out what a narrow terminal has no room for."""

    def __init__(self, *, units: str, **options: Any) -> None:
        # Before tqdm draws itself for the first time.
        self.units = units
        self.note = ""
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm draws: the fullest form that fits."""
        entries: dict[str, Any] = super().format_dict
        done, total, name = entries["n"], entries["total"], entries["prefix"]
        pace = _Pace.of(done - entries["initial"], entries["elapsed"], total - done)
        rate, left = rate_text(pace.rate, self.units), pace.left()
        count = f"{done:,}/{total:,}"
        forms = (
            f"{name} {done / max(total, 1):4.0%} {_BAR_PLACE} {_listed(count, rate, left, self.note)}",
            f"{name}  {_listed(count, rate, left, self.note)}",
            f"{name}  {_listed(count, left, self.note)}",
            f"{name}  {_listed(count, left)}",
            _listed(count, left),
        )
        room = entries["ncols"] or math.inf
        form = next((form for form in forms if len(form) <= room), forms[-1])
        escaped = form.replace("{", "{{").replace("}", "}}")
        return {**entries, "bar_format": escaped.replace(_BAR_PLACE, "|{bar}|")}


class _Pace:
    """How fast work goes on, and how long the rest of it will take."""

    def __init__(self, rate: float, seconds_left: float | None):
        self.rate = rate
        self.seconds_left = seconds_left

    @classmethod
    def of(cls, done: int, seconds: float, left: int) -> "_Pace":
        """The pace of what was done in some seconds, for what is left."""
        rate = done / seconds if seconds > 0 else 0.0
        return cls(rate, left / rate if rate > 0 and left > 0 else None)

    def left(self) -> str:
        """The time left in words; empty where it is not known, or there is none."""
        return "" if self.seconds_left is None else f"{duration_text(self.seconds_left)} left"


def _listed(*parts: str) -> str:
    """What is known, with commas between."""
    return ", ".join(filter(None, parts))


class Progress:
    """The progress of one piece of work; a context, within which `advance` counts what is done.

    Args:
        what: Names the work, as "teacher units".
        total: How much there is to do.
        unit: Of what is counted, in the plural.
        done: How much an earlier process has done.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0):
        part = _part.get()
        self.what = f"{part}, {what}" if part else what
        self.total, self.unit, self.done = total, unit, done
        self._first, self._began = done, time.monotonic()
        self._spoke = self._began
        self.has_bar = shows_bars()
        self._bar = _Bar(
            total=total, initial=done, desc=printable(self.what), units=unit, leave=False, dynamic_ncols=True,
            delay=_DELAY, disable=not self.has_bar,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1, *, is_silent: bool = False) -> None:
        """Count some as done, and say so where it is time to and nothing else `is_silent` for."""
        self.done += count
        self._bar.update(count)
        if self.is_due() and not is_silent and self.done < self.total:
            self.say(f"{self.done:,} of {self.total:,} {self.unit}, {self.pace()}")

    def pace(self) -> str:
        """Rate and time left in words."""
        seconds = time.monotonic() - self._began
        pace = _Pace.of(self.done - self._first, seconds, self.total - self.done)
        return _listed(rate_text(pace.rate, self.unit), pace.left())

    def is_due(self) -> bool:
        """Whether it is time for a line."""
        now = time.monotonic()
        silence = min(_LONGEST_SILENCE, max(_SHORTEST_SILENCE, _SHARE * (now - self._began)))
        return now - self._spoke >= silence

    def say(self, text: str, *, is_detail: bool | None = None) -> None:
        """A line about this work.

        Args:
            text: What is said.
            is_detail: Whether it is for the log file, and for who asked for details; None: where a bar shows it.
        """
        is_detail = self.has_bar if is_detail is None else is_detail
        if self.has_bar or not is_detail:
            self._spoke = time.monotonic()
        _logger.log(logging.DEBUG if is_detail else logging.INFO, "%s: %s", self.what, text)

    def note(self, text: str, *, at_once: bool = False) -> None:
        """What the bar says behind its figures, at the next time that it is drawn or `at_once`."""
        self._bar.note = text
        if at_once and time.monotonic() - self._began >= _DELAY:
            # tqdm wipes no bar that it has not drawn by itself after its delay.
            self._bar.delay = 0
            self._bar.refresh()


class Tracked(Generic[_Item]):
    """Items whose progress is shown as they are gone over, each time that they are.

    Args:
        items: All of them.
        what: As in `Progress`, like `unit`.
        total: Their number, where they do not know it.
    """

    def __init__(self, items: Iterable[_Item], what: str, unit: str = "batches", *, total: int | None = None):
        self.items, self.what, self.unit, self._total = items, what, unit, total

    def __len__(self) -> int:
        return self._total if self._total is not None else len(cast(Sized, self.items))

    def __iter__(self) -> Iterator[_Item]:
        with Progress(self.what, len(self), self.unit) as progress:
            for item in self.items:
                yield item
                progress.advance()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Within the context every bar and every line of progress begins with a name, as "cell 3 of 12"."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


class Countdown:
    """Cells that run one after another: which of them it is, and how long those to come will take.

    A cell takes as long as the finished ones of its kind did; one of a kind of which none is finished, as long as all.

    Args:
        what: Names one of them, as "cell".
        kinds: The kind of each, in their order.
    """

    def __init__(self, what: str, kinds: Sequence[str]):
        self._what, self._kinds = what, list(kinds)
        self._number = 0
        self._seconds: dict[str, list[float]] = {}

    @contextmanager
    def next(self, name: str, *, is_finished: bool = False) -> Iterator[None]:
        """The next cell: says which it is, unless an earlier process has finished it."""
        self._number += 1
        place = f"{self._what} {self._number} of {len(self._kinds)}"
        if not is_finished:
            left = self._seconds_left()
            _logger.info("%s: %s%s", place, name, "" if left is None else f"; about {duration_text(left)} left")
        with part(place):
            yield

    def finished(self, seconds: float) -> None:
        """How long the last cell took, in this process or in an earlier one."""
        self._seconds.setdefault(self._kinds[self._number - 1], []).append(seconds)

    def _seconds_left(self) -> float | None:
        """Of the cell that begins now and all after it; None while none is finished."""
        durations = [seconds for of_kind in self._seconds.values() for seconds in of_kind]
        if not durations:
            return None
        return sum(_mean(self._seconds.get(kind, durations)) for kind in self._kinds[self._number - 1 :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
