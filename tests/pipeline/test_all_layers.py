"""`scores.layer: all`: units and directions scored at every block, in the cut, what is taught and the record."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexkd.core.scores import mean_over_layers
from flexkd.core.selection import select_units
from flexkd.errors import ScoreError
from flexkd.models.forward.hidden import model_inputs, num_layers
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import score_records
from flexkd.pipeline.run import Run
from flexkd.pipeline.start import rotation_of
from flexkd.recipe import Recipe, override_recipe
from flexkd.recipe.taught_features import describe_cut, read_score_keys
from flexkd.scoring.units import score_units
from tests.closeness import assert_close
from tests.job_files import job, text_job
from tests.tiny import tiny_batch, tiny_model

EXACT = {"training__precision": "float32", "teacher__precision": "float32", "teacher__fine_tune": None}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("layers")
        patch.setenv("FLEXKD_HOME", str(path / "home"))
        yield path


@pytest.fixture(scope="module")
def classifier(folder: Path) -> tuple[Recipe, Job]:
    recipe = job(folder, **EXACT, scores__layer="all", objective__features__coverage=0.3)
    return recipe, prepare(recipe)


@pytest.fixture(scope="module")
def writer(folder: Path) -> tuple[Recipe, Job]:
    (folder / "llama").mkdir()
    recipe = text_job(folder / "llama", "llama", **EXACT, output=str(folder / "run"), scores__layer="all")
    return recipe, prepare(recipe)


def test_a_unit_has_the_mean_of_its_shares_of_all_blocks(classifier: tuple[Recipe, Job]) -> None:
    _, ready = classifier
    batches = list(ready.batches("train"))
    layers = score_units(ready.teacher, batches, layer=[1, 2, 3, 4])
    scores = score_units(ready.teacher, batches, layer="all")
    shares = [entry.values.numpy() / entry.values.numpy().sum() for entry in layers]
    assert_close(scores.values, torch.tensor(sum(shares) / 4))
    assert scores.layer == "all"
    assert scores.effective_predictions == min(entry.effective_predictions for entry in layers)
    # A layer whose gradients are a thousand times as large weighs no more.
    larger = [layers[0], *(entry.__class__(**{**vars(entry), "values": 1000 * entry.values}) for entry in layers[1:])]
    assert_close(mean_over_layers(larger).values, scores.values)
    with pytest.raises(ScoreError, match=r"scores\.layer: .*'every'.*all"):
        score_units(ready.teacher, batches, layer="every")  # type: ignore[call-overload]


def test_a_student_is_cut_by_and_taught_the_units_that_all_blocks_use(
    classifier: tuple[Recipe, Job], tmp_path: Path
) -> None:
    recipe, ready = classifier
    scores = score_units(ready.teacher, ready.batches("train"), layer="all")
    head = score_units(ready.teacher, ready.batches("train"))
    run = Run(ready, recipe, tmp_path / "all")
    selection = run.select()
    assert selection.start_units is not None
    assert torch.equal(selection.start_units, select_units(scores, 16))
    assert not torch.equal(selection.start_units, select_units(head, 16))
    selection, _ = run.objective(run.start(selection), selection)
    pair = (selection.layers or ())[0]
    assert pair.units is not None
    assert torch.equal(pair.units.teacher, select_units(scores, len(pair.units.teacher)))
    stored = Run(ready, recipe, tmp_path / "all").select()
    assert stored.hash() == selection.hash()
    assert stored.cut_layer == "all"
    (record,) = score_records(stored, recipe)
    assert record.layer == "all"
    assert record.units == pair.units.teacher.tolist()
    lowest = override_recipe(recipe, ["student.chosen_by=lowest"])
    cut = Run(ready, lowest, tmp_path / "lowest").select().start_units
    assert cut is not None
    assert set(cut.tolist()) == set((-scores.values).topk(16).indices.tolist())
    assert "over all blocks" in describe_cut(recipe, rotated=False)
    for choice, is_over_blocks in (("variance", True), ("random", False)):
        words = describe_cut(override_recipe(recipe, [f"student.chosen_by={choice}"]), rotated=False)
        assert ("over all blocks" in words) == is_over_blocks
    random = override_recipe(recipe, ["student.chosen_by=random"])
    drawn = Run(ready, random, tmp_path / "random").select().start_units
    assert drawn is not None
    assert len(drawn) == 16


def test_an_encoder_decoder_is_scored_at_the_blocks_of_its_decoder() -> None:
    model = tiny_model("t5", "seq2seq")
    batch = tiny_batch(model)
    layers = score_units(model, [batch], layer=list(range(1, num_layers(model) + 1)))
    assert_close(score_units(model, [batch], layer="all").values, mean_over_layers(layers).values)


def test_other_units_than_those_of_the_cut_are_chosen_by_the_scores_of_all_blocks(
    classifier: tuple[Recipe, Job], tmp_path: Path
) -> None:
    recipe, ready = classifier
    changes = ["objective.features.mapping=matched", "objective.features.chosen_by=scores", "student.chosen_by=random"]
    variant = override_recipe(recipe, [*changes, "objective.features.coverage=null", "objective.features.units=5"])
    run = Run(ready, variant, tmp_path)
    selection, _ = run.objective(run.start(run.select()), run.select())
    pair = (selection.layers or ())[0]
    assert pair.units is not None
    scores = score_units(ready.teacher, ready.batches("train"), layer="all")
    assert sorted(pair.units.teacher.tolist()) == select_units(scores, 5).tolist()


def test_directions_are_scored_at_every_block(writer: tuple[Recipe, Job], tmp_path: Path) -> None:
    """Against hooks on the blocks and one backward a row; of what the head reads, the exact head of the teacher."""
    recipe, ready = writer
    rotation = rotation_of(ready, recipe)
    assert rotation is not None
    selection = Run(ready, recipe, tmp_path).select()
    assert selection.direction_scores is not None
    slow = slow_direction_scores(ready, rotation.stream.basis, recipe.scores.rows)
    torch.testing.assert_close(selection.direction_scores.values, slow, rtol=1e-3, atol=1e-7)
    assert selection.start_directions is not None
    expected = select_units(selection.direction_scores.values, len(selection.start_directions))
    assert torch.equal(selection.start_directions, expected)
    assert not torch.equal(expected, torch.arange(len(expected)))
    assert score_records(selection, recipe)[-1].layer == "all"
    assert read_score_keys(recipe, rotated=True) == {"rows", "layer", "target"}


def slow_direction_scores(ready: Job, basis: Tensor, num_rows: int | None) -> Tensor:
    """`sum_t |(g_t . d) (h_t . d)|` of each block, as shares, by hooks on the teacher and one backward a row."""
    teacher: Any = ready.teacher
    blocks = teacher.model.layers
    totals = torch.zeros(len(blocks), len(basis), dtype=torch.float64)
    for batch in ready.batches("train", num_rows=num_rows, batch_size=1):
        states: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda *parts, into=states: into.append(parts[2])) for block in blocks]
        embeddings = teacher.get_input_embeddings().register_forward_hook(lambda *parts: parts[2].requires_grad_())
        logits = teacher(**model_inputs(teacher, batch, as_teacher=True)).logits[0, :-1]
        for hook in (*hooks, embeddings):
            hook.remove()
        labels = batch["labels"][0, 1:]
        named = labels != -100
        value = torch.log_softmax(logits[named].double(), -1)[torch.arange(int(named.sum())), labels[named]].sum()
        for layer, (state, gradient) in enumerate(zip(states, torch.autograd.grad(value, states), strict=True)):
            turned = (gradient[0].double() @ basis) * (state.detach()[0].double() @ basis)
            totals[layer] += turned.abs().sum(0)
    return (totals / totals.sum(1, keepdim=True)).mean(0)
