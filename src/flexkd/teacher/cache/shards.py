"""One file of a cache: the answers to some rows, written whole or not at all, and read a row at a time."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexkd.errors import ArtifactError, DiskError
from flexkd.files import written_whole

INDEX: Final = ("ids", "hashes", "positions", "predictions")
"""Tensors with one entry for each row: its id and hash, and its number of positions and predictions."""

INDEX_BYTES: Final = 8 * len(INDEX)
"""Bytes that the index adds for each row."""


def axis_of(name: str) -> str:
    """What the first axis of a stored tensor counts: `rows`, `positions`, `predictions` or `groups` of rows."""
    if name in INDEX:
        return "rows"
    stem = name.partition(".")[0]
    return {"columns": "positions", "scale": "groups", "offset": "groups"}.get(stem, "predictions")


def write_shard(path: Path, tensors: Mapping[str, Tensor], *, bytes_left: int) -> tuple[int, str]:
    """Write a file whole or not at all.

    Args:
        path: Path of the file.
        tensors: By name, those of `INDEX` among them.
        bytes_left: Bytes that the whole cache still needs, for the message.

    Returns:
        Size of the file in bytes, and its checksum.

    Raises:
        ArtifactError: The file cannot be written, for example because the disk is full.
    """
    try:
        with written_whole(path, by_each=True) as unfinished:
            save_file(dict(tensors), unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            size, checksum = unfinished.stat().st_size, checksum_of(unfinished)
    except (OSError, SafetensorError) as error:
        reason = error.__cause__ if isinstance(error, DiskError) else error
        free = shutil.disk_usage(path.parent).free
        raise ArtifactError(
            f"{path}: cannot be written ({reason}). The cache needs {bytes_left:,} bytes more, {free:,} are free. Free "
            "some, or name another folder (teacher.cache), and run it again: it continues from here."
        ) from error
    return size, checksum


def checksum_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Shard:
    """A memory-mapped file, of which only the rows that are read are loaded.

    Args:
        path: Path of the file.
        group: Rows that share the scales of int8 columns.

    Raises:
        ArtifactError: The file cannot be read, or a tensor does not have the length that the index states.
    """

    def __init__(self, path: Path, group: int) -> None:
        self._group = group
        try:
            file: Any = safe_open(path, framework="pt")
            index = {name: file.get_tensor(name) for name in INDEX}
            self._slices = {name: file.get_slice(name) for name in file.keys() if name not in INDEX}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error}). Delete it, and build the cache again.") from error
        self.ids: Int64[Tensor, " rows"] = index["ids"]
        self.hashes: Int64[Tensor, " rows"] = index["hashes"]
        self.counts: dict[str, Int64[Tensor, " rows"]] = {axis: index[axis] for axis in ("positions", "predictions")}
        self._ends = {axis: counts.cumsum(0).tolist() for axis, counts in self.counts.items()}
        for name, stored in self._slices.items():
            axis = axis_of(name)
            length = -(-len(self.ids) // group) if axis == "groups" else int(self.counts[axis].sum())
            if stored.get_shape()[0] != length:
                raise ArtifactError(
                    f"{path}: {name} has {stored.get_shape()[0]} {axis}, its rows have {length}. Delete the file, and "
                    "build the cache again."
                )

    def row(self, row: int) -> partial[Tensor]:
        """A function that reads one row's part of a tensor, by the tensor's name."""
        return partial(self._part, row)

    def _part(self, row: int, name: str) -> Tensor:
        axis = axis_of(name)
        if axis == "groups":
            start, stop = row // self._group, row // self._group + 1
        else:
            start, stop = (self._ends[axis][row - 1] if row else 0), self._ends[axis][row]
        part: Tensor = self._slices[name][start:stop]
        return part

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors besides the index."""
        return frozenset(self._slices)


def empty_shard(parts: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of a whole shard to be filled batch by batch, so that it is in memory only once.

    Args:
        parts: Tensors of the first batch.
        counts: Length of each axis in the whole shard.
    """
    return {
        name: torch.empty((counts[axis_of(name)], *part.shape[1:]), dtype=part.dtype) for name, part in parts.items()
    }
