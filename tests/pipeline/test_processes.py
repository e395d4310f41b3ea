"""A recipe on several processes leaves what it leaves on one: units, scores, answers, figures and files."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexkd import processes
from flexkd.errors import DataError, FollowedError, ProcessError, RecipeError
from flexkd.evaluate.classification import predict
from flexkd.files import written_whole
from flexkd.pipeline.answering import answer_training_rows
from flexkd.pipeline.compare import compare
from flexkd.pipeline.distill import distill, evaluate
from flexkd.pipeline.job import prepare
from flexkd.pipeline.sharing import cache_answers
from flexkd.preflight import preflight
from flexkd.recipe import Recipe
from flexkd.run_files import ANSWERS_FILE, CACHE_FOLDER, PREDICTIONS_FILE, SELECTION_FILE
from tests.closeness import assert_close
from tests.job_files import fixed_costs, job, text_job, write_text_rows, write_text_tokenizer, write_tokenizer
from tests.tiny import tiny_batch, tiny_model
from tests.training.processes import run_together

# Two processes round in another order than one, which bfloat16 shows from the first step on.
EXACT: Mapping[str, Any] = {"teacher__precision": "float32", "training__precision": "float32"}


def alone_or_together(folder: Path, world: int) -> Path:
    """The folder of what a number of processes makes, with a home of their own; all of them meet."""
    place = folder / f"of-{world}"
    os.environ["FLEXKD_HOME"] = str(place / "home")
    if world > 1:
        processes.join()
    elif not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    fixed_costs(pytest.MonkeyPatch())
    return place


def classifier(folder: Path, world: int, **changes: Any) -> Recipe:
    few = {"teacher__fine_tune__epochs": 2, "teacher__fine_tune__learning_rate": 1e-3, "teacher__allow_weak": True}
    return job(folder, output=str(alone_or_together(folder, world) / "run"), **few, **EXACT, **changes)


def writer(folder: Path, world: int, **changes: Any) -> Recipe:
    return text_job(folder, output=str(alone_or_together(folder, world) / "run"), **EXACT, **changes)


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """The files of a classification and of a summarization, of models without dropout."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name in ("classes", "texts"):
        (tmp_path / name).mkdir()
    tiny_model("bert", seed=3, num_labels=2, **still).save_pretrained(tmp_path / "classes" / "teacher")
    write_tokenizer(tmp_path / "classes" / "teacher")
    job(tmp_path / "classes")
    tiny_model("llama", "causal", seed=3).save_pretrained(tmp_path / "texts" / "teacher")
    write_text_tokenizer(tmp_path / "texts" / "teacher")
    write_text_rows(tmp_path / "texts" / "texts.jsonl")
    text_job(tmp_path / "texts")
    return tmp_path


def files_of(folder: Path) -> set[str]:
    """All files, but the random states of the processes, each of which has one.

    The folder of a cache is named after the directions that it holds, whose last bits depend on the order of a sum.
    """
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"cache/\w+", "cache", re.sub(r"rng_state(_\d)?\.pth", "rng_state", path)) for path in paths}


def assert_same_run(folder: Path, num_models: int) -> None:
    """What one process and two have left in their folders is the same, up to rounding."""
    of_one, of_two = (folder / f"of-{world}" / "run" for world in (1, 2))
    assert files_of(of_one) == files_of(of_two)
    scores = [load_file(run / SELECTION_FILE) for run in (of_one, of_two)]
    assert scores[0].keys() == scores[1].keys()
    for name, values in scores[0].items():
        assert_close(values, scores[1][name], dtype=torch.float32)
    predictions = [(run / PREDICTIONS_FILE).read_text("utf-8").splitlines() for run in (of_one, of_two)]
    assert len(predictions[0]) == len(predictions[1])
    for rows in zip(*predictions, strict=True):
        assert_same_numbers(*map(json.loads, rows))
    records = [json.loads((run / "record.json").read_text("utf-8")) for run in (of_one, of_two)]
    assert len(records[0]["models"]) == num_models
    for key in ("models", "evaluations", "history", "data"):
        assert_same_numbers(records[0][key], records[1][key])


def assert_same_numbers(first: Any, second: Any) -> None:
    """Equal, but for the rounding of floats and what a clock says."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            if not re.search("runtime|per_second", key):
                assert_same_numbers(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for parts in zip(first, second, strict=True):
            assert_same_numbers(*parts)
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    else:
        assert first == second


def distill_classes(folder: Path, world: int, _: int) -> None:
    distill(classifier(folder / "classes", world))
    report = evaluate("student", classifier(folder / "classes", world))
    assert report.metrics["accuracy"] is not None


def distill_texts(folder: Path, world: int, _: int) -> None:
    distill(writer(folder / "texts", world, teacher__cache="always"))


def compare_classes(folder: Path, world: int, _: int) -> None:
    section = {"methods": ["fine_tuning", "flexkd"], "seeds": [0, 1]}
    record = compare(classifier(folder / "classes", world, compare=section))
    (folder / f"{world}.json").write_text(json.dumps([cell.metrics for cell in record.cells]), encoding="utf-8")


def cache_classes(folder: Path, world: int, _: int) -> None:
    recipe = classifier(folder / "classes", world, teacher__fine_tune=None, scores__rows=40)
    patch = pytest.MonkeyPatch()
    patch.setattr("flexkd.teacher.cache.writer.SHARD_BYTES", 2000)
    patch.setattr("flexkd.teacher.cache.writer.TEACHER_BATCH_SIZE", 8)
    cache_answers(recipe)


def store_answers(folder: Path, world: int, _: int) -> None:
    recipe = writer(folder / "texts", world, teacher__fine_tune=None, teacher__allow_weak=True, training__batch_size=24)
    answer_training_rows(recipe)


@pytest.mark.slow
def test_a_classifier_distilled_by_two_processes_is_that_of_one(material: Path) -> None:
    run_together(distill_classes, material, 1, 2)
    assert_same_run(material / "classes", num_models=4)


@pytest.mark.slow
def test_a_model_that_writes_distilled_by_two_processes_is_that_of_one(material: Path) -> None:
    run_together(distill_texts, material, 1, 2)
    assert_same_run(material / "texts", num_models=4)


@pytest.mark.slow
def test_a_comparison_by_two_processes_is_that_of_one(material: Path) -> None:
    run_together(compare_classes, material, 1, 2)
    assert_same_numbers(*(json.loads((material / f"{world}.json").read_text("utf-8")) for world in (1, 2)))


@pytest.mark.slow
def test_K08_a_cache_of_two_processes_has_the_bytes_of_one(material: Path) -> None:
    run_together(cache_classes, material, 1, 2)
    of_one, of_two = (material / "classes" / f"of-{world}" / "run" / CACHE_FOLDER for world in (1, 2))
    names = sorted(path.relative_to(of_one) for path in of_one.rglob("*.*"))
    assert len(names) > 4
    assert sorted(path.relative_to(of_two) for path in of_two.rglob("*.*")) == names
    assert all((of_one / name).read_bytes() == (of_two / name).read_bytes() for name in names)


@pytest.mark.slow
def test_answers_of_three_processes_are_those_of_one_each_once(material: Path) -> None:
    run_together(store_answers, material, 1, 3)
    of_one, of_three = (
        (material / "texts" / f"of-{world}" / "run" / ANSWERS_FILE).read_text("utf-8") for world in (1, 3)
    )
    assert len(of_one.splitlines()) > 40
    assert of_one == of_three


def meet(folder: Path, world: int, rank: int) -> None:
    processes.join()
    assert processes.num_processes() == world
    assert list(processes.divided(range(7), lambda item: (item, rank))) == [(item, item % world) for item in range(7)]
    assert list(processes.divided([], lambda item: item)) == []
    assert list(processes.share_of(range(7))) == list(range(rank, 7, world))
    assert processes.gathered(rank) == list(range(world))
    assert processes.decided(lambda: {"first": rank}) == {"first": 0}
    with processes.in_turn():
        file = folder / f"made-{world}"
        assert file.is_file() is (rank > 0)
        file.touch()
    written: list[int] = []
    processes.alone(lambda: written.append(rank))
    assert written == ([] if rank else [0])
    processes.check_alike("seed", "1", advice="")
    with pytest.raises(ProcessError, match=re.escape("seed: process 0 has '0', process 1 '1'. Give one.")):
        processes.check_alike("seed", str(rank), advice="Give one.")
    processes.check_shared(folder)
    message = f"process 0 writes there, and process {world - 1} does not see it"
    with pytest.raises(ProcessError, match=message):
        processes.check_shared(folder / "of-one" if rank == world - 1 else folder)
    with pytest.raises(DataError, match="item 2"):
        list(processes.divided(range(7), _fails_at_2))
    with pytest.raises(FollowedError if rank else RecipeError):
        processes.decided(_refuses)
    with pytest.raises(FollowedError if rank else RecipeError), processes.in_turn():
        _refuses()
    complaining = processes.gathered(processes.may_complain())
    assert sum(complaining) == 1


def work_apart(folder: Path, world: int, rank: int) -> None:
    """In a script whose processes have not met through a recipe, each works for itself."""
    torch.distributed.init_process_group("gloo")
    assert list(processes.divided([rank, rank], str)) == [str(rank)] * 2
    assert processes.gathered(rank) == [rank]
    assert processes.decided(lambda: rank) == rank
    model = tiny_model("bert")
    batch = tiny_batch(model, seed=rank)
    assert predict(model, [batch, batch]).logits.shape[0] == 2 * len(batch["labels"])
    with written_whole(folder / f"{world}-{rank}") as partial:
        partial.touch()
    assert (folder / f"{world}-{rank}").is_file()


def _fails_at_2(item: int) -> int:
    if item == 2:
        raise DataError("item 2")
    return item


def _refuses() -> None:
    raise RecipeError("no")


def test_processes_divide_decide_and_fail_together(tmp_path: Path) -> None:
    run_together(meet, tmp_path, 2, 3)


def test_processes_of_a_script_of_ones_own_divide_nothing(tmp_path: Path) -> None:
    run_together(work_apart, tmp_path, 2)


def test_a_rank_without_a_world_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    processes.join()
    assert processes.is_first()
    assert processes.speaks()
    with written_whole(tmp_path / "file") as partial:
        partial.touch()
    assert (tmp_path / "file").is_file()


def test_a_program_of_its_own_has_the_threads_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 8, "RANK": 4, "LOCAL_WORLD_SIZE": 4, "OMP_NUM_THREADS": 2}.items():
        monkeypatch.setenv(name, str(value))
    environment = processes.environment_of_one_process()
    assert environment["OMP_NUM_THREADS"] == "8"
    assert not {"WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"} & environment.keys()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set, though WORLD_SIZE is 2."),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: is 'two', and a launcher sets it to a whole number."),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
            "RANK: is 2, and processes count from 0 to 1.",
        ),
    ],
)
def test_X05_a_launch_that_cannot_work_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    recipe = job(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flexkd.preflight.inputs.read_rows", lambda _: pytest.fail("read"))
    with pytest.raises(ProcessError, match=re.escape(message)):
        prepare(recipe)
    (problem,) = preflight(recipe).problems
    assert problem.startswith(message)


def refuse(folder: Path, _: int, rank: int) -> None:
    recipe = job(folder / "classes", output=str(folder / "run"), training__seed=rank)
    with pytest.raises(ProcessError, match=r"training: process 0 has .*Start all with the same recipe"):
        prepare(recipe)
    for changes, message in (
        ({"training__batch_size": 15}, "training.batch_size: 15 does not divide into 2 processes of 7 rows"),
        ({"teacher__fine_tune__batch_size": 9}, "teacher.fine_tune.batch_size: 9 does not divide into 2 processes"),
        ({"compare": {"search": {"training.learning_rate": [1e-3, 1e-4]}}}, "compare.search: 2 processes, and a sea"),
    ):
        changed = job(folder / "classes", output=str(folder / "run"), **changes)
        with pytest.raises(FollowedError if rank else (RecipeError, ProcessError)) as caught:
            prepare(changed)
        assert rank or message in str(caught.value)


def test_processes_with_other_recipes_and_steps_that_do_not_divide_are_refused(material: Path) -> None:
    run_together(refuse, material, 2)
