"""Every family row with the configs that change which parameters it has, and a teacher and a student of each."""

from functools import cache
from typing import Any, Final, NamedTuple

import torch
from transformers import PreTrainedModel

from flexkd.facts.families.table import FAMILIES
from flexkd.models.slicing.student import slice_student
from tests.tiny import TinyTask, tiny_batch, tiny_model

UNITS: Final = torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 19, 20, 23, 26, 29, 30, 31])
"""Half of the width, in no order that slicing by weights would choose."""


class Variant(NamedTuple):
    """A config of a family that changes which parameters there are, or what is done with them."""

    name: str
    model_type: str
    task: TinyTask
    changes: dict[str, Any]


ROWS: Final = [Variant("", name, task, {}) for name, family in FAMILIES.items() for task in family.tasks]
FIRST: Final = list({row.model_type: row for row in ROWS}.values())
"""One row a family: the causal one where there are two."""
_UNTIED: Final = {"tie_word_embeddings": False}
_TIED: Final = {"tie_word_embeddings": True}
_HALF_ROTARY: Final = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_SCALED: Final = {"scale_embedding": True}
_BIASES: Final = {"attention_bias": True, "mlp_bias": True, "classifier_bias": True}
_POSITIONS: Final = {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2}
VARIANTS: Final = [
    *ROWS,
    Variant("tied", "llama", "causal", _TIED),
    Variant("biases", "llama", "causal", {"attention_bias": True, "mlp_bias": True}),
    Variant("multi-head", "llama", "classification", {"num_key_value_heads": 8}),
    Variant("sliding-window", "mistral", "causal", {"sliding_window": 4}),
    Variant("tied", "qwen2", "causal", _TIED),
    Variant("tied", "qwen3", "causal", {**_TIED, "attention_bias": True}),
    Variant(
        "sliding-window", "qwen3", "causal", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    ),
    Variant("untied", "gemma2", "causal", _UNTIED),
    Variant("uncapped", "gemma3_text", "causal", {**_UNTIED, "final_logit_softcapping": None}),
    Variant("tied", "granite", "causal", {**_TIED, "attention_bias": True, "mlp_bias": True}),
    Variant("sliding-window", "smollm3", "causal", {**_UNTIED, "use_sliding_window": True, "sliding_window": 4}),
    Variant("tied", "olmo2", "causal", {**_TIED, "attention_bias": True}),
    Variant("tied", "phi3", "causal", {**_TIED, "rope_parameters": _HALF_ROTARY, "num_key_value_heads": 8}),
    Variant("silent-sizes", "gpt2", "causal", {**_UNTIED, "n_inner": None}),
    Variant("sequential", "gpt_neox", "causal", {**_TIED, "use_parallel_residual": False, "attention_bias": False}),
    Variant("post-norm", "opt", "causal", {**_UNTIED, "do_layer_norm_before": False, "enable_bias": False}),
    Variant("projected", "opt", "causal", {"word_embed_proj_dim": 20}),
    Variant("projected", "opt", "classification", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    Variant("untied", "bart", "seq2seq", _UNTIED),
    Variant("scaled", "bart", "seq2seq", _SCALED),
    Variant("scaled", "mbart", "seq2seq", _SCALED),
    Variant("scaled", "pegasus", "seq2seq", _SCALED),
    Variant("gated", "t5", "seq2seq", {**_UNTIED, "feed_forward_proj": "gated-gelu"}),
    Variant("positions", "deberta-v2", "classification", {**_POSITIONS, "conv_kernel_size": 3, "embedding_size": 20}),
    Variant("same-width", "deberta-v2", "classification", {"embedding_size": 32, "attention_head_size": 8}),
    Variant("mean", "modernbert", "classification", {"classifier_pooling": "mean", "norm_bias": True, **_BIASES}),
    Variant("same-width", "electra", "classification", {"embedding_size": 32}),
    Variant("sinusoidal", "distilbert", "classification", {"sinusoidal_pos_embds": True}),
    Variant("regression", "bert", "classification", {"num_labels": 1, "problem_type": "regression"}),
    Variant("multi-label", "roberta", "classification", {"problem_type": "multi_label_classification"}),
]


def name_of(variant: Variant) -> str:
    """As in the ids of tests."""
    return "-".join(filter(None, (variant.model_type, variant.task, variant.name)))


@cache
def _shared(name: str) -> PreTrainedModel:
    (variant,) = (variant for variant in VARIANTS if name_of(variant) == name)
    return tiny_model(variant.model_type, variant.task, **variant.changes)


@cache
def _shared_student(name: str) -> PreTrainedModel:
    teacher = _shared(name)
    return slice_student(teacher, units=UNITS, num_layers=3, intermediate_size=20, batches=[tiny_batch(teacher)])


def teacher_of(variant: Variant) -> PreTrainedModel:
    """One model for all tests: leave it as it is."""
    return _shared(name_of(variant))


@cache
def _shared_shallow(name: str) -> PreTrainedModel:
    (variant,) = (variant for variant in VARIANTS if name_of(variant) == name)
    family = FAMILIES[variant.model_type]
    stacks = [stack for stack in (family.stack, family.encoder) if stack is not None]
    return tiny_model(variant.model_type, variant.task, **variant.changes, **{stack.layers_key: 2 for stack in stacks})


def shallow_of(variant: Variant) -> PreTrainedModel:
    """The teacher with two blocks, one of each kind where blocks differ: leave it as it is."""
    return _shared_shallow(name_of(variant))


def student_of(variant: Variant) -> PreTrainedModel:
    """Cut along every axis, measured; one model for all tests: leave it as it is."""
    return _shared_student(name_of(variant))
