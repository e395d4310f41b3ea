"""The teacher of a job: loaded, and fine-tuned on the rows once where its recipe says so."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.loading.saving import make_savable
from flexkd.pipeline.teacher_store import fine_tuned_teacher
from flexkd.recipe import Recipe
from flexkd.recipe.taught_features import may_rotate, reads_scores
from flexkd.scoring.units import check_state_is_read
from flexkd.tasks.task import EncodedRows, Task, check_ids
from flexkd.training.arguments import RunSettings

_TRIED_ROWS: Final = 2
"""Rows on which a teacher is tried, before it is fine-tuned, to see whether it can be scored."""


def load_teacher(
    recipe: Recipe,
    task: Task[Any],
    tokenizer: PreTrainedTokenizerBase,
    row_fingerprints: Mapping[str, str],
) -> PreTrainedModel:
    """The teacher that a recipe names, fine-tuned first where the recipe says so.

    Args:
        tokenizer: The teacher's.
        row_fingerprints: Fingerprints of the rows that it would be fine-tuned on.

    Raises:
        VocabularyError: The rows have ids that the teacher has no embedding for.
        TrainingError: Its fine-tuning must not go on.
    """
    section, encoded = recipe.teacher, task.encode()
    teacher = task.loader.load_teacher()
    teacher.config.pad_token_id = tokenizer.pad_token_id
    rows = {split: _teacher_rows(rows, encoded) for split, rows in encoded.splits.items()}
    check_ids(teacher, rows, where="teacher.model")
    prefer_short_rows_attention([teacher], recipe.data.max_length)
    # Fine-tuning saves it, a sliced student inherits its config, and its costs are measured on a saved copy.
    make_savable(teacher, where="teacher.model")
    if section.fine_tune is None:
        return teacher
    collator = Collator(int(tokenizer.pad_token_id)) if encoded.has_own_encoding else encoded.collator
    layers = recipe.scores.layer if isinstance(recipe.scores.layer, tuple) else (recipe.scores.layer,)
    if recipe.generation is None and HEAD_INPUT in layers and reads_scores(recipe, rotated=may_rotate(recipe)):
        check_state_is_read(teacher, collator(rows["train"][:_TRIED_ROWS]))
    settings = RunSettings(
        metric=task.validation_metrics().metric,
        precision=resolve_precision(section.precision),
        keep_checkpoints=1,
        **section.fine_tune.model_dump(),
    )
    return fine_tuned_teacher(
        teacher,
        tokenizer,
        train=[row for row in rows["train"] if _has_label(row["labels"])],
        validation=rows["validation"],
        collator=collator,
        settings=settings,
        validation_metrics=task.validation_metrics(),
        loss=task.loss,
        fingerprints={"problem": recipe.task.problem, **row_fingerprints},
        load=lambda folder: task.loader.load(folder, where="teacher store", own_head=True)[0],
    )


def _teacher_rows(rows: Sequence[EncodedRow], encoded: EncodedRows) -> Sequence[EncodedRow]:
    """Rows in the teacher's own encoding, without the prefix of its keys."""
    if not encoded.has_own_encoding:
        return rows
    plain = ("id", "labels")
    return [
        {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in row.items()
            if key in plain or key.startswith(TEACHER_PREFIX)
        }
        for row in rows
    ]


def _has_label(label: Any) -> bool:
    """Whether a row has a label, or one of its labels has a value."""
    values = label if isinstance(label, list) else [label]
    return any(value == value and value != -100 for value in values)
