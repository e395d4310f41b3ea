"""Bytes that live at the same time, against arithmetic, against a real step, and against settings that change them."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.costs.memory import LiveBytes, Phase, PlannedStep, step_bytes
from flexkd.costs.rows import Batch
from flexkd.costs.skeletons import skeleton
from flexkd.data.encoding.collation import Collator
from flexkd.training.trainer import DistillationTrainer
from tests.contract.variants import FIRST, Variant, name_of, shallow_of
from tests.tiny import BUILDERS, tiny_model
from tests.training.test_distillation_trainer import arguments

BATCH = Batch(num_rows=8, source=16, target=0, predictions=40)
VOCABULARY = 5000


def step_of(model: PreTrainedModel, *, teacher: bool = True, task: str = "causal", batch: Batch = BATCH) -> PlannedStep:
    """A step of a student that is as large as its teacher."""
    mode = FakeTensorMode()
    with mode:
        pair = LayerPair.of_units(torch.arange(32))
    objective = Objective(TaskTerm(), LogitTerm(), FeatureTerm(layers=(pair,)))
    return PlannedStep(
        mode,
        skeleton(mode, BUILDERS[task], model.config),
        objective,
        skeleton(mode, BUILDERS[task], model.config) if teacher else None,
        batch,
        teacher_widths=(32,),
    )


@pytest.fixture(scope="module")
def causal() -> PreTrainedModel:
    return tiny_model("llama", "causal", vocab_size=VOCABULARY, num_hidden_layers=2)


def test_what_lives_is_counted_once_and_forgotten_when_it_goes() -> None:
    with FakeTensorMode():
        known = torch.zeros(1000)
        with LiveBytes([known]) as live:
            assert known.view(10, 100).sum(0).shape == (100,)
            larger = known + 1
            part = larger[:10]
            assert live.now == 4000
            live.end_phase("first")
            total = (larger * 2 + larger).sum()
            live.end_phase("second")
            assert live.phases["second"] == Phase(before=4000, highest=12000, after=4004)
            assert live.phases["second"].rise == 8000
            del larger
            assert live.now == 4004
            del part, total
            assert (live.now, live.peak) == (0, 12000)


@pytest.mark.parametrize("variant", FIRST, ids=name_of)
def test_every_family_runs_a_step_without_weights(variant: Variant) -> None:
    model = shallow_of(variant)
    target = 6 if variant.task == "seq2seq" else 0
    batch = Batch(8, 16, target, 8 if variant.task == "classification" else 40)
    step = step_of(model, teacher=False, task=variant.task, batch=batch)
    found = step_bytes(replace(step, objective=Objective(TaskTerm())))
    assert found.gradients == sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # A state for each token and block is the least that a backward needs.
    width = model.config.get_text_config(decoder=True).hidden_size
    assert found.activations > 2 * 8 * (target or 16) * width * 4
    assert max(found.activations, found.gradients) <= found.peak


def test_activations_are_what_autograd_saves(causal: PreTrainedModel) -> None:
    """The states of a real model's backward, each storage once, weights not among them."""
    step = replace(step_of(causal, teacher=False), objective=Objective(TaskTerm()))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*causal.parameters(), *causal.buffers())}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.zeros(BATCH.num_rows, BATCH.source, dtype=torch.long)
    # A batch without padding takes a shorter way through the attention.
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    causal.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        state = causal.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    causal.eval()
    assert state.requires_grad
    assert step_bytes(step).activations == pytest.approx(sum(saved.values()), rel=0.1)


def test_Y01_chunks_keep_whole_logits_out_of_memory_in_training_and_evaluation(causal: PreTrainedModel) -> None:
    whole, chunk = step_of(causal), 5
    one_tensor = BATCH.predictions * VOCABULARY * 4
    for training in (True, False):
        found = [step_bytes(one, training=training) for one in (whole, replace(whole, logit_chunk=chunk))]
        assert found[0].outputs > (4 if training else 2) * one_tensor
        # The gradient of the head's weight is there either way, and each product is added to it.
        head = 2 * VOCABULARY * 32 * 4 if training else 0
        assert found[1].outputs < one_tensor + head
        assert found[1].peak < found[0].peak


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Rows without padding, with as many labels as the batch has predictions."""
    answer = batch.predictions // batch.num_rows
    labels = [-100] * (batch.source - answer) + [5] * answer
    return [{"input_ids": [5] * batch.source, "labels": labels} for _ in range(batch.num_rows)]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("logit_chunk", ["off", 5])
def test_the_peak_is_that_of_a_real_step_of_the_trainer(
    causal: PreTrainedModel, tmp_path: Path, logit_chunk: int | str, precision: torch.dtype | None
) -> None:
    step = replace(step_of(causal), logit_chunk=logit_chunk, autocast=precision, teacher_autocast=precision)
    student, teacher = copy.deepcopy(causal), copy.deepcopy(causal)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=Objective(TaskTerm(), LogitTerm(), FeatureTerm(layers=(LayerPair.of_units(torch.arange(32)),))),
        args=arguments(tmp_path, bf16=precision is not None),
        data_collator=Collator(0),
        logit_chunk=logit_chunk,
    )
    wrapped = trainer.accelerator.prepare_model(student)
    # The head is proved on the first batch of a run.
    trainer.compute_loss(wrapped, trainer.data_collator(rows_of(BATCH)))
    (batch,) = trainer._prepared([trainer.data_collator(rows_of(BATCH))])
    weights = [tensor for model in (student, teacher) for tensor in (*model.parameters(), *model.buffers())]
    with LiveBytes(weights) as live:
        trainer.training_step(wrapped, batch)
    # A batch without padding takes a shorter way through the attention.
    assert step_bytes(step).peak == pytest.approx(live.peak, rel=0.03)


def test_each_knob_moves_the_part_that_it_speaks_of(causal: PreTrainedModel) -> None:
    step = replace(step_of(causal), logit_chunk=20)
    plain = step_bytes(step)
    assert step_bytes(replace(step, checkpointing=True)).activations < plain.activations / 3
    half = step_bytes(replace(step, batch=Batch(4, 16, 0, 20)))
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.1)
    assert step_bytes(replace(step, autocast=torch.bfloat16)).activations != plain.activations
    assert step_bytes(replace(whole := replace(step, logit_chunk="off"), teacher=None)).peak < step_bytes(whole).peak
    # Gradients of an earlier batch are there while activations are at their highest.
    added = step_bytes(replace(step, accumulates=True)).peak - plain.peak
    assert 0 < added <= plain.gradients


def test_a_step_leaves_its_models_as_they_were(causal: PreTrainedModel) -> None:
    step = replace(step_of(causal), checkpointing=True, accumulates=True)
    first = step_bytes(step)
    models: list[Any] = [step.student, step.teacher]
    assert not any(model.training for model in models)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in models[0].modules())
    assert all(parameter.grad is None for model in models for parameter in model.parameters())
    assert step_bytes(step) == first
