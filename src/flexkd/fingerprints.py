"""What a stored thing was made of, held against what it would be made of now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.errors import ArtifactError

DECISIVE: Final = ("precision", "weights", "attention", "quantization", "student_precision")
"""Entries of `engine_of` that change answers by more than the rounding of one precision: another precision or
quantization, and another attention back end, of which not all know soft-caps, sinks and windows. A student's precision
is that of its training, whatever `auto` stands for on this machine."""

SAID: Final = ("device", "torch", "transformers", "bitsandbytes")
"""Entries under which the same sums are added in another order, or should be."""


def differences(stored: Mapping[str, str], now: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What something was made of against what it would be made of now, each difference with both values.

    Returns:
        Those under which it is another thing, and those of which a reader is told: other versions and devices, and
        what an earlier version of flexkd did not write down of the engine.
    """
    refused: list[str] = []
    told: list[str] = []
    unwritten: list[str] = []
    for name in sorted(stored.keys() | now.keys()):
        before, after = stored.get(name), now.get(name)
        if before == after:
            continue
        if before is None and name in (*DECISIVE, *SAID):
            unwritten.append(f"{name} (now '{after}')")
        else:
            (told if name in SAID else refused).append(f"{name} was '{before}' and is '{after}' now")
    return refused, [*told, *([f"its engine was not written down: {', '.join(unwritten)}"] if unwritten else [])]


def check_fingerprints(where: Path, stored: Mapping[str, str], now: Mapping[str, str], advice: str) -> list[str]:
    """Refuse what was made of something else.

    Returns:
        Differences of which a reader is told, as in `differences`.

    Raises:
        ArtifactError: Names every other difference, old and new, and the advice.
    """
    refused, told = differences(stored, now)
    if refused:
        raise ArtifactError(f"{where}: belongs to another run: {'; '.join(refused)}. {advice}")
    return told


def describe_engine(made_of: Mapping[str, Any]) -> str:
    """The engine that stands in a description, or that it stands there not."""
    parts = [f"{name} {made_of[name]}" for name in (*DECISIVE, *SAID) if name in made_of]
    return ", ".join(parts) or "an engine that was not written down"
