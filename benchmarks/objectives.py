"""Objectives of the measured trainings, on supervised positions of language models."""

from benchmarks.setting import Setting, taught_units
from flexkd.core.losses.projector import Projector
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm


def fine_tuning(_: Setting) -> Objective:
    """Labels alone."""
    return Objective(task=TaskTerm())


def kd(_: Setting) -> Objective:
    """KL(teacher || student) alone, like TRL's GKD with beta 0."""
    return Objective(logits=LogitTerm())


def flexkd_kd(setting: Setting) -> Objective:
    """The teacher's units by correlation, and its predictions."""
    return Objective(logits=LogitTerm(), features=_units(setting))


def projector_kd(setting: Setting) -> Objective:
    """The teacher's whole state through a learned projector, and its predictions."""
    projector = Projector(setting.student.hidden_size, setting.teacher.hidden_size)
    features = FeatureTerm(loss="projector", positions="supervised", projectors=(projector,))
    return Objective(logits=LogitTerm(), features=features)


def cached(setting: Setting) -> Objective:
    """Labels, units, and the 32 likeliest outputs of each prediction, as for a cached teacher."""
    return Objective(task=TaskTerm(), logits=LogitTerm(top_k=32), features=_units(setting))


def _units(setting: Setting) -> FeatureTerm:
    return FeatureTerm(positions="supervised", layers=(LayerPair.of_units(taught_units(setting)),))
