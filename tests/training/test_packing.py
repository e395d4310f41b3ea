"""Packed rows: one sequence without padding in which no row sees another, and the same losses, steps and gradients."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import RecipeError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.hidden import model_inputs, prediction_labels, supervised_mask
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.writer import CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.packing import packing_collator
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows
from tests.training.test_distillation_trainer import UNITS, arguments, first_log

CAUSAL = sorted(name for name, family in FAMILIES.items() if "causal" in family.tasks)
# Its positions follow from the attention mask alone.
NOT_PACKED = {"opt"}
PAIR = LayerPair.of_units(UNITS, student_layer=2, teacher_layer=3)


def goal(positions: str = "tokens") -> Objective:
    return Objective(
        TaskTerm(weight=0.5), LogitTerm(temperature=2.0), FeatureTerm("correlation", 1.0, positions, (PAIR,))
    )


def models_of(model_type: str, attention: str = "eager") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher."""
    models = tuple(tiny_model(model_type, "causal", seed=seed) for seed in (1, 2))
    for model in models:
        model.set_attn_implementation(attention)
    return models[0], models[1]


def test_rows_stand_one_after_the_other_and_keep_their_names() -> None:
    first = {"id": "a", "input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [-100, 6, 7], "length": 3}
    # A row that is supervised from its first token on must not be predicted by the row before it.
    second = {"id": "b", "input_ids": [8, 9], "attention_mask": [1] * 2, "labels": [8, 9], "length": 2}
    batch = Collator(0, packed=True)([first, second])
    assert set(batch) == {"input_ids", "position_ids", "labels", "example_id", "length"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["example_id"] == ["a", "b"]


def test_predictions_of_packed_rows_are_those_of_the_rows_in_order() -> None:
    model, rows = tiny_model("llama", "causal"), answer_rows(6)
    found = []
    for packed in (False, True):
        batch = Collator(0, packed=packed)(rows)
        mask = supervised_mask(model, model_inputs(model, batch), batch["labels"])
        found.append(prediction_labels(model, batch["labels"], mask).tolist())
    assert found[0] == found[1]
    assert len(found[0]) > 12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name not in NOT_PACKED])
def test_D21_every_family_of_decoders_keeps_packed_rows_apart(model_type: str, attention: str) -> None:
    if model_type == "gemma2" and attention == "sdpa":
        pytest.skip("soft-capped attention has no fused form")
    student, _ = models_of(model_type, attention)
    assert packing_collator(Collator(0), {"student": student}, answer_rows()).packed


def test_D21_a_model_that_mixes_packed_rows_is_refused_before_training() -> None:
    student, teacher = tiny_model("llama", "causal"), tiny_model("opt", "causal")
    message = r"training.packing: the teacher, OPTForCausalLM with \w+ attention, lets packed rows see each other \(its"
    with pytest.raises(RecipeError, match=message):
        packing_collator(Collator(0), {"student": student, "teacher": teacher}, answer_rows())


def test_an_encoder_decoder_has_nothing_to_pack() -> None:
    with pytest.raises(
        RecipeError, match=re.escape("training.packing: the student, T5ForConditionalGeneration, is no")
    ):
        packing_collator(Collator(0, seq2seq=True), {"student": tiny_model("t5", "seq2seq")}, answer_rows(seq2seq=True))


def trained(folder: Path, model_type: str, *, packed: bool, positions: str, **options: Any) -> dict[str, float]:
    student, teacher = models_of(model_type)
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        objective=goal(positions),
        args=arguments(folder, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-9),
        train_dataset=answer_rows(),
        eval_dataset=answer_rows(),
        data_collator=Collator(0, packed=packed),
        **options,
    )
    trainer.train()
    return {**first_log(trainer), **trainer.evaluate()}


@pytest.mark.parametrize("logit_chunk", ["off", 5])
@pytest.mark.parametrize("positions", ["tokens", "supervised"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_D21_a_packed_step_has_the_losses_and_the_gradient_of_the_rows(
    tmp_path: Path, model_type: str, positions: str, logit_chunk: Any
) -> None:
    """Gemma-2 with a window of 4 tokens, which is shorter than the rows."""
    plain = trained(tmp_path, model_type, packed=False, positions=positions)
    packed = trained(tmp_path, model_type, packed=True, positions=positions, logit_chunk=logit_chunk)
    names = [name for name in plain if name.endswith(("_raw", "_weighted", "loss", "nll", "grad_norm", "positions"))]
    assert {"loss", "grad_norm", "eval_nll", "eval_features_raw", "feature_positions"} <= set(names)
    for name in names:
        assert_close(packed[name], plain[name], dtype=torch.float32)


@pytest.mark.parametrize("positions", ["tokens", "supervised"])
@pytest.mark.parametrize(("built", "asked"), [(False, True), (True, False)])
def test_stored_answers_serve_packed_rows_and_others(tmp_path: Path, positions: str, built: bool, asked: bool) -> None:
    """A cache that was built from padded batches serves packed ones, and the other way round."""
    request = SignalRequest.of(goal(positions))
    live, rows = LiveTeacher(models_of("llama")[1]), answer_rows(6)
    plan = CachePlan(live, merged([request])[0], rows, Collator(0, packed=built), "float16")
    cache = plan.build(tmp_path / plan.name, {"teacher": "a"})
    direct = live.signal(Collator(0)(rows[::-1]), request)
    found = cache.signal(Collator(0, packed=asked)(rows[::-1]), request)
    assert_close(found.features[0].float(), direct.features[0], dtype=torch.bfloat16)
    assert found.logits is not None
    assert direct.logits is not None
    theirs, ours = (one[:].float().log_softmax(-1) for one in (direct.logits, found.logits))
    assert_close(ours, theirs, dtype=torch.bfloat16)
