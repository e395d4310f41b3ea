"""The teacher of a job: loaded, and fine-tuned on the rows once where its recipe says so, then kept in a store."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.allocator import release
from flexkd.core.objective import Objective
from flexkd.core.terms import TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.facts.names import CONFIG_FILE, TEACHER_PREFIX
from flexkd.facts.user_code import METRIC_KEY, function_hashes
from flexkd.files import writing
from flexkd.guards.locks import awaited
from flexkd.home import home_folder
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.pretrained import model_fingerprint, tokenizer_fingerprint
from flexkd.models.loading.saving import make_savable, save_model
from flexkd.processes import alone, decided, gathered, in_turn, num_processes
from flexkd.recipe import Recipe
from flexkd.recipe.taught_features import may_rotate, unit_attributions
from flexkd.scoring.units import check_state_is_read
from flexkd.tasks.task import EncodedRows, Task, check_ids
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, ValidationMetrics
from flexkd.training.fit import train as run_training
from flexkd.training.time_limit import planned_steps

logger = logging.getLogger(__name__)

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
        TrainingError: Its fine-tuning failed, such as by a loss that is not finite.
    """
    section, encoded = recipe.teacher, task.encode()
    with in_turn():  # the first process may have to fetch or convert it
        teacher = task.loader.load_teacher()
    teacher.config.pad_token_id = tokenizer.pad_token_id
    rows = {split: _teacher_rows(rows, encoded) for split, rows in encoded.splits.items()}
    check_ids(teacher, rows, tokenizer, where="teacher.model")
    prefer_short_rows_attention([teacher], recipe.data.max_length)
    # Fine-tuning saves it, a sliced student inherits its config, and its costs are measured on a saved copy.
    make_savable(teacher, where="teacher.model")
    if section.fine_tune is None:
        return teacher
    collator = Collator(int(tokenizer.pad_token_id)) if encoded.has_own_encoding else encoded.collator
    attributions = unit_attributions(recipe, rotated=may_rotate(recipe))
    if recipe.generation is None and HEAD_INPUT in recipe.scores.layers and recipe.scores.attribution in attributions:
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
        train=[row for row in rows["train"] if has_label(row)],
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


def has_label(row: EncodedRow) -> bool:
    """Whether a row has a label, or one of its labels has a value."""
    label: Any = row["labels"]
    values = label if isinstance(label, list) else [label]
    return any(value == value and value != -100 for value in values)


def store_folder() -> Path:
    """Where fine-tuned teachers are stored: `$FLEXKD_HOME/teachers`, by default below `~/.cache/flexkd`."""
    return home_folder("teachers")


def fine_tuned_teacher(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    collator: Collator,
    settings: RunSettings,
    validation_metrics: ValidationMetrics,
    loss: str,
    fingerprints: Mapping[str, str],
    load: Callable[[str], PreTrainedModel],
    description: str = "teacher",
) -> PreTrainedModel:
    """The base model fine-tuned on the task, from the store if it was fine-tuned before.

    An interrupted fine-tuning continues from its last checkpoint. A teacher enters the store whole or not at all.

    Args:
        base: Trained in place if no such teacher is stored.
        tokenizer: Stored with the teacher.
        train: Rows to train on.
        validation: Rows that choose the best checkpoint.
        collator: Rows to batches.
        settings: Training settings. A limit in minutes is part of the fingerprint; the steps that fit into it are not.
        validation_metrics: Metrics of every evaluation during training.
        loss: Loss against the labels, as in `TaskTerm`.
        fingerprints: Fingerprints of the rows.
        load: Loads a stored teacher from its folder.
        description: Names the model in the log, where it is none.

    Raises:
        TrainingError: The fine-tuning failed, such as by a loss that is not finite.
    """
    made_of = {
        "base": model_fingerprint(base),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **fingerprints,
        **{name: str(value) for name, value in asdict(settings).items()},
        **function_hashes({METRIC_KEY: settings.metric}),
    }
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = store_folder() / digest
    locks = store_folder().with_name("locks")
    for parent in (locks, folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    # A second run that needs the same teacher waits here; the lock is released even if its holder dies. Of several
    # processes of one run the first holds it, and the others wait for what it finds behind it.
    with awaited(locks / digest, what=f"{description} {digest}"):
        if decided((folder / CONFIG_FILE).is_file):
            logger.info("%s: fine-tuned before, taken from %s", description, folder)
        else:
            logger.info("%s: fine-tuning on %d rows, then kept in %s", description, len(train), folder)
            training_plan = TrainingPlan(
                base, Objective(task=TaskTerm(loss)), train, validation, collator, validation_metrics, description
            )
            _fine_tune(training_plan, tokenizer, settings, made_of, folder)
            release()
        # Inside the lock: transformers fails to tie weights when two threads load models at the same time.
        stored = load(str(folder))
    attention = base.config._attn_implementation
    stored.set_attn_implementation(attention)
    stored.name_or_path = str(folder)
    return stored


def _fine_tune(
    training_plan: TrainingPlan,
    tokenizer: PreTrainedTokenizerBase,
    settings: RunSettings,
    made_of: Mapping[str, str],
    folder: Path,
) -> None:
    work = folder.with_name(f"{folder.name}.partial")
    checkpoints = work / "checkpoints"
    planned = planned_steps(training_plan, None, settings, checkpoints)
    num_rows = len(training_plan.rows)
    arguments = training_arguments(checkpoints, planned, num_rows=num_rows, num_processes=num_processes())
    run_training(training_plan, None, arguments, fingerprints=made_of)

    def store() -> None:
        finished = work / "model"
        with writing(finished):
            save_model(unwrapped(training_plan.model), finished)
            tokenizer.save_pretrained(finished)
            (finished / "flexkd_teacher.json").write_text(json.dumps(dict(made_of), indent=1), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(finished, folder)
        shutil.rmtree(work, ignore_errors=True)

    gathered(None)  # the others may still read the best checkpoint
    alone(store)
