"""GGUF files as ordinary model folders: dequantized once into the cache of this machine, then loaded from there."""

import contextlib
import functools
import hashlib
import io
import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.files import writing
from flexkd.home import home_folder
from flexkd.models.forward.quiet import first_line, quiet
from flexkd.models.loading.gguf_files import read_gguf_config
from flexkd.models.loading.loaded_weights import check_loaded
from flexkd.packages import require_package

logger = logging.getLogger(__name__)

_FORM: Final = "1"
"""Changes when the content of a converted folder changes."""

_READERS: Final = ("transformers", "gguf")


def converted_folder(file: Path, *, where: str) -> Path:
    """The folder with model, tokenizer and chat template of a GGUF file, in float32; converted on the first call.

    It lies in `home_folder("models")` under the hash of the file and of the versions of the packages that read it, so
    that another file is another model, and what an older version read is not used by a newer one.

    Raises:
        MissingDependencyError: The package `gguf` is not installed.
        UnsupportedModelError: The file is damaged, or no architecture that transformers reads from GGUF.
    """
    require_package("gguf", where, "a model stored as GGUF")
    status = file.stat()
    folder = home_folder("models") / _hash(file.resolve(), status.st_size, status.st_mtime_ns)
    if folder.is_dir():
        return folder
    read_gguf_config(file, where=where)
    logger.info("%s: converting '%s' once, into %s", where, file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        with writing(folder):
            _convert(file, unfinished, where)
        # Another process may have been quicker: its folder holds the same.
        with contextlib.suppress(OSError):
            unfinished.rename(folder)
    except FlexKDError:
        raise
    except Exception as error:  # what the readers raise on a damaged file is no fixed set
        raise UnsupportedModelError(
            f"{where}: '{file}' cannot be converted: {first_line(error)}. Give the folder of a model that was saved "
            "with transformers."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not folder.is_dir():
        raise UnsupportedModelError(f"{where}: '{folder}' cannot be written. Free some space, or set FLEXKD_HOME.")
    return folder


@functools.cache
def _hash(file: Path, size: int, changed: int) -> str:
    """Hash of the content and its readers; a change of size or time makes the cache read the file again."""
    readers = " ".join([_FORM, *(f"{name} {version(name)}" for name in _READERS)])
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(readers.encode(), digest_size=16))
    return digest.hexdigest()


def _convert(file: Path, folder: Path, where: str) -> None:
    builder: Any = AutoModelForCausalLM
    # Its bar cannot be switched off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model, info = builder.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        check_loaded(model, info, source=str(file), where=where)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        # What its maker called the file is no part of a model.
        vars(model.config).pop("_model_name_or_path", None)
        model.save_pretrained(folder)
