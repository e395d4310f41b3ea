"""The sections of a recipe: every key with its type, its default and what it means."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flexkd.recipe.values import (
    Count,
    Layer,
    Layers,
    NotNegative,
    ParameterCount,
    Positive,
    Scalar,
    ScalarOrList,
    Seed,
    Share,
    ShareBelowOne,
    SourceOrShare,
    Switch,
    Text,
    UnitInterval,
    Whole,
)

Problem = Literal["single_label", "multi_label", "regression"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant"]
LogitLoss = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "mse"
]
FeatureLoss = Literal["correlation", "cross_correlation", "projector", "cka", "mse", "cosine", "functional_cka"]
Attribution = Literal["gradient", "gradient_x_activation", "fisher", "activation", "variance", "random"]

# evaluate/classification.py computes these; it stands on a higher floor and imports torch, so a test compares the two.
METRIC_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "single_label": ("accuracy", "macro_f1", "matthews_correlation", "calibration_error", "nll"),
    "multi_label": ("micro_f1", "macro_f1", "subset_accuracy", "calibration_error"),
    "regression": ("pearson", "spearman", "mse"),
}
"""Metrics of each problem; the first is the default."""

LOGIT_LOSSES_OF: Final[dict[str, tuple[str, ...]]] = {
    "single_label": ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation"),
    "multi_label": ("forward_kl",),
    "regression": ("mse",),
}
"""Logit losses that fit each problem."""

TASKS_TO_COME: Final = ("instruction", "summarization")


class Section(BaseModel):
    """A frozen group of keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TaskSection(Section):
    """What the models must do, and how it is judged."""

    type: Literal["classification"] = "classification"
    """Kind of task."""
    problem: Problem = "single_label"
    """single_label (one class a row), multi_label (any number of classes) or regression (one number)."""
    metric: Text = ""
    """Metric that chooses the best checkpoint; the first of the problem's metrics unless given."""

    @model_validator(mode="before")
    @classmethod
    def _fill_metric(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("metric") is None:
            problem = values.get("problem", "single_label")
            names = METRIC_NAMES.get(problem) if isinstance(problem, str) else None
            return {**values, "metric": (names or METRIC_NAMES["single_label"])[0]}
        return values

    @field_validator("type", mode="before")
    @classmethod
    def _later_tasks(cls, value: object) -> object:
        if value in TASKS_TO_COME:
            raise ValueError(f"{value!r} is not in this version yet. Use type: classification.")
        return value


class DataSection(Section):
    """Where the rows come from, and which of their columns count."""

    train: Text
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder, a hub id (owner/name or
    owner/name:config), or package:IMPORT_NAME/SUB/PATH."""
    validation: SourceOrShare = 0.1
    """Rows that choose the best checkpoint: a source like `train`, or a share of the training rows."""
    test: SourceOrShare = 0.1
    """Rows of the final figures: a source like `train`, or a share of the training rows."""
    text: Text = "text"
    """Column of the text."""
    text_pair: Text | None = None
    """Column of the second text of a sentence pair."""
    label: Text = "label"
    """Column of the label."""
    label_names: tuple[Text, ...] | None = None
    """Names of the classes in the order of their ids; taken from the rows unless given."""
    where: dict[Text, ScalarOrList] | None = None
    """Keeps rows whose column has this value, or one of these values."""
    max_length: Count = 128
    """Longest input, in tokens; longer ones are cut and counted."""
    max_rows: Count | None = None
    """Most rows taken of each source; all unless given."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """Rows that cannot be used: skip and count them, or stop."""
    unlabelled: Literal["skip", "keep"] = "skip"
    """Training rows without a label: skip them, or keep them to learn from the teacher alone."""


class FineTune(Section):
    """How the teacher learns the task before it teaches."""

    epochs: Positive = 3.0
    """Passes over the training rows."""
    batch_size: Count = 32
    """Rows of one optimizer step, over all processes."""
    learning_rate: Positive = 5e-5
    """Highest step size of AdamW."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: Schedule = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_ratio: ShareBelowOne = 0.06
    """Share of all steps in which the learning rate rises from 0."""
    seed: Seed = 0
    """Seed of the teacher's own training; apart from training.seed, so that seeds of students share one teacher."""
    evaluations: Count = 3
    """How often the teacher is evaluated; the best of them is kept."""


class TeacherSection(Section):
    """The model that teaches."""

    model: Text
    """Teacher: a folder, a hub id or package:IMPORT_NAME/SUB/PATH."""
    tokenizer: Text | None = None
    """Tokenizer of the teacher; that of its model unless given."""
    fine_tune: FineTune | None = None
    """Train the teacher on the task first; {} takes the defaults, null leaves it as it is."""
    precision: Precision = "auto"
    """Number type of the teacher's forward passes."""


class StudentSection(Section):
    """The model that learns: cut out of the teacher, given by name, or fresh from a config."""

    start: Literal["slice", "pretrained", "config"] = "slice"
    """slice (cut out of the teacher), pretrained (weights of `model`) or config (fresh, shaped like `model`)."""
    model: Text | None = None
    """Model of start: pretrained or config, given like teacher.model."""
    tokenizer: Text | None = None
    """Tokenizer of the student; unless given, that of a pretrained model, else the teacher's."""
    hidden_size: Count | None = None
    """Units of the hidden state; the teacher's unless given."""
    num_layers: Count | None = None
    """Number of blocks; the teacher's unless given."""
    num_heads: Count | None = None
    """Attention heads; follow from hidden_size unless given."""
    num_key_value_heads: Count | None = None
    """Key and value heads of grouped-query attention; follow from num_heads unless given."""
    intermediate_size: Count | None = None
    """Units of the feed-forward layers; follow from hidden_size unless given."""
    size: Share | None = None
    """Share of the teacher's parameters; derives the whole shape."""
    max_parameters: ParameterCount | None = None
    """Most parameters, as 30M; derives the whole shape."""
    calibration_rows: Count = 256
    """Training rows that measure which heads, feed-forward units and layers matter."""


class ScoresSection(Section):
    """How much the task uses each unit of the teacher."""

    target: Literal["log_prob", "logit", "predicted_logit"] = "log_prob"
    """What a unit's influence is measured on."""
    attribution: Attribution = "gradient"
    """How it is measured; activation, variance and random are controls."""
    layer: Layers = -1
    """Layer or list of layers that are scored: -1 is the state that the head reads, 1..N follow that block."""
    rows: Count | None = 2000
    """Training rows that are scored; null takes all."""


class TaskTermSection(Section):
    """The loss on the labels."""

    weight: NotNegative = 1.0
    """Factor of this term in the objective."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the probability spread over all classes; single_label only."""


class LogitsSection(Section):
    """The loss between the predictions of teacher and student."""

    loss: LogitLoss = "forward_kl"
    """Distance between the two distributions; mse belongs to regression."""
    weight: NotNegative = 1.0
    """Factor of this term in the objective."""
    temperature: Positive = 2.0
    """Divides the logits of both models in this loss alone; it has no part in how text is generated."""
    beta: UnitInterval | None = None
    """Teacher's share of the mixture in jensen_shannon; 0.5 unless given."""
    alpha: ShareBelowOne | None = None
    """Share of the own distribution in skew_kl and skew_reverse_kl; 0.1 unless given."""


class FeaturesSection(Section):
    """The loss between the hidden states of teacher and student."""

    loss: FeatureLoss = "correlation"
    """Distance between the two sets of hidden states."""
    weight: NotNegative = 1.0
    """Factor of this term in the objective."""
    positions: Literal["tokens", "supervised"] = "tokens"
    """tokens (all real tokens) or supervised (only the positions that a label is read from)."""
    basis: Literal["units", "tangent"] = "units"
    """units (the highest scores) or tangent (the directions that move the output most)."""
    mapping: Literal["index", "score", "matched"] = "index"
    """Which student unit meets which teacher unit."""
    units: Count | None = None
    """Number of teacher units that are taught; as many as the student has unless given."""
    coverage: Share | None = None
    """Share of the score that the taught units must hold, in place of `units`."""
    layer_map: dict[Layer, Layer] = {-1: -1}
    """Student layer: teacher layer."""


class ObjectiveSection(Section):
    """The sum that training makes small."""

    task: TaskTermSection = TaskTermSection()
    """The loss on the labels."""
    logits: LogitsSection | None = LogitsSection()
    """The loss on predictions; null leaves it out."""
    features: FeaturesSection | None = FeaturesSection()
    """The loss on hidden states; null leaves it out."""
    baseline: Switch = False
    """true for plain fine-tuning: the student learns from the labels alone, the teacher at most gives it its start."""


class TrainingSection(Section):
    """How the student is trained."""

    epochs: Positive = 3.0
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Optimizer steps; ends training in place of `epochs`."""
    batch_size: Count = 32
    """Rows of one optimizer step, over all processes and accumulated batches."""
    per_device_batch_size: Count | None = None
    """Rows of one forward pass on one device; the whole batch, shared among the processes, unless given."""
    learning_rate: Positive = 5e-4
    """Highest step size of AdamW."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: Schedule = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_ratio: ShareBelowOne = 0.06
    """Share of all steps in which the learning rate rises from 0."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to this norm."""
    seed: Seed = 0
    """Seed of the student's start, the data order and dropout."""
    precision: Precision = "auto"
    """Number type of the forward passes; weights stay float32."""
    evaluations: Count = 5
    """Evaluations of one run, evenly spaced."""
    logging_steps: Count = 20
    """Steps between two lines of the log."""
    keep_checkpoints: Count = 2
    """Checkpoints that stay on disk."""
    report_to: tuple[Text, ...] = ()
    """Where else the log goes: tensorboard, wandb and others, as in transformers."""
    dataloader_workers: Annotated[Whole, Field(ge=0)] = 0
    """Processes that prepare batches; 0 prepares them in the main process."""
    resume: Switch = True
    """Go on from the last checkpoint in the run folder."""


class CompareSection(Section):
    """Methods and seeds of a comparison."""

    methods: tuple[Text, ...] = ()
    """Names of the methods; all unless given."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Values of training.seed that every method runs with."""
    search: dict[Text, tuple[Scalar, ...]] = {}
    """Recipe key: values to try for every method, chosen on the validation rows."""
