"""Models and tokenizers from a hub id, a folder or a package, and their fingerprints."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.table import traits_of
from flexkd.facts.losses import TASK_LOSS_FACTS, TASK_LOSS_OF
from flexkd.facts.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from flexkd.files import is_there
from flexkd.models.forward.quiet import first_line, quiet
from flexkd.models.loading.conversion import converted_folder
from flexkd.models.loading.gguf_files import find_gguf
from flexkd.models.loading.loaded_weights import Head, check_loaded
from flexkd.models.loading.places import model_path, refuse_adapter

logger = logging.getLogger(__name__)

_OUTSIDE_OF_FINGERPRINT: Final = ("transformers_version", "architectures", "dtype", "use_cache")
"""Config entries that saving changes, or that change no output."""

NO_CODE: Final = False
"""Of `trust_remote_code`: by default transformers asks at the terminal whether to run what a model brings."""


def model_location(source: str, *, where: str) -> str:
    """A path or hub id that transformers takes; for a GGUF file, the folder it was converted into.

    Raises:
        UnsupportedModelError: A file that is no GGUF, where a folder is meant; a GGUF file that cannot be read.
        MissingDependencyError: The package of a `package:NAME/FOLDER` source, or the one that reads GGUF, is not
            installed.
        DataError: The package holds no such folder.
        RecipeError: A path that cannot be one.
    """
    path = model_path(source, where=where)
    gguf = find_gguf(path, where=where)
    if gguf is not None:
        return str(converted_folder(gguf, where=where))
    if path.is_file():
        raise UnsupportedModelError(f"{where}: '{source}' is a file. Give the folder of a saved model.")
    return str(path) if is_there(path) else source


def load_failure(where: str, source: str, error: Exception) -> UnsupportedModelError:
    """One error that names the setting, for whatever transformers raised."""
    if "trust_remote_code" in str(error):
        return UnsupportedModelError(
            f"{where}: '{source}' brings code of its own, which flexkd never runs. Give a model and a tokenizer that "
            "the installed transformers knows."
        )
    folder = Path(source)
    if (folder / CONFIG_FILE).is_file() or not folder.exists():
        what = first_line(error)
    elif (folder / ADAPTER_CONFIG_FILE).is_file():
        what = "it holds an adapter without its model"
    else:
        what = "it holds no config.json"
    if folder.exists():
        return UnsupportedModelError(f"{where}: cannot load '{source}': {what}. Give the folder of a saved model.")
    return UnsupportedModelError(
        f"{where}: '{source}' is neither a folder nor a model that could be fetched ({what}). Check the spelling, "
        "the path and the connection; a package is written package:NAME/FOLDER."
    )


def load_config(source: str, *, where: str = "model") -> PreTrainedConfig:
    """The config of a model.

    Raises:
        UnsupportedModelError: Nothing there that can be read.
    """
    location = model_location(source, where=where)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, trust_remote_code=NO_CODE)
    except Exception as error:  # what the loaders raise on a damaged file is no fixed set
        raise load_failure(where, location, error) from error
    return config


def load_tokenizer(source: str, *, where: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UnsupportedModelError: Nothing there that can be read.
    """
    location = model_location(source, where=where)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, trust_remote_code=NO_CODE)
    except Exception as error:  # as in load_config
        raise load_failure(where, location, error) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Without its files, transformers makes one that knows no word.
        raise UnsupportedModelError(f"{where}: '{source}' holds no tokenizer (as tokenizer.json). Name one that does.")
    return tokenizer


@runtime_checkable
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
        "problem_type": TASK_LOSS_FACTS[TASK_LOSS_OF[labels.problem]].problem_type,
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: index for index, name in enumerate(labels.names)},
    }


def load_classifier(
    source: str,
    labels: Labels | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    head: Head | None = None,
    seed: int = 0,
    where: str = "model",
) -> tuple[PreTrainedModel, list[str]]:
    """A sequence classifier, in eval mode, and the names of the weights of its head that are newly initialised.

    Args:
        source: Hub id, folder or `package:NAME/FOLDER`.
        labels: Give the head these labels; None: keep the checkpoint's own.
        dtype: Float32 by default: an optimizer's small steps round away in half precision. None: the checkpoint's.
        head: Where the head comes from: with labels, by default, a training that follows, else the checkpoint.
        seed: Of newly initialised weights.
        where: Names the setting in errors.

    Raises:
        UnsupportedModelError: The model is not there, is damaged, lacks weights, or has no sequence classification
            head.
    """
    location = model_location(source, where=where)
    refuse_adapter(where, location)
    settings = {} if labels is None else label_settings(labels)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                location,
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
                trust_remote_code=NO_CODE,
                ignore_mismatched_sizes=True,  # judged below, with names and both shapes
                **settings,
            )
    except Exception as error:  # as in load_config
        raise load_failure(where, location, error) from error
    head = head or ("stored" if labels is None else "trained")
    return model.eval(), check_loaded(model, info, source=source, where=where, head=head)


def fresh_classifier(source: str, labels: Labels, changes: dict[str, int], *, seed: int = 0) -> PreTrainedModel:
    """A classifier with random weights from a config, its sizes changed as asked.

    Raises:
        UnsupportedModelError: The config cannot be read or does not take the sizes.
    """
    changed = {**label_settings(labels), **changes}
    return fresh_model(AutoModelForSequenceClassification, source, changes=changed, seed=seed)


def fresh_model(
    builder: Any, source: str, config: PreTrainedConfig | None = None, *, changes: Mapping[str, Any], seed: int
) -> PreTrainedModel:
    """A model with random float32 weights, in eval mode.

    Args:
        builder: The Auto class that makes it.
        source: Where the config comes from.
        config: The config, where it was loaded already.
        changes: Config keys that are set before.
        seed: Of the weights; the caller's random numbers stay.

    Raises:
        UnsupportedModelError: The config cannot be read or does not take the changes.
    """
    config = load_config(source, where="student.model") if config is None else config
    for key, value in changes.items():
        setattr(config, key, value)
    leave_out_foreign_pad(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = builder.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(f"student.model: '{source}': {error}. Change the sizes or the config.") from error
    model.eval()
    return model


def leave_out_foreign_pad(config: PreTrainedConfig) -> None:
    """Leave out a pad id beyond the vocabulary: that of the model that a config was made for, no row of this one's."""
    pad, text = config.pad_token_id, config.get_text_config()
    if isinstance(pad, int) and pad >= text.vocab_size:
        config.pad_token_id = 0 if traits_of(config.to_dict()).positions == "after_padding" else None


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
    """Hash of a model's weights, class and config; a changed weight, number of heads or epsilon changes it."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _OUTSIDE_OF_FINGERPRINT}
    settings = json.dumps(config, sort_keys=True, default=str)
    digest = hashlib.blake2b(f"{type(model).__name__}{settings}".encode(), digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
