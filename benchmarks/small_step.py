"""A step as small as that of the classification demo (3 layers x 192), in which the overhead of a trainer shows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from benchmarks.pairs import Work
from benchmarks.setting import Batch, Setting, bfloat16, collate
from benchmarks.sides import bare_optimizer, finish_step
from benchmarks.stepping import arguments, stepwise
from flexkd import DistillationTrainer
from flexkd.core.objective import Objective, Signal
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.teacher.signal import SignalRequest

_ROWS: Final = 32
_LENGTH: Final = 30
_WIDTH: Final = 192


class _Answers:
    """A teacher that costs nothing: it gives the same signal for every batch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(6)
        features = torch.randn(_ROWS * _LENGTH, _WIDTH, generator=generator)
        self.answer = Signal(torch.randn(_ROWS, 2, generator=generator), (features,))

    def signal(self, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
        return self.answer


@contextmanager
def small_trainer_step(_: Setting) -> Iterator[Work]:
    """The step in flexkd's trainer."""
    trainer = DistillationTrainer(
        model=_student(),
        teacher=_Answers(),
        objective=_objective(),
        args=arguments(TrainingArguments, _ROWS),
        train_dataset=_rows(),
        data_collator=collate,
    )
    with stepwise(trainer) as step:
        yield step


@contextmanager
def small_bare_step(_: Setting) -> Iterator[Work]:
    """The same losses in a loop of a few lines."""
    student, objective, teacher = _student().train(), _objective(), _Answers().answer
    optimizer, rows = bare_optimizer(list(student.parameters())), _rows()

    def work() -> None:
        batch = collate(rows)
        labels, mask = batch["labels"], batch["attention_mask"]
        with bfloat16():
            outputs = student(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
            states = outputs.hidden_states[-1][mask.bool()]
            value = objective(Signal(outputs.logits, (states,)), teacher, labels)
        finish_step(value.loss, optimizer)

    yield work


def _student() -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=_WIDTH, num_hidden_layers=3, num_attention_heads=6, intermediate_size=768, num_labels=2
    )
    torch.manual_seed(1)
    model = BertForSequenceClassification(config)
    model.set_attn_implementation("eager")
    return model


def _objective() -> Objective:
    features = FeatureTerm(positions="tokens", layers=(LayerPair.of_units(torch.arange(_WIDTH)),))
    return Objective(TaskTerm(weight=0.5), LogitTerm(weight=0.5, temperature=2.0), features)


def _rows() -> list[Batch]:
    ids = torch.randint(3, 30_000, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(3))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(index % 2)}
        for index, row in enumerate(ids)
    ]
