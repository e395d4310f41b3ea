"""What one run did, or one comparison, to and from JSON: the only thing that a report is drawn from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flexkd.strict_json import read_json, write_json

Number = int | float
"""Both kinds on purpose: a step is an int, and run-time type checks do not take an int for a float."""

FORMAT: Final = 1
"""The metrics in a record of which less is more; of all others a higher value is better."""


@dataclass(frozen=True)
class ModelRecord:
    """One model as it was measured: `role` is teacher, student_before, student or baseline.

    `dtype` is the number type that its weights are saved in; empty in records of earlier versions.
    """

    role: str
    name: str
    parameters: int
    bytes_on_disk: int
    hidden_size: int
    num_layers: int
    examples_per_second: Number | None
    peak_memory_bytes: int | None
    metrics: dict[str, Number | None]
    dtype: str = ""


@dataclass(frozen=True)
class ScoreRecord:
    """The unit scores of one teacher layer and the units that were taught."""

    layer: int
    target: str
    attribution: str
    values: list[Number]
    units: list[int]
    num_predictions: int
    effective_predictions: Number
    num_unused: int
    basis: str
    mapping: str
    selection_hash: str


@dataclass(frozen=True)
class Disagreement:
    """One example on which teacher and student differ; regression has no confidences."""

    id: str
    texts: list[str]
    label: str | None
    teacher: str
    student: str
    teacher_confidence: Number | None
    student_confidence: Number | None


@dataclass(frozen=True)
class AnswerExample:
    """One prompt and what each model answered, by role or by a baseline's name.

    `rouge` holds the rougeL of each answer, `cut` names the models whose answer the limit ended.
    """

    id: str
    prompt: str
    references: list[str]
    answers: dict[str, str]
    rouge: dict[str, Number | None]
    cut: list[str]


@dataclass(frozen=True)
class GenerationRecord:
    """How language models were asked and judged, the same for all of a run.

    `rows` of the test were answered. `kind` is causal or seq2seq. `layout` is the text of a prompt with slots such as
    {document}; with `is_chat` it is the user's turn in the tokenizer's chat template. A plain prompt stands behind
    `prefix` and is tokenized as `adds_special_tokens` says. `decoding` holds by role
    everything that decided the answers, `cost_tokens` how many tokens each timed answer had; `stemmer` and `tokenizer`
    are those of ROUGE.
    """

    rows: int
    kind: str
    is_chat: bool
    layout: str
    max_new_tokens: int
    decoding: dict[str, object]
    cost_tokens: int
    stemmer: bool
    tokenizer: str
    adds_special_tokens: bool = True
    prefix: str = ""


@dataclass(frozen=True)
class DataRecord:
    """Where the rows came from, how many there were, and which were left out for what reason."""

    sources: dict[str, str]
    rows: dict[str, int]
    skipped: dict[str, int]
    skipped_examples: list[str]
    labels: list[str]
    truncated: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class RunRecord:
    """Everything that one run did; the report and the model card are pure functions of it.

    `created` is an ISO time, `objective` the formula, `seconds` the time of each stage. Rows of `history` hold step,
    epoch, loss and, for each term of the objective, `<term>_raw` and `<term>_weighted`; rows of `evaluations` hold
    step, epoch, eval_loss and `eval_<metric>`. Language models have `answers` in place of `disagreements`, and
    `generation` says how they were decoded and how ROUGE was computed.
    """

    name: str
    created: str
    task: str
    problem: str
    metric: str
    objective: str
    recipe: dict[str, object]
    seed: int
    environment: dict[str, str]
    data: DataRecord
    models: list[ModelRecord]
    scores: list[ScoreRecord]
    history: list[dict[str, Number]]
    evaluations: list[dict[str, Number]]
    disagreements: list[Disagreement]
    new_parameters: list[str]
    notes: list[str]
    seconds: dict[str, Number]
    answers: list[AnswerExample] = field(default_factory=list)
    generation: GenerationRecord | None = None
    format: int = FORMAT

    def write(self, path: str | Path) -> None:
        """Write a run as strict JSON: NaN and infinities become null and are listed under `not_finite`.

        JSON keys are text: a dict with other keys does not come back equal.
        """
        write_json(self, path)

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a run that `write` has written, equal to the one that was written.

        Raises:
            ArtifactError: No such file, damaged, of another format, or with other fields than this version's.
        """
        return read_json(RunRecord, path, FORMAT)

    def model(self, role: str) -> ModelRecord | None:
        """The first model of a role."""
        return next((model for model in self.models if model.role == role), None)


@dataclass(frozen=True)
class CompareCell:
    """One method under one seed."""

    method: str
    seed: int
    metrics: dict[str, Number | None]
    seconds: Number


@dataclass(frozen=True)
class PairedDifference:
    """One method over all seeds: mean and sample standard deviation, and the paired difference to the reference.

    `low` and `high`: 95 % confidence interval of the mean difference. The reference itself has None in the last four.
    """

    method: str
    mean: Number | None
    std: Number | None
    difference: Number | None
    low: Number | None
    high: Number | None
    p_value: Number | None


@dataclass(frozen=True)
class CompareRecord:
    """Methods x seeds under one recipe, with paired statistics.

    `teacher` and, by name, `baselines` hold the metrics of what all methods are held against: the teacher, and what
    needs no model.
    """

    metric: str
    problem: str
    methods: list[str]
    seeds: list[int]
    cells: list[CompareCell]
    reference: str
    paired: list[PairedDifference]
    teacher: dict[str, Number | None]
    name: str = "comparison"
    created: str = ""
    recipe: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    baselines: dict[str, dict[str, Number | None]] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, path: str | Path) -> None:
        """Write a comparison as strict JSON: NaN and infinities become null and are listed under `not_finite`.

        JSON keys are text: a dict with other keys does not come back equal.
        """
        write_json(self, path)

    @classmethod
    def read(cls, path: str | Path) -> "CompareRecord":
        """Read a comparison that `write` has written, equal to the one that was written.

        Raises:
            ArtifactError: No such file, damaged, of another format, or with other fields than this version's.
        """
        return read_json(CompareRecord, path, FORMAT)
