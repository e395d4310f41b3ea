"""The figures of a plan: parameters, memory by part, operations and time by stage, and whether it fits."""

from collections.abc import Mapping
from dataclasses import dataclass

from flexkd.core.tensors import Number
from flexkd.costs.devices import RESERVE, Device


@dataclass(frozen=True)
class ModelSize:
    """Role, shape and number of parameters of a model; tied parameters count once."""

    role: str
    shape: str
    parameters: int


@dataclass(frozen=True)
class StageMemory:
    """Memory of one stage of a run.

    Attributes:
        name: For a table.
        parts: Bytes of each part at its own highest; these are not reached at the same moment.
        peak: Most bytes that are in memory at the same moment.
    """

    name: str
    parts: Mapping[str, int]
    peak: int


@dataclass(frozen=True)
class StageWork:
    """Operations and time of one stage; `is_limited` if the recipe's limit in minutes ends it early."""

    name: str
    flops: Number
    seconds: Number
    is_limited: bool = False


@dataclass(frozen=True)
class Knob:
    """Another value of a setting, and the peak of training with it, in bytes."""

    setting: str
    peak: int


@dataclass(frozen=True)
class SizePlan:
    """The student of one size of `flexkd sizes`.

    Attributes:
        size: As in the recipe.
        shape: Its layers and its width.
        peak: Most bytes that its training needs.
        seconds: Time of its training and evaluations with one seed; None: not known.
    """

    size: str
    shape: str
    parameters: int
    peak: int
    seconds: Number | None


@dataclass(frozen=True)
class Plan:
    """What a run will cost on a device.

    Attributes:
        device: The device planned for.
        models: Teacher and student.
        memory: Memory of each stage.
        knobs: Settings that would change the memory of training.
        cache: Bytes of the teacher's answers to all rows on disk, by form.
        units: Operations and time of one pass or one step.
        work: Operations and time of each stage; empty where the number of rows or steps is not known.
        steps: Optimizer steps of the student's training; None: not known.
        assumptions: Everything that was assumed, in words.
        sizes: Students of `flexkd sizes`; empty where the recipe has no section `sizes`.
        seeds: Number of seeds with which each of them is trained.
        processes: Processes, each with a device of its own; memory is that of one of them.
        network: Bytes that each of them sends in a step of the student.
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
    sizes: tuple[SizePlan, ...] = ()
    seeds: int = 0
    processes: int = 1
    network: int = 0

    @property
    def peak(self) -> int:
        """Bytes that the run needs at most."""
        return max(stage.peak for stage in self.memory)

    @property
    def room(self) -> int:
        """Bytes of the device that one process may take; those of a CPU share its memory."""
        sharing = self.processes if self.device.is_cpu else 1
        return int((1 - RESERVE) * self.device.memory / sharing)

    @property
    def fits(self) -> bool:
        """Whether the run fits on the device."""
        return self.peak <= self.room
