"""FSDP2: two processes that each hold half of a student train what one process trains, and leave a whole model."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from flexkd import processes
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import ProcessError, RecipeError
from flexkd.teacher.live import LiveTeacher
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, ValidationMetrics, train
from flexkd.training.sharding import use_fsdp
from flexkd.training.supported import check_sharded_model, check_supported
from tests.closeness import assert_close
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.processes import run_together
from tests.training.test_distillation_trainer import arguments, objective, student_model, teacher_model

STEPS: Final = 4
CASES: Final[dict[str, dict[str, Any]]] = {
    # Blocks are gathered for the forward, freed, and gathered again for the states' gradients.
    "whole logits": {"layers": ((1, 2), (2, 4)), "at_once": 4},
    # The loss is made in the hook of a head that shares its weight with the embeddings, and its states are a hook's.
    "chunks": {"layers": ((1, 2), (-1, -1)), "tied": True, "chunk": 3, "checkpointing": True},
}


class Divided(TrainerCallback):
    """What a training saw of its weights after each step."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_step_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        weights = list(model.parameters())
        local = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
        self.shares.append(local / sum(weight.numel() for weight in weights))


def student_of(tied: bool) -> PreTrainedModel:
    return tiny_model("llama", "causal", seed=2, hidden_size=16, num_hidden_layers=2, tie_word_embeddings=tied)


def trained(
    folder: Path,
    world: int,
    *,
    layers: tuple[tuple[int, int], ...],
    tied: bool = False,
    chunk: int | str = "off",
    at_once: int | None = None,
    checkpointing: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student that has learned from a live teacher, and what was seen of its training."""
    student = student_of(tied)
    units = torch.arange(0, 32, 2)
    pairs = tuple(LayerPair.of_units(units, student_layer=one, teacher_layer=other) for one, other in layers)
    goal = Objective(
        TaskTerm(weight=0.5), LogitTerm(weight=0.7, temperature=2.0), FeatureTerm("mse", 1.0, "tokens", pairs)
    )
    rows = [{**row, "length": len(row["input_ids"])} for row in answer_rows()]
    settings = RunSettings(
        epochs=1, batch_size=16, learning_rate=1e-2, weight_decay=0.01, schedule="linear", warmup_ratio=0.0, seed=0,
        evaluations=2, metric="loss", precision="float32", max_steps=STEPS, per_device_batch_size=at_once,
        logging_steps=1, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    plan = TrainingPlan(
        student, goal, rows, rows[:7], collator_of(student), ValidationMetrics("loss"), "student", logit_chunk=chunk
    )
    args, divided = training_arguments(folder, settings, num_rows=len(rows), num_processes=world), Divided()
    teacher = LiveTeacher(tiny_model("llama", "causal", seed=1))
    trainer = train(plan, teacher, args, fingerprints={}, callbacks=[divided])
    log = trainer.state.log_history
    seen = {
        "loss": [entry["loss"] for entry in log if "loss" in entry],
        "grad_norm": [entry["grad_norm"] for entry in log if "grad_norm" in entry],
        "eval_loss": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "shares": divided.shares,
        "type": str(trainer.accelerator.distributed_type),
    }
    return student, seen


def work(folder: Path, world: int, rank: int) -> None:
    if world > 1:
        os.environ.update(ACCELERATE_USE_FSDP="1", FSDP_VERSION="2")
        processes.join()
    for name, case in CASES.items():
        place = folder / f"{name} of {world}"
        student, seen = trained(place, world, **case)
        if world > 1 and name == "chunks":
            # Interrupted behind its first half, and called once more after its end.
            again = folder / "again"
            if rank == 0:
                shutil.copytree(place / "checkpoint-2", again / "checkpoint-2")
            processes.follow()
            for _ in range(2):
                resumed, _ = trained(again, world, **case)
                for key, value in student.state_dict().items():
                    assert torch.equal(resumed.state_dict()[key], value), key
        if rank == 0:
            student.save_pretrained(place / "student")
            (place / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
        processes.follow()


@pytest.mark.slow
def test_X03_a_student_that_two_processes_share_learns_what_that_of_one_learns(tmp_path: Path) -> None:
    """Losses, gradients, evaluations and weights; plain transformers loads what is left, and a checkpoint too."""
    run_together(work, tmp_path, 1, 2)
    for name, case in CASES.items():
        one, two = (json.loads((tmp_path / f"{name} of {world}" / "seen.json").read_text("utf-8")) for world in (1, 2))
        assert two["type"] == "DistributedType.FSDP"
        assert len(two["shares"]) == STEPS
        assert all(0.4 < share < 0.6 for share in two["shares"])
        assert one["shares"] == [0] * STEPS
        for figure in ("loss", "grad_norm", "eval_loss"):
            assert len(one[figure]) == (2 if figure == "eval_loss" else STEPS)
            assert two[figure] == pytest.approx(one[figure], rel=1e-5)
        for folder in ("student", f"checkpoint-{STEPS}"):
            before, of_one, of_two = (
                student_of(case.get("tied", False)) if place is None else AutoModelForCausalLM.from_pretrained(place)
                for place in (None, *(tmp_path / f"{name} of {world}" / folder for world in (1, 2)))
            )
            for key, weight in of_one.state_dict().items():
                assert_close(of_two.state_dict()[key], weight, dtype=torch.float32)
                assert not torch.equal(before.state_dict()[key], weight)


def fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    return arguments(tmp_path)


def test_X03_what_does_not_work_on_divided_weights_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = fsdp(tmp_path, monkeypatch)
    check_supported(args, objective(), teacher_model())
    with pytest.raises(RecipeError, match=re.escape("'projector' trains projectors, which are no part of the model")):
        check_supported(args, objective(loss="projector"), teacher_model())
    args.fp16 = True
    with pytest.raises(RecipeError, match=re.escape("args.fp16: True, and under FSDP models train in float32 or")):
        check_supported(args, objective(), teacher_model())
    student = student_model()
    check_sharded_model(student, student, LiveTeacher(teacher_model()))
    with pytest.raises(RecipeError, match=re.escape("model: it has adapters")):
        check_sharded_model(torch.nn.Sequential(student), student, None)
    with pytest.raises(RecipeError, match=r"teacher: its weight '\S+' is the student's too"):
        check_sharded_model(student, student, LiveTeacher(student))


def test_an_accelerator_that_would_train_whole_copies_is_refused() -> None:
    alone: Any = SimpleNamespace(state=None, num_processes=1)
    with pytest.raises(ProcessError, match="one process, and nothing to divide"):
        use_fsdp(alone, arguments(Path()))
    other: Any = SimpleNamespace(state=SimpleNamespace(), num_processes=2, distributed_type="MULTI_XLA")
    with pytest.raises(ProcessError, match="accelerate chose MULTI_XLA here, and would train whole copies"):
        use_fsdp(other, arguments(Path()))
    first = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    old: Any = SimpleNamespace(state=first, num_processes=2, distributed_type="FSDP")
    with pytest.raises(ProcessError, match="FSDP_VERSION: is 1, and students are sharded by version 2"):
        use_fsdp(old, arguments(Path()))
