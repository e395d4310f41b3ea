"""What a plan says: parameters, memory by part, operations and time by stage, and whether it fits."""

from collections.abc import Mapping
from dataclasses import dataclass

from flexkd.core.tensors import Number
from flexkd.plan.devices import Device


@dataclass(frozen=True)
class ModelSize:
    """A model by its role: what it is, and its parameters, tied ones once."""

    role: str
    shape: str
    parameters: int


@dataclass(frozen=True)
class StageMemory:
    """Memory while one stage of a run is at its highest.

    Attributes:
        name: As a person would say it.
        parts: Bytes of what is in memory; not all of it at the same moment.
        peak: Bytes that stand together at most.
    """

    name: str
    parts: Mapping[str, int]
    peak: int


@dataclass(frozen=True)
class StageWork:
    """Operations and time of one stage; `is_limited` where the recipe's minutes end it."""

    name: str
    flops: Number
    seconds: Number
    is_limited: bool = False


@dataclass(frozen=True)
class Knob:
    """Another setting, and what the peak of training would be with it."""

    setting: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a run will cost on a device.

    Attributes:
        device: What it meets.
        models: Teacher and student.
        memory: Stage by stage.
        knobs: What could be set in another way, by memory.
        cache: Bytes of the teacher's answers to all rows on disk, by form.
        units: Operations of one pass or one step, and their time.
        work: The whole run, stage by stage; empty where the number of steps is not known.
        steps: Optimizer steps of the student's training; None: not known.
        assumptions: Everything that was taken for granted.
    """

    name: str
    device: Device
    models: tuple[ModelSize, ...]
    memory: tuple[StageMemory, ...]
    knobs: tuple[Knob, ...]
    cache: Mapping[str, int]
    units: tuple[StageWork, ...]
    work: tuple[StageWork, ...]
    steps: int | None
    assumptions: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes that the run needs at most."""
        return max(stage.peak for stage in self.memory)

    @property
    def room(self) -> int:
        """Bytes of the device that a run may take."""
        return int((1 - self.device.reserve) * self.device.memory)

    @property
    def fits(self) -> bool:
        """Whether the run fits on the device."""
        return self.peak <= self.room
