"""Fused, transposed and scaled weights are cut where a slow second derivation finds them."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.models.forward.families import family_of
from flexkd.models.slicing.student import slice_student
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

UNITS = torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 19, 20, 23, 26, 29, 30, 31])


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def projections(model: PreTrainedModel, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value `[heads, head_dim, width]` and output `[width, heads, head_dim]`, seen per head."""
    attention = model.get_submodule(family_of(model).block_path(block))
    width = model.config.hidden_size
    if model.config.model_type == "gpt2":
        fused, out = attention.attn.c_attn.weight.T, attention.attn.c_proj.weight.T
        heads = [fused[start : start + width] for start in (0, width, 2 * width)]
    elif model.config.model_type == "gpt_neox":
        fused, out = attention.attention.query_key_value.weight, attention.attention.dense.weight
        by_head = fused.view(-1, 3, 8, width)
        heads = [by_head[:, part].reshape(-1, width) for part in range(3)]
    else:
        fused, out = attention.self_attn.qkv_proj.weight, attention.self_attn.o_proj.weight
        keys = 8 * model.config.num_key_value_heads
        heads = list(fused.split([fused.shape[0] - 2 * keys, keys, keys]))
    query, key, value = (part.detach().reshape(-1, 8, width) for part in heads)
    return query, key, value, out.detach().reshape(width, -1, 8)


@pytest.mark.parametrize("is_measured", [False, True], ids=["weights", "measured"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3"])
def test_A05_heads_of_a_fused_projection_stay_together(model_type: str, is_measured: bool) -> None:
    """The second and the fourth head alone write anything: their queries, keys and values are what stays."""
    options = {"num_attention_heads": 4, "num_key_value_heads": 4} if model_type == "phi3" else {}
    teacher = tiny_model(model_type, "causal", **options)
    for block in range(4):
        projections(teacher, block)[3][:, [0, 2]] = 0
    batches = [tiny_batch(teacher)] if is_measured else None
    student = slice_student(teacher, units=UNITS, batches=batches)
    for block in range(4):
        wide, narrow = projections(teacher, block), projections(student, block)
        for whole, cut in zip(wide[:3], narrow[:3], strict=True):
            assert torch.equal(cut, whole[[1, 3]][:, :, UNITS])
        assert torch.equal(narrow[3], wide[3][UNITS][:, [1, 3]])


def test_biases_of_a_fused_projection_are_cut_like_its_rows() -> None:
    teacher = tiny_model("gpt2", "causal")
    student = slice_student(teacher, hidden_size=16)
    for wide, narrow in zip(teacher.transformer.h, student.transformer.h, strict=True):
        weight, bias = wide.attn.c_attn.weight[:, :32], wide.attn.c_attn.bias
        kept = narrow.attn.c_attn.bias.view(3, 2, 8)
        heads = [int((bias.view(3, 4, 8) == head[:, None]).all(-1).all(0).nonzero()) for head in kept.unbind(1)]
        columns = torch.cat([torch.arange(head * 8, head * 8 + 8) for head in heads])
        assert torch.isin(narrow.attn.c_attn.weight[:, :16], weight[:, columns]).all()


def test_gate_and_up_of_one_matrix_keep_the_same_units() -> None:
    teacher = tiny_model("phi3", "causal")
    student = slice_student(teacher, intermediate_size=20)
    for wide, narrow in zip(teacher.model.layers, student.model.layers, strict=True):
        gate, up = wide.mlp.gate_up_proj.weight.detach().chunk(2)
        down = wide.mlp.down_proj.weight.detach()
        kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(20).indices.sort().values
        assert torch.equal(narrow.mlp.gate_up_proj.weight, torch.cat([gate[kept], up[kept]]))
        assert torch.equal(narrow.mlp.down_proj.weight, down[:, kept])


@pytest.mark.parametrize("is_measured", [False, True], ids=["weights", "measured"])
def test_norms_across_heads_follow_the_share_of_the_heads_that_stay(is_measured: bool) -> None:
    """Three times as loud, the silent half holds nine tenths of what the norm divides by, whatever the token."""
    teacher = tiny_model("olmo2", "causal")
    loudness = 3.0 if is_measured else 1.0
    for layer in teacher.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data[:16] = loudness * attention.q_proj.weight.data[16:]
        attention.k_proj.weight.data[:4] = loudness * attention.k_proj.weight.data[4:]
        attention.o_proj.weight.data[:, :16] = 0
    batch = tiny_batch(teacher)
    student = slice_student(teacher, num_heads=4, num_key_value_heads=1, batches=[batch] if is_measured else None)
    factor = 0.2**0.5 if is_measured else 1.0
    before, after = (model.model.layers[2].self_attn for model in (teacher, student))
    assert_close(after.q_norm.weight, before.q_norm.weight[16:] * factor)
    assert_close(after.k_norm.weight, before.k_norm.weight[4:] * factor)
    torch.testing.assert_close(logits_of(student, batch), logits_of(teacher, batch), rtol=1e-4, atol=1e-4)


def test_layers_without_positions_stay_those_without() -> None:
    teacher = tiny_model("smollm3", "causal", no_rope_layer_interval=3)
    assert teacher.config.no_rope_layers == [1, 1, 0, 1]
    student = slice_student(teacher, layers=[1, 3])
    assert student.config.no_rope_layers == [1, 0]
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [1, 0]


def test_a_config_that_is_silent_about_its_feed_forward_stays_silent_where_it_can() -> None:
    teacher = tiny_model("gpt2", "causal", n_inner=None)
    assert slice_student(teacher, hidden_size=16).config.n_inner is None
    assert slice_student(teacher, hidden_size=16, intermediate_size=20).config.n_inner == 20
