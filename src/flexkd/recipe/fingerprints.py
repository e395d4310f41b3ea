"""What the files of a run folder depend on, setting by setting, so that a mismatch names the key."""

import json

from flexkd.recipe.schema import Recipe
from flexkd.recipe.section import Section

_WITHOUT_EFFECT = {"resume", "report_to", "dataloader_workers", "logit_chunk", "compile"}
"""Keys of training under which a run goes on to the same numbers."""


def row_settings(recipe: Recipe, data: str) -> dict[str, str]:
    """What decides the features of the rows besides the tokenizers.

    Args:
        recipe: Of the run.
        data: Fingerprint of the rows.
    """
    classified = ("max_length",)
    names = classified if recipe.generation is None else (*classified, "max_answer_length", "chat", "template")
    return {"data": data, **{name: str(getattr(recipe.data, name)) for name in names}}


def selection_settings(recipe: Recipe) -> dict[str, str]:
    """What the scores of the teacher's units, and their pairs, depend on besides the models and rows."""
    features = recipe.objective.features
    taught = features if features is not None and features.weight > 0 else None
    return {
        "features": "none" if taught is None else "taught",
        **_settings("scores", recipe.scores),
        "scores.seed": str(score_seed(recipe)),
        # Its number type on disk changes neither what is scored nor what is paired.
        **_settings("student", recipe.student, exclude={"save_dtype"}),
        **({} if taught is None else _settings("features", taught, exclude={"weight"})),
    }


def training_settings(recipe: Recipe) -> dict[str, str]:
    """What a student's training depends on besides the models, the rows and the taught units."""
    return {
        "task.metric": recipe.task.metric,
        "student.lora": str(recipe.student.lora),
        **_settings("objective", recipe.objective),
        **_settings("training", recipe.training, exclude=_WITHOUT_EFFECT),
    }


def teacher_settings(recipe: Recipe) -> dict[str, str]:
    """How the teacher becomes the one that teaches."""
    names = ("fine_tune", "quantization")
    plain = recipe.teacher.model_dump(mode="json", include=set(names))
    return {f"teacher.{name}": json.dumps(plain[name], sort_keys=True) for name in names}


def score_seed(recipe: Recipe) -> int:
    """Students of all seeds share their scores, but for the control whose point is another draw for each."""
    return recipe.training.seed if recipe.scores.attribution == "random" else 0


def _settings(name: str, section: Section, *, exclude: set[str] | None = None) -> dict[str, str]:
    plain = section.model_dump(mode="json", exclude=exclude)
    return {f"{name}.{key}": json.dumps(value, sort_keys=True) for key, value in plain.items()}
