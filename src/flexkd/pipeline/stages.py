"""The stages of a run: how long each took, and the most memory that the process held in it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexkd.allocator import release
from flexkd.evaluate.cost import resident_bytes

logger = logging.getLogger(__name__)

_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"
"""What `clear_refs` takes for the peak of the resident memory to begin anew."""


@dataclass
class Stages:
    """Stages of a run, in their order.

    Attributes:
        seconds: Time of each stage.
        peaks: Most bytes of resident memory of this process in each stage; empty where the kernel does not let a
            process begin its peak anew.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log the beginning of a stage, without what earlier ones freed, and add its time and its peak."""
        logger.info("%s ...", name)
        release()
        is_anew = _begin_peak()
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        if is_anew:
            self.peaks[name] = resident_bytes()[1]


def _begin_peak() -> bool:
    """Begin the peak of the resident memory anew; False where that is not allowed."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
