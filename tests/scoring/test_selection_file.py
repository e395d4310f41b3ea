"""Scores and pairs on disk: back bit for bit, or refused with what differs, old and new."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexkd.core.scores import UnitScores
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import LayerPair
from flexkd.errors import ArtifactError, RecipeError
from flexkd.scoring.selection_file import (
    Selection,
    directions_hash,
    load_selection,
    nearest_to_head,
    save_selection,
    scores_hash,
)
from tests.references.draws import normal, permutation

MADE_OF = {"teacher": "t1", "teacher_tokenizer": "k1", "data": "d1", "max_length": "128", "scores": '{"layer": -1}'}


def scores(layer: int = -1, seed: int = 0) -> UnitScores:
    values = normal(12, seed=seed, dtype=torch.float64).abs()
    values[3] = 0.1 + 0.2
    return UnitScores(values, "log_prob", "gradient", layer, 2000, 1234.5678901234567)


def selection() -> Selection:
    pairs = UnitPairs(torch.arange(4), permutation(12, seed=1)[:4])
    directions = UnitPairs(permutation(8, seed=2)[:3], torch.arange(3))
    layers = (
        LayerPair(-1, -1, pairs),
        LayerPair(2, 4),
        LayerPair(3, 5, directions, normal(12, 3, seed=3)),
        LayerPair(1, 2, None, normal(12, 12, seed=4)),
    )
    return Selection((scores(), scores(4, seed=5)), torch.arange(0, 12, 2), layers, 4, "of a cut")


def assert_same(found: Selection, expected: Selection) -> None:
    for one, two in zip(found.scores, expected.scores, strict=True):
        assert {**vars(one), "values": None} == {**vars(two), "values": None}
        assert one.values.dtype == torch.float64
        assert torch.equal(one.values, two.values)
    assert (found.layers is None) == (expected.layers is None)
    for ours, theirs in zip(found.layers or (), expected.layers or (), strict=True):
        assert (ours.student_layer, ours.teacher_layer) == (theirs.student_layer, theirs.teacher_layer)
        for mine, other in (
            (ours.units and ours.units.student, theirs.units and theirs.units.student),
            (ours.units and ours.units.teacher, theirs.units and theirs.units.teacher),
            (ours.teacher_basis, theirs.teacher_basis),
        ):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert mine.dtype == other.dtype
                assert torch.equal(mine, other)
    assert (found.start_units is None) == (expected.start_units is None)
    if found.start_units is not None and expected.start_units is not None:
        assert torch.equal(found.start_units, expected.start_units)


@pytest.mark.parametrize("stage", ["scored", "start chosen", "paired"])
def test_F18_a_selection_comes_back_bit_for_bit_and_in_order(stage: str, tmp_path: Path) -> None:
    whole = selection()
    written = {
        "scored": Selection(whole.scores),
        "start chosen": Selection(whole.scores, whole.start_units),
        "paired": whole,
    }[stage]
    path = tmp_path / "new" / "scores.safetensors"
    save_selection(path, written, MADE_OF)
    found = load_selection(path, MADE_OF)
    assert_same(found, written)
    assert (found.cut_layer, found.cut_directions) == (written.cut_layer, written.cut_directions)
    assert found.hash() == written.hash()
    assert [file.name for file in path.parent.iterdir()] == ["scores.safetensors"]


def test_no_pairs_because_there_is_nothing_to_pair_is_not_no_pairs_yet(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_selection(path, Selection((scores(),), None, ()), MADE_OF)
    assert load_selection(path, MADE_OF).layers == ()


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "t2"},
        {"teacher_tokenizer": "k2"},
        {"data": "d2"},
        {"max_length": "64"},
        {"scores": '{"layer": 2}'},
    ],
    ids=lambda change: next(iter(change)),
)
def test_F18_K07_what_was_made_of_something_else_is_refused_with_old_and_new(
    change: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    save_selection(path, selection(), MADE_OF)
    (name, new), old = next(iter(change.items())), MADE_OF[next(iter(change))]
    expected = f"{path}: belongs to another run: {name} was '{old}' and is '{new}' now. Choose another output folder"
    with pytest.raises(ArtifactError, match=re.escape(expected)):
        load_selection(path, MADE_OF | change)


def test_R09_scores_of_another_engine_are_refused_and_those_of_an_earlier_version_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scores.safetensors"
    engine = {"precision": "float32", "attention": "eager", "torch": "2.0"}
    save_selection(path, selection(), MADE_OF | engine)
    for name, value in (("precision", "bfloat16"), ("attention", "sdpa")):
        with pytest.raises(ArtifactError, match=f"{name} was '{engine[name]}' and is '{value}' now"):
            load_selection(path, MADE_OF | engine | {name: value})
    load_selection(path, MADE_OF | engine)
    assert not caplog.text
    load_selection(path, MADE_OF | engine | {"torch": "2.1"})
    assert "torch was '2.0' and is '2.1' now; its scores are used as they are" in caplog.text
    save_selection(path, selection(), MADE_OF)
    load_selection(path, MADE_OF | engine)
    assert "its engine was not written down: attention (now 'eager'), precision (now 'float32'), torch" in caplog.text


def test_F18_a_setting_that_came_or_went_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_selection(path, selection(), MADE_OF)
    with pytest.raises(ArtifactError, match="another run: student was 'None' and is 's' now"):
        load_selection(path, {**MADE_OF, "student": "s"})
    fewer = {name: value for name, value in MADE_OF.items() if name != "data"}
    with pytest.raises(ArtifactError, match="another run: data was 'd1' and is 'None' now"):
        load_selection(path, fewer)


def header(**changes: Any) -> dict[str, str]:
    entry = {"target": "logit", "attribution": "fisher", "layer": 1, "num_predictions": 1, "effective_predictions": 1.0}
    return {"flexkd": json.dumps({"made_of": MADE_OF, "scores": [entry], "pairs": None} | changes)}


def damaged(kind: str, path: Path) -> None:
    values = {"scores.0": torch.ones(3, dtype=torch.float64)}
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a tensor in sight, whatever the name says", encoding="utf-8")
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "cut header":
            path.write_bytes(path.read_bytes()[:20])
        case "a model":
            save_file(values, path, {"format": "pt"})
        case "broken header":
            save_file(values, path, {"flexkd": "{"})
        case "no fingerprints":
            save_file(values, path, {"flexkd": json.dumps({"scores": [], "pairs": None})})
        case "no values":
            save_file({"other": values["scores.0"]}, path, header())
        case "another form of scores":
            save_file(values, path, header(scores=[{"target": "logit", "surprise": 1}]))
        case _:
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "text", "cut", "cut header", "a model", "broken header", "no fingerprints", "no values",
        "another form of scores", "folder",
    ],
)  # fmt: skip
def test_F18_a_damaged_file_is_one_error_that_says_what_to_do(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_selection(path, selection(), MADE_OF)
    damaged(kind, path)
    with pytest.raises(ArtifactError, match=f"^{re.escape(str(path))}: cannot be read .*Delete it, to score again"):
        load_selection(path, MADE_OF)


def test_K08_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.safetensors"
    save_selection(path, selection(), MADE_OF)

    def disk_full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexkd.scoring.selection_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_selection(path, Selection((scores(seed=9),)), MADE_OF)
    assert_same(load_selection(path, MADE_OF), selection())


def test_F08_the_hash_is_of_what_is_cut_and_taught_and_leaves_the_scores_out() -> None:
    base = selection()
    assert len(base.hash()) == 16
    assert selection().hash() == base.hash()
    # New scores that teach the same units are the same selection, and have another hash of their own.
    again = replace(base, scores=(scores(seed=7),))
    assert again.hash() == base.hash()
    assert base.layers is not None
    first, *others = base.layers
    assert first.units is not None
    swapped = replace(first, units=UnitPairs(first.units.student, first.units.teacher.flip(0)))
    basis = replace(base.layers[2], teacher_basis=normal(12, 3, seed=8))
    changed = [
        replace(base, layers=(swapped, *others)),
        replace(base, layers=(replace(first, student_layer=1), *others)),
        replace(base, layers=(replace(first, teacher_layer=4), *others)),
        replace(base, layers=(first, replace(others[0], teacher_layer=3), *others[1:])),
        replace(base, layers=(first, *others[1:])),
        replace(base, start_units=torch.arange(1, 12, 2)),
        replace(base, start_units=None),
        replace(base, cut_directions=directions_hash(normal(12, 6, seed=9, dtype=torch.float64))),
        replace(base, cut_directions=directions_hash(normal(12, 6, seed=10, dtype=torch.float64))),
        replace(base, layers=(first, base.layers[1], basis, base.layers[3])),
    ]
    assert len({base.hash(), *(entry.hash() for entry in changed)}) == len(changed) + 1


def test_R13_scores_have_a_hash_of_their_own() -> None:
    base = scores()
    changed = [
        scores(seed=7),
        scores(layer=4),
        replace(base, attribution="random"),
        replace(base, target="logit"),
        replace(base, values=base.values * (1 + 2**-52)),
    ]
    assert scores_hash(scores()) == scores_hash(base)
    assert len({scores_hash(base), *map(scores_hash, changed)}) == 6


def test_R13_scores_of_a_layer_that_was_not_scored_are_refused() -> None:
    """They were those of the first layer, unsaid."""
    whole = selection()
    assert whole.scores_of(4) is whole.scores[1]
    expected = "scores.layer: [-1, 4] lacks teacher layer 2, whose scores are read. Add it."
    with pytest.raises(RecipeError, match=re.escape(expected)):
        whole.scores_of(2)


@pytest.mark.parametrize(
    ("layers", "nearest"), [((3, -1), -1), ((-1, 3), -1), ((2, 3, 1), 3), ((3, 1, 2), 3), ((2,), 2)]
)
def test_R13_a_student_is_cut_by_the_state_nearest_to_the_head_in_whatever_order(
    layers: tuple[int, ...], nearest: int
) -> None:
    scored = tuple(scores(layer, seed=layer + 2) for layer in layers)
    assert nearest_to_head(scored).layer == nearest
    assert Selection(scored, torch.arange(3)).cut_scores().layer == nearest
    assert Selection(scored, torch.arange(3), cut_layer=layers[0]).cut_scores() is scored[0]


def as_an_earlier_version_wrote_it(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["flexkd"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    del stored["cut_layer"], stored["cut_directions"]
    save_file(tensors, path, {"flexkd": json.dumps(stored)})


@pytest.mark.parametrize(("layers", "is_said"), [((4, -1), True), ((-1, 4), False), ((2, 4), True), ((4,), False)])
def test_R10_an_earlier_version_cut_by_the_layer_named_first_and_that_stays_so(
    layers: tuple[int, ...], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "scores.safetensors"
    scored = tuple(scores(layer, seed=layer + 2) for layer in layers)
    written = replace(selection(), scores=scored, cut_layer=None, cut_directions="")
    save_selection(path, written, MADE_OF)
    as_an_earlier_version_wrote_it(path)
    stored = load_selection(path, MADE_OF)
    assert_same(stored, written)
    assert stored.hash() == written.hash()
    assert stored.cut_scores().layer == layers[0]
    said = f"an earlier version cut the student by layer {layers[0]}, the first of scores.layer, and it stays so"
    assert (said in caplog.text) is is_said
    # Whatever is not cut along units has no layer that cuts.
    save_selection(path, replace(written, start_units=None), MADE_OF)
    as_an_earlier_version_wrote_it(path)
    caplog.clear()
    assert load_selection(path, MADE_OF).cut_layer is None
    assert not caplog.text


def test_a_slice_of_a_larger_tensor_is_stored_alone(tmp_path: Path) -> None:
    whole = normal(12, 12, seed=1)
    path = tmp_path / "scores.safetensors"
    layers = (LayerPair(-1, -1, None, whole[:, :3]), LayerPair(1, 1, None, whole.T))
    save_selection(path, Selection((scores(),), None, layers), MADE_OF)
    found = load_selection(path, MADE_OF).layers
    assert found is not None
    assert torch.equal(found[0].teacher_basis, whole[:, :3])  # type: ignore[arg-type]
    assert torch.equal(found[1].teacher_basis, whole.T)  # type: ignore[arg-type]
    assert path.stat().st_size < 12 * 12 * 4 + 12 * 3 * 4 + 12 * 8 + 2000
