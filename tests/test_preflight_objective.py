"""What an objective needs of its models, known from their configs: `check` refuses what a run would."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkd.errors import FlexKDError
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.compare import compare
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.preflight import preflight
from flexkd.recipe import override_recipe
from tests.job_files import text_job, write_text_rows, write_text_tokenizer
from tests.tiny import tiny_model

EXACT = {"teacher__fine_tune": None, "teacher__precision": "float32", "training__precision": "float32"}
MATCHED = {"mapping": "matched", "layer_map": {2: 2}}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2", "bart"])
def test_a_layer_is_scored_where_a_teacher_that_cannot_be_turned_teaches_units(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_job(tmp_path, model_type, **EXACT, objective__features=MATCHED)
    expected = "scores.layer: [-1] lacks teacher layers [2] of objective.features.layer_map. Use [-1, 2]."
    assert preflight(recipe).problems == [expected]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
        with pytest.raises(FlexKDError) as refused:
            pipeline.distill(recipe)
    assert str(refused.value) == expected
    for layer in ([-1, 2], "all"):
        advised = text_job(tmp_path, model_type, **EXACT, objective__features=MATCHED, scores__layer=layer)
        assert preflight(advised).problems == []
        run = Run(prepare(advised), advised, tmp_path / f"run {layer}")
        selection = run.select()
        selection, _ = run.objective(run.start(selection), selection)
        assert selection.layers is not None
        assert selection.layers[0].units is not None


HEADS = {"loss": "projector", "projector": {"start": "heads"}}


def test_a_projector_between_heads_needs_heads_without_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_job(tmp_path, "gemma2", **EXACT, objective__features=HEADS)
    expected = (
        "objective.features.projector.start: 'heads' needs a head that is one linear map, and the teacher, a gemma2, "
        "caps its logits at 5. Use start: random, in a comparison the method 'projector'; for a student that is cut "
        "also start: cut, the method 'projector_exact'."
    )
    assert preflight(recipe).problems == [expected]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
        with pytest.raises(FlexKDError) as refused:
            pipeline.distill(recipe)
    assert str(refused.value) == expected
    methods = ["logit_kd", "projector_heads"]
    compared = text_job(tmp_path, "gemma2", **EXACT, compare={"methods": methods})
    assert preflight(compared).problems == [f"compare.methods.projector_heads: {expected}"]
    for method in ("projector", "projector_exact"):
        advised = text_job(tmp_path, "gemma2", **EXACT, compare={"methods": ["logit_kd", method]})
        assert preflight(advised).problems == []
    for start in ("random", "cut"):
        features = {"loss": "projector", "projector": {"start": start}}
        advised = text_job(tmp_path, "gemma2", **EXACT, objective__features=features)
        assert preflight(advised).problems == []
        run = Run(prepare(advised), advised, tmp_path / start)
        selection = run.select()
        assert run.objective(run.start(selection), selection)[1].features is not None


def test_the_cap_of_an_architecture_counts_where_its_config_leaves_it_out(tmp_path: Path) -> None:
    recipe = text_job(tmp_path, "gemma2", **EXACT, objective__features=HEADS)
    file = tmp_path / "teacher" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["final_logit_softcapping"]
    file.write_text(json.dumps(config), encoding="utf-8")
    (problem,) = preflight(recipe).problems
    assert "caps its logits at 30." in problem
    file.write_text(json.dumps({**config, "final_logit_softcapping": None}), encoding="utf-8")
    assert preflight(recipe).problems == []


def test_no_layer_is_scored_for_directions_of_a_teacher_that_can_be_turned(tmp_path: Path) -> None:
    assert preflight(text_job(tmp_path, **EXACT, objective__features=MATCHED)).problems == []


def test_a_method_that_matches_units_names_the_layers_that_it_needs(tmp_path: Path) -> None:
    compare = {"methods": ["flexkd", "scored_features"]}
    recipe = text_job(tmp_path, "gpt2", **EXACT, objective__features={"layer_map": {2: 2}}, compare=compare)
    (problem,) = preflight(recipe).problems
    assert problem.startswith("compare.methods.scored_features: scores.layer: [-1] lacks teacher layers [2]")


def test_methods_of_a_script_are_checked_before_the_first_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_job(tmp_path, "gemma2", **EXACT)
    assert preflight(recipe).problems == []
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
    with pytest.raises(FlexKDError, match=r"compare\.methods\.projector_heads: .*caps its logits at 5"):
        compare(recipe, methods=("logit_kd", "projector_heads"), seeds=(0, 1))


@pytest.fixture
def projected(tmp_path: Path) -> Path:
    """A folder whose OPT projects its stream of 32 units to 20 before the head."""
    write_teacher(tmp_path, word_embed_proj_dim=20)
    return tmp_path


def write_teacher(folder: Path, **changes: Any) -> None:
    """What `text_job` finds in a folder, with an OPT of another config."""
    (folder / "teacher").mkdir()
    tiny_model("opt", "causal", seed=3, **changes).save_pretrained(folder / "teacher")
    write_text_tokenizer(folder / "teacher")
    write_text_rows(folder / "texts.jsonl")


CUT = {"loss": "projector", "projector": {"start": "cut"}}
PAIRED = (
    "objective.features.layer_map: {} units behind a projection, and the student is cut along the stream, which has"
)
BEGUN = "objective.features.projector.start: 'cut' at {} units behind a projection, and the student is cut along the"


@pytest.mark.parametrize(
    ("changes", "words", "advised"),
    [
        (
            {"objective__features__layer_map": {2: 4}},
            "scores.layer: layer -1 of this opt lies behind a projection to 20 units and says nothing about the 32 of "
            "its stream. Score the last block, scores.layer: 4.",
            {"scores__layer": 4},
        ),
        ({"scores__layer": 4}, PAIRED.format("teacher layer -1 has 20") + " 32.", {"objective__features": MATCHED}),
        (
            {"scores__layer": 4, "objective__features": {"layer_map": {-1: 4}, "units": 8}},
            PAIRED.format("student layer -1 has 20")
            + " 16. Pair layers below the projection, or use mapping: matched.",
            {"objective__features": {"layer_map": {2: 4}, "units": 8}},
        ),
        (
            {"scores__layer": 4, "objective__features": CUT},
            BEGUN.format("teacher layer -1, which has 20"),
            {"objective__features": {"loss": "projector"}},
        ),
        (
            {"scores__layer": 4, "objective__features": {**CUT, "layer_map": {-1: 4}}},
            BEGUN.format("student layer -1, which has 20"),
            {"objective__features": {**CUT, "layer_map": {2: 4}}},
        ),
    ],
)
def test_a_cut_goes_by_the_stream_and_not_by_what_is_behind_a_projection(
    projected: Path, changes: dict[str, Any], words: str, advised: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_job(projected, "opt", **EXACT, **changes)
    (problem,) = preflight(recipe).problems
    assert problem.startswith(words)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
        with pytest.raises(FlexKDError, match=re.escape(problem)):
            pipeline.distill(recipe)
    layers = {"scores__layer": [2, 4]} if advised == {"objective__features": MATCHED} else {}
    advice = text_job(projected, "opt", **EXACT, **{**changes, **advised, **layers})
    assert preflight(advice).problems == []
    job = prepare(advice)
    paired(Run(job, advice, projected / "run"))
    # The run knows it too: of a model that was not on this machine when it was checked.
    with pytest.raises(FlexKDError, match=re.escape(problem)):
        paired(Run(job, recipe, projected / "unchecked"))


def paired(run: Run) -> None:
    """Score, cut and pair, without the checks before a run."""
    selection = run.select()
    run.objective(run.start(selection), selection)


@pytest.mark.parametrize("changes", [{"word_embed_proj_dim": 20}, {"do_layer_norm_before": False}, {}])
def test_a_lens_reads_the_last_norm_right_before_the_head(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_teacher(tmp_path, **changes)
    features = {"loss": "distill_lens", "layer_map": {1: 2}}
    recipe = text_job(tmp_path, "opt", **EXACT, scores__layer=4, objective__features=features)
    problems = preflight(recipe).problems
    assert [text.startswith("teacher.model: 'distill_lens' reads the states") for text in problems] == [True] * bool(
        changes
    )
    job = prepare(override_recipe(recipe, ["objective.features=null"]))
    if changes:
        with pytest.raises(FlexKDError, match=r"Use another loss, as cka\."):
            paired(Run(job, recipe, tmp_path / "unchecked"))
        recipe = override_recipe(recipe, ["objective.features.loss=cka"])
        assert preflight(recipe).problems == []
    paired(Run(job, recipe, tmp_path / "advised"))
