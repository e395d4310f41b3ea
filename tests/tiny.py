"""Tiny models made from configs, and batches for them: nothing in them is 0 or 1 by accident."""

from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from flexkd.models.loading.t5_head import build_model

VOCABULARY: Final = 61
NUM_LABELS: Final = 3
FIRST_WORD: Final = 4
"""Ids below are special: padding, start, end, unknown."""

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "num_labels": NUM_LABELS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_GEMMA: Final[dict[str, Any]] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    # Low enough to bend the logits and the attention of such small models.
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 3.0,
}
_BART: Final[dict[str, Any]] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    "electra": {**_SIZES, "embedding_size": 20},
    # Eight heads in two groups. In Qwen3 heads x head_dim is twice the width, as in its small models.
    "llama": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4},
    "mistral": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4},
    "qwen2": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2},
    "qwen3": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
    "olmo2": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2},
    "phi3": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2},
    "smollm3": {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "no_rope_layer_interval": 2},
    # Four multipliers, none of which is 1.
    "granite": {
        **_SIZES,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.7,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
    "gemma2": {**_SIZES, **_GEMMA},
    "gemma3_text": {**_SIZES, **_GEMMA, "sliding_window_pattern": 2},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48},
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    # Heads x d_kv is more than the width.
    "t5": {
        "d_model": 32,
        "num_layers": 5,
        "num_decoder_layers": 4,
        "num_heads": 8,
        "d_kv": 6,
        "d_ff": 48,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    },
    # As DeBERTa-v3 has it.
    "deberta-v2": {
        **_SIZES,
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "modernbert": {**_SIZES, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "opt": {**{key: value for key, value in _SIZES.items() if key != "intermediate_size"}, "ffn_dim": 48},
}
BUILDERS: Final = {
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}

TinyTask = Literal["classification", "causal", "seq2seq"]


def tiny_model(
    model_type: str, task: TinyTask = "classification", seed: int = 0, **config_overrides: Any
) -> PreTrainedModel:
    """A model of 4 layers and width 32, in eval mode and float32, alike for the same arguments.

    Args:
        model_type: Any that transformers knows, `bert` or `qwen3` or `gpt2`.
        task: Which head it has.
        seed: Of its weights.
        config_overrides: Config keys of that architecture.
    """
    sizes = _CONFIGS.get(model_type, _SIZES)
    config = AutoConfig.for_model(model_type, **{**_COMMON, **sizes, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = build_model(
            BUILDERS[task].from_config, config, own_head=config_overrides.get("tie_word_embeddings") is False
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_perturbed(name, parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("bias"):
                    buffer.copy_(_perturbed(name, buffer.flatten()).reshape(buffer.shape))
    model.train(False)
    return model


def _perturbed(name: str, parameter: Tensor) -> Tensor:
    """Matrices that neither die out nor explode over some layers; norms and biases move away from where they start."""
    noise = torch.randn(parameter.shape)
    if parameter.ndim > 1:
        return noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    return parameter + 0.2 * noise


def tiny_batch(
    model: PreTrainedModel, rows: int = 4, length: int = 9, seed: int = 0, padding: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """Rows of unequal length, the first one full, with labels that suit the model.

    A causal model's labels leave out the padding and the first two tokens of each row, as a prompt; those of an
    encoder-decoder are a target of their own, shorter than the source and padded on the right.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(max(2, length // 3), length + 1, (rows,), generator=generator)
    lengths[0] = length
    ids = torch.randint(FIRST_WORD, model.config.vocab_size, (rows, length), generator=generator)
    positions = torch.arange(length)
    start = torch.zeros_like(lengths) if padding == "right" else length - lengths
    real = (positions >= start[:, None]) & (positions < (start + lengths)[:, None])
    batch = {"input_ids": ids.where(real, model.config.pad_token_id), "attention_mask": real.long()}
    if getattr(model.config, "type_vocab_size", 0) and model.config.model_type != "roberta":
        second = positions >= (start + lengths // 2)[:, None]
        batch["token_type_ids"] = (second & real).long()
    if model.config.is_encoder_decoder:
        target = torch.randint(FIRST_WORD, model.config.vocab_size, (rows, length - 2), generator=generator)
        return {**batch, "labels": target.where(positions[2:] < lengths[:, None], -100)}
    if model.get_output_embeddings() is not None:
        answer = real & (positions >= start[:, None] + 2)
        return {**batch, "labels": ids.where(answer, -100)}
    return {**batch, "labels": _class_labels(model, rows, generator)}


def _class_labels(model: PreTrainedModel, rows: int, generator: torch.Generator) -> Tensor:
    outputs = model.config.num_labels
    if model.config.problem_type == "regression":
        return torch.randn((rows,) if outputs == 1 else (rows, outputs), generator=generator)
    if model.config.problem_type == "multi_label_classification":
        return torch.randint(0, 2, (rows, outputs), generator=generator).float()
    return torch.randint(0, outputs, (rows,), generator=generator)
