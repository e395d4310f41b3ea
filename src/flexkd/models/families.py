"""Architectures as data: where the hidden state lies, and what each axis of each weight means."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.errors import UnsupportedModelError

Axis = Literal["residual", "embedding", "heads", "kv_heads", "feed_forward", "pooled"] | None
"""What one axis of a weight counts: units of the residual stream, the width of the embeddings (residual where both are
equal), query heads x head_dim, key-value heads x head_dim, feed-forward units, units of the dense layer between state
and classes; None is kept whole (vocabulary, positions, classes, one head's dimensions)."""

Task = Literal["classification", "causal"]

CLASS_SUFFIXES: Final[Mapping[Task, str]] = MappingProxyType(
    {"classification": "ForSequenceClassification", "causal": "ForCausalLM"}
)

WHAT_TO_DO: Final = (
    "Start the student from a model or a config instead (student.start: pretrained or config): "
    "distilling works with any architecture"
)

_NUMBER: Final = re.compile(r"\.(\d+)\.")
_PLACE: Final = re.compile(r"\.(\d+|\*)\.")


@dataclass(frozen=True)
class Family:
    """One architecture: paths to its hidden state, keys of its config, axes of its weights.

    Attributes:
        tasks: Task models whose weights are all described here.
        body: Path of the body below the task model.
        blocks: Path, inside the body, of the list of blocks.
        last_state: Path, inside the body, of the module whose output is the last state that the head reads.
        reads: Position of the last state that a classification head reads: the first, or the last token that is not
            padding.
        norm: Whether the norms on the residual stream centre ("layer") or not ("rms").
        hidden_key: Config key of the width. The other keys name what they say; a family without key-value heads of
            its own has None, and so has one whose head_dim is always hidden_size / heads.
        value: The projection whose output the heads mix, as a pattern of `modules`.
        modules: Module pattern (`*` stands for a block's number) to the axes of its weight. A bias has the weight's
            first axis. A module with one axis is a norm.
        heads_divide_width: The config refuses a width that is no multiple of the number of heads.
    """

    model_type: str
    tasks: tuple[Task, ...]
    body: str
    blocks: str
    last_state: str
    reads: Literal["first", "last_token"]
    norm: Literal["layer", "rms"]
    value: str
    modules: Mapping[str, tuple[Axis, ...]]
    hidden_key: str = "hidden_size"
    layers_key: str = "num_hidden_layers"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = None
    intermediate_key: str = "intermediate_size"
    head_dim_key: str | None = None
    embedding_key: str | None = None
    heads_divide_width: bool = False

    def module_axes(self, module: str, config: PreTrainedConfig) -> tuple[Axis, ...] | None:
        """Axes of a module's weight, with the width of the embeddings resolved; None when no pattern matches."""
        axes = self.modules.get(_pattern(module))
        if axes is None or self.embedding_key is None:
            return axes
        embedding: Axis = "residual" if is_residual_embedding(self, config) else None
        return tuple(embedding if axis == "embedding" else axis for axis in axes)

    def parameter_axes(self, parameter: str, config: PreTrainedConfig) -> tuple[Axis, ...]:
        """Axes of a parameter.

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
        return axes if leaf == "weight" else axes[:1]

    def modules_with(self, *axes: Axis) -> list[str]:
        """Patterns of the modules whose weight has exactly these axes."""
        return [pattern for pattern, found in self.modules.items() if found == axes]

    def block_path(self, block: int) -> str:
        """Path, from the task model, of one block, counted from 0."""
        return f"{self.body}.{self.blocks}.{block}"


def is_residual_embedding(family: Family, config: PreTrainedConfig) -> bool:
    """Whether the embeddings are as wide as the residual stream, so that no projection stands between them."""
    return family.embedding_key is None or bool(
        getattr(config, family.embedding_key) == getattr(config, family.hidden_key)
    )


def block_number(name: str) -> int | None:
    """Number, from 0, of the block that a module or parameter belongs to; None outside the blocks."""
    found = _NUMBER.search(name)
    return None if found is None else int(found.group(1))


def with_block_number(name: str, block: int) -> str:
    """The same module or parameter in another block; of a pattern, the one in this block."""
    return _PLACE.sub(f".{block}.", name, count=1)


def _pattern(module: str) -> str:
    return _NUMBER.sub(".*.", f"{module}.", count=1)[:-1]


def _under(prefix: str, modules: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
    return {f"{prefix}.{name}": axes for name, axes in modules.items()}


_BERT_EMBEDDINGS: Final[Mapping[str, tuple[Axis, ...]]] = {
    "word_embeddings": (None, "embedding"),
    "position_embeddings": (None, "embedding"),
    "token_type_embeddings": (None, "embedding"),
    "LayerNorm": ("embedding",),
}
_BERT_BLOCK: Final[Mapping[str, tuple[Axis, ...]]] = {
    "attention.self.query": ("heads", "residual"),
    "attention.self.key": ("heads", "residual"),
    "attention.self.value": ("heads", "residual"),
    "attention.output.dense": ("residual", "heads"),
    "attention.output.LayerNorm": ("residual",),
    "intermediate.dense": ("feed_forward", "residual"),
    "output.dense": ("residual", "feed_forward"),
    "output.LayerNorm": ("residual",),
}
_DISTILBERT_BLOCK: Final[Mapping[str, tuple[Axis, ...]]] = {
    "attention.q_lin": ("heads", "residual"),
    "attention.k_lin": ("heads", "residual"),
    "attention.v_lin": ("heads", "residual"),
    "attention.out_lin": ("residual", "heads"),
    "sa_layer_norm": ("residual",),
    "ffn.lin1": ("feed_forward", "residual"),
    "ffn.lin2": ("residual", "feed_forward"),
    "output_layer_norm": ("residual",),
}
_LLAMA_BLOCK: Final[Mapping[str, tuple[Axis, ...]]] = {
    "self_attn.q_proj": ("heads", "residual"),
    "self_attn.k_proj": ("kv_heads", "residual"),
    "self_attn.v_proj": ("kv_heads", "residual"),
    "self_attn.o_proj": ("residual", "heads"),
    "mlp.gate_proj": ("feed_forward", "residual"),
    "mlp.up_proj": ("feed_forward", "residual"),
    "mlp.down_proj": ("residual", "feed_forward"),
    "input_layernorm": ("residual",),
    "post_attention_layernorm": ("residual",),
}
_QWEN3_NORMS: Final[Mapping[str, tuple[Axis, ...]]] = {"self_attn.q_norm": (None,), "self_attn.k_norm": (None,)}


def _bert_kind(model_type: str, head: Mapping[str, tuple[Axis, ...]], embedding_key: str | None = None) -> Family:
    embedding: Axis = "residual" if embedding_key is None else "embedding"
    embeddings = {
        name: tuple(embedding if axis == "embedding" else axis for axis in axes)
        for name, axes in _BERT_EMBEDDINGS.items()
    }
    return Family(
        model_type=model_type,
        tasks=("classification",),
        body=model_type,
        blocks="encoder.layer",
        last_state="encoder",
        reads="first",
        norm="layer",
        value=f"{model_type}.encoder.layer.*.attention.self.value",
        modules=_under(f"{model_type}.embeddings", embeddings)
        | _under(f"{model_type}.encoder.layer.*", _BERT_BLOCK)
        | dict(head),
        embedding_key=embedding_key,
    )


def _llama_kind(
    model_type: str, block: Mapping[str, tuple[Axis, ...]] = _LLAMA_BLOCK, heads_divide_width: bool = False
) -> Family:
    return Family(
        model_type=model_type,
        tasks=("classification", "causal"),
        body="model",
        blocks="layers",
        last_state="norm",
        reads="last_token",
        norm="rms",
        value="model.layers.*.self_attn.v_proj",
        modules=_under("model.layers.*", block)
        | {
            "model.embed_tokens": (None, "residual"),
            "model.norm": ("residual",),
            "score": (None, "residual"),
            "lm_head": (None, "residual"),
        },
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
        heads_divide_width=heads_divide_width,
    )


_DENSE_HEAD: Final[Mapping[str, tuple[Axis, ...]]] = {
    "classifier.dense": ("pooled", "residual"),
    "classifier.out_proj": (None, "pooled"),
}

_FAMILIES: Final = (
    _bert_kind("bert", {"bert.pooler.dense": ("pooled", "residual"), "classifier": (None, "pooled")}),
    _bert_kind("roberta", _DENSE_HEAD),
    _bert_kind(
        "electra", {**_DENSE_HEAD, "electra.embeddings_project": ("residual", None)}, embedding_key="embedding_size"
    ),
    Family(
        model_type="distilbert",
        tasks=("classification",),
        body="distilbert",
        blocks="transformer.layer",
        last_state="transformer",
        reads="first",
        norm="layer",
        value="distilbert.transformer.layer.*.attention.v_lin",
        modules=_under("distilbert.transformer.layer.*", _DISTILBERT_BLOCK)
        | {
            "distilbert.embeddings.word_embeddings": (None, "residual"),
            "distilbert.embeddings.position_embeddings": (None, "residual"),
            "distilbert.embeddings.LayerNorm": ("residual",),
            "pre_classifier": ("pooled", "residual"),
            "classifier": (None, "pooled"),
        },
        hidden_key="dim",
        layers_key="n_layers",
        heads_key="n_heads",
        intermediate_key="hidden_dim",
    ),
    _llama_kind("llama", heads_divide_width=True),
    _llama_kind("mistral"),
    _llama_kind("qwen2"),
    _llama_kind("qwen3", {**_LLAMA_BLOCK, **_QWEN3_NORMS}),
)

FAMILIES: Final[Mapping[str, Family]] = MappingProxyType({family.model_type: family for family in _FAMILIES})
"""Every architecture that can be sliced, by its config's model_type."""


def family_of(model_or_config: PreTrainedModel | PreTrainedConfig) -> Family:
    """The row of a model's architecture.

    Raises:
        UnsupportedModelError: No row has this model_type.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"models.families: no row for model_type '{config.model_type}'. Known: {', '.join(sorted(FAMILIES))}. "
            f"{WHAT_TO_DO}."
        )
    return family


def task_of(model: PreTrainedModel) -> Task:
    """The task that a model is built for.

    Raises:
        UnsupportedModelError: The family's row does not describe this kind of head.
    """
    family = family_of(model)
    for task in family.tasks:
        if type(model).__name__.endswith(CLASS_SUFFIXES[task]):
            return task
    known = ", ".join(CLASS_SUFFIXES[task] for task in family.tasks)
    raise UnsupportedModelError(
        f"models.families: {type(model).__name__} has a head that flexkd cannot slice. Known for "
        f"'{family.model_type}': classes that end in {known}. Load it as one of these."
    )
