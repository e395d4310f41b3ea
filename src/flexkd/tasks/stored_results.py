"""Results of a teacher that take long to compute, kept beside the stored teachers under all that they depend on."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexkd.errors import ProcessError
from flexkd.files import written_whole
from flexkd.home import home_folder
from flexkd.processes import decided, is_first

logger = logging.getLogger(__name__)

Results = TypeVar("Results")

FORMAT: Final = "1"
"""Version of what is stored; results of another one are computed again."""


@dataclass(frozen=True)
class StoredResults:
    """Results as they lie on disk: plain values, and tensors."""

    values: Any
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def remembered(
    what: str,
    made_of: Mapping[str, str],
    compute: Callable[[], Results],
    *,
    pack: Callable[[Results], StoredResults],
    unpack: Callable[[StoredResults], Results],
) -> Results:
    """Results of an earlier run in `$FLEXKD_HOME/answers`, if they were made of the same; else computed and kept there.

    A file that is damaged, or is of something else than its name says, is ignored with a note and written anew; so is a
    folder that cannot be written to. Whoever deletes it loses nothing but time.

    Args:
        what: Names them in messages, as "teacher's answers to the test rows".
        made_of: Everything that the results depend on, by name.
        compute: Makes them.
        pack: Results to what is stored.
        unpack: The other way; a KeyError, TypeError or ValueError means that they do not fit.
    """
    # Of the first process: the others may compute in another way.
    made_of = decided(lambda: {**made_of, "format": FORMAT})
    path = home_folder("answers") / f"{_digest(json.dumps(made_of, sort_keys=True).encode())}.safetensors"
    stored = _stored(path, made_of, unpack) if is_first() else None
    if decided(lambda: stored is not None):
        stored = _stored(path, made_of, unpack) if stored is None else stored
        if stored is None:
            raise ProcessError(f"{path}: another process has read it, and this one cannot. Share $FLEXKD_HOME.")
        logger.info("%s: taken from %s", what, path)
        return stored
    results = compute()
    try:
        _write(path, made_of, pack(results))
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next run computes it again", path, error)
    return results


def _stored(path: Path, made_of: Mapping[str, str], unpack: Callable[[StoredResults], Results]) -> Results | None:
    """Results on disk; None, with a note, where they cannot be used."""
    if not path.is_file():
        return None
    try:
        return unpack(_read(path, made_of))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s: not used, it is damaged or of something else (%s); computed again", path, error)
        return None


def _read(path: Path, made_of: Mapping[str, str]) -> StoredResults:
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if json.loads(header["made_of"]) != made_of:
        raise ValueError("made of something else")
    if header["checksum"] != _checksum(header["values"], tensors):
        raise ValueError("its checksum is another one")
    return StoredResults(json.loads(header["values"]), tensors)


def _write(path: Path, made_of: Mapping[str, str], results: StoredResults) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in results.tensors.items()}
    values = json.dumps(results.values)
    header = {"made_of": json.dumps(made_of), "values": values, "checksum": _checksum(values, tensors)}
    with written_whole(path) as partial:
        save_file(tensors, partial, metadata=header)


def _checksum(values: str, tensors: Mapping[str, Tensor]) -> str:
    return _digest(values.encode(), *(_bytes(tensor) for _, tensor in sorted(tensors.items())))


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
