"""Signals of a live teacher: which rows and columns they hold, and what never enters them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import UnsupportedModelError, VocabularyError
from flexkd.models.forward.hidden import model_inputs, supervised_mask
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from tests.closeness import assert_close
from tests.tiny import tiny_batch, tiny_model
from tests.training.language_rows import answer_rows, collator_of

UNITS = torch.tensor([1, 5, 6, 30])


def request(positions: str = "tokens", *, basis: Tensor | None = None) -> SignalRequest:
    pair = LayerPair.of_units(UNITS) if basis is None else LayerPair(teacher_basis=basis)
    return SignalRequest.of(Objective(TaskTerm(), LogitTerm(), FeatureTerm(positions=positions, layers=(pair,))))


def batch_of(model: Any, rows: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**{key: value[rows] for key, value in batch.items()}, "example_id": [f"row-{i}" for i in rows.tolist()]}


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("positions", ["tokens", "supervised"])
def test_extents_say_how_a_signal_is_shared_out_among_the_rows(kind: str, positions: str) -> None:
    seq2seq = kind == "t5"
    model = tiny_model(kind, "seq2seq" if seq2seq else "causal")
    data = answer_rows(8, seq2seq=seq2seq)
    lengths = [sum(label != -100 for label in row["labels"]) for row in data]
    assert len(set(lengths)) > 2
    seen = lengths if seq2seq or positions == "supervised" else [len(row["input_ids"]) for row in data]
    extents = LiveTeacher(model).extents(collator_of(model)(data), request(positions))
    assert (extents.features, extents.predictions) == (seen, lengths)


def test_a_basis_turns_the_teachers_states() -> None:
    model = tiny_model("bert")
    batch = batch_of(model, torch.arange(4), tiny_batch(model))
    basis = torch.linalg.qr(torch.randn(32, 4)).Q
    plain = SignalRequest(True, (LayerPair(),), "tokens")
    states = LiveTeacher(model).signal(batch, plain).features[0]
    turned = LiveTeacher(model).signal(batch, request(basis=basis)).features[0]
    assert_close(turned, states @ basis)
    assert not turned.requires_grad


def test_A12_M17_states_at_padding_never_enter_a_signal() -> None:
    model = tiny_model("bert")
    batch = batch_of(model, torch.arange(4), tiny_batch(model))
    wanted = request()
    expected = LiveTeacher(model).signal(batch, wanted).features[0]
    assert len(expected) == int(batch["attention_mask"].sum())
    padded = {key: torch.nn.functional.pad(v, (0, 50)) if getattr(v, "ndim", 0) == 2 else v for key, v in batch.items()}
    small = tiny_model("bert", max_position_embeddings=80)
    small.load_state_dict({k: v for k, v in model.state_dict().items() if "position" not in k}, strict=False)
    with torch.no_grad():
        small.bert.embeddings.position_embeddings.weight[:40] = model.bert.embeddings.position_embeddings.weight
    assert_close(LiveTeacher(small).signal(padded, wanted).features[0], expected)


def test_a_teacher_with_its_own_encoding_reads_it_and_tokens_are_refused() -> None:
    model = tiny_model("bert")
    own = tiny_batch(model, rows=4, length=7, seed=4)
    batch = {**tiny_batch(model, rows=4), **{f"teacher_{k}": v for k, v in own.items() if k != "labels"}}
    expected = LiveTeacher(model).signal(own, request("supervised"))
    found = LiveTeacher(model).signal(batch, request("supervised"))
    assert_close(found.features[0], expected.features[0])
    assert_close(found.logits[:], expected.logits[:])
    with pytest.raises(VocabularyError, match="'tokens' needs one tokenizer"):
        LiveTeacher(model).signal(batch, request())


def test_Y02_Y04_a_signal_can_take_part_in_a_backward_and_carries_no_graph() -> None:
    model = tiny_model("bert")
    signal = LiveTeacher(model).signal(batch_of(model, torch.arange(4), tiny_batch(model)), request())
    student = torch.randn_like(signal.features[0], requires_grad=True)
    (student * signal.features[0]).sum().backward()
    assert signal.logits is not None
    assert (signal.logits[:].grad_fn, signal.features[0].grad_fn) == (None, None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_M16_causal_supervision_reads_the_position_before_the_label() -> None:
    model = tiny_model("llama", "causal")
    # Prompt of 3, answer of 2 and its end, 2 of padding; then the same row padded on the left.
    labels = torch.tensor([[-100, -100, -100, 8, 9, 2, -100, -100], [-100, -100, -100, -100, -100, 8, 9, 2]])
    mask = supervised_mask(model, {"input_ids": labels.clamp(min=0)}, labels)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[2, 3, 4], [4, 5, 6]]


def test_causal_logits_are_made_at_supervised_positions_alone() -> None:
    model = tiny_model("qwen2", "causal")
    batch = tiny_batch(model)
    signal = LiveTeacher(model).signal(batch, SignalRequest(True, (), "supervised"))
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
    assert_close(signal.logits[:], logits[:, :-1][batch["labels"][:, 1:] != -100])


def test_supervised_positions_of_an_unknown_head_are_refused_by_name() -> None:
    model = tiny_model("albert", embedding_size=16)
    with pytest.raises(UnsupportedModelError, match="which position its head reads is not known"):
        LiveTeacher(model).signal(tiny_batch(model), request("supervised"))
