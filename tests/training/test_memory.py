"""Memory and disk: states are read and not kept, logits are made in chunks, a checkpoint holds a tie once."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.models.forward.hidden import states_and_logits
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import arguments, first_log


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self._watch(one.untyped_storage())
        return found

    def _watch(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def peak_of(call: Callable[[], Any]) -> int:
    with Peak() as peak:
        call()
    return peak.most


def test_the_peak_is_that_of_what_lives_at_one_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(4):
            torch.zeros(1000)

    assert peak_of(one_after_the_other) == 4000
    assert peak_of(lambda: [torch.zeros(1000).view(10, 100) for _ in range(4)]) == 16000


def test_Y05_one_state_of_24_layers_needs_less_than_half_of_the_memory_of_all() -> None:
    model = tiny_model("bert", num_hidden_layers=24, max_position_embeddings=512, num_attention_heads=1)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(4, 61, (4, 512), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        hooked = peak_of(lambda: states_and_logits(model, inputs, (12,)))
        kept = peak_of(lambda: model(**inputs, output_hidden_states=True))
        states, logits = states_and_logits(model, inputs, (12,))
        everything = model(**inputs, output_hidden_states=True)
    assert hooked < kept / 2
    assert_close(states[12], everything.hidden_states[12])
    assert_close(logits, everything.logits)


def step_of(folder: Path, logit_chunk: int | str) -> tuple[dict[str, float], int]:
    """First log and peak of one step with a vocabulary of 50,000; the memory of parameters is not counted."""
    student, teacher = (
        tiny_model("llama", "causal", seed=seed, vocab_size=50_000, num_hidden_layers=1, hidden_size=8, head_dim=1)
        for seed in (1, 2)
    )
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=Objective(TaskTerm(), LogitTerm(temperature=2.0)),
        args=arguments(folder, optim="sgd", max_grad_norm=0.0),
        train_dataset=answer_rows(),
        data_collator=collator_of(student),
        logit_chunk=logit_chunk,
    )
    peak = peak_of(trainer.train)
    return first_log(trainer), peak


def test_Y01_a_step_in_chunks_needs_a_fraction_of_the_memory_of_whole_logits(tmp_path: Path) -> None:
    """About 70 predictions: whole logits of one model are 14 MB, and the loss and its gradient hold several."""
    whole, whole_peak = step_of(tmp_path, "off")
    chunked, chunked_peak = step_of(tmp_path, 4)
    for name in ("loss", "task_raw", "logits_raw", "grad_norm"):
        assert_close(chunked[name], whole[name], dtype=torch.float32)
    assert chunked_peak < whole_peak / 3


def tied_student() -> PreTrainedModel:
    student = tiny_model("llama", "causal", tie_word_embeddings=True)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    return student


def test_S05_a_tied_student_is_saved_with_one_copy_and_loads_tied(tmp_path: Path) -> None:
    """By the checkpoints of a run and by `save_pretrained` alike."""
    student = tied_student()
    trainer = DistillationTrainer(
        model=student,
        teacher=tiny_model("llama", "causal", seed=3),
        objective=Objective(TaskTerm(), LogitTerm()),
        args=arguments(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=answer_rows(),
        data_collator=collator_of(student),
    )
    trainer.train()
    student.save_pretrained(tmp_path / "student")
    for folder in (tmp_path / "student", tmp_path / "checkpoint-1"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - no mapping
        assert shapes.count(tuple(student.get_input_embeddings().weight.shape)) == 1
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
        assert torch.equal(loaded.get_output_embeddings().weight, student.get_output_embeddings().weight)
