"""A small teacher trained here: a byte-level tokenizer and a Llama that has read the descriptions of Debian's packages.

It reads the documents of the recipe's source that are neither validation nor test rows, and so does the tokenizer. What
follows, from description to synopsis, is the recipe's `teacher.fine_tune`.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from flexkd.core.objective import Objective
from flexkd.core.terms import TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow
from flexkd.data.examples.generation import GenerationData
from flexkd.data.sources.rows import read_rows as read_source
from flexkd.facts.losses import TASK_LOSS_OF
from flexkd.facts.names import CONFIG_FILE
from flexkd.home import home_folder
from flexkd.models.forward.attention import prefer_short_rows_attention
from flexkd.models.loading.adapters import unwrapped
from flexkd.preflight import read_rows
from flexkd.recipe import Recipe
from flexkd.training.arguments import RunSettings, training_arguments
from flexkd.training.fit import TrainingPlan, ValidationMetrics, train

logger = logging.getLogger(__name__)

_PAD: Final = "<pad>"
_END: Final = "<eos>"


@dataclass(frozen=True)
class TeacherSettings:
    """Everything that decides the teacher besides its documents.

    Attributes:
        length: Tokens of a training row; documents follow each other, each ended by the end token.
    """

    vocabulary: int = 4096
    width: int = 240
    layers: int = 4
    heads: int = 12
    intermediate: int = 640
    positions: int = 256
    length: int = 128
    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    evaluations: int = 6
    seed: int = 0

    def config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        """The architecture: RMSNorms right before what reads them, so that it can be rotated, and a tied head."""
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


@dataclass(frozen=True)
class Documents:
    """The texts that a teacher learns from, and those that show how well."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> "Documents":
        """All documents of the recipe's source but those of its validation and test rows; the former are validated."""
        data = read_rows(recipe)
        assert isinstance(data, GenerationData), "a summarization recipe"
        validation, test = ([str(row.document).strip() for row in rows] for rows in (data.validation, data.test))
        column = recipe.data.document
        texts = [str(row.values[column]).strip() for row in read_source(recipe.data.train, columns=[column])]
        # By their text: rows of one package stand in one split, and no two of them have the same document.
        held_out = {*validation, *test}
        return cls(tuple(text for text in texts if text not in held_out), tuple(validation))


def teacher_folder(settings: TeacherSettings, documents: Documents) -> Path:
    """Where the teacher of these settings and texts is stored, in the user's cache; it may not exist yet."""
    digest = hashlib.blake2b(json.dumps(asdict(settings), sort_keys=True).encode(), digest_size=12)
    for text in (*documents.train, *documents.validation):
        digest.update(text.encode())
    return home_folder("study") / digest.hexdigest()


def language_model(settings: TeacherSettings, documents: Documents) -> Path:
    """The folder of the trained language model, a plain Hugging Face one; trained now unless it was before.

    An interrupted training continues from its last checkpoint, and the folder appears whole or not at all.
    """
    folder = teacher_folder(settings, documents)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / CONFIG_FILE).is_file():
            logger.info("language model: training, then kept in %s", folder)
            _train_into(folder, settings, documents)
    return folder


def trained_tokenizer(settings: TeacherSettings, documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these documents, without a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=_PAD, eos_token=_END, model_max_length=settings.positions
    )


def language_rows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], length: int) -> list[EncodedRow]:
    """The documents one after the other, each ended by the end token, in rows of that many tokens."""
    ids = list(_tokens(tokenizer, documents))
    pieces = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    return [
        {"id": f"text-{index}", "input_ids": piece, "attention_mask": [1] * length, "labels": piece}
        for index, piece in enumerate(pieces)
    ]


def _tokens(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> Iterator[int]:
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        yield from ids
        yield tokenizer.eos_token_id


def untrained(settings: TeacherSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model with random weights, the same at every call."""
    torch.manual_seed(settings.seed)
    model: PreTrainedModel = LlamaForCausalLM(settings.config(tokenizer))
    prefer_short_rows_attention([model], settings.length)
    return model


def _train_into(folder: Path, settings: TeacherSettings, documents: Documents) -> None:
    work = folder.with_name(f"{folder.name}.partial")
    plan = _training_plan(settings, documents)
    arguments = training_arguments(work / "checkpoints", _run_settings(settings), num_rows=len(plan.rows))
    trainer = train(plan, None, arguments, fingerprints={"settings": json.dumps(asdict(settings), sort_keys=True)})
    finished = work / "model"
    unwrapped(plan.model).save_pretrained(finished)
    trained_tokenizer(settings, documents.train).save_pretrained(finished)
    log: list[dict[str, Any]] = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    (finished / "study.json").write_text(json.dumps({**asdict(settings), "evaluations": log}, indent=1))
    os.replace(finished, folder)
    shutil.rmtree(work, ignore_errors=True)


def _training_plan(settings: TeacherSettings, documents: Documents) -> TrainingPlan:
    tokenizer = trained_tokenizer(settings, documents.train)
    rows = {split: language_rows(tokenizer, texts, settings.length) for split, texts in asdict(documents).items()}
    model = untrained(settings, tokenizer)
    logger.info("language model: %.2f M parameters, %d rows", model.num_parameters() / 1e6, len(rows["train"]))
    return TrainingPlan(
        model,
        Objective(task=TaskTerm(TASK_LOSS_OF["generation"])),
        rows["train"],
        rows["validation"],
        Collator(int(tokenizer.pad_token_id)),
        ValidationMetrics("nll"),
        "language model",
    )


def timed(settings: TeacherSettings, documents: Documents, num_steps: int) -> str:
    """The pace of the training over this many steps, and how long it takes as a whole, in words."""
    with TemporaryDirectory() as folder:
        plan = _training_plan(settings, documents)
        seconds = []
        for index, steps in enumerate((2, 2 + num_steps)):
            began = time.perf_counter()
            arguments = training_arguments(Path(folder, str(index)), _run_settings(settings, steps), num_rows=1)
            train(replace(plan, validation=plan.rows[:1]), None, arguments, fingerprints={})
            seconds.append(time.perf_counter() - began)
    pace, steps = (seconds[1] - seconds[0]) / num_steps, _run_settings(settings).steps(len(plan.rows))
    return f"{pace:.2f} s a step: {steps} steps take {pace * steps / 60:.0f} minutes, without evaluations."


def _run_settings(settings: TeacherSettings, max_steps: int | None = None) -> RunSettings:
    return RunSettings(
        max_steps=max_steps,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=0.05,
        schedule="cosine",
        warmup_ratio=0.05,
        seed=settings.seed,
        evaluations=settings.evaluations,
        metric="nll",
        precision="float32",
        keep_checkpoints=1,
    )
