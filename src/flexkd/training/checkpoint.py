"""What a checkpoint holds besides the student: taught units, projectors and the fingerprints of the run."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexkd.core.objective import Objective
from flexkd.errors import ArtifactError, DiskError
from flexkd.files import writing, written_whole
from flexkd.run_files import STATE_FILE as STATE_FILE
from flexkd.run_files import check_checkpoint, checkpoint_error
from flexkd.run_files import last_checkpoint as last_checkpoint
from flexkd.scoring.selection_file import pair_tensors

logger = logging.getLogger(__name__)

_MODULES: Final = "modules."


def _taught(objective: Objective) -> dict[str, Tensor]:
    return pair_tensors(objective.features.layers if objective.features is not None else ())


@contextmanager
def new_checkpoint(folder: Path) -> Iterator[None]:
    """Write a checkpoint within it, as the process that writes; `save_state` comes last.

    Raises:
        DiskError: The disk did not take it; what is there of it is removed, as no run goes on from half a checkpoint.
    """
    # The state marks a whole checkpoint: one of an older run must not mark a half-written one.
    (folder / STATE_FILE).unlink(missing_ok=True)
    try:
        with writing(folder):
            yield
    except DiskError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def save_state(folder: Path, objective: Objective, fingerprints: Mapping[str, str]) -> None:
    """Write the state beside a checkpoint."""
    modules = {f"{_MODULES}{name}": value.contiguous() for name, value in objective.modules.state_dict().items()}
    tensors = {name: value.cpu().contiguous().clone() for name, value in (_taught(objective) | modules).items()}
    # Written last, and whole or not at all: where this file exists, the checkpoint is complete.
    with written_whole(folder / STATE_FILE) as partial:
        save_file(tensors, partial, {**fingerprints, "formula": objective.formula()})


def check_state(folder: Path, objective: Objective, fingerprints: Mapping[str, str]) -> None:
    """Refuse a checkpoint of other units, another objective or another teacher; load the projectors of this one.

    Raises:
        ArtifactError: The state is missing, damaged or another's; names the differences, old and new.
    """
    path = folder / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}). Start in an empty output folder.") from error
    formula = metadata.pop("formula", None)
    changes = check_checkpoint(path, metadata, fingerprints)
    # A key of the recipe says more than the formula, which follows from it.
    if formula != objective.formula():
        raise checkpoint_error(path, [f"formula was '{formula}' and is '{objective.formula()}' now"])
    if changes:
        logger.warning("%s: %s; the run continues from it.", path, "; ".join(changes))
    taught = _taught(objective)
    for name in sorted(taught.keys() | {key for key in stored if not key.startswith(_MODULES)}):
        if name not in stored or name not in taught or not torch.equal(stored[name], taught[name].cpu()):
            raise ArtifactError(f"{path}: '{name}' differs from this run's. Start in an empty output folder.")
    modules = {key.removeprefix(_MODULES): value for key, value in stored.items() if key.startswith(_MODULES)}
    objective.modules.load_state_dict(modules)
