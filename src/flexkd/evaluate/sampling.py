"""Tokens drawn for each row by its own random numbers, so that no row's answer hangs on the rows beside it."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexkd.core.tensors import Number


def drawn_tokens(
    seed: int, ids: Sequence[str], *, temperature: Number = 1.0, top_k: int = 0, top_p: Number = 1.0
) -> LogitsProcessorList:
    """Processors behind which the highest logit of each row is the drawn one: `generate` has only to be greedy.

    Args:
        seed: With the id of a row it decides the row's random numbers.
        ids: Of the rows of the batch, in their order.
        temperature: Divides the logits.
        top_k: Draw from so many likeliest tokens; 0: from all.
        top_p: Draw from the likeliest tokens that hold this share of the probability.
    """
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))
    return LogitsProcessorList([*processors, _Draw(seed, ids)])


class _Draw(LogitsProcessor):
    """Draws a token for each row and leaves only that one, so that the highest logit is the drawn one.

    Each row has its own random numbers, known by the seed and its id. One draw for the whole batch, as `generate`
    makes, would give a row another answer whenever the rows beside it change.
    """

    def __init__(self, seed: int, ids: Sequence[str]) -> None:
        self.generators = [torch.Generator().manual_seed(_row_seed(seed, id_)) for id_ in ids]

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        draws = torch.stack([torch.rand(1, generator=one, dtype=torch.float64) for one in self.generators])
        below = scores.double().softmax(-1).cumsum(-1)
        # From the right: a token of probability 0 adds nothing to the sum, and is never the first above the draw.
        chosen = torch.searchsorted(below, draws.to(below.device) * below[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.clamp(max=scores.shape[1] - 1), 0.0)


def _row_seed(seed: int, id_: str) -> int:
    digest = hashlib.sha256(f"{seed} {id_}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1
