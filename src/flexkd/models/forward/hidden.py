"""The hidden state of a model at a layer, read or replaced by hooks while the model runs as it always does."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import FlexKDError, ShapeError, UnsupportedModelError
from flexkd.facts.families.table import FAMILIES, TRAITS
from flexkd.facts.names import TEACHER_PREFIX
from flexkd.models.forward.quiet import first_line
from flexkd.models.forward.row_ends import check_row_ends, row_end

HEAD_INPUT: Final = -1
"""The layer number of the state that the head reads, after the final norm."""

Replace = Callable[[Tensor], Tensor]


def is_generative(model: PreTrainedModel) -> bool:
    """Whether the model predicts tokens; otherwise it classifies rows."""
    return _output_embeddings(model) is not None


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether the model reads a source with an encoder and predicts the tokens of a target with a decoder."""
    return is_generative(model) and has_decoder(model)


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether a decoder follows the encoder; it reads a target or, in a classifier, the row once more."""
    return bool(model.config.is_encoder_decoder)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts each next token of the text that it reads."""
    return is_generative(model) and not model.config.is_encoder_decoder


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Any], *, as_teacher: bool = False) -> dict[str, Tensor]:
    """The entries of a batch that the model's forward takes, without labels.

    The decoder of an encoder-decoder reads the labels, moved by one position as the model itself does it.

    Args:
        model: Decides by its signature: a DistilBERT gets no `token_type_ids` where a BERT does.
        batch: As the collator made it.
        as_teacher: Take the entries of the teacher's own encoding (`teacher_input_ids`, ...) where the batch has them.
    """
    accepted = _parameter_names(type(model).forward)
    if as_teacher and f"{TEACHER_PREFIX}input_ids" in batch:
        batch = {k.removeprefix(TEACHER_PREFIX): v for k, v in batch.items() if k.startswith(TEACHER_PREFIX)}
    inputs = {key: value for key, value in batch.items() if key in accepted and key != "labels"}
    _check_row_ends(model, inputs)
    if is_encoder_decoder(model) and "decoder_input_ids" not in inputs:
        inputs |= _decoder_inputs(model, batch["labels"])
    return inputs


def _row_end(model: PreTrainedModel) -> int | None:
    """The id at which a classifier that is an encoder-decoder reads its row; None for every other model."""
    traits = TRAITS.get(model.config.model_type)
    if traits is None or not traits.reads_row_end or is_generative(model):
        return None
    return row_end(model.config.to_dict(), where=type(model).__name__)


def _check_row_ends(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    end = _row_end(model) if "input_ids" in inputs else None
    if end is not None:
        check_row_ends((inputs["input_ids"] == end).sum(1).tolist(), end, where=type(model).__name__)


@cache
def _parameter_names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _decoder_inputs(model: PreTrainedModel, labels: Int[Tensor, "batch target"]) -> dict[str, Tensor]:
    shift: Any = model.prepare_decoder_input_ids_from_labels
    counts = labels != IGNORE_INDEX
    # Everything up to the last label is read; what follows is padding.
    real = counts.flip(1).cummax(1).values.flip(1)
    return {"decoder_input_ids": shift(labels=labels), "decoder_attention_mask": real.long()}


def token_mask(inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch seq"]:
    """Real tokens of a batch, of the target where there is one; all of them where there is no mask."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    mask = inputs.get(f"{prefix}attention_mask")
    return torch.ones_like(inputs[f"{prefix}input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def supervised_mask(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor | None
) -> Bool[Tensor, "batch seq"]:
    """Positions whose state is read for a label.

    Causal models: real token t where the label of t + 1 counts. Encoder-decoders: position t of the target where label
    t counts. Classifiers: the one position that the head reads, or, where it reads their mean, all real tokens.
    """
    tokens = token_mask(inputs)
    if is_encoder_decoder(model):
        assert labels is not None, "an encoder-decoder has a label for each position of the target"
        return labels != IGNORE_INDEX
    if is_causal(model):
        assert labels is not None, "a causal model has a label for each token"
        mask = torch.zeros_like(tokens)
        # With left padding, the padding before the first token must not predict it.
        mask[:, :-1] = (labels[:, 1:] != IGNORE_INDEX) & tokens[:, :-1]
        return mask
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    end = _row_end(model)
    if end is not None:
        return positions == torch.where(inputs["input_ids"] == end, positions, -1).amax(1)[:, None]
    reads = _reads(model)
    if reads == "all":
        return tokens
    if reads == "first":
        return (positions == 0).expand_as(tokens)
    ids, pad = inputs["input_ids"], model.config.pad_token_id
    # The classifiers of causal families look for the rightmost id that is not the padding id, not at the mask; they
    # take the first position of a row of padding ids alone, and the last one where there is no padding id.
    last = torch.where(torch.ones_like(tokens) if pad is None else ids != pad, positions, 0).amax(1)
    return positions == last[:, None]


def states_at(
    states: Float[Tensor, "batch seq *hidden"], positions: Bool[Tensor, "batch seq"] | Int[Tensor, " positions"]
) -> Float[Tensor, "positions *hidden"]:
    """States at positions: a mask, or indices of the flattened batch, whose number is known without a device sync."""
    flat = states.flatten(0, 1)
    return flat[positions.flatten()] if positions.dtype == torch.bool else flat.index_select(0, positions)


def prediction_labels(model: PreTrainedModel, labels: Tensor, supervised: Bool[Tensor, "batch seq"] | None) -> Tensor:
    """The label of each prediction: of each supervised position of a language model, of each row of a classifier."""
    if not is_generative(model):
        return labels
    assert supervised is not None, "a language model predicts at its supervised positions"
    return labels[:, 1:][supervised[:, :-1]] if is_causal(model) else labels[supervised]


def _reads(model: PreTrainedModel) -> str:
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: which position its head reads is not known. Use positions 'tokens'."
        )
    return family.read_positions(model.config)


def num_layers(model: PreTrainedModel) -> int:
    """Blocks that a state passes, of an encoder-decoder those of its decoder; layers are numbered 1..N."""
    depth = _depth(model)
    return len(model_blocks(model)) if depth is None else depth


def _depth(model: PreTrainedModel) -> int | None:
    keys = ("num_decoder_layers", "decoder_layers") if has_decoder(model) else ()
    depths: list[int] = [
        depth for key in (*keys, "num_hidden_layers") if (depth := getattr(model.config, key, None)) is not None
    ]
    return depths[0] if depths else None


def model_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks that a state passes, of an encoder-decoder those of its decoder.

    Raises:
        UnsupportedModelError: They cannot be told from other lists of modules.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is not None and not has_decoder(model):
        blocks = model.get_submodule(family.stack.path)
        assert isinstance(blocks, nn.ModuleList), family.blocks
        return blocks
    # Through the body of a classifier, since transformers does not find the decoder of every classifier.
    whole: Any = model if is_generative(model) else model.base_model
    body: nn.Module = whole.get_decoder() if has_decoder(model) else model.base_model
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    # The number tells blocks from experts, and from the one block that ALBERT runs several times.
    full_lists = [blocks for blocks in lists if len(blocks) == (_depth(model) or len(blocks))]
    uniform_lists = [blocks for blocks in full_lists if len({type(block) for block in blocks}) == 1]
    if len(uniform_lists) != 1:
        raise UnsupportedModelError(f"{type(model).__name__}: no list of blocks found. Use layer -1, the head's input.")
    return uniform_lists[0]


def _last_state(model: PreTrainedModel) -> nn.Module:
    family = FAMILIES.get(model.config.model_type)
    if family is None or has_decoder(model):
        # Right where the head reads the body's output; a head that does not gets no gradient there, which is checked.
        return model.base_model
    return model.get_submodule(family.path(family.last_state))


@contextmanager
def hooked_states(
    model: PreTrainedModel, layers: Mapping[int, Replace | None]
) -> Iterator[dict[int, Float[Tensor, "batch seq hidden"]]]:
    """Within the context each forward fills the dictionary with the states at the layers; hooks are removed at its end.

    Args:
        layers: -1 for the input of the head, 1..N for the output of a block; each with None, or a function whose
            result takes the state's place in the forward. The dictionary holds what came in.

    Raises:
        ShapeError: There is no such layer.
    """
    states: dict[int, Tensor] = {}
    handles = []
    try:
        for layer, replace in layers.items():
            handles.append(_hook(model, layer, replace, states))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: PreTrainedModel, layer: int, replace: Replace | None, states: dict[int, Tensor]) -> Any:
    # Called within the model's forward: keeps the state, and returns what the rest of the forward reads in its place.
    def record(state: Tensor) -> Tensor:
        states[layer] = state
        return state if replace is None else replace(state)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (record(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return _with_state(output, record)

    head = _output_embeddings(model)
    if layer == HEAD_INPUT and head is not None:
        return head.register_forward_pre_hook(before)
    if layer == HEAD_INPUT:
        return _last_state(model).register_forward_hook(after)
    blocks = model_blocks(model)
    if not 1 <= layer <= len(blocks):
        raise ShapeError(
            f"layer: {type(model).__name__} has no layer {layer}. Layers are 1 to {len(blocks)}, the output of each "
            "block, or -1, the input of the head."
        )
    return blocks[layer - 1].register_forward_hook(after)


def _with_state(output: Any, record: Replace) -> Any:
    if isinstance(output, Tensor):
        return record(output)
    if isinstance(output, dict):
        if "last_hidden_state" not in output:
            return output
        output["last_hidden_state"] = record(output["last_hidden_state"])
        return output
    return (record(output[0]), *output[1:])


def states_and_logits(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Iterable[int],
    *,
    positions: Bool[Tensor, "batch seq"] | Int[Tensor, " supervised"] | None = None,
    forward: Callable[..., Any] | None = None,
) -> tuple[dict[int, Float[Tensor, "batch seq hidden"]], Float[Tensor, "predictions outputs"]]:
    """One forward: the states at the layers, and one row of logits for each prediction.

    Args:
        model: Its own code makes the logits, with every scale, cap and bias.
        inputs: From `model_inputs`.
        layers: As in `hooked_states`.
        positions: Supervised positions of a language model, as in `states_at`: its head runs on these alone, so that
            logits of other positions are never in memory.
        forward: What to call instead of the model, such as a DistributedDataParallel around it.
    """
    run, layers = model if forward is None else forward, list(layers)
    if not is_generative(model):
        with hooked_states(model, dict.fromkeys(layers)) as states, named_errors(model):
            logits = run(**inputs).logits
        check_layout(model, inputs, states, layers)
        return states, logits
    assert positions is not None, "a language model needs its supervised positions"
    replacements: dict[int, Replace | None] = {
        **dict.fromkeys(layers),
        HEAD_INPUT: lambda state: states_at(state, positions)[None],
    }
    with hooked_states(model, replacements) as states:
        logits = run(**inputs, use_cache=False).logits
    check_layout(model, inputs, states, replacements)
    return states, logits[0]


@contextmanager
def named_errors(model: PreTrainedModel) -> Iterator[None]:
    """Within the context errors of a classifier's forward name the model: a language unset, no padding id, other keys.

    Raises:
        UnsupportedModelError: Its own code raised an error that no other batch would avoid.
    """
    try:
        yield
    except FlexKDError:
        raise
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: it does not take rows of tokens: {first_line(error)}. Set what it asks for "
            "in its config, or use another model."
        ) from error


def check_layout(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], states: Mapping[int, Tensor], layers: Iterable[int]
) -> None:
    """Refuse states that are not `[batch, seq, hidden]`, since masks would select the wrong positions.

    Args:
        states: What hooks read in a forward of the model on these inputs.
        layers: Layers to check.

    Raises:
        UnsupportedModelError: As XLNet, whose blocks return `[seq, batch, hidden]`, and SqueezeBERT, whose blocks
            return no named state.
    """
    name = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    for layer in layers:
        if layer not in states:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its forward does not show the state of layer {layer}. Use layer -1, the "
                "head's input."
            )
        state = states[layer]
        if state.shape[:2] != inputs[name].shape:
            advice = "Use layer -1, the head's input." if layer != HEAD_INPUT else "Teach it by its logits alone."
            raise UnsupportedModelError(
                f"{type(model).__name__}: the state of layer {layer} is {list(state.shape)} for {name} "
                f"{list(inputs[name].shape)}, not [batch, seq, hidden]. {advice}"
            )
