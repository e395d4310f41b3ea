"""Every error a user can meet, in one form: where, what is wrong with its value, what to do.

FlexKDError
    RecipeError             a recipe, a setting or an argument that cannot be used
    DataError               rows, columns, files and labels
    VocabularyError         tokenizers, vocabularies or label spaces of two models that do not fit together
    UnsupportedModelError   a model that cannot be loaded, sliced or scored
    ShapeError              sizes that do not fit together
    ScoreError              unit scores that carry no information
    ArtifactError           a stored file that is damaged or belongs to something else
    TrainingError           a run that must not continue
    MissingDependencyError  a package that has to be installed
    ProcessError            processes that were started together and cannot work together
        FollowedError       one of the others failed, and says why
    UploadError             a finished student that the hub did not take
    DiskError               a file that the disk does not take (also an OSError)
"""

import difflib
from collections.abc import Iterable
from typing import Self


class FlexKDError(Exception):
    """Base of all errors that flexkd raises on purpose."""

    def at(self, where: str) -> Self:
        """The same error with a place before its message."""
        return type(self)(f"{where}: {self}")


class RecipeError(FlexKDError, ValueError):
    """A recipe, a setting or an argument cannot be used."""


class DataError(FlexKDError, ValueError):
    """Rows, columns, files or labels cannot be used."""


class VocabularyError(FlexKDError, ValueError):
    """Two models do not share their tokens or labels."""


class UnsupportedModelError(FlexKDError, ValueError):
    """A model cannot be loaded, sliced or scored."""


class ShapeError(FlexKDError, ValueError):
    """Sizes do not fit together."""


class ScoreError(FlexKDError, ValueError):
    """Unit scores carry no information."""


class ArtifactError(FlexKDError, ValueError):
    """A stored file is damaged or belongs to another teacher, tokenizer or data set."""


class TrainingError(FlexKDError, RuntimeError):
    """Training must not continue."""


class ProcessError(FlexKDError, RuntimeError):
    """Processes that were started together cannot work together."""


class FollowedError(ProcessError):
    """Another of the processes that were started together failed, and says why."""


class MissingDependencyError(FlexKDError, ImportError):
    """A package has to be installed first."""


class UploadError(FlexKDError, RuntimeError):
    """A finished student was not uploaded."""


class DiskError(FlexKDError, OSError):
    """A disk is full or read-only, a quota is used up, or a right is missing."""


def unknown_name(where: str, kind: str, value: str, choices: Iterable[str]) -> str:
    """Message for a name that is not in a registry: lists the names that are, and the closest of them.

    Example:
        >>> unknown_name("objective.logits.loss", "loss", "forwrd_kl", ["forward_kl", "reverse_kl"])
        "objective.logits.loss: unknown loss 'forwrd_kl'. Known: forward_kl, reverse_kl. Did you mean 'forward_kl'?"
    """
    names = sorted(choices)
    message = f"{where}: unknown {kind} '{value}'. Known: {', '.join(names)}."
    closest = difflib.get_close_matches(value, names, n=1)
    return f"{message} Did you mean '{closest[0]}'?" if closest else message
