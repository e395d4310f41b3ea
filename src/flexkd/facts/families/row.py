"""What a row of the families table says: where the hidden state lies, and what each axis of each weight means."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from flexkd.errors import UnsupportedModelError

Axis = (
    Literal[
        "residual",
        "embedding",
        "heads",
        "kv_heads",
        "cross_heads",
        "each_head",
        "feed_forward",
        "pooled",
        "query_key_value",
        "query_key_value_by_head",
        "gate_up",
    ]
    | None
)
"""What one axis of a weight counts: units of the residual stream, the width of the embeddings (residual where both are
equal), query heads x head_dim, key-value heads x head_dim, heads x head_dim of the attention over a source, query heads
(one number for each, by the first block for all blocks), feed-forward units, units of the dense layer between state and
classes; None is kept whole (vocabulary, positions, classes, one head's dimensions). Fused ones: see `PARTS`; by head,
the query, key and value of the first head lie before those of the second.
"""

PARTS: Final[Mapping[Axis, tuple[Axis, ...]]] = MappingProxyType(
    {
        "query_key_value": ("heads", "kv_heads", "kv_heads"),
        "gate_up": ("feed_forward", "feed_forward"),
    }
)
"""What lies on a fused axis, one part after the other."""

Axes = tuple[Axis, ...]
"""Axes of a weight, outputs before inputs."""

Modules = Mapping[str, Axes]
"""Axes of the weights of modules, by their paths."""

Task = Literal["classification", "causal", "seq2seq"]

_SCORE: Final = "score"
"""Name of the classifier of decoders: one linear layer beside the body."""

CLASS_SUFFIXES: Final[Mapping[Task, tuple[str, ...]]] = MappingProxyType(
    {
        "classification": ("ForSequenceClassification",),
        "causal": ("ForCausalLM", "LMHeadModel"),
        "seq2seq": ("ForConditionalGeneration",),
    }
)
"""Endings of the names of the classes that are built for a task."""

WHAT_TO_DO: Final = (
    "Start the student from a model or a config instead (student.start: pretrained or config): "
    "distilling works with any architecture"
)

_NUMBER: Final = re.compile(r"\.(\d+)\.")
_PLACE: Final = re.compile(r"\.(\d+|\*)\.")


@dataclass(frozen=True)
class Traits:
    """What is true of an architecture whether or not a student can be cut out of it.

    Attributes:
        kind: Whether each token sees those after it (`encoder`), only those before it (`decoder`), or a source that
            another stack of blocks reads (`encoder_decoder`).
        positions: How positions are encoded: in a table that is counted from 0 (`learned`) or from the padding id + 1
            (`after_padding`), as angles (`rotary`), or as distances in buckets, the last of which has no end
            (`relative`).
        overflows_in_float16: Trained in bfloat16: its feed-forward states pass float16's largest number, 65504, and the
            logits become NaN.
        reads_row_end: Its classifier is an encoder-decoder: the decoder reads the row once more, and the head its state
            at the last end of text.
        ties_head_alone: Encoder and decoder share their embeddings in any case, so that `tie_word_embeddings` concerns
            the head alone.
        num_unnamed_labels: Labels of a config that names none.
    """

    kind: Literal["encoder", "decoder", "encoder_decoder"] = "decoder"
    positions: Literal["learned", "after_padding", "rotary", "relative"] = "learned"
    overflows_in_float16: bool = False
    reads_row_end: bool = False
    ties_head_alone: bool = False
    num_unnamed_labels: int = 2


@dataclass(frozen=True)
class Stack:
    """Blocks that a state passes one after the other.

    Attributes:
        path: Path of the list of blocks, from the task model.
        value: The projection whose output the heads mix, alone or fused, as a pattern of `Family.modules`.
        layers_key: Config key of their number; the other keys likewise.
    """

    path: str
    value: str
    layers_key: str
    heads_key: str
    intermediate_key: str

    def block(self, number: int) -> str:
        """Path of one block, counted from 0."""
        return f"{self.path}.{number}"

    def holds(self, name: str) -> bool:
        """Whether a module or parameter is in one of the blocks."""
        return name.startswith(f"{self.path}.")


@dataclass(frozen=True)
class Family:
    """One architecture: paths to its hidden state, keys of its config, axes of its weights.

    Attributes:
        tasks: Task models whose weights are all described here.
        traits: What is true of architectures without a row as well.
        can_rotate: Its residual stream can be rotated into another basis: each norm is directly before the matrices
            that read it, and does not centre. `rotate_teacher` checks it.
        body: Path of the body below the task model; empty where the task model is the body, too.
        blocks: Path, inside the body, of the list of blocks; of two stacks the one that leads to the head.
        last_state: Path, inside the body, of the module whose output is the last state that the head reads; empty for
            the body itself.
        reads: Position of the last state that a classification head reads: the first, or the last token that is not
            padding.
        norm: Whether the norms on the residual stream centre ("layer") or not ("rms").
        value: The projection whose output the heads mix, alone or fused, as a pattern of `modules`.
        cross_value: The same of the attention over a source.
        encoder: The blocks that read the source, on the same residual units as the decoder's.
        encoder_is_deepest: The cache of transformers has a place for each block of the encoder, so that a decoder with
            more blocks cannot generate.
        modules: Module pattern (`*` stands for a block's number) to the axes of its weight. A bias has the weight's
            first axis. A module with one axis is a norm.
        transposed: Patterns of the modules that store their weight inputs first, as GPT-2's Conv1D.
        hidden_key: Config key of the width; the other keys likewise. A family without key-value heads of
            its own has None, and so has one whose head_dim is always hidden_size / heads.
        intermediate_multiple: Feed-forward units per unit of the width where the config says nothing.
        heads_divide_width: The config refuses a width that is no multiple of the number of heads.
        block_lists: Config keys of lists with one entry for each block, as its kind of attention.
        block_scale_key: Config key of a switch that makes a block's work depend on its number.
        norm_offset: What every norm adds to its weight before it multiplies by it.
        width_powers: Module pattern to p: the model's code multiplies the module's output by `width ** p`.
        width_powers_key: Config key of the switch for that; None where it is always so.
        width_keys: Other config keys that have to say the width.
        final_norm: Path, from the task model, of the norm that the head reads, with a star the last block's; None where
            that may be missing.
        final_norm_key: Config key that is false where that norm is missing; None where it never is.
        keeps_first_block: The first block is built in another way than the others, so that none takes its place.
        pooling_key: Config key that is `mean` where a classification head reads the mean of all tokens.
    """

    model_type: str
    tasks: tuple[Task, ...]
    body: str
    blocks: str
    last_state: str
    reads: Literal["first", "last_token"]
    norm: Literal["layer", "rms"]
    value: str
    modules: Modules
    traits: Traits = Traits()
    can_rotate: bool = False
    cross_value: str | None = None
    encoder: Stack | None = None
    encoder_is_deepest: bool = False
    transposed: frozenset[str] = frozenset()
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = None
    intermediate_key: str = "intermediate_size"
    intermediate_multiple: int | None = None
    head_dim_key: str | None = None
    embedding_key: str | None = None
    heads_divide_width: bool = False
    block_lists: tuple[str, ...] = ("layer_types",)
    block_scale_key: str | None = None
    norm_offset: float = 0.0
    width_powers: Mapping[str, float] = field(default_factory=dict)
    width_powers_key: str | None = None
    width_keys: tuple[str, ...] = ()
    final_norm: str | None = None
    final_norm_key: str | None = None
    keeps_first_block: bool = False
    pooling_key: str | None = None

    @property
    def stack(self) -> Stack:
        """The blocks that lead to the head."""
        return Stack(self.path(self.blocks), self.value, self.layers_key, self.heads_key, self.intermediate_key)

    @property
    def classifies(self) -> bool:
        """Whether a classifier can be cut out of it, and not only a language model."""
        return "classification" in self.tasks

    @property
    def classifier_head(self) -> tuple[str, ...]:
        """Modules between the last state of a classifier and its classes, the last one last; none without one."""
        if not self.classifies:
            return ()
        return tuple(name for name, axes in self.modules.items() if "pooled" in axes or name == _SCORE)

    @property
    def head_reads_embedding_width(self) -> bool:
        """Whether the head reads states as wide as the embeddings: where that is not the stream's width, projected."""
        return any(self.modules.get(head, ())[1:] == ("embedding",) for head in ("lm_head", _SCORE))

    @property
    def has_fixed_head_dim(self) -> bool:
        """Whether a head is always hidden_size / heads wide, so that a cut width must be a multiple of that."""
        return self.head_dim_key is None

    def path(self, inner: str) -> str:
        """Path, from the task model, of what lies inside the body."""
        return ".".join(part for part in (self.body, inner) if part)

    def reads_source(self, module: str) -> bool:
        """Whether a module works on the source, not on the target."""
        return self.encoder is not None and module.startswith(f"{self.encoder.path.rpartition('.')[0]}.")

    def read_positions(self, config: object) -> Literal["first", "last_token", "all"]:
        """Positions of the last state that the classification head of such a config reads."""
        is_mean = self.pooling_key is not None and getattr(config, self.pooling_key) == "mean"
        return "all" if is_mean else self.reads

    def module_axes(self, module: str, config: object) -> Axes | None:
        """Axes of a module's weight, with the width of the embeddings resolved; None when no pattern matches."""
        axes = self.modules.get(module_pattern(module))
        if axes is None or self.embedding_key is None:
            return axes
        embedding: Axis = "residual" if is_residual_embedding(self, config) else None
        return tuple(embedding if axis == "embedding" else axis for axis in axes)

    def parameter_axes(self, parameter: str, config: object) -> Axes:
        """Axes of a parameter as it is stored.

        Raises:
            UnsupportedModelError: No pattern matches: the model is not the architecture that it says it is.
        """
        module, _, leaf = parameter.rpartition(".")
        axes = self.module_axes(module, config)
        if axes is None or leaf not in ("weight", "bias"):
            raise UnsupportedModelError(
                f"models.families: parameter '{parameter}' is not part of a {self.model_type} model as flexkd knows "
                f"it. {WHAT_TO_DO}."
            )
        if leaf == "bias":
            return axes[:1]
        return axes[::-1] if self.is_transposed(module) else axes

    def is_transposed(self, module: str) -> bool:
        """Whether a module stores its weight inputs first."""
        return module_pattern(module) in self.transposed

    def modules_with(self, *axes: Axis, stack: Stack | None = None) -> list[str]:
        """Patterns of the modules, of one stack or of all, whose weight has exactly these axes, outputs first."""
        patterns = [pattern for pattern, weight_axes in self.modules.items() if weight_axes == axes]
        return patterns if stack is None else [pattern for pattern in patterns if stack.holds(pattern)]

    def block_path(self, block: int) -> str:
        """Path, from the task model, of one of the blocks that lead to the head, counted from 0."""
        return self.stack.block(block)

    def is_for_all_blocks(self, module: str) -> bool:
        """Whether the first block alone has the module, for all of them: it stays when that block goes."""
        return "each_head" in self.modules.get(module_pattern(module), ())


def is_residual_embedding(family: Family, config: object) -> bool:
    """Whether the embeddings are as wide as the residual stream, so that no projection lies between them."""
    width = getattr(config, family.hidden_key)
    return family.embedding_key is None or bool(getattr(config, family.embedding_key, width) == width)


def block_number(name: str) -> int | None:
    """Number, from 0, of the block that a module or parameter belongs to; None outside the blocks."""
    match = _NUMBER.search(name)
    return None if match is None else int(match.group(1))


def with_block_number(name: str, block: int) -> str:
    """The same module or parameter in another block; of a pattern, the one in this block."""
    return _PLACE.sub(f".{block}.", name, count=1)


def module_pattern(module: str) -> str:
    """The pattern that a module matches: its block's number becomes a star."""
    return _NUMBER.sub(".*.", f"{module}.", count=1)[:-1]


def under(prefix: str, modules: Modules) -> dict[str, Axes]:
    """The same modules below a path."""
    return {f"{prefix}.{name}": axes for name, axes in modules.items()}
