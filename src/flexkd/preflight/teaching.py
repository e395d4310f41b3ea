"""Whether what is to be taught is there: layers, pairs of units, and a geometry for the kind of labels."""

from collections.abc import Iterable, Iterator

from flexkd.errors import FlexKDError, RecipeError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import family_turns
from flexkd.preflight.evidence import Evidence
from flexkd.preflight.model_files import ModelFiles
from flexkd.recipe.section import UNIT_WISE_LOSSES
from flexkd.recipe.taught_features import is_rotated


def mapping_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """A sliced student is bound to what it was cut by; a score gives its units other partners, or none."""
    recipe, teacher = evidence.recipe, evidence.teacher
    features = recipe.objective.features
    if features is None or features.weight == 0 or recipe.student.start != "slice" or teacher is None:
        return ()
    if features.loss in UNIT_WISE_LOSSES and features.basis == "units":
        check_mapping(features.mapping, rotated=is_rotated(recipe, turns=family_turns(teacher.model_type)))
    return ()


def check_mapping(mapping: str, *, rotated: bool) -> None:
    """Refuse a mapping by scores for a student that was cut out of its teacher.

    Args:
        mapping: `index` and `matched` always fit.
        rotated: It was cut along directions.

    Raises:
        RecipeError: The mapping is another.
    """
    if mapping in ("index", "matched"):
        return
    if rotated:
        raise RecipeError(
            f"objective.features.mapping: '{mapping}' ranks units, and the student was cut along directions. Use "
            "mapping: index or matched, or student.basis: coordinates."
        )
    raise RecipeError(
        f"objective.features.mapping: '{mapping}' would teach a sliced student's units others than they were "
        "sliced from. Use mapping: matched, or index."
    )


def geometry_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """The directions that move the output are known where one output of several is right."""
    recipe = evidence.recipe
    features = recipe.objective.features
    if features is None or features.weight == 0 or recipe.task.problem in ("single_label", "generation"):
        return
    for key in ("loss", "basis"):
        value = getattr(features, key)
        if value in ("functional_cka", "tangent"):
            yield UnsupportedModelError(
                f"objective.features.{key}: '{value}' is only known for one class of several, not for "
                f"{recipe.task.problem}. Use basis: units, and a loss other than functional_cka."
            )


def basis_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A teacher that is to be turned by name can be turned."""
    teacher = evidence.teacher
    is_asked = evidence.recipe.student.start == "slice" and evidence.recipe.student.basis == "rotated"
    if is_asked and teacher is not None and teacher.family is not None and not teacher.family.turns:
        yield UnsupportedModelError(
            "student.basis: 'rotated' needs a teacher that can be turned into the basis of its own directions, as "
            f"Llama or Qwen can, and a {teacher.model_type} cannot. Use basis: coordinates."
        )


def layer_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Layers that are scored, taught or compared are there."""
    recipe, teacher = evidence.recipe, evidence.teacher
    features = recipe.objective.features
    layer_map = features.layer_map if features is not None and features.weight > 0 else {}
    scored = recipe.scores.layer if isinstance(recipe.scores.layer, tuple) else (recipe.scores.layer,)
    teacher_depth = _depth(teacher)
    yield from _missing(scored, teacher_depth, "scores.layer", "teacher")
    yield from _missing(layer_map.values(), teacher_depth, "objective.features.layer_map", "teacher")
    yield from _missing(layer_map, _student_depth(evidence), "objective.features.layer_map", "student")


def _missing(layers: Iterable[int], depth: int | None, where: str, who: str) -> Iterator[FlexKDError]:
    """Layers that a model of known depth does not have; -1 is always there."""
    wrong = [layer for layer in layers if depth is not None and layer != -1 and not 1 <= layer <= depth]
    if wrong:
        yield ShapeError(
            f"{where}: the {who} has no layer {wrong[0]}. Layers are 1 to {depth}, the output of each block, or -1, "
            "the input of the head."
        )


def _student_depth(evidence: Evidence) -> int | None:
    section = evidence.recipe.student
    if section.size is not None or section.max_parameters is not None:
        return None
    model = evidence.teacher if section.start == "slice" else evidence.models.get("student.model")
    return section.num_layers or _depth(model)


def _depth(model: ModelFiles | None) -> int | None:
    return None if model is None or model.family is None else model.size("num_layers")
