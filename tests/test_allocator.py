"""A process of our own keeps the pages that a step frees; what its user has set stands."""

import ctypes
import os
import subprocess
import sys

import pytest

_BLOCK = 20 * 2**20
_HELD = """
import ctypes, os, sys
from flexkd.allocator import HUGE_PAGES, keep_pages
if sys.argv[1] == "kept":
    keep_pages()
library = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena b c d mapped f g h i j".split()]
library.mallinfo2.restype, library.malloc.restype = Info, ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
block = library.malloc(int(sys.argv[2]))
mapped = library.mallinfo2().mapped
library.free(block)
print(mapped, library.mallinfo2().arena, os.environ.get(HUGE_PAGES))
"""


def held(how: str, **environment: str) -> tuple[int, int, str]:
    """Bytes that the C library fetched apart from its heap for a block of 20 MiB, those of the heap after the block is
    freed, and what the process tells torch of huge pages."""
    command = [sys.executable, "-c", _HELD, how, str(_BLOCK)]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    done = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True, check=True)
    mapped, heap, huge_pages = done.stdout.split()
    return int(mapped), int(heap), huge_pages


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc that tells what it holds"
)
def test_freed_memory_is_kept_where_the_user_has_not_set_otherwise() -> None:
    mapped, heap, huge_pages = held("fresh")
    assert mapped > _BLOCK > heap
    assert huge_pages == "None"
    mapped, heap, huge_pages = held("kept")
    assert mapped < _BLOCK < heap
    assert huge_pages == "1"
    mapped, heap, huge_pages = held("kept", MALLOC_TRIM_THRESHOLD_="131072", THP_MEM_ALLOC_ENABLE="0")
    assert heap < _BLOCK
    assert huge_pages == "0"


_RELEASED = """
from pathlib import Path
from flexkd.allocator import keep_pages, release
keep_pages()
import gc, numpy
gc.disable()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
class Ring:
    pass
ring = Ring()
ring.itself, ring.blocks = ring, [numpy.ones(1 << 20) for _ in range(20)]
held = [numpy.ones(16) for _ in range(20)]
full = resident()
del ring
gone = resident()
release()
print(full - gone, full - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc that hands pages back"
)
def test_between_stages_what_refers_to_itself_and_what_was_freed_is_handed_back() -> None:
    """20 blocks of 8 MiB in an object that holds itself, which without a collection stay for good."""
    done = subprocess.run([sys.executable, "-c", _RELEASED], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 2**20
    assert after > 0.9 * 20 * 2**23
