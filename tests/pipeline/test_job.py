"""What is loaded for a run: rows in both encodings, a teacher in its own precision; what does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AlbertConfig, AlbertForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from flexkd.errors import DataError, UnsupportedModelError, VocabularyError
from flexkd.facts.names import SPLITS
from flexkd.pipeline import job as job_module
from flexkd.pipeline import teacher as teacher_module
from flexkd.pipeline.job import Job, prepare
from tests.job_files import BAD, GOOD, OTHER, job, sentences, write_tokenizer
from tests.tiny import tiny_model

PLAIN = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}
NO_SHAPE = {"student__hidden_size": None, "student__num_layers": None}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKD_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def ready(material: Path) -> Job:
    return prepare(job(material, **PLAIN))


def classifier(folder: Path, model_type: str = "bert", *, extra: str = "", **config: Any) -> str:
    """A model with the tokenizer of the sentences in a folder."""
    tiny_model(model_type, **{"num_labels": 2, **config}).save_pretrained(folder)
    write_tokenizer(folder, extra=extra)
    return str(folder)


def shifted_tokenizer(folder: Path, by: int) -> None:
    """The words of the sentences with ids that begin later than the teacher's."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"filler{index}" for index in range(by)), *GOOD, *BAD, *OTHER]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def test_splits_hold_every_row_once_in_the_teachers_own_encoding(ready: Job) -> None:
    assert sum(len(ready.splits[split]) for split in SPLITS) == 120
    assert len({row["id"] for split in SPLITS for row in ready.splits[split]}) == 120
    assert not ready.encoded.has_own_encoding
    assert all(set(row) == {"id", "labels", "input_ids", "attention_mask"} for row in ready.splits["test"])
    for split in SPLITS:
        assert [example.id for example in getattr(ready.data, split)] == [row["id"] for row in ready.splits[split]]


def test_batches_keep_the_order_and_the_first_rows(ready: Job) -> None:
    ids = [id_ for batch in ready.batches("train", num_rows=10, batch_size=4) for id_ in batch["example_id"]]
    assert ids == [row["id"] for row in ready.splits["train"][:10]]
    assert [len(batch["labels"]) for batch in ready.batches("train", num_rows=10, batch_size=4)] == [4, 4, 2]


@pytest.mark.parametrize(("model_type", "config"), [("bert", {}), ("electra", {}), ("distilbert", {})])
def test_F07_widths_are_read_from_a_forward(ready: Job, model_type: str, config: dict[str, Any]) -> None:
    model = tiny_model(model_type, num_labels=2, **config)
    assert ready.width(model) == 32
    assert ready.width(model, 2) == 32
    assert model.config.hidden_size == 32
    model.config.hidden_size = 7
    assert ready.width(model) == 32


def test_X04_widths_of_a_model_on_another_device_are_read_there(ready: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """After training the student stands on the accelerator; the meta device, which cannot run BERT, stands for it."""

    def read(
        model: Any, inputs: dict[str, torch.Tensor], layers: tuple[int, ...], positions: None
    ) -> tuple[dict[int, torch.Tensor], None]:
        assert {value.device.type for value in inputs.values()} == {"meta"}
        return {layers[0]: torch.empty(1, 1, 9)}, None

    monkeypatch.setattr(job_module, "states_and_logits", read)
    assert ready.width(tiny_model("bert", num_labels=2).to("meta")) == 9


def test_the_seed_of_the_student_changes_no_row_and_no_order(material: Path, ready: Job) -> None:
    """Students of all seeds share one teacher and one set of scored rows."""
    other = prepare(job(material, **PLAIN, training__seed=1))
    assert other.fingerprints == ready.fingerprints
    assert other.splits == ready.splits


def test_rows_of_the_hub_are_read_like_others(material: Path) -> None:
    """Preflight leaves them alone, so that the job reads them itself."""
    recipe = job(material, **PLAIN)
    expected = job_module.preflight(recipe).data
    assert expected is not None
    assert job_module.read_rows(recipe).train == expected.train


def test_F18_fingerprints_name_what_changed(material: Path, ready: Job, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (material / "single_label.jsonl").read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join([*lines, json.dumps({"text": "a bright warm plot", "label": "good"})]), encoding="utf-8")
    teacher = classifier(tmp_path / "teacher")
    copied = tmp_path / "copied"
    shutil.copytree(material / "teacher", copied)
    expected = {
        "data": {"data__train": str(rows)},
        "max_length": {"data__max_length": 12},
        "teacher": {"teacher__model": teacher},
        None: {"teacher__model": str(copied)},
    }
    for name, changes in expected.items():
        found = prepare(job(material, **PLAIN, **changes)).fingerprints
        assert {key for key in found if found[key] != ready.fingerprints[key]} == ({name} if name else set())


def test_D14_a_student_with_its_own_words_gets_its_own_encoding(material: Path, tmp_path: Path) -> None:
    own = classifier(tmp_path / "own", "distilbert", extra="shifted")
    start = {"student__start": "pretrained", "student__model": own, "objective__features__positions": "supervised"}
    found = prepare(job(material, **PLAIN, **NO_SHAPE, **start))
    assert found.encoded.has_own_encoding
    row = found.splits["train"][0]
    text = found.data.train[0].texts[0]
    assert row["input_ids"] == AutoTokenizer.from_pretrained(own)(text)["input_ids"]
    assert row["teacher_input_ids"] == AutoTokenizer.from_pretrained(material / "teacher")(text)["input_ids"]
    assert row["input_ids"] != row["teacher_input_ids"]
    plain = teacher_module._teacher_rows(found.splits["train"], found.encoded)[0]
    assert plain["input_ids"] == row["teacher_input_ids"]
    assert set(plain) == {"id", "labels", "input_ids", "attention_mask"}


def test_texts_that_are_cut_for_the_teacher_are_a_note_and_recorded(material: Path, tmp_path: Path) -> None:
    model = classifier(tmp_path / "own", "distilbert", extra="shifted")
    start = {"student__start": "pretrained", "student__model": model, "objective__features__positions": "supervised"}
    found = prepare(job(material, **PLAIN, **NO_SHAPE, **start, data__max_length=6))
    truncated = found.encoded.num_truncated()
    assert truncated["train"] == truncated["train (teacher)"] > 0
    note = f"train: {truncated['train']:,} texts are cut at data.max_length for the teacher, whose tokenizer is another"
    assert [text for text in found.notes if text.startswith(note)]
    alike = prepare(job(material, **PLAIN, data__max_length=6))
    assert set(alike.encoded.num_truncated()) == {"train", "validation", "test"}
    assert not [text for text in alike.notes if "for the teacher" in text]


def test_rows_without_a_label_teach_the_student_and_not_the_teacher(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for index, (text, kind) in enumerate(sentences(120)):
            file.write(json.dumps({"text": text, "label": None if index % 3 == 0 else ["bad", "good"][kind]}) + "\n")
    seen: list[Any] = []

    def taught(base: Any, tokenizer: Any, *, train: Any, validation: Any, **rest: Any) -> Any:
        seen.extend([train, validation])
        return base

    monkeypatch.setattr(teacher_module, "fine_tuned_teacher", taught)
    found = prepare(job(material, data__train=str(rows), data__unlabelled="keep"))
    labels = [row["labels"] for row in found.splits["train"]]
    assert labels.count(-100) > 20
    train, validation = seen
    assert len(train) == len(labels) - labels.count(-100)
    assert all(row["labels"] in (0, 1) for row in [*train, *validation, *found.splits["test"]])


def test_A13_a_teacher_keeps_its_half_precision_unless_it_is_trained(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    tiny_model("bert", num_labels=2).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    kept = prepare(job(material, **PLAIN, teacher__model=str(folder)))
    assert kept.teacher.dtype == torch.bfloat16
    tuned = prepare(job(material, teacher__model=str(folder), teacher__fine_tune={"epochs": 1}))
    assert tuned.teacher.dtype == torch.float32


def test_R01_a_teacher_without_its_head_is_refused(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    model = tiny_model("bert", num_labels=2)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(folder, state_dict=state)
    write_tokenizer(folder)
    with pytest.raises(UnsupportedModelError, match=r"teacher\.model: .* lacks 1 weights of its head \(classifier"):
        prepare(job(material, **PLAIN, teacher__model=str(folder)))


def test_D03_a_tokenizer_without_padding_is_given_one_and_the_reader_is_told(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "causal"
    tiny_model("llama", num_labels=2, pad_token_id=None).save_pretrained(folder)
    words = ["[UNK]", "<s>", "</s>", *GOOD, *BAD, *OTHER]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="[UNK]"
    ).save_pretrained(folder)
    found = prepare(job(material, **PLAIN, teacher__model=str(folder)))
    assert found.teacher.config.pad_token_id == 2
    assert [note for note in found.notes if note.startswith("pad token set to '</s>' (id 2)")]


def test_S08_ids_that_a_teacher_does_not_embed_are_refused_by_name(material: Path, tmp_path: Path) -> None:
    """Deep inside a forward this would be an index out of range."""
    small = classifier(tmp_path / "small", vocab_size=10)
    with pytest.raises(
        VocabularyError, match=r"teacher\.model: its tokenizer gives the id 23, but it embeds 10 tokens"
    ):
        prepare(job(material, **PLAIN, teacher__model=small))


def test_S08_ids_that_a_student_does_not_embed_are_refused_by_name(material: Path, tmp_path: Path) -> None:
    small = classifier(tmp_path / "small", vocab_size=10)
    recipe = job(material, **PLAIN, **NO_SHAPE, student__start="pretrained", student__model=small)
    with pytest.raises(
        VocabularyError, match=r"student\.model: its tokenizer gives the id 23, but it embeds 10 tokens"
    ):
        prepare(recipe)


def test_another_model_gets_the_test_rows_in_its_own_words(ready: Job, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    tiny_model("llama", num_labels=2, pad_token_id=None).save_pretrained(folder)
    shifted_tokenizer(folder, by=5)
    model = tiny_model("llama", num_labels=2, pad_token_id=None)
    other = ready.for_model(model, AutoTokenizer.from_pretrained(folder))
    assert model.config.pad_token_id == 0
    assert [row["id"] for row in other.splits["test"]] == [row["id"] for row in ready.splits["test"]]
    assert other.splits["test"][0]["input_ids"] != ready.splits["test"][0]["input_ids"]
    predictions = other.predict(model)
    for index in range(3):
        ids = torch.tensor([other.splits["test"][index]["input_ids"]])
        with torch.no_grad():
            assert torch.allclose(model(ids).logits[0], predictions.logits[index], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"num_labels": 3}, VocabularyError, "the data have 2 \\['bad', 'good'\\]"),
        ({"max_position_embeddings": 12}, DataError, "the model reads 12"),
        ({"vocab_size": 10}, VocabularyError, "evaluate: its tokenizer gives the id 23, but it embeds 10 tokens"),
    ],
)
def test_a_model_that_cannot_read_the_rows_is_refused(
    ready: Job, tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = Path(classifier(tmp_path / "other", **config))
    model = tiny_model("bert", **{"num_labels": 2, **config})
    with pytest.raises(error, match=message):
        ready.for_model(model, AutoTokenizer.from_pretrained(folder))


def test_R11_a_teacher_that_cannot_be_scored_is_refused_before_it_learns(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body of ALBERT makes what its head reads by itself."""
    folder = tmp_path / "albert"
    config = AlbertConfig(
        vocab_size=61, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_labels=2
    )
    AlbertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    student = {"student__start": "pretrained", "student__model": str(material / "teacher")}
    shape = {"student__hidden_size": None, "student__num_layers": None}
    recipe = {"teacher__model": str(folder), "teacher__fine_tune": {"epochs": 1}, **student, **shape}
    monkeypatch.setattr(teacher_module, "fine_tuned_teacher", lambda base, *_, **__: base)
    with pytest.raises(UnsupportedModelError, match="its outputs do not depend on the state that is read"):
        prepare(job(material, **recipe))
    # Whoever asks for no score gets the teacher.
    logits = {"objective__features": None, "teacher__allow_weak": True}
    assert prepare(job(material, **recipe, **logits)).teacher.config.model_type == "albert"
