"""Floating point operations of a model: 2 for each token and parameter of a matrix, and those of attention."""

import re
from typing import Any, Final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexkd.core.tensors import Number
from flexkd.costs.rows import Load
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.hidden import is_encoder_decoder
from flexkd.models.slicing.shape import head_dim_of, shape_of

_CROSS_KEYS_AND_VALUES: Final = re.compile(r"(encoder_attn|EncDecAttention|crossattention.*|cross_attn)\.(k|v)")
_POOLERS: Final = re.compile(r"\bpooler\b")
_RELATIVE: Final = re.compile(r"\bpos_(key|query)_proj$")

BACKWARD: Final = 2
"""Cost of a backward pass in forward passes: one for the gradients of the inputs, one for those of the weights."""


def forward_flops(model: PreTrainedModel, load: Load, *, batches: Number = 0) -> Number:
    """Operations of one forward over some rows; the head of a language model runs on supervised positions alone.

    Only matrix multiplications are counted, 2 operations for each multiply-add, as in the figures of device makers.
    Elementwise operations (norms, activations, softmax) are left out.

    Args:
        model: With or without storage.
        batches: Number of forwards over these rows: DeBERTa projects its relative positions once in each.
    """
    matrices: Number = sum(
        2 * weight.numel() * _positions(name, model, load)
        for name, weight in _matrices(model).items()
        if not _RELATIVE.search(name)
    )
    return matrices + head_flops(model, load) + _attention(model, load) + _relative(model, load, batches)


def head_flops(model: PreTrainedModel, load: Load) -> Number:
    """Operations of a language model's head alone; 0 for classifiers, whose head is small."""
    head: Any = model.get_output_embeddings()
    operations: Number = 0 if head is None else 2 * head.weight.numel() * load.predictions
    return operations


def _matrices(model: PreTrainedModel) -> dict[str, Any]:
    """Weight matrices by the path of their module, without embeddings and the head of a language model."""
    head: Any = model.get_output_embeddings()
    return {
        name: weight
        for name, module in model.named_modules()
        if module is not head
        and not isinstance(module, nn.Embedding)
        and (weight := getattr(module, "weight", None)) is not None
        and weight.ndim > 1
    }


def _positions(name: str, model: PreTrainedModel, load: Load) -> Number:
    """Number of tokens, or of rows, that a module processes."""
    if is_encoder_decoder(model):
        reads_source = ".decoder." not in f".{name}" or _CROSS_KEYS_AND_VALUES.search(name)
        return load.source if reads_source else load.target
    if model.get_output_embeddings() is not None:
        return load.source
    in_body = name.startswith(f"{model.base_model_prefix}.")
    return load.source if in_body and not _POOLERS.search(name) else load.num_rows


def _attention(model: PreTrainedModel, load: Load) -> Number:
    """Queries times keys, and attention weights times values, of all heads; masked positions count as well."""
    width, layers, encoder_layers = attention_sizes(model.config)
    if not is_encoder_decoder(model):
        return 4 * width * layers * load.source_squared
    self_attention = encoder_layers * load.source_squared + layers * load.target_squared
    return 4 * width * (self_attention + layers * load.target_source)


def attention_sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Number of heads times their width, and blocks of the decoder and of the encoder (0 for a single stack)."""
    if config.model_type in FAMILIES:
        shape = shape_of(config)
        return shape.num_heads * head_dim_of(config), shape.num_layers, shape.num_encoder_layers or 0
    text: Any = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = getattr(text, "decoder_layers", None) or text.num_hidden_layers
    return text.num_attention_heads * head_dim, layers, getattr(config, "encoder_layers", 0)


def _relative(model: PreTrainedModel, load: Load, batches: Number) -> Number:
    """DeBERTa's attention to relative positions: each is projected, and multiplied with each query or key."""
    table: Any = next((module for name, module in model.named_modules() if name.endswith("rel_embeddings")), None)
    if table is None:
        return 0
    config: Any = model.config
    kinds = len({"c2p", "p2c"} & set(config.pos_att_type or ()))
    width, layers, _ = attention_sizes(config)
    projected = 2 * table.num_embeddings * table.embedding_dim * width * batches
    met = 2 * width * load.source * table.num_embeddings
    total: Number = kinds * layers * (projected + met)
    return total
