"""Figures that need no other side: how much of the machine a training step uses."""

import time

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import bf16_peak
from benchmarks.objectives import flexkd_kd
from benchmarks.setting import Setting
from benchmarks.sides import bare_step, our_step


def share_of_peak(setting: Setting, repeats: int) -> list[float]:
    """Operations of matrix products in a step, by its time, over what the machine does in products alone.

    The operations are counted in the bare loop, which does nothing twice; the time is that of our trainer.
    """
    with bare_step(setting, flexkd_kd) as work, FlopCounterMode(display=False) as counter:
        work()
    operations = counter.get_total_flops()
    shares = []
    with our_step(setting, flexkd_kd) as step:
        step()
        step()
        for _ in range(repeats):
            peak = bf16_peak()
            start = time.perf_counter()
            step()
            shares.append(operations / (time.perf_counter() - start) / peak)
    return shares
