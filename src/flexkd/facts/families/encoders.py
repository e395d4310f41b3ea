"""Rows of the families table: encoders that classify."""

from collections.abc import Mapping
from typing import Final

from flexkd.facts.families.row import Axes, Axis, Family, Modules, Traits, under

_BERT_EMBEDDINGS: Final[Modules] = {
    "word_embeddings": (None, "embedding"),
    "position_embeddings": (None, "embedding"),
    "token_type_embeddings": (None, "embedding"),
    "LayerNorm": ("embedding",),
}
_BERT_BLOCK: Final[Modules] = {
    "attention.self.query": ("heads", "residual"),
    "attention.self.key": ("heads", "residual"),
    "attention.self.value": ("heads", "residual"),
    "attention.output.dense": ("residual", "heads"),
    "attention.output.LayerNorm": ("residual",),
    "intermediate.dense": ("feed_forward", "residual"),
    "output.dense": ("residual", "feed_forward"),
    "output.LayerNorm": ("residual",),
}
_DEBERTA_BLOCK: Final[Modules] = {
    "attention.self.query_proj": ("heads", "residual"),
    "attention.self.key_proj": ("heads", "residual"),
    "attention.self.value_proj": ("heads", "residual"),
    "attention.self.pos_key_proj": ("heads", "residual"),
    "attention.self.pos_query_proj": ("heads", "residual"),
    "attention.output.dense": ("residual", "heads"),
    "attention.output.LayerNorm": ("residual",),
    "intermediate.dense": ("feed_forward", "residual"),
    "output.dense": ("residual", "feed_forward"),
    "output.LayerNorm": ("residual",),
}
_DISTILBERT_BLOCK: Final[Modules] = {
    "attention.q_lin": ("heads", "residual"),
    "attention.k_lin": ("heads", "residual"),
    "attention.v_lin": ("heads", "residual"),
    "attention.out_lin": ("residual", "heads"),
    "sa_layer_norm": ("residual",),
    "ffn.lin1": ("feed_forward", "residual"),
    "ffn.lin2": ("residual", "feed_forward"),
    "output_layer_norm": ("residual",),
}
_DENSE_HEAD: Final[Modules] = {
    "classifier.dense": ("pooled", "residual"),
    "classifier.out_proj": (None, "pooled"),
}


_ENCODER: Final = Traits("encoder")


def _bert_kind(
    model_type: str, head: Mapping[str, Axes], *, traits: Traits = _ENCODER, embedding_key: str | None = None
) -> Family:
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
        traits=traits,
        modules=under(f"{model_type}.embeddings", embeddings)
        | under(f"{model_type}.encoder.layer.*", _BERT_BLOCK)
        | dict(head),
        embedding_key=embedding_key,
    )


_DEBERTA: Final = Family(
    model_type="deberta-v2",
    tasks=("classification",),
    body="deberta",
    blocks="encoder.layer",
    # The body takes the last state from the encoder's list of all states, past what a hook on the encoder changes.
    last_state="",
    reads="first",
    norm="layer",
    value="deberta.encoder.layer.*.attention.self.value_proj",
    traits=_ENCODER,
    modules=under("deberta.embeddings", _BERT_EMBEDDINGS)
    | under("deberta.encoder.layer.*", _DEBERTA_BLOCK)
    | {
        "deberta.embeddings.embed_proj": ("residual", None),
        "deberta.embeddings.LayerNorm": ("residual",),
        # Relative positions are read by the blocks' own projections, as states are.
        "deberta.encoder.rel_embeddings": (None, "residual"),
        "deberta.encoder.LayerNorm": ("residual",),
        "deberta.encoder.conv.conv": ("residual", "residual", None),
        "deberta.encoder.conv.LayerNorm": ("residual",),
        "pooler.dense": ("pooled", "residual"),
        "classifier": (None, "pooled"),
    },
    width_keys=("pooler_hidden_size",),
    embedding_key="embedding_size",
)

_MODERNBERT: Final = Family(
    model_type="modernbert",
    tasks=("classification",),
    body="model",
    blocks="layers",
    last_state="final_norm",
    reads="first",
    norm="layer",
    value="model.layers.*.attn.Wqkv",
    traits=Traits("encoder", positions="rotary"),
    modules={
        "model.embeddings.tok_embeddings": (None, "residual"),
        "model.embeddings.norm": ("residual",),
        "model.layers.*.attn_norm": ("residual",),
        "model.layers.*.attn.Wqkv": ("query_key_value", "residual"),
        "model.layers.*.attn.Wo": ("residual", "heads"),
        "model.layers.*.mlp_norm": ("residual",),
        "model.layers.*.mlp.Wi": ("gate_up", "residual"),
        "model.layers.*.mlp.Wo": ("residual", "feed_forward"),
        "model.final_norm": ("residual",),
        "head.dense": ("pooled", "residual"),
        "head.norm": ("pooled",),
        "classifier": (None, "pooled"),
    },
    # It has no norm before its attention, since the embeddings have one.
    keeps_first_block=True,
    pooling_key="classifier_pooling",
)

ENCODERS: Final = (
    _bert_kind("bert", {"bert.pooler.dense": ("pooled", "residual"), "classifier": (None, "pooled")}),
    _bert_kind("roberta", _DENSE_HEAD, traits=Traits("encoder", positions="after_padding")),
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
        traits=_ENCODER,
        modules=under("distilbert.transformer.layer.*", _DISTILBERT_BLOCK)
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
    _DEBERTA,
    _MODERNBERT,
)
"""Encoders whose head reads the first position, or the mean of all."""
