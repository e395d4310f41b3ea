"""Rows of the families table: models that read a source with an encoder and write a target with a decoder."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from flexkd.facts.families.row import Family, Modules, Stack, Traits, under

_BART_BLOCK: Final[Modules] = {
    "self_attn.q_proj": ("heads", "residual"),
    "self_attn.k_proj": ("heads", "residual"),
    "self_attn.v_proj": ("heads", "residual"),
    "self_attn.out_proj": ("residual", "heads"),
    "self_attn_layer_norm": ("residual",),
    "fc1": ("feed_forward", "residual"),
    "fc2": ("residual", "feed_forward"),
    "final_layer_norm": ("residual",),
}
_BART_CROSS: Final[Modules] = {
    "encoder_attn.q_proj": ("cross_heads", "residual"),
    "encoder_attn.k_proj": ("cross_heads", "residual"),
    "encoder_attn.v_proj": ("cross_heads", "residual"),
    "encoder_attn.out_proj": ("residual", "cross_heads"),
    "encoder_attn_layer_norm": ("residual",),
}
_BART_EMBEDDINGS: Final[Modules] = {"embed_tokens": (None, "residual"), "embed_positions": (None, "residual")}
_T5_SELF_ATTENTION: Final[Modules] = {
    "layer.0.SelfAttention.q": ("heads", "residual"),
    "layer.0.SelfAttention.k": ("heads", "residual"),
    "layer.0.SelfAttention.v": ("heads", "residual"),
    "layer.0.SelfAttention.o": ("residual", "heads"),
    "layer.0.SelfAttention.relative_attention_bias": (None, "each_head"),
    "layer.0.layer_norm": ("residual",),
}
_T5_CROSS: Final[Modules] = {
    "layer.1.EncDecAttention.q": ("cross_heads", "residual"),
    "layer.1.EncDecAttention.k": ("cross_heads", "residual"),
    "layer.1.EncDecAttention.v": ("cross_heads", "residual"),
    "layer.1.EncDecAttention.o": ("residual", "cross_heads"),
    "layer.1.layer_norm": ("residual",),
}
_T5_FEED_FORWARD: Final[Modules] = {
    "DenseReluDense.wi": ("feed_forward", "residual"),
    "DenseReluDense.wi_0": ("feed_forward", "residual"),
    "DenseReluDense.wi_1": ("feed_forward", "residual"),
    "DenseReluDense.wo": ("residual", "feed_forward"),
    "layer_norm": ("residual",),
}


def _bart_kind(model_type: str, norms: Modules, last_state: str, final_norm: str, *, traits: Traits) -> Family:
    """BART and what descends from it.

    Args:
        norms: Norms of each stack outside its blocks.
    """
    outside = {**_BART_EMBEDDINGS, **norms}
    return Family(
        model_type=model_type,
        tasks=("seq2seq",),
        body="model",
        blocks="decoder.layers",
        last_state=last_state,
        reads="last_token",
        norm="layer",
        value="model.decoder.layers.*.self_attn.v_proj",
        traits=traits,
        cross_value="model.decoder.layers.*.encoder_attn.v_proj",
        modules=under("model.encoder.layers.*", _BART_BLOCK)
        | under("model.decoder.layers.*", {**_BART_BLOCK, **_BART_CROSS})
        | under("model.encoder", outside)
        | under("model.decoder", outside)
        | {"model.shared": (None, "residual"), "lm_head": (None, "residual")},
        hidden_key="d_model",
        layers_key="decoder_layers",
        heads_key="decoder_attention_heads",
        intermediate_key="decoder_ffn_dim",
        encoder=Stack(
            path="model.encoder.layers",
            value="model.encoder.layers.*.self_attn.v_proj",
            layers_key="encoder_layers",
            heads_key="encoder_attention_heads",
            intermediate_key="encoder_ffn_dim",
        ),
        width_powers=_EMBEDDING_SCALE,
        width_powers_key="scale_embedding",
        final_norm=final_norm,
    )


_EMBEDDING_SCALE: Final[Mapping[str, float]] = MappingProxyType(
    {"model.shared": 0.5, "model.encoder.embed_tokens": 0.5, "model.decoder.embed_tokens": 0.5}
)

T5_TRAITS: Final = Traits(
    "encoder_decoder", positions="relative", overflows_in_float16=True, reads_row_end=True, ties_head_alone=True
)
"""What T5 shares with mT5 and umT5."""

_T5: Final = Family(
    model_type="t5",
    tasks=("seq2seq",),
    body="",
    blocks="decoder.block",
    last_state="decoder.final_layer_norm",
    reads="last_token",
    norm="rms",
    value="decoder.block.*.layer.0.SelfAttention.v",
    traits=T5_TRAITS,
    cross_value="decoder.block.*.layer.1.EncDecAttention.v",
    modules=under("encoder.block.*", _T5_SELF_ATTENTION)
    | under("encoder.block.*.layer.1", _T5_FEED_FORWARD)
    | under("decoder.block.*", {**_T5_SELF_ATTENTION, **_T5_CROSS})
    | under("decoder.block.*.layer.2", _T5_FEED_FORWARD)
    | {
        "shared": (None, "residual"),
        "encoder.embed_tokens": (None, "residual"),
        "decoder.embed_tokens": (None, "residual"),
        "encoder.final_layer_norm": ("residual",),
        "decoder.final_layer_norm": ("residual",),
        "lm_head": (None, "residual"),
    },
    hidden_key="d_model",
    layers_key="num_decoder_layers",
    heads_key="num_heads",
    intermediate_key="d_ff",
    head_dim_key="d_kv",
    encoder=Stack(
        path="encoder.block",
        value="encoder.block.*.layer.0.SelfAttention.v",
        layers_key="num_layers",
        heads_key="num_heads",
        intermediate_key="d_ff",
    ),
    encoder_is_deepest=True,
    width_powers=MappingProxyType({"lm_head": -0.5}),
    width_powers_key="scale_decoder_outputs",
    final_norm="decoder.final_layer_norm",
)

ENCODER_DECODERS: Final = (
    # BART norms after every sum, so the last norm of the last block is what the head reads.
    _bart_kind(
        "bart",
        {"layernorm_embedding": ("residual",)},
        "decoder",
        "model.decoder.layers.*.final_layer_norm",
        traits=Traits("encoder_decoder", reads_row_end=True, num_unnamed_labels=3),
    ),
    _bart_kind(
        "mbart",
        {"layernorm_embedding": ("residual",), "layer_norm": ("residual",)},
        "decoder.layer_norm",
        "model.decoder.layer_norm",
        traits=Traits("encoder_decoder", reads_row_end=True),
    ),
    # The sinusoidal positions of PEGASUS are weights of its checkpoint, so the kept columns stay what they were.
    _bart_kind(
        "pegasus",
        {"layer_norm": ("residual",)},
        "decoder.layer_norm",
        "model.decoder.layer_norm",
        traits=Traits("encoder_decoder"),
    ),
    _T5,
)
"""Encoder-decoders that generate."""
