"""The tokens that end an answer: what the checkpoint, its tokenizer and the layout of its prompts say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexkd.errors import UnsupportedModelError, VocabularyError

if TYPE_CHECKING:  # `check` reads checkpoints by this module without loading transformers
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.eos_token_id"
_CONFIG = "config.eos_token_id"


@dataclass(frozen=True)
class CheckpointEnds:
    """The ends that a checkpoint names.

    Attributes:
        ids: What `generation_config` says or, where it names none, the config; in that order.
        where: Which of the two.
        is_default: Only the config's class says so, not the checkpoint: an id that may be a word of its vocabulary.
        strings: Texts that would end an answer in plain `generate`; here only tokens do.
    """

    ids: tuple[int, ...] = ()
    where: str = _CONFIG
    is_default: bool = False
    strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerEnds:
    """The tokens that end an answer, the one that training appends first, and what a reader has to know of them."""

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def checkpoint_ends(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], *, default: object = None, where: str = "model"
) -> CheckpointEnds:
    """The ends that a checkpoint names, as plain `generate` of transformers reads them.

    Args:
        generation_config: Content of generation_config.json; empty where there is none.
        config: Content of config.json, without what only its class says.
        default: What the config's class says of `eos_token_id` where the config is silent.
        where: Names the model in errors.

    Raises:
        UnsupportedModelError: An end is no number.
    """
    said = _ids(generation_config.get("eos_token_id"), f"{where}: {_GENERATION}")
    configured = _ids(_of_config(config), f"{where}: {_CONFIG}")
    by_default = _ids(default, f"{where}: {_CONFIG}")
    # Transformers writes a generation_config for a model that has none, out of its config.
    is_copy = bool(generation_config.get("_from_model_config")) and said == by_default
    texts = generation_config.get("stop_strings") or ()
    strings = (texts,) if isinstance(texts, str) else tuple(map(str, texts))
    if said and (configured or not is_copy):
        return CheckpointEnds(said, _GENERATION, strings=strings)
    if configured:
        return CheckpointEnds(configured, _CONFIG, strings=strings)
    return CheckpointEnds(by_default, _CONFIG, is_default=True, strings=strings)


def answer_ends(
    stop_token: str,
    tokenizer: "PreTrainedTokenizerBase",
    checkpoint: CheckpointEnds,
    *,
    num_tokens: int,
    where: str = "model",
) -> AnswerEnds:
    """All tokens that end an answer of a model: generation stops at each, and each is no part of the text.

    Args:
        stop_token: What training appends to an answer: a chat template's end of turn, or the end of text.
        tokenizer: The model's.
        checkpoint: Of the model.
        num_tokens: That the model embeds.
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
    named = []
    for token in checkpoint.ids:
        if checkpoint.is_default and token not in special:
            continue
        if not 0 <= token < num_tokens:
            notes.append(f"{where}: {checkpoint.where}: {token} is none of its {num_tokens} tokens, and ends nothing.")
        else:
            named.append(token)
            if token not in special:
                shown = tokenizer.convert_ids_to_tokens(token)
                notes.append(
                    f"{where}: {checkpoint.where}: {token} ({shown!r}) is an ordinary token of the tokenizer, and "
                    "answers end there, as the checkpoint says."
                )
    if named and not checkpoint.is_default and stop not in named:
        notes.append(
            f"{where}: {checkpoint.where} is {named}, and rows teach answers to end with '{stop_token}' (id {stop}). "
            "Each of them ends an answer."
        )
    if checkpoint.strings:
        notes.append(
            f"{where}: generation_config.stop_strings {list(checkpoint.strings)} are not used: answers end at tokens."
        )
    end_of_text = tokenizer.eos_token_id
    ends = [stop, *([] if end_of_text is None else [int(end_of_text)]), *named]
    return AnswerEnds(tuple(dict.fromkeys(ends)), tuple(notes))


def ensure_end_token(tokenizer: "PreTrainedTokenizerBase", checkpoint: CheckpointEnds) -> str | None:
    """Gives a tokenizer without an end of text the first one that its checkpoint names; the vocabulary never grows.

    Returns:
        What was chosen; None where the tokenizer has one, or the checkpoint names none of its tokens.
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


def _of_config(config: Mapping[str, Any]) -> object:
    """Of a config of several models, that of the one that writes."""
    parts = (config, *(config.get(name) for name in ("text_config", "decoder")))
    said = (part.get("eos_token_id") for part in parts if isinstance(part, Mapping))
    return next((value for value in said if value is not None), None)


def _ids(value: object, where: str) -> tuple[int, ...]:
    """Ids of a setting that is a number, several or none; -1 is an old word for none."""
    values: Sequence[object] = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in values:
        if not isinstance(token, int) or isinstance(token, bool):
            raise UnsupportedModelError(f"{where}: {value!r} are no token ids. Give the number of a token, or a list.")
    return tuple(dict.fromkeys(int(str(token)) for token in values if token != -1))
