"""Fingerprints of everything that a stored file depends on, compared with those of the current run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.errors import ArtifactError

DECISIVE: Final = ("precision", "weights", "attention", "quantization", "student_precision")
"""Entries of `engine_of` whose change makes a stored file unusable, since answers change by more than rounding: the
precision, the quantization and the attention back end, not all of which support soft-caps, sinks and windows. A
student's precision is that of its training, whatever `auto` means on this machine."""

REPORTED: Final = ("device", "torch", "transformers", "bitsandbytes")
"""Entries of `engine_of` whose change is only reported: at most, the same sums are added in another order."""

CONTROLS: Final = ("random", "variance", "activation")
"""Choices that were values of the key `scores.attribution` in earlier versions."""


def differences(stored: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Differences between stored and current fingerprints, each as a text with both values.

    Returns:
        Differences that make the stored file unusable, and differences that are only reported: other versions and
        devices, and entries of the engine that an earlier version of flexkd did not write.
    """
    refused: list[str] = []
    reported: list[str] = []
    unwritten: list[str] = []
    for name in sorted(stored.keys() | now.keys()):
        old, new = stored.get(name), now.get(name)
        if old == new:
            continue
        if old is None and name in (*DECISIVE, *REPORTED):
            unwritten.append(f"{name} (now '{new}')")
        else:
            (reported if name in REPORTED else refused).append(f"{name} was '{old}' and is '{new}' now")
    if unwritten:
        reported.append(f"its engine was not written down: {', '.join(unwritten)}")
    return refused, reported


def check_fingerprints(where: Path, stored: Mapping[str, str], now: Mapping[str, str], advice: str) -> list[str]:
    """Refuse a stored file that belongs to another run.

    Args:
        where: Path of the stored file.
        advice: What to do about a refused file; ends the message.

    Returns:
        Differences that are only reported, as in `differences`.

    Raises:
        ArtifactError: Names every other difference with its old and new value.
    """
    refused, reported = differences(stored, now)
    if refused:
        raise ArtifactError(f"{where}: belongs to another run: {'; '.join(refused)}. {advice}")
    return reported


def earlier_selection(stored: Mapping[str, str], *, is_cut_along_directions: bool) -> dict[str, str]:
    """Fingerprints of a selection of an earlier version, which had other names, as this version writes them.

    Args:
        is_cut_along_directions: That version took those with the most variance, whatever the scores.
    """
    if "student.chosen_by" in stored or "student.start" not in stored:
        return dict(stored)
    now = {**stored, "student.chosen_by": '"scores"'}
    control = json.loads(stored.get("scores.attribution", "null"))
    if control in CONTROLS:
        now["scores.attribution"] = '"gradient"'
        is_cut = json.loads(stored["student.start"]) == "slice"
        now["student.chosen_by" if is_cut else "features.chosen_by"] = json.dumps(control)
    if is_cut_along_directions:
        now["student.chosen_by"] = '"variance"'
    return now


def describe_engine(made_of: Mapping[str, Any]) -> str:
    """The engine named in fingerprints, in words."""
    parts = [f"{name} {made_of[name]}" for name in (*DECISIVE, *REPORTED) if name in made_of]
    return ", ".join(parts) or "an engine that was not written down"
