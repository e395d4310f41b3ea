"""Scores of units and directions, and pairs of what is taught, in one file with fingerprints of what made them."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexkd.core.scores import UnitScores
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair
from flexkd.errors import ArtifactError, RecipeError
from flexkd.facts.names import ALL_LAYERS
from flexkd.files import written_whole
from flexkd.fingerprints import check_fingerprints, earlier_selection
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.run_files import SELECTION_ADVICE, SELECTION_DIRECTIONS, SELECTION_HEADER, SELECTION_INPUTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DirectionScores:
    """One number for each direction of a rotation, by which those of the cut are chosen.

    Attributes:
        values: In the order of the directions.
        chosen_by: What they are, as `student.chosen_by` names it.
        basis_hash: Hash of the directions that they are of.
    """

    values: Float64[Tensor, " hidden"]
    chosen_by: str
    basis_hash: str

    @property
    def chooses_lowest(self) -> bool:
        """Whether the directions with the lowest scores are chosen."""
        return self.chosen_by == "lowest"


@dataclass(frozen=True)
class Selection:
    """The taught units, and the scores by which they were selected.

    Attributes:
        scores: One for each scored layer, in the order in which the recipe names them, and each attribution that ranks
            units: those of the cut first.
        start_units: Teacher units along which the student was cut; None if it was not cut along units.
        layers: Pairs of layers with their units; None until a student has been paired.
        cut_layer: The layer whose scores chose `start_units`; None: the one `nearest_to_head`.
        cut_directions: Hash of the directions along which the student was cut; empty if it was not, and until it has
            been paired.
        direction_scores: What chose `start_directions`; None if the student was not cut along directions.
        start_directions: Directions along which the student was cut, ascending; None if it was not cut along any, or
            by an earlier version, which took the first ones.
        geometry: G of the head's input that the basis of a mixed cut is made of; None for any other cut.
    """

    scores: tuple[UnitScores, ...]
    start_units: Tensor | None = None
    layers: tuple[LayerPair, ...] | None = None
    cut_layer: int | Literal["all"] | None = None
    cut_directions: str = ""
    direction_scores: DirectionScores | None = None
    start_directions: Tensor | None = None
    geometry: Float[Tensor, "hidden hidden"] | None = None

    def scores_of(self, layer: int | Literal["all"], attribution: str | None = None) -> UnitScores:
        """The scores of a teacher layer.

        Args:
            layer: As it is scored; scores of all layers are those of each.
            attribution: How they were measured; None: of the cut.

        Raises:
            RecipeError: The layer was not scored.
        """
        attribution = attribution or self.scores[0].attribution
        of_layer = [entry for entry in self.scores if entry.layer in (layer, ALL_LAYERS)]
        scores = next((entry for entry in of_layer if entry.attribution == attribution), None)
        if scores is None:
            layers = [entry.layer for entry in self.scores if entry.attribution == attribution]
            raise RecipeError(f"scores.layer: {layers} lacks teacher layer {layer}, whose scores are read. Add it.")
        return scores

    def cut_scores(self) -> UnitScores:
        """The scores that chose the units along which the student was cut."""
        return nearest_to_head(cut_entries(self.scores)) if self.cut_layer is None else self.scores_of(self.cut_layer)

    def hash(self) -> str:
        """Short hash of what the student is cut along and is taught; it leaves out the scores that chose it.

        It changes with the units or directions of the cut, the pairs of layers, and the units or directions of each
        pair. Scores have a hash of their own, `scores_hash`.
        """
        digest = hashlib.blake2b(self.cut_directions.encode(), digest_size=8)
        for name, tensor in sorted(_tensors(self).items()):
            if not name.startswith(("scores.", "direction_scores", "geometry")):
                digest.update(name.encode() + _bytes(tensor))
        return digest.hexdigest()


def cut_entries(scores: Sequence[UnitScores]) -> list[UnitScores]:
    """The scores of all layers that were measured as those of the cut, which come first."""
    return [entry for entry in scores if entry.attribution == scores[0].attribution]


def nearest_to_head(scores: Sequence[UnitScores]) -> UnitScores:
    """The scores that cut a student where several layers are scored: of the state that the head reads, else the last.

    The order in which a recipe names its layers decides nothing.
    """
    return max(scores, key=lambda entry: math.inf if entry.layer in (HEAD_INPUT, ALL_LAYERS) else entry.layer)


def scores_hash(scores: UnitScores) -> str:
    """Short hash of the scores of one layer: its number, what was scored and how, and every value."""
    settings = f"{scores.layer} {scores.target} {scores.attribution} "
    return hashlib.blake2b(settings.encode() + _bytes(scores.values), digest_size=8).hexdigest()


def directions_hash(directions: Float64[Tensor, "*shape"]) -> str:
    """Short hash of directions along which a student was cut, or of their scores."""
    return hashlib.blake2b(_bytes(directions), digest_size=8).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def pair_tensors(layers: Sequence[LayerPair]) -> dict[str, Tensor]:
    """Pairs of layers and their units, as named tensors."""
    tensors: dict[str, Tensor] = {}
    for index, pair in enumerate(layers):
        tensors[f"pairs.{index}.layers"] = torch.tensor([pair.student_layer, pair.teacher_layer])
        if pair.units is not None:
            tensors[f"pairs.{index}.student_units"] = pair.units.student
            tensors[f"pairs.{index}.teacher_units"] = pair.units.teacher
        if pair.teacher_basis is not None:
            tensors[f"pairs.{index}.teacher_basis"] = pair.teacher_basis
    return tensors


def _tensors(selection: Selection) -> dict[str, Tensor]:
    tensors = {f"scores.{index}": scores.values for index, scores in enumerate(selection.scores)}
    if selection.start_units is not None:
        tensors["start_units"] = selection.start_units
    if selection.start_directions is not None:
        tensors["start_directions"] = selection.start_directions
    if selection.direction_scores is not None:
        tensors["direction_scores"] = selection.direction_scores.values
    if selection.geometry is not None:
        tensors["geometry"] = selection.geometry
    return tensors | pair_tensors(selection.layers or ())


def save_selection(
    path: Path, selection: Selection, made_of: Mapping[str, str], inputs: Mapping[str, str] | None = None
) -> None:
    """Write the file whole or not at all.

    Args:
        path: Path of the file.
        selection: Content of the file.
        made_of: Fingerprints of what the selection depends on, by name.
        inputs: Settings that made the teacher, so that the file can be checked without loading a model.
    """
    header: dict[str, Any] = {
        "made_of": dict(made_of),
        SELECTION_INPUTS: dict(inputs or {}),
        "scores": [_without_values(scores) for scores in selection.scores],
        "pairs": None if selection.layers is None else len(selection.layers),
        "cut_layer": selection.cut_layer,
        "cut_directions": selection.cut_directions,
        SELECTION_DIRECTIONS: _directions_header(selection.direction_scores),
    }
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _tensors(selection).items()}
    with written_whole(path) as partial:
        save_file(tensors, partial, {SELECTION_HEADER: json.dumps(header)})


def _directions_header(scores: DirectionScores | None) -> dict[str, str] | None:
    return None if scores is None else {"chosen_by": scores.chosen_by, "basis_hash": scores.basis_hash}


def _without_values(scores: UnitScores) -> dict[str, Any]:
    return {name: value for name, value in asdict(scores).items() if name != "values"}


def load_selection(path: Path, made_of: Mapping[str, str]) -> Selection:
    """Read a stored selection that was made from the same teacher, tokenizer, data and settings.

    Raises:
        ArtifactError: The file is damaged, or depends on something else, or on another precision or attention of the
            teacher; names every difference, with the stored and the present value.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[SELECTION_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        stored: dict[str, str] = header["made_of"]
        selection = _selection(tensors, header)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). Delete it, to score again.") from error
    if SELECTION_DIRECTIONS not in header:
        stored = earlier_selection(stored, is_cut_along_directions=selection.start_units is None)
    differences = check_fingerprints(path, stored, made_of, SELECTION_ADVICE)
    if differences:
        text = "%s: %s; its scores are used as they are. Delete it, to score again."
        logger.warning(text, path, "; ".join(differences))
    if "cut_layer" not in header and selection.cut_layer is not None:
        _tell_old_cut(path, selection)
    return selection


def _tell_old_cut(path: Path, selection: Selection) -> None:
    """Warn where an earlier version, which cut by the layer named first, cut by another than this version would."""
    cut = selection.cut_scores()
    layer = nearest_to_head([scores for scores in selection.scores if len(scores.values) == len(cut.values)]).layer
    if layer != cut.layer:
        text = (
            "%s: an earlier version cut the student by layer %d, the first of scores.layer, and it stays so. Delete "
            "the file, to score again and cut by layer %d."
        )
        logger.warning(text, path, cut.layer, layer)


def _selection(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Selection:
    scores = tuple(UnitScores(values=tensors[f"scores.{i}"], **entry) for i, entry in enumerate(header["scores"]))
    pairs: int | None = header["pairs"]
    layers = None if pairs is None else tuple(_pair(tensors, f"pairs.{index}") for index in range(pairs))
    start_units = tensors.get("start_units")
    # An earlier version wrote no layer: it cut by the first.
    first = scores[0].layer if scores and start_units is not None else None
    directions = header.get(SELECTION_DIRECTIONS)
    return Selection(
        scores,
        start_units,
        layers,
        header.get("cut_layer", first),
        header.get("cut_directions", ""),
        None if directions is None else DirectionScores(tensors["direction_scores"], **directions),
        tensors.get("start_directions"),
        tensors.get("geometry"),
    )


def _pair(tensors: Mapping[str, Tensor], name: str) -> LayerPair:
    student_layer, teacher_layer = tensors[f"{name}.layers"].tolist()
    student, teacher = tensors.get(f"{name}.student_units"), tensors.get(f"{name}.teacher_units")
    units = UnitPairs(student, teacher) if student is not None and teacher is not None else None
    return LayerPair(student_layer, teacher_layer, units, tensors.get(f"{name}.teacher_basis"))
