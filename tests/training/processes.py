"""Processes of their own: a server imports everything once, and each is a fork of it; some meet, as under torchrun."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

PRELOADED: Final = [
    "flexkd.training.trainer",
    "tests.training.test_text_trainer",
    "accelerate.utils",
    "torch.distributed",
    "flexkd.pipeline.compare",
]
"""Of every test that starts processes: the server that is there serves the next one too."""

Work = Callable[[Path, int, int], None]
"""Of one process: a folder, how many processes there are, and which one it is."""


def run_together(work: Work, folder: Path, *worlds: int) -> None:
    """Run groups of processes that meet by gloo, all at the same time, to their end."""
    ports = {world: str(free_port()) for world in worlds}
    children = [
        start_process(_child, work, folder, world, rank, ports[world]) for world in worlds for rank in range(world)
    ]
    for child in children:
        child.join(timeout=120)
    for child in children:
        child.kill()
    assert [child.exitcode for child in children] == [0] * len(children)


def start_process(work: Callable[..., None], *arguments: Any) -> Any:
    """Start a process that calls a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def _child(work: Work, folder: Path, world: int, rank: int, port: str) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    work(folder, world, rank)
    torch.distributed.barrier()
    # Gloo's threads abort a process that ends before them, and taking the group down hangs now and then.
    os._exit(0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
