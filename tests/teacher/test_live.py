"""A live teacher: frozen, always in eval mode, and its signal holds what the heads of both models read."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.losses import LOGIT_LOSSES, correlation, forward_kl
from flexkd.core.objective import Objective, Signal
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import VocabularyError
from flexkd.models.forward.hidden import model_inputs
from flexkd.teacher.live import LiveTeacher, batch_positions, read_signal, student_columns
from flexkd.teacher.signal import SignalRequest, Teacher
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model

TOKENS, SUPERVISED = "tokens", "supervised"


def everything(positions: str = TOKENS, *layers: int) -> SignalRequest:
    return SignalRequest(True, tuple(LayerPair(layer, layer) for layer in layers or (-1,)), positions)


def student_signal(student: PreTrainedModel, batch: Mapping[str, Any], request: SignalRequest) -> Signal:
    inputs = model_inputs(student, batch)
    reads = tuple((pair.student_layer, student_columns(pair)) for pair in request.layers)
    return read_signal(student, inputs, batch_positions(student, inputs, batch["labels"], request), reads)


def moved_to_the_left(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with the padding before them."""
    lengths = batch["attention_mask"].sum(1).tolist()
    width = batch["input_ids"].shape[1]
    return {
        key: torch.stack([row.roll(width - n) for row, n in zip(value, lengths, strict=True)])
        if value.ndim == 2
        else value
        for key, value in batch.items()
    }


def test_a_request_is_what_the_objective_reads() -> None:
    pair = LayerPair(1, 2)
    assert SignalRequest.of(Objective(TaskTerm())) == SignalRequest(False, (), TOKENS)
    assert SignalRequest.of(Objective(TaskTerm(), LogitTerm())) == SignalRequest(True, (), TOKENS)
    assert SignalRequest.of(Objective(TaskTerm(), LogitTerm(weight=0.0))) == SignalRequest(False, (), TOKENS)
    features = FeatureTerm(positions=SUPERVISED, layers=(pair,))
    assert SignalRequest.of(Objective(features=features)) == SignalRequest(False, (pair,), SUPERVISED)


def test_logits_are_there_only_when_asked_for() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    teacher: Teacher = LiveTeacher(model)
    assert teacher.signal(batch, SignalRequest(False, (LayerPair(),), TOKENS)).logits is None
    signal = teacher.signal(batch, SignalRequest(True, (), TOKENS))
    assert torch.equal(signal.logits[:], model(**model_inputs(model, batch)).logits)
    assert signal.features == ()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_supervised_row_of_a_classifier_is_what_its_head_reads(padding: Any) -> None:
    model = tiny_model("llama")
    signal = LiveTeacher(model).signal(tiny_batch(model, rows=6, padding=padding), everything(SUPERVISED))
    assert signal.features[0].shape == (6, 32)
    assert_close(F.linear(signal.features[0], model.score.weight), signal.logits[:])


@pytest.mark.parametrize("tied", [False, True])
def test_the_supervised_rows_of_a_causal_model_are_what_its_head_reads(tied: bool) -> None:
    model = tiny_model("qwen3", "causal", tie_word_embeddings=tied)
    batch = tiny_batch(model)
    signal = LiveTeacher(model).signal(batch, everything(SUPERVISED))
    assert len(signal.logits[:]) == int((batch["labels"] != -100).sum())
    assert_close(F.linear(signal.features[0], model.lm_head.weight), signal.logits[:])


def test_token_rows_stand_in_the_order_of_the_batch_at_every_layer() -> None:
    model = tiny_model("roberta")
    batch = tiny_batch(model)
    signal = LiveTeacher(model).signal(batch, everything(TOKENS, 1, 3, -1))
    expected = model(**model_inputs(model, batch), output_hidden_states=True).hidden_states
    for feature, layer in zip(signal.features, (1, 3, -1), strict=True):
        assert torch.equal(feature, expected[layer][batch["attention_mask"].bool()])


def test_columns_are_the_teachers_units_in_the_order_of_the_pairs() -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    whole = LiveTeacher(model).signal(batch, everything()).features[0]
    pairs = UnitPairs(torch.tensor([0, 1, 2]), torch.tensor([30, 4, 17]))
    basis = torch.linalg.qr(torch.randn(32, 20)).Q
    asked = (
        LayerPair(units=pairs),
        LayerPair(units=UnitPairs(pairs.student, torch.tensor([7, 0, 19])), teacher_basis=basis),
    )
    signal = LiveTeacher(model).signal(batch, SignalRequest(False, asked, TOKENS))
    assert torch.equal(signal.features[0], whole[:, [30, 4, 17]])
    assert_close(signal.features[1], (whole @ basis)[:, [7, 0, 19]])
    ours = student_signal(
        model, batch, SignalRequest(False, (LayerPair(units=UnitPairs(pairs.teacher, pairs.student)),), TOKENS)
    )
    assert torch.equal(ours.features[0], whole[:, [30, 4, 17]])


def test_S03_dropout_never_reaches_a_signal() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = tiny_batch(model)
    expected = LiveTeacher(model).signal(batch, everything())
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    teacher = LiveTeacher(model)
    student = nn.Module()
    student.teacher_of_a_student = teacher  # type: ignore[assignment]
    for _ in range(2):
        student.train()
        model.train()
        signal = teacher.signal(batch, everything())
        assert forward_kl(signal.logits[:], expected.logits[:]).abs().max() == 0
        assert torch.equal(signal.features[0], expected.features[0])
    handle.remove()
    assert modes == [False, False]
    assert list(student.modules()) == [student]


def test_Y02_the_teacher_learns_nothing_and_keeps_no_graph() -> None:
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher, student = LiveTeacher(model), tiny_model("bert", seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    request = everything(TOKENS, -1, 2)
    for seed in range(10):
        batch = tiny_batch(model, seed=seed)
        theirs, ours = teacher.signal(batch, request), student_signal(student, batch, request)
        assert all(
            not tensor.requires_grad and tensor.grad_fn is None for tensor in (theirs.logits[:], *theirs.features)
        )
        loss = forward_kl(ours.logits, theirs.logits[:]).mean()
        loss = loss + sum(correlation(x, y).mean() for x, y in zip(ours.features, theirs.features, strict=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES.keys())
def test_Y04_after_a_pass_under_inference_mode_every_loss_has_its_backward(loss: Any) -> None:
    model = tiny_model("llama")
    batch, teacher = tiny_batch(model), LiveTeacher(tiny_model("llama", seed=1))
    with torch.inference_mode():
        teacher.signal(batch, everything())
    ours, theirs = student_signal(model, batch, everything()), teacher.signal(batch, everything())
    (loss(ours.logits, theirs.logits[:]).sum() + correlation(ours.features[0], theirs.features[0]).sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_D14_the_teacher_reads_segments_that_the_student_does_not_take() -> None:
    bert, distilbert = tiny_model("bert"), tiny_model("distilbert")
    batch = tiny_batch(bert)
    signal = LiveTeacher(bert).signal(batch, everything())
    assert torch.equal(signal.logits[:], bert(**model_inputs(bert, batch)).logits)
    without = {key: value for key, value in batch.items() if key != "token_type_ids"}
    assert not torch.allclose(signal.logits[:], LiveTeacher(bert).signal(without, everything()).logits[:], atol=0.01)
    ours = student_signal(distilbert, batch, everything())
    assert torch.equal(ours.logits, student_signal(distilbert, without, everything()).logits[:])
    assert ours.features[0].shape == signal.features[0].shape


def test_two_encodings_meet_at_supervised_positions_and_tokens_are_refused() -> None:
    teacher, student = tiny_model("llama"), tiny_model("bert")
    theirs = tiny_batch(teacher, rows=5, length=12, seed=3, padding="left")
    batch = {**tiny_batch(student, rows=5), **{f"teacher_{k}": v for k, v in theirs.items() if k != "labels"}}
    signal = LiveTeacher(teacher).signal(batch, everything(SUPERVISED))
    assert_close(signal.features[0], LiveTeacher(teacher).signal(theirs, everything(SUPERVISED)).features[0])
    assert_close(F.linear(signal.features[0], teacher.score.weight), signal.logits[:])
    assert student_signal(student, batch, everything(SUPERVISED)).features[0].shape == (5, 32)
    with pytest.raises(VocabularyError, match=r"positions: 'tokens' needs one tokenizer .* Use positions 'supervised'"):
        LiveTeacher(teacher).signal(batch, everything(TOKENS))
    # Without features there are no positions to differ.
    assert_close(LiveTeacher(teacher).signal(batch, SignalRequest(True, (), TOKENS)).logits, signal.logits[:])


@pytest.mark.parametrize("task", ["classification", "causal"])
@pytest.mark.parametrize("positions", [TOKENS, SUPERVISED])
def test_D04_M17_padding_on_either_side_gives_the_same_signal(task: Any, positions: str) -> None:
    model = tiny_model("llama", task)
    right = tiny_batch(model, rows=5)
    first, second = (
        LiveTeacher(model).signal(b, everything(positions, -1, 2)) for b in (right, moved_to_the_left(right))
    )
    assert_close(second.logits[:], first.logits[:])
    for one, two in zip(first.features, second.features, strict=True):
        assert_close(two, one)


def test_F19_a_sink_outside_of_the_answer_does_not_enter_a_causal_signal() -> None:
    model = tiny_model("llama", "causal")
    batch = tiny_batch(model)
    expected = LiveTeacher(model).signal(batch, everything(SUPERVISED))

    def spike(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0, 3] += 1000
        return output

    handle = model.model.norm.register_forward_hook(spike)
    spiked, tokens = (LiveTeacher(model).signal(batch, everything(p)) for p in (SUPERVISED, TOKENS))
    handle.remove()
    assert torch.equal(spiked.features[0], expected.features[0])
    assert torch.equal(spiked.logits[:], expected.logits[:])
    assert tokens.features[0].max() > 900


@pytest.mark.parametrize("positions", [TOKENS, SUPERVISED])
def test_A12_a_state_at_padding_that_is_not_a_number_stays_there(positions: str) -> None:
    model = tiny_model("bert")
    batch = tiny_batch(model)
    expected = LiveTeacher(model).signal(batch, everything(positions))

    def poison(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"].clone()
        output["last_hidden_state"][~batch["attention_mask"].bool()] = float("nan")
        return output

    handle = model.bert.encoder.register_forward_hook(poison)
    signal = LiveTeacher(model).signal(batch, everything(positions))
    handle.remove()
    assert torch.equal(signal.features[0], expected.features[0])
    assert torch.equal(signal.logits[:], expected.logits[:])


def test_A12_attention_back_ends_give_one_loss() -> None:
    teacher, student = tiny_model("bert"), tiny_model("bert", seed=1)
    batch = tiny_batch(teacher)
    losses = []
    for back_end in ("sdpa", "eager"):
        teacher.set_attn_implementation(back_end)
        theirs, ours = LiveTeacher(teacher).signal(batch, everything()), student_signal(student, batch, everything())
        loss = forward_kl(ours.logits, theirs.logits[:]).sum() + correlation(ours.features[0], theirs.features[0]).sum()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_A10_the_teachers_precision_is_its_own(weights: torch.dtype) -> None:
    plain = tiny_model("bert")
    batch = tiny_batch(plain)
    expected = LiveTeacher(plain).signal(batch, everything())
    model = tiny_model("bert").to(weights)
    basis = torch.linalg.qr(torch.randn(32, 4)).Q
    request = SignalRequest(True, (LayerPair(), LayerPair(teacher_basis=basis)), TOKENS)
    # Autocast around it, for the student, is not the teacher's.
    with torch.autocast("cpu", torch.bfloat16):
        signal = LiveTeacher(model).signal(batch, request)
    assert signal.logits[:].dtype == signal.features[0].dtype == weights
    assert signal.features[1].dtype == torch.float32
    if weights == torch.float32:
        assert torch.equal(signal.logits[:], expected.logits[:])
    half = LiveTeacher(plain, precision=torch.bfloat16).signal(batch, everything())
    assert half.logits[:].dtype == torch.bfloat16
    # Four layers of bfloat16, of values around 1.
    assert (half.logits[:].float() - expected.logits[:]).abs().max() < 0.1
