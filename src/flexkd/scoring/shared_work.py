"""Results computed from a teacher once for all runs of a job, by the first run that needs them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.scores import UnitScores
from flexkd.models.slicing.calibration import Calibration
from flexkd.models.slicing.rotation import Rotation
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.signal import SignalRequest


@dataclass
class SharedWork:
    """Results computed from the teacher once for all runs of a job, by the first run that needs them.

    Runs share

    - unit scores, by the settings that decide them,
    - the functional geometry of its states, by layer and number of rows,
    - what calibration rows show of it, by their number,
    - the teacher in the basis of its own directions, by the settings that decide them,
    - open caches of the teacher's answers to the training and validation rows; a run reads the first one that holds
      every column it requests.

    What is computed from rows that were drawn for a start is shared by the runs of that start; caches by all.

    Students, pairs of units and objectives belong to one run each and are not shared.
    """

    _scores: dict[str, tuple[UnitScores, ...]] = field(default_factory=dict, init=False)
    _geometries: dict[str, Tensor] = field(default_factory=dict, init=False)
    _calibrations: dict[int, Calibration] = field(default_factory=dict, init=False)
    _rotations: dict[str, Rotation[PreTrainedModel] | None] = field(default_factory=dict, init=False)
    _caches: list[CachedTeacher] = field(default_factory=list, init=False)
    _starts: dict[str, "SharedWork"] = field(default_factory=dict, init=False)

    def of_start(self, name: str) -> "SharedWork":
        """The results for one start; what other starts were cut from, each with a whole model, is dropped."""
        if name not in self._starts:
            work = SharedWork()
            work._caches, work._starts = self._caches, self._starts
            self._starts[name] = work
        work = self._starts[name]
        for other in (self, *self._starts.values()):
            if other is not work:
                other._rotations.clear()
                other._calibrations.clear()
        return work

    def scores(self, settings: str, compute: Callable[[], tuple[UnitScores, ...]]) -> tuple[UnitScores, ...]:
        """Unit scores under these settings."""
        if settings not in self._scores:
            self._scores[settings] = compute()
        return self._scores[settings]

    def geometry(self, settings: str, compute: Callable[[], Tensor]) -> Tensor:
        """The functional geometry under these settings."""
        if settings not in self._geometries:
            self._geometries[settings] = compute()
        return self._geometries[settings]

    def has_geometry(self, settings: str) -> bool:
        """Whether the geometry under these settings is known."""
        return settings in self._geometries

    def calibration(self, num_rows: int, compute: Callable[[], Calibration]) -> Calibration:
        """What that many calibration rows show of the teacher."""
        if num_rows not in self._calibrations:
            self._calibrations[num_rows] = compute()
        return self._calibrations[num_rows]

    def rotation(
        self, settings: str, compute: Callable[[], Rotation[PreTrainedModel] | None]
    ) -> Rotation[PreTrainedModel] | None:
        """The rotated teacher; None where its family cannot be rotated, which is remembered too."""
        if settings not in self._rotations:
            self._rotations[settings] = compute()
        return self._rotations[settings]

    def forget_starts(self) -> None:
        """Forget rotated teachers and what calibration rows showed, when no student is left to be cut."""
        for work in (self, *self._starts.values()):
            work._rotations.clear()
            work._calibrations.clear()

    def cache_for(self, request: SignalRequest) -> CachedTeacher | None:
        """The first open cache that holds everything a request reads; None where no cache does."""
        return next((cache for cache in self._caches if not cache.manifest.columns.lacks(request)), None)

    def add_cache(self, cache: CachedTeacher) -> None:
        """Offer an open cache to all later runs."""
        self._caches.append(cache)
