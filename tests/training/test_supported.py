"""What the trainer refuses at its start: sharded weights beside a live teacher, compiled hooks."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexkd.core.objective import Signal
from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.models.forward.compilation import compiled_blocks
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training import trainer as trainer_module
from flexkd.training.supported import check_supported
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.training.test_distillation_trainer import (
    arguments,
    first_log,
    objective,
    rows,
    student_model,
    teacher_model,
    trainer_of,
)


class Stored:
    """A teacher that does not run."""

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        return Signal()


def sharded(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    args = arguments(folder)
    if how == "FSDP by arguments":
        args.fsdp = True
    elif how == "FSDP by accelerate launch":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        args.deepspeed_plugin = SimpleNamespace(zero_stage=int(how[-1]))
    return args


@pytest.mark.parametrize("wrapped", [False, True])
def test_X03_a_live_teacher_that_would_be_sharded_too_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    how = "DeepSpeed ZeRO-3"
    teacher = LiveTeacher(teacher_model()) if wrapped else teacher_model()
    args = sharded(tmp_path, how, monkeypatch)
    message = f"teacher: under {how} a teacher cannot run beside the student. Use the teacher cache"
    with pytest.raises(RecipeError, match=re.escape(message)):
        DistillationTrainer(model=student_model(), teacher=teacher, objective=objective(), args=args)


@pytest.mark.parametrize("how", ["FSDP by arguments", "DeepSpeed ZeRO-3"])
def test_X03_a_teacher_whose_answers_are_stored_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    check_supported(sharded(tmp_path, how, monkeypatch), objective(), Stored())


def test_X03_weights_that_are_whole_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_supported(sharded(tmp_path, "DeepSpeed ZeRO-2", monkeypatch), objective(), teacher_model())


def test_a_whole_compiled_model_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.torch_compile = True
    with pytest.raises(RecipeError, match=re.escape("args.torch_compile: True compiles the hooks")):
        check_supported(args, objective(), teacher_model())


# Dynamo looks at the gradient of every input: https://github.com/pytorch/pytorch/issues/138333
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_training_equals_plain_training_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "compiled_blocks", partial(compiled_blocks, backend="eager"))
    found = []
    for compiled in (False, True):
        changes = {"max_steps": 3, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2}
        trainer = trainer_of(tmp_path, objective(), rows(), arguments=changes, compile_blocks=compiled)
        trainer.train()
        found.append([first_log(trainer)[name] for name in ("loss", "grad_norm", "features_raw", "logits_raw")])
        assert not any("forward" in vars(module) for module in trainer.student.modules())
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_R07_what_the_trainer_would_not_read_is_refused(tmp_path: Path) -> None:
    student = student_model()
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match=re.escape("give TaskTerm(label_smoothing=0.1)")):
        DistillationTrainer(model=student, teacher=teacher_model(), objective=objective(), args=smoothed)
    for name in ("compute_loss_func", "model_init"):
        with pytest.raises(RecipeError, match=f"{name}: was given, but"):
            trainer_of(tmp_path, objective(), rows(), **{name: student_model})
    for teacher in ("bert-base-uncased", LiveTeacher):
        given: Any = teacher
        with pytest.raises(RecipeError, match=r"teacher: (str|LiveTeacher) does not answer"):
            DistillationTrainer(model=student, teacher=given, objective=objective(), args=arguments(tmp_path))
    with pytest.raises(UnsupportedModelError, match="model: str is neither a model of transformers"):
        trainer_of(tmp_path, objective(), rows(), model="bert-base-uncased")


def test_R07_an_optimizer_holds_the_projectors_too(tmp_path: Path) -> None:
    student, goal = student_model(), objective(loss="projector")
    part = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match=re.escape("[*model.parameters(), *objective.parameters()]")):
        trainer_of(tmp_path, goal, rows(), model=student, optimizers=(part, None))
    before = [parameter.clone() for parameter in goal.parameters()]
    whole = torch.optim.SGD([*student.parameters(), *goal.parameters()], lr=0.1)
    trainer_of(tmp_path, goal, rows(), model=student, optimizers=(whole, None)).train()
    assert not any(torch.equal(one, two) for one, two in zip(before, goal.parameters(), strict=True))
