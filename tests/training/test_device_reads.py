"""What waits for the device: nothing within a micro-batch, one read before each optimizer step."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.training.trainer import DistillationTrainer
from tests.tiny import TinyTask, tiny_model
from tests.training.language_rows import answer_rows
from tests.training.test_distillation_trainer import UNITS, arguments, rows

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
"""Operations whose result, or its size, has to come back from a device."""


class Reads(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in _flat(args[1:])
        )
        # Masks of transformers ask for themselves whether there is any padding.
        if (name in READS or by_mask) and not _is_called_from("masking_utils"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _is_called_from(module: str) -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if module in frame.f_code.co_filename:
            return True
    return False


def _flat(values: Any) -> list[Any]:
    return [one for value in values for one in (_flat(value) if isinstance(value, list | tuple) else [value])]


def counted(monkeypatch: pytest.MonkeyPatch, reads: Reads, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, with everything that it reads counted, whole tensors included."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch, reads:
            for name in ("tolist", "cpu", "numpy"):
                plain = getattr(Tensor, name)

                def read(self: Tensor, *given: Any, plain: Any = plain, name: str = name) -> Any:
                    reads.found[name] += 1
                    return plain(self, *given)

                patch.setattr(Tensor, name, read)
            return call(*args, **kwargs)

    return run


CASES: list[tuple[str, TinyTask, str]] = [
    ("bert", "classification", "tokens"),
    ("bert", "classification", "supervised"),
    ("llama", "causal", "supervised"),
    ("llama", "causal", "tokens"),
    ("t5", "seq2seq", "tokens"),
]


@pytest.mark.parametrize("logit_chunk", ["off", 7])
@pytest.mark.parametrize(("model_type", "task", "positions"), CASES)
def test_a_micro_batch_waits_for_nothing_and_a_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, task: TinyTask, positions: str, logit_chunk: Any
) -> None:
    """With a teacher that runs on each batch; the head is proved on the first batch, before anything is counted."""
    student: PreTrainedModel = tiny_model(model_type, task, seed=1)
    pair = LayerPair.of_units(UNITS, student_layer=2, teacher_layer=3)
    data = rows() if task == "classification" else answer_rows(seq2seq=task == "seq2seq")
    for model in (student, teacher := tiny_model(model_type, task, seed=2)):
        model.set_attn_implementation("eager")
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=Objective(TaskTerm(), LogitTerm(), FeatureTerm("correlation", 1.0, positions, (pair,))),
        args=arguments(
            tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2, logging_steps=9
        ),
        train_dataset=data,
        data_collator=Collator(0, seq2seq=task == "seq2seq"),
        logit_chunk=logit_chunk,
    )
    within, before_step = Reads(), Reads()
    trainer.training_step(student, trainer._prepared([Collator(0, seq2seq=task == "seq2seq")(data[:2])])[0])
    student.zero_grad()
    monkeypatch.setattr(trainer, "training_step", counted(monkeypatch, within, trainer.training_step))
    monkeypatch.setattr(trainer, "_get_grad_norm", counted(monkeypatch, before_step, trainer._get_grad_norm))
    trainer.train()
    assert not within.found
    assert before_step.found == {"tolist": 2}


def test_the_counter_sees_what_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads()

    def asking(values: Tensor) -> None:
        assert float(values[0]) == 1.0
        assert values[values > 1].shape == (1,)
        assert values.tolist() == [1.0, 2.0]

    counted(monkeypatch, reads, asking)(torch.tensor([1.0, 2.0]))
    assert reads.found.keys() >= {"_local_scalar_dense", "index", "tolist"}
