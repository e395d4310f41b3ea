"""States of a model for training loops of one's own, with a proof that layer -1 is what the head reads."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.hidden import HEAD_INPUT, hooked_states, is_generative
from flexkd.models.forward.modes import eval_mode

_TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative difference of logits that rounding explains; in 16 bits it is 2 %."""

_proved: WeakSet[PreTrainedModel] = WeakSet()


@contextmanager
def states(
    model: PreTrainedModel, layers: Iterable[int] = (HEAD_INPUT,)
) -> Iterator[dict[int, Float[Tensor, "batch seq hidden"]]]:
    """Within the context each forward of the model fills the dictionary with its hidden states, gradients included.

    The model runs as it always does, and its hooks are removed at the end of the context. A classifier has no head that
    transformers names: the state that its body returns is taken, and the first forward proves that nothing else reaches
    the logits.

    Args:
        model: A language model or a classifier.
        layers: -1 for the input of the head, 1..N for the output of a block.

    Yields:
        Layer to the states of the latest forward.

    Raises:
        ShapeError: There is no such layer.
        UnsupportedModelError: The logits of the first forward are not made of state -1 alone.
    """
    layers = tuple(layers)
    with hooked_states(model, dict.fromkeys(layers)) as read:

        def prove(_: Any, args: tuple[Any, ...], inputs: dict[str, Any], __: Any) -> None:
            # The forwards of the proof come through all hooks again: they would be proved, and their states be read.
            assert proof is not None
            proof.remove()
            first = dict(read)
            if not _is_all_of_the_logits(model, args, inputs):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: its logits are not made of the state that its body returns, or not of it "
                    "alone. Read the outputs of its blocks: 1 and up."
                )
            read.update(first)
            _proved.add(model)

        needs_proof = HEAD_INPUT in layers and not is_generative(model) and model not in _proved
        proof = model.register_forward_hook(prove, with_kwargs=True) if needs_proof else None
        try:
            yield read
        finally:
            if proof is not None:
                proof.remove()


def _is_all_of_the_logits(model: PreTrainedModel, args: tuple[Any, ...], inputs: dict[str, Any]) -> bool:
    """Whether the logits stay the same when other embeddings enter the model and state -1 is put back in its place."""
    embeddings = model.get_input_embeddings()
    assert embeddings is not None, "a model that reads tokens embeds them"
    inputs = {**inputs, "return_dict": True}
    with eval_mode(model), torch.no_grad():
        with hooked_states(model, {HEAD_INPUT: None}) as read:
            expected = model(*args, **inputs).logits
        handle = embeddings.register_forward_hook(lambda *call: call[-1].flip(-1))
        try:
            with hooked_states(model, {HEAD_INPUT: lambda _: state}) as other:
                state = read[HEAD_INPUT]
                logits = model(*args, **inputs).logits
        finally:
            handle.remove()
    if torch.equal(other[HEAD_INPUT], state):
        raise UnsupportedModelError(
            f"{type(model).__name__}: it was not given ids that it embeds itself. Call it with input_ids, or read the "
            "outputs of its blocks: 1 and up."
        )
    # In float64, which not every device has, and without what is no number: the model's own logits are that too.
    numbers, expected_numbers = (part.float().cpu().double().nan_to_num() for part in (logits, expected))
    gap = (numbers - expected_numbers).norm() / expected_numbers.norm().clamp(min=1e-300)
    return bool(gap <= _TOLERANCE.get(expected.dtype, 2e-2))
