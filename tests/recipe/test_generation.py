"""Recipes whose task is to write text: defaults of their own, and keys that would be ignored are refused."""

from collections.abc import Callable

import pytest

from flexkd.recipe import override_recipe
from tests.recipe.kinds import Loaded

Problems = Callable[..., list[str]]

BASE = """\
name: job
data: {train: rows.jsonl}
teacher: {model: teachers/big}
student: {size: 0.25}
task: {type: summarization}
"""


def test_defaults_follow_the_task(load: Loaded) -> None:
    recipe = load(BASE)
    assert (recipe.task.problem, recipe.task.metric) == ("generation", "rougeL")
    assert (recipe.data.max_length, recipe.data.max_answer_length) == (512, 128)
    assert recipe.generation is not None
    assert recipe.generation.seeds == (0,)
    assert recipe.objective.logits is not None
    assert recipe.objective.logits.temperature == 1.0
    assert recipe.objective.features is not None
    assert recipe.objective.features.positions == "supervised"
    recipe = load(BASE, "data.max_length=64", "data.max_answer_length=8", "objective.features.positions=tokens")
    assert (recipe.data.max_length, recipe.objective.features and recipe.objective.features.positions) == (64, "tokens")


def test_a_recipe_with_every_default_written_out_is_the_same_recipe(load: Loaded) -> None:
    recipe = load(BASE, "objective.features=null")
    assert override_recipe(recipe, []) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task.problem=regression"], "task.problem: 'regression' does not fit summarization. Use generation."),
        (
            ["task.type=classification", "generation.num_beams=2"],
            "generation: classification writes no text. Remove it.",
        ),
        (["task.metric=rougel"], "task.metric: unknown metric of generation 'rougel'. Known: nll, perplexity, rouge1"),
        (["data.text=body"], "data.text: 'body' is used by classification, not by summarization. Remove it."),
        (["data.prompt=question"], "data.prompt: 'question' is used by instruction, not by summarization. Remove it."),
        (["data.summary=document"], "data.summary: 'document' is the column of document too. Name another column."),
        (["data.template=Shorten"], "data.template: 'Shorten' has no place for {document}. Add it."),
        (["data.max_answer_length=512"], "data.max_answer_length: 512 leaves no room for a prompt in max_length = 512"),
        (["generation.seeds=[1, 2]"], "generation.seeds: [1, 2] give equal answers without sampling."),
        (["generation.temperature=0.7"], "generation.temperature: 0.7 is used only where tokens are sampled."),
        (["generation.length_penalty=2"], "generation.length_penalty: 2 is used only with beams."),
        (
            ["generation.validation_rows=5", "task.metric=nll"],
            "generation.validation_rows: 5 rows are answered for a metric without answers, nll. Remove it.",
        ),
        (
            ["teacher.quantization=4bit"],
            "teacher.quantization: 4bit weights cannot be cut. Use student.start: pretrained or config.",
        ),
        (
            ["teacher.quantization=8bit", "teacher.fine_tune={}", "student={start: pretrained, model: small}"],
            "teacher.quantization: 8bit weights cannot be fine-tuned.",
        ),
        (
            ["student={start: pretrained, model: small, basis: rotated}"],
            "student.basis: 'rotated' is only for start: slice, not pretrained. Remove it.",
        ),
        (["data.unlabelled=keep"], "data.unlabelled: 'keep' is used by classification, not by summarization."),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(problems: Problems, changes: list[str], message: str) -> None:
    lines = problems(BASE, *changes)
    assert len(lines) == 1
    assert message in lines[0]


def test_messages_need_a_chat_template(problems: Problems) -> None:
    text = BASE.replace("summarization", "instruction")
    assert "data.chat: 'never' cannot write messages" in problems(text, "data.messages=turns", "data.chat=never")[0]
