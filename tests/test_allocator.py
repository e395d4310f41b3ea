"""A process of our own keeps the pages that a step frees; what its user has set stands."""

import os
import subprocess
import sys

import pytest

_FAULTS = """
import os, resource, sys
from flexkd.allocator import keep_pages
if sys.argv[1] == "kept":
    keep_pages()
import torch
torch.set_num_threads(1)
def step():
    kept = [torch.zeros(size, 2**20) for size in (3, 6, 1, 4)]
    return sum(float(one[0, 0]) for one in kept)
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """Pages fetched from the kernel by four steps of 56 MiB, after four others."""
    command = [sys.executable, "-c", _FAULTS, how]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    done = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="not glibc")
def test_pages_are_kept_from_step_to_step_where_the_user_has_not_set_otherwise() -> None:
    without = faults("fresh", THP_MEM_ALLOC_ENABLE="0")
    assert without > 10_000  # 4 steps of 56 MiB are 57,344 pages of 4 KiB
    assert faults("kept", THP_MEM_ALLOC_ENABLE="0") < without / 20
    assert faults("kept", THP_MEM_ALLOC_ENABLE="0", MALLOC_TRIM_THRESHOLD_="131072") > without / 2
