"""What an earlier flexkd left on disk is read, continued and never made again."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.compare_record import CompareRecord
from flexkd.errors import ArtifactError
from flexkd.evaluate.cost import Cost
from flexkd.preflight.comparison import cell_recipe, check_cell
from flexkd.preflight.contrasts import changed_seeds
from flexkd.preflight.run_folder import continued
from flexkd.recipe import load_recipe
from flexkd.record import RunRecord
from flexkd.report import page
from flexkd.tasks import classification, generation
from flexkd.teacher.cache import writer
from flexkd.teacher.live import LiveTeacher
from tests.job_files import count_optimizer_steps
from tests.old_folders import make

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the folders were made on a CPU: another attention")

MADE_WITH = json.loads((make.HERE / "made_with.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old folders, which is the working folder: their recipes name files as they lie there."""
    folder = tmp_path / "old"
    shutil.copytree(make.HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLEXKD_HOME", "home")
    fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
    for task in (classification, generation):
        monkeypatch.setattr(task, "measure_costs", lambda folders, *_, **__: [fixed] * len(folders))
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each step of an optimizer; no page is drawn, which takes longer than the steps."""
    for name in ("write_report", "write_compare_report"):
        monkeypatch.setattr(page, name, lambda *_: None)
    return count_optimizer_steps(monkeypatch)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each batch that a teacher runs on."""
    batches: list[int] = []
    plain = LiveTeacher.signal

    def counted(self: LiveTeacher, batch: Any, request: Any) -> Any:
        batches.append(len(batch["input_ids"]))
        return plain(self, batch, request)

    monkeypatch.setattr(LiveTeacher, "signal", counted)
    return batches


@pytest.fixture(scope="module")
def same_arithmetic() -> bool:
    """Whether this machine adds in the order of the one that made the folders, so that bits can be compared."""
    return bool(make.arithmetic() == MADE_WITH["arithmetic"])


def flexkd(command: str, folder: str, *values: str) -> str:
    """The command that made a folder, once more; what it printed."""
    recipe, settings = make.RUNS[folder][1:]
    arguments = [command, f"recipes/{recipe}.yaml", f"output={folder}", *settings, *values]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def states_of(folder: Path, pattern: str) -> dict[str, tuple[int, str]]:
    """When each file was written, and a digest of its bytes."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


LATER_KEYS: Final[dict[str, Any]] = {
    "compare.contrasts": [],
    "compare.pruning": None,
    "compare.trials": None,
    "compare.starts": None,
    "data.encoding": "auto",
    "data.separator": "auto",
    "data.train_share": None,
    "objective.features.fade": None,
    "objective.features.projector": None,
    "objective.logits.entropy_share": None,
    "sizes": None,
    "task.higher_is_better": None,
    "push_to_hub": None,
    "rivals": None,
    "student.start_seed": None,
    "student.vocabulary": None,
    "training.early_stopping": None,
}
"""Recipe keys that came after the folders were made, with the values that mean what stood before."""


def earlier_keys(recipe: Any, at: str = "") -> Any:
    """A recipe without later keys, where these have the values that mean what stood before."""
    if not isinstance(recipe, dict):
        return recipe
    names = {key: f"{at}.{key}".lstrip(".") for key in recipe}
    return {
        key: earlier_keys(value, names[key])
        for key, value in recipe.items()
        if names[key] not in LATER_KEYS or value != LATER_KEYS[names[key]]
    }


def check_metrics(metrics: Mapping[str, float | None], expected: Mapping[str, float | None]) -> None:
    """Equal but for the rounding of another machine; undefined where they were."""
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name


def in_old_words(recipe: dict[str, Any], chosen_by: str = "auto") -> dict[str, Any]:
    """A recipe of this version as an earlier one said it, after a look at the choices that it had no keys for."""
    words: dict[str, Any] = json.loads(json.dumps(earlier_keys(recipe)))
    features = words["objective"]["features"]
    assert (words["student"].pop("chosen_by"), words["student"].pop("function_share")) == (chosen_by, 1.0)
    if features is not None:
        basis, choice = features["basis"], features.pop("chosen_by")
        assert choice == {"directions": "scores"}.get(basis)
        features["basis"] = {"auto": "units", "directions": "tangent"}.get(basis, basis)
    return words


def test_a_finished_run_is_not_trained_again(old: Path, steps: list[int]) -> None:
    before = RunRecord.read(old / "finished" / "record.json")
    shutil.rmtree(old / "finished" / "student")
    scores = states_of(old / "finished", "scores.safetensors")
    flexkd("distill", "finished")
    assert not steps
    assert states_of(old / "finished", "scores.safetensors") == scores
    student = Path("finished", "student", "model.safetensors")
    assert (old / student).read_bytes() == (make.HERE / student).read_bytes()
    after = RunRecord.read(old / "finished" / "record.json")
    assert (in_old_words(after.recipe), after.history, after.data) == (before.recipe, before.history, before.data)
    assert after.cut == "cut out of the teacher along the units with the highest scores"
    assert after.objective == before.objective
    # A record of this version has a hash of the scores themselves.
    assert all(len(scores.scores_hash) == 16 for scores in after.scores)
    assert [dataclasses.replace(scores, scores_hash="") for scores in after.scores] == before.scores
    for model, earlier in zip(after.models, before.models, strict=True):
        check_metrics(model.metrics, earlier.metrics)


def test_an_interrupted_run_goes_on_to_the_student_of_the_whole_one(
    old: Path, steps: list[int], same_arithmetic: bool
) -> None:
    flexkd("distill", "interrupted")
    assert len(steps) == 2, "the first two of four steps lie in its checkpoint"
    whole, resumed = (RunRecord.read(old / name / "record.json").history for name in ("finished", "interrupted"))
    assert [entry["loss"] for entry in resumed] == pytest.approx([entry["loss"] for entry in whole], rel=1e-3)
    if same_arithmetic:
        assert resumed == whole
        students = [old / name / "student" / "model.safetensors" for name in ("finished", "interrupted")]
        assert students[0].read_bytes() == students[1].read_bytes()


def test_a_finished_text_run_is_not_trained_again(
    old: Path, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """It was cut along the directions with the most variance, and stays so: scores choose only in new folders."""
    flexkd("distill", "text")
    assert not steps
    note = "student.chosen_by: an earlier version began 'text' and cut along the directions with the most variance"
    assert note in caplog.text
    assert note in " ".join(flexkd("check", "text").split())
    path = Path("text", "student", "model.safetensors")
    assert (old / path).read_bytes() == (make.HERE / path).read_bytes()
    before, after = (RunRecord.read(root / "text" / "record.json") for root in (make.HERE, old))
    assert (in_old_words(after.recipe, "variance"), after.generation) == (before.recipe, before.generation)
    assert any(text.startswith(note) for text in after.notes)
    assert after.cut == "cut out of the teacher along the PCA directions with the most variance"
    assert [model.name for model in after.models] == [model.name for model in before.models]


def test_the_student_of_an_old_run_is_measured(old: Path) -> None:
    recipe = "recipes/reviews.yaml"
    result = CliRunner().invoke(app, ["evaluate", "student", recipe, "output=finished"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    student = RunRecord.read(old / "finished" / "record.json").model("student")
    assert student is not None
    assert f"{student.metrics['nll']:.3f}" in result.output


@pytest.mark.parametrize("folders", [["comparison"], ["finished", "text"]], ids="-".join)
def test_old_records_are_drawn(old: Path, folders: list[str]) -> None:
    path = old / "page.html"
    result = CliRunner().invoke(app, ["report", *folders, "-o", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "</html>" in path.read_text(encoding="utf-8")


def test_old_scores_are_read_and_not_computed_again(old: Path) -> None:
    before = states_of(old / "scored", "scores.safetensors")
    assert "log_prob" in flexkd("score", "scored")
    assert states_of(old / "scored", "scores.safetensors") == before


@pytest.mark.parametrize("folder", ["cached", "cached_int8"])
def test_an_old_cache_is_read_and_not_made_again(old: Path, folder: str, answered: list[int]) -> None:
    before = states_of(old / folder / "cache", "*")
    flexkd("cache", folder)
    assert "verified" in flexkd("cache", folder, "--verify")
    after = states_of(old / folder / "cache", "*")
    assert {name: after[name] for name in before} == before
    assert sum(answered) < 250, "some rows are answered to compare them, never all for each student"


def test_a_student_learns_from_an_old_cache(old: Path, answered: list[int], steps: list[int]) -> None:
    before = states_of(old / "cached" / "cache", "*")
    flexkd("distill", "cached")
    assert len(steps) == 4
    assert len(answered) <= 3, "the rows that are compared; none of the training"
    after = states_of(old / "cached" / "cache", "*")
    assert {name: after[name] for name in before} == before


def test_an_interrupted_cache_goes_on(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", make.SHARD_BYTES)
    first = states_of(old / "cache_interrupted", "answers-*.safetensors")
    assert len(first) == 1
    flexkd("cache", "cache_interrupted")
    whole = states_of(old / "cache_interrupted", "answers-*.safetensors")
    assert len(whole) > 1
    assert {name: whole[name] for name in first} == first
    assert "verified" in flexkd("cache", "cache_interrupted", "--verify")


def test_old_answers_stay_and_those_that_are_missing_are_added(old: Path) -> None:
    path = old / "answers" / "answers.jsonl"
    whole = path.read_bytes()
    flexkd("generate", "answers")
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-4]) + lines[-4][:20])
    flexkd("generate", "answers")
    assert path.read_bytes().startswith(b"".join(lines[:-4]))
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    assert {row["id"] for row in answers} == {json.loads(line)["id"] for line in lines[1:]}
    assert "no problems found" in flexkd("check", "answers", "data.teacher_answers=answers/answers.jsonl")


def test_a_comparison_trains_only_the_cell_that_is_missing(old: Path, steps: list[int], same_arithmetic: bool) -> None:
    """Under a teacher that was fine-tuned, which is found again as well."""
    before = CompareRecord.read(old / "comparison" / "compare.json")
    cells = states_of(old / "comparison" / "cells", "cell.json")
    missing = old / "comparison" / "cells" / make.MISSING_CELL / "cell.json"
    assert not missing.exists()
    flexkd("compare", "comparison")
    assert len(steps) == 2, "two steps of one student, none of the teacher"
    after = CompareRecord.read(old / "comparison" / "compare.json")
    assert missing.exists()
    assert cells
    # It wrote no seeds down: those of its record are those that were named before results.
    assert (after.late_seeds, after.left_out_seeds) == ([], [])
    assert json.loads((old / "comparison" / "seeds.json").read_text("utf-8")) == before.seeds
    assert changed_seeds(make.HERE / "comparison", [*before.seeds[1:], 9]) == ([9], before.seeds[:1])
    for cell, earlier in zip(after.cells, before.cells, strict=True):
        assert (cell.method, cell.seed) == (earlier.method, earlier.seed)
        if same_arithmetic or f"{cell.method}-{cell.seed}" != make.MISSING_CELL:
            assert cell.metrics == earlier.metrics
        else:
            check_metrics(cell.metrics, earlier.metrics)
    if same_arithmetic:
        assert after.paired == before.paired


def test_a_comparison_that_cut_along_the_most_variance_goes_on_so(old: Path) -> None:
    recipe = load_recipe("recipes/summaries.yaml", ["output=texts"])
    assert continued(recipe) == (recipe, [])
    (old / "texts" / "cells" / "logit_kd-0").mkdir(parents=True)
    shutil.copy(old / "text" / "scores.safetensors", old / "texts" / "cells" / "logit_kd-0")
    earlier, notes = continued(recipe)
    assert earlier.student.chosen_by == "variance"
    assert [note.partition(":")[0] for note in notes] == ["student.chosen_by"]
    # A cell of that version says nothing of the choice, and counts as the same.
    settings = cell_recipe(earlier, 0, old / "texts" / "cells" / "logit_kd-0")[1]
    stored = json.loads(json.dumps(settings))
    del stored["student"]["chosen_by"]
    path = old / "texts" / "cells" / "logit_kd-0" / "cell.json"
    check_cell(path, {"recipe": stored}, {"recipe": settings})
    with pytest.raises(ArtifactError, match=r"made by another recipe or teacher \(recipe.student.chosen_by"):
        check_cell(path, {"recipe": stored}, {"recipe": cell_recipe(recipe, 0, path.parent)[1]})


def test_a_run_and_a_comparison_that_were_cut_by_scores_alone_go_on_so(old: Path) -> None:
    """Scores of PCA directions were the default before variance and function added up."""
    shutil.rmtree(old / "text")
    flexkd("score", "text", "student.chosen_by=scores")
    recipe = load_recipe("recipes/summaries.yaml", ["output=text"])
    earlier, notes = continued(recipe)
    assert earlier.student.chosen_by == "scores"
    assert notes[0].startswith("student.chosen_by: an earlier version began 'text' and cut by the scores alone")
    assert "cut by the scores alone" in " ".join(flexkd("check", "text").split())
    by_both = load_recipe("recipes/summaries.yaml", ["output=text", "student.chosen_by=mixed"])
    assert continued(by_both) == (by_both, [])

    cell = old / "compared" / "cells" / "flexkd-0"
    cell.mkdir(parents=True)
    recipe = load_recipe("recipes/summaries.yaml", ["output=compared"])
    by_scores = load_recipe("recipes/summaries.yaml", ["output=compared", "student.chosen_by=scores"])
    settings = cell_recipe(by_scores, 0, cell)[1]
    (cell / "cell.json").write_text(json.dumps({"made_of": {"recipe": settings}}), encoding="utf-8")
    assert continued(recipe) == (recipe, []), "a method of this version that cuts by scores is no earlier default"
    settings = {**settings, "student": {**settings["student"], "function_share": 0.3}}
    (cell / "cell.json").write_text(json.dumps({"made_of": {"recipe": settings}}), encoding="utf-8")
    assert continued(recipe)[0].student.chosen_by == "scores"
    # A search that has not finished a cell yet, too.
    trial = old / "compared" / "search" / "flexkd" / "0"
    trial.mkdir(parents=True)
    (cell / "cell.json").rename(trial / "trial.json")
    assert continued(recipe)[0].student.chosen_by == "scores"
    check_cell(cell / "cell.json", {"recipe": settings}, {"recipe": cell_recipe(continued(recipe)[0], 0, cell)[1]})


@pytest.mark.parametrize(
    "path", sorted((make.HERE / "recipes" / "every_key").glob("*.yaml")), ids=lambda path: path.stem
)
def test_old_recipes_say_what_they_said(path: Path) -> None:
    before = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert in_old_words(load_recipe(path).model_dump(mode="json")) == before


@pytest.mark.parametrize("folder", ["finished", "text"])
def test_the_recipe_that_a_run_wrote_out_loads(folder: str) -> None:
    record = RunRecord.read(make.HERE / folder / "record.json")
    assert in_old_words(load_recipe(make.HERE / folder / "recipe.yaml").model_dump(mode="json")) == record.recipe


def test_no_old_folder_names_a_machine() -> None:
    files = [path for path in make.HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 700_000
    rooted = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml") and b'"/' in path.read_bytes()]
    assert not rooted
