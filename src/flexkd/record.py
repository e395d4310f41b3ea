"""Record of a run, to and from JSON; reports are drawn from nothing else."""

from dataclasses import dataclass, field

from flexkd.strict_json import FORMAT, Record, StoredRecord
from flexkd.strict_json import Number as Number
from flexkd.vocabulary_record import VocabularyRecord


def proper_interval(low: Number | None, high: Number | None) -> tuple[Number, Number] | None:
    """Ends of an interval; None where it is not known, or has no width.

    Values that are all equal leave no spread to estimate an interval from; flexkd 0.1.0 wrote one of no width.
    """
    return None if low is None or high is None or low == high else (low, high)


@dataclass(frozen=True)
class LatencyRecord(Record):
    """How long one model takes for one test row at a time, after a warm-up.

    Attributes:
        rows: Number of test rows that were timed.
        median_ms: Median over these rows, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        tokens: New tokens of each answer that was timed; 0: a row is one forward pass.
        threads: CPU threads of the process; 0 on an accelerator.
    """

    rows: int
    median_ms: Number
    p95_ms: Number
    tokens: int = 0
    threads: int = 0

    @property
    def token_ms(self) -> Number | None:
        """Milliseconds of an answer divided by its tokens, reading the prompt included; None for a forward pass."""
        return self.median_ms / self.tokens if self.tokens else None

    def describe(self) -> str:
        """What was timed, how, and on how many threads, in a sentence."""
        rows, text = f"{self.rows:,} test rows", "one row at a time"
        if self.tokens:
            rows = f"{self.rows:,} test prompts"
            text = f"one prompt at a time, answered with exactly {self.tokens} new tokens"
        threads = f"{self.threads} CPU thread{'s' * (self.threads != 1)}" if self.threads else "a GPU"
        return (
            f"Latency: {text}; median / 95th percentile of {rows} in milliseconds, without padding, after a warm-up, "
            f"on {threads}."
        )


@dataclass(frozen=True)
class ModelRecord(Record):
    """Quality and cost of one model.

    Attributes:
        role: teacher, student_before, student, rival or baseline.
        parameters: 0 for a baseline that is a rule.
        peak_memory_bytes: Above what was resident before the model was loaded.
        metrics: By name; None where a metric is not defined.
        dtype: Number type of the saved weights; empty in records of earlier versions.
        latency: None in records of earlier versions, and where it was not measured.
        preparation: How a rival was made, in words; empty for others.
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
    latency: LatencyRecord | None = None
    preparation: str = ""

    @property
    def short_name(self) -> str:
        """Its name without the folders before it."""
        return self.name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class ScoreRecord(Record):
    """The unit scores of one teacher layer, and the units that were taught.

    Attributes:
        layer: Counted from 1; -1 is the input of the head, `all` every block.
        values: One score a unit.
        units: Indices of the units that the student learned.
        effective_predictions: Predictions that the scores rest on; fewer than `num_predictions` where some dominate.
        num_unused: Units that the task does not use at all.
        selection_hash: Hash of what the student was cut along and was taught, the same for all layers of a run. Runs
            that cut and teach the same have the same, whatever their scores.
        scores_hash: Hash of this layer's scores; empty in records of earlier versions.
        of: What has a score each: `units`, or `directions` along which the student was cut; then `units` are those.
    """

    layer: int | str
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
    scores_hash: str = ""
    of: str = "units"


@dataclass(frozen=True)
class Disagreement(Record):
    """One example on which teacher and student differ; regression has no confidences."""

    id: str
    texts: list[str]
    label: str | None
    teacher: str
    student: str
    teacher_confidence: Number | None
    student_confidence: Number | None


@dataclass(frozen=True)
class ClassRecord(Record):
    """How well the models of a run do on one class of the test rows.

    Attributes:
        support: Test rows with this label.
        precision: By role; None for a model that never predicts the class, as F1 where it never occurs either.
        recall: By role; None where the class never occurs.
        f1: By role.
    """

    name: str
    support: int
    precision: dict[str, Number | None]
    recall: dict[str, Number | None]
    f1: dict[str, Number | None]


@dataclass(frozen=True)
class RowIntervals(Record):
    """95 % intervals of the main metric over the test rows: what other rows of the same kind could change.

    Attributes:
        rows: Number of test rows.
        models: Lower and upper end by role, or by the name of a rival or a baseline.
        share: Of the student's value as a share of the teacher's; empty where a ratio says nothing.
        difference: Of the student's value minus the teacher's.
        description: How they were determined, in a sentence.
    """

    rows: int
    models: dict[str, list[Number]]
    share: list[Number]
    difference: list[Number]
    description: str


@dataclass(frozen=True)
class AnswerExample(Record):
    """One prompt with the answer of each model.

    Attributes:
        answers: By role, or by the name of a baseline.
        rouge: RougeL of each answer.
        cut: Models whose answer ended at the limit of new tokens.
    """

    id: str
    prompt: str
    references: list[str]
    answers: dict[str, str]
    rouge: dict[str, Number | None]
    cut: list[str]


@dataclass(frozen=True)
class GenerationRecord(Record):
    """How the language models of a run were prompted, decoded and evaluated.

    Attributes:
        rows: Rows of the test split that were answered.
        kind: causal or seq2seq.
        is_chat: The layout is the user's turn in the tokenizer's chat template.
        layout: Text of a prompt with slots, such as {document}.
        decoding: By role, every setting that decides the answers.
        cost_tokens: New tokens of each timed answer.
        stemmer: Whether ROUGE stems words.
        tokenizer: How ROUGE splits texts into words.
        adds_special_tokens: Whether a plain prompt is tokenized with special tokens.
        prefix: Text before a plain prompt.
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
class DataRecord(Record):
    """Where the rows came from, how many there were, and which were left out.

    Attributes:
        sources: By split.
        rows: Number of rows by split.
        skipped: Number of rows that were left out, by reason.
        skipped_examples: Some of them, each with its place and reason.
        truncated: Number of texts that were cut at the length limit, by split.
    """

    sources: dict[str, str]
    rows: dict[str, int]
    skipped: dict[str, int]
    skipped_examples: list[str]
    labels: list[str]
    truncated: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class RunRecord(StoredRecord):
    """Everything that one run did; the report and the model card are pure functions of it.

    Attributes:
        created: An ISO time.
        objective: As a formula.
        history: Logged steps: step, epoch, loss and, for each term of the objective, `<term>_raw` and
            `<term>_weighted`.
        evaluations: Step, epoch, eval_loss and `eval_<metric>` of each evaluation.
        disagreements: Test rows of a classifier on which teacher and student differ.
        new_parameters: Weights of the student that were newly initialized.
        seconds: Time of each stage.
        peaks: Most bytes that the process held in each stage; empty in records of earlier versions, and where the
            system does not tell.
        answers: Test rows of a language model with the answers to them.
        generation: How language models were decoded and how ROUGE was computed; None for classifiers.
        cut: What the student was cut by, in words; empty in records of earlier versions.
        taught: What the feature term taught, in words; empty in records of earlier versions.
        vocabulary: The tokens that the student knows; None where it knows all of its teacher's.
        classes: Of a classifier, teacher and student class by class; empty in records of earlier versions, as the next
            three.
        confusion: By role, how often which label got which prediction: index of the label, of the prediction, count;
            empty where rows may have several labels.
        outcomes: Labelled test rows by which of the two is right: `both_right`, `lost` (the teacher alone), `gained`
            (the student alone), `both_wrong`.
        both_wrong: Some of those on which both are wrong.
        intervals: None in records of earlier versions, and for a metric without them.
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
    cut: str = ""
    taught: str = ""
    vocabulary: VocabularyRecord | None = None
    peaks: dict[str, Number] = field(default_factory=dict)
    classes: list[ClassRecord] = field(default_factory=list)
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    both_wrong: list[Disagreement] = field(default_factory=list)
    intervals: RowIntervals | None = None
    format: int = FORMAT

    @property
    def choices(self) -> str:
        """A sentence on what the student was cut by and what it was taught; empty in records of earlier versions."""
        return f"The student is {self.cut}, and was taught {self.taught}." if self.cut else ""

    def model(self, role: str) -> ModelRecord | None:
        """The first model of a role."""
        return next((model for model in self.models if model.role == role), None)
