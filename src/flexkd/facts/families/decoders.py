"""Rows of the families table: models that read from left to right."""

from dataclasses import replace
from typing import Final

from flexkd.facts.families.row import Family, Modules, Task, Traits, under

_LLAMA_BLOCK: Final[Modules] = {
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
_LLAMA_BODY: Final[Modules] = {
    "model.embed_tokens": (None, "residual"),
    "model.norm": ("residual",),
    "lm_head": (None, "residual"),
}
_SCORE: Final[Modules] = {"score": (None, "residual")}
_HEAD_NORMS: Final[Modules] = {"self_attn.q_norm": (None,), "self_attn.k_norm": (None,)}
_GEMMA_BLOCK: Final[Modules] = {
    **_LLAMA_BLOCK,
    "pre_feedforward_layernorm": ("residual",),
    "post_feedforward_layernorm": ("residual",),
}
_OLMO2_BLOCK: Final[Modules] = {
    **{name: axes for name, axes in _LLAMA_BLOCK.items() if name != "input_layernorm"},
    "post_feedforward_layernorm": ("residual",),
    "self_attn.q_norm": ("heads",),
    "self_attn.k_norm": ("kv_heads",),
}
_PHI3_BLOCK: Final[Modules] = {
    "self_attn.qkv_proj": ("query_key_value", "residual"),
    "self_attn.o_proj": ("residual", "heads"),
    "mlp.gate_up_proj": ("gate_up", "residual"),
    "mlp.down_proj": ("residual", "feed_forward"),
    "input_layernorm": ("residual",),
    "post_attention_layernorm": ("residual",),
}
_GPT2_LINEAR: Final[Modules] = {
    "transformer.h.*.attn.c_attn": ("query_key_value", "residual"),
    "transformer.h.*.attn.c_proj": ("residual", "heads"),
    "transformer.h.*.mlp.c_fc": ("feed_forward", "residual"),
    "transformer.h.*.mlp.c_proj": ("residual", "feed_forward"),
}
_GPT_NEOX_BLOCK: Final[Modules] = {
    "attention.query_key_value": ("query_key_value_by_head", "residual"),
    "attention.dense": ("residual", "heads"),
    "mlp.dense_h_to_4h": ("feed_forward", "residual"),
    "mlp.dense_4h_to_h": ("residual", "feed_forward"),
    "input_layernorm": ("residual",),
    "post_attention_layernorm": ("residual",),
}
_OPT_BLOCK: Final[Modules] = {
    "self_attn.q_proj": ("heads", "residual"),
    "self_attn.k_proj": ("heads", "residual"),
    "self_attn.v_proj": ("heads", "residual"),
    "self_attn.out_proj": ("residual", "heads"),
    "self_attn_layer_norm": ("residual",),
    "fc1": ("feed_forward", "residual"),
    "fc2": ("residual", "feed_forward"),
    "final_layer_norm": ("residual",),
}


def _llama_kind(
    model_type: str,
    block: Modules = _LLAMA_BLOCK,
    *,
    tasks: tuple[Task, ...] = ("classification", "causal"),
    heads_divide_width: bool = False,
    block_lists: tuple[str, ...] = ("layer_types",),
    can_rotate: bool = True,
) -> Family:
    return Family(
        model_type=model_type,
        tasks=tasks,
        body="model",
        blocks="layers",
        last_state="norm",
        reads="last_token",
        norm="rms",
        value="model.layers.*.self_attn.v_proj",
        traits=Traits(positions="rotary"),
        can_rotate=can_rotate,
        modules=under("model.layers.*", block) | {**_LLAMA_BODY, **(_SCORE if "classification" in tasks else {})},
        kv_heads_key="num_key_value_heads",
        head_dim_key="head_dim",
        heads_divide_width=heads_divide_width,
        block_lists=block_lists,
        final_norm="model.norm",
    )


def _gemma_kind(model_type: str, block: Modules) -> Family:
    """Norms multiply by 1 + w, and embeddings are multiplied by the root of the width."""
    row = _llama_kind(model_type, block, heads_divide_width=True, can_rotate=False)
    return replace(row, norm_offset=1.0, width_powers={"model.embed_tokens": 0.5})


DECODERS: Final = (
    _llama_kind("llama", heads_divide_width=True),
    _llama_kind("mistral"),
    _llama_kind("qwen2"),
    _llama_kind("qwen3", {**_LLAMA_BLOCK, **_HEAD_NORMS}),
    _llama_kind("smollm3", block_lists=("layer_types", "no_rope_layers")),
    _llama_kind("granite", tasks=("causal",)),
    _llama_kind("olmo2", _OLMO2_BLOCK, can_rotate=False),
    # The number of its longrope factors follows from hidden_size / heads, whatever head_dim is.
    replace(_llama_kind("phi3", _PHI3_BLOCK), value="model.layers.*.self_attn.qkv_proj", head_dim_key=None),
    _gemma_kind("gemma2", _GEMMA_BLOCK),
    _gemma_kind("gemma3_text", {**_GEMMA_BLOCK, **_HEAD_NORMS}),
    Family(
        model_type="gpt2",
        tasks=("classification", "causal"),
        body="transformer",
        blocks="h",
        last_state="ln_f",
        reads="last_token",
        norm="layer",
        value="transformer.h.*.attn.c_attn",
        modules={
            **_GPT2_LINEAR,
            "transformer.h.*.ln_1": ("residual",),
            "transformer.h.*.ln_2": ("residual",),
            "transformer.wte": (None, "residual"),
            "transformer.wpe": (None, "residual"),
            "transformer.ln_f": ("residual",),
            "lm_head": (None, "residual"),
            **_SCORE,
        },
        transposed=frozenset(_GPT2_LINEAR),
        hidden_key="n_embd",
        layers_key="n_layer",
        heads_key="n_head",
        intermediate_key="n_inner",
        intermediate_multiple=4,
        block_scale_key="scale_attn_by_inverse_layer_idx",
        final_norm="transformer.ln_f",
    ),
    Family(
        model_type="gpt_neox",
        tasks=("classification", "causal"),
        body="gpt_neox",
        blocks="layers",
        last_state="final_layer_norm",
        reads="last_token",
        norm="layer",
        value="gpt_neox.layers.*.attention.query_key_value",
        traits=Traits(positions="rotary"),
        modules=under("gpt_neox.layers.*", _GPT_NEOX_BLOCK)
        | {
            "gpt_neox.embed_in": (None, "residual"),
            "gpt_neox.final_layer_norm": ("residual",),
            "lm_head": (None, "residual"),
            **_SCORE,
        },
        final_norm="gpt_neox.final_layer_norm",
    ),
    Family(
        model_type="opt",
        tasks=("classification", "causal"),
        body="model",
        blocks="decoder.layers",
        last_state="decoder",
        reads="last_token",
        norm="layer",
        value="model.decoder.layers.*.self_attn.v_proj",
        modules=under("model.decoder.layers.*", _OPT_BLOCK)
        | {
            "model.decoder.embed_tokens": (None, "embedding"),
            "model.decoder.embed_positions": (None, "residual"),
            "model.decoder.project_in": ("residual", None),
            "model.decoder.project_out": (None, "residual"),
            "model.decoder.final_layer_norm": ("residual",),
            "lm_head": (None, "embedding"),
            "score": (None, "embedding"),
        },
        intermediate_key="ffn_dim",
        embedding_key="word_embed_proj_dim",
        final_norm="model.decoder.final_layer_norm",
        final_norm_key="do_layer_norm_before",
    ),
)
"""Decoders, which generate, and classify by their last token."""
