"""Bytes that live at the same time, against arithmetic, against a real step, and against settings that change them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.plan.memory import Lesson, LiveBytes, step_bytes
from flexkd.plan.rows import Batch
from flexkd.plan.skeletons import skeleton
from tests.contract.variants import FIRST, Variant, name_of, teacher_of
from tests.tiny import BUILDERS, tiny_model

BATCH = Batch(rows=8, source=16, target=0, predictions=40)
VOCABULARY = 5000


def lesson_of(model: PreTrainedModel, *, teacher: bool = True, task: str = "causal", batch: Batch = BATCH) -> Lesson:
    """A step of a student that is as large as its teacher."""
    mode = FakeTensorMode()
    with mode:
        pair = LayerPair.of_units(torch.arange(32))
    objective = Objective(TaskTerm(), LogitTerm(), FeatureTerm(layers=(pair,)))
    return Lesson(
        mode,
        skeleton(mode, BUILDERS[task], model.config),
        objective,
        skeleton(mode, BUILDERS[task], model.config) if teacher else None,
        batch,
        lambda batch: torch.zeros(batch.rows, dtype=torch.long),
    )


@pytest.fixture(scope="module")
def causal() -> PreTrainedModel:
    return tiny_model("llama", "causal", vocab_size=VOCABULARY, num_hidden_layers=2)


def test_what_lives_is_counted_once_and_forgotten_when_it_goes() -> None:
    with FakeTensorMode():
        known = torch.zeros(1000)
        with LiveBytes([known]) as live:
            assert known.view(10, 100).sum(0).shape == (100,)
            one = known + 1
            two = one[:10]
            assert live.now == 4000
            three, rise = live.rise(lambda: (one * 2 + one).sum())
            assert (live.now, rise) == (4004, 8000)
            del one
            assert live.now == 4004
            del two, three
            assert (live.now, live.peak) == (0, 12000)


@pytest.mark.parametrize("variant", FIRST, ids=name_of)
def test_every_family_runs_a_step_without_weights(variant: Variant) -> None:
    model = teacher_of(variant)
    target = 6 if variant.task == "seq2seq" else 0
    batch = Batch(8, 16, target, 8 if variant.task == "classification" else 40)
    lesson = lesson_of(model, teacher=False, task=variant.task, batch=batch)
    found = step_bytes(replace(lesson, objective=Objective(TaskTerm())))
    assert found.gradients == sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # A state for each token and block is the least that a backward needs.
    width = model.config.get_text_config(decoder=True).hidden_size
    assert found.activations > 4 * 8 * (target or 16) * width * 4
    assert max(found.activations, found.gradients) <= found.peak


def test_activations_are_what_autograd_saves(causal: PreTrainedModel) -> None:
    """The states of a real model's backward, each storage once, weights not among them."""
    lesson = replace(lesson_of(causal, teacher=False), objective=Objective(TaskTerm()))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*causal.parameters(), *causal.buffers())}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.zeros(BATCH.rows, BATCH.source, dtype=torch.long)
    # A batch without padding takes a shorter way through the attention.
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    causal.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        state = causal.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    causal.eval()
    assert state.requires_grad
    assert step_bytes(lesson).activations == pytest.approx(sum(saved.values()), rel=0.1)


def test_Y01_chunks_keep_whole_logits_out_of_memory_in_training_and_evaluation(causal: PreTrainedModel) -> None:
    whole, chunk = lesson_of(causal), 5
    one_tensor = BATCH.predictions * VOCABULARY * 4
    for training in (True, False):
        found = [step_bytes(one, training=training) for one in (whole, replace(whole, chunk_size=chunk))]
        assert found[0].outputs > (4 if training else 2) * one_tensor
        # The gradient of the head's weight is there either way.
        head = VOCABULARY * 32 * 4 if training else 0
        assert found[1].outputs < one_tensor + head
        assert found[1].peak < found[0].peak


def test_each_knob_moves_the_part_that_it_speaks_of(causal: PreTrainedModel) -> None:
    lesson = replace(lesson_of(causal), chunk_size=5)
    plain = step_bytes(lesson)
    assert step_bytes(replace(lesson, checkpointing=True)).activations < plain.activations / 3
    half = step_bytes(replace(lesson, batch=Batch(4, 16, 0, 20)))
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.1)
    assert step_bytes(replace(lesson, autocast=torch.bfloat16)).activations != plain.activations
    assert step_bytes(replace(whole := replace(lesson, chunk_size=None), teacher=None)).peak < step_bytes(whole).peak
    # Gradients of an earlier batch are there while activations are at their highest.
    added = step_bytes(replace(lesson, accumulates=True)).peak - plain.peak
    assert 0 < added <= plain.gradients


def test_a_step_leaves_its_models_as_they_were(causal: PreTrainedModel) -> None:
    lesson = replace(lesson_of(causal), checkpointing=True, accumulates=True)
    first = step_bytes(lesson)
    models: list[Any] = [lesson.student, lesson.teacher]
    assert not any(model.training for model in models)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in models[0].modules())
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    assert step_bytes(lesson) == first
