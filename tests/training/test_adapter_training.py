"""A student with LoRA distils like any other: adapters alone change, runs resume, idle adapters stop one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator

import flexkd
from flexkd.errors import TrainingError
from flexkd.models.loading.adapters import LoraSettings, add_lora, merge_lora
from tests.closeness import assert_close
from tests.invariants.test_resume import Stop
from tests.tiny import tiny_batch, tiny_model
from tests.training.test_distillation_trainer import arguments

UNITS = torch.arange(0, 32, 2)
# What PEFT itself still asks transformers for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def teacher() -> PreTrainedModel:
    return tiny_model("llama", "causal", seed=1, num_hidden_layers=2)


def student(model_type: str = "llama", **changes: Any) -> Any:
    """Half the teacher's width, with dropout in its adapters."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, **changes}
    plain = tiny_model(model_type, "causal", seed=2, **sizes)
    return add_lora(plain, LoraSettings(rank=2, dropout=0.1))


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    batch = tiny_batch(teacher(), rows=count)
    return [{name: value[index] for name, value in batch.items()} for index in range(count)]


def objective(*, layer: int = -1, alone: bool = False) -> flexkd.Objective:
    pair = flexkd.LayerPair.of_units(UNITS, student_layer=layer)
    features = flexkd.FeatureTerm("correlation", 1.0, "supervised", (pair,))
    if alone:
        return flexkd.Objective(features=features)
    return flexkd.Objective(flexkd.TaskTerm(), flexkd.LogitTerm(temperature=2.0), features)


def trainer_of(folder: Path, model: nn.Module, goal: flexkd.Objective | None = None, **changes: Any) -> Any:
    guide = changes.pop("teacher", None) or teacher()
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, **changes}
    return flexkd.DistillationTrainer(
        model=model,
        teacher=guide,
        objective=goal or objective(),
        args=arguments(folder, **settings),
        train_dataset=rows(),
        eval_dataset={"first": rows(), "second": rows(4)} if changes.get("eval_strategy") else rows(),
        data_collator=default_data_collator,
    )


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_adapters_change_and_the_merged_student_is_plain(tmp_path: Path) -> None:
    model = student()
    before = copied(model)
    trainer = trainer_of(tmp_path / "run", model)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert len([entry for entry in trainer.state.log_history if "features_raw" in entry]) == 3
    model.eval()
    batch = {name: value for name, value in tiny_batch(teacher()).items() if name != "labels"}
    with torch.no_grad():
        expected = model(**batch).logits
        merge_lora(model).save_pretrained(tmp_path / "student")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
        assert not any(info.values())
        assert_close(loaded(**batch).logits, expected)


def test_a_student_with_adapters_learns_as_its_plain_self_would(tmp_path: Path) -> None:
    # At the first step the updates are zero: value and parts are those of the plain model.
    found = []
    for model in (
        student(),
        tiny_model("llama", "causal", seed=2, hidden_size=16, num_hidden_layers=2, intermediate_size=24),
    ):
        trainer = trainer_of(tmp_path, model, max_steps=1)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("loss", "task_raw", "logits_raw", "features_raw", "feature_positions"):
        assert_close(found[0][name], found[1][name], dtype=torch.float32)


def test_a_run_of_adapters_resumes_where_it_stopped(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = trainer_of(tmp_path / "whole", student(), **saving)
    whole.train()
    first = trainer_of(tmp_path / "parts", student(), **saving)
    first.add_callback(Stop())
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").exists()
    second = trainer_of(tmp_path / "parts", student(), **saving)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 4
    expected = copied(whole.model)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_A09_evaluation_has_its_loss_and_the_best_adapter_comes_back(tmp_path: Path) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_first_loss", "greater_is_better": True}
    model = student()
    trainer = trainer_of(tmp_path, model, learning_rate=1e-2, **evaluating, **best)
    trainer.train()
    losses = {
        entry["step"]: entry["eval_first_loss"] for entry in trainer.state.log_history if "eval_first_loss" in entry
    }
    assert len(losses) == 3
    assert all(f"eval_{name}_task_raw" in str(trainer.state.log_history) for name in ("first", "second"))
    assert trainer.state.best_global_step == max(losses, key=lambda step: losses[step])
    assert_close(trainer.evaluate(rows())["eval_loss"], max(losses.values()), dtype=torch.float32)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_A07_with_gradient_checkpointing_every_adapter_learns_alike(is_reentrant: bool, tmp_path: Path) -> None:
    plain, checkpointed = student(), student()
    trainer_of(tmp_path, plain, objective(alone=True), max_steps=1).train()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": is_reentrant}}
    trainer_of(tmp_path, checkpointed, objective(alone=True), max_steps=1, **options).train()
    expected = copied(plain)
    assert all(bool(value.any()) for name, value in expected.items() if ".lora_B." in name)
    for name, value in checkpointed.state_dict().items():
        assert_close(value, expected[name], dtype=torch.float32)


def test_A07_adapters_that_nothing_reaches_stop_the_run_before_its_first_step(tmp_path: Path) -> None:
    model = student()
    before = copied(model)
    expected = "step 1: 7 adapters got no gradient (first: 'base_model.model.model.layers.1.self_attn.q_proj.lora_B."
    with pytest.raises(TrainingError, match=re.escape(expected)):
        trainer_of(tmp_path, model, objective(layer=1, alone=True)).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_teacher_with_adapters_teaches_as_its_merged_self(tmp_path: Path) -> None:
    found = []
    for merge in (False, True):
        model = add_lora(teacher(), LoraSettings(rank=2))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(torch.ones_like(parameter) * 0.1)
        trainer = trainer_of(tmp_path, student(), max_steps=1, teacher=merge_lora(model) if merge else model)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("logits_raw", "features_raw"):
        assert_close(found[0][name], found[1][name], dtype=torch.float32)
