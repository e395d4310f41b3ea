"""Rows of a batch do not see each other, and no encoding outlives its settings."""

from pathlib import Path

import pytest
import torch

from flexkd.errors import ArtifactError
from flexkd.models.forward.hidden import model_inputs, states_and_logits, supervised_mask
from flexkd.pipeline.job import prepare
from flexkd.pipeline.run import Run
from tests.closeness import assert_close
from tests.job_files import text_job, write_text_tokenizer
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of

EXACT = {"teacher__fine_tune": None, "training__precision": "float32", "teacher__precision": "float32"}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_D21_a_row_says_the_same_beside_others_as_alone(model_type: str) -> None:
    """Rows are never packed into one: each has a line of the batch, so that nothing can leak from one to the next."""
    seq2seq = model_type == "t5"
    model = tiny_model(model_type, "seq2seq" if seq2seq else "causal")
    rows = answer_rows(6, seq2seq=seq2seq)
    collator = collator_of(model)

    def logits_of(some: list[dict[str, object]]) -> torch.Tensor:
        batch = collator(some)
        inputs = model_inputs(model, batch)
        with torch.no_grad():
            _, logits = states_and_logits(model, inputs, (), positions=supervised_mask(model, inputs, batch["labels"]))
        return logits

    assert_close(logits_of(rows), torch.cat([logits_of([row]) for row in rows]))


def test_D22_another_length_layout_or_tokenizer_is_encoded_anew(tmp_path: Path) -> None:
    """Nothing tokenised is kept on disk, and what is kept of a run is refused under other ids."""
    recipe = text_job(tmp_path, **EXACT)
    first = prepare(recipe)
    Run(first, recipe, Path(recipe.output)).select()
    assert not [path for path in Path(recipe.output).rglob("*") if path.suffix in (".arrow", ".parquet", ".jsonl")]
    layout = text_job(tmp_path, **EXACT, data__template="Summarize the following text . {document} Answer :")
    second = prepare(layout)
    assert second.splits["train"][0]["input_ids"] != first.splits["train"][0]["input_ids"]
    with pytest.raises(ArtifactError, match="template was"):
        Run(second, layout, Path(layout.output)).select()
    shorter = text_job(tmp_path, **EXACT, data__max_length=12)
    with pytest.raises(ArtifactError, match="max_length was"):
        Run(prepare(shorter), shorter, Path(shorter.output)).select()
    write_text_tokenizer(tmp_path / "teacher", chat=True)
    third = prepare(recipe)
    assert third.fingerprints["teacher_tokenizer"] != first.fingerprints["teacher_tokenizer"]
    with pytest.raises(ArtifactError, match=r"(chat_template|student_tokenizer|teacher_tokenizer) was"):
        Run(third, recipe, Path(recipe.output)).select()
