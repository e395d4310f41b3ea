"""One thing to mend in a recipe: its key, what is wrong, and which keys led to it."""

from collections.abc import Iterable
from dataclasses import dataclass

from flexkd.errors import unknown_name
from flexkd.recipe.document import KeyPath


@dataclass(frozen=True)
class RecipeProblem:
    """One thing to mend in a recipe.

    Attributes:
        path: The key that should change.
        text: What is wrong with its value, and what to do.
        reads: All keys that led to this; when one of them has a problem of its own, this one is left out.
    """

    path: KeyPath
    text: str
    reads: tuple[KeyPath, ...] = ()


class BrokenRulesError(ValueError):
    """Carries the problems through pydantic, which would shorten them to one text."""

    def __init__(self, problems: Iterable[RecipeProblem]):
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{dotted(problem.path)}: {problem.text}" for problem in self.problems))


def dotted(path: KeyPath) -> str:
    """The path as it is written on the command line, like training.report_to.0."""
    return ".".join(str(step) for step in path)


def unknown(kind: str, value: str, known: Iterable[str]) -> str:
    """`unknown_name` without its place, which is put in front later."""
    return unknown_name("", kind, value, known).removeprefix(": ")


def problem(path: str, text: str, *reads: str) -> RecipeProblem:
    """A problem at a dotted key, and the other keys that led to it."""
    return RecipeProblem(_split(path), text, (_split(path), *(_split(read) for read in reads)))


def _split(path: str) -> KeyPath:
    return tuple(path.split("."))
