"""Settings of a recipe that the files of a run folder depend on, one entry a key, so that a mismatch names the key."""

import json
from collections.abc import Mapping
from typing import Any

from flexkd.facts.user_code import LOSS_KEY, METRIC_KEY, SCORE_KEY, function_hashes
from flexkd.recipe.schema import Recipe
from flexkd.recipe.section import Section
from flexkd.recipe.taught_features import cut_chosen_by, may_rotate
from flexkd.recipe.training_sections import FeaturesSection

_WITHOUT_EFFECT = {"resume", "report_to", "dataloader_workers", "logit_chunk", "compile"}
"""Keys of `training` that do not change the numbers of a run."""

_NULL_AS_BEFORE = {"chosen_by", "early_stopping", "entropy_share", "fade", "projector", "start_seed", "vocabulary"}
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
        **_share(recipe),
        **_settings("scores", recipe.scores),
        "scores.seed": str(score_seed(recipe)),
        **user_code(recipe, SCORE_KEY),
        # The number type of the saved student changes neither scores nor pairs.
        **_settings("student", recipe.student, exclude={"save_dtype", "function_share", "chosen_by"}),
        **_texts("student", cut_settings(recipe)),
        **({} if taught is None else _texts("features", _earlier_features(taught, exclude=_UNPAIRED) or {})),
    }


def cut_settings(recipe: Recipe) -> dict[str, Any]:
    """What a cut is chosen by; `auto` of a cut that is along units for sure is what earlier versions wrote for it."""
    section, rotated = recipe.student, may_rotate(recipe)
    chosen_by = section.chosen_by if rotated else cut_chosen_by(recipe, rotated=False)
    is_mixed = cut_chosen_by(recipe, rotated=rotated) == "mixed"
    return {"chosen_by": chosen_by, **({"function_share": section.function_share} if is_mixed else {})}


def training_settings(recipe: Recipe) -> dict[str, str]:
    """Settings that the training of a student depends on, besides the models, the rows and the taught units."""
    return {
        "task.metric": recipe.task.metric,
        **user_code(recipe, METRIC_KEY, LOSS_KEY),
        **(
            {} if recipe.task.higher_is_better is None else {"task.higher_is_better": str(recipe.task.higher_is_better)}
        ),
        "student.lora": str(recipe.student.lora),
        **_share(recipe),
        **({} if recipe.student.start_seed is None else {"student.start_seed": str(recipe.student.start_seed)}),
        **_texts(
            "objective",
            {**recipe.objective.model_dump(mode="json"), "features": _earlier_features(recipe.objective.features)},
        ),
        **_settings("training", recipe.training, exclude=_WITHOUT_EFFECT),
    }


def user_code(recipe: Recipe, *keys: str) -> dict[str, str]:
    """Hashes of the functions of users that a recipe names, under these keys or all; empty where it names none."""
    features = recipe.objective.features
    names = {
        METRIC_KEY: recipe.task.metric,
        LOSS_KEY: "" if features is None else features.loss,
        SCORE_KEY: recipe.scores.attribution,
    }
    return function_hashes({key: names[key] for key in keys or names})


def _share(recipe: Recipe) -> dict[str, str]:
    share = recipe.data.train_share
    return {} if share is None else {"data.train_share": str(share)}


def teacher_settings(recipe: Recipe) -> dict[str, str]:
    """Settings that change the teacher itself."""
    names = ("fine_tune", "quantization")
    plain = recipe.teacher.model_dump(mode="json", include=set(names))
    return {f"teacher.{name}": json.dumps(plain[name], sort_keys=True) for name in names}


def score_seed(recipe: Recipe) -> int:
    """Seed of the scores: the same for students of all seeds, except where units or directions are drawn at random."""
    return recipe.training.seed if draws_at_random(recipe) else 0


def draws_at_random(recipe: Recipe) -> bool:
    """Whether the units or directions of the cut, or those that are taught, are drawn at random."""
    features = recipe.objective.features
    return recipe.student.chosen_by == "random" or (features is not None and features.chosen_by == "random")


def _earlier_features(
    section: FeaturesSection | None, *, exclude: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The section in the words of earlier versions, where they had some: what they left behind is continued."""
    if section is None:
        return None
    plain = section.model_dump(mode="json", exclude=exclude)
    if section.basis == "auto" and section.mapping != "matched":
        plain["basis"] = "units"
    if section.basis == "directions" and section.chosen_by == "scores":
        plain |= {"basis": "tangent", "chosen_by": None}
    return plain


def _settings(name: str, section: Section, *, exclude: set[str] | dict[str, Any] | None = None) -> dict[str, str]:
    return _texts(name, section.model_dump(mode="json", exclude=exclude))


def _texts(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    plain = _as_before(dict(values))
    return {f"{name}.{key}": json.dumps(value, sort_keys=True) for key, value in plain.items()}


def _as_before(settings: Any) -> Any:
    """Settings without keys that earlier versions did not have, where these say what stood before."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: _as_before(value) for key, value in settings.items() if value is not None or key not in _NULL_AS_BEFORE
    }
