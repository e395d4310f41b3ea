"""Teachers that were fine-tuned once, stored under the fingerprint of everything that made them."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.core.objective import Objective
from flexkd.core.terms import TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.facts.names import CONFIG_FILE
from flexkd.home import home_folder
from flexkd.models.loading.adapters import unwrapped
from flexkd.models.loading.pretrained import model_fingerprint, tokenizer_fingerprint
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, ValidationMetrics
from flexkd.training.fit import train as run_training
from flexkd.training.time_limit import planned_steps

logger = logging.getLogger(__name__)


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

    Raises:
        TrainingError: The fine-tuning must not go on.
    """
    made_of = {
        "base": model_fingerprint(base),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **fingerprints,
        **{name: str(value) for name, value in asdict(settings).items()},
    }
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = store_folder() / digest
    locks = store_folder().with_name("locks")
    for parent in (locks, folder.parent):
        parent.mkdir(parents=True, exist_ok=True)
    # A second process that needs the same teacher waits here; the lock is released even if its holder dies.
    with FileLock(locks / digest):
        if (folder / CONFIG_FILE).is_file():
            logger.info("teacher: fine-tuned before, taken from %s", folder)
        else:
            logger.info("teacher: fine-tuning on %d rows, then kept in %s", len(train), folder)
            training_plan = TrainingPlan(
                base, Objective(task=TaskTerm(loss)), train, validation, collator, validation_metrics, "teacher"
            )
            _fine_tune(training_plan, tokenizer, settings, made_of, folder)
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
    arguments = training_arguments(checkpoints, planned, num_rows=len(training_plan.rows))
    run_training(training_plan, None, arguments, fingerprints=made_of)
    finished = work / "model"
    unwrapped(training_plan.model).save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    (finished / "flexkd_teacher.json").write_text(json.dumps(dict(made_of), indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(finished, folder)
    shutil.rmtree(work, ignore_errors=True)
