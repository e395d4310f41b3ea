"""A rotated teacher computes the same, its units are directions of the stream, and a narrow student keeps the first."""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.geometry import LanguageModelGeometry, direction_scores, leading_directions
from flexkd.core.losses import correlation
from flexkd.errors import DataError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.hidden import hooked_states
from flexkd.models.slicing.calibration import calibrate, measure
from flexkd.models.slicing.rotation import Rotation, mixed_moment, rotate_teacher, stream_geometry
from flexkd.models.slicing.shape import shape_of
from flexkd.models.slicing.student import slice_student
from tests.closeness import assert_close
from tests.tiny import TinyTask, tiny_batch, tiny_model

ROTATED: Final = [name for name, family in FAMILIES.items() if family.can_rotate]
LAYERS: Final = (-1, 1, 2, 4)


@lru_cache
def teacher_of(model_type: str, task: TinyTask = "causal", **changes: Any) -> PreTrainedModel:
    return tiny_model(model_type, task, **changes)


@lru_cache
def rotation_of(model_type: str, task: TinyTask = "causal", **changes: Any) -> Rotation[PreTrainedModel]:
    teacher = teacher_of(model_type, task, **changes)
    return rotate_teacher(teacher, [tiny_batch(teacher, rows=6)])


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def states_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[int, Tensor]:
    """Real tokens at some layers."""
    with torch.no_grad(), hooked_states(model, dict.fromkeys(LAYERS)) as states:
        model(**batch)
    return {layer: state[batch["attention_mask"].bool()] for layer, state in states.items()}


@pytest.mark.parametrize(
    ("model_type", "task", "changes"),
    [
        *((name, "causal", {"tie_word_embeddings": tied}) for name in ROTATED for tied in (False, True)),
        ("llama", "causal", {"attention_bias": True, "mlp_bias": True}),
        ("granite", "causal", {"attention_bias": True, "mlp_bias": True}),
        *((name, "classification", {}) for name in ROTATED if "classification" in FAMILIES[name].tasks),
    ],
    ids=str,
)
def test_F13_at_full_width_a_rotated_student_gives_the_teachers_logits(
    model_type: str, task: TinyTask, changes: dict[str, Any]
) -> None:
    teacher = teacher_of(model_type, task, **changes)
    before = copy.deepcopy(teacher.state_dict())
    batch = tiny_batch(teacher, rows=6)
    student = slice_student(teacher, batches=[batch], basis="rotated")
    other = tiny_batch(teacher, seed=1, padding="left")
    assert type(student) is type(teacher)
    # Embeddings of length 5 instead of 0.1 make tied logits of size 30.
    scale = max(1.0, logits_of(teacher, other).abs().max().item())
    torch.testing.assert_close(logits_of(student, other), logits_of(teacher, other), rtol=0, atol=2e-6 * scale)
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}], ids=["plain", "tied"]
)
@pytest.mark.parametrize("model_type", ROTATED)
def test_A05_each_unit_of_the_student_is_the_direction_that_it_is_bound_to(
    model_type: str, changes: dict[str, Any]
) -> None:
    """At the head's input and behind each block: the same numbers, and correlation 1 for every unit."""
    teacher, rotation = teacher_of(model_type, **changes), rotation_of(model_type, **changes)
    batch = tiny_batch(teacher, rows=8, length=14, seed=2)
    ours, theirs = states_of(rotation.model, batch), states_of(teacher, batch)
    for layer in LAYERS:
        mapped = theirs[layer] @ rotation.stream.directions(layer, torch.arange(32))
        torch.testing.assert_close(ours[layer], mapped, rtol=1e-4, atol=1e-5)
        assert correlation(ours[layer], mapped).max() < 1e-5
    # The head's input has the norm's weight in it, unit by unit, which the basis alone would mix.
    assert correlation(ours[-1], theirs[-1] @ rotation.stream.basis.float()).max() > 1e-3


@pytest.mark.parametrize("model_type", ROTATED)
def test_the_stream_is_turned_by_the_eigenvectors_of_what_the_norms_put_out(model_type: str) -> None:
    """Slow: the norm of each state, one token after the other, in the teacher's own coordinates."""
    teacher, rotation = teacher_of(model_type), rotation_of(model_type)
    batch = tiny_batch(teacher, rows=6)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][batch["attention_mask"].bool()]))
        for name, module in teacher.named_modules()
        if name.endswith(("layernorm", "model.norm"))
    ]
    logits_of(teacher, batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * 4 + 1
    tokens = torch.cat(seen).double()
    expected = sum(torch.outer(token, token) / token.square().sum() for token in tokens) / len(tokens)
    assert isinstance(expected, Tensor)
    assert_close(calibrate(teacher, [batch]).stream_moment, expected, dtype=torch.float32)
    values, vectors = torch.linalg.eigh(expected)
    assert_close(rotation.stream.energy, values.flip(0), dtype=torch.float32)
    aligned = (vectors.flip(1) * rotation.stream.basis).sum(0).abs()
    # Neighbours with almost the same energy may mix by what float32 cannot tell apart.
    assert aligned[:8].min() > 1 - 1e-3
    assert_close(rotation.stream.basis.T @ rotation.stream.basis, torch.eye(32))
    assert (rotation.stream.basis.gather(0, rotation.stream.basis.abs().argmax(0, keepdim=True)) > 0).all()
    for name, parameter in rotation.model.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("kept", [[0, 1, 2, 5, 9, 20], list(range(16))], ids=["chosen", "leading"])
@pytest.mark.parametrize("model_type", ROTATED)
def test_what_is_measured_of_the_teacher_is_what_a_pass_of_the_turned_one_would_show(
    model_type: str, kept: list[int]
) -> None:
    """Slow: the turned model reads the rows itself, and the share of the kept units is taken token by token."""
    teacher, rotation = teacher_of(model_type), rotation_of(model_type)
    batches = [tiny_batch(teacher, rows=6), tiny_batch(teacher, rows=3, seed=4, padding="left")]
    expected = measure(rotation.model, batches, torch.tensor(kept))
    means = calibrate(teacher, batches).along(rotation.stream.basis[:, kept])
    assert set(means) == set(expected)
    assert any(name.endswith("norm") for name in means)
    for name, value in expected.items():
        torch.testing.assert_close(means[name], value, rtol=1e-4, atol=1e-6)


def planted(model_type: str, rank: int) -> PreTrainedModel:
    """A teacher whose stream lies in `rank` directions that are no units."""
    teacher = tiny_model(model_type, "causal", tie_word_embeddings=True)
    mixing = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q[:, :rank]
    onto = mixing @ mixing.T
    with torch.no_grad():
        teacher.get_input_embeddings().weight.copy_(teacher.get_input_embeddings().weight @ onto)
        for name, parameter in teacher.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(onto @ parameter)
    return teacher


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_F13_a_stream_of_few_directions_loses_nothing_at_that_width(model_type: str) -> None:
    """Half the width is exact in the rotated basis, with the norms' scale restored, and far off by coordinates."""
    teacher = planted(model_type, rank=16)
    batch = tiny_batch(teacher, rows=6)
    whole = shape_of(teacher.config)
    sizes = {
        "hidden_size": 16,
        "num_heads": whole.num_heads,
        "num_key_value_heads": whole.num_key_value_heads,
        "intermediate_size": whole.intermediate_size,
    }
    student = slice_student(teacher, batches=[batch], basis="rotated", **sizes)
    assert shape_of(student.config).hidden_size == 16
    # Logits of size 30; the norms' epsilon weighs half as much against a mean square twice as large.
    torch.testing.assert_close(logits_of(student, batch), logits_of(teacher, batch), rtol=1e-3, atol=1e-3)
    rotation = rotate_teacher(teacher, [batch])
    assert rotation.stream.energy[16:].abs().max() < 1e-6
    theirs, ours = states_of(teacher, batch), states_of(student, batch)
    for layer in LAYERS:
        assert (
            correlation(ours[layer], theirs[layer] @ rotation.stream.directions(layer, torch.arange(16))).max() < 1e-4
        )
    plain = slice_student(teacher, batches=[batch], **sizes)
    assert (logits_of(plain, batch) - logits_of(teacher, batch)).abs().max() > 1


@pytest.mark.parametrize("model_type", ROTATED)
def test_S02_S09_a_rotated_student_of_half_the_width_runs_learns_saves_reloads_and_generates(
    model_type: str, tmp_path: Path
) -> None:
    teacher, rotation = (
        teacher_of(model_type, tie_word_embeddings=True),
        rotation_of(model_type, tie_word_embeddings=True),
    )
    batch = tiny_batch(teacher, rows=6)
    student = slice_student(teacher, hidden_size=16, num_layers=2, batches=[batch], basis="rotated")
    same = slice_student(rotation.model, units=range(16), num_layers=2, batches=[batch])
    for name, weight in student.state_dict().items():
        # The scales of its norms come from the teacher's states here, from those of the turned one there.
        torch.testing.assert_close(weight, same.state_dict()[name], rtol=1e-5, atol=1e-6)
    student(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.save_pretrained(tmp_path)
    reloaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(reloaded, batch), logits_of(student, batch))
    assert not reloaded.config.tie_word_embeddings
    prompt = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    written = student.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(reloaded.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False), written)


def test_A13_half_precision_stays_and_its_rounding_is_no_reason_to_refuse() -> None:
    teacher = tiny_model("llama", "causal").to(torch.bfloat16)
    student = slice_student(teacher, hidden_size=16, batches=[tiny_batch(teacher)], basis="rotated")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_a_unit_whose_last_weight_is_zero_carries_nothing_to_the_head() -> None:
    teacher = tiny_model("llama", "causal")
    with torch.no_grad():
        teacher.model.norm.weight[5] = 0
    batch = tiny_batch(teacher)
    rotation = rotate_teacher(teacher, [batch])
    assert rotation.stream.directions(-1, torch.arange(32)).isfinite().all()
    assert (rotation.stream.directions(-1, torch.arange(32))[5] == 0).all()
    torch.testing.assert_close(logits_of(rotation.model, batch), logits_of(teacher, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt"])
def test_S02_layer_norms_are_refused_by_name(model_type: str) -> None:
    teacher = tiny_model(model_type)
    message = (
        f"slice_student.basis: 'rotated' needs norms that do not centre, and {model_type} has LayerNorm. Use basis"
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        slice_student(teacher, batches=[tiny_batch(teacher)], basis="rotated")


@pytest.mark.parametrize(
    ("model_type", "place"),
    [
        ("gemma2", "post_attention_layernorm"),
        ("gemma3_text", "post_attention_layernorm"),
        ("olmo2", "self_attn.q_proj"),
    ],
)
def test_S02_norms_on_what_a_block_writes_are_refused_by_name(model_type: str, place: str) -> None:
    """Their weights multiply the stream unit by unit, which only a basis of units survives."""
    teacher = tiny_model(model_type, "causal")
    message = f"in {model_type} no norm is right before a matrix that reads it at 'model.layers.0.{place}', so that"
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        slice_student(teacher, hidden_size=16, batches=[tiny_batch(teacher)], basis="rotated")


def test_a_norm_that_no_matrix_reads_and_a_model_that_computes_something_else_are_refused() -> None:
    teacher = tiny_model("llama", "causal")
    batch = tiny_batch(teacher)
    # Something between norm and matrices, as a family might have.
    handle = teacher.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    message = "in llama no norm is right before a matrix that reads it at 'model.layers.1.mlp.gate_proj'"
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        rotate_teacher(teacher, [batch])
    handle.remove()
    handle = teacher.model.layers[1].mlp.register_forward_hook(lambda *args: args[2] + 1)
    with pytest.raises(UnsupportedModelError, match="computes other logits in another basis"):
        rotate_teacher(teacher, [batch])
    handle.remove()
    assert not teacher.model.norm._forward_hooks


def test_what_a_rotation_cannot_be_asked_for_is_refused() -> None:
    teacher = tiny_model("llama", "causal")
    with pytest.raises(ShapeError, match=re.escape("slice_student.units: basis 'rotated' keeps directions")):
        slice_student(teacher, units=range(8), batches=[tiny_batch(teacher)], basis="rotated")
    with pytest.raises(ShapeError, match=re.escape("slice_student.batches: None, and basis 'rotated'")):
        slice_student(teacher, hidden_size=8, basis="rotated")
    with pytest.raises(DataError, match=re.escape("slice_student.batches: there are none.")):
        slice_student(teacher, hidden_size=8, batches=[], basis="rotated")


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_a_head_may_stay_tied_and_is_exact_behind_one_weight_with_outliers(model_type: str) -> None:
    teacher = tiny_model(model_type, "causal", tie_word_embeddings=True)
    with torch.no_grad():
        teacher.get_parameter("model.norm.weight").fill_(1.8)
        teacher.get_parameter("model.norm.weight")[[3, 17]] = torch.tensor([-2.0, 0.5])
    batch = tiny_batch(teacher, rows=6)
    rotation = rotate_teacher(teacher, [batch], tied_head=True)
    assert rotation.model.get_output_embeddings().weight is rotation.model.get_input_embeddings().weight
    torch.testing.assert_close(logits_of(rotation.model, batch), logits_of(teacher, batch), rtol=1e-4, atol=1e-4)
    assert_close(rotation.stream.basis[[3, 17]].abs().amax(1), torch.ones(2))
    theirs, ours = states_of(teacher, batch), states_of(rotation.model, batch)
    for layer in LAYERS:
        torch.testing.assert_close(
            ours[layer], theirs[layer] @ rotation.stream.directions(layer, torch.arange(32)), rtol=1e-4, atol=1e-4
        )
    student = slice_student(teacher, hidden_size=16, batches=[batch], basis="rotated", tied_head=True)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.config.tie_word_embeddings


def test_a_tied_head_reads_the_nearest_multiple_of_the_embeddings_along_each_direction() -> None:
    """Slow: least squares over the tokens, one direction after the other, with a constant that softmax cannot see."""
    teacher = tiny_model("llama", "causal", tie_word_embeddings=True)
    exact = rotate_teacher(teacher, [tiny_batch(teacher)])
    tied = rotate_teacher(teacher, [tiny_batch(teacher)], tied_head=True)
    assert_close(tied.stream.basis, exact.stream.basis)
    table, head = (
        exact.model.get_input_embeddings().weight.double(),
        exact.model.get_output_embeddings().weight.double(),
    )
    for direction in range(32):
        factors = torch.stack([table[:, direction], torch.ones(len(table), dtype=torch.float64)], 1)
        nearest = torch.linalg.lstsq(factors, head[:, direction, None]).solution[0, 0]
        assert_close(tied.stream.head_scale[direction], nearest, dtype=torch.float32)
    assert_close(tied.model.get_parameter("model.norm.weight"), tied.stream.head_scale, dtype=torch.float32)


def test_the_score_of_a_direction_is_what_predictions_lose_without_it() -> None:
    """KL(p(h) || p(h + e w d)) by finite differences, written out for each direction, times its variance."""
    generator = torch.Generator().manual_seed(0)
    states, head = (torch.randn(size, 6, dtype=torch.float64, generator=generator) for size in (40, 9))
    norm = torch.rand(6, dtype=torch.float64, generator=generator) + 0.5
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
    variances = torch.rand(6, dtype=torch.float64, generator=generator)
    sums = LanguageModelGeometry(head)
    sums.add((states * norm) @ head.T)
    scores = direction_scores(basis, variances, stream_geometry(sums.total() / len(states), norm))
    log_p = ((states * norm) @ head.T).log_softmax(-1)
    for direction, variance, score in zip(basis.T, variances, scores, strict=True):
        step = 1e-3 * direction * norm
        log_q = ((states * norm + step) @ head.T).log_softmax(-1)
        nats = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        torch.testing.assert_close(2e6 * nats * variance, score, rtol=1e-2, atol=0)


def test_a_mixed_basis_leads_with_what_the_stream_carries_and_with_what_the_head_reads() -> None:
    """A large share of function puts the geometry's leading direction first, none leaves the stream's."""
    teacher = tiny_model("llama", "causal")
    batches = [{"input_ids": torch.randint(4, 40, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}]
    direction = torch.zeros(32, dtype=torch.float64)
    direction[7] = 1
    plain = calibrate(teacher, batches).stream_moment
    moment = mixed_moment(teacher, plain, torch.outer(direction, direction), function_share=100.0)
    leading = leading_directions(moment, 1)[:, 0]
    assert float(leading @ direction) > 0.999
    mixed = mixed_moment(teacher, plain, torch.outer(direction, direction), function_share=1e-12)
    torch.testing.assert_close(mixed, plain / plain.trace(), rtol=1e-6, atol=1e-9)
