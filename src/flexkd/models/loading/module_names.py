"""Names of modules that get low-rank updates, checked against those that a model has."""

from collections.abc import Collection, Mapping, Sequence

from flexkd.errors import RecipeError


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether one of the names means a module: its whole path, or the end of it."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def check_module_names(
    requested: Mapping[str, Sequence[str]], modules: Sequence[str], *, weighted: Collection[str], class_name: str
) -> None:
    """Refuse names that no module has.

    Args:
        requested: Key of `student.lora` to names.
        modules: Paths of all modules.
        weighted: Those of them with a weight of their own.

    Raises:
        RecipeError: Lists the names that there are.
    """
    for key, names in requested.items():
        unknown = [name for name in names if not any(is_named(module, (name,)) for module in modules)]
        if unknown:
            ends = sorted({module.rpartition(".")[2] for module in weighted})
            raise RecipeError(
                f"student.lora.{key}: {class_name} has no module '{unknown[0]}'. It has: {', '.join(ends)}."
            )
