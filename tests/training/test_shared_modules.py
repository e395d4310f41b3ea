"""Teacher and student over the same modules: what a copy would have said, or one error that names the way out."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.outputs import HeadOutputs
from flexkd.core.terms import LogitTerm, TaskTerm
from flexkd.errors import UnsupportedModelError
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.shared import adapter_layers, check_not_shared
from flexkd.models.slicing.student import slice_student
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.training.arguments import _checkpointing
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model
from tests.training.test_distillation_trainer import arguments, rows, trainer_of

# What PEFT itself still asks transformers for, and that a second adapter is meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:.*will lead to having multiple adapters"),
]

DROPPED = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}


def classifier(seed: int = 1) -> PreTrainedModel:
    return tiny_model("bert", seed=seed, **DROPPED)


def goal() -> Objective:
    return Objective(TaskTerm(), LogitTerm(temperature=2.0))


def losses(folder: Path, model: nn.Module, teacher: Any, **changes: Any) -> list[Tensor]:
    """Parts of two steps with dropout, and what an evaluation then says."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **changes}
    trainer = trainer_of(folder, goal(), rows(), model=model, teacher=teacher, arguments=settings)
    torch.manual_seed(0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = [entry[name] for entry in logs for name in ("task_raw", "logits_raw", "grad_norm")]
    return torch.tensor([*found, trainer.evaluate()["eval_logits_raw"]])


def headed(body_of: PreTrainedModel, seed: int = 2) -> PreTrainedModel:
    """Another head over the same body."""
    model = classifier(seed)
    model.bert = body_of.bert
    return model


def test_R08_a_frozen_body_under_two_heads_teaches_as_its_copy_and_the_student_keeps_its_dropout(
    tmp_path: Path,
) -> None:
    student = classifier()
    student.bert.requires_grad_(False)
    teacher = headed(student)
    expected = losses(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher))
    without = losses(tmp_path, tiny_model("bert", seed=1, **(DROPPED | {"hidden_dropout_prob": 0.0})), teacher)
    assert_close(losses(tmp_path, student, teacher), expected)
    assert (expected - without).abs().max() > 1e-3, "else nothing was dropped"


def adapted(names: tuple[str, ...] = ("first", "second"), seed: int = 1) -> peft.PeftModel:
    """A base with adapters that have moved from where they began; the last one is active and learns."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(seed), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if set(name.split(".")) & set(names):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    model.set_adapter(names[-1])
    return model


def alone(model: peft.PeftModel, adapter: str | None) -> PreTrainedModel:
    """A copy that computes with one adapter, or with none."""
    found = copy.deepcopy(model)
    if adapter is None:
        found.base_model.disable_adapter_layers()
        return found.get_base_model()
    found.set_adapter(adapter)
    return found.merge_and_unload()


TEACHERS: dict[str, Callable[[Any], Any]] = {
    "first": lambda model: LiveTeacher(model, adapters=["first"]),
    "none": lambda model: LiveTeacher(model, adapters=[]),
    "base": lambda model: model.get_base_model(),
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("first", False), ("first", True), ("none", False), ("base", False)]
)
def test_R08_an_adapter_is_switched_around_each_call_of_the_teacher(
    tmp_path: Path, kind: str, checkpointing: bool
) -> None:
    changes = _checkpointing() if checkpointing else {}
    expected = losses(tmp_path, adapted(), alone(adapted(), "first" if kind == "first" else None), **changes)
    model = adapted()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = losses(tmp_path, model, TEACHERS[kind](model), **changes)
    assert_close(found, expected, dtype=torch.float32)
    assert found[1] > 1e-3, "the student is not its own teacher"
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(layer.active_adapters == ["second"] and not layer.disable_adapters for layer in adapter_layers(model))


def test_R08_two_wrappers_of_one_base_teach_and_learn_with_their_own_adapters(tmp_path: Path) -> None:
    base = classifier()
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    teacher = peft.get_peft_model(base, copy.deepcopy(config), adapter_name="first")
    student = peft.get_peft_model(base, copy.deepcopy(config), adapter_name="second")
    # PEFT leaves both trainable.
    refused(tmp_path, student, teacher, "shares 6 weights with the student that the student trains")
    student.set_adapter("second")
    expected = losses(tmp_path, copy.deepcopy(student), alone(student, "first"))
    student.set_adapter("first")
    with pytest.raises(UnsupportedModelError, match=re.escape("both compute with the adapter 'first'")):
        losses(tmp_path, student, teacher)
    student.set_adapter("second")
    teacher.base_model.set_adapter("first")
    with pytest.raises(UnsupportedModelError, match=re.escape("Call set_adapter('second') of the student")):
        losses(tmp_path, student, teacher)
    student.set_adapter("second")
    assert_close(losses(tmp_path, student, teacher), expected, dtype=torch.float32)


def refused(folder: Path, model: nn.Module, teacher: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        DistillationTrainer(model=model, teacher=teacher, objective=goal(), args=arguments(folder))


def test_R08_what_cannot_be_told_apart_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    plain, model = classifier(), adapted()
    refused(
        tmp_path, plain, plain, "teacher: it is the student itself, BertForSequenceClassification. Give the teacher"
    )
    refused(tmp_path, plain, LiveTeacher(plain), "teacher: it is the model that learns. Give the teacher a copy")
    losses(tmp_path, plain, copy.deepcopy(plain))
    refused(
        tmp_path,
        model,
        model,
        "LiveTeacher(model, adapters=['NAME']) with one of first, second, or adapters=[]",
    )
    refused(tmp_path, model, LiveTeacher(model), "teacher: it is the model that learns.")
    refused(tmp_path, model, LiveTeacher(model, adapters=["second"]), "teacher: both compute with the adapter 'second'")
    with pytest.raises(UnsupportedModelError, match=re.escape("has no adapter 'c'. It has: first, second.")):
        LiveTeacher(model, adapters=["c"])
    with pytest.raises(UnsupportedModelError, match=re.escape("has no adapter 'first'. It has none.")):
        LiveTeacher(plain, adapters=["first"])
    model.merge_adapter()
    refused(tmp_path, model, LiveTeacher(model, adapters=["first"]), "Call unmerge_adapter() first.")
    model.unmerge_adapter()
    check_not_shared(model, model, ["first"])


def test_R08_weights_that_both_hold_must_be_frozen(tmp_path: Path) -> None:
    student = classifier()
    teacher = headed(student)
    names = [name for name, _ in teacher.named_parameters() if name.startswith("bert.")]
    refused(
        tmp_path, student, teacher, f"shares {len(names)} weights with the student that the student trains (first: "
    )
    student.bert.requires_grad_(False)
    losses(tmp_path, student, teacher)
    # Not the same tensor, but the same memory: what a slice without a copy would be.
    cut = classifier(3)
    cut.classifier.weight = nn.Parameter(teacher.classifier.weight.data[1:])
    refused(
        tmp_path, cut, teacher, "shares 1 weights with the student that the student trains (first: 'classifier.weight'"
    )
    cut.classifier.weight = nn.Parameter(teacher.classifier.weight.data[1:].clone())
    check_not_shared(teacher, cut)
    # Nothing in it is trained, but its statistics move with what the student reads.
    teacher.norm = cut.norm = nn.BatchNorm1d(4).requires_grad_(False)
    refused(tmp_path, cut, teacher, "that the student trains (first: 'norm.running_mean')")
    # The whole base learns under a teacher that is the base with an adapter.
    model = adapted(("first",))
    refused(tmp_path, unwrapped(model), model, "teacher:")


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_R08_a_slice_of_everything_holds_its_own_memory(kind: str, task: Any) -> None:
    teacher = tiny_model(kind, task, num_hidden_layers=2)
    student = slice_student(teacher, hidden_size=32)
    check_not_shared(teacher, student)
    check_not_shared(student, teacher)


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_R08_a_wrapped_teacher_answers_as_the_model_in_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = classifier()
    batch, request = tiny_batch(model), SignalRequest.of(goal())
    wrapped = LiveTeacher(wrap(model))
    assert wrapped.model is model
    assert_close(wrapped.signal(batch, request).logits, LiveTeacher(model).signal(batch, request).logits)


def test_R08_a_head_that_runs_later_computes_with_the_teachers_adapter() -> None:
    """The logits of a language model are made of its states, a chunk at a time, while the student is at work."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    plain = tiny_model("llama", "causal", num_hidden_layers=2, tie_word_embeddings=False)
    model = peft.get_peft_model(plain, config, adapter_name="first")
    model.add_adapter("second", copy.deepcopy(config))
    batch, request = tiny_batch(alone(model, "first")), SignalRequest.of(Objective(logits=LogitTerm()))
    expected = LiveTeacher(alone(model, "first")).signal(batch, request).logits
    model.set_adapter("second")
    found = LiveTeacher(model, adapters=["first"]).signal(batch, request).logits
    assert isinstance(found, HeadOutputs)
    assert_close(found[:], expected[:], dtype=torch.float32)
    assert all(layer.active_adapters == ["second"] for layer in adapter_layers(model))
