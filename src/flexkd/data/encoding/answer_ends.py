"""The tokens that end an answer, as named by the checkpoint, its tokenizer and the prompt format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexkd.errors import UnsupportedModelError, VocabularyError

if TYPE_CHECKING:  # `check` reads checkpoints with this module without loading transformers
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.eos_token_id"
_CONFIG = "config.eos_token_id"


@dataclass(frozen=True)
class CheckpointEnds:
    """The end tokens that a checkpoint names.

    Attributes:
        ids: Token ids from `generation_config` or, where it names none, from the config.
        where: Which of the two names them.
        is_default: The ids are only defaults of the config's class, so that they may be words of the vocabulary.
        strings: Stop strings, which would end an answer in plain `generate`; here only tokens do.
    """

    ids: tuple[int, ...] = ()
    where: str = _CONFIG
    is_default: bool = False
    strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerEnds:
    """The tokens that end an answer.

    Attributes:
        ids: The token that training appends to answers comes first.
        notes: What a reader of the results should know about them.
    """

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def checkpoint_ends(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], *, default: object = None, where: str = "model"
) -> CheckpointEnds:
    """The end tokens that a checkpoint names, as plain `generate` of transformers reads them.

    Args:
        generation_config: Content of generation_config.json; empty where there is none.
        config: Content of config.json, without the defaults of its class.
        default: `eos_token_id` by default of the config's class.
        where: Names the model in errors.

    Raises:
        UnsupportedModelError: An end token is not given as a number.
    """
    generation_ids = _ids(generation_config.get("eos_token_id"), f"{where}: {_GENERATION}")
    config_ids = _ids(_config_eos(config), f"{where}: {_CONFIG}")
    default_ids = _ids(default, f"{where}: {_CONFIG}")
    # Transformers writes a generation_config for a model that has none, out of its config.
    is_copy = bool(generation_config.get("_from_model_config")) and generation_ids == default_ids
    texts = generation_config.get("stop_strings") or ()
    strings = (texts,) if isinstance(texts, str) else tuple(map(str, texts))
    if generation_ids and (config_ids or not is_copy):
        return CheckpointEnds(generation_ids, _GENERATION, strings=strings)
    if config_ids:
        return CheckpointEnds(config_ids, _CONFIG, strings=strings)
    return CheckpointEnds(default_ids, _CONFIG, is_default=True, strings=strings)


def answer_ends(
    stop_token: str,
    tokenizer: "PreTrainedTokenizerBase",
    checkpoint: CheckpointEnds,
    *,
    num_tokens: int,
    where: str = "model",
) -> AnswerEnds:
    """All tokens that end an answer of a model: generation stops at each, and none is part of the text.

    Args:
        stop_token: The token that training appends to answers: a chat template's end of turn, or the end of text.
        num_tokens: Number of tokens that the model embeds.
        where: Names the model in notes.

    Raises:
        VocabularyError: The tokenizer gives the stop token an id that the model does not embed.
    """
    stop = tokenizer.convert_tokens_to_ids(stop_token)
    assert isinstance(stop, int), "one token has one id"
    if not 0 <= stop < num_tokens:
        raise VocabularyError(
            f"{where}: answers end with '{stop_token}' (id {stop}), but it embeds {num_tokens} tokens. Name the "
            "tokenizer that it was made with."
        )
    notes: list[str] = []
    special = _special_ids(tokenizer)
    checkpoint_ids = []
    for token in checkpoint.ids:
        if checkpoint.is_default and token not in special:
            continue
        if not 0 <= token < num_tokens:
            notes.append(f"{where}: {checkpoint.where}: {token} is none of its {num_tokens} tokens, and ends nothing.")
        else:
            checkpoint_ids.append(token)
            if token not in special:
                shown = tokenizer.convert_ids_to_tokens(token)
                notes.append(
                    f"{where}: {checkpoint.where}: {token} ({shown!r}) is an ordinary token of the tokenizer, and "
                    "answers end there, as the checkpoint says."
                )
    if checkpoint_ids and not checkpoint.is_default and stop not in checkpoint_ids:
        notes.append(
            f"{where}: {checkpoint.where} is {checkpoint_ids}, and rows teach answers to end with '{stop_token}' "
            f"(id {stop}). Each of them ends an answer."
        )
    if checkpoint.strings:
        notes.append(
            f"{where}: generation_config.stop_strings {list(checkpoint.strings)} are not used: answers end at tokens."
        )
    end_of_text = tokenizer.eos_token_id
    ends = [stop, *([] if end_of_text is None else [int(end_of_text)]), *checkpoint_ids]
    return AnswerEnds(tuple(dict.fromkeys(ends)), tuple(notes))


def ensure_end_token(tokenizer: "PreTrainedTokenizerBase", checkpoint: CheckpointEnds) -> str | None:
    """Give a tokenizer without an end of text the first end token of its checkpoint; the vocabulary never grows.

    Returns:
        The choice, for the log; None where the tokenizer has an end of text or the checkpoint names none of its tokens.
    """
    if tokenizer.eos_token is not None:
        return None
    special = _special_ids(tokenizer)
    trusted = [token for token in checkpoint.ids if not checkpoint.is_default or token in special]
    token = next((token for token in trusted if 0 <= token < len(tokenizer)), None)
    if token is None:
        return None
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(token))
    return (
        f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: it names no end of text; '"
        f"{tokenizer.eos_token}' (id {token}) is taken, as {checkpoint.where} says."
    )


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _config_eos(config: Mapping[str, Any]) -> object:
    """`eos_token_id` of a config; in a config of several models, that of the model that writes text."""
    parts = (config, *(config.get(name) for name in ("text_config", "decoder")))
    values = (part.get("eos_token_id") for part in parts if isinstance(part, Mapping))
    return next((value for value in values if value is not None), None)


def _ids(value: object, where: str) -> tuple[int, ...]:
    """Token ids of a setting that is one number, a list or None; -1 is an old way to write None."""
    values: Sequence[object] = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in values:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UnsupportedModelError(f"{where}: {value!r} are no token ids. Give the number of a token, or a list.")
    return tuple(dict.fromkeys(int(str(token)) for token in values if token != -1))
