"""Memory settings of a flexkd process: freed pages are kept from step to step, and handed back between stages."""

import ctypes
import gc
import os
import sys
from typing import Final

HUGE_PAGES: Final = "THP_MEM_ALLOC_ENABLE"
"""Environment variable that torch reads at its first allocation: 1 asks the kernel for huge pages."""

_TRIM_THRESHOLD: Final = (-1, 2_000_000_000)
"""glibc's M_TRIM_THRESHOLD: free bytes at the heap's end above which it hands them back to the kernel."""
_MMAP_THRESHOLD: Final = (-3, 2**25)
"""glibc's M_MMAP_THRESHOLD, at its highest: bytes from which a block is fetched from the kernel by itself."""
_USER_SETTINGS: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_pages() -> None:
    """Keep memory that a step frees for the next one, where this machine supports it.

    A training step on a CPU frees hundreds of MB and allocates them again. By default the kernel takes them back, and
    clears each page of 4 KiB again: 3 % of a cached step (docs/log.md). To be called before torch allocates, and only
    in a process that belongs to flexkd: the settings hold for the whole process. Settings in the environment win; a C
    library other than glibc and a kernel without huge pages are left as they are.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if sys.platform != "linux" or any(name in os.environ for name in _USER_SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(*setting)


def release() -> None:
    """Collect garbage and hand all freed pages back to the kernel; for the moments between the stages of a run.

    A trainer refers to itself in a circle, so that its optimizer lives until the garbage is collected; and what a stage
    freed would count as memory of the process until it ends, wherever a block in use lies behind it.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
