"""A loop of one's own, from public names alone, takes the step that the trainer takes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

import flexkd
from tests.closeness import assert_close
from tests.tiny import TinyTask, tiny_batch, tiny_model

UNITS = list(range(3, 19))
RATE = 0.1


class OwnTeacher(nn.Module):
    """A teacher that transformers does not know: states and logits by another route than the trainer's."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """States and logits."""
        outputs = self.model(**batch, output_hidden_states=True)
        return outputs.hidden_states[-1], outputs.logits


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_a_plain_loop_takes_the_step_of_the_trainer(task: TinyTask, tmp_path: Path) -> None:
    teacher = tiny_model("llama", task)
    student = tiny_model("llama", task, seed=1, hidden_size=len(UNITS))
    trained = copy.deepcopy(student)
    objective = flexkd.Objective(
        task=flexkd.TaskTerm(),
        logits=flexkd.LogitTerm(temperature=2.0),
        features=flexkd.FeatureTerm(layers=(flexkd.LayerPair.of_units(torch.tensor(UNITS)),)),
    )
    batch = tiny_batch(teacher)
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}

    teacher_states, teacher_logits = OwnTeacher(teacher)(inputs)
    with flexkd.states(student) as states:
        logits = student.train()(**inputs).logits
    if task == "causal":
        predicts = labels[:, 1:] != -100
        logits, teacher_logits = logits[:, :-1][predicts], teacher_logits[:, :-1][predicts]
        labels = labels[:, 1:][predicts]
    is_token = inputs["attention_mask"].bool()
    value = objective(
        flexkd.Signal(logits, (states[-1][is_token],)),
        flexkd.Signal(teacher_logits, (teacher_states[is_token][:, UNITS],)),
        labels,
    )
    value.loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= RATE * (0 if parameter.grad is None else parameter.grad)

    rows = [{name: column[i] for name, column in batch.items()} for i in range(len(batch["labels"]))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=len(rows), optim="sgd", learning_rate=RATE,
        lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
        dataloader_pin_memory=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    flexkd.DistillationTrainer(
        model=trained, teacher=teacher, objective=objective, args=arguments, train_dataset=rows
    ).train()
    for loop_weight, trained_weight in zip(student.parameters(), trained.parameters(), strict=True):
        assert_close(loop_weight, trained_weight)
