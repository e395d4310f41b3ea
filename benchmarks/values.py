"""Single figures: the share of the machine's speed that a training step reaches."""

import time

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import bf16_peak
from benchmarks.objectives import flexkd_kd
from benchmarks.setting import Setting
from benchmarks.sides import bare_step, our_step


def share_of_peak(setting: Setting, repeats: int) -> list[float]:
    """Matrix operations a second of a training step, relative to the peak that the machine reaches in matrix products.

    Operations are counted in the bare loop, which computes nothing twice; the time is that of flexkd's trainer.
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
