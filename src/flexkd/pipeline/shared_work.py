"""What was computed of a job's teacher once, and serves every run of the job."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from flexkd.core.scores import UnitScores
from flexkd.models.slicing.rotation import Rotation
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.signal import SignalRequest


@dataclass
class SharedWork:
    """A memo of the teacher's work, filled by the first run that needs a part of it.

    Shared by the runs of a job are

    - unit scores, by the settings that decide them,
    - the teacher in the basis of its own directions, by the number of calibration rows that show them,
    - open caches of the teacher's answers to the training and validation rows: a run reads the first one that holds
      all columns it asks for.

    Nothing else is: students, pairs of units and objectives belong to one run.
    """

    _scores: dict[str, tuple[UnitScores, ...]] = field(default_factory=dict, init=False)
    _rotations: dict[int, Rotation[PreTrainedModel] | None] = field(default_factory=dict, init=False)
    _caches: list[CachedTeacher] = field(default_factory=list, init=False)

    def scores(self, settings: str, compute: Callable[[], tuple[UnitScores, ...]]) -> tuple[UnitScores, ...]:
        """Unit scores under these settings."""
        if settings not in self._scores:
            self._scores[settings] = compute()
        return self._scores[settings]

    def rotation(
        self, calibration_rows: int, compute: Callable[[], Rotation[PreTrainedModel] | None]
    ) -> Rotation[PreTrainedModel] | None:
        """The rotated teacher; None where its family has no rotation, which is remembered as well."""
        if calibration_rows not in self._rotations:
            self._rotations[calibration_rows] = compute()
        return self._rotations[calibration_rows]

    def cache_for(self, request: SignalRequest) -> CachedTeacher | None:
        """The first open cache that holds everything a request reads; None where no cache does."""
        return next((cache for cache in self._caches if not cache.manifest.columns.lacks(request)), None)

    def add_cache(self, cache: CachedTeacher) -> None:
        """Open a cache for every run that follows."""
        self._caches.append(cache)
