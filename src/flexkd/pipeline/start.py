"""Where a student begins: cut out of the teacher along units or directions, loaded, or made from a config."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.scores import UnitScores
from flexkd.core.selection import select_units
from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.table import size_keys, traits_of
from flexkd.facts.names import SIZE_NAMES
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.hidden import HEAD_INPUT, num_layers
from flexkd.models.loading.adapters import LoraSettings, add_lora, merge_lora
from flexkd.models.loading.language import take_special_tokens
from flexkd.models.loading.pretrained import load_config
from flexkd.models.loading.saving import make_savable
from flexkd.models.slicing.proportions import derive_shape, num_parameters
from flexkd.models.slicing.rotation import Rotation, StreamBasis, check_rotatable, mixed_moment, rotate_teacher
from flexkd.models.slicing.shape import shape_of
from flexkd.models.slicing.student import slice_student
from flexkd.models.slicing.vocabulary import renumber_ids
from flexkd.pipeline.job import Job
from flexkd.pipeline.scores import calibration_of, direction_scores, geometry_at
from flexkd.preflight.projection import stream_error
from flexkd.recipe import Recipe
from flexkd.recipe.taught_features import cut_choice, cut_chosen_by, may_rotate, reads_geometry
from flexkd.scoring.selection_file import DirectionScores, cut_entries, nearest_to_head
from flexkd.tasks.task import check_ids, pad_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """An untrained student.

    Attributes:
        new_parameters: Names of weights that are newly initialised, not taken from a checkpoint or the teacher.
        stream: The basis that a rotated student was cut in.
        directions: Directions of it that the student was cut along; its unit j starts as the j-th of them.
        lora: Settings of the low-rank updates that are trained; None: all weights are.
        seed: Seed of the low-rank updates.
    """

    student: PreTrainedModel
    new_parameters: tuple[str, ...]
    stream: StreamBasis | None = None
    directions: Tensor | None = None
    lora: LoraSettings | None = None
    seed: int = 0

    def learner(self) -> Any:
        """The model to train: the student, or the student with low-rank updates around its matrices."""
        return self.student if self.lora is None else add_lora(self.student, self.lora, seed=self.seed)

    def finished(self, learner: Any) -> PreTrainedModel:
        """The trained student, with low-rank updates merged into its weights."""
        return self.student if self.lora is None else merge_lora(learner)


def student_sizes(
    recipe: Recipe, teacher: PreTrainedModel, whole: PreTrainedModel | None = None, *, rotated: bool = False
) -> dict[str, int]:
    """The sizes of the recipe's student, by the argument names of `slice_student`.

    Args:
        teacher: What the student is cut from, with the tokens that the student knows.
        whole: The teacher with all of its tokens, of which `student.size` is a share; None: the same.
    """
    section = recipe.student
    limit = section.max_parameters
    if section.size is not None:
        limit = num_parameters((whole or teacher).config, section.size)
    if limit is not None:
        shape = derive_shape(teacher.config, max_parameters=limit, rotated=rotated)
        return {name: size for name, size in asdict(shape).items() if size is not None}
    return {name: getattr(section, name) for name in SIZE_NAMES if getattr(section, name) is not None}


def start_student(job: Job, recipe: Recipe, units: Tensor | None, directions: Tensor | None = None) -> Start:
    """Slice, load or create the student, in float32, on the CPU and in eval mode.

    Args:
        units: Teacher units that a student without a rotation is cut along.
        directions: Directions that one with a rotation is cut along; None: the first ones.
    """
    section = recipe.student
    fresh: Sequence[str] = ()
    stream = None
    if section.start == "slice":
        student, stream, directions = _slice(job, recipe, units, directions)
    elif section.start == "pretrained":
        assert section.model is not None, "checked by the recipe"
        student, fresh = job.task.loader.load(section.model, where="student.model", seed=recipe.training.seed)
    else:
        student, fresh = _from_config(job, recipe), ("all",)
    check_ids(student, job.splits, job.tokenizer, where="student.model")
    student = student.float()
    student.config.dtype = torch.float32
    job.task.loader.make_ready(student, job.teacher)
    student.config.pad_token_id = job.tokenizer.pad_token_id
    make_savable(student, where="student")
    prefer_short_rows_attention([student], recipe.data.max_length)
    if fresh:
        logger.info("student: newly initialised weights: %s", ", ".join(fresh))
    lora = None if section.lora is None else LoraSettings(**section.lora.model_dump())
    return Start(student.eval(), tuple(fresh), stream, directions, lora, recipe.training.seed)


def _from_config(job: Job, recipe: Recipe) -> PreTrainedModel:
    """A student with random weights, and the teacher's special tokens where it writes text."""
    section = recipe.student
    assert section.model is not None, "checked by the recipe"
    config = load_config(section.model, where="student.model")
    model_type = config.model_type
    vocabulary = job.teacher.config.get_text_config().vocab_size if job.writes_text else len(job.tokenizer)
    sizes = config_keys(model_type, student_sizes(recipe, job.teacher, job.reported.teacher)) | {
        "vocab_size": vocabulary
    }
    if traits_of(config.to_dict()).positions == "after_padding":
        # Its embeddings read the id when they are made, and a saved student's would read another one.
        sizes["pad_token_id"] = pad_id(job.tokenizer)
    student = job.task.loader.fresh(section.model, sizes, seed=recipe.training.seed)
    if job.writes_text:
        take_special_tokens(student, job.teacher)
    elif job.whole is not None:
        student.config.pad_token_id = None  # written with those of all students
        old_ids, new_ids = job.whole.tokenizer.get_vocab(), job.tokenizer.get_vocab()
        renumber_ids(student.config, {old_ids[token]: number for token, number in new_ids.items()}, len(old_ids))
    return student


def _slice(
    job: Job, recipe: Recipe, units: Tensor | None, directions: Tensor | None
) -> tuple[PreTrainedModel, StreamBasis | None, Tensor | None]:
    """A student cut from the teacher, along its units or along directions of a rotation, and these directions."""
    rotation = rotation_of(job, recipe)
    sizes: dict[str, Any] = student_sizes(recipe, job.teacher, job.reported.teacher, rotated=rotation is not None)
    if rotation is None:
        return slice_student(job.teacher, units=units, batches=job.calibration(recipe), **sizes), None, None
    stream = rotation.stream
    width = sizes.pop("hidden_size", len(stream.basis))
    # Earlier versions took the first ones and did not write them down.
    directions = torch.arange(width) if directions is None else directions
    share = 100 * float(stream.energy[directions].sum())
    logger.info("student: %d of %d directions hold %.1f%% of the teacher's states", width, len(stream.basis), share)
    # All that is measured is the same in both bases but for the shares of the directions, which the teacher's tell.
    means = calibration_of(job, recipe).along(stream.basis[:, directions])
    return slice_student(rotation.model, units=directions, means=means, **sizes), stream, directions


def rotation_of(job: Job, recipe: Recipe, *, is_scored: bool = False) -> Rotation[PreTrainedModel] | None:
    """The teacher in the basis that a slice is cut in; None where it is cut along units, or not sliced.

    Args:
        is_scored: Whether its directions will be scored, so that the pass which that takes may be shared.

    Raises:
        UnsupportedModelError: The recipe requires a rotation, and the teacher's family cannot be rotated.
    """
    if not may_rotate(recipe):
        return None
    section = recipe.student
    # A mixed basis does not exist without a rotation.
    is_required = section.basis == "rotated" or section.chosen_by == "mixed"
    is_mixed = cut_chosen_by(recipe, rotated=True) == "mixed"

    def compute() -> Rotation[PreTrainedModel] | None:
        try:
            return _rotation(job, recipe, is_scored=is_scored)
        except UnsupportedModelError as error:
            if is_required:
                raise
            logger.info("student: cut along units, as its teacher cannot be rotated. %s", error)
            return None

    mix = f" {section.function_share} {recipe.scores.rows}" if is_mixed else ""
    rotation = job.memo.rotation(f"{section.calibration_rows}{mix}", compute)
    if rotation is None and is_required:
        # An earlier run of the job went without a rotation; this one requires it, and raises the reason.
        return _rotation(job, recipe, is_scored=is_scored)
    return rotation


def _rotation(job: Job, recipe: Recipe, *, is_scored: bool) -> Rotation[PreTrainedModel]:
    """The teacher in the eigenbasis of its states on the calibration rows, or of these and their geometry added up."""
    section, batches = recipe.student, job.calibration(recipe)
    check_rotatable(job.teacher, batches)
    # In the teacher's own type: under autocast the moment would be 0.3 % off, and those of heads 1 to 2 %.
    is_mixed = cut_chosen_by(recipe, rotated=True) == "mixed"
    reads_head = reads_geometry(cut_choice(recipe, rotated=True))
    moment = calibration_of(job, recipe, geometry_follows=is_mixed or (is_scored and reads_head)).stream_moment
    if is_mixed:
        geometry = geometry_at(job, recipe, HEAD_INPUT)
        moment = mixed_moment(job.teacher, moment, geometry, function_share=section.function_share)
    # An untied head would cost a narrow student as many parameters as several blocks.
    return rotate_teacher(job.teacher, batches, moment=moment, tied_head=True)


def config_keys(model_type: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes under the keys of an architecture's config."""
    keys = size_keys(model_type)
    return {keys[name]: value for name, value in sizes.items() if value is not None}


def start_units(job: Job, recipe: Recipe, scores: Sequence[UnitScores]) -> Tensor | None:
    """The teacher units that a student is cut along; None where it is not sliced, or cut along directions.

    Raises:
        ShapeError: As `cut_scores`.
    """
    if recipe.student.start != "slice" or rotation_of(job, recipe) is not None:
        return None
    ranking = cut_scores(job, scores)
    width = student_sizes(recipe, job.teacher, job.reported.teacher).get("hidden_size", len(ranking.values))
    return select_units(ranking, width, lowest=recipe.student.chosen_by == "lowest")


def start_directions(job: Job, recipe: Recipe) -> tuple[DirectionScores | None, Tensor | None]:
    """What ranks the directions of the teacher, and those that a student is cut along; None where it is not."""
    rotation = rotation_of(job, recipe)
    if rotation is None:
        return None, None
    scores = direction_scores(job, recipe, rotation.stream)
    width = student_sizes(recipe, job.teacher, job.reported.teacher, rotated=True).get(
        "hidden_size", len(scores.values)
    )
    return scores, select_units(scores.values, width, lowest=scores.chooses_lowest)


def cut_scores(job: Job, scores: Sequence[UnitScores]) -> UnitScores:
    """The scores that a student is cut by: of the scored states of the residual stream, the one nearest to the head.

    Args:
        scores: Those that were measured for the cut come first.

    Raises:
        ShapeError: The scores are all of states of another width than the residual stream.
    """
    assert scores, "a cut along units reads their scores"
    stream = shape_of(job.teacher.config).hidden_size
    of_stream = [entry for entry in cut_entries(scores) if len(entry.values) == stream]
    if not of_stream:
        first = scores[0]
        model_type, depth = job.teacher.config.model_type, num_layers(job.teacher)
        raise stream_error(model_type, first.layer, len(first.values), stream=stream, num_layers=depth)
    return nearest_to_head(of_stream)
