"""Sections of the work: the objective, how the student is trained, and what a comparison runs."""

from typing import Annotated, Literal

from pydantic import Field

from flexkd.recipe.section import FeatureLoss, LogitLoss, Precision, Schedule, Section
from flexkd.recipe.values import (
    Count,
    Layer,
    LogitChunk,
    NotNegative,
    Positive,
    Scalar,
    Seed,
    Share,
    ShareBelowOne,
    Switch,
    Text,
    UnitInterval,
    Whole,
)


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
    """Divides the logits of both models in this loss alone; it has no part in how text is generated. 1
    unless given where text is written."""
    beta: UnitInterval | None = None
    """Teacher's share of the mixture in jensen_shannon; 0.5 unless given."""
    alpha: ShareBelowOne | None = None
    """Share of the own distribution in skew_kl and skew_reverse_kl; 0.1 unless given."""
    top_k: Count | None = None
    """The teacher's likeliest outputs that are read, all others as one; all unless given. Where text is written."""


class FeaturesSection(Section):
    """The loss between the hidden states of teacher and student."""

    loss: FeatureLoss = "correlation"
    """Distance between the two sets of hidden states."""
    weight: NotNegative = 1.0
    """Factor of this term in the objective."""
    positions: Literal["tokens", "supervised"] = "tokens"
    """tokens (all real tokens) or supervised (only the positions that a label is read from); supervised
    unless given where text is written."""
    basis: Literal["units", "tangent"] = "units"
    """units (the highest scores) or tangent (the directions that move the output most)."""
    mapping: Literal["index", "score", "matched"] = "index"
    """Which student unit meets which teacher unit."""
    units: Count | None = None
    """Number of teacher units that are taught; as many as the student has unless given."""
    coverage: Share | None = None
    """Share of the score that the taught units must hold, in place of `units`."""
    layer_map: dict[Layer, Layer] = Field(default={-1: -1})
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
    max_minutes: Positive | None = None
    """Ends training in time: the number of steps follows from the pace of the first ten; a limit beside the others."""
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
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass: less memory, more time."""
    logit_chunk: LogitChunk = "auto"
    """Predictions whose logits stand in memory together where text is written: auto (where a batch needs it), off
    (all), or a number."""
    compile: Switch = False
    """Compile the blocks of the student: faster steps on a GPU, after minutes of compiling."""
    packing: Switch = False
    """Rows of a batch in one sequence without padding, for decoders: saves time on a GPU with attention of variable
    length, not on a CPU."""
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
    search: dict[Text, tuple[Scalar, ...]] = Field(default={})
    """Recipe key: values to try for every method, chosen on the validation rows."""
