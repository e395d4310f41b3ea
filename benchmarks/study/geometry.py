"""How much of a teacher's functional form G a cut of some width keeps, by what the cut is chosen by."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float64
from torch import Tensor

from flexkd.core.geometry import leading_directions
from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.hidden import model_inputs
from flexkd.models.slicing.rotation import StreamBasis, rotate_teacher
from flexkd.pipeline.job import Job
from flexkd.scoring.geometry import functional_geometry

_ROWS: Final = 512
"""Training rows that G and the directions are estimated from."""


def shares_of_geometry(job: Job, widths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Shares of the trace of G for each width; empty where the teacher classifies or cannot be rotated."""
    if not job.writes_text:
        return {}
    batches = [
        {**model_inputs(job.teacher, batch, as_teacher=True), "labels": batch["labels"]}
        for batch in job.batches("train", num_rows=_ROWS)
    ]
    try:
        stream = rotate_teacher(job.teacher, batches, tied_head=True).stream
    except UnsupportedModelError:
        return {}
    geometry = functional_geometry(job.teacher, batches)
    return {str(width): dict(_shares(geometry, stream, width)) for width in widths}


def _shares(geometry: Float64[Tensor, "hidden hidden"], stream: StreamBasis, width: int) -> Mapping[str, float]:
    """Shares of G, of the stream before the last norm's weight, that each choice of that many columns keeps."""
    weight = stream.head_norm
    of_stream = weight[:, None] * geometry * weight
    along = (stream.basis * (of_stream @ stream.basis)).sum(0)
    by_function = (stream.energy * along).argsort(descending=True)
    leading = leading_directions(of_stream, width)
    parts = {
        "PCA directions by variance": along[:width].sum(),
        "PCA directions by function": along[by_function[:width]].sum(),
        "best units": of_stream.diagonal().sort(descending=True).values[:width].sum(),
        "best directions": torch.trace(leading.T @ of_stream @ leading),
    }
    return {name: round(float(part / of_stream.trace()), 4) for name, part in parts.items()}
