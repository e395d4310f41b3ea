"""Models and tokenizers from a hub id, a folder or a package, and their fingerprints."""

import hashlib
import logging
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexkd.errors import UnsupportedModelError, VocabularyError
from flexkd.packages import PACKAGE_PREFIX, resolve_package_path

logger = logging.getLogger(__name__)

_PROBLEM_TYPES: Final = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def model_location(source: str) -> str:
    """A path or hub id that transformers takes.

    Raises:
        MissingDependencyError: The package of a `package:NAME/FOLDER` source is not installed.
    """
    return str(resolve_package_path(source)) if source.startswith(PACKAGE_PREFIX) else source


def _failure(where: str, source: str, error: Exception) -> UnsupportedModelError:
    folder = Path(source)
    if folder.exists():
        what = "it holds no config.json" if not (folder / "config.json").is_file() else str(error).splitlines()[0]
        return UnsupportedModelError(f"{where}: cannot load '{source}': {what}. Give the folder of a saved model.")
    reason = str(error).splitlines()[0]
    return UnsupportedModelError(
        f"{where}: '{source}' is neither a folder nor a model that could be fetched ({reason}). Check the spelling, "
        "the path and the connection; a package is written package:NAME/FOLDER."
    )


def load_config(source: str, *, where: str = "model") -> PreTrainedConfig:
    """The config of a model.

    Raises:
        UnsupportedModelError: Nothing there that can be read.
    """
    location = model_location(source)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise _failure(where, location, error) from error
    return config


def load_tokenizer(source: str, *, where: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UnsupportedModelError: Nothing there that can be read.
    """
    location = model_location(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise _failure(where, location, error) from error
    return tokenizer


class Labels(Protocol):
    """What a classifier predicts: the kind of problem, and one name for each output."""

    @property
    def problem(self) -> str:
        """`single_label`, `multi_label` or `regression`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The label of index i is names[i]."""


def label_settings(labels: Labels) -> dict[str, Any]:
    """Config entries of a classifier for these labels."""
    return {
        "problem_type": _PROBLEM_TYPES[labels.problem],
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: index for index, name in enumerate(labels.names)},
    }


def load_classifier(
    source: str,
    labels: Labels | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    seed: int = 0,
    where: str = "model",
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier, in eval mode, and the names of weights that are newly initialised.

    Args:
        source: Hub id, folder or `package:NAME/FOLDER`.
        labels: Give the head these labels; None: keep the checkpoint's own.
        dtype: Float32 by default: an optimizer's small steps round away in half precision. None: the checkpoint's.
        seed: Of newly initialised weights.
        where: Names the setting in errors.

    Raises:
        UnsupportedModelError: The model is not there, or has no sequence classification head.
    """
    location = model_location(source)
    settings = {} if labels is None else label_settings(labels)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                location,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=labels is not None,
                **settings,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _failure(where, location, error) from error
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    return model.eval(), sorted({*info["missing_keys"], *mismatched})


def fresh_classifier(source: str, labels: Labels, changes: dict[str, int], *, seed: int = 0) -> PreTrainedModel:
    """A classifier with random weights from a config, its sizes changed as asked.

    Raises:
        UnsupportedModelError: The config cannot be read or does not take the sizes.
    """
    config = load_config(source, where="student.model")
    for key, value in {**label_settings(labels), **changes}.items():
        setattr(config, key, value)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(f"student.model: '{source}': {error}. Change the sizes or the config.") from error
    model.eval()
    return model


def check_teacher_labels(teacher: PreTrainedConfig, labels: Labels) -> None:
    """Refuse a teacher whose classes are not those of the data, in the same order.

    Raises:
        VocabularyError: Another number of classes, or the same names in another order.
    """
    wanted = len(labels.names)
    if teacher.num_labels != wanted:
        raise VocabularyError(
            f"teacher.model: has {teacher.num_labels} labels where the data have {wanted} "
            f"({', '.join(labels.names[:5])}). Set teacher.fine_tune, or use another teacher."
        )
    id2label: dict[Any, str] = teacher.id2label or {}
    names = [str(id2label[index]) for index in range(wanted)]
    if sorted(names) == sorted(labels.names) and names != list(labels.names):
        raise VocabularyError(
            f"teacher.model: its labels are {names}, those of the data {list(labels.names)}: the same in "
            "another order. Set data.label_names to the teacher's order."
        )


def _backend(tokenizer: PreTrainedTokenizerBase) -> str | dict[str, int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    # Padding and truncation are settings of a call, not of the vocabulary.
    copied = type(backend).from_str(backend.to_str())
    copied.no_padding()
    copied.no_truncation()
    return str(copied.to_str())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides the ids of a text."""
    backend = _backend(tokenizer)
    text = backend if isinstance(backend, str) else repr(sorted(backend.items()))
    return hashlib.blake2b(f"{text}{tokenizer.special_tokens_map}".encode(), digest_size=16).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's weights and architecture; a changed weight changes it."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens that the model's positions hold; None where nothing is said. RoBERTa's first two are never used."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    is_offset = config.model_type in ("roberta", "xlm-roberta", "camembert")
    return int(limit) - (int(config.pad_token_id or 0) + 1 if is_offset else 0)
