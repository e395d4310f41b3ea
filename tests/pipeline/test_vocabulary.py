"""Runs whose student knows some of its teacher's tokens: what is taught, saved and reported."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from flexkd.costs import planning
from flexkd.errors import RecipeError, VocabularyError
from flexkd.evaluate.cost import Cost
from flexkd.models.slicing.proportions import parameter_counter
from flexkd.models.slicing.shape import StudentShape, shape_of
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline.job import Job, prepare
from flexkd.pipeline.recording import Timed, model_costs
from flexkd.pipeline.run import Run
from flexkd.pipeline.sizes import sizes
from flexkd.pipeline.start import start_student, student_sizes
from flexkd.preflight import preflight
from flexkd.recipe import Recipe, override_recipe
from flexkd.tasks import classification, generation
from tests.job_files import fixed_costs, job, text_job
from tests.tiny import tiny_model

SPECIALS: Final = ["<pad>", "<s>", "</s>", "<unk>"]
SIZE: Final = 400
KINDS: Final = {
    "text": "llama", "seq2seq": "t5", "class": "bert", "class_after_padding": "roberta", "class_of_last_token": "llama",
}  # fmt: skip
LOADERS: Final = {"text": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
UNUSED: Final = "zebras quiver, oxen vex jackdaws; sphinxes of black quartz judge my vow "
"""Words that make tokens of the teacher, and that no row holds."""


def write_byte_tokenizer(folder: Path, texts: list[str]) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator([*texts, *[UNUSED] * 3], trainer)
    if "class" in folder.parent.name:
        ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    for name in folder.glob("tokenizer*"):
        name.unlink()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=60, **names).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXKD_HOME", str(folder / "home"))
        fixed_costs(patch)
        yield folder


def recipe_of(folders: Path, kind: str, **changes: Any) -> Recipe:
    folder = folders / kind
    folder.mkdir(exist_ok=True)
    is_text = kind in LOADERS
    exact = {"training__precision": "float32", "teacher__precision": "float32", "student__vocabulary": "auto"}
    lengths = {"data__max_length": 56, "data__max_answer_length": 20} if is_text else {"data__max_length": 30}
    changes = {**exact, **lengths, "teacher__fine_tune": None, "teacher__allow_weak": True, **changes}
    if not (folder / "teacher").exists():
        make = text_job if is_text else job
        make(folder)
        tasks = {"text": "causal", "seq2seq": "seq2seq"}
        options = {"num_labels": 2} if not is_text else {}
        model = tiny_model(
            KINDS[kind],
            tasks.get(kind, "classification"),
            seed=3,
            vocab_size=SIZE,
            max_position_embeddings=64,
            **options,
        )  # type: ignore[arg-type]
        rows = next(folder.glob("*.jsonl"))
        texts = [str(value) for line in rows.read_text().splitlines() for value in json.loads(line).values()]
        model.save_pretrained(folder / "teacher")
        write_byte_tokenizer(folder / "teacher", texts)
    return text_job(folder, KINDS[kind], **changes) if is_text else job(folder, **changes)


@pytest.fixture(scope="module", params=KINDS)
def prepared(folders: Path, request: pytest.FixtureRequest) -> tuple[str, Job]:
    return request.param, prepare(recipe_of(folders, request.param))


def test_the_teacher_that_teaches_says_what_the_whole_one_says_of_the_same_rows(prepared: tuple[str, Job]) -> None:
    kind, cut = prepared
    whole = cut.reported
    assert cut.vocabulary is not None
    assert len(cut.tokenizer) == cut.vocabulary.tokens < cut.vocabulary.teacher_tokens == len(whole.tokenizer)
    old_ids = [
        whole.tokenizer.get_vocab()[token]
        for token in sorted(cut.tokenizer.get_vocab(), key=cut.tokenizer.get_vocab().get)
    ]  # type: ignore[arg-type]
    for new, old in zip(cut.batches("train", num_rows=8), whole.batches("train", num_rows=8), strict=True):
        ids = torch.tensor(old_ids)[new["input_ids"]]
        assert torch.equal(ids, old["input_ids"])
        names = [name for name in ("attention_mask", "decoder_input_ids") if name in new]
        inputs = [{"input_ids": batch["input_ids"], **{name: batch[name] for name in names}} for batch in (new, old)]
        if kind == "seq2seq":
            inputs = [{**each, "decoder_input_ids": each["input_ids"][:, :3]} for each in inputs]
        with torch.no_grad():
            logits, before = cut.teacher(**inputs[0]).logits, whole.teacher(**inputs[1]).logits
        assert torch.equal(logits, before[..., old_ids] if kind in LOADERS else before)
    lengths = cut.vocabulary.tokens_a_row["train"], cut.vocabulary.teacher_tokens_a_row["train"]
    assert lengths[0] == lengths[1]
    assert cut.vocabulary.teacher_nll is not None
    assert cut.fingerprints["teacher"] != whole.fingerprints["teacher"]
    assert any("student.vocabulary: the student knows" in note for note in cut.notes)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_run_saves_a_plain_student_and_reports_the_whole_teacher(folders: Path, kind: str) -> None:
    recipe = recipe_of(folders, kind, output=str(folders / f"{kind}-run"))
    record = pipeline.distill(recipe)
    folder = recipe.folder / "student"
    loader = LOADERS.get(kind, AutoModelForSequenceClassification)
    student, tokenizer = loader.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert record.vocabulary is not None
    assert student.config.vocab_size == len(tokenizer) == record.vocabulary.tokens
    assert tokenizer.pad_token == "<pad>"
    assert student.config.pad_token_id == tokenizer.pad_token_id
    text = "a text with zebras — and ünseen words"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    teacher = next(model for model in record.models if model.role == "teacher")
    plain = pipeline.distill(recipe_of(folders, kind, output=str(folders / f"{kind}-plain"), student__vocabulary=None))
    assert teacher.metrics == next(model for model in plain.models if model.role == "teacher").metrics
    assert plain.vocabulary is None
    reread = pipeline.evaluate("student", recipe)
    metrics = next(model for model in record.models if model.role == "student").metrics
    defined = {name: value for name, value in metrics.items() if value is not None}
    assert {name: reread.metrics[name] for name in defined} == pytest.approx(defined, rel=1e-5)


def test_what_the_embeddings_free_is_spent_on_blocks(folders: Path) -> None:
    cut = prepare(recipe_of(folders, "text", student__vocabulary=290))
    count_whole, count = (parameter_counter(model.config) for model in (cut.reported.teacher, cut.teacher))
    gains = []
    for size in (0.3, 0.5, 0.7, 0.9):
        shape = ["student.hidden_size=null", "student.num_layers=null", f"student.size={size}"]
        recipe = override_recipe(cut.recipe, shape)
        plain, freed = (
            StudentShape(**student_sizes(recipe, teacher, cut.reported.teacher))  # type: ignore[arg-type]
            for teacher in (cut.reported.teacher, cut.teacher)
        )
        limit = size * count_whole(shape_of(cut.reported.teacher.config))
        assert count_whole(plain) <= limit
        assert count(freed) <= limit
        gains.append(count_whole(freed) - count_whole(plain))
    assert min(gains) >= 0
    assert max(gains) > 0


def test_the_plan_counts_the_tokens_that_stay(folders: Path) -> None:
    recipe = recipe_of(folders, "text")
    cut = prepare(recipe)
    run = Run(cut, cut.recipe, folders / "planned")
    student = run.start(run.select()).student
    plan = planning.plan(recipe)
    assert plan.models[1].parameters == student.num_parameters()
    assert plan.models[0].parameters == cut.reported.teacher.num_parameters()


def test_the_teacher_is_timed_on_the_rows_in_its_own_tokens(prepared: tuple[str, Job], monkeypatch: Any) -> None:
    _, cut = prepared
    timed: list[dict[int, Any]] = []
    cost = Cost(1000, 4000, 50.0, 10**6, "cpu")

    def measured(folders: Any, *_: Any, own_batches: Any, **__: Any) -> list[Cost]:
        timed.append(own_batches)
        return [cost] * len(folders)

    for task in (classification, generation):
        monkeypatch.setattr(task, "measure_costs", measured)
    model_costs(cut, [Timed.teacher_of(cut)])
    (batch,) = timed[0][0][:1]
    assert torch.equal(batch["input_ids"], cut.reported.task.cost_batches()[0]["input_ids"])
    whole = cut.reported.tokenizer
    texts = whole.batch_decode(batch["input_ids"], skip_special_tokens=True)
    own = cut.tokenizer.batch_decode(cut.task.cost_batches()[0]["input_ids"], skip_special_tokens=True)
    assert texts == own


def test_a_student_made_from_a_config_reads_and_pads_by_the_new_ids(folders: Path) -> None:
    """Ids in the config are those of the teacher's tokenizer, but for a pad id of the model that it was made for."""
    shapes = {"hidden_size": None, "num_layers": None, "start": "config"}
    changes: dict[str, Any] = {f"student__{name}": value for name, value in shapes.items()}
    changes |= {"objective__features": None, "student__model": str(folders / "config")}
    recipe_of(folders, "class")
    unused = AutoTokenizer.from_pretrained(folders / "class" / "teacher").convert_tokens_to_ids("\u0120qu")
    assert unused > len(SPECIALS)
    for model_type, pad in (("bert", 4_000), ("roberta", 1)):
        config = tiny_model(model_type, pad_token_id=pad, vocab_size=5_000, mask_token_id=unused, num_labels=2).config
        config.save_pretrained(folders / "config")
        cut = prepare(recipe_of(folders, "class", **changes))
        student = start_student(cut, cut.recipe, None, None).student
        assert student.config.pad_token_id == cut.tokenizer.pad_token_id == 0
        assert cut.tokenizer.convert_ids_to_tokens(student.config.mask_token_id) == "\u0120qu"
        if model_type == "roberta":
            # It counts positions from the pad id that it was made with: a saved one would count from another.
            assert student.base_model.embeddings.padding_idx == 0
        # But for what the config names, which is known to the run alone.
        assert planning.plan(cut.recipe).models[1].parameters == pytest.approx(student.num_parameters(), rel=0.01)


def test_a_token_that_the_teacher_does_not_embed_is_refused(folders: Path) -> None:
    recipe = recipe_of(folders, "text")
    larger = folders / "larger"
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher.model)
    tokenizer.add_tokens([f"<more {number}>" for number in range(SIZE + 1 - len(tokenizer))])
    tokenizer.save_pretrained(larger)
    problems = preflight(override_recipe(recipe, [f"teacher.tokenizer={larger}"])).problems
    expected = "has a token with the id 400, and the teacher embeds 400 tokens. Remove student.vocabulary, or save"
    assert any(expected in text for text in problems), problems
    tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(SIZE)})
    tokenizer.save_pretrained(larger)
    whole = override_recipe(recipe, [f"teacher.tokenizer={larger}", "student.vocabulary=null"])
    with pytest.raises(VocabularyError, match=r"teacher\.model: its tokenizer gives the id 400, but it embeds 400"):
        prepare(whole)


@pytest.mark.parametrize("vocabulary", ["auto", 3])
def test_a_vocabulary_that_cannot_be_cut_is_refused_before_anything_is_loaded(folders: Path, vocabulary: Any) -> None:
    words = folders / f"words-{vocabulary}"
    words.mkdir()
    if vocabulary == "auto":
        problems = preflight(text_job(words, student__vocabulary="auto")).problems
        assert any("it is a WordLevel, in which a word without a token of its own is lost" in text for text in problems)
    else:
        problems = preflight(recipe_of(folders, "text", student__vocabulary=3)).problems
        assert any("3 tokens are too few" in text for text in problems)
        with pytest.raises(VocabularyError, match="3 tokens are too few"):
            prepare(recipe_of(folders, "text", student__vocabulary=3))


def test_a_student_with_tokens_of_its_own_has_none_of_the_teachers_to_choose(folders: Path) -> None:
    changes = {"student__start": "pretrained", "student__model": "somewhere", "student__hidden_size": None}
    with pytest.raises(RecipeError, match=r"student\.vocabulary: 'auto' chooses among the teacher's tokens"):
        recipe_of(folders, "text", student__num_layers=None, **changes)


def test_sizes_of_a_cut_vocabulary_are_shares_of_the_whole_teacher(folders: Path, monkeypatch: Any) -> None:
    recipe = recipe_of(folders, "text", output=str(folders / "sizes"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", lambda *_, **__: pytest.fail("a student was trained"))
        with pytest.raises(RecipeError, match=r"sizes\.values: 0\.9 and 0\.91 come to the same student"):
            sizes(recipe, values=[0.9, 0.91])
    record = sizes(recipe, values=[0.3, 0.5])
    whole = parameter_counter(AutoModelForCausalLM.from_pretrained(folders / "text" / "teacher").config)
    teacher = prepare(recipe).reported.teacher
    for result in record.sizes:
        student = AutoModelForCausalLM.from_pretrained(recipe.folder / result.folder)
        assert student.num_parameters() <= result.value * whole(shape_of(teacher.config))
        assert student.config.vocab_size < SIZE
