"""A cached teacher says what the live one says, whatever the order, the padding and the way in which it is asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexkd.core.losses import forward_kl
from flexkd.core.objective import Signal
from flexkd.core.outputs import HeadOutputs, TopOutputs, TopRule
from flexkd.core.terms import LayerPair
from flexkd.data.encoding.collation import Collator
from flexkd.errors import ArtifactError, DataError
from flexkd.teacher import live
from flexkd.teacher.cache import writer as building
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.shards import Shard
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from tests.closeness import assert_close
from tests.teacher.cache.caches import Counting, cache_of, request_of
from tests.tiny import tiny_batch, tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import rows as classified_rows

# 11 bits of float16, and the 254 steps of a range of some standard deviations.
HALF, BYTE = 1e-3, 2e-2


def same_signals(found: Any, expected: Any, tolerance: float) -> None:
    for one, two in zip(found.features, expected.features, strict=True):
        assert one.shape == two.shape
        assert float((one - two).abs().max()) <= tolerance * float(two.abs().max())
    if isinstance(expected.logits, TopOutputs):
        assert torch.equal(found.logits.indices, expected.logits.indices)
        assert_close(found.logits.log_tail, expected.logits.log_tail)
        assert float((found.logits.log_probs - expected.logits.log_probs).abs().max()) < 8 * HALF
    else:
        assert float(forward_kl(found.logits[:].float(), expected.logits[:].float()).abs().max()) < 1e-5


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("positions", ["tokens", "supervised"])
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_K01_every_row_finds_its_own_answer_in_any_order(
    tmp_path: Path, kind: str, positions: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unequal lengths, so that a row taken for another would not even fit; asked in fours, with scales each."""
    monkeypatch.setattr(building, "TEACHER_BATCH_SIZE", 4)
    tasks: dict[str, Any] = {"bert": "classification", "llama": "causal", "t5": "seq2seq"}
    model = tiny_model(kind, tasks[kind])
    data = classified_rows(9) if kind == "bert" else answer_rows(9, seq2seq=kind == "t5")
    counting, wanted, collate = Counting(model), request_of(positions=positions), collator_of(model)
    cached = cache_of(tmp_path, counting, wanted, data, storage=storage)
    assert list(map(len, counting.asked)) == [1, 4, 4, 1], "the shapes by one row, then each row once"
    for order in ([7, 0, 3], list(range(9)), [5]):
        batch = collate([data[index] for index in order])
        expected = LiveTeacher(model).signal(batch, wanted)
        same_signals(cached.signal(batch, wanted), expected, HALF if storage == "float16" else BYTE)
    assert len(counting.asked) == 4
    if kind == "bert":
        assert cached.signal(collate(data), wanted).logits.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_K02_the_likeliest_token_is_the_live_teachers_at_every_position_on_either_side_of_padding(
    tmp_path: Path, kind: str
) -> None:
    model, data = tiny_model(kind, "causal"), answer_rows(8)
    wanted = SignalRequest(True, (), "supervised", TopRule(5))
    cached = cache_of(tmp_path, model, wanted, data)
    for side in ("right", "left"):
        batch = collator_of(model, padding_side=side)(data)
        found = cached.signal(batch, wanted).logits
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows, positions = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        assert isinstance(found, TopOutputs)
        assert torch.equal(found.indices[:, 0], logits[rows, positions].argmax(-1))
        assert len(found) == sum(sum(label != -100 for label in row["labels"]) for row in data)


def test_K02_a_file_with_another_number_of_positions_than_its_rows_is_refused(tmp_path: Path) -> None:
    cache_of(tmp_path, tiny_model("llama", "causal"), request_of())
    path = next(tmp_path.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["columns.0"] = tensors["columns.0"][:-1].clone()
    building.write_shard(path, tensors, bytes_left=0)
    with pytest.raises(ArtifactError, match=r"columns\.0 has \d+ positions, its rows have \d+\. Delete the file"):
        Shard(path, building.TEACHER_BATCH_SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "row-99"}, r"row 'row-99' is not in the cache \(1 such rows"),
        ({"input_ids": "turned"}, r"row 'row-2' has changed since the teacher read it"),
        ({"labels": "hidden"}, r"row 'row-2' has changed"),
    ],
)
def test_K01_a_missing_or_changed_row_is_an_error_and_never_zeros(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model, data = tiny_model("llama", "causal"), answer_rows(8)
    cached = cache_of(tmp_path, model, request_of(), data)
    row = dict(data[2])
    if change.get("input_ids"):
        row["input_ids"] = [*row["input_ids"][:-1], 9]
    if change.get("labels"):
        first = next(index for index, label in enumerate(row["labels"]) if label != -100)
        row["labels"] = [-100 if index == first else label for index, label in enumerate(row["labels"])]
    row["id"] = change.get("id", row["id"])
    with pytest.raises(ArtifactError, match=message):
        cached.signal(collator_of(model)([data[0], row]), request_of())


def test_K01_a_classifiers_own_encoding_is_what_its_rows_are_known_by(tmp_path: Path) -> None:
    model, data = tiny_model("bert"), classified_rows(4)
    own = [{**row, "input_ids": row["input_ids"][::-1], "teacher_input_ids": row["input_ids"]} for row in data]
    own = [{**row, "teacher_attention_mask": [1] * len(row["teacher_input_ids"])} for row in own]
    wanted = request_of(positions="supervised")
    cached = cache_of(tmp_path, model, wanted, own)
    same_signals(cached.signal(Collator(0)(own), wanted), LiveTeacher(model).signal(Collator(0)(data), wanted), HALF)
    # The student's encoding has no part in it, nor has a label.
    other = [{**row, "input_ids": [5, 6], "labels": 2} for row in own]
    cached.signal(Collator(0)(other), wanted)
    with pytest.raises(ArtifactError, match="has changed"):
        cached.signal(Collator(0)([{**own[0], "teacher_input_ids": own[1]["teacher_input_ids"]}]), wanted)


def test_K01_rows_without_ids_or_with_one_id_for_two_are_refused(tmp_path: Path) -> None:
    model, data = tiny_model("bert"), classified_rows(4)
    with pytest.raises(DataError, match="two that differ share the id 'row-0'"):
        cache_of(tmp_path, model, request_of(), [*data, {**data[1], "id": "row-0"}])
    with pytest.raises(DataError, match="one has no 'id'"):
        cache_of(tmp_path, model, request_of(), [{"input_ids": [4, 5], "labels": 0}])
    cached = cache_of(tmp_path, model, request_of(), [*data, data[1]])
    assert len(cached._ids) == 4
    with pytest.raises(DataError, match="have no 'id'"):
        cached.signal(tiny_batch(model), request_of())


def test_several_requests_read_their_own_columns_of_one_pass(tmp_path: Path) -> None:
    model, data = tiny_model("llama", "causal"), answer_rows(8)
    basis = torch.linalg.qr(torch.randn(32, 6)).Q
    directions = LayerPair(units=LayerPair.of_units(torch.tensor([4, 0])).units, teacher_basis=basis)
    asked = [
        request_of((3, 9, 30), "supervised"),
        request_of((30, 1), "supervised", logits=False),
        request_of((2,), "supervised", layer=2),
        SignalRequest(False, (directions,), "supervised"),
        request_of(None, "supervised", layer=2),
        SignalRequest(True, (), "tokens"),
    ]
    counting, collate = Counting(model), collator_of(model)
    (whole,) = merged(asked)
    cached = cache_of(tmp_path, counting, whole, data)
    assert [one.units for one in cached.manifest.columns.columns] == [(1, 3, 9, 30), None, (0, 4)]
    batch = collate([data[4], data[1]])
    for one in asked:
        assert cached.manifest.columns.lacks(one) == []
        expected = LiveTeacher(model).signal(batch, one)
        found = cached.signal(batch, one)
        assert (found.logits is None) == (not one.logits)
        for ours, theirs in zip(found.features, expected.features, strict=True):
            assert float((ours - theirs).abs().max()) <= HALF * float(theirs.abs().max())
    assert len(counting.asked) == 2


def test_requests_of_other_rules_or_positions_are_not_answered_together() -> None:
    plain, other = request_of((1,)), request_of((2,), "supervised")
    first, second = TopRule(3), TopRule(3, 2.0)
    assert [len(merged([plain, one])) for one in (other, request_of((2,), top=first))] == [2, 2]
    assert len(merged([request_of(top=first), request_of(top=second), request_of(top=first)])) == 2
    # What reads no states fits any positions, and what reads no predictions any rule.
    (both,) = merged([SignalRequest(True, (), "tokens", first), request_of((2,), "supervised", logits=False)])
    assert (both.top, both.positions, both.logits) == (first, "supervised", True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (request_of((1, 7)), "layer -1: 4 units are stored, layer -1: 2 units are read"),
        (request_of(None), "layer -1: 4 units are stored, layer -1: all units are read"),
        (request_of((1,), layer=2), "layer 2: 1 units are read, and none of them is stored"),
        (request_of(None, basis=torch.eye(32)), "layer -1: all directions are read, and none of them is stored"),
        (request_of((1,), "supervised"), "'tokens' positions are stored, 'supervised' are read"),
        (request_of((1,), top=TopRule(3)), "all outputs are stored, the top 3 outputs at temperature 1 are read"),
    ],
)
def test_K07_what_a_cache_does_not_hold_is_refused_with_both_values(
    tmp_path: Path, other: SignalRequest, message: str
) -> None:
    model, data = tiny_model("llama", "causal"), answer_rows(4)
    cached = cache_of(tmp_path, model, request_of(), data)
    with pytest.raises(ArtifactError, match=f"the cache does not hold what is read: {message}"):
        cached.signal(collator_of(model)(data), other)


def test_K04_another_temperature_is_refused_for_a_top_and_exact_for_all_outputs(tmp_path: Path) -> None:
    model, data = tiny_model("llama", "causal"), answer_rows(4)
    batch = collator_of(model)(data)
    top = cache_of(tmp_path / "top", model, SignalRequest(True, (), "tokens", TopRule(3, 1.0)), data)
    text = "the top 3 outputs at temperature 1 are stored, the top 3 outputs at temperature 2 are read"
    with pytest.raises(ArtifactError, match=text):
        top.signal(batch, SignalRequest(True, (), "tokens", TopRule(3, 2.0)))
    plain = SignalRequest(True, (), "tokens")
    whole = cache_of(tmp_path / "whole", model, plain, data)
    ours, theirs = (one.signal(batch, plain).logits for one in (whole, LiveTeacher(model)))
    for temperature in (0.5, 2.0, 4.0):
        assert float(forward_kl(ours[:].float(), theirs[:], temperature=temperature).max()) < 1e-5  # type: ignore[index]


def test_the_top_of_a_model_whose_head_is_not_known_is_taken_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "head_is_known", lambda *_, who: False)
    model, data, wanted = tiny_model("llama", "causal"), answer_rows(4), request_of(top=TopRule(3))
    batch = collator_of(model)(data)
    signal = LiveTeacher(model).signal(batch, wanted)
    assert isinstance(signal.logits, TopOutputs)
    same_signals(cache_of(tmp_path, model, wanted, data).signal(batch, wanted), signal, HALF)
    assert not isinstance(LiveTeacher(model).signal(batch, request_of()).logits, HeadOutputs)


def test_K09_rows_are_read_from_a_large_file_without_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """140 MB of states: a few rows bring a few megabytes into memory."""
    wide = 9000

    class Wide(LiveTeacher):
        def signal(self, batch: Any, request: SignalRequest) -> Any:
            count = int(batch["attention_mask"].sum())
            ids = batch["input_ids"][batch["attention_mask"].bool()].float()
            return Signal(None, (ids[:, None].expand(count, wide),))

    generator = torch.Generator().manual_seed(0)
    data = [
        {"id": f"row-{i}", "input_ids": torch.randint(4, 61, (30,), generator=generator).tolist(), "labels": 0}
        for i in range(260)
    ]
    wanted = request_of(range(wide), logits=False)
    cached = cache_of(tmp_path, Wide(tiny_model("bert")), wanted, data)
    sizes = [entry.bytes for entry in cached.manifest.written]
    assert sum(sizes) > 140e6
    assert [size > building.SHARD_BYTES for size in sizes] == [True, True, False]
    assert max(sizes) < building.SHARD_BYTES + 32 * 30 * wide * 2 + 20_000
    del cached
    before = resident()
    again = CachedTeacher(tmp_path)
    for index in (0, 100, 259):
        found = again.signal(Collator(0)([data[index]]), wanted).features[0]
        assert found[:, 0].tolist() == [float(one) for one in data[index]["input_ids"]]
    assert resident() - before < 20e6


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
