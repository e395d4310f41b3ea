"""Whether this machine can run the recipe: its processes, optional packages, a compiler, a hub that takes uploads."""

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from flexkd.data.sources.rows import joined_sources
from flexkd.errors import FlexKDError, MissingDependencyError, ProcessError, RecipeError
from flexkd.facts.batches import device_batch
from flexkd.facts.names import SPLITS
from flexkd.facts.own_metrics import code_of
from flexkd.models.forward.kinds import no_linear_error
from flexkd.models.loading.hub import check_upload
from flexkd.packages import PACKAGE_PREFIX, check_trackers, joined_errors, require_package, resolve_package_path
from flexkd.preflight.inputs import RecipeInputs, collect_errors, model_sources
from flexkd.preflight.rows import check_own_metric
from flexkd.processes import num_processes
from flexkd.recipe import Recipe
from flexkd.recipe.search import has_ranges, prunes


def process_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Several processes divide the rows of a step evenly, and search no values."""
    recipe, processes = inputs.recipe, num_processes()
    if processes == 1:
        return
    errors: list[FlexKDError] = []
    for where, section in (("training", recipe.training), ("teacher.fine_tune", recipe.teacher.fine_tune)):
        with collect_errors(errors):
            if section is not None:
                device_batch(section.batch_size, section.per_device_batch_size, processes, where=where)
    yield from errors
    if recipe.compare is not None and recipe.compare.search:
        yield search_error("compare.search")


def search_error(where: str) -> ProcessError:
    """The error of a search in several processes."""
    return ProcessError(
        f"{where}: {num_processes()} processes, and a search runs in one. Run 'flexkd tune RECIPE' in one process, "
        "then 'flexkd compare RECIPE --tuned' in several, without compare.search."
    )


def check_packages(recipe: Recipe, *, draws_values: bool = False) -> None:
    """Refuse a recipe whose packages are not installed, all in one error; nothing is read.

    Args:
        draws_values: Whether values are searched that the recipe does not list.

    Raises:
        MissingPackagesError: Names each package, who needs it, and one command that installs all.
    """
    missing = [error for error in _package_errors(recipe, draws_values) if isinstance(error, MissingDependencyError)]
    for error in joined_errors(missing):
        raise error


def package_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Packages with models and rows, for low-rank updates, quantized weights, searches and trackers are installed."""
    yield from _package_errors(inputs.recipe)


def _package_errors(recipe: Recipe, draws_values: bool = False) -> list[FlexKDError]:
    """Errors of packages that are missing, and of trackers that are unknown."""
    teacher, errors = recipe.teacher, list[FlexKDError]()
    for source in _package_sources(recipe):
        unusable = list[FlexKDError]()
        with collect_errors(unusable):
            resolve_package_path(source)
        # What a package lacks is said where it is read.
        errors.extend(error for error in unusable if isinstance(error, MissingDependencyError))
    if recipe.student.lora is not None:
        with collect_errors(errors):
            require_package("peft", "student.lora", "an adapter")
    if teacher.adapter is not None:
        with collect_errors(errors):
            require_package("peft", "teacher.adapter", "an adapter")
    if teacher.quantization is not None:
        with collect_errors(errors):
            require_package("bitsandbytes", "teacher.quantization", f"'{teacher.quantization}'")
    space = recipe.compare.search if recipe.compare else {}
    if draws_values or (space and (has_ranges(space) or prunes(recipe))):
        with collect_errors(errors):
            require_package("optuna", "compare.search", "a search that draws values or stops trials")
    with collect_errors(errors):
        check_trackers(recipe.training.report_to, "training.report_to")
    return errors


def _package_sources(recipe: Recipe) -> Iterator[str]:
    """What a recipe reads from packages: models, and rows of every split."""
    teacher, student = recipe.teacher, recipe.student
    models = [*model_sources(recipe).values(), teacher.adapter, teacher.tokenizer, student.tokenizer]
    rows = [getattr(recipe.data, split) for split in SPLITS]
    named = [source for source in (*models, *rows) if isinstance(source, str) and PACKAGE_PREFIX in source]
    for source in named:
        yield from (part for part in joined_sources(source) if part.startswith(PACKAGE_PREFIX))


def upload_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The finished student can be uploaded: no offline mode, and a token with which the hub lets this machine write."""
    section, errors = inputs.recipe.push_to_hub, list[FlexKDError]()
    if section is not None:
        with collect_errors(errors):
            check_upload(section.repo, private=section.private)
    yield from errors


def metric_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A metric of the user's own can be called on the validation rows, and gives a number."""
    errors = list[FlexKDError]()
    if inputs.data is not None:
        with collect_errors(errors):
            check_own_metric(inputs.recipe, inputs.data)
    yield from errors


def code_notes(inputs: RecipeInputs) -> Iterator[str]:
    """Which code the recipe runs."""
    if code := code_of(inputs.recipe.task.metric):
        yield f"this recipe runs code: {code}."


def compiler_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """`torch.compile` finds the compiler it needs; before it trains, a run also compiles one addition."""
    missing = _missing_compiler() if inputs.recipe.training.compile else ""
    if missing:
        yield RecipeError(
            f"training.compile: torch cannot compile here ({missing}). Set it to false, or install the compiler that "
            "is missing."
        )


def int8_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A teacher that is to be measured in int8 has linear layers, and is measured on a CPU, by a torch that can."""
    recipe, teacher, where = inputs.recipe, inputs.teacher, "rivals.int8_teacher"
    if recipe.rivals is None or not recipe.rivals.int8_teacher:
        return
    if has_gpu():
        yield RecipeError(
            f"{where}: torch's dynamic int8 runs on a CPU, and here models are measured on a GPU. Set it to false, or "
            "hide the GPU with CUDA_VISIBLE_DEVICES=."
        )
    torch = find_spec("torch")
    if torch is not None and not Path(str(torch.origin)).with_name("ao").joinpath("quantization").is_dir():
        yield RecipeError(
            f"{where}: torch {version('torch')} has no torch.ao.quantization any more, which computes it. Set it to "
            "false."
        )
    if teacher is not None and teacher.family is not None and teacher.family.transposed:
        yield no_linear_error(where, f"'{teacher.source}' ({teacher.model_type})")


def has_gpu() -> bool:
    """Whether torch would run on a GPU, as far as files and variables tell."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return Path("/dev/nvidia0").exists() and "+cpu" not in version("torch") and not is_hidden


def _missing_compiler() -> str:
    """The compiler that this machine's GPU, or its CPU where it has none, would need and that is missing; or ""."""
    if has_gpu():
        return "" if find_spec("triton") is not None else "no package 'triton'"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return "" if shutil.which(compiler) is not None else f"no C++ compiler '{compiler}'"
