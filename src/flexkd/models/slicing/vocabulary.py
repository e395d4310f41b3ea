"""A model that knows fewer tokens: embeddings, head and ids of the configs are cut together."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from flexkd.errors import VocabularyError
from flexkd.models.loading.t5_head import build_model, has_own_head

Model = TypeVar("Model", bound=PreTrainedModel)

_ID_ENDINGS: Final = ("_token_id", "_token_index")
_LISTS_OF_IDS: Final = ("suppress_tokens", "begin_suppress_tokens")
"""Keys of a generation config: lists of ids, of which absent ones can be left out."""
_SEQUENCES_OF_IDS: Final = ("bad_words_ids", "force_words_ids")


def cut_vocabulary(model: Model, token_ids: Sequence[int], *, num_tokens: int | None = None) -> Model:
    """The same model for a vocabulary that has only some of its tokens.

    Its states are those of the model on the same tokens, and its logits those of the kept tokens, bit for bit. Weights
    without a vocabulary are shared with the model, not copied.

    Args:
        token_ids: Ids of the tokens that stay, ascending; a token's new id is its place among them.
        num_tokens: Number of the tokenizer's tokens, where the model embeds more: no text holds those above; None: as
            many as the model embeds.

    Raises:
        VocabularyError: A config names a token that is not kept.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=100, bos_token_id=1, eos_token_id=2, **sizes)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> cut_vocabulary(model, [1, 2, 50]).get_input_embeddings().weight.shape
        torch.Size([3, 16])
    """
    new_ids = {number: place for place, number in enumerate(token_ids)}
    size = model.config.get_text_config().vocab_size
    limit = size if num_tokens is None else min(num_tokens, size)
    config = copy.deepcopy(model.config)
    for part in _configs(config):
        if getattr(part, "vocab_size", None) == size:
            part.vocab_size = len(token_ids)
        renumber_ids(part, new_ids, limit)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        cut = build_model(type(model), config, own_head=has_own_head(model))
    _take_weights(cut, model, torch.tensor(list(token_ids)))
    if model.can_generate():
        cut.generation_config = copy.deepcopy(model.generation_config)
        renumber_ids(cut.generation_config, new_ids, limit)
    cut.train(model.training)
    return cut


def named_ids(config: PreTrainedConfig, generation_config: GenerationConfig | None = None, *, size: int) -> set[int]:
    """Ids of tokens that the configs of a model name, as that of the end of text.

    Args:
        size: Of the vocabulary; ids outside it are left out.
    """
    parts: list[Any] = [*_configs(config), *([] if generation_config is None else [generation_config])]
    values = [value for part in parts for _, value in _entries(part)]
    ids = {number for value in values for number in (value if isinstance(value, list | tuple) else [value])}
    return {number for number in ids if 0 <= number < size}


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and that of its text part, if it has one."""
    parts = [config, config.get_text_config(), config.get_text_config(decoder=True)]
    return list({id(part): part for part in parts}.values())


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys of a config that name tokens by one id or a list of ids, and their values."""
    for key, value in config.to_dict().items():
        is_list = isinstance(value, list | tuple) and all(isinstance(entry, int) for entry in value)
        if key.endswith(_ID_ENDINGS) and (is_list or (isinstance(value, int) and not isinstance(value, bool))):
            yield key, value


def renumber_ids(config: Any, new_ids: Mapping[int, int], size: int) -> None:
    """Write new ids into a config, or into a generation config.

    Args:
        config: An id in it that no text holds, outside the vocabulary, stays.
        new_ids: New ids of the tokens that stay, by their old ones.
        size: Number of tokens before.

    Raises:
        VocabularyError: The config names a token that does not stay.
    """

    def new(key: str, number: int) -> int:
        if not 0 <= number < size:
            return number
        if number not in new_ids:
            raise VocabularyError(
                f"student.vocabulary: the teacher's {key} is token {number}, which is not kept. Keep it."
            )
        return new_ids[number]

    for key, value in list(_entries(config)):
        is_list = isinstance(value, list | tuple)
        setattr(config, key, [new(key, number) for number in value] if is_list else new(key, value))
    for key in _LISTS_OF_IDS:
        if getattr(config, key, None):
            setattr(config, key, [new_ids[number] for number in getattr(config, key) if number in new_ids])
    for key in _SEQUENCES_OF_IDS:
        if getattr(config, key, None):
            sequences = [entry for entry in getattr(config, key) if new_ids.keys() >= set(entry)]
            setattr(config, key, [[new_ids[number] for number in entry] for entry in sequences] or None)


def _take_weights(cut: PreTrainedModel, model: PreTrainedModel, index: Tensor) -> None:
    """Give a model without weights those of another, along the kept tokens; what is one weight there is one here."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    by_identity: dict[int, nn.Parameter] = {}
    for name, placeholder in list(cut.named_parameters(remove_duplicate=False)):
        whole = weights[name]
        if id(whole) not in by_identity:
            rows = _rows_of(whole.detach(), placeholder.shape, index)
            by_identity[id(whole)] = nn.Parameter(rows, requires_grad=whole.requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(cut.get_submodule(path), leaf, by_identity[id(whole)])
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, absent in list(cut.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        setattr(cut.get_submodule(path), leaf, _rows_of(buffers[name], absent.shape, index))


def _rows_of(whole: Tensor, shape: torch.Size, index: Tensor) -> Tensor:
    """A weight of the model along the kept tokens, on the axis whose length is another."""
    for axis, (length, shorter) in enumerate(zip(whole.shape, shape, strict=True)):
        if length != shorter:
            whole = whole.index_select(axis, index.to(whole.device))
    return whole
