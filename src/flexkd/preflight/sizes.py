"""Whether sizes fit together: the student's and the teacher's, rows and positions, batches and losses."""

from collections.abc import Iterator
from typing import Final

from flexkd.errors import FlexKDError, RecipeError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.positions import is_rotary, position_limit
from flexkd.models.forward.precision import check_half_precision
from flexkd.preflight.evidence import Evidence, tried

# core/losses/feature.py says so too; it imports torch, so a test compares the two.
MINIMUM_POSITIONS: Final = 8
"""Fewest positions of one forward pass that a feature loss can be taken over."""

_SIZES: Final = ("hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size")


def slice_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """What can be cut out of this teacher; the slicing itself checks again."""
    recipe, teacher = evidence.recipe, evidence.teacher
    if teacher is None or recipe.student.start != "slice":
        return
    check_family(teacher.model_type, writes_text=recipe.generation is not None)
    for name in _SIZES:
        asked, there = getattr(recipe.student, name), teacher.size(name)
        if asked is not None and there is not None and asked > there:
            yield ShapeError(
                f"student.{name}: {asked} is more than the teacher's {there}. Lower it, or start the student from a "
                "model or a config: a cut only makes smaller."
            )
    width, heads, asked = teacher.size("hidden_size"), teacher.size("num_heads"), recipe.student.hidden_size
    is_fixed = teacher.family is not None and teacher.family.has_fixed_head_dim
    if not is_fixed or not width or not heads or asked is None or asked > width:
        return
    head_dim = width // heads
    if asked % head_dim:
        lower = asked // head_dim * head_dim
        near = [size for size in (lower, lower + head_dim) if 0 < size <= width]
        yield ShapeError(
            f"student.hidden_size: {asked} is not a multiple of the teacher's head width {head_dim} "
            f"({width} / {heads} heads). Nearest: {' or '.join(map(str, near))}."
        )


def check_family(model_type: str, *, writes_text: bool) -> None:
    """Refuse a teacher out of which no student of the task can be cut.

    Raises:
        UnsupportedModelError: Its architecture is not known, or not known as a classifier.
    """
    tasks = {name for name, family in FAMILIES.items() if writes_text or family.classifies}
    if model_type in tasks:
        return
    what = "student" if model_type not in FAMILIES else "classifier"
    raise UnsupportedModelError(
        f"teacher.model: no {what} can be cut out of a '{model_type}' model. Known: {', '.join(sorted(tasks))}. Use "
        "student.start: pretrained or config."
    )


def precision_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Models that overflow in half precision."""
    recipe, models, errors = evidence.recipe, evidence.models, list[FlexKDError]()
    asked = {"teacher.model": ("teacher.precision", recipe.teacher.precision)}
    asked["student.model"] = ("training.precision", recipe.training.precision)
    for name, (where, precision) in asked.items():
        model = models.get(name) or models.get("teacher.model")
        if model is not None:
            tried(errors, lambda: check_half_precision(model.config, precision, where))  # noqa: B023 (called at once)
    yield from errors


def length_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """The longest row fits into the positions of every model that has so many and no more."""
    longest = evidence.recipe.data.max_length
    for where, model in evidence.models.items():
        limit = position_limit(model.config)
        if limit is not None and longest > limit and not is_rotary(model.config):
            yield ShapeError(
                f"data.max_length: {longest} tokens are more than the {limit} positions of "
                f"{where} '{model.source}'. Use {limit} or fewer."
            )


def batch_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Supervised positions are one a row, so that a small batch has too few for any feature loss."""
    recipe = evidence.recipe
    features, training = recipe.objective.features, recipe.training
    # An answer has several tokens, a classified row one position.
    if recipe.generation is not None or features is None or features.weight == 0 or features.positions != "supervised":
        return
    rows = training.per_device_batch_size or training.batch_size
    if rows < MINIMUM_POSITIONS:
        key = "batch_size" if training.per_device_batch_size is None else "per_device_batch_size"
        yield RecipeError(
            f"training.{key}: {rows} rows of one pass have {rows} supervised positions, fewer than the "
            f"{MINIMUM_POSITIONS} that {features.loss} needs. Use more rows, or objective.features.positions: tokens."
        )


def size_notes(evidence: Evidence) -> Iterator[str]:
    """Lengths that a model reads badly, and a student as large as its teacher."""
    recipe, student = evidence.recipe, evidence.recipe.student
    for where, model in evidence.models.items():
        limit = position_limit(model.config)
        if limit is not None and recipe.data.max_length > limit and is_rotary(model.config):
            yield f"data.max_length: {recipe.data.max_length} is above the {limit} tokens that {where} was trained for."
    if student.start == "slice" and not any(getattr(student, name) for name in (*_SIZES, "size", "max_parameters")):
        yield "student: no size is given, so it is as large as its teacher."
