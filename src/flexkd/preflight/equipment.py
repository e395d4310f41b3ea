"""Whether this machine has what a recipe asks for: packages that are optional, a compiler."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from flexkd.errors import FlexKDError, RecipeError
from flexkd.packages import check_trackers, require_package
from flexkd.preflight.evidence import Evidence, tried


def package_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Packages of low-rank updates, of packed weights and of other places for the log."""
    recipe, errors = evidence.recipe, list[FlexKDError]()
    teacher = recipe.teacher
    if recipe.student.lora is not None:
        tried(errors, lambda: require_package("peft", "student.lora", "an adapter"))
    if teacher.quantization is not None:
        tried(errors, lambda: require_package("bitsandbytes", "teacher.quantization", f"'{teacher.quantization}'"))
    tried(errors, lambda: check_trackers(recipe.training.report_to, "training.report_to"))
    yield from errors


def compiler_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """What `torch.compile` needs; a run compiles one addition besides."""
    missing = _missing_compiler() if evidence.recipe.training.compile else ""
    if missing:
        yield RecipeError(
            f"training.compile: torch cannot compile here ({missing}). Set it to false, or install the compiler that "
            "is missing."
        )


def _missing_compiler() -> str:
    """What a GPU, or the CPU of a machine without one, would be compiled for with; empty where it is there."""
    if Path("/dev/nvidia0").exists() and "+cpu" not in version("torch"):
        return "" if find_spec("triton") is not None else "no package 'triton'"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) is not None else f"no C++ compiler '{compiler}'"
