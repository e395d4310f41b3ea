"""Distil a language model into a smaller one of any hidden size, guided by the units that the task uses."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flexkd.core import losses
    from flexkd.core.losses.feature import register_loss
    from flexkd.core.objective import Objective, Signal
    from flexkd.core.scores import UnitScores, register_score
    from flexkd.core.selection import UnitPairs, pair_units, select_units, units_for_coverage
    from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
    from flexkd.costs.planning import plan
    from flexkd.data.sources.own_rows import register_rows
    from flexkd.errors import FlexKDError
    from flexkd.facts.losses import FeatureLossFacts
    from flexkd.facts.own_metrics import register_metric
    from flexkd.models.forward.states import states
    from flexkd.models.slicing.student import slice_student
    from flexkd.pipeline.search.tuning import tune
    from flexkd.predict.student import load_student
    from flexkd.preflight import check
    from flexkd.recipe import Recipe, load_recipe
    from flexkd.report.delivery import compare, distill, push, sizes
    from flexkd.scoring.units import score_units
    from flexkd.teacher.live import LiveTeacher
    from flexkd.training.trainer import DistillationTrainer

_HOMES = {
    "DistillationTrainer": "flexkd.training.trainer",
    "FeatureTerm": "flexkd.core.terms",
    "FeatureLossFacts": "flexkd.facts.losses",
    "FlexKDError": "flexkd.errors",
    "LayerPair": "flexkd.core.terms",
    "LiveTeacher": "flexkd.teacher.live",
    "LogitTerm": "flexkd.core.terms",
    "Objective": "flexkd.core.objective",
    "Recipe": "flexkd.recipe",
    "Signal": "flexkd.core.objective",
    "TaskTerm": "flexkd.core.terms",
    "UnitPairs": "flexkd.core.selection",
    "UnitScores": "flexkd.core.scores",
    "check": "flexkd.preflight",
    "compare": "flexkd.report.delivery",
    "distill": "flexkd.report.delivery",
    "load_recipe": "flexkd.recipe",
    "load_student": "flexkd.predict.student",
    "pair_units": "flexkd.core.selection",
    "plan": "flexkd.costs.planning",
    "push": "flexkd.report.delivery",
    "register_loss": "flexkd.core.losses.feature",
    "register_metric": "flexkd.facts.own_metrics",
    "register_rows": "flexkd.data.sources.own_rows",
    "register_score": "flexkd.core.scores",
    "score_units": "flexkd.scoring.units",
    "select_units": "flexkd.core.selection",
    "sizes": "flexkd.report.delivery",
    "slice_student": "flexkd.models.slicing.student",
    "states": "flexkd.models.forward.states",
    "tune": "flexkd.pipeline.search.tuning",
    "units_for_coverage": "flexkd.core.selection",
}

__all__ = [
    "DistillationTrainer",
    "FeatureLossFacts",
    "FeatureTerm",
    "FlexKDError",
    "LayerPair",
    "LiveTeacher",
    "LogitTerm",
    "Objective",
    "Recipe",
    "Signal",
    "TaskTerm",
    "UnitPairs",
    "UnitScores",
    "check",
    "compare",
    "distill",
    "load_recipe",
    "load_student",
    "losses",
    "pair_units",
    "plan",
    "push",
    "register_loss",
    "register_metric",
    "register_rows",
    "register_score",
    "score_units",
    "select_units",
    "sizes",
    "slice_student",
    "states",
    "tune",
    "units_for_coverage",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import flexkd` stays light."""
    if name == "losses":
        return importlib.import_module("flexkd.core.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'flexkd' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


# The demos register their sources of rows, which a recipe may name wherever it is read.
importlib.import_module("flexkd.demos")


def __dir__() -> list[str]:
    return [*(name for name in globals() if name.startswith("__")), *__all__]
