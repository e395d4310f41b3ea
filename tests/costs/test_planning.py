"""Plans of whole recipes: the sizes of the run itself, stages, knobs, assumptions, and what is refused."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexkd.costs import devices, planning
from flexkd.costs.devices import DEVICES, device_named
from flexkd.costs.planning import PROCESS_BYTES, draft, memory_of
from flexkd.costs.printing import print_run_plan
from flexkd.costs.result import Plan, StageMemory, StageWork
from flexkd.costs.stages import MEASURING_BYTES
from flexkd.errors import RecipeError, ShapeError
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.models.loading.language import load_language_model
from flexkd.models.loading.pretrained import load_classifier
from flexkd.models.slicing.student import slice_student
from flexkd.pipeline.start import student_sizes
from flexkd.recipe import Recipe, override_recipe
from flexkd.terminal import print_plan
from tests.job_files import job, text_job, write_text_tokenizer
from tests.tiny import tiny_batch, tiny_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        for kind in ("classes", "texts"):
            (folder / kind).mkdir()
        yield folder


def texts(material: Path, **changes: Any) -> Recipe:
    return text_job(material / "texts", **changes)


@pytest.fixture(scope="module")
def plan(material: Path) -> Plan:
    """Of the summarization on a device that has room."""
    return planning.plan(texts(material), "h100")


def parameters(recipe: Recipe) -> list[int]:
    """Of teacher and student."""
    models = draft(recipe, "h100")[0].models
    return [models.teacher.num_parameters(), models.student.num_parameters()]


def training_of(plan: Plan) -> StageMemory:
    return next(stage for stage in plan.memory if stage.name == "training")


def step_of(units: Sequence[StageWork]) -> StageWork:
    return next(work for work in units if "step" in work.name)


def stages(plan: Plan) -> list[str]:
    return [stage.name for stage in plan.memory]


@pytest.mark.parametrize(
    "sizes", [{}, {"student__hidden_size": None, "student__num_layers": None, "student__size": 0.5}]
)
def test_a_turned_student_has_the_parameters_of_the_run(material: Path, sizes: dict[str, Any]) -> None:
    recipe = texts(material, **sizes)
    teacher = load_language_model(recipe.teacher.model)
    asked = student_sizes(recipe, teacher, rotated=True)
    student = slice_student(teacher, basis="rotated", batches=[tiny_batch(teacher)], **asked)  # type: ignore[arg-type]
    assert parameters(recipe) == [teacher.num_parameters(), student.num_parameters()]


def test_a_classifier_that_is_cut_has_the_parameters_of_the_run(material: Path) -> None:
    recipe = job(material / "classes")
    teacher, _ = load_classifier(recipe.teacher.model)
    student = slice_student(teacher, **student_sizes(recipe, teacher))  # type: ignore[arg-type]
    assert parameters(recipe) == [teacher.num_parameters(), student.num_parameters()]
    plan = planning.plan(recipe, "h100")
    assert plan.steps == recipe.training.max_steps
    assert stages(plan) == ["teacher's fine-tuning", "teacher's answers", "training", "evaluation"]


def test_students_that_are_named_have_their_own_size_or_the_asked_one(material: Path) -> None:
    other = material / "other"
    model = tiny_model("qwen2", "causal", hidden_size=16, num_hidden_layers=2)
    model.save_pretrained(other)
    named = {"student__start": "config", "student__model": str(other), "student__hidden_size": None}
    assert parameters(texts(material, **named, student__num_layers=None))[1] == model.num_parameters()
    assert 0 < parameters(texts(material, **named, student__num_layers=1))[1] < model.num_parameters()


def test_low_rank_updates_are_all_that_is_trained(material: Path, plan: Plan) -> None:
    worker, _ = draft(texts(material, student__lora={"rank": 2}), "h100")
    updated, whole = memory_of(worker).training(), training_of(plan)
    assert worker.models.student.num_parameters() == plan.models[1].parameters
    assert updated.parts["optimizer"] == 2 * updated.parts["gradients"] < whole.parts["optimizer"]
    assert updated.parts["student's weights"] > whole.parts["student's weights"]
    assert step_of(worker.units()).flops < step_of(plan.units).flops


def test_parts_follow_from_parameters_and_answers_that_are_stored_free_the_device(material: Path, plan: Plan) -> None:
    training = training_of(plan)
    teacher, student = (model.parameters for model in plan.models)
    assert training.parts["optimizer"] == 8 * student
    assert training.parts["gradients"] == 4 * student
    assert training.peak < sum(training.parts.values())
    assert "teacher's weights" not in training.parts
    live = planning.plan(texts(material, teacher__cache="never"), "h100")
    asked = training_of(live)
    assert asked.parts["teacher's weights"] >= 4 * teacher
    assert stages(live) == ["teacher's fine-tuning", "training", "evaluation"]
    knobs = {knob.setting: knob.peak for knob in live.knobs}
    assert knobs["teacher.cache=always"] == training.peak < asked.peak
    assert knobs["training.per_device_batch_size=8"] < asked.peak
    assert knobs["training.gradient_checkpointing=true"] < asked.peak


@pytest.mark.parametrize("loss", sorted(set(FEATURE_LOSS_FACTS) - {"correlation"}))
def test_every_loss_of_features_is_planned(material: Path, loss: str) -> None:
    features = {"loss": loss, "layer_map": {1: 2}} | ({"mapping": "matched"} if loss == "mse" else {})
    worker, answers = draft(texts(material, objective__features=features, scores__layer=2), "h100")
    training = memory_of(worker).training()
    assert training.parts["logits and losses"] > 0
    # 16 units of the student, or all 32 of the teacher.
    assert answers.columns == (16 if FEATURE_LOSS_FACTS[loss].pairs_units else 32)
    projector = 4 * (16 * 32 + 32) if loss == "projector" else 0
    assert training.parts["gradients"] == 4 * worker.models.student.num_parameters() + projector


def test_chunks_follow_the_recipe(material: Path) -> None:
    worker, _ = draft(texts(material, training__logit_chunk=3), "h100")
    memory = memory_of(worker)
    assert memory.step.logit_chunk == 3
    assert [knob.setting for knob in memory.knobs() if "logit_chunk" in knob.setting] == [
        "training.logit_chunk=auto",
        "training.logit_chunk=off",
    ]


def test_each_stage_is_worked_out_and_minutes_end_it(material: Path, plan: Plan) -> None:
    names = [re.sub(r"\d[\d,]*\d|\d", "N", work.name) for work in plan.work]
    assert names == [
        "teacher's fine-tuning, N steps",
        "geometry of N rows",
        "teacher's answers to all rows",
        "training, N steps",
        "N evaluations on N rows",
        "test rows, three models",
    ]
    assert all(work.flops > 0 and work.seconds > 0 for work in plan.work)
    step = step_of(plan.units)
    training = next(work for work in plan.work if work.name == "training, 4 steps")
    assert training.flops == pytest.approx(4 * step.flops)
    minutes = training.seconds / 60 / 2
    worker, _ = draft(texts(material, training__max_minutes=minutes, teacher__cache="always"), "h100")
    cut = next(work for work in worker.run() if work.name == "training, 4 steps")
    assert cut.is_limited
    assert cut.seconds == pytest.approx(60 * minutes)


def test_rows_that_geometry_and_calibration_read_are_counted_once(material: Path) -> None:
    def rows_read(**changes: Any) -> dict[str, float]:
        worker, _ = draft(texts(material, **changes), "h100")
        once = worker._pass("", worker.models.teacher, worker._load("train", 1), "float32").flops
        work = {stage.name: stage.flops for stage in worker.run()}
        return {name: round(flops / once) for name, flops in work.items() if name == "student's start"}

    assert rows_read(student__calibration_rows=16, scores__rows=20) == {}
    assert rows_read(student__calibration_rows=30, scores__rows=20) == {"student's start": 10}
    assert rows_read(student__calibration_rows=16, student__chosen_by="variance") == {"student's start": 16}


def test_rows_that_are_not_here_are_taken_at_their_longest(material: Path, plan: Plan) -> None:
    worker, answers = draft(texts(material, data__train="someone/rows"), "h100")
    assumed = "every row has 32 tokens (data.max_length), its answer 6 (data.max_answer_length)"
    assert f"rows: not on this machine; assumed: {assumed}" in worker.lengths.notes
    assert (worker.run(), answers.forms(), worker.steps()) == ((), {}, 4)
    assert step_of(worker.units()).flops > step_of(plan.units).flops
    assert memory_of(worker).training().parts["activations"] > training_of(plan).parts["activations"]


def test_a_run_on_a_cpu_holds_libraries_a_turned_teacher_answers_and_gaps_as_well(material: Path) -> None:
    """Slow: every part by hand."""
    recipe = texts(material)
    host = replace(DEVICES["h100"], is_cpu=True)
    worker = replace(draft(recipe, "h100")[0], device=host)
    memory = {stage.name: stage for stage in memory_of(worker).stages()}
    assert list(memory) == [
        "teacher's fine-tuning",
        "student's start",
        "teacher's answers",
        "training",
        "evaluation",
        "test rows",
        "speed and memory",
    ]
    assert all(stage.parts["libraries and rows"] == PROCESS_BYTES for stage in memory.values())
    teacher = worker.models.teacher
    head: Any = teacher.get_output_embeddings()
    start = memory["student's start"].parts
    assert start["rotated teacher"] == 4 * sum(
        weight.numel() for name, weight in teacher.named_parameters(remove_duplicate=False) if "inv_freq" not in name
    ) + sum(buffer.nbytes for buffer in teacher.buffers())
    norms = sum("norm" in name for name, _ in teacher.named_parameters())
    assert start["statistics and geometry"] == 12 * norms * 32 * 32 + 16 * head.weight.numel()
    measuring = memory["speed and memory"].parts
    assert measuring["processes that measure"] == 2 * MEASURING_BYTES
    assert measuring["models in them"] == 4 * (teacher.num_parameters() + worker.models.student.num_parameters())
    stands = ("optimizer", "libraries and rows", "rotated teacher", "processes that measure", "models in them")
    for stage in memory.values():
        held = sum(size for name, size in stage.parts.items() if name.endswith("weights") or name in stands)
        gaps = stage.parts["gaps between freed blocks"]
        assert stage.peak - held - gaps == pytest.approx(gaps / 0.4, abs=2)
    section = recipe.generation
    assert section is not None
    batch = worker.lengths.splits["test"].heaviest(4)
    config: Any = teacher.config
    tokens = 4 * (batch.source + recipe.data.max_answer_length)
    keys_and_values = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    assert memory["test rows"].parts["answers"] == 2 * keys_and_values + 2 * 4 * batch.predictions * len(head.weight)
    # With an accelerator none of this lies on the device.
    assert "libraries and rows" not in training_of(planning.plan(recipe, "h100")).parts


def test_a_run_fits_or_does_not(plan: Plan) -> None:
    assert plan.fits
    assert plan.peak == max(stage.peak for stage in plan.memory)
    tight = replace(plan, device=replace(plan.device, memory=plan.peak))
    assert not tight.fits  # a tenth has to stay free
    assert replace(plan, device=replace(plan.device, memory=int(plan.peak / 0.9) + 1)).fits


def test_what_is_wrong_is_said_before_anything_is_read(material: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("--device: unknown device 'h10'. Known: a100, h100, h200, here")):
        planning.plan(texts(material, data__train="nothing.jsonl"), "h10")
    with pytest.raises(ShapeError, match=r"student\.hidden_size: 64 is more than the teacher's 32"):
        planning.plan(texts(material, student__hidden_size=64), "h100")


def test_this_machine_is_timed_in_the_precisions_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_SIDE", 64)
    monkeypatch.setattr(devices, "_SECONDS", 0.01)
    here = device_named("here", ("float32", "bfloat16", "float32"))
    assert set(here.flops) == {"float32", "bfloat16"}
    assert all(1e6 < rate < 1e16 for rate in here.flops.values())
    assert here.memory > 2**28
    flops = here.flops["float32"] * here.utilisation
    assert here.seconds(flops, "float32") == pytest.approx(1)


def test_auto_is_bfloat16_on_every_named_device() -> None:
    for device in DEVICES.values():
        assert device.resolved("auto") == "bfloat16"
        assert device.resolved("float32") == "float32"
        assert device.flops["float32"] < device.flops["bfloat16"]


def test_a_person_reads_sizes_stages_settings_and_the_verdict(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    print_run_plan(plan)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny on h100, 80 GB"
    assert any(
        re.match(r"student +5,616 +llama, 2 layers x 16, 4 heads, 24 feed-forward units", line) for line in lines
    )
    assert any(line.startswith("training.gradient_checkpointing=true: saves ") for line in lines)
    assert any(line.startswith("cache of the teacher's answers, float16, all outputs: ") for line in lines)
    assert any(line.startswith("the whole run ") for line in lines)
    assert lines[-1].startswith("fits: ")
    print_run_plan(replace(plan, device=replace(plan.device, memory=1000), work=()))
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "training: 4 steps; the time of the whole run is not known without the number of rows" in out


@pytest.mark.slow
def test_a_run_that_may_stop_early_is_planned_at_most(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = texts(material, training__evaluations=4, training__early_stopping={"patience": 1})
    plan = planning.plan(early, "h100")
    limited = [stage.name for stage in plan.work if stage.name.endswith(", at most")]
    assert [name.partition(" on ")[0] for name in limited] == ["training, 4 steps, at most", "4 evaluations"]
    assert "time: all steps of the training, the most that training.early_stopping allows" in plan.assumptions
    print_plan(early)
    assert "at most 4 steps of batches" in capsys.readouterr().out
    never = planning.plan(override_recipe(early, ["training.early_stopping=null"]), "h100")
    assert [stage.flops for stage in never.work] == [stage.flops for stage in plan.work]


def test_sizes_are_planned_one_by_one(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = texts(material, sizes={"values": [0.4, 0.9], "seeds": [0, 1, 2]})
    plan = planning.plan(recipe, "h100")
    small, large = plan.sizes
    alone = planning.plan(
        texts(material, student__hidden_size=None, student__num_layers=None, student__size=0.9), "h100"
    )
    assert (large.size, large.parameters) == ("0.9", alone.models[1].parameters)
    assert f", {large.shape}, " in alone.models[1].shape
    assert large.peak == training_of(alone).peak
    of_student = [work for work in alone.work if work.name.startswith(("training", "2 evaluations", "test rows"))]
    assert large.seconds == pytest.approx(sum(work.seconds for work in of_student))
    assert small.parameters < large.parameters
    assert small.peak < large.peak
    print_run_plan(plan)
    assert "flexkd sizes: 2 sizes x 3 seeds, " in capsys.readouterr().out
    assert alone.sizes == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.9, 0.91], "sizes.values: 0.9 and 0.91 come to the same student"),
        ([0.001, 0.5], "sizes.values.0.001: derive_shape: no student of this llama has"),
    ],
)
def test_sizes_that_make_no_curve_are_refused(material: Path, values: list[float], message: str) -> None:
    with pytest.raises((RecipeError, ShapeError), match=re.escape(message)):
        planning.plan(texts(material, sizes={"values": values}), "h100")


@pytest.mark.slow
def test_rivals_cost_their_steps_and_their_test_rows(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = material / "texts" / "other"
    if not other.exists():
        texts(material)
        tiny_model("llama", "causal", seed=9).save_pretrained(other)
        write_text_tokenizer(other)
    plain = planning.plan(texts(material), "h100")
    rivals = planning.plan(texts(material, rivals={"int8_teacher": True, "models": [str(other)]}), "h100")
    added = {work.name: work for work in rivals.work if work.name not in {work.name for work in plain.work}}
    assert list(added) == ["rival teacher in int8: test rows", "rival other: 4 steps, test rows"]
    tested, learnt = added.values()
    # The rival is as large as the teacher: 4 steps of 16 rows, forward and backward, and the same test rows.
    thousand = next(work for work in plain.units if work.name.startswith("the teacher reads 1,000 rows"))
    assert learnt.flops - tested.flops == pytest.approx(3 * 4 * 16 / 1000 * thousand.flops)
    assert [size.role for size in rivals.models] == ["teacher", "student", f"rival {other}"]
    assert rivals.models[2].parameters == rivals.models[0].parameters
    names = [stage.name for stage in rivals.memory]
    assert names == [*(stage.name for stage in plain.memory), "rival's fine-tuning"]
    print_run_plan(rivals)
    printed = " ".join(capsys.readouterr().out.split())
    assert "rivals: int8_teacher is measured on CPUs alone, and a run on this device refuses it" in printed


def test_several_processes_divide_time_and_rows_and_send_gradients(
    material: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    four = planning.plan(texts(material), "h100", processes=4)
    assert sum(work.seconds for work in plan.work) == pytest.approx(4 * sum(work.seconds for work in four.work))
    assert [work.flops for work in four.work] == [work.flops for work in plan.work]
    weights = 4 * four.models[1].parameters
    assert four.network == pytest.approx(1.5 * weights, rel=1e-3)
    assert training_of(four).parts["gradients on the way"] == training_of(four).parts["gradients"]
    live, rows = {"teacher__cache": "never"}, texts(material).training.batch_size
    quarter = training_of(planning.plan(texts(material, training__batch_size=rows // 4, **live), "h100"))
    shared = training_of(planning.plan(texts(material, **live), "h100", processes=4))
    assert shared.peak == quarter.peak + quarter.parts["gradients"]
    assert (plan.processes, plan.network) == (1, 0)
    print_run_plan(four)
    out = capsys.readouterr().out
    assert "on 4 processes, each h100" in out
    assert "network: each process sends " in out
    with pytest.raises(RecipeError, match=r"batch_size: .* does not divide into 7 processes"):
        planning.plan(texts(material), "h100", processes=7)
    with pytest.raises(RecipeError, match="processes: must be 1 or more, was 0"):
        planning.plan(texts(material), "h100", processes=0)
