"""Sampling of tokens with random numbers of each row, so that no answer depends on the other rows of the batch."""

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


def token_sampler(
    seed: int, ids: Sequence[str], *, temperature: Number = 1.0, top_k: int = 0, top_p: Number = 1.0
) -> LogitsProcessorList:
    """Logits processors that sample: afterwards the largest logit of each row is the sampled token's.

    `generate` is called with greedy decoding.

    Args:
        seed: Seeds the random numbers of each row, together with its id.
        ids: Ids of the rows of the batch, in their order.
        temperature: Divides the logits.
        top_k: Sample from that many likeliest tokens; 0: from all.
        top_p: Sample from the likeliest tokens that hold this share of the probability.
    """
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))
    return LogitsProcessorList([*processors, _Sampler(seed, ids)])


class _Sampler(LogitsProcessor):
    """Samples a token for each row and sets the logits of all others to -inf.

    Each row has a random generator of its own, seeded by the seed and the row's id. `generate` itself samples a batch
    with a single generator, so that a row would get another answer whenever the other rows change.
    """

    def __init__(self, seed: int, ids: Sequence[str]) -> None:
        self.generators = [torch.Generator().manual_seed(_row_seed(seed, id_)) for id_ in ids]

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        uniform = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators]
        cumulative = scores.double().softmax(-1).cumsum(-1)
        thresholds = torch.stack(uniform).to(cumulative.device) * cumulative[:, -1:]
        # right=True: a token of probability 0 does not raise the sum, and is never the first above the threshold.
        tokens = torch.searchsorted(cumulative, thresholds, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(max=scores.shape[1] - 1), 0.0)


def _row_seed(seed: int, id_: str) -> int:
    digest = hashlib.sha256(f"{seed} {id_}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1
