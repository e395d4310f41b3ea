"""Keys and values of a recipe that had other names in earlier versions, read as those of today."""

from collections.abc import Mapping
from typing import Any, Final

from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.facts.names import GENERATION_TASKS
from flexkd.fingerprints import CONTROLS
from flexkd.recipe.document import KeyPath

LAST_VERSION: Final = "0.2"
"""The last minor version that reads controls in `scores.attribution`: that which renames a key, and the next one."""

_ATTRIBUTION: Final[KeyPath] = ("scores", "attribution")
_CHOSEN_BY: Final[KeyPath] = ("student", "chosen_by")
_BASIS: Final[KeyPath] = ("objective", "features", "basis")
_TAUGHT: Final[KeyPath] = ("objective", "features", "chosen_by")
_LOSS: Final[KeyPath] = ("objective", "features", "loss")
_MAPPING: Final[KeyPath] = ("objective", "features", "mapping")


def renamed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a recipe with the names of today, and a message for each that had another.

    | in an earlier version | today |
    |---|---|
    | scores.attribution: random, variance or activation | student.chosen_by, or objective.features.chosen_by |
    | objective.features.basis: tangent | basis: directions with chosen_by: scores and mapping: matched |
    | objective.features.basis: units, of a student cut along directions and without matching | basis: auto |

    Args:
        values: As read from YAML, before they are checked.
    """
    changed, messages = dict(values), []
    control, basis = _at(values, _ATTRIBUTION), _at(values, _BASIS)
    if control in CONTROLS:
        key = _CHOSEN_BY if _is_sliced(values) else _TAUGHT
        # Without features, a student that is not cut has nothing to choose.
        is_chosen = key == _CHOSEN_BY or isinstance(_at(values, key[:-1]) or {}, Mapping)
        if _at(values, key) in (None, "auto", "scores") and is_chosen:
            changed = _with(_with(changed, key, control), _ATTRIBUTION, "gradient")
            message = _message(_ATTRIBUTION, control, f"{'.'.join(map(str, key))}: {control}")
            messages.append(f"{message} {LAST_VERSION} is the last version that reads the earlier one.")
    facts = FEATURE_LOSS_FACTS.get(str(_at(values, _LOSS) or "correlation"))
    if basis == "tangent" and facts is not None and not facts.pairs_units:
        changed = _with(changed, _BASIS, "auto")
        messages.append(_message(_BASIS, basis, f"basis: auto, as {facts.name} compares whole states"))
    elif basis == "tangent":
        changed = _with(changed, _BASIS, "directions")
        if _at(changed, _TAUGHT) is None:
            changed = _with(changed, _TAUGHT, "scores")
        changed = _with(changed, _MAPPING, "matched")
        messages.append(_message(_BASIS, basis, "basis: directions with chosen_by: scores and mapping: matched"))
    if basis == "units" and may_be_rotated(values) and _at(values, _MAPPING) != "matched":
        changed = _with(changed, _BASIS, "auto")
        messages.append(
            "objective.features.basis: 'units' without mapping: matched is read as 'auto', what the student is cut by. "
            "Write auto, or mapping: matched to teach units to a student that is cut along directions."
        )
    return changed, messages


def may_be_rotated(values: Mapping[str, Any]) -> bool:
    """Whether the student of a recipe is cut along directions, if its teacher can be rotated."""
    basis = _at(values, ("student", "basis"))
    by_default = basis in (None, "auto") and _at(values, ("task", "type")) in GENERATION_TASKS
    return _is_sliced(values) and (basis == "rotated" or by_default)


def _is_sliced(values: Mapping[str, Any]) -> bool:
    return _at(values, ("student", "start")) in (None, "slice")


def _message(key: KeyPath, value: str, now: str) -> str:
    return f"{'.'.join(map(str, key))}: '{value}' is an earlier name and read as {now}. Write that instead."


def _at(values: Any, path: KeyPath) -> Any:
    """The value at a path; None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _with(values: Any, path: KeyPath, value: Any) -> Any:
    """A copy with another value at a path, whose missing sections are made."""
    first, *below = path
    section = dict(values) if isinstance(values, Mapping) else {}
    return {**section, first: _with(section.get(first), tuple(below), value) if below else value}
