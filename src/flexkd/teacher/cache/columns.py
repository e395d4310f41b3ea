"""Which columns and predictions a cache holds, whether they cover a request, and one request that covers several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flexkd.core.outputs import TopRule
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair
from flexkd.teacher.signal import SignalRequest

Place = tuple[int, Tensor | None]
"""Where the columns of a pair of layers are: index into `CachedColumns.columns`, and columns of it (None: all)."""


@dataclass(frozen=True)
class Columns:
    """Stored columns of the teacher's state at one layer.

    Attributes:
        layer: As in `LayerPair`.
        basis: Hash of the basis that the state is multiplied by; None: the columns are units.
        units: Which units or directions, ascending; None: all.
    """

    layer: int
    basis: str | None
    units: tuple[int, ...] | None

    def find(self, units: Int64[Tensor, " k"] | None) -> Int64[Tensor, " k"] | None:
        """Index of the column of each unit, -1 where it is not stored; None: all columns, in their order."""
        if self.units is None or units is None:
            # Only columns of all units contain all units.
            return units if self.units is None else torch.tensor([-1])
        stored_units = torch.tensor(self.units)
        indices = torch.searchsorted(stored_units, units).clamp(max=len(stored_units) - 1)
        return torch.where(stored_units[indices] == units, indices, -1)

    def describe(self) -> str:
        """The columns in a few words."""
        kind = "units" if self.basis is None else "directions"
        return f"layer {self.layer}: {'all' if self.units is None else len(self.units)} {kind}"


@dataclass(frozen=True)
class CachedColumns:
    """Which parts of a teacher's signals a cache stores.

    Attributes:
        logits: Whether predictions are stored.
        top: Which outputs of each prediction; None: all.
        positions: `tokens` or `supervised`, where the columns are read; None without columns.
        columns: One entry for each layer and basis.
    """

    logits: bool
    top: TopRule | None
    positions: str | None
    columns: tuple[Columns, ...]

    @classmethod
    def of(cls, request: SignalRequest) -> "CachedColumns":
        """What a cache stores for a request from `merged`."""
        columns = tuple(_columns_of(pair) for pair in request.layers)
        return cls(request.logits, request.top, request.positions if columns else None, columns)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "CachedColumns":
        """From the form that is stored as JSON."""
        top = None if plain["top"] is None else TopRule(**plain["top"])
        columns = [
            Columns(entry["layer"], entry["basis"], entry["units"] and tuple(entry["units"]))
            for entry in plain["columns"]
        ]
        return cls(bool(plain["logits"]), top, plain["positions"], tuple(columns))

    def describe(self) -> str:
        """What is stored, in a few words."""
        parts = [f"{columns.describe()} at {self.positions} positions" for columns in self.columns]
        return "; ".join([*([_rule(self.top)] if self.logits else []), *parts])

    def lacks(self, request: SignalRequest) -> list[str]:
        """What a request reads and the cache does not store, in words; empty where the cache covers it."""
        problems = []
        if request.logits and not self.logits:
            problems.append("predictions are not stored")
        elif request.logits and request.top != self.top:
            problems.append(f"{_rule(self.top)} are stored, {_rule(request.top)} are read")
        if request.layers and self.positions not in (None, request.positions):
            problems.append(f"{self.positions!r} positions are stored, {request.positions!r} are read")
        for pair in request.layers:
            index = self._index_of(pair)
            if index is None:
                problems.append(f"{_columns_of(pair).describe()} are read, and none of them is stored")
                continue
            columns = self.columns[index]
            indices = columns.find(_units(pair))
            if indices is not None and bool((indices < 0).any()):
                problems.append(f"{columns.describe()} are stored, {_columns_of(pair).describe()} are read")
        return problems

    def places(self, request: SignalRequest) -> tuple[Place, ...]:
        """Where each pair of layers finds its columns, for a request that the cache covers."""
        places = []
        for pair in request.layers:
            index = self._index_of(pair)
            assert index is not None, "the cache covers the request"
            places.append((index, self.columns[index].find(_units(pair))))
        return tuple(places)

    def _index_of(self, pair: LayerPair) -> int | None:
        state = _state_of(_columns_of(pair))
        return next((index for index, columns in enumerate(self.columns) if _state_of(columns) == state), None)


def merged(requests: Sequence[SignalRequest]) -> list[SignalRequest]:
    """The fewest requests that cover all of these, each answered by one pass of the teacher.

    Requests stay apart where they read different outputs of the predictions, or columns at different positions.
    """
    groups: list[SignalRequest] = []
    for request in requests:
        for index, group in enumerate(groups):
            if (union := _union(group, request)) is not None:
                groups[index] = union
                break
        else:
            # The union with itself has its units sorted, as a cache stores them.
            group_of_one = _union(request, request)
            assert group_of_one is not None, "a request fits itself"
            groups.append(group_of_one)
    return groups


def _union(first: SignalRequest, second: SignalRequest) -> SignalRequest | None:
    if first.logits and second.logits and first.top != second.top:
        return None
    if first.layers and second.layers and first.positions != second.positions:
        return None
    pairs: dict[tuple[int, str | None], LayerPair] = {}
    for pair in (*first.layers, *second.layers):
        state = _state_of(_columns_of(pair))
        units = _units(pair)
        if units is not None and state in pairs:
            earlier = _units(pairs[state])
            units = None if earlier is None else torch.cat([units, earlier])
        if units is not None:
            units = units.unique()
        unit_pairs = None if units is None else UnitPairs(torch.arange(len(units)), units)
        pairs[state] = LayerPair(teacher_layer=pair.teacher_layer, units=unit_pairs, teacher_basis=pair.teacher_basis)
    return SignalRequest(
        logits=first.logits or second.logits,
        layers=tuple(pairs.values()),
        positions=first.positions if first.layers else second.positions,
        top=first.top if first.logits else second.top,
    )


def _units(pair: LayerPair) -> Int64[Tensor, " k"] | None:
    return None if pair.units is None else pair.units.teacher.cpu()


def _columns_of(pair: LayerPair) -> Columns:
    units = _units(pair)
    basis = None if pair.teacher_basis is None else _basis_hash(pair.teacher_basis)
    return Columns(pair.teacher_layer, basis, None if units is None else tuple(units.tolist()))


def _state_of(columns: Columns) -> tuple[int, str | None]:
    """The layer, and the basis in which its state is read."""
    return columns.layer, columns.basis


def _basis_hash(basis: Tensor) -> str:
    values = basis.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{tuple(values.shape)} {values.dtype}".encode(), digest_size=12)
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _rule(top: TopRule | None) -> str:
    if top is None:
        return "all outputs"
    first = "" if top.shared_outputs is None else f" of the first {top.shared_outputs:,}"
    return f"the top {top.k} outputs at temperature {top.temperature:g}{first}"
