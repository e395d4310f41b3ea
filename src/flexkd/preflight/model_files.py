"""Folders of saved models, read without loading them: what is there, and what config.json says."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.row import CLASS_SUFFIXES, Family
from flexkd.facts.families.table import FAMILIES, size_keys
from flexkd.facts.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHT_FILES,
    ADAPTERS_WITH_POSITIONS,
    CONFIG_FILE,
    HUB_ID,
    HUB_OWNER,
    SAFE_WEIGHTS,
    TOKENIZER_FILES,
    WEIGHT_ENDINGS,
    WEIGHT_FILES,
)
from flexkd.files import is_there, local_path
from flexkd.models.loading.gguf_files import find_gguf, read_gguf_config
from flexkd.models.loading.places import model_path, refuse_adapter
from flexkd.packages import require_package
from flexkd.preflight.tokenizer_files import TokenizerFile, read_tokenizer

_HUB_MODEL: Final = re.compile(rf"{HUB_ID}|{HUB_OWNER}", re.ASCII)
_LANGUAGE_SUFFIXES: Final = (*CLASS_SUFFIXES["causal"], *CLASS_SUFFIXES["seq2seq"])


@dataclass(frozen=True)
class ModelFiles:
    """A model as a recipe names it.

    Attributes:
        where: The recipe key that names it.
        source: How the recipe names it.
        folder: Where its files are; None when they are on the hub and not on this machine.
        config: Content of config.json, or what the header of a GGUF file says instead; empty without a folder.
    """

    where: str
    source: str
    folder: Path | None
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Architecture by its short name."""
        return str(self.config.get("model_type", ""))

    @property
    def family(self) -> Family | None:
        """The row of its architecture; None where it has none."""
        return FAMILIES.get(self.model_type)

    def size(self, name: str) -> int | None:
        """One of the sizes of the config by flexkd's name for it, as hidden_size."""
        value = self.config.get(size_keys(self.model_type)[name])
        return value if isinstance(value, int) else None

    @property
    def projected_width(self) -> int | None:
        """Units of the state that the head reads, where it lies behind a projection; None where that is the stream."""
        if self.family is None or not self.family.head_reads_embedding_width:
            return None
        width = self.config.get(str(self.family.embedding_key))
        return width if isinstance(width, int) and width != self.size("hidden_size") else None

    @property
    def has_final_norm(self) -> bool:
        """Whether it is a decoder whose head reads a norm of the last block that is known, and nothing else."""
        family = self.family
        if family is None or family.encoder is not None or family.final_norm is None:
            return False
        is_there = family.final_norm_key is None or bool(self.config.get(family.final_norm_key, True))
        return is_there and self.projected_width is None

    @property
    def has_config(self) -> bool:
        """Whether its config.json is on this machine; a GGUF file has none, and would have to be converted first."""
        return self.folder is not None and (self.folder / CONFIG_FILE).is_file()

    @property
    def has_classifier(self) -> bool:
        """Whether it was saved with a classification head."""
        return is_classifier(self.config)

    @property
    def has_language_head(self) -> bool:
        """Whether it was saved as a model that writes text; a GGUF file always was."""
        names = [str(name) for name in self.config.get("architectures") or ()]
        is_gguf = self.folder is not None and not self.has_config
        return is_gguf or any(name.endswith(_LANGUAGE_SUFFIXES) for name in names)


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config is that of a model with a classification head."""
    names = [str(name) for name in config.get("architectures") or ()]
    return any(suffix in name for name in names for suffix in CLASS_SUFFIXES["classification"])


def find_model(where: str, source: str, *, weights: bool) -> ModelFiles:
    """Look for a model on this machine and read its config.json, or the header of its GGUF file.

    Args:
        where: The recipe key, for messages.
        weights: Whether a folder without weights is of no use.

    Raises:
        UnsupportedModelError: A folder that is missing or no saved model, a GGUF file that cannot be read.
        MissingDependencyError: The package of a package: source, or the one that reads GGUF, is not installed.
        DataError: The package holds no such folder.
    """
    folder = _folder(where, source)
    if folder is None:
        return ModelFiles(where, source, None, {})
    gguf = find_gguf(folder, where=where)
    if gguf is not None:
        require_package("gguf", where, "a model stored as GGUF")
        return ModelFiles(where, source, gguf.parent, read_gguf_config(gguf, where=where))
    if weights:
        refuse_adapter(where, folder)
    config = _read_config(where, source, folder)
    # A config may name a file of its own.
    if weights and not any(
        (folder / name).exists() for name in (config.get("transformers_weights"), *WEIGHT_FILES) if name
    ):
        raise _no_weights_error(where, source, folder, SAFE_WEIGHTS)
    return ModelFiles(where, source, folder, config)


def check_tokenizer(where: str, source: str) -> TokenizerFile | None:
    """Refuse a folder on this machine that holds no tokenizer; its tokenizer.json where it has one.

    Raises:
        UnsupportedModelError: No such folder, no tokenizer in it, or a damaged one.
    """
    folder = _folder(where, source)
    if folder is None:
        return None
    tokenizer = read_tokenizer(folder, where=where) if folder.is_dir() else None
    if tokenizer is not None or folder.parent.name == "snapshots":
        return tokenizer  # a cached model may lack files that were never asked for
    if not any((folder / name).exists() for name in TOKENIZER_FILES) and find_gguf(folder, where=where) is None:
        raise UnsupportedModelError(f"{where}: '{source}' holds no tokenizer (as tokenizer.json). Name one that does.")
    return None


def tokenizer_folder(where: str, source: str) -> Path | None:
    """The folder that holds a tokenizer's files; None where they are not on this machine, or inside a GGUF file.

    Raises:
        FlexKDError: As `find_model`.
    """
    folder = _folder(where, source)
    return folder if folder is not None and find_gguf(folder, where=where) is None else None


def check_adapter(where: str, source: str) -> None:
    """Refuse what cannot be the adapter of a teacher; one on the hub that is not on this machine is not looked at.

    Raises:
        UnsupportedModelError: No such folder, no adapter in it, or one that adds positions instead of weights.
        MissingDependencyError: PEFT, or the package of a package: source, is not installed.
        DataError: The package holds no such folder.
    """
    require_package("peft", where, "an adapter")
    folder = _folder(where, source)
    if folder is None:
        return
    try:
        kind = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UnsupportedModelError(
            f"{where}: '{source}' holds no adapter_config.json that names a peft_type. Give the folder of an adapter "
            "that PEFT saved."
        ) from None
    if kind in ADAPTERS_WITH_POSITIONS:
        raise UnsupportedModelError(
            f"{where}: '{source}' is of kind {kind}, which adds positions and no weights. Give a LoRA adapter, or a "
            "merged model."
        )
    # One in the cache of the hub may lack files that a run fetches.
    if folder.parent.name != "snapshots" and not any((folder / name).exists() for name in ADAPTER_WEIGHT_FILES):
        raise _no_weights_error(where, source, folder, ADAPTER_WEIGHT_FILES[0])


def _no_weights_error(where: str, source: str, folder: Path, name: str) -> UnsupportedModelError:
    kind = "adapter" if name in ADAPTER_WEIGHT_FILES else "model"
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (*WEIGHT_ENDINGS, ".pt", ".h5"))
    listing = f", only {', '.join(others[:5])}" if others else ""
    return UnsupportedModelError(
        f"{where}: '{source}' holds no weights (as {name}){listing}. Give the folder of a saved {kind}."
    )


def adapter_folder(where: str, source: str) -> Path | None:
    """Where the files of an adapter are; None for a hub id."""
    return _folder(where, source)


def _folder(where: str, source: str) -> Path | None:
    """The folder or GGUF file of a model, None for a hub id that is not in the local cache."""
    path = model_path(source, where=where)
    if path.is_dir() or find_gguf(path, where=where) is not None:
        return path
    if is_there(path):
        raise UnsupportedModelError(f"{where}: '{source}' is a file. Give the folder of a saved model.")
    if _HUB_MODEL.fullmatch(source):
        return _cached(source)
    if path.is_symlink():
        raise UnsupportedModelError(
            f"{where}: '{source}' is a link to '{path.readlink()}', which is not there. Correct it."
        )
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    closest = difflib.get_close_matches(path.name, beside, n=1)
    meant = f" Did you mean '{path.parent / closest[0]}'?" if closest else " Correct the path, or give a hub id."
    raise UnsupportedModelError(f"{where}: no folder '{source}'.{meant}")


def _cached(hub_id: str) -> Path | None:
    """Where the hub's own cache keeps the main version of a model."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = local_path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"), where="HF_HUB_CACHE")
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if (snapshot / CONFIG_FILE).exists() else None


def _read_config(where: str, source: str, folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG_FILE
    if not file.exists():
        raise UnsupportedModelError(f"{where}: '{source}' holds no config.json. Give the folder of a saved model.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{where}: {file} is not JSON ({error}). Save the model again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnsupportedModelError(f"{where}: {file} names no model_type. Save the model with transformers.")
    return config
