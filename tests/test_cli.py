"""The command line: exit codes, messages, and what it leaves unloaded."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

import flexkd
from flexkd.cli import app
from flexkd.compare_record import CompareRecord
from flexkd.demo import demo_names
from flexkd.errors import FlexKDError
from flexkd.facts.methods import METHODS
from flexkd.sizes_record import SizesRecord
from tests.report.records import judged_record, sizes_record
from tests.test_record import run_record
from tests.weight_files import write_weights

RECIPE = """\
name: job
data: {train: rows.csv, max_length: 16}
teacher: {model: ./teacher}
student: {hidden_size: 24, num_layers: 2}
"""
COMMANDS = [
    "init",
    "generate",
    "predict",
    "push",
    "check",
    "plan",
    "score",
    "cache",
    "distill",
    "evaluate",
    "compare",
    "tune",
    "sizes",
    "report",
    "schema",
    "demo",
]
LOADED = "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a recipe, a teacher's config and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 48,
        "num_attention_heads": 6, "num_hidden_layers": 4, "id2label": {"0": "bad", "1": "good"},
    }  # fmt: skip
    Path("teacher").mkdir()
    Path("teacher/config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(Path("teacher/model.safetensors"), config)
    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save("teacher/tokenizer.json")
    rows = [f"a {mood} film number {number},{mood}" for number in range(60) for mood in ("bad", "good")]
    Path("rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and error output of one command."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `flexkd score` end with an error."""

    def set_error(error: BaseException) -> None:
        def score(recipe: object) -> None:
            raise error

        pipeline = types.ModuleType("flexkd.pipeline.distill")
        pipeline.score = score  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flexkd.pipeline.distill", pipeline)
        monkeypatch.setattr("flexkd.pipeline.distill", pipeline, raising=False)

    return set_error


def in_a_new_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys, flexkd.cli\ntry: flexkd.cli.app({list(arguments)!r})\nexcept SystemExit: {LOADED}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_help_loads_neither_torch_nor_the_recipe() -> None:
    done = in_a_new_process("-h")
    assert all(
        f" {name} " in done.stdout
        for name in ["check", "plan", "score", "distill", "evaluate", "compare", "tune", "sizes", "report", "demo"]
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_is_whole_in_50_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    code, output, _ = run(command, "-h")
    assert code == 0
    assert f"{command}" in output
    assert "--quiet" in output
    assert "\u2026" not in output, "a word was cut"


def test_help_names_what_a_command_takes() -> None:
    assert all(name in run("demo", "-h")[1] for name in demo_names())
    for command in ("compare", "tune"):
        assert set(METHODS) <= set(run(command, "-h")[1].replace(",", " ").replace(".", " ").split())


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("flexkd dist", ["distill"]),
        ("flexkd demo c", ["classification"]),
        ("flexkd init i", ["instruction"]),
        ("flexkd plan recipe.yaml --device h", ["here", "h100", "h200"]),
        (
            "flexkd compare recipe.yaml --methods projector,projector",
            ["projector,projector_exact", "projector,projector_heads"],
        ),
    ],
)
def test_a_shell_completes_names(typed: str, completions: list[str]) -> None:
    variables = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_FLEXKD_COMPLETE": "complete_bash"}
    assert CliRunner().invoke(app, env=variables, prog_name="flexkd").stdout.split() == completions


def test_check_loads_neither_torch_nor_transformers() -> None:
    done = in_a_new_process("check", "recipe.yaml")
    assert "recipe.yaml: no problems found" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_check_counts_rows_and_ends_with_0() -> None:
    code, output, error = run("check", "recipe.yaml", "data.validation=0.2", "student={}")
    assert (code, error) == (0, "")
    assert "train" in output
    assert "note: student: no size is given, so it is as large as its teacher." in output
    assert output.endswith("recipe.yaml: no problems found\n")


def test_a_hub_id_is_a_note_and_ends_with_0() -> None:
    code, output, _ = run("check", "recipe.yaml", "teacher.model=someone/big")
    assert code == 0
    assert "note: teacher.model: 'someone/big' is not a folder here, so it is taken as a hub id" in output


def test_L02_all_problems_of_a_recipe_end_with_2_and_no_traceback() -> None:
    Path("recipe.yaml").write_text(f"{RECIPE}traning: {{epochs: 3}}\n", encoding="utf-8")
    code, output, error = run("check", "recipe.yaml", "objective.logits.temprature=2")
    assert (code, output) == (2, "")
    assert error.splitlines() == [
        "recipe.yaml:5: traning: unknown key. Did you mean 'training'?",
        "recipe.yaml:5: traning.epochs: unknown key here. It belongs to teacher.fine_tune.epochs or training.epochs.",
        "command line: objective.logits.temprature: unknown key. Did you mean 'objective.logits.temperature'?",
    ]


def test_problems_of_files_and_rows_end_with_2_after_what_was_found() -> None:
    code, output, error = run("check", "recipe.yaml", "student.hidden_size=20")
    assert code == 2
    assert "train" in output
    assert error == (
        "student.hidden_size: 20 is not a multiple of the teacher's head width 8 (48 / 6 heads). Nearest: 16 or 24.\n"
    )


def test_D16_bad_rows_are_listed() -> None:
    with Path("rows.csv").open("a", encoding="utf-8") as file:
        file.write("\n,good\n")
    code, output, error = run("check", "recipe.yaml")
    assert code == 0
    assert "1 row cannot be used" in output
    assert "rows.csv:122" in output
    assert "text is empty" in error


def test_a_users_mistake_ends_with_2_and_acts_on_no_terminal(ending: Callable[[BaseException], None]) -> None:
    ending(FlexKDError("teacher.model: this is \x1b[2J wrong. Do that."))
    assert run("score", "recipe.yaml") == (2, "", "teacher.model: this is \\x1b[2J wrong. Do that.\n")


def test_an_output_that_cannot_be_written_is_refused_before_any_work() -> None:
    problem = "--output: 'rows.csv/x' cannot be written: 'rows.csv' is a file. Name another file.\n"
    for arguments in (["report", "teacher"], ["init", "classification"], ["predict", "teacher", "rows.csv"]):
        assert run(*arguments, "-o", "rows.csv/x")[::2] == (2, problem)


def test_a_full_disk_ends_with_2_and_how_to_go_on(
    ending: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2_000_000))
    ending(OSError(errno.ENOSPC, "No space left on device", "runs/job/checkpoints"))
    assert run("score", "recipe.yaml") == (
        2,
        "",
        "runs/job/checkpoints: No space left on device (2.0 MB are free). Free some space there, then run the same "
        "again: it goes on where it stopped.\nThe command: flexkd score recipe.yaml\n",
    )


def test_quiet_and_verbose_are_not_both_asked_for() -> None:
    code, output, error = run("check", "recipe.yaml", "-q", "-v")
    assert (code, output, error) == (
        2, "", "--quiet, --verbose: one says less and one says more. Give one of them.\n",
    )  # fmt: skip


def test_the_log_file_of_a_run_folder_has_what_was_typed_and_how_it_ended(
    ending: Callable[[BaseException], None],
) -> None:
    log = Path("runs/job/flexkd.log")
    ending(FlexKDError("teacher.model: this is wrong. Do that."))
    run("score", "recipe.yaml")
    assert not log.parent.exists()
    log.parent.mkdir(parents=True)
    run("score", "recipe.yaml", "--quiet")
    ending(ZeroDivisionError("ours"))
    CliRunner().invoke(app, ["score", "recipe.yaml"])
    lines = [line[20:] if line.startswith("2") else line for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines[:5] == [
        "$ flexkd score recipe.yaml --quiet",
        "teacher.model: this is wrong. Do that.",
        "$ flexkd score recipe.yaml",
        "error: a mistake of flexkd",
        "Traceback (most recent call last):",
    ]
    assert lines[-1] == "ZeroDivisionError: ours"


def test_an_interruption_ends_with_130_and_says_how_to_continue(ending: Callable[[BaseException], None]) -> None:
    ending(KeyboardInterrupt())
    code, _, error = run("score", "recipe.yaml", "data.text=text body")
    assert code == 130
    assert error == (
        "Interrupted. To continue where it stopped, run the same command: "
        "flexkd score recipe.yaml 'data.text=text body'\n"
    )


def test_an_error_of_ours_ends_with_1_and_a_traceback(ending: Callable[[BaseException], None]) -> None:
    ending(ZeroDivisionError("ours"))
    result = CliRunner().invoke(app, ["score", "recipe.yaml"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    # In a process of its own, Python prints it.
    program = (
        "import sys, types, flexkd.pipeline\n"
        "pipeline = sys.modules['flexkd.pipeline.distill'] = flexkd.pipeline.distill = types.ModuleType('pipeline')\n"
        "pipeline.score = lambda recipe: 1 / 0\n"
        "from flexkd.cli import main\n"
        "sys.argv = ['flexkd', 'score', 'recipe.yaml']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize("arguments", [["chek", "recipe.yaml"], ["check"], ["check", "recipe.yaml", "--fast"], []])
def test_a_command_that_cannot_be_parsed_ends_with_2(arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "flexkd", "-V"], capture_output=True, text=True, check=True)
    assert done.stdout == f"flexkd {flexkd.__version__}\n"


def test_telemetry_is_off_and_the_network_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "OMP_WAIT_POLICY"):
        # Set first, so that the value before this test comes back after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    run("check", "recipe.yaml")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "HF_HUB_OFFLINE" not in os.environ


def test_options_of_compare_are_checked_like_the_recipe() -> None:
    code, _, error = run(
        "compare", "recipe.yaml", "--seeds", "0,a", "--methods", "flexkd,3", "--search", "training.epochs=1,fast"
    )
    assert code == 2
    assert error.splitlines() == [
        "command line: compare.methods.1: 3 is not text. Put it in quotes: '3'.",
        "command line: compare.seeds.1: 'a' is not a whole number. Write a number, as 32.",
    ]
    code, _, error = run("compare", "recipe.yaml", "--search", "training.epochs=1,fast", "--search", "training.lr=1")
    assert code == 2
    assert [line.partition(". ")[0] for line in error.splitlines()] == [
        "command line: compare.search.training.epochs: 'fast' leads to training.epochs: 'fast' is not a finite number",
        "command line: compare.search.training.lr: unknown key",
    ]
    assert run("compare", "recipe.yaml", "--search", "fast") == (
        2,
        "",
        "--search: 'fast' is no KEY=V1,V2. Write it as training.learning_rate=1e-4,5e-4.\n",
    )


def test_options_of_tune_are_checked_like_the_recipe() -> None:
    code, _, error = run("tune", "recipe.yaml", "--trials", "0", "--methods", "flexkd,3")
    assert code == 2
    assert [line.partition(". ")[0] for line in error.splitlines()] == [
        "command line: compare.methods.1: 3 is not text",
        "command line: compare.trials: 0 must be at least 1",
    ]


def test_options_of_sizes_are_checked_like_the_recipe() -> None:
    code, _, error = run("sizes", "recipe.yaml", "--sizes", "0.5,1.5", "--seeds", "0,a")
    assert code == 2
    assert [line.partition(". ")[0] for line in error.splitlines()] == [
        "command line: sizes.values: 1.5 is more than the whole teacher",
        "command line: sizes.seeds.1: 'a' is not a whole number",
    ]


def test_a_demo_that_does_not_exist_lists_those_that_do() -> None:
    code, _, error = run("demo", "clasification")
    assert code == 2
    assert "unknown name 'clasification'" in error
    assert "Did you mean 'classification'?" in error


def test_a_report_is_drawn_from_records_alone() -> None:
    run_record().write("run/record.json")
    code, output, _ = run("report", "run")
    assert (code, output) == (0, f"page: {Path('run/report.html')}\n")
    assert "tiny" in Path("run/report.html").read_text(encoding="utf-8")
    assert run("report", "run", "run/record.json")[1] == "page: report.html\n"
    assert run("report", "run", "-o", "other.html")[1] == "page: other.html\n"
    assert Path("other.html").read_bytes() == Path("run/report.html").read_bytes()


def test_a_report_of_a_comparison_is_drawn_from_its_folder() -> None:
    CompareRecord("accuracy", "single_label", [], [], [], "fine_tuning", [], {}, name="many").write("many/compare.json")
    code, output, _ = run("report", "many")
    assert (code, output) == (0, f"page: {Path('many/report.html')}\n")


def test_a_report_of_sizes_is_drawn_from_their_folder() -> None:
    record = sizes_record()
    record.write("curve/sizes.json")
    assert SizesRecord.read("curve/sizes.json") == record
    code, output, _ = run("report", "curve")
    assert (code, output) == (0, f"page: {Path('curve/report.html')}\n")
    assert "Knee: size 0.2" in Path("curve/report.html").read_text(encoding="utf-8")


def test_a_run_ends_with_what_its_rows_allow_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkd.report.delivery.finished_run", lambda recipe: judged_record())
    code, output, _ = run("distill", "recipe.yaml")
    assert code == 0
    assert output.splitlines()[-3].startswith(
        "The student keeps 95% of the teacher's accuracy (95% interval 92% to 98%"
    )


def test_results_are_printed_as_a_table_or_written_as_one() -> None:
    run_record().write("run/record.json")
    code, output, _ = run("report", "run", "--format", "csv")
    assert (code, output.splitlines()[0][:26]) == (0, "run,model,role,seed,test_r")
    assert run("report", "run", "--format", "csv", "-o", "results.csv")[1] == "table: results.csv\n"
    assert Path("results.csv").read_text(encoding="utf-8") == output
    assert not Path("run/report.html").exists()
    assert run("report", "run", "--format", "pdf")[2].startswith("--format: unknown format 'pdf'")


def test_a_run_and_a_comparison_are_told_apart() -> None:
    run_record().write("run/record.json")
    sizes_record().write("curve/sizes.json")
    code, _, error = run("report", "run", "curve")
    assert (code, error) == (
        2,
        "RUN: run/record.json is a run, curve/sizes.json is several sizes. These do not stand side by side: call "
        "`flexkd report` for each kind.\n",
    )
    sizes_record().write("run/sizes.json")
    assert run("report", "run")[2].startswith("RUN: run holds record.json and sizes.json. Give the file that is meant")
    assert run("report", "run/sizes.json")[0] == 0


def test_a_report_without_a_record_ends_with_2() -> None:
    code, _, error = run("report", "nowhere")
    assert code == 2
    assert error.startswith("nowhere: cannot be read")


def test_a_device_that_is_not_known_ends_with_2() -> None:
    code, output, error = run("plan", "recipe.yaml", "--device", "h10")
    assert (code, output) == (2, "")
    assert error.startswith("--device: unknown device 'h10'. Known: a100,")
    assert error.endswith("Did you mean 'h100'?\n")
