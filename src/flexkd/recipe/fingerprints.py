"""Settings of a recipe that the files of a run folder depend on, one entry a key, so that a mismatch names the key."""

import json
from typing import Any

from flexkd.recipe.schema import Recipe
from flexkd.recipe.section import Section

_WITHOUT_EFFECT = {"resume", "report_to", "dataloader_workers", "logit_chunk", "compile"}
"""Keys of `training` that do not change the numbers of a run."""

_NULL_AS_BEFORE = {"entropy_share", "fade", "projector"}
"""Keys that came after files were written, and whose null means what these files were made with."""

_UNPAIRED = {"weight": True, "fade": True, "projector": {"learning_rate", "start"}}
"""Keys of `objective.features` that change how features are taught, and not which."""


def row_settings(recipe: Recipe, data: str) -> dict[str, str]:
    """Settings that the encoded rows depend on, besides the tokenizers.

    Args:
        data: Fingerprint of the rows.
    """
    generation_names = () if recipe.generation is None else ("max_answer_length", "chat", "template")
    names = ("max_length", *generation_names)
    return {"data": data, **{name: str(getattr(recipe.data, name)) for name in names}}


def selection_settings(recipe: Recipe) -> dict[str, str]:
    """Settings that the unit scores and unit pairs depend on, besides the models and the rows."""
    features = recipe.objective.features
    taught = features if features is not None and features.weight > 0 else None
    return {
        "features": "none" if taught is None else "taught",
        **_settings("scores", recipe.scores),
        "scores.seed": str(score_seed(recipe)),
        # The number type of the saved student changes neither scores nor pairs.
        **_settings("student", recipe.student, exclude={"save_dtype"}),
        **({} if taught is None else _settings("features", taught, exclude=_UNPAIRED)),
    }


def training_settings(recipe: Recipe) -> dict[str, str]:
    """Settings that the training of a student depends on, besides the models, the rows and the taught units."""
    return {
        "task.metric": recipe.task.metric,
        "student.lora": str(recipe.student.lora),
        **_settings("objective", recipe.objective),
        **_settings("training", recipe.training, exclude=_WITHOUT_EFFECT),
    }


def teacher_settings(recipe: Recipe) -> dict[str, str]:
    """Settings that change the teacher itself."""
    names = ("fine_tune", "quantization")
    plain = recipe.teacher.model_dump(mode="json", include=set(names))
    return {f"teacher.{name}": json.dumps(plain[name], sort_keys=True) for name in names}


def score_seed(recipe: Recipe) -> int:
    """Seed of the unit scores: the same for students of all seeds, except for the random control."""
    return recipe.training.seed if recipe.scores.attribution == "random" else 0


def _settings(name: str, section: Section, *, exclude: set[str] | dict[str, Any] | None = None) -> dict[str, str]:
    plain = _as_before(section.model_dump(mode="json", exclude=exclude))
    return {f"{name}.{key}": json.dumps(value, sort_keys=True) for key, value in plain.items()}


def _as_before(settings: Any) -> Any:
    """Settings without keys that earlier versions did not have, where these say what stood before."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: _as_before(value) for key, value in settings.items() if value is not None or key not in _NULL_AS_BEFORE
    }
