"""Devices that a run may be planned for: their speed and their memory."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from flexkd.core.tensors import Number
from flexkd.errors import RecipeError, unknown_name
from flexkd.models.forward.autocast import autocast_dtype, resolve_precision

HERE: Final = "here"

_SIDE: Final = 2048
_SECONDS: Final = 1.0


RESERVE: Final = 0.1
"""Share of a device's memory that a run has to leave to the driver, other processes and fragmentation."""


@dataclass(frozen=True)
class Device:
    """Speed and memory of a device.

    Attributes:
        name: A name in `DEVICES`, or a description of this machine.
        flops: Operations a second in a large multiplication of dense matrices, by precision.
        memory: Bytes; for a CPU, the memory of the machine.
        utilisation: Share of `flops` that a training step reaches.
        is_cpu: Whether teacher, student and everything else share the machine's memory.
        source: Where the figures come from.
    """

    name: str
    flops: Mapping[str, Number]
    memory: int
    utilisation: float
    is_cpu: bool
    source: str

    def resolved(self, precision: str) -> str:
        """The precision that `auto` stands for on this device."""
        if precision != "auto":
            return precision
        return "bfloat16" if self.name in DEVICES else resolve_precision(precision)

    def seconds(self, flops: Number, precision: str) -> float:
        """Time that these operations take."""
        return flops / (self.flops[precision] * self.utilisation)


def _gpu(name: str, half: Number, full: Number, gigabytes: int) -> Device:
    rates = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": full * 1e12}
    return Device(name, rates, gigabytes * 10**9, 0.35, False, "data sheet, dense")


DEVICES: Final = {
    device.name: device
    for device in (
        _gpu("a100", 312, 19.5, 80),
        _gpu("h100", 989, 67, 80),
        _gpu("h200", 989, 67, 141),
        _gpu("l4", 121, 30.3, 24),
        _gpu("rtx4090", 165, 82.6, 24),
    )
}
"""By name: teraflops in 16 and in 32 bits without sparsity, and gigabytes, as NVIDIA's data sheets have them (SXM where
there are several)."""


def check_device(name: str) -> None:
    """Refuse a device that is not known, before anything is read.

    Raises:
        RecipeError: There is no such device.
    """
    if name not in (HERE, *DEVICES):
        raise RecipeError(unknown_name("--device", "device", name, [HERE, *DEVICES]))


def device_named(name: str, precisions: tuple[str, ...]) -> Device:
    """A device of the table, or this machine.

    Args:
        name: One of `DEVICES`, or `here`.
        precisions: Precisions in which this machine is timed, as recipes name them.
    """
    return _measured(precisions) if name == HERE else DEVICES[name]


def _measured(precisions: tuple[str, ...]) -> Device:
    is_cpu = not torch.cuda.is_available()
    resolved = dict.fromkeys(map(resolve_precision, precisions))
    rates = {precision: _rate(precision, "cpu" if is_cpu else "cuda") for precision in resolved}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not is_cpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    threads = torch.get_num_threads()
    kind = f"{threads} CPU thread{'s' * (threads != 1)}" if is_cpu else torch.cuda.get_device_name(0)
    source = f"multiplications of {_SIDE} x {_SIDE} matrices, timed for {_SECONDS:g} s"
    return Device(f"this machine ({kind})", rates, memory, 0.5, is_cpu, source)


def _rate(precision: str, kind: str) -> float:
    matrix = torch.randn(_SIDE, _SIDE, device=kind, dtype=autocast_dtype(precision) or torch.float32)
    _ = (matrix @ matrix)[0, 0].item()
    began, products = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < _SECONDS:
        # Reading a number waits for an asynchronous device.
        _ = (matrix @ matrix)[0, 0].item()
        products += 1
    return 2 * _SIDE**3 * products / seconds
