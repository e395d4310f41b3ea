"""What the trainer costs beside a bare loop of the same forward, losses, backward and AdamW step.

python benchmarks/overhead.py [--width 192] [--layers 3] [--steps 40] [--rounds 5] [--profile]

Random rows of about 30 tokens, 32 a step; a classifier is sliced from a BERT of twice the width and learns by task,
logits and correlation terms. The teacher's answers are remembered, so that the student's step alone is seen. Both
loops run in turns, one thread each, in CPU seconds of the process, from the end of the second step on.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig, TrainerCallback, TrainingArguments
from transformers.optimization import get_scheduler

from flexkd.core.objective import Objective, Signal
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.data.collate import Collator
from flexkd.models.student import slice_student
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from flexkd.train.order import LengthGroupedOrder
from flexkd.train.trainer import DistillationTrainer

ROWS = 32


class Answers:
    """A teacher that was asked once; its answers are looked up by row."""

    def __init__(self, live: LiveTeacher, rows: list[dict[str, Any]], request: SignalRequest) -> None:
        self.rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for row in rows:
            signal = live.signal(Collator(0)([row]), request)
            self.rows[row["id"]] = (signal.logits[:], signal.features[0])

    def signal(self, batch: Any, request: SignalRequest) -> Signal:
        """The answers to the rows of a batch."""
        found = [self.rows[name] for name in batch["example_id"]]
        return Signal(torch.cat([logits for logits, _ in found]), (torch.cat([states for _, states in found]),))


def made_rows(count: int) -> list[dict[str, Any]]:
    """Rows of 15 to 45 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(15, 46, (count,), generator=generator).tolist()
    return [
        {
            "id": f"row-{index}",
            "input_ids": torch.randint(4, 30000, (length,), generator=generator).tolist(),
            "attention_mask": [1] * length,
            "labels": index % 2,
        }
        for index, length in enumerate(lengths)
    ]


class Clock(TrainerCallback):
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.process_time())

    def milliseconds(self) -> float:
        """A step of the last run, the first two left out; forgets the run."""
        found = (self.ends[-1] - self.ends[1]) / (len(self.ends) - 2) * 1000
        self.ends.clear()
        return found


def bare(
    model: Any, teacher: Answers, goal: Objective, rows: list[dict[str, Any]], steps: int, clock: Clock
) -> Callable[[], Any]:
    """The shortest loop: transformers' own outputs, the objective, clipping, AdamW and a schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10 * steps)
    assert goal.features is not None
    pair, request = goal.features.layers[0], SignalRequest.of(goal)

    def run() -> None:
        order = LengthGroupedOrder([len(row["input_ids"]) for row in rows], ROWS, 0)
        loader: Any = DataLoader(rows, batch_size=ROWS, sampler=order, collate_fn=Collator(0))  # type: ignore[arg-type]
        model.train()
        for batch in loader:
            output = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"])
            logits = model.classifier(model.dropout(output.pooler_output))
            states = output.last_hidden_state[batch["attention_mask"].bool()]
            assert pair.units is not None
            features = states.index_select(-1, pair.units.student)
            value = goal(Signal(logits, (features,)), teacher.signal(batch, request), batch["labels"])
            value.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.on_step_end()

    return run


def trained(
    model: Any, teacher: Answers, goal: Objective, rows: list[dict[str, Any]], steps: int, clock: Clock
) -> Callable[[], Any]:
    """The trainer on the same rows."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, max_steps=steps, logging_steps=20,
        learning_rate=1e-4, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, train_sampling_strategy="group_by_length", log_level="error",
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=model, teacher=teacher, objective=goal, args=arguments, train_dataset=rows, data_collator=Collator(0),
        callbacks=[clock],
    )  # fmt: skip
    trainer.log = lambda *_: None  # type: ignore[method-assign]
    return trainer.train


def main() -> None:
    """Print CPU milliseconds a step of both loops and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 192), ("layers", 3), ("steps", 40), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=2 * asked.width, num_hidden_layers=2 * asked.layers, num_attention_heads=asked.width // 16,
        intermediate_size=8 * asked.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    large: Any = AutoModelForSequenceClassification.from_config(config)
    units = torch.arange(0, 2 * asked.width, 2)
    rows = made_rows(ROWS * asked.steps)
    goal = Objective(TaskTerm(weight=0.5), LogitTerm(temperature=2.0), FeatureTerm(layers=(LayerPair.of_units(units),)))
    teacher = Answers(LiveTeacher(large), rows, SignalRequest.of(goal))
    clock = Clock()
    loops = {
        name: make(slice_student(large, units=units, num_layers=asked.layers), teacher, goal, rows, asked.steps, clock)
        for name, make in (("bare", bare), ("trainer", trained))
    }
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(asked.rounds + 1):
        for name, run in loops.items():
            run()
            milliseconds = clock.milliseconds()
            if turn:
                spent[name].append(milliseconds)
    for name, found in spent.items():
        print(f"{name}: {min(found):.2f} ms a step (least), {sorted(found)[len(found) // 2]:.2f} (median)")
    print(f"trainer / bare: {min(spent['trainer']) / min(spent['bare']):.3f} (least)", end=", ")
    medians = [sorted(found)[len(found) // 2] for found in (spent["trainer"], spent["bare"])]
    print(f"{medians[0] / medians[1]:.3f} (median)")
    if asked.profile:
        profile = cProfile.Profile()
        profile.runcall(loops["trainer"])
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
