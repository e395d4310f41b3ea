"""Whether a student of the requested shape can be made, and whether the modules that LoRA adapts are there."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Final

from flexkd.errors import FlexKDError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES, family_can_rotate
from flexkd.facts.names import SINGLE_STACK_SIZES
from flexkd.models.loading.module_names import check_module_names, is_named
from flexkd.models.loading.stored_weights import stored_shapes
from flexkd.preflight.inputs import RecipeInputs
from flexkd.preflight.model_files import ModelFiles
from flexkd.recipe.model_sections import StudentSection
from flexkd.recipe.taught_features import is_rotated

_HEAD_SIZES: Final = ("num_heads", "num_key_value_heads", "num_encoder_layers")
"""Sizes whose rules are code of the family."""
_UNSTORED_MODULES: Final = (
    "classifier", "dense", "out_proj", "pooler", "pre_classifier", "score", "lm_head", "shared",
)  # fmt: skip
"""Modules that the stored weights of a model may lack: they are made, or tied, when it is loaded."""
_ALWAYS_FITS: Final = 3
"""A budget of so many embedding tables, each one attention head wide, is enough for a student of every family."""


def slice_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The student can be cut out of this teacher: a known architecture, sizes not above its own, whole heads.

    Raises:
        UnsupportedModelError: As `check_family`.
    """
    recipe, teacher = inputs.recipe, inputs.teacher
    if teacher is None or recipe.student.start != "slice":
        return
    check_family(teacher.model_type, writes_text=recipe.generation is not None)
    for name in SINGLE_STACK_SIZES:
        requested, available = getattr(recipe.student, name), teacher.size(name)
        if requested is not None and available is not None and requested > available:
            yield ShapeError(
                f"student.{name}: {requested} is more than the teacher's {available}. Lower it, or start the student "
                "from a model or a config: a cut can only remove."
            )
    width, heads, requested = teacher.size("hidden_size"), teacher.size("num_heads"), recipe.student.hidden_size
    is_fixed = teacher.family is not None and teacher.family.has_fixed_head_dim
    if not is_fixed or not width or not heads or requested is None or requested > width:
        return
    head_dim = width // heads
    if requested % head_dim:
        lower = requested // head_dim * head_dim
        near = [size for size in (lower, lower + head_dim) if 0 < size <= width]
        yield ShapeError(
            f"student.hidden_size: {requested} is not a multiple of the teacher's head width {head_dim} "
            f"({width} / {heads} heads). Nearest: {' or '.join(map(str, near))}."
        )


def check_family(model_type: str, *, writes_text: bool) -> None:
    """Refuse a teacher out of which no student for the task can be cut.

    Raises:
        UnsupportedModelError: Its architecture is not known, or not known as a classifier.
    """
    known_types = {name for name, family in FAMILIES.items() if writes_text or family.classifies}
    if model_type in known_types:
        return
    what = "student" if model_type not in FAMILIES else "classifier"
    raise UnsupportedModelError(
        f"teacher.model: no {what} can be cut out of a '{model_type}' model. Known: {', '.join(sorted(known_types))}. "
        "Use student.start: pretrained or config."
    )


def shape_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """Numbers of heads, and shapes derived from a very small budget, are possible; `slice_errors` checks plain sizes.

    Raises:
        ShapeError: As `resolve_shape` and `derive_shape`.
    """
    recipe, teacher = inputs.recipe, inputs.teacher
    section = recipe.student
    if section.start != "slice" or teacher is None or teacher.model_type not in FAMILIES:
        return ()
    if not teacher.has_config:
        return ()
    head_sizes = {name: value for name in _HEAD_SIZES if (value := getattr(section, name)) is not None}
    limit = section.max_parameters
    if section.vocabulary is not None and (section.size or limit):
        return ()  # what a cut vocabulary frees is known only when the rows have been read as tokens
    if section.size is not None:
        parameters = _num_parameters(teacher)
        limit = None if parameters is None else int(section.size * parameters)
    needs_rules = bool(head_sizes) or (limit is not None and _may_not_fit(teacher, limit))
    if not needs_rules or any(True for _ in slice_errors(inputs)):
        return ()
    # The rules of a family's heads are code: transformers is loaded only where they matter.
    from flexkd.models.loading.pretrained import load_config
    from flexkd.models.slicing.proportions import derive_shape
    from flexkd.models.slicing.shape import resolve_shape

    config = load_config(teacher.source, where="teacher.model")
    if section.size is not None or section.max_parameters is not None:
        rotated = is_rotated(recipe, can_rotate=family_can_rotate(teacher.model_type))
        derive_shape(config, size=section.size, max_parameters=section.max_parameters, rotated=rotated)
    else:
        names = ("hidden_size", "num_layers", "intermediate_size")
        resolve_shape(config, **{name: getattr(section, name) for name in names}, **head_sizes)
    return ()


def basis_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A teacher whose student is to start in the rotated basis can be rotated."""
    teacher, section = inputs.teacher, inputs.recipe.student
    if section.start != "slice" or teacher is None or teacher.family is None or teacher.family.can_rotate:
        return
    if section.basis == "auto" and section.chosen_by == "mixed":
        yield UnsupportedModelError(
            "student.chosen_by: 'mixed' needs a teacher that can be turned into the basis of its own directions, as "
            f"Llama or Qwen can; a {teacher.model_type} cannot. Use chosen_by: scores."
        )
    share = StudentSection.model_fields["function_share"].default
    if section.basis == "auto" and section.chosen_by == "auto" and section.function_share != share:
        yield UnsupportedModelError(
            f"student.function_share: {section.function_share:g} is used only by a cut along directions, and a "
            f"{teacher.model_type} is cut along units. Remove it."
        )
    if section.basis == "rotated":
        yield UnsupportedModelError(
            "student.basis: 'rotated' needs a teacher that can be turned into the basis of its own directions, as "
            f"Llama or Qwen can; a {teacher.model_type} cannot. Use basis: coordinates."
        )


def lora_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """The modules that low-rank updates name are among the stored weights.

    Raises:
        RecipeError: As `check_module_names`.
    """
    section = inputs.recipe.student
    where = "teacher.model" if section.start == "slice" else "student.model"
    model = inputs.models.get(where)
    if section.lora is None or section.lora.target_modules == "all-linear" or model is None or model.folder is None:
        return ()
    shapes = stored_shapes(model.folder, where=where)
    if shapes is None:
        return ()
    weighted = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    paths = {".".join(name.split(".")[:end]) for name in weighted for end in range(1, name.count(".") + 2)}
    targets = [name for name in section.lora.target_modules if not is_named(name, _UNSTORED_MODULES)]
    class_name = ", ".join(map(str, model.config.get("architectures") or ["this model"]))
    check_module_names({"target_modules": targets}, sorted(paths), weighted=weighted, class_name=class_name)
    return ()


def size_notes(inputs: RecipeInputs) -> Iterator[str]:
    """A student that is as large as its teacher, of a recipe that has no sizes either."""
    student = inputs.recipe.student
    sizes = [getattr(student, name) for name in (*SINGLE_STACK_SIZES, "size", "max_parameters")]
    if student.start == "slice" and inputs.recipe.sizes is None and not any(sizes):
        yield "student: no size is given, so it is as large as its teacher."


def _num_parameters(teacher: ModelFiles) -> int | None:
    """Parameters in the stored weights; None where they are not on this machine, or not in safetensors files."""
    shapes = None if teacher.folder is None else stored_shapes(teacher.folder, where=teacher.where)
    return None if shapes is None else sum(map(prod, shapes.values()))


def _may_not_fit(teacher: ModelFiles, limit: int) -> bool:
    """Whether so few parameters may be too few for any student of this teacher."""
    width, heads, tokens = teacher.size("hidden_size"), teacher.size("num_heads"), teacher.config.get("vocab_size")
    if not width or not heads or not isinstance(tokens, int):
        return False
    return limit < _ALWAYS_FITS * tokens * max(width // heads, 8)
