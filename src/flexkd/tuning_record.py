"""Record of `flexkd tune`, to and from JSON: the trials of every method, and the values that were chosen."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from flexkd.strict_json import FORMAT, Number, Record, StoredRecord

COMPLETE: Final = "complete"
PRUNED: Final = "pruned"
FAILED: Final = "failed"


@dataclass(frozen=True)
class Trial(Record):
    """One student that was trained to try some values.

    Attributes:
        values: Recipe key -> value.
        state: complete, pruned (stopped before its end, as it fell behind) or failed (its loss was not finite).
        value: The best value of the validation metric up to its end; None where it was never defined.
        steps: Optimizer steps that it took.
        values_by_step: The validation metric at every evaluation, by step.
        message: Why it failed.
    """

    number: int
    values: dict[str, object]
    state: str
    value: Number | None
    steps: int
    seconds: Number
    values_by_step: dict[str, Number | None] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class MethodTuning(Record):
    """The trials of one method.

    Attributes:
        space: Recipe key -> the values that were tried, or the range that they were drawn from.
        best: Number of the trial that was chosen; None where there was nothing to try.
        chosen: Its values.
        edges: Which of them lie at an edge of what was tried, in sentences.
        made_of: Settings of the method before the search, and fingerprints of teacher and rows.
    """

    method: str
    space: dict[str, object]
    trials: list[Trial]
    best: int | None
    chosen: dict[str, object]
    edges: list[str]
    made_of: dict[str, object]

    @property
    def budget(self) -> str:
        """How much was spent on the method, in words."""
        states = Counter(trial.state for trial in self.trials)
        parts = [f"{len(self.trials)} trial{'s' * (len(self.trials) != 1)}"]
        parts += [f"{states[state]} {state}" for state in (PRUNED, FAILED) if states[state]]
        return f"{', '.join(parts)}, {sum(trial.steps for trial in self.trials):,} steps in all"


@dataclass(frozen=True)
class TuningRecord(StoredRecord):
    """The search of all methods under one recipe.

    Attributes:
        metric: The validation metric that chose.
        seed: Of every trial.
    """

    metric: str
    seed: int
    methods: list[MethodTuning]
    name: str = "tuning"
    created: str = ""
    recipe: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def notes(self) -> list[str]:
        """What was chosen, what was spent on each method, and which values lie at an edge, in sentences."""
        sentences = []
        for tuning in self.methods:
            for key, value in tuning.chosen.items():
                choices = _described(tuning.space[key])
                sentences.append(f"{tuning.method}: {key} = {value}, chosen of {choices} by the validation rows.")
            if tuning.trials:
                sentences.append(f"{tuning.method}: searched with {tuning.budget}.")
            sentences += [f"{tuning.method}: edge: {sentence}" for sentence in tuning.edges]
        return sentences


def _described(choices: object) -> str:
    """What was tried for a key: its list, or both ends of its range."""
    if isinstance(choices, dict):
        return f"{choices['low']:g} to {choices['high']:g}"
    return str(choices)
