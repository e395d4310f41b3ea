"""Two processes through several steps: the same rows, weights, projector, evaluation and one checkpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from flexkd.train.state import STATE_FILE
from flexkd.train.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.train.test_distillation_trainer import objective, rows, trainer_of

STEPS = 3


def trained(folder: Path, size: int, **changes: Any) -> tuple[DistillationTrainer, dict[str, float]]:
    """Three accumulated steps over rows grouped by length, half of them without a label, with a projector."""
    torch.manual_seed(0)
    settings = {
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": size,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "train_sampling_strategy": "group_by_length",
        **changes,
    }
    goal = objective(loss="projector", features=0.7, task=0.4, logits=0.3)
    trainer = trainer_of(folder, goal, rows(32, unlabelled=range(0, 32, 2)), arguments=settings)
    trainer.train()
    return trainer, trainer.evaluate()


def in_a_child(folder: str) -> None:
    trainer, evaluated = trained(Path(folder), 4, ddp_backend="gloo")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"logs": logs, "evaluated": evaluated, "parallel": trainer.args.parallel_mode.value}
    Path(folder, f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    # Gloo's threads abort a process that ends before them, and taking the group down hangs now and then.
    os._exit(0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_two(folder: str) -> list[dict[str, Any]]:
    """Started as torchrun starts them; what each has found."""
    children, port = [], str(free_port())
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.train.test_processes", folder]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        root = Path(__file__).parents[2]
        children.append(subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes))
    outputs = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), outputs[0][1][-3000:] + outputs[1][1][-3000:]
    return [json.loads(Path(folder, f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_X02_L06_several_steps_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    alone, evaluated = trained(tmp_path / "one", 8)
    found = run_two(str(tmp_path / "two"))
    assert [one["parallel"] for one in found] == ["distributed", "distributed"]
    expected = [entry for entry in alone.state.log_history if "loss" in entry]
    for one in found:
        for entry, other in zip(one["logs"], expected, strict=True):
            names = [name for name in other if name.endswith(("_raw", "_weighted"))]
            assert len(names) == 6
            for name in ["loss", "grad_norm", "feature_positions", *names]:
                assert_close(entry[name], other[name], dtype=torch.float32)
        for name in [name for name in evaluated if name.endswith(("loss", "_raw", "_weighted"))]:
            assert_close(one["evaluated"][name], evaluated[name], dtype=torch.float32)
    for name in ("model.safetensors", STATE_FILE):
        one, two = (load_file(tmp_path / run / f"checkpoint-{STEPS}" / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            # AdamW divides by the root of a square: where that is tiny, a rounding of the sum shows.
            assert_close(two[key], value, dtype=torch.float16)


if __name__ == "__main__":
    in_a_child(sys.argv[1])
