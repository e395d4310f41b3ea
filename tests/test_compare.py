"""Comparisons: fair cells, kept when finished, and paired statistics that agree with a second derivation."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from torch import Tensor

import flexkd.compare
from flexkd.compare import compare, paired_differences
from flexkd.errors import ArtifactError, RecipeError
from flexkd.record import CompareCell, CompareRecord
from tests.job_files import job

METHODS = ("fine_tuning", "flexkd")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        yield folder


def test_cells_share_start_and_order_and_finished_ones_are_kept(material: Path) -> None:
    starts: dict[str, Tensor] = {}
    seen: list[str] = []
    plain = flexkd.compare.train_student

    def watched(ready: object, recipe: object, start: object, goal: object, checkpoints: Path) -> object:
        name = checkpoints.parent.name
        seen.append(name)
        starts[name] = start.student.bert.embeddings.word_embeddings.weight.detach().clone()
        return plain(ready, recipe, start, goal, checkpoints)

    recipe = job(material, output=str(material / "cells"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flexkd.compare, "train_student", watched)
        record = compare(recipe, methods=METHODS, seeds=(0, 1))
        assert seen == ["fine_tuning-0", "flexkd-0", "fine_tuning-1", "flexkd-1"]
        assert all(start.equal(starts["flexkd-0"]) for start in starts.values())
        (material / "cells" / "cells" / "flexkd-1" / "cell.json").unlink()
        seen.clear()
        again = compare(recipe, methods=METHODS, seeds=(0, 1))
    assert seen == ["flexkd-1"]
    assert again.paired == record.paired
    assert CompareRecord.read(material / "cells" / "compare.json").paired == again.paired
    assert record.reference == "fine_tuning"
    assert [(cell.method, cell.seed) for cell in record.cells] == [(m, s) for s in (0, 1) for m in METHODS]
    with pytest.raises(ArtifactError, match="was made by another recipe"):
        compare(job(material, output=str(material / "cells"), training__max_steps=4), methods=METHODS, seeds=(0, 1))


def test_the_search_gives_every_method_the_same_values_and_chooses_by_validation(material: Path) -> None:
    recipe = job(material, output=str(material / "searched"), training__max_steps=2)
    grid = {"training.learning_rate": [1e-9, 3e-3]}
    record = compare(recipe, methods=METHODS, seeds=(0, 1), search=grid)
    for method in METHODS:
        found = [
            json.loads((material / "searched" / "search" / method / str(index) / "cell.json").read_text("utf-8"))
            for index in range(2)
        ]
        best = max(found, key=lambda cell: cell["metrics"]["validation_accuracy"])
        rate = best["made_of"]["recipe"]["training"]["learning_rate"]
        assert f"{method}: training.learning_rate = {rate}" in " ".join(record.notes)


def test_paired_differences_agree_with_a_second_derivation() -> None:
    values = {"a": [0.70, 0.72, 0.69, 0.73], "b": [0.71, 0.75, 0.70, 0.73], "c": [0.80, 0.82, 0.79, 0.83]}
    cells = [CompareCell(m, s, {"accuracy": v}, 1.0) for m, numbers in values.items() for s, v in enumerate(numbers)]
    first, second, third = paired_differences(cells, list(values), [0, 1, 2, 3], "accuracy", "a")
    assert (first.difference, first.p_value) == (None, None)
    differences = np.array(values["b"]) - np.array(values["a"])
    error = differences.std(ddof=1) / 2
    width = stats.t.ppf(0.975, 3) * error
    assert second.difference == pytest.approx(differences.mean())
    assert (second.low, second.high) == pytest.approx((differences.mean() - width, differences.mean() + width))
    assert second.p_value == pytest.approx(2 * stats.t.sf(differences.mean() / error, 3))
    assert second.std == pytest.approx(np.std(values["b"], ddof=1))
    assert third.difference == pytest.approx(0.1)


def test_what_cannot_be_compared_is_refused_by_name(material: Path) -> None:
    recipe = job(material)
    with pytest.raises(RecipeError, match="Did you mean 'flexkd'"):
        compare(recipe, methods=("flexkdd", "cka"), seeds=(0, 1))
    with pytest.raises(RecipeError, match="cannot be compared in pairs"):
        compare(recipe, methods=METHODS, seeds=(3,))
