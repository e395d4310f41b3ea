"""Records as a run and a comparison leave them, with round numbers that the tests know."""

import dataclasses
from typing import Any

from flexkd.record import (
    CompareCell,
    CompareRecord,
    DataRecord,
    Disagreement,
    ModelRecord,
    PairedDifference,
    RunRecord,
    ScoreRecord,
)

PLANTS = ["<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "\"'`|{{ 7 * 7 }} $x$ \u4eca\u5929"]
"""Text that would break a page, a table or a template that does not escape it."""


def model(role: str, parameters: int, speed: float | None, memory: int | None, **metrics: float | None) -> ModelRecord:
    shape = (384, 6) if role == "teacher" else (192, 3)
    return ModelRecord(role, f"{role}-name", parameters, 4 * parameters, *shape, speed, memory, metrics)


def run_record(**changes: Any) -> RunRecord:
    """A teacher at 0.8, a student that goes from 0.5 to 0.76, 4 times smaller and 5 times as fast."""
    steps = range(10, 101, 10)
    values = [1.0, 4.0, 2.0, 3.0, 0.0]
    record = RunRecord(
        name="tiny run",
        created="2026-01-02T03:04:05+00:00",
        task="classification",
        problem="single_label",
        metric="accuracy",
        objective="loss = 1 * cross_entropy + 4 * forward_kl(temperature=2)",
        recipe={
            "name": "tiny run",
            "data": {"text": "text", "text_pair": None},
            "objective": {"logits": {"loss": "forward_kl"}},
        },
        seed=13,
        environment={"torch": "2.13.0", "device": "2 cores"},
        data=DataRecord(
            sources={"train": "train.jsonl", "test": "test.jsonl"},
            rows={"train": 6820, "test": 859},
            skipped={"text is empty": 2},
            skipped_examples=["train.jsonl:311: text is empty"],
            labels=["negative", "positive"],
            truncated={"train": 3},
            fingerprint="fingerprint-of-data",
        ),
        models=[
            model("teacher", 20_000_000, 100.0, 400_000_000, accuracy=0.8, kl=0.0, matthews_correlation=0.61),
            model("student_before", 5_000_000, 500.0, 100_000_000, accuracy=0.5, kl=0.7, matthews_correlation=None),
            model("student", 5_000_000, 500.0, 100_000_000, accuracy=0.76, kl=0.1234, matthews_correlation=0.52),
        ],
        scores=[ScoreRecord(-1, "log_prob", "gradient", values, [1, 3], 2000, 731.2, 1, "units", "index", "abcdef")],
        history=[
            {"step": step, "epoch": step / 50, "loss": 2 - step / 100, "task_raw": 1.0, "task_weighted": 1.0}
            | {"logits_raw": (1 - step / 100) / 4, "logits_weighted": 1 - step / 100, "nonfinite": 0}
            for step in steps
        ],
        evaluations=[
            {"step": step, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": accuracy}
            for step, accuracy in ((25, 0.7), (50, 0.77), (75, 0.775), (100, 0.76))
        ],
        disagreements=[
            Disagreement("1", [PLANTS[0]], "positive", "positive", "negative", 0.93, 0.71),
            Disagreement("2", [PLANTS[1], PLANTS[2]], None, "negative", "positive", None, 0.64),
        ],
        new_parameters=["classifier.bias"],
        notes=["the teacher was fine-tuned first"],
        seconds={"score units": 11.5, "train student": 171.0},
    )
    return dataclasses.replace(record, **changes)


def empty_record() -> RunRecord:
    """A run that left nothing but its recipe."""
    return run_record(models=[], scores=[], history=[], evaluations=[], disagreements=[], notes=[], seconds={})


def compare_record(**changes: Any) -> CompareRecord:
    """Two methods and the reference over two seeds."""
    means = {"plain": 0.7, "logits": 0.74, "units": 0.76}
    record = CompareRecord(
        metric="accuracy",
        problem="single_label",
        methods=list(means),
        seeds=[0, 1],
        cells=[
            CompareCell(method, seed, {"accuracy": mean + 0.01 * (2 * seed - 1), "nll": 0.5}, 90 + seed)
            for method, mean in means.items()
            for seed in (0, 1)
        ],
        reference="plain",
        paired=[
            PairedDifference("plain", 0.7, 0.014, None, None, None, None),
            PairedDifference("logits", 0.74, 0.014, 0.04, -0.01, 0.09, 0.08),
            PairedDifference("units", 0.76, 0.014, 0.06, 0.02, 0.1, 0.03),
        ],
        teacher={"accuracy": 0.8},
        name="methods of <b>tiny</b>",
    )
    return dataclasses.replace(record, **changes)
