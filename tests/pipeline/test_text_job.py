"""A job that writes text, from recipe to run folder: decoders with and without a chat template, and a T5."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import flexkd
from flexkd.evaluate import answers as answers_module
from flexkd.evaluate.cost import Cost
from flexkd.models.forward.hidden import model_inputs
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import scores as scores_module
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.record import RunRecord
from flexkd.report.wording import model_interval
from flexkd.tasks import generation
from flexkd.teacher.live import LiveTeacher, batch_positions, read_signal, student_columns
from flexkd.teacher.signal import SignalRequest
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.evaluate.stored import stored_metrics
from tests.job_files import text_job
from tests.tiny import tiny_model
from tests.training.language_rows import wider_copy

KINDS = {"plain": ("llama", False), "chat": ("llama", True), "t5": ("t5", False)}
FLOAT32 = {"training__precision": "float32", "teacher__precision": "float32"}
EXACT = {**FLOAT32, "teacher__fine_tune": None}
NO_SHAPE = {"student__hidden_size": None, "student__num_layers": None}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for each kind; costs are not measured."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed = Cost(1000, 4000, 50.0, 10**6, "cpu")
        patch.setattr(generation, "measure_costs", lambda given, *_, **__: [fixed] * len(given))
        yield folder


def recipe_of(folders: Path, kind: str = "plain", name: str = "run", **changes: Any) -> Any:
    model_type, chat = KINDS[kind]
    folder = folders / kind
    folder.mkdir(exist_ok=True)
    return text_job(folder, model_type, chat=chat, **{**FLOAT32, "output": str(folder / name), **changes})


@pytest.fixture(scope="module")
def run_of(folders: Path) -> Callable[[str], RunRecord]:
    """The finished run of a kind, made when it is first asked for."""
    return cache(lambda kind: pipeline.distill(recipe_of(folders, kind)))


@pytest.fixture(scope="module", params=list(KINDS))
def finished(run_of: Callable[[str], RunRecord], request: pytest.FixtureRequest) -> tuple[str, RunRecord]:
    return request.param, run_of(request.param)


def answer_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_text_run_holds_what_it_promises_and_reads_back_equal(folders: Path, finished: tuple[str, RunRecord]) -> None:
    kind, record = finished
    run = folders / kind / "run"
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "scores.safetensors", "student", "record.json", "predictions.jsonl", "checkpoints"} <= names
    assert RunRecord.read(run / "record.json") == record
    assert [model.role for model in record.models] == ["teacher", "student_before", "student", "baseline"]
    assert [model.hidden_size for model in record.models] == [32, 16, 16, 0]
    assert record.generation is not None
    assert record.generation.kind == ("seq2seq" if kind == "t5" else "causal")
    assert record.generation.is_chat == (kind == "chat")
    assert record.generation.rows == 4
    assert len(record.answers) == 2
    # A decoder of RMS norms is cut along directions unless told otherwise.
    assert record.objective.count("directions" if kind != "t5" else "units") == 1
    assert [entry["step"] for entry in record.evaluations] == [2, 4]
    assert all(entry["eval_nll"] == pytest.approx(entry["eval_task_raw"], abs=1e-5) for entry in record.evaluations)


def test_every_metric_of_a_text_run_comes_out_of_its_answers(folders: Path, finished: tuple[str, RunRecord]) -> None:
    """Invariant 8."""
    kind, record = finished
    again = stored_metrics(folders / kind / "run" / "predictions.jsonl")
    *models, rule = record.models
    assert rule.metrics == again["first_sentence"]
    for model in models:
        assert model.metrics == again[model.role], model.role
        assert {"rougeL", "rouge1", "rouge2", "nll", "perplexity", "cut_share"} <= set(model.metrics)
    assert {"token_agreement", "kl"} <= set(record.models[2].metrics)
    assert record.intervals is not None
    assert {"teacher", "student", "first_sentence"} <= set(record.intervals.models)
    assert record.generation is not None
    assert record.intervals.rows == record.generation.rows
    for model in (record.models[0], record.models[2], rule):
        low, high = model_interval(record, model)
        assert low <= model.metrics["rougeL"] <= high


def test_the_first_sentence_is_judged_beside_the_models(folders: Path, finished: tuple[str, RunRecord]) -> None:
    kind, record = finished
    documents = {row.id: row.document for row in prepare(recipe_of(folders, kind)).data.test}
    lines = answer_lines(folders / kind / "run")
    for line in lines:
        said = line["models"]["first_sentence"]["answers"]["0"]
        assert said["text"] == documents[line["id"]], "these documents are one sentence"
        assert 0 < said["rouge"]["rougeL"] < 1
    assert all("first_sentence" in example.answers for example in record.answers)
    values = stored_metrics(folders / kind / "run" / "predictions.jsonl")["first_sentence"]
    assert values["rouge1"] == pytest.approx(
        sum(line["models"]["first_sentence"]["answers"]["0"]["rouge"]["rouge1"] for line in lines) / len(lines)
    )


def test_S02_D01_a_plain_student_says_the_same_and_stops_by_itself(
    folders: Path, finished: tuple[str, RunRecord]
) -> None:
    kind, _ = finished
    folder = folders / kind / "run" / "student"
    loader = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    student, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "flexkd" not in (folder / "config.json").read_text(encoding="utf-8").lower()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    line = answer_lines(folders / kind / "run")[0]
    ids = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    said = student.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    start = 1 if kind == "t5" else ids.shape[1]
    assert (
        tokenizer.decode(said[0, start:], skip_special_tokens=True)
        == (line["models"]["student"]["answers"]["0"]["text"])
    )
    stop = tokenizer.convert_tokens_to_ids("<|end|>" if kind == "chat" else "[EOS]")
    torch.manual_seed(0)
    many = ids.expand(32, -1)
    drawn = student.generate(input_ids=many, attention_mask=torch.ones_like(many), max_new_tokens=20, do_sample=True)
    ended = 0
    for row in drawn[:, start:].tolist():
        if stop in row:
            ended += 1
            assert set(row[row.index(stop) + 1 :]) <= {tokenizer.pad_token_id}
    assert ended > 0, "else nothing was seen to stop"


def test_S01_an_interrupted_text_run_goes_on_and_a_finished_one_does_nothing_again(
    folders: Path, run_of: Callable[[str], RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain = run_of("plain"), DistillationTrainer.compute_loss

    def interrupted(self: DistillationTrainer, model: Any, *args: Any, **options: Any) -> Any:
        if model.training and self.state.global_step == 3:
            raise KeyboardInterrupt
        return plain(self, model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(recipe_of(folders, name="parts"))
    for name in ("score_units", "functional_geometry"):
        monkeypatch.setattr(scores_module, name, lambda *_, **__: pytest.fail("scored again"))
    parts = pipeline.distill(recipe_of(folders, name="parts"))
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *_, **__: pytest.fail("trained again"))
    again = pipeline.distill(recipe_of(folders, name="parts"))
    for found in (parts, again):
        assert [model.metrics for model in found.models] == [model.metrics for model in whole.models]
        assert [entry["loss"] for entry in found.history] == [entry["loss"] for entry in whole.history]
        assert found.answers == whole.answers


def test_what_the_teacher_says_about_the_test_rows_is_computed_once_for_all_runs_with_it(
    folders: Path, run_of: Callable[[str], RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run reads it from the home folder, follows it without a pass, and reports the same numbers."""
    whole = run_of("plain")
    generated: list[bool] = []
    plain = answers_module.generate_answers

    def generate(model: Any, *args: Any, **options: Any) -> Any:
        generated.append(model.config.hidden_size == 32)
        return plain(model, *args, **options)

    monkeypatch.setattr(answers_module, "generate_answers", generate)
    monkeypatch.setattr(generation, "likelihoods", lambda *_, **__: pytest.fail("looked at the teacher again"))
    again = pipeline.distill(recipe_of(folders, name="again"))
    assert generated == [False, False]
    assert [model.metrics for model in again.models] == [model.metrics for model in whole.models]
    assert again.answers == whole.answers
    assert again.generation == whole.generation
    # Another limit of new tokens gives other answers.
    pipeline.distill(recipe_of(folders, name="shorter", generation__max_new_tokens=2))
    assert generated[2:] == [True, False, False]


def test_D10_D17_cut_and_dropped_rows_are_counted(folders: Path, tmp_path: Path) -> None:
    short = ["bright film", "warm song", "flat joke"]
    rows = [{"document": f"{short[n % 3]} {'plot ' * (n % 7)}", "summary": short[n % 3]} for n in range(60)]
    for index in range(5):
        rows.append({"document": f"story {index}", "summary": "music " * 9})
    for index in range(4):
        rows.append({"document": f"town {index} " + "scene " * 40, "summary": " ".join(["town"] * 5)})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    ready = prepare(recipe_of(folders, data__train=str(path), **EXACT))
    assert sum(ready.encoded.dropped.values()) == 5
    assert sum(cut.num_rows for cut in ready.encoded.cuts.values()) == 4
    assert sum(len(features) for features in ready.splits.values()) + 5 == sum(ready.data.num_rows.values())
    assert max(len(row["input_ids"]) for features in ready.splits.values() for row in features) <= 32
    assert all(sum(label != -100 for label in row["labels"]) <= 7 for row in ready.splits["train"])


def test_a_rotated_student_is_bound_to_its_own_directions(folders: Path) -> None:
    """At full width it is the teacher in another basis: every pair correlates before anything is trained."""
    recipe = recipe_of(folders, name="full", **EXACT, **NO_SHAPE)
    job = prepare(recipe)
    run = Run(job, recipe, Path(recipe.output))
    selection = run.select()
    assert selection.start_units is None
    start = run.start(selection)
    assert start.stream is not None
    _, objective = run.objective(start, selection)
    request = SignalRequest.of(objective)
    batch = next(job.batches("train", num_rows=32, batch_size=32))
    inputs = model_inputs(start.student, batch)
    positions = batch_positions(start.student, inputs, batch["labels"], request)
    reads = tuple((pair.student_layer, student_columns(pair)) for pair in request.layers)
    with torch.no_grad():
        ours = read_signal(start.student, inputs, positions, reads)
    theirs = LiveTeacher(job.teacher).signal(batch, request)
    values = flexkd.losses.correlation(ours.features[0], theirs.features[0])
    assert values.shape == (32,)
    assert float(values.max()) < 1e-6
    assert ours.logits is not None
    assert theirs.logits is not None
    # Measured 2e-6: every sum is taken over other numbers.
    assert float((ours.logits[:] - theirs.logits[:]).abs().max()) < 1e-5


def test_a_lora_student_ends_plain(folders: Path) -> None:
    record = pipeline.distill(recipe_of(folders, name="lora", **EXACT, student__lora={"rank": 2}))
    folder = folders / "plain" / "lora" / "student"
    assert not (folder / "adapter_config.json").exists()
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = record.model("student_before"), record.model("student")
    assert before is not None
    assert after is not None
    assert before.parameters == after.parameters
    assert before.metrics["nll"] != after.metrics["nll"]


# What PEFT itself still asks transformers for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_adapter_of_a_teacher_teaches(folders: Path, tmp_path: Path) -> None:
    base = tiny_model("llama", "causal", seed=3)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    job = prepare(recipe_of(folders, **EXACT, teacher__adapter=str(tmp_path / "adapter")))
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        found, expected = job.teacher(ids).logits, adapted(ids).logits
        plain = prepare(recipe_of(folders, **EXACT)).teacher(ids).logits
    assert_close(found, expected)
    assert float((found - plain).abs().max()) > 1e-2


def test_M14_outputs_that_only_one_model_has_are_cut_and_the_record_says_so(folders: Path) -> None:
    """The student is the teacher with a wider padded vocabulary: of what both know, they say the same."""
    text_job(folders / "plain", **EXACT)
    own = folders / "wider"
    own.mkdir()
    for path in (folders / "plain" / "teacher").iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    wider_copy("llama", seed=3, vocabulary=64).save_pretrained(own)
    start = {"student__start": "pretrained", "student__model": str(own), **NO_SHAPE}
    quick = {"training__learning_rate": 1e-9, "training__max_steps": 1}
    record = pipeline.distill(recipe_of(folders, name="padded", **EXACT, **start, **quick))
    (note,) = [note for note in record.notes if "are cut before probabilities are taken" in note]
    assert note.startswith("the teacher has 61 outputs, the student 64, and both know")
    assert record.history[0]["logits_raw"] == pytest.approx(0.0, abs=1e-6)
    teacher, before, *_ = record.models
    assert before.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert before.metrics["token_agreement"] == 1.0
    assert before.metrics["nll"] == pytest.approx(teacher.metrics["nll"]), "judged by the tokens that both know"


def test_D21_a_recipe_that_packs_trains_as_one_that_pads(folders: Path) -> None:
    steps = {**EXACT, "training__max_steps": 3, "training__logging_steps": 1}
    logs = []
    for packing in (False, True):
        recipe = recipe_of(folders, name=f"packing-{packing}", training__packing=packing, **steps)
        run = Run(prepare(recipe), recipe, Path(recipe.output))
        selection = run.select()
        start = run.start(selection)
        _, objective = run.objective(start, selection)
        logs.append(run.train(start, objective)[1])
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 3
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))
    nll = [[entry["eval_nll"] for entry in log if "eval_nll" in entry] for log in logs]
    assert_close(torch.tensor(nll[1]), torch.tensor(nll[0]))
