"""Sections of the two models: the teacher, the student, and the scores of the teacher's units."""

from typing import Literal

from flexkd.recipe.section import Attribution, Precision, Schedule, Section
from flexkd.recipe.values import (
    Count,
    Layers,
    NotNegative,
    ParameterCount,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Switch,
    Text,
)


class FineTune(Section):
    """How the teacher learns the task before it teaches."""

    epochs: Positive = 3.0
    """Passes over the training rows."""
    max_minutes: Positive | None = None
    """Ends the fine-tuning in time: its number of steps follows from the pace of the first ten."""
    batch_size: Count = 32
    """Rows of one optimizer step, over all processes."""
    per_device_batch_size: Count | None = None
    """Rows of one forward pass; the whole batch unless given."""
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
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass: less memory, more time."""
    evaluations: Count = 3
    """How often the teacher is evaluated; the best of them is kept."""


class TeacherSection(Section):
    """The model that teaches."""

    model: Text
    """Teacher: a folder, a hub id or package:IMPORT_NAME/SUB/PATH; a language model may also be a .gguf file."""
    adapter: Text | None = None
    """PEFT adapter of the teacher, a folder or a hub id; it is merged into the model in memory."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold the teacher's weights in 8 or 4 bits (bitsandbytes); it teaches by predictions and features as always."""
    tokenizer: Text | None = None
    """Tokenizer of the teacher; that of its model unless given."""
    fine_tune: FineTune | None = None
    """Train the teacher on the task first; {} takes the defaults, null leaves it as it is."""
    precision: Precision = "auto"
    """Number type of the teacher's forward passes."""
    allow_weak: Switch = False
    """Go on with a teacher that is shown to be no better on the validation rows than an answer without a model."""
    cache: Text = "auto"
    """Whether the teacher's answers to all rows are stored and read again: always, never, auto (where rows come back
    and the answers take at most 4 GiB) or a folder; they stand in `cache` of the run folder unless one is given."""
    cache_storage: Literal["float16", "int8"] = "float16"
    """Number type of stored hidden states; int8 only for losses that no scale of a unit changes."""


class LoraSection(Section):
    """Low-rank updates of the student in place of all its weights; they are merged into the saved student."""

    rank: Count = 16
    """Rank of each update."""
    alpha: Positive = 32.0
    """Scale of the updates, divided by the rank."""
    dropout: ShareBelowOne = 0.0
    """Share of the inputs of an update that is dropped in training."""
    target_modules: Literal["all-linear"] | tuple[Text, ...] = "all-linear"
    """Which matrices are updated: all-linear (all but the head), or their names."""


class StudentSection(Section):
    """The model that learns: cut out of the teacher, given by name, or fresh from a config."""

    start: Literal["slice", "pretrained", "config"] = "slice"
    """slice (cut out of the teacher), pretrained (weights of `model`) or config (fresh, shaped like `model`)."""
    model: Text | None = None
    """Model of start: pretrained or config, given like teacher.model."""
    tokenizer: Text | None = None
    """Tokenizer of the student; unless given, that of a pretrained model, else the teacher's."""
    basis: Literal["auto", "coordinates", "rotated"] = "auto"
    """What a slice keeps of the hidden state: coordinates (the best units) or rotated (the directions that hold most of
    it, RMSNorm families). auto: rotated where text is written and the teacher's family can, else coordinates."""
    lora: LoraSection | None = None
    """Train low-rank updates instead of all weights; {} takes the defaults."""
    hidden_size: Count | None = None
    """Units of the hidden state; the teacher's unless given."""
    num_layers: Count | None = None
    """Number of blocks, of an encoder-decoder those of the decoder; the teacher's unless given."""
    num_encoder_layers: Count | None = None
    """Number of blocks of the encoder, where there is one; in the proportion of num_layers unless given."""
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
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the saved weights; bfloat16 is half as large, and the student is judged with what it rounds to."""
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
