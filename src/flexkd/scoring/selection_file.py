"""Unit scores and pairs of taught units in one file, with the fingerprints of what they depend on."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexkd.core.scores import UnitScores
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair
from flexkd.errors import ArtifactError
from flexkd.files import written_whole
from flexkd.fingerprints import check_fingerprints
from flexkd.run_files import SELECTION_ADVICE, SELECTION_HEADER, SELECTION_INPUTS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The taught units, and the scores by which they were selected.

    Attributes:
        scores: One for each scored layer.
        start_units: Teacher units along which the student was cut; None if it was not cut along units.
        layers: Pairs of layers with their units; None until a student has been paired.
    """

    scores: tuple[UnitScores, ...]
    start_units: Tensor | None = None
    layers: tuple[LayerPair, ...] | None = None

    def scores_of(self, layer: int) -> UnitScores:
        """The scores of a teacher layer; those of the first layer where it was not scored."""
        return next((scores for scores in self.scores if scores.layer == layer), self.scores[0])

    def hash(self) -> str:
        """Short hash of the taught units, the same wherever the same units of the same layers are taught."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(_tensors(self).items()):
            if not name.startswith("scores."):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


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
    }
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in _tensors(selection).items()}
    with written_whole(path) as partial:
        save_file(tensors, partial, {SELECTION_HEADER: json.dumps(header)})


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
    differences = check_fingerprints(path, stored, made_of, SELECTION_ADVICE)
    if differences:
        text = "%s: %s; its scores are used as they are. Delete it, to score again."
        logger.warning(text, path, "; ".join(differences))
    return selection


def _selection(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Selection:
    scores = tuple(UnitScores(values=tensors[f"scores.{i}"], **entry) for i, entry in enumerate(header["scores"]))
    pairs: int | None = header["pairs"]
    layers = None if pairs is None else tuple(_pair(tensors, f"pairs.{index}") for index in range(pairs))
    return Selection(scores, tensors.get("start_units"), layers)


def _pair(tensors: Mapping[str, Tensor], name: str) -> LayerPair:
    student_layer, teacher_layer = tensors[f"{name}.layers"].tolist()
    student, teacher = tensors.get(f"{name}.student_units"), tensors.get(f"{name}.teacher_units")
    units = UnitPairs(student, teacher) if student is not None and teacher is not None else None
    return LayerPair(student_layer, teacher_layer, units, tensors.get(f"{name}.teacher_basis"))
