"""What a cache holds of a teacher's answers, whether that is what a request reads, and what serves several requests."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flexkd.core.outputs import TopRule
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair
from flexkd.teacher.signal import SignalRequest

Place = tuple[int, Tensor | None]
"""Which of the held columns a pair of layers reads, and which of these; None: all of them in their order."""


@dataclass(frozen=True)
class Columns:
    """Columns of one state of the teacher.

    Attributes:
        layer: As in `LayerPair`.
        basis: Hash of the basis that the state is turned into; None: its own coordinates.
        units: Ascending; None: all.
    """

    layer: int
    basis: str | None
    units: tuple[int, ...] | None

    def find(self, units: Int64[Tensor, " k"] | None) -> Int64[Tensor, " k"] | None:
        """Where these units stand, -1 for one that is not held; None: all are read as they stand."""
        if self.units is None or units is None:
            # All units are only held by all.
            return units if self.units is None else torch.tensor([-1])
        held = torch.tensor(self.units)
        at = torch.searchsorted(held, units).clamp(max=len(held) - 1)
        return torch.where(held[at] == units, at, -1)

    def describe(self) -> str:
        """What is held, in a few words."""
        kind = "units" if self.basis is None else "directions"
        return f"layer {self.layer}: {'all' if self.units is None else len(self.units)} {kind}"


@dataclass(frozen=True)
class CachedColumns:
    """Which parts of a teacher's signals are held.

    Attributes:
        logits: Whether predictions are.
        top: Which part of them; None: all.
        positions: Of the columns; None where there are none.
        columns: Of its states, one entry for each layer and basis.
    """

    logits: bool
    top: TopRule | None
    positions: str | None
    columns: tuple[Columns, ...]

    @classmethod
    def of(cls, request: SignalRequest) -> "CachedColumns":
        """What the answers to a request hold, which `merged` made."""
        columns = tuple(_columns(pair) for pair in request.layers)
        return cls(request.logits, request.top, request.positions if columns else None, columns)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "CachedColumns":
        """From what `plain` wrote."""
        top = None if plain["top"] is None else TopRule(**plain["top"])
        columns = [Columns(c["layer"], c["basis"], c["units"] and tuple(c["units"])) for c in plain["columns"]]
        return cls(bool(plain["logits"]), top, plain["positions"], tuple(columns))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def describe(self) -> str:
        """What is held, in a few words."""
        parts = [f"{one.describe()} at {self.positions} positions" for one in self.columns]
        return "; ".join([*([_rule(self.top)] if self.logits else []), *parts])

    def lacks(self, request: SignalRequest) -> list[str]:
        """What a request reads and is not held, each with both values."""
        found = []
        if request.logits and not self.logits:
            found.append("predictions are not stored")
        elif request.logits and request.top != self.top:
            found.append(f"{_rule(self.top)} are stored, {_rule(request.top)} are read")
        if request.layers and self.positions not in (None, request.positions):
            found.append(f"{self.positions!r} positions are stored, {request.positions!r} are read")
        for pair in request.layers:
            held = self._held(pair)
            if held is None:
                found.append(f"{_columns(pair).describe()} are read, and none of them is stored")
                continue
            at = self.columns[held].find(_units(pair))
            missing = 0 if at is None else int((at < 0).sum())
            if missing:
                found.append(f"{self.columns[held].describe()} are stored, {_columns(pair).describe()} are read")
        return found

    def places(self, request: SignalRequest) -> tuple[Place, ...]:
        """Where each pair of layers of a request that nothing is lacked of finds its columns."""
        found = []
        for pair in request.layers:
            held = self._held(pair)
            assert held is not None, "lacks nothing"
            found.append((held, self.columns[held].find(_units(pair))))
        return tuple(found)

    def _held(self, pair: LayerPair) -> int | None:
        wanted = _columns(pair)
        same = (i for i, one in enumerate(self.columns) if (one.layer, one.basis) == (wanted.layer, wanted.basis))
        return next(same, None)


def merged(requests: Sequence[SignalRequest]) -> list[SignalRequest]:
    """The fewest requests whose answers serve all: one pass of the teacher each, unless rules or positions differ."""
    groups: list[SignalRequest] = []
    for request in requests:
        for index, group in enumerate(groups):
            if (both := _union(group, request)) is not None:
                groups[index] = both
                break
        else:
            alone = _union(request, request)
            assert alone is not None, "a request fits itself"
            groups.append(alone)
    return groups


def _union(first: SignalRequest, second: SignalRequest) -> SignalRequest | None:
    if first.logits and second.logits and first.top != second.top:
        return None
    if first.layers and second.layers and first.positions != second.positions:
        return None
    pairs: dict[tuple[int, str | None], LayerPair] = {}
    for pair in (*first.layers, *second.layers):
        columns = _columns(pair)
        key = (columns.layer, columns.basis)
        known = pairs.get(key)
        units = [_units(one) for one in (pair, known) if one is not None]
        both = None if any(one is None for one in units) else torch.cat([one for one in units if one is not None])
        taken = None if both is None else both.unique()
        ours = None if taken is None else UnitPairs(torch.arange(len(taken)), taken)
        pairs[key] = LayerPair(teacher_layer=pair.teacher_layer, units=ours, teacher_basis=pair.teacher_basis)
    return SignalRequest(
        logits=first.logits or second.logits,
        layers=tuple(pairs.values()),
        positions=first.positions if first.layers else second.positions,
        top=first.top if first.logits else second.top,
    )


def _units(pair: LayerPair) -> Int64[Tensor, " k"] | None:
    return None if pair.units is None else pair.units.teacher.cpu()


def _columns(pair: LayerPair) -> Columns:
    units, basis = _units(pair), None
    if pair.teacher_basis is not None:
        content = pair.teacher_basis.detach().cpu().contiguous()
        basis = hashlib.blake2b(f"{tuple(content.shape)} {content.dtype}".encode(), digest_size=12)
        basis.update(content.numpy().tobytes())
    return Columns(
        pair.teacher_layer,
        None if basis is None else basis.hexdigest(),
        None if units is None else tuple(units.tolist()),
    )


def _rule(top: TopRule | None) -> str:
    if top is None:
        return "all outputs"
    first = "" if top.shared_outputs is None else f" of the first {top.shared_outputs:,}"
    return f"the top {top.k} outputs at temperature {top.temperature:g}{first}"
