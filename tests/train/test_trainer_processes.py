"""Two gloo processes of the trainer: loss, gradient and every part equal those of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.closeness import assert_close
from tests.train.test_distillation_trainer import first_log, objective, rows, trainer_of
from tests.train.test_text_trainer import goal_of
from tests.train.test_text_trainer import trainer_of as text_trainer_of

SCRIPT = """
import json, sys
from pathlib import Path
from tests.train.test_distillation_trainer import first_log, objective, rows, trainer_of
features, others, folder = float(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
goal = objective(features=features, task=others, logits=others)
changes = {"per_device_train_batch_size": 8, "ddp_backend": "gloo"}
trainer = trainer_of(folder, goal, rows(unlabelled=range(8)), arguments=changes)
trainer.train()
if trainer.args.process_index == 0:
    print(json.dumps(first_log(trainer)))
"""


TEXT = """
import json, sys
from pathlib import Path
from tests.train.test_distillation_trainer import first_log
from tests.train.test_text_trainer import goal_of, trainer_of
changes = {"per_device_train_batch_size": 8, "ddp_backend": "gloo", "train_sampling_strategy": "sequential"}
trainer = trainer_of(Path(sys.argv[3]), "llama", goal_of(), 3, **changes)
trainer.train()
if trainer.args.process_index == 0:
    print(json.dumps(first_log(trainer)))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_two(folder: Path, features: float, others: float, script: str = SCRIPT) -> dict[str, float]:
    port = str(free_port())
    children = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", script, str(features), str(others), str(folder / str(rank))]
        root = Path(__file__).parents[2]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(command, cwd=root, env=environment, text=True, **pipes))
    outputs = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), outputs[0][1][-2000:] + outputs[1][1][-2000:]
    found: dict[str, float] = json.loads(outputs[0][0].strip().splitlines()[-1])
    return found


@pytest.mark.parametrize(("features", "others"), [(1.0, 1.0), (1.0, 0.0)])
def test_X01_X02_two_processes_step_like_one(tmp_path: Path, features: float, others: float) -> None:
    """Half of the rows have no label, and with features alone no term reads the head."""
    goal = objective(features=features, task=others, logits=others)
    alone = trainer_of(tmp_path / "one", goal, rows(unlabelled=range(8)))
    alone.train()
    expected, found = first_log(alone), run_two(tmp_path, features, others)
    parts = [name for name in expected if name.endswith(("_raw", "_weighted")) or name in ("loss", "grad_norm")]
    assert set(parts) <= set(found)
    for name in [*parts, "feature_positions"]:
        assert_close(found[name], expected[name], dtype=torch.float32)


def test_X02_chunks_of_logits_under_two_processes_step_like_whole_ones_in_one(tmp_path: Path) -> None:
    """Both processes hold answers of unequal lengths, and make their logits three predictions at a time."""
    alone = text_trainer_of(tmp_path / "one", "llama", goal_of(), "off", train_sampling_strategy="sequential")
    alone.train()
    expected, found = first_log(alone), run_two(tmp_path, 1.0, 1.0, TEXT)
    parts = [name for name in expected if name.endswith(("_raw", "_weighted")) or name in ("loss", "grad_norm")]
    assert len(parts) == 8
    for name in parts:
        assert_close(found[name], expected[name], dtype=torch.float32)
