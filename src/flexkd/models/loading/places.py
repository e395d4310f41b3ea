"""Locations of the models that a recipe names: a folder, a file, inside a package, or nowhere on this machine."""

from pathlib import Path

from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.names import ADAPTER_CONFIG_FILE
from flexkd.files import local_path
from flexkd.packages import PACKAGE_PREFIX, resolve_package_path


def model_path(source: str, *, where: str) -> Path:
    """The path that a model's name means, whether something is there or it is a hub id.

    Args:
        source: Folder, file, hub id or `package:NAME/FOLDER`.
        where: The recipe key or argument, for messages.

    Raises:
        MissingDependencyError: The package is not installed.
        DataError: The package holds no such folder.
        RecipeError: A path that cannot be one.
    """
    if not source.startswith(PACKAGE_PREFIX):
        return local_path(source, where=where)
    try:
        return resolve_package_path(source)
    except FlexKDError as error:
        raise error.at(where) from None


def refuse_adapter(where: str, location: str | Path) -> None:
    """Refuse a folder with an adapter where a model is meant: transformers would load what the adapter names.

    Raises:
        UnsupportedModelError: It holds an adapter.
    """
    if Path(location, ADAPTER_CONFIG_FILE).is_file():
        raise UnsupportedModelError(
            f"{where}: '{location}' holds an adapter. Give the model that it was trained on, and the adapter as "
            "teacher.adapter; or merge the two and save them."
        )
