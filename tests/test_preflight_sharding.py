"""What a recipe is refused under FSDP and DeepSpeed, before anything is loaded: each by its name, with what works."""

from pathlib import Path
from typing import Any

import pytest

from flexkd.preflight import preflight
from tests.job_files import job, text_job

FSDP = {"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}


def problems(recipe: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_processes: int = 2) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flexkd.preflight.sharding.num_processes", lambda: num_processes)
    return preflight(recipe).problems


@pytest.mark.parametrize(
    ("environment", "num_processes", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 2, "ACCELERATE_USE_DEEPSPEED: DeepSpeed was asked for, and recipes"),
        (FSDP, 1, "ACCELERATE_USE_FSDP: FSDP was asked for and one process started, which has nothing to divide."),
        ({"ACCELERATE_USE_FSDP": "1"}, 2, "FSDP_VERSION: is 1 (not set), and recipes train by FSDP2 alone."),
        ({**FSDP, "FSDP_VERSION": "1"}, 2, "FSDP_VERSION: is 1, and recipes train by FSDP2 alone."),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, 2, "FSDP_AUTO_WRAP_POLICY: is NO_WRAP, and models are divided"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, 2, "FSDP_OFFLOAD_PARAMS: asks for weights on the CPU, which recipes"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, 2, "checkpointing by accelerate (use training.gradient_ch"),
    ],
)
def test_X03_a_launch_that_recipes_were_not_run_under_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_processes: int, message: str
) -> None:
    (problem,) = problems(job(tmp_path), monkeypatch, environment, num_processes)
    assert message in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__features__loss": "projector"}, "features.loss: 'projector' trains projectors, which are not"),
        ({"student__lora": {}}, "student.lora: adapters are not trained under FSDP. Set it to null, or leave FSDP out"),
        ({"training__compile": True}, "training.compile: true, and blocks are not compiled under FSDP."),
        (
            {"training__max_minutes": 3},
            "training.max_minutes: steps are not timed under FSDP. Give max_steps or epochs.",
        ),
        ({"teacher__fine_tune__max_minutes": 3}, "teacher.fine_tune.max_minutes: steps are not timed under FSDP."),
        ({"training__precision": "float16"}, "training.precision: models do not train in float16 under FSDP."),
        ({"generation__validation_rows": 4}, "generation.validation_rows: answers are not written by a model that is"),
    ],
)
def test_X03_a_recipe_that_needs_whole_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    recipe = text_job(tmp_path, **changes)
    assert any(message in problem for problem in problems(recipe, monkeypatch, FSDP))
    assert not any("FSDP" in problem for problem in preflight(text_job(tmp_path)).problems)
