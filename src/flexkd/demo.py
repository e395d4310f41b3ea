"""The recipes of the demos, and a check that the packages with their models and rows are installed."""

from collections.abc import Sequence
from importlib.resources import as_file, files

from flexkd.errors import RecipeError, unknown_name
from flexkd.preflight.machine import check_packages
from flexkd.recipe import Recipe, load_recipe


def demo_names() -> list[str]:
    """Names of the demos."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("flexkd.demos").iterdir() if entry.name.endswith(".yaml")
    )


def demo_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a demo.

    Raises:
        RecipeError: There is no such demo, or an override does not fit.
        MissingDependencyError: Packages are missing; the message holds one command that installs all.
    """
    if name not in demo_names():
        raise RecipeError(unknown_name("demo", "name", name, demo_names()))
    with as_file(files("flexkd.demos") / f"{name}.yaml") as path:
        recipe = load_recipe(path, overrides)
    check_packages(recipe)
    return recipe
