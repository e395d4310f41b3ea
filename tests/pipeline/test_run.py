"""One run of a job: what it stores and reads again, what runs of one job share, and what they do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkd.core.scores import UnitScores
from flexkd.pipeline import scores as scores_module
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.run import Run
from flexkd.recipe import Recipe, override_recipe
from flexkd.scoring.shared_work import SharedWork
from flexkd.teacher.signal import SignalRequest
from tests.job_files import job


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield job(folder, teacher__fine_tune=None, training__precision="float32", teacher__precision="float32")


@pytest.fixture
def ready(recipe: Recipe) -> Job:
    return prepare(recipe)


def test_runs_of_a_job_share_scores_of_the_same_settings_alone(
    recipe: Recipe, ready: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = scores_module.score_units, []
    monkeypatch.setattr(
        scores_module, "score_units", lambda *args, **options: calls.append(1) or plain(*args, **options)
    )
    first = Run(ready, recipe, tmp_path / "first").select()
    second = Run(ready, override_recipe(recipe, ["training.max_steps=3"]), tmp_path / "second").select()
    assert calls == [1]
    assert torch.equal(first.scores[0].values, second.scores[0].values)
    Run(ready, override_recipe(recipe, ["scores.target=logit"]), tmp_path / "third").select()
    assert calls == [1, 1]


def test_a_run_reads_its_scores_and_pairs_from_its_folder(
    recipe: Recipe, ready: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(ready, recipe, tmp_path)
    selection = run.select()
    assert selection.layers is None
    paired, objective = run.objective(run.start(selection), selection)
    monkeypatch.setattr(scores_module, "score_units", lambda *_, **__: pytest.fail("scored again"))
    monkeypatch.setattr("flexkd.pipeline.run.pair_layers", lambda *_: pytest.fail("paired again"))
    stored = Run(prepare(recipe), recipe, tmp_path).select()
    assert stored.hash() == paired.hash()
    again, same = run.objective(run.start(stored), stored)
    assert again is stored
    assert same.formula() == objective.formula()


def test_scores_that_a_run_does_not_read_are_there_when_they_are_requested(
    recipe: Recipe, ready: Job, tmp_path: Path
) -> None:
    start = {"student.start": "pretrained", "student.model": recipe.teacher.model}
    sizes = ("student.hidden_size=null", "student.num_layers=null", "objective.features=null")
    other = override_recipe(recipe, [*(f"{key}={value}" for key, value in start.items()), *sizes])
    run = Run(ready, other, tmp_path)
    assert run.select().scores == ()
    scored = run.score()
    assert len(scored.scores) == 1
    assert torch.equal(run.select().scores[0].values, scored.scores[0].values)


class Cache:
    """An open cache that holds the outputs it is told of."""

    def __init__(self, missing: str | None) -> None:
        self.missing = missing
        self.manifest: Any = self
        self.columns: Any = self

    def lacks(self, request: SignalRequest) -> str | None:
        return self.missing


def test_the_memo_computes_once_and_remembers_that_there_is_nothing() -> None:
    memo, calls = SharedWork(), []

    def nothing() -> None:
        calls.append(1)

    def scored() -> tuple[UnitScores, ...]:
        calls.append(2)
        return ()

    assert memo.rotation(16, nothing) is memo.rotation(16, nothing) is None
    assert memo.scores("settings", scored) == memo.scores("settings", scored) == ()
    assert calls == [1, 2]
    request = SignalRequest(logits=True, layers=(), positions="tokens")
    assert memo.cache_for(request) is None
    first, second, third = Cache("logits"), Cache(None), Cache(None)
    for cache in (first, second, third):
        memo.add_cache(cache)  # type: ignore[arg-type]
    assert memo.cache_for(request) is second
