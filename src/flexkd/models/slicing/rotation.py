"""A teacher rotated into the eigenbasis of its residual stream, where the first directions hold most of its energy."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.geometry import direction_scores, leading_directions
from flexkd.errors import DataError, UnsupportedModelError
from flexkd.facts.families.row import Family
from flexkd.models.forward.families import family_of
from flexkd.models.forward.hidden import HEAD_INPUT, model_inputs
from flexkd.models.forward.modes import eval_mode
from flexkd.models.slicing.calibration import Reduce, TokenMask, calibrate, means_over_tokens, stream_norms

Model = TypeVar("Model", bound=PreTrainedModel)

_ROWS_AT_ONCE: Final = 8192
_STREAM: Final = "the norms' outputs"
_EXACT: Final = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative error of the logits that rounding explains; one percent a block is rounding in 16 bits."""

_OUTLIER: Final = 6.0
"""Median distances from the median; 4 to 10 measured alike on SmolLM2."""

_ADVICE: Final = "Use basis 'coordinates'"


@dataclass(frozen=True)
class StreamBasis:
    """The directions of a teacher's residual stream that a rotated model has as its units.

    Attributes:
        basis: Directions as columns, from the one with most energy down; the largest entry of each is positive.
        energy: Share of the moment along each direction: of the stream's energy, unless the basis is of another moment.
        head_norm: The teacher's weight of the norm before the head.
        head_scale: The model's weight of that norm: 1, unless the head stays tied to the embeddings.
    """

    basis: Float64[Tensor, "hidden hidden"]
    energy: Float64[Tensor, " hidden"]
    head_norm: Float64[Tensor, " hidden"]
    head_scale: Float64[Tensor, " hidden"]

    def directions(self, layer: int, indices: Int64[Tensor, " k"]) -> Float[Tensor, "hidden k"]:
        """The map that turns a teacher's state at a layer into what units of the model are: `h @ directions`.

        The blocks' outputs are turned alone. The head's input has the norm's weight in it, which the model's head has
        in its own: it is divided out first. A unit whose weight is 0 carries nothing, here and there.
        """
        basis = self.basis[:, indices]
        if layer == HEAD_INPUT:
            inverse = torch.where(self.head_norm == 0, 0.0, 1 / self.head_norm)
            basis = inverse[:, None] * basis * self.head_scale[indices]
        return basis.float()

    def scores(self, geometry: Float64[Tensor, "hidden hidden"]) -> Float64[Tensor, " hidden"]:
        """`direction_scores` of the basis, whose variances are those of the norms' outputs.

        The geometry is the teacher's own, through its exact head, also where the model's head is tied and approximate.

        Args:
            geometry: G of the input of the teacher's head.
        """
        variances = len(self.energy) * self.energy
        return direction_scores(self.basis, variances, stream_geometry(geometry, self.head_norm))


@dataclass(frozen=True)
class Rotation(Generic[Model]):
    """A teacher in the basis of its residual stream's own directions.

    Attributes:
        model: Computes what the teacher computes, with every norm's weight 1. A plain model of the teacher's class, on
            its device; its unit j is the direction `stream.basis[:, j]`. `slice_student(model, units=directions)` cuts
            it.
        stream: Its units as directions of the teacher's stream.
    """

    model: Model
    stream: StreamBasis


def rotate_teacher(
    teacher: Model,
    batches: Iterable[Mapping[str, Any]],
    *,
    moment: Float64[Tensor, "hidden hidden"] | None = None,
    tied_head: bool = False,
) -> Rotation[Model]:
    """Turn the residual stream of a model with RMSNorms into a basis, without changing what the model computes.

    RMSNorm divides by the length of a state, which no rotation changes; its weight, which works unit by unit, is first
    multiplied into the matrices that read it. Then the embeddings' rows and all that writes to the stream are turned by
    the basis, and all that reads it back. Embeddings that were tied to the head are untied, since the head alone takes
    the last norm's weight; or they stay tied, and the head becomes an approximation.

    Args:
        batches: Calibration batches as in `slice_student`.
        moment: Whose eigenvectors the basis is; by default `stream_moment` of the batches.
        tied_head: Keep tied embeddings tied, at the price of an inexact head: along each direction it reads that
            multiple of the embeddings, put into the last norm's weight, which comes nearest to the teacher's head.
            Units whose weight in the teacher's last norm lies far from the others stay units of the basis.

    Raises:
        UnsupportedModelError: LayerNorm, a norm behind what writes to the stream, or a model that its family's row does
            not describe fully, which shows in its logits.

    Source:
        Ashkboos et al., SliceGPT, 2024, arXiv:2401.15024: the invariance, and the eigenvectors of the second moment.
    """
    family = family_of(teacher)
    batches = list(batches)
    row = _first_row(teacher, batches)
    reads = norms_by_reader(teacher, row)
    moment = calibrate(teacher, batches).stream_moment if moment is None else moment
    head_norm = _norm_weight(teacher, family, _last_norm(family))
    stays_tied = tied_head and is_tied(teacher)
    basis = leading_directions(_separate_outliers(moment, head_norm) if stays_tied else moment, len(moment))
    model = _rotated_model(teacher, family, basis, reads)
    _check_same_logits(teacher, model, row)
    head_scale = torch.ones(len(basis), dtype=torch.float64)
    if stays_tied:
        head_scale = _tie_head(model, family)
    energy = (basis * (moment @ basis)).sum(0)
    return Rotation(model, StreamBasis(basis, energy / energy.sum(), head_norm, head_scale))


def stream_geometry(
    geometry: Float64[Tensor, "hidden hidden"], head_norm: Float64[Tensor, " hidden"]
) -> Float64[Tensor, "hidden hidden"]:
    """G of the normalised stream x before the weight w of the last norm, `w_i G_ij w_j`: the head reads `w * x`."""
    return head_norm[:, None] * geometry * head_norm


def mixed_moment(
    teacher: PreTrainedModel,
    moment: Float64[Tensor, "hidden hidden"],
    geometry: Float64[Tensor, "hidden hidden"],
    *,
    function_share: float,
) -> Float64[Tensor, "hidden hidden"]:
    """Second moment of the stream plus `function_share` times its geometry, each divided by its trace.

    The leading eigenvectors hold what the stream carries and what the output depends on.

    Args:
        teacher: As in `rotate_teacher`.
        moment: `Calibration.stream_moment`.
        geometry: G of the input of the teacher's head.
        function_share: Weight of the geometry.
    """
    family = family_of(teacher)
    function = stream_geometry(geometry, _norm_weight(teacher, family, _last_norm(family)))
    return moment / moment.trace() + function_share * function / function.trace()


def mean_coordinates(
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    basis: Float64[Tensor, "hidden hidden"],
    *,
    precision: torch.dtype | None = None,
) -> Float64[Tensor, " hidden"]:
    """Mean size of the normalised stream's coordinate along each direction, over the tokens and norms of its moment."""
    family = family_of(teacher)

    def sizes(states: Tensor, _: Any) -> Tensor:
        normalised = nn.functional.normalize(states.float(), dim=1)
        return (normalised @ basis.to(normalised)).abs().sum(0, dtype=torch.float64).cpu()

    def observers(_: TokenMask) -> Iterator[tuple[str, nn.Module, Reduce]]:
        for module in stream_norms(teacher, family).values():
            yield _STREAM, module, sizes

    return means_over_tokens(teacher, batches, observers, precision=precision)[_STREAM]


def check_rotatable(teacher: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a teacher whose stream no rotation can turn, by its first row, before others are read.

    Raises:
        UnsupportedModelError: As `rotate_teacher`, but for what shows in its logits.
    """
    norms_by_reader(teacher, _first_row(teacher, batches))


def _check_norms(family: Family) -> None:
    if family.norm != "rms":
        raise UnsupportedModelError(
            f"slice_student.basis: 'rotated' needs norms that do not centre, and {family.model_type} has LayerNorm. "
            f"{_ADVICE}."
        )


def _last_norm(family: Family) -> str:
    return f"{family.body}.{family.last_state}"


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embeddings themselves."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _norm_weight(teacher: PreTrainedModel, family: Family, norm: str) -> Float64[Tensor, " hidden"]:
    """What a norm multiplies by."""
    return teacher.get_parameter(f"{norm}.weight").detach().double().cpu() + family.norm_offset


def _readers(teacher: PreTrainedModel, family: Family) -> dict[str, nn.Module]:
    """Matrices that take a state of the residual stream."""
    embeddings = teacher.get_input_embeddings()
    readers = {}
    for name, module in teacher.named_modules():
        axes = family.module_axes(name, teacher.config)
        if axes is not None and len(axes) == 2 and axes[1] == "residual" and module is not embeddings:
            readers[name] = module
    return readers


def _first_row(teacher: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    if not batches:
        raise DataError("slice_student.batches: there are none. Give a few hundred calibration rows.")
    inputs = model_inputs(teacher, batches[0])
    return {name: value[:1].to(teacher.device) for name, value in inputs.items()}


def norms_by_reader(teacher: PreTrainedModel, row: Mapping[str, Tensor]) -> dict[str, str]:
    """The norm that each reader of the stream reads, found in one forward: its input is the norm's output tensor.

    Raises:
        UnsupportedModelError: The stream of this family cannot be turned.
    """
    family = family_of(teacher)
    _check_norms(family)
    norms, readers = stream_norms(teacher, family), _readers(teacher, family)
    outputs: dict[int, tuple[str, Tensor]] = {}
    norm_of: dict[str, str] = {}

    def record_output(name: str) -> Any:
        # The tensor is held, so that its storage is not given to another one.
        return lambda _, __, output: outputs.__setitem__(output.untyped_storage()._cdata, (name, output))

    def record_norm(name: str) -> Any:
        return lambda _, args: norm_of.__setitem__(name, outputs.get(args[0].untyped_storage()._cdata, ("", None))[0])

    with ExitStack() as hooks:
        for name, module in norms.items():
            hooks.callback(module.register_forward_hook(record_output(name)).remove)
        for name, module in readers.items():
            hooks.callback(module.register_forward_pre_hook(record_norm(name)).remove)
        with eval_mode(teacher), torch.no_grad():
            teacher(**row)
    unmatched = [name for name in readers if not norm_of.get(name)] + [
        name for name in norms if name not in norm_of.values()
    ]
    if unmatched:
        raise UnsupportedModelError(
            f"slice_student.basis: in {family.model_type} no norm is right before a matrix that reads it at "
            f"'{unmatched[0]}', so that the norm's weight cannot be multiplied into the matrix and the residual stream "
            f"cannot be turned. {_ADVICE}."
        )
    return norm_of


def _rotated_model(
    teacher: Model, family: Family, basis: Float64[Tensor, "hidden hidden"], reads: Mapping[str, str]
) -> Model:
    config = copy.deepcopy(teacher.config)
    config.tie_word_embeddings = False
    # Initial weights are thrown away, so they must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = type(teacher)(config)
    source = dict(teacher.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        weight = source[name].detach().cpu()
        axes = family.parameter_axes(name, teacher.config)
        if axes == ("residual",) and module in reads.values():
            parameter.data = torch.full_like(weight, 1 - family.norm_offset)
            continue
        scale = _norm_weight(teacher, family, reads[module]) if module in reads and len(axes) == 2 else None
        parameter.data = _rotate(weight, axes.index("residual"), basis, scale) if "residual" in axes else weight.clone()
    if teacher.can_generate():
        model.generation_config = copy.deepcopy(teacher.generation_config)
    model.train(False)
    nn.Module.to(model, teacher.device)
    return model


def _rotate(
    weight: Tensor, axis: int, basis: Float64[Tensor, "hidden hidden"], scale: Float64[Tensor, " hidden"] | None
) -> Tensor:
    """The weight with its axis on the stream in the new basis, after the scale of the norm that it reads."""
    first = basis if scale is None else scale[:, None] * basis
    rows = weight.movedim(axis, -1).reshape(-1, len(basis))
    turned = torch.cat([(part.double() @ first).to(weight.dtype) for part in rows.split(_ROWS_AT_ONCE)])
    return turned.reshape(weight.movedim(axis, -1).shape).movedim(-1, axis).contiguous()


def _separate_outliers(
    moment: Float64[Tensor, "hidden hidden"], head_norm: Float64[Tensor, " hidden"]
) -> Float64[Tensor, "hidden hidden"]:
    """The moment without what outliers of the last norm's weight share with other units, so that they stay units.

    Embeddings behind one weight for all units are the head times a number, in every basis. With SmolLM2, whose weights
    are 1.8 +- 0.3 but -2 where the stream is largest, mixing all units makes a tied head wrong by 63 % of the logits'
    energy; with the 27 outliers apart it is 0.12 %, and half the width holds 0.2 % less of the stream's energy.
    """
    distance = (head_norm - head_norm.median()).abs()
    is_outlier = distance > _OUTLIER * distance.median()
    alone = torch.where(is_outlier, torch.arange(1, len(moment) + 1), 0)
    return moment * (alone[:, None] == alone)


def _tie_head(model: PreTrainedModel, family: Family) -> Float64[Tensor, " hidden"]:
    """Tie the head of a turned model to its embeddings; returns what the last norm then multiplies by.

    Direction j of the head, a column with one entry for each token, is projected on that of the embeddings, both less
    their mean over the tokens, which no softmax sees.
    """
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    columns = [weight.detach() - weight.detach().mean(0) for weight in (head.weight, embeddings.weight)]
    inner = [(column * columns[1]).sum(0, dtype=torch.float64).cpu() for column in columns]
    scale: Tensor = inner[0] / inner[1].clamp(min=torch.finfo(torch.float64).tiny)
    head.weight = embeddings.weight
    model.config.tie_word_embeddings = True
    norm: Any = model.get_parameter(f"{_last_norm(family)}.weight")
    norm.data = (scale - family.norm_offset).to(norm)
    return scale


def _check_same_logits(teacher: PreTrainedModel, model: PreTrainedModel, row: Mapping[str, Tensor]) -> None:
    with eval_mode(teacher), torch.no_grad():
        expected, logits = teacher(**row).logits.double(), model(**row).logits.double()
    gap = float((logits - expected).norm() / expected.norm())
    if not gap <= _EXACT.get(teacher.dtype, 0.1):
        raise UnsupportedModelError(
            f"slice_student.basis: this {teacher.config.model_type} computes other logits in another basis (relative "
            f"difference {gap:.2g}). {_ADVICE}."
        )
