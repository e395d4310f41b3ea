"""Teachers that were fine-tuned once, kept by the fingerprint of everything that made them."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.core.objective import Objective
from flexkd.core.terms import TaskTerm
from flexkd.data.collate import Collator
from flexkd.home import home_folder
from flexkd.models.loading import load_classifier, model_fingerprint, tokenizer_fingerprint
from flexkd.train.arguments import RunSettings, training_arguments
from flexkd.train.training import TASK_LOSSES
from flexkd.train.training import train as run_training

logger = logging.getLogger(__name__)


def store_folder() -> Path:
    """Where fine-tuned teachers are kept: `$FLEXKD_HOME/teachers`, by default below `~/.cache/flexkd`."""
    return home_folder("teachers")


def fine_tuned_teacher(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    collator: Collator,
    settings: RunSettings,
    problem: str,
    fingerprints: Mapping[str, str],
) -> PreTrainedModel:
    """The base model after it learnt the task; from the store when the same was made before.

    An interrupted fine-tuning goes on from its last checkpoint. A teacher enters the store whole or not at all.

    Raises:
        TrainingError: The fine-tuning must not go on.
    """
    made_of = {
        "base": model_fingerprint(base),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **fingerprints,
        "problem": problem,
        **{name: str(value) for name, value in asdict(settings).items()},
    }
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = store_folder() / digest
    locks = store_folder().with_name("locks")
    for needed in (locks, folder.parent):
        needed.mkdir(parents=True, exist_ok=True)
    # A second process that wants the same teacher waits for it; the lock goes with the process that holds it.
    with FileLock(locks / digest):
        if (folder / "config.json").is_file():
            logger.info("teacher: fine-tuned before, taken from %s", folder)
        else:
            logger.info("teacher: fine-tuning on %d rows, then kept in %s", len(train), folder)
            _fine_tune(base, tokenizer, train, validation, collator, settings, problem, made_of, folder)
    attention = base.config._attn_implementation
    stored, _ = load_classifier(str(folder), where="teacher store")
    stored.set_attn_implementation(attention)
    stored.name_or_path = str(folder)
    return stored


def _fine_tune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    collator: Collator,
    settings: RunSettings,
    problem: str,
    made_of: Mapping[str, str],
    folder: Path,
) -> None:
    work = folder.with_name(f"{folder.name}.partial")
    arguments = training_arguments(work / "checkpoints", settings, num_rows=len(rows))
    run_training(
        base,
        None,
        Objective(task=TaskTerm(TASK_LOSSES[problem])),
        arguments,
        rows=rows,
        validation=validation,
        collator=collator,
        problem=problem,
        fingerprints=made_of,
        description="teacher",
    )
    finished = work / "model"
    base.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    (finished / "flexkd_teacher.json").write_text(json.dumps(dict(made_of), indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(finished, folder)
    shutil.rmtree(work, ignore_errors=True)
