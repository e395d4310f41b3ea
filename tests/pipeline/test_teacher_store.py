"""The store of fine-tuned teachers: made once, found by what they were made of, whole or not at all."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexkd.data.encoding.collation import Collator
from flexkd.errors import TrainingError
from flexkd.models.loading.pretrained import model_fingerprint
from flexkd.pipeline import teacher as teacher_module
from flexkd.pipeline.teacher import fine_tuned_teacher, store_folder
from flexkd.run_files import last_checkpoint
from flexkd.training.arguments import RunSettings
from flexkd.training.fit import ValidationMetrics
from flexkd.training.trainer import DistillationTrainer
from tests.job_files import write_tokenizer
from tests.tiny import tiny_model
from tests.training.test_distillation_trainer import rows


def settings_of(**changes: Any) -> RunSettings:
    plain: dict[str, Any] = {
        "metric": "accuracy",
        "precision": "float32",
        "epochs": 3.0,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup_ratio": 0.06,
        "seed": 0,
        "evaluations": 3,
        "keep_checkpoints": 1,
    }
    return RunSettings(**{**plain, **changes})


SETTINGS = settings_of()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "teachers"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path / "tokenizer")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    return loaded


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Descriptions of the trainings that really ran."""
    ran: list[str] = []
    plain = teacher_module.run_training

    def counted(*args: Any, **options: Any) -> Any:
        ran.append(args[0].description)
        return plain(*args, **options)

    monkeypatch.setattr(teacher_module, "run_training", counted)
    return ran


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def made(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel | None = None, **changes: Any) -> PreTrainedModel:
    options: Mapping[str, Any] = {
        "train": rows(),
        "validation": rows(8),
        "collator": Collator(0),
        "settings": SETTINGS,
        "validation_metrics": ValidationMetrics("accuracy", of_outputs=accuracy),
        "loss": "cross_entropy",
        "fingerprints": {"data": "rows"},
        "load": AutoModelForSequenceClassification.from_pretrained,
    }
    return fine_tuned_teacher(base or tiny_model("bert", seed=1), tokenizer, **{**options, **changes})


def test_a_teacher_is_trained_once_and_equal_when_it_is_found(
    home: Path, tokenizer: PreTrainedTokenizerBase, trainings: list[str]
) -> None:
    first, second = made(tokenizer), made(tokenizer)
    assert trainings == ["teacher"]
    assert model_fingerprint(first) == model_fingerprint(second)
    assert not first.training
    base = tiny_model("bert", seed=1)
    changed = [not torch.equal(one, two) for one, two in zip(first.parameters(), base.parameters(), strict=True)]
    assert all(changed)
    (folder,) = home.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json", "flexkd_teacher.json"} <= {
        path.name for path in folder.iterdir()
    }
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), first.parameters(), strict=True))


def test_a_store_that_was_moved_holds_the_same_teacher(
    home: Path, tokenizer: PreTrainedTokenizerBase, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_fingerprint(made(tokenizer))
    home.parent.rename(home.parent.with_name("elsewhere"))
    monkeypatch.setenv("FLEXKD_HOME", str(home.parent.with_name("elsewhere")))
    assert model_fingerprint(made(tokenizer)) == before
    assert trainings == ["teacher"]


@pytest.mark.parametrize("what", ["data", "weights", "tokenizer", "learning rate", "seed", "precision"])
def test_another_origin_is_another_teacher(
    home: Path, tokenizer: PreTrainedTokenizerBase, trainings: list[str], tmp_path: Path, what: str
) -> None:
    quick = settings_of(epochs=1.0, batch_size=16)
    made(tokenizer, settings=quick)
    changes: dict[str, Any] = {"settings": quick}
    if what == "data":
        changes["fingerprints"] = {"data": "others"}
    elif what == "weights":
        changes["base"] = tiny_model("bert", seed=2)
    elif what == "tokenizer":
        write_tokenizer(tmp_path / "shifted", extra="shifted")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "shifted")
    else:
        field: dict[str, Any] = {
            "learning rate": {"learning_rate": 1e-4},
            "seed": {"seed": 1},
            "precision": {"precision": "bfloat16"},
        }
        changes["settings"] = settings_of(**{"epochs": 1.0, "batch_size": 16, **field[what]})
    made(tokenizer, **changes)
    assert trainings == ["teacher", "teacher"]
    assert len(list(home.iterdir())) == 2


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    plain = DistillationTrainer.compute_loss

    def interrupted(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        if model.training and self.state.global_step == step:
            raise error
        return plain(self, model, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)


def test_an_interrupted_fine_tuning_goes_on_and_ends_in_the_same_teacher(
    home: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model_fingerprint(made(tokenizer))
    (folder,) = home.iterdir()
    folder.rename(home / "kept")
    with monkeypatch.context() as patch:
        interrupt(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            made(tokenizer)
    assert not folder.exists(), "a teacher enters the store whole or not at all"
    assert last_checkpoint(home / f"{folder.name}.partial" / "checkpoints").name == "checkpoint-8"
    steps: list[int] = []
    plain = DistillationTrainer.compute_loss

    def counted(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        if model.training:
            steps.append(self.state.global_step)
        return plain(self, model, *args, **options)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", counted)
    assert model_fingerprint(made(tokenizer)) == whole
    assert steps == [8, 9, 10, 11]
    assert sorted(path.name for path in home.iterdir()) == sorted([folder.name, "kept"])


def test_a_half_written_checkpoint_of_a_teacher_is_passed_over(
    home: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            made(tokenizer)
    (work,) = home.iterdir()
    # As a kill in the midst of a save leaves it: some files, not the last one.
    torn = work / "checkpoints" / "checkpoint-10"
    torn.mkdir()
    (torn / "config.json").write_text("{}", encoding="utf-8")
    resumed = model_fingerprint(made(tokenizer))
    (folder,) = home.iterdir()
    folder.rename(home / "kept")
    assert model_fingerprint(made(tokenizer)) == resumed


def test_a_training_that_fails_leaves_no_teacher_behind(
    home: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 2, TrainingError("step 3: not finite."))
    with pytest.raises(TrainingError):
        made(tokenizer)
    assert [path.suffix for path in home.iterdir()] == [".partial"]


def test_the_attention_that_was_chosen_for_the_base_is_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    base = tiny_model("bert", seed=1)
    base.set_attn_implementation("eager")
    for _ in range(2):
        assert made(tokenizer, base=base).config._attn_implementation == "eager"


def test_the_store_lies_in_the_home_of_flexkd_or_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", "/somewhere")
    assert store_folder() == Path("/somewhere/teachers")
    monkeypatch.delenv("FLEXKD_HOME")
    assert store_folder() == Path.home() / ".cache" / "flexkd" / "teachers"


def test_two_that_want_one_teacher_at_the_same_time_train_it_once(
    home: Path, tokenizer: PreTrainedTokenizerBase, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = [0], [0]
    plain = teacher_module._fine_tune

    def watched(*args: Any, **options: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.2)
        plain(*args, **options)
        inside[0] -= 1

    monkeypatch.setattr(teacher_module, "_fine_tune", watched)
    bases = [tiny_model("bert", seed=1) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(made, tokenizer, base) for base in bases]]
    assert (trainings, most) == (["teacher"], [1])
    assert model_fingerprint(found[0]) == model_fingerprint(found[1])
