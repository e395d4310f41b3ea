"""Records as a run and a comparison leave them, with round numbers that the tests know."""

import dataclasses
from typing import Any

from flexkd.compare_record import CompareCell, CompareRecord, Contrast, PairedDifference
from flexkd.evaluate.sizes.curve import with_curve
from flexkd.record import (
    AnswerExample,
    ClassRecord,
    DataRecord,
    Disagreement,
    GenerationRecord,
    LatencyRecord,
    ModelRecord,
    RowIntervals,
    RunRecord,
    ScoreRecord,
)
from flexkd.sizes_record import Knee, SizeResult, SizesRecord

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


def judged_record(num_classes: int = 2, **changes: Any) -> RunRecord:
    """The run with figures of its classes, of 40 test rows each, rows that both have wrong, and intervals.

    The teacher has 32 of the 40 right, the student 30 of the first class and 31 of all others; each takes the rest for
    the next class.
    """
    names = ["negative", "positive", *(f"class {index}" for index in range(2, num_classes))][:num_classes]
    right = {"teacher": [32] * num_classes, "student": [30] + [31] * (num_classes - 1)}
    confusion, precision = {}, {}
    for role, hits in right.items():
        pairs = [[[index, index, hit], [index, (index + 1) % num_classes, 40 - hit]] for index, hit in enumerate(hits)]
        confusion[role] = [pair for of_class in pairs for pair in of_class]
        precision[role] = [hit / (hit + 40 - hits[index - 1]) for index, hit in enumerate(hits)]
    classes = [
        ClassRecord(
            name,
            40,
            {role: values[index] for role, values in precision.items()},
            {role: hits[index] / 40 for role, hits in right.items()},
            {role: 2 * hits[index] / (80 + hits[index] - hits[index - 1]) for role, hits in right.items()},
        )
        for index, name in enumerate(names)
    ]
    ends = {"teacher": [0.772, 0.826], "student_before": [0.467, 0.533], "student": [0.731, 0.788]}
    settings: dict[str, Any] = {
        "classes": classes,
        "confusion": confusion,
        "outcomes": {"both_right": 600, "lost": 87, "gained": 53, "both_wrong": 119},
        "both_wrong": [Disagreement("9", [PLANTS[0]], "negative", "positive", "positive", 0.97, 0.93)],
        "intervals": RowIntervals(859, ends, [0.923, 0.978], [-0.061, -0.018], "Drawn again."),
    }
    return run_record(**{**settings, **changes})


def rivals_record(**changes: Any) -> RunRecord:
    """The run with two rivals: the teacher in int8, slower than itself, and a model that is better than the student."""
    record = run_record()
    latency = {"teacher": 40.0, "student_before": 8.0, "student": 8.0, "rival": 10.0, "int8": 50.0}
    int8 = dataclasses.replace(
        model("rival", 20_000_000, 90.0, 200_000_000, accuracy=0.79, kl=0.01, matthews_correlation=0.6),
        name="teacher in int8", bytes_on_disk=30_000_000, dtype="int8", preparation="linear layers in int8",
    )  # fmt: skip
    small = dataclasses.replace(
        model("rival", 6_000_000, 400.0, 110_000_000, accuracy=0.77, kl=0.2, matthews_correlation=0.55),
        name="models/small", preparation="fine-tuned on the labels alone",
    )  # fmt: skip
    models = [
        dataclasses.replace(one, latency=LatencyRecord(64, latency["int8" if one.dtype else one.role], 60.0, threads=2))
        for one in (*record.models, int8, small)
    ]
    return dataclasses.replace(record, **{"models": models, **changes})


def generation_record(**changes: Any) -> RunRecord:
    """A causal teacher and student that write summaries, and the first sentence of each document beside them."""
    figures = [
        (
            "teacher",
            20_000_000,
            {"rougeL": 0.42, "nll": 1.9, "perplexity": 6.7, "token_agreement": 1.0, "kl": 0.0},
            0.02,
        ),
        ("student_before", 5_000_000, {"rougeL": 0.05, "nll": 6.1, "perplexity": 450.0, "token_agreement": 0.1}, 0.96),
        (
            "student",
            5_000_000,
            {"rougeL": 0.36, "nll": 2.3, "perplexity": 10.0, "token_agreement": 0.71, "kl": 0.4},
            0.03,
        ),
    ]
    models = [
        model(role, size, 900.0 if role == "teacher" else 2500.0, 4 * size, **metrics, cut_share=cut)
        for role, size, metrics, cut in figures
    ]
    rule = ModelRecord("baseline", "first sentence", 0, 0, 0, 0, None, None, {"rougeL": 0.276})
    decoding = {"max_new_tokens": 32, "num_beams": 1, "do_sample": False, "repetition_penalty": 1.0, "seeds": [0]}
    said = {"teacher": "plays music from the command line", "student_before": "the the the", "student": "music player"}
    settings: dict[str, Any] = {
        "task": "summarization",
        "problem": "generation",
        "metric": "rougeL",
        "models": [*models, rule],
        "disagreements": [],
        "evaluations": [{"step": s, "epoch": 1.0, "eval_loss": 1.0, "eval_nll": 3 - s / 100} for s in (25, 50, 75)],
        "answers": [
            AnswerExample(
                "1",
                f"A small program {PLANTS[0]}.\n\nSummary:\n",
                ["command line music player", PLANTS[1]],
                {**said, "first sentence": PLANTS[2]},
                {"teacher": 0.44, "student_before": 0.0, "student": 0.67, "first sentence": None},
                ["student_before"],
            ),
            AnswerExample(
                "2", "Another one.", [], {"teacher": "x", "student": " "}, {"teacher": None, "student": None}, []
            ),
        ],
        "generation": GenerationRecord(
            rows=200,
            kind="causal",
            is_chat=False,
            layout="{document}\n\nSummary:\n",
            max_new_tokens=32,
            decoding={
                "teacher": {**decoding, "not_used": {"no_repeat_ngram_size": 6}},
                "student": {**decoding, "not_used": {}},
            },
            cost_tokens=24,
            stemmer=True,
            tokenizer="latin",
        ),
    }
    return run_record(**{**settings, **changes})


def empty_record() -> RunRecord:
    """A run that left nothing but its recipe."""
    return run_record(models=[], scores=[], history=[], evaluations=[], disagreements=[], notes=[], seconds={})


def contrasted_record(**changes: Any) -> CompareRecord:
    """The record of `compare_record` with 7 seeds and two contrasts, one of them at the level."""
    contrasts = [
        Contrast("units", "plain", 0.06, 0.02, 0.1, 0.003, 0.0156, 0.0312, 1.4, 7),
        Contrast("units", "logits", 0.02, -0.01, 0.05, 0.2, 0.25, 0.25, 0.52, 32),
    ]
    figures = {"contrasts": contrasts, "level": 0.05, "smallest_p_value": 1 / 64, "fewest_seeds": 7}
    return compare_record(**{"seeds": list(range(7)), **figures, **changes})


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


KNEE_SHAPES = {"0.1": (128, 2), "0.2": (192, 2), "0.35": (256, 3), "0.5": (320, 4)}
KNEE_CURVE = {"0.1": 0.62, "0.2": 0.75, "0.35": 0.772, "0.5": 0.78}
"""Accuracies of four sizes whose curve has its knee at 0.2."""


def sizes_record(means: dict[str, float | None] | None = None, **changes: Any) -> SizesRecord:
    """Four sizes over three seeds with values around these means, under a teacher at 0.8, with its figures."""
    means = KNEE_CURVE if means is None else means
    cells = [
        CompareCell(size, seed, {"accuracy": None if mean is None else mean + shift}, 90)
        for size, mean in means.items()
        for seed, shift in ((0, -0.004), (1, 0.0), (2, 0.004))
    ]
    sizes = []
    for size, mean in means.items():
        value, (width, depth) = float(size), KNEE_SHAPES[size]
        parameters, rate = round(22_700_000 * value), 226 / value
        costs = (parameters, 4 * parameters, width, depth, rate, 70_000_000)
        student = ModelRecord("student", f"size {size}", *costs, {"accuracy": mean, "agreement": 0.9}, "float32")
        sizes.append(SizeResult(size, value, student, folder=f"sizes/size_{size}-0/student"))
    record = SizesRecord(
        metric="accuracy",
        problem="single_label",
        key="size",
        keep=0.95,
        seeds=[0, 1, 2],
        sizes=sizes,
        cells=cells,
        teacher=model("teacher", 22_700_000, 226.0, 141_000_000, accuracy=0.8, agreement=1.0),
        baselines=[ModelRecord("baseline", "most frequent class", 0, 0, 0, 0, None, None, {"accuracy": 0.484})],
        knee=Knee(None),
        name="sizes of <b>tiny</b>",
    )
    return with_curve(dataclasses.replace(record, **changes), {}, None)
