"""Sections of a recipe about its runs: the objective, the training, the comparison and the upload."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from flexkd.models.loading.hub import repo_fault
from flexkd.recipe.section import ChosenBy, FeatureLoss, LogitLoss, Precision, Schedule, Section
from flexkd.recipe.values import (
    LIST,
    MAPPING,
    Count,
    LayerMap,
    LogitChunk,
    MethodPair,
    Methods,
    NotNegative,
    Number,
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
    """The task term of the objective: the loss on the labels."""

    weight: NotNegative = 1.0
    """Factor of this term in the objective; 0 leaves it out."""
    label_smoothing: ShareBelowOne = 0.0
    """Share of the probability that is spread over all classes; single_label and generation."""


class LogitsSection(Section):
    """The logit term of the objective: the loss between the predictions of teacher and student."""

    loss: LogitLoss = "forward_kl"
    """Divergence between the two distributions; mse belongs to regression."""
    weight: NotNegative = 1.0
    """Factor of this term in the objective; 0 leaves it out."""
    temperature: Positive = 2.0
    """Divides the logits of both models in this loss; it has no part in how text is generated. Default: 2, or 1 for
    regression and where text is written."""
    beta: UnitInterval | None = None
    """Teacher's share of the mixture in jensen_shannon; null takes 0.5."""
    alpha: ShareBelowOne | None = None
    """Share of a model's own distribution in the mixture of skew_kl and skew_reverse_kl; null takes 0.1."""
    top_k: Count | None = None
    """Number of the teacher's most likely outputs that are compared one by one, with all others as one; null compares
    all. Only where text is written."""
    entropy_share: Share | None = None
    """Share of the predictions of each forward pass, rounded up, that are compared: those with the largest entropy of
    the student's outputs, of which it is least certain; null compares all."""


class ProjectorSection(Section):
    """The learned map from the student's states to the teacher's, for losses that need one."""

    learning_rate: Positive | None = None
    """Peak learning rate of the projector, under the schedule of the training; null takes the student's."""
    standardize: Switch = False
    """Divide each teacher unit by its deviation over the calibration rows, so that the largest units do not decide
    alone; a unit that does not vary is taught as 0."""
    start: Literal["random", "cut", "heads"] = "random"
    """Where the projector begins: random weights, cut (the map that gives the teacher's states back from the units or
    directions that the student was cut along) or heads (the map after which the teacher's head predicts what the
    student's own head predicts; only where text is written)."""


class FeaturesSection(Section):
    """The feature term of the objective: the loss between the hidden states of teacher and student."""

    loss: FeatureLoss = "correlation"
    """Distance between the two sets of hidden states."""
    weight: NotNegative = 1.0
    """Factor of this term in the objective; 0 leaves it out."""
    fade: Share | None = None
    """Share of the steps over which the weight falls in a line to 0. After it the term is not computed, and the
    teacher's states are not read; `flexkd plan` counts both in every step. null keeps the weight."""
    positions: Literal["tokens", "supervised"] = "tokens"
    """Positions whose states are compared: tokens (all real tokens) or supervised (only those that a label is predicted
    from). Default: tokens, or supervised where text is written."""
    basis: Literal["auto", "units", "directions"] = "auto"
    """What is taught: units or directions of the teacher's state; auto takes what the student is cut by, and units for
    one that is not cut."""
    chosen_by: ChosenBy | None = None
    """Which units or directions are taught, as in student.chosen_by; null takes those that the student is cut by, and
    scores for one that is not cut. Others than those of a cut need mapping: matched, under which null takes scores
    where the cut is mixed."""
    mapping: Literal["index", "score", "matched"] = "index"
    """How student units are paired with taught teacher units: index (in the order of their numbers), score (in the
    order of their scores) or matched (by how similar they are)."""
    units: Count | None = None
    """Number of teacher units that are taught; null takes as many as the student has."""
    coverage: Share | None = None
    """Share that the taught units or directions must hold, in place of `units`: of the total score, or of what
    directions are ranked by."""
    layer_map: LayerMap = Field(default={-1: -1})
    """Student layer: teacher layer, for each pair of layers that is compared; -1 is the state that the head reads, 1..N
    the state after that block."""
    projector: ProjectorSection | None = None
    """How the projector begins and learns, for loss: projector; null takes the defaults."""


class ObjectiveSection(Section):
    """The objective: the weighted sum of losses that training minimizes."""

    task: TaskTermSection = TaskTermSection()
    """The loss on the labels."""
    logits: LogitsSection | None = LogitsSection()
    """The loss on the predictions; null leaves it out."""
    features: FeaturesSection | None = FeaturesSection()
    """The loss on the hidden states; null leaves it out."""
    baseline: Switch = False
    """true for plain fine-tuning: the student learns from the labels alone, and the teacher is at most its start."""


class EarlyStoppingSection(Section):
    """When training ends before its last step: a validation metric no longer improves. The best checkpoint is kept."""

    patience: Count = 2
    """Number of evaluations without an improvement after which training ends; training.evaluations must be larger than
    this number plus one."""
    metric: Text | None = None
    """Figure of the validation rows that is watched: loss (the value of the objective) or a metric that is computed
    there; null takes the one that the best checkpoint is chosen by: task.metric, or nll where text is written and
    generation.validation_rows is null."""
    min_delta: NotNegative = 0.0
    """An improvement is larger than this, over the best value that counted as one."""


class TrainingSection(Section):
    """The training of the student."""

    epochs: Positive = 3.0
    """Number of passes over the training rows."""
    max_steps: Count | None = None
    """Number of optimizer steps, in place of `epochs`; null trains for `epochs`."""
    max_minutes: Positive | None = None
    """Time limit in minutes: the number of steps is lowered to what the pace of the first ten steps allows; null sets
    no limit."""
    early_stopping: EarlyStoppingSection | None = None
    """End before the last step where a validation metric no longer improves; {} takes the defaults, null trains all
    steps. Schedule, warm-up and fade stay those of all steps."""
    batch_size: Count = 32
    """Rows of one optimizer step, over all processes and accumulated batches."""
    per_device_batch_size: Count | None = None
    """Rows of one forward pass on one device, a divisor of batch_size; null divides the whole batch among the
    processes."""
    learning_rate: Positive = 5e-4
    """Peak learning rate of AdamW."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: linear (falls to 0 in a line), cosine (falls to 0 in half a cosine) or
    constant."""
    warmup_ratio: ShareBelowOne = 0.06
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    max_grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    seed: Seed = 0
    """Seed of the student's start, the order of the rows and dropout."""
    precision: Precision = "auto"
    """Number type of the forward passes; weights stay float32. auto takes the fastest that this machine supports
    well."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    logit_chunk: LogitChunk = "auto"
    """Number of predictions whose logits are in memory together, where text is written: auto (fewer where a batch needs
    it), off (all) or a number."""
    compile: Switch = False
    """Compile the blocks of the student: faster steps on a GPU, after minutes of compiling."""
    packing: Switch = False
    """Put the rows of a batch into one sequence without padding, for decoders: saves time on a GPU with variable-length
    attention, not on a CPU."""
    evaluations: Count = 5
    """Number of evaluations in a run, evenly spaced."""
    logging_steps: Count = 20
    """Number of steps between two lines of the log."""
    keep_checkpoints: Count = 2
    """Number of checkpoints that are kept on disk."""
    report_to: tuple[Text, ...] = ()
    """Other places for the log: tensorboard, wandb and others, as in transformers."""
    dataloader_workers: Annotated[Whole, Field(ge=0)] = 0
    """Number of processes that prepare batches; 0 prepares them in the main process."""
    resume: Switch = True
    """Continue from the last checkpoint in the run folder."""


class PushSection(Section):
    """The upload of the finished student, with its card. The token is that of `hf auth login` or HF_TOKEN."""

    repo: Text
    """Repository, as owner/name, or a name below the owner of the token; made where it does not exist."""
    private: Switch | None = None
    """Whether only its owner sees the repository. null leaves it to the hub: a new one is public, unless the owner's
    settings say otherwise. true refuses one that is public."""
    revision: Text | None = None
    """Branch, made where it does not exist; null takes the main one."""

    @field_validator("repo")
    @classmethod
    def _names_a_repository(cls, repo: str) -> str:
        if fault := repo_fault(repo):
            raise ValueError(fault)
        return repo


class RivalsSection(Section):
    """What could be used in place of the student, measured beside it by `flexkd distill` on the same test rows."""

    int8_teacher: Switch = False
    """Measure the teacher with its linear layers in int8, by torch's dynamic quantization: nothing is trained. On a CPU
    alone."""
    models: tuple[Text, ...] = ()
    """Small models off the shelf, written like teacher.model: each is fine-tuned on the rows and labels that the
    student learns from, for as many steps and with the settings of `training`, and kept for later runs."""
    learning_rate: Positive = 5e-5
    """Peak learning rate of their fine-tuning; that of a student cut from its teacher would be too high for them."""


_RANGE: Final = "Write it as {low: 1e-5, high: 1e-2, log: true}."


class SearchRange(Section):
    """A range of numbers that a search draws from."""

    low: Number
    """The lowest number."""
    high: Number
    """The highest number."""
    log: Switch = False
    """Draw as many numbers from each order of magnitude, as for a learning rate."""
    step: Positive | None = None
    """Distance between the numbers that can be drawn, counted from the lowest; null draws any."""

    @model_validator(mode="before")
    @classmethod
    def _has_its_keys(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            missing = [name for name in ("low", "high") if name not in values]
            unknown = [str(name) for name in values if name not in cls.model_fields]
            if missing or unknown:
                what = f"names no {' and no '.join(missing)}" if missing else f"has an unknown key {unknown[0]!r}"
                raise ValueError(f"a range {what}. {_RANGE}")
        return values

    @model_validator(mode="after")
    def _is_a_range(self) -> "SearchRange":
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}. {_RANGE}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} has no logarithm. Give one above 0, or set log: false.")
        if self.log and self.step is not None:
            raise ValueError(f"step {self.step:g} beside log: true. Keep one of the two.")
        if self.step is not None and self.low + self.step > self.high:
            raise ValueError(f"step {self.step:g} leads from low {self.low:g} beyond high {self.high:g}. Lower it.")
        return self

    @property
    def last(self) -> float:
        """The highest number that can be drawn."""
        if self.step is None:
            return self.high
        return self.low + self.step * int((self.high - self.low) / self.step + 1e-9)


_Choices = Annotated[
    Annotated[tuple[Scalar, ...], Tag(LIST)] | Annotated[SearchRange, Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, Mapping | SearchRange) else LIST),
]


class CompareSection(Section):
    """The comparison of methods that `flexkd compare` runs."""

    methods: Methods = ()
    """Names of the methods; or, for each name, a list of the KEY=VALUE that it changes in this recipe, or null for the
    built-in method of that name. Default: the baselines and the method of the recipe."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Values of training.seed; every method runs with each. No difference can be significant with fewer than 6 seeds
    and one contrast, 7 and two or three, 8 and four to six. Seeds that are added or left out after the first student
    is finished are marked."""
    starts: Literal["by_seed", "shared"] | None = None
    """What a seed is: by_seed draws the calibration rows and the rows of the scores anew for each seed, the same for
    all methods; with shared, seeds differ in the order of the rows and in dropout alone. null takes by_seed, or shared
    where the folder has students of an earlier version."""
    contrasts: tuple[MethodPair, ...] = ()
    """Pairs of a method and its reference whose difference is judged, corrected for their number; exploratory if they
    are named after the first student is finished. Default: every method against fine_tuning, or else the first one."""
    search: dict[Text, _Choices] = Field(default={})
    """Recipe key: values to try for every method, as a list or a range; the best on the validation rows is used.
    Default: `flexkd compare` searches nothing, `flexkd tune` learning rate, feature weight and temperature."""
    trials: Count | None = None
    """Number of students that a search trains for each method; null trains one for every combination where `search`
    holds lists alone, else 12."""
    pruning: Switch | None = None
    """Stop a trial whose validation metric falls behind the median of the earlier ones at the same step; null does so
    unless every combination is tried."""

    @property
    def definitions(self) -> dict[str, tuple[str, ...]]:
        """The methods that the recipe itself defines: name -> overrides of the recipe."""
        methods = self.methods if isinstance(self.methods, dict) else {}
        return {name: overrides for name, overrides in methods.items() if overrides is not None}


class SizesSection(Section):
    """The sizes at which `flexkd sizes` distils the recipe."""

    key: Literal["size", "hidden_size", "num_layers"] = "size"
    """Key of `student` that the sizes differ in; keys of its shape that follow from it are left out."""
    values: tuple[Positive, ...] = ()
    """The sizes: shares of the teacher's parameters, or values of the other key, two or more. Default: 0.1, 0.2, 0.35
    and 0.5; the other keys have none."""
    seeds: tuple[Seed, ...] = ()
    """Values of training.seed; every size runs with each. Default: training.seed alone."""
    keep: Share = 0.95
    """Share of the teacher's metric that a student has to keep; the page names the smallest size that does."""
