"""Sections of a recipe about its models: the teacher, the student and the unit scores."""

from typing import Literal

from flexkd.recipe.section import Attribution, ChosenBy, Precision, Schedule, Section
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
    """Fine-tuning of the teacher on the task, before it teaches."""

    epochs: Positive = 3.0
    """Number of passes over the training rows."""
    max_minutes: Positive | None = None
    """Time limit in minutes: the number of steps is lowered to what the pace of the first ten steps allows; null sets
    no limit."""
    batch_size: Count = 32
    """Rows of one optimizer step, over all processes."""
    per_device_batch_size: Count | None = None
    """Rows of one forward pass on one device, a divisor of batch_size; null takes the whole batch in one pass."""
    learning_rate: Positive = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay of AdamW."""
    schedule: Schedule = "linear"
    """Learning rate after the warm-up: linear (falls to 0 in a line), cosine (falls to 0 in half a cosine) or
    constant."""
    warmup_ratio: ShareBelowOne = 0.06
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    seed: Seed = 0
    """Seed of the teacher's fine-tuning; independent of training.seed, so that students of all seeds share one
    teacher."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    evaluations: Count = 3
    """Number of evaluations, evenly spaced; the best checkpoint is kept."""


class TeacherSection(Section):
    """The model that teaches."""

    model: Text
    """Teacher model: a folder, a hub id or package:IMPORT_NAME/SUB/PATH; a language model may also be a .gguf file."""
    adapter: Text | None = None
    """PEFT adapter of the teacher, a folder or a hub id, merged into the model in memory; null for none."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold the teacher's weights in 8 or 4 bits (8bit or 4bit, with bitsandbytes) to save memory; null keeps them as
    stored."""
    tokenizer: Text | None = None
    """Tokenizer of the teacher, a folder or a hub id; null takes that of its model."""
    fine_tune: FineTune | None = None
    """Fine-tune the teacher on the task first; {} takes the defaults, null uses the teacher as it is."""
    precision: Precision = "auto"
    """Number type of the teacher's forward passes; auto takes the fastest that this machine supports well."""
    allow_weak: Switch = False
    """Continue with a teacher that is no better on the validation rows than an answer without any model; false
    stops."""
    cache: Text = "auto"
    """Where the teacher's answers to all rows are stored and read again: always, never, auto (if rows are used more
    than once and the answers take at most 4 GiB) or a folder. Without a folder, they are in `cache` of the run
    folder."""
    cache_storage: Literal["float16", "int8"] = "float16"
    """Number type of stored hidden states; int8 is smaller, and only for losses that do not depend on the scale of a
    unit."""


class LoraSection(Section):
    """LoRA training of the student: low-rank updates instead of all weights, merged into the saved student."""

    rank: Count = 16
    """Rank of each update."""
    alpha: Positive = 32.0
    """Scale of the updates, which are multiplied by alpha / rank."""
    dropout: ShareBelowOne = 0.0
    """Share of the inputs of an update that is dropped in training."""
    target_modules: Literal["all-linear"] | tuple[Text, ...] = "all-linear"
    """Modules that get updates: all-linear (every linear layer but the head), or a list of module names."""


class StudentSection(Section):
    """The model that learns: cut from the teacher, a pretrained model, or new weights in the shape of a config."""

    start: Literal["slice", "pretrained", "config"] = "slice"
    """Where the student's weights come from: slice (cut from the teacher), pretrained (weights of `model`) or config
    (new random weights in the shape of `model`)."""
    model: Text | None = None
    """Model of start: pretrained or config, written like teacher.model."""
    tokenizer: Text | None = None
    """Tokenizer of the student; null takes that of a pretrained model, else the teacher's."""
    vocabulary: Count | Literal["auto"] | None = None
    """Tokens that the student knows, of those of its teacher: auto (those that the training rows use, with all
    characters and special tokens), a number of them, or null for all. A text with other tokens is split into more of
    them, and nothing of it is lost; the teacher reads that split too while it teaches."""
    basis: Literal["auto", "coordinates", "rotated"] = "auto"
    """What a slice keeps of the hidden state: coordinates (units) or rotated (PCA directions, for RMSNorm families).
    auto takes rotated for tasks that write text, if the teacher's family can be rotated, else coordinates."""
    chosen_by: ChosenBy | Literal["auto", "mixed"] = "auto"
    """Which units or directions a slice keeps: those with the highest scores, the most variance, the largest mean
    activation, random ones or those with the lowest scores. The score of a direction is its variance times how much the
    output depends on it, or under scores.layer: all the size of gradient times state along it. mixed keeps the leading
    directions of variance and dependence added up. auto takes scores for units and under scores.layer: all, and mixed
    for directions, or variance where no class or token is predicted."""
    function_share: Positive = 1.0
    """Weight of the output's dependence on a direction, of chosen_by: mixed; the variance has weight 1."""
    lora: LoraSection | None = None
    """Train low-rank updates instead of all weights; {} takes the defaults, null trains all weights."""
    hidden_size: Count | None = None
    """Units of the hidden state; null takes the teacher's number."""
    num_layers: Count | None = None
    """Number of blocks, of an encoder-decoder those of the decoder; null takes the teacher's number."""
    num_encoder_layers: Count | None = None
    """Number of blocks of the encoder of an encoder-decoder; null takes a number in proportion to num_layers."""
    num_heads: Count | None = None
    """Number of attention heads; null derives it from hidden_size."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads of grouped-query attention; null derives it from num_heads."""
    intermediate_size: Count | None = None
    """Units of the feed-forward layers; null derives it from hidden_size."""
    size: Share | None = None
    """Share of the teacher's parameters that the student has; the whole shape is derived from it."""
    max_parameters: ParameterCount | None = None
    """Largest number of parameters, like 30M; the whole shape is derived from it."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the saved weights; bfloat16 takes half the space, and the student is evaluated as it is saved."""
    calibration_rows: Count = 256
    """Number of training rows that measure which heads, feed-forward units and blocks matter most."""
    start_seed: Seed | None = None
    """Seed by which the calibration rows and the rows of the scores are drawn from the training rows; null takes the
    first ones. A comparison gives every seed its own, see compare.starts."""


class ScoresSection(Section):
    """The unit scores: how much the task uses each unit of the teacher."""

    target: Literal["log_prob", "logit", "predicted_logit"] = "log_prob"
    """What the influence of a unit is measured on: log_prob (the log-probability of the label), logit (the logit of the
    label) or predicted_logit (the logit of the teacher's prediction)."""
    attribution: Attribution = "gradient"
    """How the influence is measured: gradient, gradient_x_activation or fisher."""
    layer: Layers = -1
    """Layer or list of layers whose units are scored: -1 is the state that the head reads, 1..N the state after that
    block, all every block, of which a unit's share of the scores is averaged. A student is cut by the scores of -1
    where it is listed, else by those of the highest layer, in whatever order they are listed."""
    rows: Count | None = 2000
    """Number of training rows that are used for scoring; null takes all. Scores of directions read this key; with
    layer: all they read layer and target as well."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers by number; empty for all."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,) if isinstance(self.layer, int) else ()
