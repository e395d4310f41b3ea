"""The machine of a measurement: processor, memory, versions, and its speed of matrix products in bfloat16."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

_PACKAGES: Final = ("torch", "transformers", "accelerate", "trl")
_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_SIZES: Final = ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048))
"""Rows, inner and outer size of matrix products: two of the teacher, and a large one."""


def machine() -> dict[str, str]:
    """Facts by name, in the order of the page."""
    facts = _cpu_facts()
    flags = facts.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{facts.get('model name', platform.processor())}, family {facts.get('cpu family', '?')} model "
        f"{facts.get('model', '?')}, {', '.join(flag for flag in _FLAGS if flag in flags) or 'no vector flags known'}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads of torch",
        "memory": f"{memory / 2**30:.0f} GiB",
        "bfloat16": f"{bf16_peak() / 1e12:.2f} TFLOP/s in matrix products",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def commit() -> str:
    """Commit of this checkout, followed by a plus if files were changed; those of results are written by what asks."""
    name = _git("describe", "--always", "--exclude=*")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results")
    return f"{name}{'+' if changed else ''}" or "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def bf16_peak() -> float:
    """Operations a second of the fastest of some matrix products in bfloat16, each repeated ten times."""
    speeds = []
    for rows, inner, outer in _SIZES:
        first, second = (torch.randn(size, dtype=torch.bfloat16) for size in ((rows, inner), (inner, outer)))
        for _ in range(10):
            start = time.perf_counter()
            first @ second
            speeds.append(2 * rows * inner * outer / (time.perf_counter() - start))
    return max(speeds)


def _cpu_facts() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
