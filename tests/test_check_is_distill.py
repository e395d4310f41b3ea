"""Whatever `distill` refuses before its first forward, `check` refuses too, in the same words.

A case is one line: what breaks a good recipe, and how the one sentence about it begins.
"""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from typer.testing import CliRunner

from flexkd.cli import app
from flexkd.errors import FlexKDError
from flexkd.facts.families.table import TRAITS
from flexkd.packages import TRACKERS
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from flexkd.preflight import preflight
from flexkd.preflight.comparison import cell_folder, cell_recipe
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import row_settings, selection_settings
from flexkd.run_files import last_checkpoint
from tests.job_files import job, text_job, write_text_tokenizer, write_tokenizer
from tests.tiny import tiny_model

GOOD = {"teacher__fine_tune": None, "student__hidden_size": 16}
PLAIN = {"student__hidden_size": None, "student__num_layers": None}
PRETRAINED = {**PLAIN, "student__start": "pretrained"}


@dataclass(frozen=True)
class Broken:
    """One mutation of a good recipe.

    Attributes:
        changes: Recipe keys, `__` for the dot; "{folder}" in a text is the folder of the recipe.
        words: How the sentence begins.
        mutate: Changes files of the folder.
        env: Variables of the environment.
        model_type: Of a recipe that writes text; None: one that classifies.
    """

    changes: dict[str, Any]
    words: str
    mutate: Callable[[Path], object] = lambda _: None
    env: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None
    problem: str = "single_label"


def _write(name: str, text: str = "") -> Callable[[Path], object]:
    return lambda folder: [(folder / name).parent.mkdir(exist_ok=True), (folder / name).write_text(text, "utf-8")]


def _remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / "teacher" / name).unlink() for name in names]


def _two_columns(folder: Path) -> None:
    columns = [pyarrow.array(["a", "b"]), pyarrow.array(["a", "b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "text"]), folder / "rows.parquet")


def _other_words(folder: Path) -> None:
    (folder / "other").mkdir()
    write_text_tokenizer(folder / "other")
    file = folder / "other" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    words = content["model"]["vocab"]
    words["bright"], words["clever"] = words["clever"], words["bright"]
    file.write_text(json.dumps(content), encoding="utf-8")


def _with_template(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "chat_template": template}), encoding="utf-8")


def _other_model(model_type: str, task: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        tiny_model(model_type, task, num_labels=2).save_pretrained(folder / "other")
        write_text_tokenizer(folder / "other")

    return make


CLASSIFY = {
    "output is a file": Broken({"output": "{folder}/run"}, "output: '{folder}/run' is a file.", _write("run")),
    "output below a file": Broken(
        {"output": "{folder}/x/run"}, "output: '{folder}/x/run' cannot be written: '{folder}/x' is a file.", _write("x")
    ),
    "a file where a folder goes": Broken(
        {}, "output: '{folder}/run/student' is a file. Name a folder", _write("run/student")
    ),
    "a folder where a file goes": Broken(
        {},
        "output: '{folder}/run/record.json' is a folder",
        lambda folder: (folder / "run/record.json").mkdir(parents=True),
    ),
    "output as on Windows": Broken({"output": "runs\\a"}, "output: 'runs\\a' is written as on Windows."),
    "output in no variable": Broken(
        {"output": "$NO_SUCH/a"}, "output: '$NO_SUCH/a': the environment variable 'NO_SUCH' is not set"
    ),
    "cache is a file": Broken({"teacher__cache": "{folder}/x"}, "teacher.cache: '{folder}/x' is a file", _write("x")),
    "processes": Broken({}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set", env={"WORLD_SIZE": "2"}),
    "sharding": Broken(
        {}, "ACCELERATE_USE_FSDP: FSDP was asked for", env={"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    ),
    "no such rows": Broken({"data__train": "{folder}/nope.csv"}, "{folder}/nope.csv: no such file or folder."),
    "no such column": Broken({"data__text": "txt"}, "{folder}/single_label.jsonl: data: unknown column 'txt'."),
    "two columns": Broken(
        {"data__train": "{folder}/rows.parquet"},
        "{folder}/rows.parquet: the column 'text' appears twice.",
        _two_columns,
    ),
    "no such folder": Broken({"teacher__model": "{folder}/techer"}, "teacher.model: no folder '{folder}/techer'. Did"),
    "no config": Broken({}, "teacher.model: '{folder}/teacher' holds no config.json.", _remove("config.json")),
    "no weights": Broken({}, "teacher.model: '{folder}/teacher' holds no weights", _remove("model.safetensors")),
    "unknown type": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "student.model: '{folder}/other' is a 'no-such' model, which the installed transformers does not know.",
        lambda folder: [shutil.copytree(folder / "teacher", folder / "other"), _retyped(folder / "other")],
    ),
    "no such rival": Broken(
        {"rivals__models": ["{folder}/techer"]}, "rivals.models.0: no folder '{folder}/techer'. Did you mean"
    ),
    "a rival without weights": Broken(
        {"rivals__models": ["{folder}/other"]},
        "rivals.models.0: '{folder}/other' holds no weights",
        lambda folder: [
            shutil.copytree(folder / "teacher", folder / "other"),
            (folder / "other" / "model.safetensors").unlink(),
        ],
    ),
    "a rival with few positions": Broken(
        {"rivals__models": ["{folder}/other"]},
        "data.max_length: 16 tokens are more than the 8 positions of rivals.models.0 '{folder}/other'",
        lambda folder: [
            tiny_model("bert", num_labels=2, max_position_embeddings=8).save_pretrained(folder / "other"),
            write_tokenizer(folder / "other"),
        ],
    ),
    "int8 without linear layers": Broken(
        {"teacher__model": "{folder}/other", "rivals__int8_teacher": True},
        "rivals.int8_teacher: '{folder}/other' (gpt2) has no linear layers",
        lambda folder: [
            tiny_model("gpt2", num_labels=2).save_pretrained(folder / "other"),
            write_tokenizer(folder / "other"),
        ],
    ),
    "no tokenizer": Broken(
        {},
        "teacher.tokenizer: '{folder}/teacher' holds no tokenizer",
        _remove("tokenizer.json", "tokenizer_config.json"),
    ),
    "damaged tokenizer": Broken(
        {}, "teacher.tokenizer: {folder}/teacher/tokenizer.json cannot be read", _write("teacher/tokenizer.json", "{")
    ),
    "ids beyond": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "student.model: its tokenizer gives the id 23, but it embeds 10 tokens.",
        lambda folder: [
            tiny_model("bert", num_labels=2, vocab_size=10).save_pretrained(folder / "other"),
            [shutil.copy(file, folder / "other") for file in (folder / "teacher").glob("tokenizer*")],
        ],
    ),
    "another tokenizer": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "objective.features.positions: 'tokens' needs one tokenizer for teacher and student",
        lambda folder: [
            tiny_model("bert", num_labels=2, vocab_size=61).save_pretrained(folder / "other"),
            write_tokenizer(folder / "other", extra="shifted"),
        ],
    ),
    "too deep": Broken({"student__num_layers": 9}, "student.num_layers: 9 is more than the teacher's 4."),
    "odd width": Broken({"student__hidden_size": 12}, "student.hidden_size: 12 is not a multiple of the teacher's"),
    "odd heads": Broken({"student__num_heads": 3}, "slice_student.num_heads: 3 does not fit hidden_size 16"),
    "no encoder": Broken({"student__num_encoder_layers": 1}, "slice_student.num_encoder_layers: 1 asked, but the"),
    "too small": Broken({**PLAIN, "student__max_parameters": 10}, "derive_shape: no student of this bert has 10"),
    "no student layer": Broken(
        {"objective__features__layer_map": {9: -1}}, "objective.features.layer_map: the student has no layer 9."
    ),
    "no teacher layer": Broken({"scores__layer": [-1, 9]}, "scores.layer: the teacher has no layer 9."),
    "mapping": Broken(
        {"objective__features__mapping": "score"}, "objective.features.mapping: 'score' would pair a sliced student"
    ),
    "basis": Broken({"student__basis": "rotated"}, "student.basis: 'rotated' needs a teacher that can be turned"),
    "geometry": Broken(
        {"objective__features__loss": "functional_cka"},
        "objective.features.loss: 'functional_cka' is only defined for one class of several",
        problem="multi_label",
    ),
    "too long": Broken({"data__max_length": 600}, "data.max_length: 600 tokens are more than the 40 positions"),
    "no room": Broken({"data__max_length": 2}, "data.max_length: 2 leaves no room beside 2 special tokens."),
    "few positions": Broken(
        {"objective__features__positions": "supervised", "training__batch_size": 4},
        "training.batch_size: 4 rows of one pass have 4 supervised positions",
    ),
    "lora names": Broken(
        {"student__lora": {"target_modules": ["nope"]}},
        "student.lora.target_modules: BertForSequenceClassification has no module 'nope'.",
    ),
    "missing packages": Broken(
        {
            "data__test": "package:no_rows/test.csv",
            "compare": {"methods": {"logged": ["training.report_to=[clearml]"], "flexkd": None}},
            "training__report_to": ["wandb", "azure_ml"],
        },
        "package:no_rows/test.csv: the package 'no_rows' is not installed.\n"
        "training.report_to: 'wandb' needs the package 'wandb'.\n"
        "training.report_to: 'azure_ml' needs the package 'azureml'.\n"
        "compare.methods.logged: training.report_to: 'clearml' needs the package 'clearml'.\n"
        "Install them: pip install wandb azureml-core clearml && pip install --no-deps no-rows",
    ),
    "no such place": Broken({"training__report_to": ["wandbb"]}, "training.report_to: unknown place 'wandbb'."),
    "no compiler": Broken(
        {"training__compile": True},
        "training.compile: torch cannot compile here (no C++ compiler 'no-such-compiler').",
        env={"CXX": "no-such-compiler"},
    ),
    "sizes that stop early": Broken(
        {"sizes": {"values": [0.3, 0.6]}, "training__early_stopping": {"patience": 1}, "training__evaluations": 3},
        "training.early_stopping: the students of several sizes would take different numbers of steps. Set it to null",
    ),
    "two sizes of one shape": Broken(
        {"sizes": {"values": [0.5, 0.7]}}, "sizes.values: 0.5 and 0.7 come to the same student, 3 layers x 24."
    ),
    "a size that no student has": Broken(
        {"sizes": {"values": [0.001, 0.5]}}, "sizes.values.0.001: derive_shape: no student of this bert has"
    ),
    "a size with more layers": Broken(
        {"sizes": {"key": "num_layers", "values": [2, 9]}},
        "sizes.values.9: student.num_layers: 9 is more than the teacher's 4.",
    ),
    "a size that the layers of the features lack": Broken(
        {"sizes": {"key": "num_layers", "values": [1, 2]}, "objective": {"features": {"layer_map": {2: 4}}}},
        "sizes.values.1: objective.features.layer_map: the student has no layer 2.",
    ),
    "unknown method": Broken({"compare": {"methods": ["flexkd", "kd"]}}, "compare.methods: unknown method 'kd'."),
    "a comparison that stops early": Broken(
        {"training__early_stopping": {"patience": 1}, "training__evaluations": 3, "compare": {"seeds": [0, 1]}},
        "training.early_stopping: the students of a comparison would take different numbers of steps. Set it to null",
    ),
    "a method too deep": Broken(
        {"compare": {"methods": {"flexkd": None, "mine": ["student.num_layers=9"]}}},
        "compare.methods.mine: student.num_layers: 9 is more than the teacher's 4.",
    ),
    "a method of another layer": Broken(
        {"compare": {"methods": {"flexkd": None, "mine": ["objective.features.layer_map.9=-1"]}}},
        "compare.methods.mine: objective.features.layer_map: the student has no layer 9.",
    ),
    "a method that lies": Broken(
        {"compare": {"methods": {"flexkd": None, "logit_kd": ["training.learning_rate=1e-3"]}}},
        "compare.methods: 'logit_kd' is a built-in method, which changes objective.features=null, and not",
    ),
    "no adapter": Broken({"teacher__adapter": "{folder}/teacher"}, "teacher.adapter: '{folder}/teacher' holds no"),
}

WRITE = {
    "other words": Broken(
        {"student__start": "config", "student__model": "{folder}/teacher", "student__tokenizer": "{folder}/other"},
        "teacher and student disagree on 2 of 37 tokens",
        _other_words,
        model_type="llama",
    ),
    "an encoder": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "student.model: '{folder}/other' is an encoder (bert), which generates no text.",
        _other_model("bert", "classification"),
        model_type="llama",
    ),
    "a classifier": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "student.model: '{folder}/other' has no language model head (LlamaForSequenceClassification)",
        _other_model("llama", "classification"),
        model_type="llama",
    ),
    "two kinds": Broken(
        {**PRETRAINED, "student__model": "{folder}/other"},
        "student.model: an encoder-decoder and a decoder see different positions",
        _other_model("t5", "seq2seq"),
        model_type="llama",
    ),
    "a rival that is an encoder": Broken(
        {"rivals__models": ["{folder}/other"]},
        "rivals.models.0: '{folder}/other' is an encoder (bert), which generates no text.",
        _other_model("bert", "classification"),
        model_type="llama",
    ),
    "a rival of another kind": Broken(
        {"rivals__models": ["{folder}/other"]},
        "rivals.models.0: '{folder}/other' and the teacher are not both decoders, or both encoder-decoders",
        _other_model("t5", "seq2seq"),
        model_type="llama",
    ),
    "a rival without a chat template": Broken(
        {"rivals__models": ["{folder}/other"], "data__chat": "always"},
        "data.chat: rivals.models.0 tokenizer '{folder}/other': no chat",
        lambda folder: [_other_model("llama", "causal")(folder), _with_template(folder / "teacher")],
        model_type="llama",
    ),
    "packing": Broken(
        {"training__packing": True},
        "training.packing: the teacher, T5ForConditionalGeneration, is no decoder.",
        model_type="t5",
    ),
    "no answers": Broken(
        {"data__teacher_answers": "{folder}/none.jsonl"},
        "data.teacher_answers: '{folder}/none.jsonl' is not there.",
        model_type="llama",
    ),
    "chat": Broken({"data__chat": "always"}, "data.chat", model_type="llama"),
    "quantization": Broken(
        {**PRETRAINED, "student__model": "{folder}/teacher", "teacher__quantization": "8bit"},
        "teacher.quantization: '8bit' needs the package 'bitsandbytes'.",
        model_type="llama",
    ),
}


def _retyped(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "model_type": "no-such"}), encoding="utf-8")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Folders of good recipes, by the kind of their teacher."""
    folders: dict[str | None, Path] = {None: tmp_path_factory.mktemp("classify")}
    job(folders[None])
    for model_type in ("llama", "t5"):
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        text_job(folders[model_type], model_type)
    return folders


def _recipe(case: Broken, folder: Path) -> Recipe:
    changes = {key: _filled(value, folder) for key, value in {**GOOD, **case.changes}.items()}
    if case.model_type is None:
        return job(folder, case.problem, **changes)
    return text_job(folder, case.model_type, **changes)


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_filled(item, folder) for item in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


@pytest.mark.parametrize("name", [*CLASSIFY, *WRITE])
def test_R10_check_refuses_what_distill_refuses_in_the_same_words(
    name: str, materials: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {**CLASSIFY, **WRITE}[name]
    folder = tmp_path / "job"
    shutil.copytree(materials[case.model_type], folder)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
    for variable, value in case.env.items():
        monkeypatch.setenv(variable, value)
    case.mutate(folder)
    recipe = _recipe(case, folder)
    (problem,) = preflight(recipe).problems
    assert problem.startswith(case.words.replace("{folder}", str(folder)))
    with pytest.raises(FlexKDError) as refused:
        pipeline.distill(recipe)
    assert str(refused.value) == problem


def test_R10_a_run_folder_of_other_settings_is_refused_before_anything_is_loaded(
    materials: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    shutil.copytree(materials[None], folder)
    recipe = job(folder, **GOOD)
    run = Run(prepare(recipe), recipe, recipe.folder)
    selection = run.select()
    start = run.start(selection)
    run.train(start, run.objective(start, selection)[1])
    assert preflight(recipe).problems == []
    assert preflight(job(folder, **{**GOOD, "training__report_to": ["tensorboard"]})).problems == []
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward"))
    scores, state = recipe.folder / "scores.safetensors", last_checkpoint(recipe.folder / "checkpoints")
    begin = f"{scores}: belongs to another run:"
    for changes, message in (
        ({"scores__rows": 7}, f"{begin} scores.rows was '2000' and is '7' now. Choose another output folder, or"),
        ({"data__max_length": 12}, f"{begin} max_length was '16' and is '12' now."),
        ({"objective__features": None}, f"{begin} features was 'taught' and is 'none' now"),
        ({"teacher__fine_tune": {}}, f"{begin} teacher.fine_tune was 'null' and is '"),
        ({"training__max_steps": 7}, f"{state}/objective.safetensors: training.max_steps was '6' and is '7' now."),
    ):
        other = job(folder, **{**GOOD, **changes})
        problem = preflight(other).problems[0]
        assert problem.startswith(message)
        with pytest.raises(FlexKDError) as refused:
            pipeline.distill(other)
        assert str(refused.value) == "\n".join(preflight(other).problems)
        assert preflight(other, resumes="nothing").problems == []
    with monkeypatch.context() as undone:
        undone.undo()
        tiny_model("bert", seed=4, num_labels=2).save_pretrained(folder / "teacher")
    assert preflight(recipe).problems[0].startswith(f"{begin} teacher.model was '")


def test_R10_a_finished_cell_of_another_recipe_is_refused(materials: dict[str | None, Path], tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(materials[None], folder)
    recipe = job(folder, **GOOD, compare={"methods": ["logit_kd", "flexkd"], "seeds": [0, 1]})
    done = cell_folder(recipe.folder, "flexkd", 1)
    done.mkdir(parents=True)
    settings = cell_recipe(recipe, 1, done)[1]
    for stored, problems in (
        (settings, []),
        (
            {**settings, "scores": {**settings["scores"], "attribution": "fisher"}},
            [
                f"{done}/cell.json: was made by another recipe or teacher (recipe.scores.attribution). Choose another "
                "output folder."
            ],
        ),
    ):
        (done / "cell.json").write_text(json.dumps({"made_of": {"recipe": stored}}), encoding="utf-8")
        assert preflight(recipe).problems == problems


def test_R10_scores_of_an_earlier_version_are_still_read(materials: dict[str | None, Path], tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(materials[None], folder)
    recipe = job(folder, **GOOD)
    recipe.folder.mkdir()
    data = preflight(recipe).data
    assert data is not None
    header = {
        "made_of": row_settings(recipe, data.fingerprint) | selection_settings(recipe),
        "scores": [],
        "pairs": None,
    }
    save_file({"x": torch.zeros(2)}, recipe.folder / "scores.safetensors", {"flexkd": json.dumps(header)})
    assert preflight(recipe).problems == []
    (recipe.folder / "scores.safetensors").write_bytes(b"half")
    (problem,) = preflight(recipe).problems
    assert problem.endswith("Delete it, to score again.")


def test_R10_the_command_line_says_it_with_exit_code_2(materials: dict[str | None, Path], tmp_path: Path) -> None:
    job(materials[None])
    recipe, broken = str(materials[None] / "single_label.yaml"), "student.num_layers=9"
    logger = logging.getLogger("flexkd")
    before = list(logger.handlers), logger.level
    try:
        done = [CliRunner().invoke(app, [name, recipe, broken, f"output={tmp_path}"]) for name in ("check", "distill")]
    finally:
        logger.handlers, logger.level = before
    assert [result.exit_code for result in done] == [2, 2]
    assert all("student.num_layers: 9 is more than the teacher's 4." in result.output for result in done)


def test_R10_a_look_at_real_folders_loads_neither_torch_nor_transformers(materials: dict[str | None, Path]) -> None:
    job(materials[None])
    text_job(materials["llama"])
    recipes = [str(materials[None] / "single_label.yaml"), str(materials["llama"] / "text.yaml")]
    program = (
        "import sys; from flexkd.preflight import preflight; from flexkd.recipe import load_recipe\n"
        "print([preflight(load_recipe(path)).problems for path in sys.argv[1:]])\n"
        "print(preflight(load_recipe(sys.argv[1], ['student={size: 0.25}'])).problems)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *recipes], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[[], []]", "[]", "[]"], done.stderr


def test_R10_tables_that_stand_for_those_of_transformers_agree_with_them() -> None:
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()
    encoders = {name for name, traits in TRAITS.items() if traits.kind == "encoder"}
    two_stacks = {name for name, traits in TRAITS.items() if traits.kind == "encoder_decoder"}
    assert encoders <= MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    assert MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() & TRAITS.keys() - two_stacks == encoders
    assert two_stacks == {name for name in TRAITS if CONFIG_MAPPING[name]().is_encoder_decoder}
