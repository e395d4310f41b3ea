"""Sizes that follow from the width, and the shape that follows from a number of parameters."""

import re
from dataclasses import asdict
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, PreTrainedConfig

from flexkd.errors import ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.slicing.proportions import derive_shape, parameter_counter
from flexkd.models.slicing.shape import StudentShape, head_dim_of, resolve_shape, shape_of
from flexkd.models.slicing.student import slice_student
from tests.contract.variants import Variant, teacher_of
from tests.tiny import TinyTask, tiny_model

SMOLLM2: Final = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
}
MINILM: Final = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
# Heads x head_dim is twice the width.
QWEN3: Final = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "architectures": ["Qwen3ForCausalLM"],
}


def config_of(model_type: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **sizes)
    return config


ROWS: Final = [(name, family.tasks[-1]) for name, family in FAMILIES.items()]
SHAPES: Final = [
    {"hidden_size": 16, "num_layers": 1},
    {"num_layers": 3, "intermediate_size": 17},
    {"hidden_size": 24, "intermediate_size": 9},
]


@pytest.mark.parametrize(("model_type", "task"), ROWS)
def test_parameters_are_counted_as_the_real_student_has_them(model_type: str, task: TinyTask) -> None:
    """Tied and untied heads, biases, embeddings of another width: the count is never estimated."""
    for changes in ({}, {"tie_word_embeddings": True, "attention_bias": True}, {"embedding_size": 32}):
        if changes and model_type not in ("electra", "gemma2", "gpt2", "llama", "opt"):
            continue
        teacher = tiny_model(model_type, task, **changes)
        for sizes in SHAPES:
            shape = resolve_shape(teacher.config, **sizes)
            student = slice_student(teacher, **asdict(shape))
            assert parameter_counter(teacher.config, task=task)(shape) == student.num_parameters()
            assert shape_of(student.config) == shape
            assert head_dim_of(student.config) == head_dim_of(teacher.config)


@pytest.mark.parametrize(("model_type", "task"), ROWS)
@pytest.mark.parametrize("size", [1.0, 0.6, 0.3])
def test_a_derived_shape_can_be_cut_and_keeps_its_promise(model_type: str, task: TinyTask, size: float) -> None:
    teacher = teacher_of(Variant("", model_type, task, {}))
    shape = derive_shape(teacher.config, size=size, task=task)
    student = slice_student(teacher, **asdict(shape))
    assert student.num_parameters() <= size * teacher.num_parameters()
    if size == 1.0:
        assert shape == shape_of(teacher.config)


RULE: Final = [
    ("llama", SMOLLM2, {"size": 0.25}, StudentShape(288, 15, 6, 2, 768)),
    ("llama", SMOLLM2, {"max_parameters": 30_000_000}, StudentShape(288, 15, 6, 2, 768)),
    ("bert", MINILM, {"size": 0.25}, StudentShape(160, 2, 5, 5, 640)),
    ("bert", MINILM, {"max_parameters": 10_000_000}, StudentShape(224, 4, 7, 7, 896)),
    ("qwen3", QWEN3, {"size": 0.5}, StudentShape(752, 21, 12, 6, 2256)),
    ("distilbert", {}, {"size": 0.5}, StudentShape(512, 4, 8, 8, 2048)),
    ("gpt2", {"architectures": ["GPT2LMHeadModel"]}, {"size": 0.5}, StudentShape(512, 8, 8, 8, 2048)),
]


@pytest.mark.parametrize(("model_type", "sizes", "asked", "expected"), RULE)
def test_the_rule_on_models_that_people_use(
    model_type: str, sizes: dict[str, Any], asked: dict[str, Any], expected: StudentShape
) -> None:
    config = config_of(model_type, sizes)
    assert derive_shape(config, **asked) == expected


def test_the_largest_shape_in_proportion_is_taken() -> None:
    """Slow: every width of whole heads with the two nearest depths, counted on real models."""
    sizes = {**MINILM, "vocab_size": 500, "num_hidden_layers": 7, "hidden_size": 96}
    config = config_of("bert", sizes)
    real = AutoModelForSequenceClassification.from_config(config).num_parameters()
    counts = {}
    for heads in range(1, 13):
        for layers in {max(1, 7 * heads // 12), -(-7 * heads // 12)}:
            small = config_of(
                "bert",
                {
                    **sizes,
                    "hidden_size": 8 * heads,
                    "num_attention_heads": heads,
                    "num_hidden_layers": layers,
                    "intermediate_size": 128 * heads,
                },
            )
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(small)
            counts[shape_of(small)] = model.num_parameters()
    for size in (0.9, 0.6, 0.4, 0.2, 0.1):
        fitting = {shape: count for shape, count in counts.items() if count <= size * real}
        assert derive_shape(config, size=size) == max(fitting, key=lambda shape: fitting[shape])


def test_a_limit_above_the_teacher_gives_the_teachers_shape() -> None:
    config = config_of("bert", MINILM)
    assert derive_shape(config, max_parameters=10**9) == shape_of(config)


def test_the_counted_head_is_the_one_the_config_names_unless_asked() -> None:
    """SmolLM2 untied: its vocabulary head is a fifth of all, which a classifier does not have."""
    config = config_of("llama", {**SMOLLM2, "tie_word_embeddings": False})
    whole = shape_of(config)
    head = 49152 * 576
    classes = 2 * 576
    assert parameter_counter(config)(whole) - parameter_counter(config, task="classification")(whole) == head - classes
    config.architectures = ["LlamaForSequenceClassification"]
    assert parameter_counter(config)(whole) == parameter_counter(config, task="classification")(whole)


def test_counting_makes_no_weights_and_leaves_config_and_random_numbers() -> None:
    config = config_of(
        "llama", {**SMOLLM2, "hidden_size": 57600, "num_attention_heads": 900, "num_key_value_heads": 300}
    )
    before, state = config.to_dict(), torch.get_rng_state()
    assert parameter_counter(config)(shape_of(config)) > 10**11
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_refused_requests() -> None:
    config = config_of("bert", MINILM)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "derive_shape: needs exactly one of size and max_parameters, got None and None."),
        ({"size": 0.5, "max_parameters": 5}, "needs exactly one of size and max_parameters, got 0.5 and 5."),
        ({"size": 0.0}, "derive_shape: size 0.0 is no share of the teacher."),
        ({"size": 1.5}, "derive_shape: size 1.5 is no share of the teacher."),
        (
            {"max_parameters": 1000},
            "derive_shape: no student of this bert has 1,000 parameters or fewer: the smallest (hidden_size 32, "
            "num_layers 1) has 1,007,",
        ),
    ]
    for asked, message in cases:
        with pytest.raises(ShapeError, match=re.escape(message)):
            derive_shape(config, **asked)
    with pytest.raises(UnsupportedModelError, match="no row for model_type 'cohere'"):
        derive_shape(config_of("cohere", {}), size=0.5)


@pytest.mark.parametrize(
    ("sizes", "width", "heads"),
    [
        (SMOLLM2, 576, (9, 3)),
        (SMOLLM2, 192, (3, 1)),
        (SMOLLM2, 384, (6, 2)),
        (SMOLLM2, 200, (4, 2)),  # three queries a group never divide 200, two do
        (SMOLLM2, 7, (1, 1)),
        (QWEN3, 512, (8, 4)),
        (QWEN3, 1, (2, 1)),  # at least one key-value head, with its queries
        (QWEN3, 1023, (16, 8)),
    ],
)
def test_F13_heads_follow_the_width_and_keep_the_queries_of_a_group(
    sizes: dict[str, Any], width: int, heads: tuple[int, int]
) -> None:
    model_type = "qwen3" if sizes is QWEN3 else "llama"
    shape = resolve_shape(config_of(model_type, sizes), hidden_size=width)
    assert (shape.num_heads, shape.num_key_value_heads) == heads


@pytest.mark.parametrize(
    ("width", "asked", "heads"),
    [
        (24, {}, (6, 2)),  # head_dim follows from the width: 6 heads, three of each key-value head's four
        (16, {}, (4, 1)),  # one key-value head with all its queries
        (16, {"num_key_value_heads": 2}, (4, 2)),
        (32, {}, (8, 2)),
    ],
)
def test_F13_heads_that_fill_the_width_are_shared_among_key_value_heads(
    width: int, asked: dict[str, int], heads: tuple[int, int]
) -> None:
    config = tiny_model("phi3", "causal").config
    shape = resolve_shape(config, hidden_size=width, **asked)
    assert (shape.num_heads, shape.num_key_value_heads) == heads
    with pytest.raises(ShapeError, match=re.escape("18 is not a multiple of the teacher's head_dim = 4. Nearest: 16")):
        resolve_shape(config, hidden_size=18)
    with pytest.raises(ShapeError, match=re.escape("8/any") + "|" + re.escape("cannot be cut from the teacher's 8/2")):
        resolve_shape(config, hidden_size=20)


@pytest.mark.parametrize(
    ("intermediate", "width", "expected"),
    [(1536, 192, 768), (1500, 192, 752), (100, 192, 50), (60, 32, 5), (3, 32, 1), (1501, 384, 1501)],
)
def test_feed_forward_scales_with_the_width_to_multiples_of_eight(intermediate: int, width: int, expected: int) -> None:
    config = config_of("bert", {**MINILM, "intermediate_size": intermediate})
    assert resolve_shape(config, hidden_size=width).intermediate_size == expected


def test_a_quarter_of_a_rotated_language_model_is_wide_shallow_and_tied() -> None:
    """SmolLM2-135M: blocks as the cube of the width, the embeddings counted once."""
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    plain, rotated = (derive_shape(config, size=0.25, rotated=turned) for turned in (False, True))
    assert (rotated.hidden_size, rotated.num_layers, rotated.num_heads) == (384, 9, 6)
    assert plain.hidden_size < rotated.hidden_size
    assert plain.num_layers > rotated.num_layers
    whole = parameter_counter(config)(shape_of(config))
    assert 0.24 * whole < parameter_counter(config)(rotated) <= 0.25 * whole
