"""The logit lens: what a model's final norm and head make of the state of a block, and how two models differ there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.losses import lens as lens_module
from flexkd.core.losses.lens import lens_divergence
from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, TaskTerm
from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.lens import check_lens, lens_of
from tests.closeness import assert_close
from tests.references import distances
from tests.references.draws import normal
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows
from tests.training.test_distillation_trainer import first_log
from tests.training.test_text_trainer import student_of, trainer_of

IDS = torch.tensor([[5, 9, 33, 12, 7]])
LABELS = torch.tensor([[-100, -100, 33, 12, 7]])


def decoder(kind: str, **changes: Any) -> PreTrainedModel:
    """A decoder whose norms multiply, as trained ones do."""
    model = tiny_model(kind, "causal", seed=1, **changes)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim == 1:
                parameter += 0.3 * normal(*parameter.shape, seed=index)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "granite", "opt"])
def test_behind_the_last_block_the_lens_gives_the_logits_of_the_model(kind: str) -> None:
    """With what each model does to its logits: a soft-cap, a divisor, a bias of its norms."""
    model = decoder(kind)
    check_lens(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, LABELS)
    depth = model.config.num_hidden_layers
    with torch.no_grad():
        states: list[Tensor] = []
        blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
        handle = blocks[-1].register_forward_hook(
            lambda _, __, output: states.append(output if isinstance(output, Tensor) else output[0])
        )
        logits = model(IDS).logits[0]
        handle.remove()
        reading = lens_of(model, learns=False).read(states[0][0], depth)
        assert_close(reading[:], logits)
        assert len(reading[1:3]) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("t5", "seq2seq", seed=1), "is no decoder for which it is known"),
        (lambda: tiny_model("bert", seed=1), "is no decoder for which it is known"),
        (lambda: decoder("opt", do_layer_norm_before=False), "is no decoder for which it is known"),
    ],
)
def test_a_model_without_a_known_norm_before_its_head_is_refused(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        lens_of(model(), learns=True)


def test_what_lies_between_the_last_norm_and_the_head_is_not_passed_over() -> None:
    model: Any = decoder("llama")

    def doubled(_: Any, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = 2 * output["last_hidden_state"]
        return output

    model.model.register_forward_hook(doubled)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM does more between the two"):
        check_lens(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, LABELS)


@pytest.mark.parametrize("shared", [None, 50])
@pytest.mark.parametrize("chunk_bytes", [1, 2000, 3 * 2**23])
def test_the_divergence_is_that_of_norm_and_head_by_hand_and_no_chunk_changes_it(
    monkeypatch: pytest.MonkeyPatch, shared: int | None, chunk_bytes: int
) -> None:
    monkeypatch.setattr(lens_module, "_CHUNK_BYTES", chunk_bytes)
    student: Any = decoder("llama", hidden_size=16, head_dim=4)
    teacher: Any = decoder("llama")
    student_lens = lens_of(student, learns=True, shared_outputs=shared)
    teacher_lens = lens_of(teacher, learns=False, shared_outputs=shared)
    states, targets = normal(7, 16, seed=3).requires_grad_(), normal(7, 32, seed=4).requires_grad_()
    value = lens_divergence(student_lens.read(states, 1), teacher_lens.read(targets, 2), student_lens)
    value.backward()
    logits = [
        (model.lm_head.weight @ (model.model.norm(side).T)).T[:, :shared]
        for model, side in ((student, states), (teacher, targets))
    ]
    assert_close(value.detach(), np.float64(distances.distill_lens(*(side.detach() for side in logits))))
    # States, norm and head of the student learn, nothing of the teacher does.
    p, q = logits[1].detach().double().softmax(-1), logits[0].double().softmax(-1)
    middle = (p + q) / 2
    plain = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2
    learning = [states, student.model.norm.weight, student.lm_head.weight]
    for part, expected in zip(learning, torch.autograd.grad(plain, learning), strict=True):
        assert_close(part.grad, expected)
    assert targets.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("size", [16, 3, 1])
def test_M03_padding_and_prompts_change_nothing(tmp_path: Path, size: int) -> None:
    """Rows of unequal lengths, together and alone, against the states of each row at its labels."""
    student, teacher = student_of("llama"), tiny_model("llama", "causal", seed=1)
    lenses = lens_of(student, learns=True), lens_of(teacher, learns=False)
    pairs = (LayerPair(1, 2), LayerPair(2, 3))
    term = FeatureTerm("distill_lens", 0.7, "supervised", pairs, lenses=lenses)
    objective = Objective(TaskTerm(weight=0.5), features=term)
    changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-16 // size)}
    trainer = trainer_of(tmp_path, "llama", objective, **changes)
    expected = by_hand(student, teacher, pairs)
    # Both are made from the same seeds as those of the trainer.
    trainer.train()
    assert_close(first_log(trainer)["features_raw"], expected, dtype=torch.float32)


def by_hand(student: Any, teacher: Any, pairs: tuple[LayerPair, ...]) -> float:
    values = []
    for row in answer_rows():
        labels = torch.tensor(row["labels"])
        for pair in pairs:
            logits = []
            for model, layer in ((student, pair.student_layer), (teacher, pair.teacher_layer)):
                with torch.no_grad():
                    output = model.model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
                    # The last entry of transformers' hidden states has passed the final norm already.
                    last = layer == model.config.num_hidden_layers
                    states = output.hidden_states[layer]
                    logits.append(model.lm_head(states if last else model.model.norm(states))[0, :-1])
            supervised = labels[1:] != -100
            count = int(supervised.sum())
            values.append((distances.distill_lens(*(side[supervised] for side in logits)), count))
    return sum(value * count for value, count in values) / sum(count for _, count in values)
