"""What every run of a recipe shares: checked rows, tokenizers, encoded splits and the teacher that knows the task."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.core.scores import UnitScores
from flexkd.data.collate import Collator
from flexkd.data.encoding import Cut, Encoded, check_lengths, encode, encode_for_both, ensure_pad_token, same_tokenizer
from flexkd.data.tasks import ClassificationData, Example
from flexkd.errors import RecipeError, VocabularyError
from flexkd.models.hidden import HEAD_INPUT, model_inputs, states_and_logits
from flexkd.models.loading import (
    check_teacher_labels,
    load_classifier,
    load_config,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from flexkd.models.positions import is_rotary, position_limit
from flexkd.preflight import preflight, read_rows
from flexkd.recipe import Recipe
from flexkd.teacher.memory import RememberingTeacher
from flexkd.train.arguments import RunSettings, prefer_short_rows_attention, resolve_precision
from flexkd.train.teacher_store import fine_tuned_teacher

logger = logging.getLogger(__name__)

SPLITS: Final = ("train", "validation", "test")


@dataclass(frozen=True)
class Job:
    """Loaded once for a run, or for all cells of a comparison.

    Attributes:
        teacher: In eval mode, knows the task.
        splits: Features for the collator, by split.
        has_own_encoding: Whether the teacher reads an encoding of its own.
        fingerprints: Of teacher, tokenizers and data.
        notes: What a reader of the results has to know.
        scored: Scores that were computed, by their settings.
        remembered: Answers of the teacher, by what it was asked.
    """

    recipe: Recipe
    data: ClassificationData
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    splits: Mapping[str, list[dict[str, Any]]]
    cuts: Mapping[str, Cut]
    collator: Collator
    has_own_encoding: bool
    precision: str
    teacher_precision: str
    fingerprints: Mapping[str, str]
    notes: tuple[str, ...]
    scored: dict[str, tuple[UnitScores, ...]] = field(default_factory=dict)
    remembered: dict[str, RememberingTeacher] = field(default_factory=dict)

    def batches(
        self, split: str, *, rows: int | None = None, batch_size: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Batches of a split in its own order; of its first rows when asked."""
        size = batch_size or self.recipe.training.batch_size
        loader: DataLoader[Any] = DataLoader(
            self.splits[split][:rows],  # type: ignore[arg-type]
            batch_size=size,
            collate_fn=self.collator,
        )
        return iter(loader)

    def width(self, model: PreTrainedModel, layer: int = HEAD_INPUT, *, own: bool = False) -> int:
        """Width of a model's state at a layer, read from a forward and never from the config."""
        batch = model_inputs(model, next(self.batches("test", rows=1)), own=own)
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        with torch.no_grad():
            states, _ = states_and_logits(model, inputs, (layer,))
        return int(states[layer].shape[-1])

    def examples(self, split: str) -> Sequence[Example]:
        """The rows behind a split."""
        return getattr(self.data, split)  # type: ignore[no-any-return]

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Job":
        """The same test rows in the encoding of a model that is neither teacher nor student.

        Raises:
            VocabularyError: Its classes are not those of the data, or its tokenizer is another model's.
            DataError: It reads fewer tokens than the longest row may have.
        """
        check_teacher_labels(model.config, self.data.labels)
        _check_positions({"the model": model.config}, self.recipe.data.max_length)
        ensure_pad_token(tokenizer)
        model.config.pad_token_id = tokenizer.pad_token_id
        encoded = encode(self.data.test, tokenizer, labels=self.data.labels, max_length=self.recipe.data.max_length)
        splits = {"test": encoded.features}
        check_ids(model, splits, where="evaluate")
        collator = Collator(int(tokenizer.pad_token_id))
        return replace(self, tokenizer=tokenizer, splits=splits, collator=collator, has_own_encoding=False)


def prepare(recipe: Recipe) -> Job:
    """Check everything that can be checked, then load rows, tokenizers and the teacher.

    Raises:
        FlexKDError: Whatever is wrong with recipe, rows or models, before anything is trained.
    """
    _check_processes()
    found = preflight(recipe)
    found.raise_errors()
    notes = list(found.notes)
    for note in notes:
        logger.warning("%s", note)
    data = found.data or read_rows(recipe)
    teacher_tokenizer, tokenizer = _tokenizers(recipe)
    notes += filter(None, map(ensure_pad_token, {id(t): t for t in (teacher_tokenizer, tokenizer)}.values()))
    sources = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    configs = {name: load_config(source, where=f"{name}.model") for name, source in sources.items() if source}
    _check_positions(configs, recipe.data.max_length)
    encoded = {split: _encode(recipe, data, split, tokenizer, teacher_tokenizer) for split in SPLITS}
    own = not same_tokenizer(tokenizer, teacher_tokenizer)
    pads = {t.pad_token_id for t in (tokenizer, teacher_tokenizer)}
    assert None not in pads, "every tokenizer pads by now"
    precision = resolve_precision(recipe.training.precision)
    teacher_precision = resolve_precision(recipe.teacher.precision)
    collator = Collator(int(tokenizer.pad_token_id), int(teacher_tokenizer.pad_token_id) if own else None)
    teacher = _teacher(recipe, data, teacher_tokenizer, encoded, collator, own)
    teacher.config.pad_token_id = teacher_tokenizer.pad_token_id
    fingerprints = {
        "teacher": model_fingerprint(teacher),
        "teacher_tokenizer": tokenizer_fingerprint(teacher_tokenizer),
        "student_tokenizer": tokenizer_fingerprint(tokenizer),
        "data": data.fingerprint,
        "max_length": str(recipe.data.max_length),
    }
    return Job(
        recipe=recipe,
        data=data,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        teacher=teacher,
        splits={split: one.features for split, one in encoded.items()},
        cuts={split: one.cut for split, one in encoded.items()},
        collator=collator,
        has_own_encoding=own,
        precision=precision,
        teacher_precision=teacher_precision,
        fingerprints=fingerprints,
        notes=(*notes, *data.notes),
    )


def _check_processes() -> None:
    """A run folder has one writer: scores, records and the teacher store are not shared between processes yet."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RecipeError(
            f"{processes} processes: a recipe runs in one process in this version. Use DistillationTrainer in a script "
            "of your own under 'accelerate launch', or start one process."
        )


def _tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The teacher's and the student's; one object where both are the same."""
    teacher = load_tokenizer(recipe.teacher.tokenizer or recipe.teacher.model, where="teacher.tokenizer")
    own = recipe.student.tokenizer or (recipe.student.model if recipe.student.start == "pretrained" else None)
    if own is None:
        return teacher, teacher
    student = load_tokenizer(own, where="student.tokenizer")
    return teacher, teacher if same_tokenizer(teacher, student) else student


def _check_positions(configs: Mapping[str, PreTrainedConfig], max_length: int) -> None:
    limits: dict[bool, dict[str, int | None]] = {True: {}, False: {}}
    for name, config in configs.items():
        plain = config.to_dict()
        limits[is_rotary(plain)][name] = position_limit(plain)
    check_lengths(max_length, limits[False], soft_limits=limits[True])


def check_ids(model: PreTrainedModel, splits: Mapping[str, Sequence[Mapping[str, Any]]], *, where: str) -> None:
    """Refuse rows with ids that a model has no embedding for.

    Raises:
        VocabularyError: The tokenizer is another model's.
    """
    largest = max(max(row["input_ids"]) for rows in splits.values() for row in rows)
    size = next(model.get_input_embeddings().parameters()).shape[0]
    if largest >= size:
        raise VocabularyError(
            f"{where}: its tokenizer gives the id {largest}, but it embeds {size} tokens. Name the tokenizer that it "
            "was made with."
        )


def _encode(
    recipe: Recipe,
    data: ClassificationData,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    examples: tuple[Example, ...] = getattr(data, split)
    return encode_for_both(
        examples, tokenizer, teacher_tokenizer, labels=data.labels, max_length=recipe.data.max_length
    )


def _teacher(
    recipe: Recipe,
    data: ClassificationData,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Mapping[str, Encoded],
    collator: Collator,
    own: bool,
) -> PreTrainedModel:
    section, where = recipe.teacher, "teacher.model"
    rows = {split: _own_features(one.features, own) for split, one in encoded.items()}
    if section.fine_tune is None:
        check_teacher_labels(load_config(section.model, where=where), data.labels)
        teacher, fresh = load_classifier(section.model, dtype=None, where=where)
        check_ids(teacher, rows, where=where)
        if fresh:
            logger.warning(
                "teacher.model: weights %s are new, so that it teaches chance. Set teacher.fine_tune.", fresh
            )
        prefer_short_rows_attention([teacher], recipe.data.max_length)
        return teacher
    settings = RunSettings(
        metric=recipe.task.metric,
        precision=resolve_precision(section.precision),
        keep_checkpoints=1,
        **section.fine_tune.model_dump(),
    )
    base, _ = load_classifier(section.model, data.labels, seed=settings.seed, where=where)
    base.config.pad_token_id = tokenizer.pad_token_id
    check_ids(base, rows, where=where)
    prefer_short_rows_attention([base], recipe.data.max_length)
    teacher_collator = Collator(int(tokenizer.pad_token_id)) if own else collator
    return fine_tuned_teacher(
        base,
        tokenizer,
        train=[row for row in rows["train"] if _has_label(row["labels"])],
        validation=rows["validation"],
        collator=teacher_collator,
        settings=settings,
        problem=recipe.task.problem,
        fingerprints={"data": data.fingerprint, "max_length": str(recipe.data.max_length)},
    )


def _own_features(features: list[dict[str, Any]], own: bool) -> list[dict[str, Any]]:
    """The teacher's encoding of rows as if it were the only one."""
    if not own:
        return features
    plain = ("id", "labels")
    return [
        {
            key.removeprefix("teacher_"): value
            for key, value in row.items()
            if key in plain or key.startswith("teacher_")
        }
        for row in features
    ]


def _has_label(label: Any) -> bool:
    values = label if isinstance(label, list) else [label]
    return all(value == value and value != -100 for value in values)
