"""Whether a student of the asked shape can be made: the cut's own rules, and the modules that learn."""

from collections.abc import Iterable
from math import prod

from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES, TRAITS, family_turns
from flexkd.models.loading.module_names import check_module_names, is_named
from flexkd.models.loading.stored_weights import stored_shapes
from flexkd.preflight.evidence import Evidence
from flexkd.preflight.model_files import ModelFiles
from flexkd.preflight.sizes import slice_errors
from flexkd.recipe.taught_features import is_rotated

_UNUSUAL = ("num_heads", "num_key_value_heads", "num_encoder_layers")
_HEADS = ("classifier", "dense", "out_proj", "pooler", "pre_classifier", "score", "lm_head", "shared")
"""Modules that the weights of a model may lack, since they are made or tied when it is loaded."""
_SMALL = 3
"""Tables of embeddings as wide as a head, in so many of which every family has a student."""


def type_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """An architecture that the installed transformers has never heard of."""
    for where, model in evidence.models.items():
        is_cut = where == "teacher.model" and evidence.recipe.student.start == "slice"
        if model.folder is None or is_cut or model.model_type in TRAITS:
            continue
        # A table of 800 names: what config.json alone cannot tell.
        from transformers import CONFIG_MAPPING

        if model.model_type not in CONFIG_MAPPING:
            yield UnsupportedModelError(
                f"{where}: '{model.source}' is a '{model.model_type}' model, which the installed transformers does not "
                "know. Update it, or give another model."
            )


def shape_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """Heads that are asked for, and shapes derived from a very small size; plain widths and depths are checked before.

    Raises:
        ShapeError: As `resolve_shape` and `derive_shape`.
    """
    recipe, teacher = evidence.recipe, evidence.teacher
    section = recipe.student
    if section.start != "slice" or teacher is None or teacher.model_type not in FAMILIES:
        return ()
    if teacher.folder is None or not (teacher.folder / "config.json").is_file():
        return ()  # a GGUF file would have to be converted first
    asked = {name: value for name in _UNUSUAL if (value := getattr(section, name)) is not None}
    limit = section.max_parameters
    if section.size is not None:
        whole = _parameters(teacher)
        limit = None if whole is None else int(section.size * whole)
    is_usual = not asked and (limit is None or not _is_small(teacher, limit))
    if is_usual or any(True for _ in slice_errors(evidence)):
        return ()
    # The rules of a family's heads are code: transformers is loaded where they are asked for.
    from flexkd.models.loading.pretrained import load_config
    from flexkd.models.slicing.proportions import derive_shape
    from flexkd.models.slicing.shape import resolve_shape

    config = load_config(teacher.source, where="teacher.model")
    if section.size is not None or section.max_parameters is not None:
        rotated = is_rotated(recipe, turns=family_turns(teacher.model_type))
        derive_shape(config, size=section.size, max_parameters=section.max_parameters, rotated=rotated)
    else:
        names = ("hidden_size", "num_layers", "intermediate_size")
        resolve_shape(config, **{name: getattr(section, name) for name in names}, **asked)
    return ()


def lora_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """Modules that low-rank updates are asked for are among the stored weights."""
    section = evidence.recipe.student
    name = "teacher.model" if section.start == "slice" else "student.model"
    model = evidence.models.get(name)
    if section.lora is None or section.lora.target_modules == "all-linear" or model is None or model.folder is None:
        return ()
    shapes = stored_shapes(model.folder, where=name)
    if shapes is None:
        return ()
    weighted = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    paths = {".".join(name.split(".")[:end]) for name in weighted for end in range(1, name.count(".") + 2)}
    asked = [name for name in section.lora.target_modules if not is_named(name, _HEADS)]
    built_as = ", ".join(map(str, model.config.get("architectures") or ["this model"]))
    check_module_names({"target_modules": asked}, sorted(paths), weighted=weighted, class_name=built_as)
    return ()


def _parameters(teacher: ModelFiles) -> int | None:
    shapes = None if teacher.folder is None else stored_shapes(teacher.folder, where=teacher.where)
    return None if shapes is None else sum(map(prod, shapes.values()))


def _is_small(teacher: ModelFiles, limit: int) -> bool:
    width, heads, words = teacher.size("hidden_size"), teacher.size("num_heads"), teacher.config.get("vocab_size")
    if not width or not heads or not isinstance(words, int):
        return False
    return limit < _SMALL * words * max(width // heads, 8)
