"""What slicing leaves alone, and what it refuses, in words."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, PreTrainedModel

from flexkd.errors import DataError, FlexKDError, RecipeError, ScoreError, ShapeError, UnsupportedModelError
from flexkd.models.loading.pretrained import model_fingerprint
from flexkd.models.slicing.student import slice_student
from tests.tiny import tiny_batch, tiny_model


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that could be left behind in a model."""
    return {
        "weights": model_fingerprint(model),
        "config": model.config.to_dict(),
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "qwen3"])
def test_S03_the_teacher_and_the_random_numbers_stay_as_they_were(model_type: str) -> None:
    teacher = tiny_model(model_type).requires_grad_(False)
    teacher.train()
    teacher.base_model.eval()
    before = state_of(teacher)
    # With labels the model's forward would write problem_type into its config.
    student = slice_student(teacher, hidden_size=16, num_layers=2, batches=[tiny_batch(teacher)])
    assert state_of(teacher) == before
    assert not any(module.training for module in student.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())
    shared = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in slice_student(teacher).parameters()}


def test_S03_the_teacher_stays_as_it_was_when_a_batch_fails() -> None:
    teacher = tiny_model("bert").train()
    before = state_of(teacher)

    def batches() -> Iterator[dict[str, Tensor]]:
        yield tiny_batch(teacher)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        slice_student(teacher, hidden_size=16, batches=batches())
    assert state_of(teacher) == before


def test_dropout_does_not_touch_the_measured_importances() -> None:
    teacher = tiny_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = tiny_batch(teacher)
    expected = slice_student(teacher, hidden_size=16, batches=[batch]).state_dict()
    found = slice_student(teacher.train(), hidden_size=16, batches=[batch]).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_S09_labels_generation_and_attention_settings_go_along() -> None:
    labels = {0: "bad", 1: "so so", 2: "good"}
    teacher = tiny_model(
        "roberta",
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        problem_type="single_label_classification",
        pad_token_id=3,
        attn_implementation="eager",
    )
    config = slice_student(teacher, hidden_size=16).config
    assert config.id2label == labels
    assert config.problem_type == "single_label_classification"
    assert config.pad_token_id == 3
    assert config._attn_implementation == "eager"
    causal = tiny_model("llama", "causal")
    causal.generation_config.max_new_tokens = 17
    student = slice_student(causal, hidden_size=16)
    assert student.generation_config.max_new_tokens == 17
    assert student.generation_config is not causal.generation_config


def test_norms_of_one_heads_dimensions_are_kept_whole() -> None:
    teacher = tiny_model("qwen3", "causal")
    student = slice_student(teacher, hidden_size=12, batches=[tiny_batch(teacher)])
    for name, weight in student.state_dict().items():
        if "q_norm" in name or "k_norm" in name:
            assert torch.equal(weight, teacher.state_dict()[name])


BERT: Final = "bert"
REFUSED: Final[list[tuple[str, dict[str, Any], str]]] = [
    (BERT, {"hidden_size": 64}, "slice_student.hidden_size: 64 is larger than the teacher's 32. Ask for at most 32"),
    (BERT, {"hidden_size": 0}, "slice_student.hidden_size: 0 is too small. Ask for 1 to 32."),
    (BERT, {"num_layers": 5}, "slice_student.num_layers: 5 is larger than the teacher's 4."),
    (BERT, {"num_heads": 5}, "slice_student.num_heads: 5 is larger than the teacher's 4."),
    ("llama", {"num_key_value_heads": 3}, "slice_student.num_key_value_heads: 3 is larger than the teacher's 2."),
    (BERT, {"intermediate_size": 49}, "slice_student.intermediate_size: 49 is larger than the teacher's 48."),
    (
        BERT,
        {"hidden_size": 20},
        "slice_student.hidden_size: 20 is not a multiple of the teacher's head_dim = 8. Nearest: 16 or 24.",
    ),
    (BERT, {"hidden_size": 3}, "3 is not a multiple of the teacher's head_dim = 8. Nearest: 8 or 16."),
    (BERT, {"hidden_size": 31}, "31 is not a multiple of the teacher's head_dim = 8. Nearest: 24 or 32."),
    (
        BERT,
        {"num_heads": 2},
        "slice_student.num_heads: 2 does not fit hidden_size 32: heads keep the teacher's head_dim = 8, which makes 4. "
        "Leave it out, or ask for hidden_size 16.",
    ),
    (
        "mistral",
        {"num_heads": 7},
        "slice_student.num_heads: 7 with num_key_value_heads any cannot be cut from the teacher's 8/2 at hidden_size "
        "32. Possible (num_heads/num_key_value_heads): 1/1, 2/1, 2/2, 3/1, 4/1, 4/2, 6/2, 8/2.",
    ),
    (
        "llama",
        {"hidden_size": 30, "num_heads": 4},
        "cannot be cut from the teacher's 8/2 at hidden_size 30. Possible (num_heads/num_key_value_heads): "
        "1/1, 2/1, 2/2, 3/1, 6/2.",
    ),
    (
        "electra",
        {"hidden_size": 24},
        "slice_student.hidden_size: 24 equals the teacher's embedding_size = 24, and a electra model of equal widths "
        "has no projection between the two. Ask for another width.",
    ),
    (
        BERT,
        {"units": [1, 2, 3], "hidden_size": 16},
        "slice_student.units: 3 units do not make hidden_size 16. Leave hidden_size out, or select as many units.",
    ),
    (BERT, {"units": [3, 1, 2]}, "must be different numbers from 0 to 31, ascending, got [3, 1, 2]."),
    (BERT, {"units": [1, 1, 2]}, "must be different numbers from 0 to 31, ascending, got [1, 1, 2]."),
    (BERT, {"units": torch.tensor([1, 32])}, "must be different numbers from 0 to 31, ascending, got [1, 32]."),
    (BERT, {"units": [-1, 3]}, "must be different numbers from 0 to 31, ascending, got [-1, 3]."),
    (BERT, {"units": []}, "must be different numbers from 0 to 31, ascending, got []."),
    (BERT, {"layers": [1, 2], "num_layers": 3}, "slice_student.layers: 2 layers do not make num_layers 3."),
    (BERT, {"layers": [0, 1]}, "slice_student.layers: must be different numbers from 1 to 4, ascending, got [0, 1]."),
    (BERT, {"layers": [2, 1]}, "slice_student.layers: must be different numbers from 1 to 4, ascending, got [2, 1]."),
    (BERT, {"layers": []}, "slice_student.layers: must be different numbers from 1 to 4, ascending, got []."),
]


@pytest.mark.parametrize(("model_type", "sizes", "message"), REFUSED, ids=[str(sizes) for _, sizes, _ in REFUSED])
def test_F13_sizes_that_cannot_be_cut_are_refused_with_both_numbers(
    model_type: str, sizes: dict[str, Any], message: str
) -> None:
    teacher = tiny_model(model_type, **({"embedding_size": 24} if model_type == "electra" else {}))
    with pytest.raises(ShapeError, match=re.escape(message)):
        slice_student(teacher, **sizes)


def test_unknown_architectures_and_heads_are_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedModelError, match=re.escape("no row for model_type 'cohere'. Known: bart, bert, ")
    ) as error:
        slice_student(tiny_model("cohere", "causal"))
    assert "student.start: pretrained or config" in str(error.value)
    config = tiny_model("bert").config
    for auto, name in ((AutoModelForMaskedLM, "BertForMaskedLM"), (AutoModelForTokenClassification, "BertForToken")):
        with pytest.raises(UnsupportedModelError, match=name):
            slice_student(auto.from_config(config), hidden_size=16)


def test_a_parameter_that_no_pattern_knows_is_named() -> None:
    teacher = tiny_model("bert")
    teacher.bert.encoder.layer[1].adapter = nn.Linear(32, 8)
    with pytest.raises(UnsupportedModelError, match=re.escape("'bert.encoder.layer.1.adapter.weight' is not part of")):
        slice_student(teacher, hidden_size=16)


def test_weights_that_are_not_what_the_config_says_are_refused() -> None:
    teacher = tiny_model("bert")
    teacher.bert.encoder.layer[1].output.dense = nn.Linear(40, 32)
    with pytest.raises(
        UnsupportedModelError, match=re.escape("has the shape (32, 40) where the teacher's config says")
    ):
        slice_student(teacher, hidden_size=16)
    teacher = tiny_model("llama")
    teacher.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=re.escape("is stored as torch.int8, and quantized weights")):
        slice_student(teacher, hidden_size=16)
    teacher = tiny_model("bert")
    teacher.bert.pooler.dense.bias.data[3] = float("nan")
    with pytest.raises(UnsupportedModelError, match=re.escape("'bert.pooler.dense.bias' holds values that are not")):
        slice_student(teacher)


def test_A06_a_head_that_the_config_calls_tied_but_that_has_its_own_weights_is_refused() -> None:
    teacher = tiny_model("llama", "causal", tie_word_embeddings=True)
    teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.detach() + 1)
    with pytest.raises(UnsupportedModelError, match=r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight', but"):
        slice_student(teacher, hidden_size=16)
    teacher.config.tie_word_embeddings = False
    student = slice_student(teacher, hidden_size=16)
    assert student.lm_head.weight.data_ptr() != student.model.embed_tokens.weight.data_ptr()


def test_a_block_whose_work_depends_on_its_number_keeps_its_place() -> None:
    teacher = tiny_model("gpt2", "causal", scale_attn_by_inverse_layer_idx=True)
    message = "layer 2 cannot take another place: with scale_attn_by_inverse_layer_idx its attention depends on its"
    with pytest.raises(ShapeError, match=re.escape(message)):
        slice_student(teacher, num_layers=2)
    assert slice_student(teacher, layers=[1, 2]).config.n_layer == 2


def test_batches_that_say_nothing_are_refused() -> None:
    teacher = tiny_model("bert")
    batch = tiny_batch(teacher)
    padding = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    silent: list[tuple[list[dict[str, Tensor]], type[FlexKDError], str]] = [
        ([], DataError, "slice_student.batches: they hold no real token"),
        ([padding], DataError, "slice_student.batches: they hold no real token"),
        ([{"labels": batch["labels"]}], DataError, "a batch has no input_ids, only labels"),
    ]
    for batches, kind, message in silent:
        with pytest.raises(kind, match=re.escape(message)):
            slice_student(teacher, hidden_size=16, batches=batches)
    chunked = tiny_model("bert", chunk_size_feed_forward=3)
    with pytest.raises(UnsupportedModelError, match=re.escape("chunk_size_feed_forward is 3")):
        slice_student(chunked, hidden_size=16, batches=[batch])
    loud = tiny_model("bert").half()
    loud.bert.encoder.layer[2].output.dense.weight.data.mul_(6e4)
    loud.bert.encoder.layer[2].intermediate.dense.weight.data.mul_(50)
    with pytest.raises(ScoreError, match=re.escape("the teacher's states at bert.encoder.layer.2")):
        slice_student(loud, hidden_size=16, batches=[batch])


def test_R07_what_is_asked_of_a_slice_is_known() -> None:
    teacher = tiny_model("bert")
    batch = tiny_batch(teacher)
    # Run-time types would be told before; users have none.
    cut: Any = inspect.unwrap(slice_student)
    with pytest.raises(RecipeError, match=r"slice_student\.basis: unknown basis 'rotatd'.*Did you mean 'rotated'"):
        cut(teacher, hidden_size=16, basis="rotatd")
    with pytest.raises(DataError, match=r"slice_student\.batches: one mapping was given"):
        cut(teacher, hidden_size=16, batches=batch)
    for wrapped in (nn.DataParallel(teacher), nn.Linear(2, 2)):
        with pytest.raises(UnsupportedModelError, match=f"slice_student: {type(wrapped).__name__} is no plain model"):
            cut(wrapped, hidden_size=16)
    assert cut(teacher, layers=torch.tensor([1, 2])).config.num_hidden_layers == 2
