"""Models stored as one GGUF file: where it is, and the config in its header, read without any library."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from flexkd.errors import UnsupportedModelError
from flexkd.facts.names import CONFIG_FILE, GGUF_ENDING

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_VERSIONS: Final = (2, 3)

_SIZES: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_TOKENS: Final = {
    "tokenizer.ggml.tokens": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def find_gguf(path: Path, *, where: str) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without a config.json; else None.

    Raises:
        UnsupportedModelError: The folder holds several, and nothing says which.
    """
    if path.suffix == GGUF_ENDING and path.is_file():
        return path
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return None
    files = sorted(path.glob(f"*{GGUF_ENDING}"))
    if len(files) > 1:
        raise UnsupportedModelError(
            f"{where}: '{path}' holds {len(files)} GGUF files ({', '.join(file.name for file in files[:4])}). "
            "Name one of them."
        )
    return files[0] if files else None


def read_gguf_config(file: Path, *, where: str) -> Mapping[str, Any]:
    """What a config.json would say of a model in a GGUF file: architecture, sizes, positions, vocabulary, special ids.

    The words of the vocabulary are skipped over, so that this takes a tenth of a second.

    Raises:
        UnsupportedModelError: No GGUF file, a cut one, or a header that names no architecture.

    Source:
        The GGUF specification, docs/gguf.md of ggml.
    """
    try:
        with file.open("rb") as stream:
            header = _read_header(stream)
        architecture = str(header["general.architecture"])
    except (OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
        reason = f"its header ends early or cannot be read ({error})"
        raise UnsupportedModelError(f"{where}: '{file}': {reason}. Fetch the file again.") from None
    config = {config_key: header[gguf_key] for gguf_key, config_key in _TOKENS.items() if gguf_key in header}
    sizes = {f"{architecture}.{gguf_key}": config_key for gguf_key, config_key in _SIZES.items()}
    config.update({config_key: header[gguf_key] for gguf_key, config_key in sizes.items() if gguf_key in header})
    return {"model_type": architecture, "architectures": [f"{architecture.capitalize()}ForCausalLM"], **config}


def _read_header(stream: BinaryIO) -> dict[str, Any]:
    """Values by key; of an array, its length."""
    magic, version = stream.read(4), _number(stream, "I")
    if magic != b"GGUF" or version not in _VERSIONS:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    _number(stream, "Q")
    return {_string(stream): _value(stream, _number(stream, "I")) for _ in range(_number(stream, "Q"))}


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _number(stream, _NUMBERS[kind])
    inner, length = _number(stream, "I"), _number(stream, "Q")
    if inner in _NUMBERS:
        stream.seek(length * struct.calcsize(_NUMBERS[inner]), 1)
    else:
        for _ in range(length):
            _value(stream, inner) if inner == _ARRAY else stream.seek(_number(stream, "Q"), 1)
    return length


def _number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]


def _string(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "Q")).decode("utf-8")
