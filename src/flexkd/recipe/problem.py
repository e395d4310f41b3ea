"""One problem of a recipe: its key, what is wrong and what to do, and the keys that it follows from."""

from collections.abc import Iterable
from dataclasses import dataclass

from flexkd.errors import unknown_name
from flexkd.recipe.document import KeyPath


@dataclass(frozen=True)
class RecipeProblem:
    """One problem of a recipe.

    Attributes:
        path: The key that should change.
        text: What is wrong with its value, and what to do.
        reads: All keys that the problem follows from; it is not reported if one of these has a problem itself.
    """

    path: KeyPath
    text: str
    reads: tuple[KeyPath, ...] = ()


class BrokenRulesError(ValueError):
    """Carries several problems through pydantic, which would join them to one text."""

    def __init__(self, problems: Iterable[RecipeProblem]):
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{dotted(problem.path)}: {problem.text}" for problem in self.problems))


def dotted(path: KeyPath) -> str:
    """A path as it is written on the command line, like training.report_to.0."""
    return ".".join(str(step) for step in path)


def unknown_text(kind: str, value: str, names: Iterable[str]) -> str:
    """The message of `unknown_name` without the key, which is added later."""
    return unknown_name("", kind, value, names).removeprefix(": ")


def problem(path: str, text: str, *reads: str) -> RecipeProblem:
    """A problem at a dotted key.

    Args:
        reads: Other dotted keys that the problem follows from.
    """
    return RecipeProblem(_split(path), text, (_split(path), *map(_split, reads)))


def _split(path: str) -> KeyPath:
    return tuple(path.split("."))
