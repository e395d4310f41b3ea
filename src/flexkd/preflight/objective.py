"""Whether the objective can be computed: layers, pairs of units, positions of a batch, the geometry of the labels."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flexkd.errors import FlexKDError, RecipeError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import family_can_rotate
from flexkd.facts.heads import logit_change
from flexkd.facts.losses import FEATURE_LOSS_FACTS, TASK_LOSS_FACTS, TASK_LOSS_OF
from flexkd.preflight.inputs import RecipeInputs
from flexkd.preflight.model_files import ModelFiles
from flexkd.recipe.objective_rules import unscored_layers_text
from flexkd.recipe.taught_features import cut_choice, is_rotated, reads_geometry, taught_choice


def layer_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The models have the layers that are scored or compared."""
    recipe, teacher = inputs.recipe, inputs.teacher
    features = recipe.objective.features
    layer_map = features.layer_map if features is not None and features.weight > 0 else {}
    teacher_depth = _depth(teacher)
    yield from _missing_layers(recipe.scores.layers, teacher_depth, "scores.layer", "teacher")
    yield from _missing_layers(layer_map.values(), teacher_depth, "objective.features.layer_map", "teacher")
    yield from _missing_layers(layer_map, _student_depth(inputs), "objective.features.layer_map", "student")


def scored_layer_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Each layer is scored whose units are taught by their scores, as those of a teacher that cannot be rotated are."""
    recipe, teacher = inputs.recipe, inputs.teacher
    features = recipe.objective.features
    if features is None or teacher is None:
        return
    choice = taught_choice(recipe, rotated=is_rotated(recipe, can_rotate=family_can_rotate(teacher.model_type)))
    if choice is None or choice.is_cut or choice.kind == "directions":
        return
    text = unscored_layers_text(recipe.scores, features)
    if text:
        yield RecipeError(f"scores.layer: {text}")


def mapping_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """What a sliced student is taught is what it was cut from, or is matched with its units."""
    recipe, teacher = inputs.recipe, inputs.teacher
    features = recipe.objective.features
    if features is None or features.weight == 0 or recipe.student.start != "slice" or teacher is None:
        return
    if not FEATURE_LOSS_FACTS[features.loss].pairs_units:
        return
    rotated = is_rotated(recipe, can_rotate=family_can_rotate(teacher.model_type))
    if features.basis == "directions" and features.mapping != "matched" and not rotated:
        yield RecipeError(
            f"objective.features.basis: 'directions' is not what the student is cut by, as a {teacher.model_type} "
            "cannot be turned into the basis of its own directions. Use mapping: matched, or basis: units."
        )
        return
    choice = taught_choice(recipe, rotated=rotated)
    if choice is not None and choice.kind == "directions" and not choice.is_cut and choice.chosen_by == "activation":
        yield RecipeError(
            "objective.features.chosen_by: 'activation' ranks no directions. Use scores, variance, random or lowest, "
            "or basis: units."
        )
    check_mapping(features.mapping, rotated=rotated)


def check_mapping(mapping: str, *, rotated: bool) -> None:
    """Refuse a mapping by scores for a student that was cut out of its teacher: it would pair other units.

    Args:
        mapping: `index` and `matched` always fit.
        rotated: The student was cut along directions, not along units.

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
        f"objective.features.mapping: '{mapping}' would pair a sliced student's units with others than those "
        "they were cut from. Use mapping: matched, or index."
    )


def geometry_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A loss or choice of functional geometry has labels of one class each: it is not defined for others."""
    recipe, teacher = inputs.recipe, inputs.teacher
    if TASK_LOSS_FACTS[TASK_LOSS_OF[recipe.task.problem]].is_distribution:
        return
    reason = f"is only defined for one class of several, not for {recipe.task.problem}."
    features = recipe.objective.features
    with_geometry = [name for name, facts in FEATURE_LOSS_FACTS.items() if facts.needs_geometry]
    if features is not None and features.weight > 0 and features.loss in with_geometry:
        advice = f"Use a loss other than {' or '.join(with_geometry)}."
        yield UnsupportedModelError(f"objective.features.loss: '{features.loss}' {reason} {advice}")
    can_rotate = teacher is not None and family_can_rotate(teacher.model_type)
    rotated = is_rotated(recipe, can_rotate=can_rotate)
    cut, taught = cut_choice(recipe, rotated=rotated), taught_choice(recipe, rotated=rotated)
    for key, choice in (("student.chosen_by", cut), ("objective.features.chosen_by", taught)):
        if reads_geometry(choice) and (key == "student.chosen_by" or choice != cut):
            assert choice is not None
            yield UnsupportedModelError(
                f"{key}: '{choice.chosen_by}' of directions {reason} Use {key}: variance, or units "
                f"({key.partition('.chosen_by')[0]}.basis: {'coordinates' if choice is cut else 'units'})."
            )


def lens_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A loss that reads the states of blocks with the models' heads has two decoders whose last norm is known."""
    features = inputs.recipe.objective.features
    if features is None or features.weight == 0 or not FEATURE_LOSS_FACTS[features.loss].needs_heads:
        return
    for model in inputs.models.values():
        # A model without a row may be one that is not on this machine.
        if model.family is not None and not model.has_final_norm:
            yield UnsupportedModelError(
                f"{model.where}: '{features.loss}' reads the states of a block with the norm before the head, and this "
                f"{model.model_type} is no decoder where that is known. Use another loss, as cka."
            )


def head_start_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """A projector that begins between the heads has heads that are linear maps.

    Raises:
        UnsupportedModelError: As `check_head_start`.
    """
    features = inputs.recipe.objective.features
    if features is None or features.weight == 0 or features.projector is None or features.projector.start != "heads":
        return ()
    # transformers knows what a config.json leaves out; it is loaded only where that matters.
    from flexkd.models.loading.pretrained import load_config

    models = {where: model for where, model in inputs.models.items() if model.has_config}
    check_head_start(
        {where.partition(".")[0]: load_config(model.source, where=where) for where, model in models.items()}
    )
    return ()


def check_head_start(configs: Mapping[str, Any]) -> None:
    """Refuse a projector that begins with the map between two heads where a model bends its logits.

    Args:
        configs: Those of student and teacher as transformers loads them, by these names.

    Raises:
        UnsupportedModelError: One has a soft cap behind its head.
    """
    for who, config in configs.items():
        cap = logit_change(config).cap
        if cap is not None:
            raise UnsupportedModelError(
                f"objective.features.projector.start: 'heads' needs a head that is one linear map, and the {who}, a "
                f"{config.model_type}, caps its logits at {cap:g}. Use start: random, in a comparison the method "
                "'projector'; for a student that is cut also start: cut, the method 'projector_exact'."
            )


def batch_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """A forward pass has enough supervised positions for the feature loss; a classified row has one.

    Not where the head reads the mean of all tokens: every token is supervised then, and the run counts them.
    """
    recipe = inputs.recipe
    features, training = recipe.objective.features, recipe.training
    # An answer has several tokens, a classified row one position.
    if recipe.generation is not None or features is None or features.weight == 0 or features.positions != "supervised":
        return
    if _reads_all_tokens(inputs.models.get("student.model", inputs.models.get("teacher.model"))):
        return
    key = "batch_size" if training.per_device_batch_size is None else "per_device_batch_size"
    where, rows = f"training.{key}", training.per_device_batch_size or training.batch_size
    if inputs.data is not None and inputs.data.num_rows["train"] < rows:
        where, rows = "data.train", inputs.data.num_rows["train"]
    minimum = FEATURE_LOSS_FACTS[features.loss].minimum_positions
    if rows < minimum:
        yield RecipeError(
            f"{where}: {rows} rows of one pass have {rows} supervised positions, fewer than the {minimum} that "
            f"{features.loss} needs. Use more rows, or objective.features.positions: tokens."
        )


def _reads_all_tokens(model: ModelFiles | None) -> bool:
    """Whether the head of a classifier reads the mean of all tokens."""
    key = None if model is None or model.family is None else model.family.pooling_key
    return model is not None and key is not None and model.config.get(key) == "mean"


def _missing_layers(layers: Iterable[int], depth: int | None, where: str, who: str) -> Iterator[FlexKDError]:
    """The first layer that a model of known depth does not have; -1, the input of the head, is always there."""
    wrong = [layer for layer in layers if depth is not None and layer != -1 and not 1 <= layer <= depth]
    if wrong:
        yield ShapeError(
            f"{where}: the {who} has no layer {wrong[0]}. Layers are 1 to {depth}, the output of each block, or -1, "
            "the input of the head."
        )


def _student_depth(inputs: RecipeInputs) -> int | None:
    """Layers of the student; None where its shape is derived from a size."""
    section = inputs.recipe.student
    if section.size is not None or section.max_parameters is not None:
        return None
    model = inputs.teacher if section.start == "slice" else inputs.models.get("student.model")
    return section.num_layers or _depth(model)


def _depth(model: ModelFiles | None) -> int | None:
    """Layers of a model; None where its config is not known."""
    return None if model is None or model.family is None else model.size("num_layers")
