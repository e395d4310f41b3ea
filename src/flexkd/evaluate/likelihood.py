"""How likely a model finds the reference answers, token by token, and how often it would say what the teacher says."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.losses.logit import forward_kl
from flexkd.errors import DataError, UnsupportedModelError
from flexkd.evaluate.inference import each_batch, inference, row_ids
from flexkd.models.forward.hidden import (
    is_generative,
    model_inputs,
    prediction_labels,
    states_and_logits,
    supervised_mask,
)

_log = logging.getLogger(__name__)

_CHUNK: Final = 256
"""Positions whose log-probabilities stand in memory at the same time, float32 over the whole vocabulary."""

_LARGEST_NLL: Final = math.log(1e300)


@dataclass(frozen=True)
class RowLikelihood:
    """Sums over the answer tokens of one row: what means, perplexities and paired tests are made of.

    Attributes:
        id: Of the row.
        tokens: Supervised tokens, the end of the answer among them.
        nll: Negative log-likelihood in nats.
        agreements: Tokens of which the most likely one is also the teacher's; None where there was no teacher.
        kl: KL(teacher || model) in nats; None where there was no teacher.
    """

    id: str
    tokens: int
    nll: float
    agreements: int | None = None
    kl: float | None = None


def likelihoods(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    teacher: PreTrainedModel | None = None,
    vocab_size: int | None = None,
    precision: str = "float32",
) -> list[RowLikelihood]:
    """Likelihood of each row's labels, each token read behind the reference's own ones (teacher forcing).

    The heads run on supervised positions alone. Both models are left as they were.

    Args:
        model: A causal model, or an encoder-decoder.
        batches: With `labels`, -100 where nothing is asked, and as a list `example_id`; rows are numbered without.
            Padded or packed.
        teacher: Reads the same batches; itself, where its own agreement is asked for, which is 1.
        vocab_size: Outputs that both models share, where their heads are padded unequally: the softmax is over these.
        precision: As in `inference`; of both models.

    Raises:
        UnsupportedModelError: The model writes no text.
        DataError: A batch without labels, or a label beyond the outputs that are compared.
    """
    rows: list[RowLikelihood] = []
    _check_writes(model)
    for batch in each_batch(batches):
        logits, labels, owners = _predictions(model, batch, precision)
        taught = None
        if teacher is not None:
            taught = logits if teacher is model else _predictions(teacher, batch, precision)[0].to(logits.device)
        outputs = min(logits.shape[1], vocab_size or logits.shape[1])
        if len(labels) and int(labels.max()) >= outputs:
            raise DataError(f"batch: the label {int(labels.max())} does not exist: outputs are 0 to {outputs - 1}.")
        sums = _row_sums(logits[:, :vocab_size], labels, None if taught is None else taught[:, :vocab_size])
        totals = torch.zeros(_rows(batch), sums.shape[1], dtype=torch.float64).index_add_(0, owners, sums)
        for id_, total in zip(row_ids(batch, len(rows), len(totals)), totals.tolist(), strict=True):
            known = (round(total[2]), total[3]) if teacher is not None else (None, None)
            rows.append(RowLikelihood(id_, round(total[0]), total[1], *known))
    return rows


def _check_writes(model: PreTrainedModel) -> None:
    if not is_generative(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: writes no text, and has no likelihood of one. Ask a classifier by "
            "flexkd.evaluate.classification.predict."
        )


def _predictions(
    model: PreTrainedModel, batch: Mapping[str, Any], precision: str
) -> tuple[Float[Tensor, "predictions vocab"], Int[Tensor, " predictions"], Int[Tensor, " predictions"]]:
    """Logits and label of each prediction, and the row that it belongs to."""
    if not isinstance(batch.get("labels"), Tensor):
        raise DataError("batch: no tensor 'labels'. Give the ids of the answers, and -100 where nothing is asked.")
    labels = batch["labels"].to(model.device)
    with inference(model, precision):
        inputs = {key: value.to(model.device) for key, value in model_inputs(model, batch).items()}
        supervised = supervised_mask(model, inputs, labels)
        _, logits = states_and_logits(model, inputs, (), rows=supervised)
    owners = _row_of(batch)[supervised.cpu()]
    return logits, prediction_labels(model, labels, supervised), owners


def _row_of(batch: Mapping[str, Any]) -> Int[Tensor, "batch seq"]:
    """The row that each label belongs to; packed ones begin where their positions begin anew."""
    if "position_ids" in batch and "attention_mask" not in batch:
        starts: Tensor = batch["position_ids"] == 0
        return starts.cpu().cumsum(1) - 1
    return torch.arange(len(batch["labels"]))[:, None].expand(batch["labels"].shape)


def _rows(batch: Mapping[str, Any]) -> int:
    return int(_row_of(batch)[-1, -1]) + 1


def _row_sums(
    logits: Float[Tensor, "predictions vocab"],
    labels: Int[Tensor, " predictions"],
    taught: Float[Tensor, "predictions vocab"] | None,
) -> Float[Tensor, "predictions sums"]:
    """For each prediction 1, its nll and, with a teacher, whether both would say the same and the KL."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(labels), _CHUNK):
            chunk, wanted = logits[start : start + _CHUNK].float(), labels[start : start + _CHUNK]
            nll = -chunk.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            columns = [torch.ones_like(nll), nll]
            if taught is not None:
                other = taught[start : start + _CHUNK].float()
                columns += [(chunk.argmax(-1) == other.argmax(-1)).float(), forward_kl(chunk, other)]
            parts.append(torch.stack(columns, 1).cpu().double())
    return torch.cat(parts) if parts else torch.zeros(0, 2 if taught is None else 4, dtype=torch.float64)


def likelihood_metrics(rows: Sequence[RowLikelihood]) -> dict[str, float | None]:
    """`nll` in nats a token, `perplexity`, and where there was a teacher `token_agreement` and `kl` a token.

    Every token weighs the same, however long its row. None, with the reason in the log, where a value is not defined.
    """
    tokens = sum(row.tokens for row in rows)
    nll = _mean("nll", [row.nll for row in rows], tokens)
    found = {"nll": nll, "perplexity": None if nll is None else _exponential(nll)}
    agreements = [row.agreements for row in rows if row.agreements is not None]
    kl = [row.kl for row in rows if row.kl is not None]
    if agreements and len(agreements) == len(rows):
        found |= {"token_agreement": _mean("token_agreement", agreements, tokens), "kl": _mean("kl", kl, tokens)}
    return found


def _exponential(nll: float) -> float | None:
    if nll <= _LARGEST_NLL:
        return math.exp(nll)
    _log.warning("perplexity is not defined: no number is as large as exp(%.4g). Recorded as null.", nll)
    return None


def _mean(name: str, values: Sequence[float | int], tokens: int) -> float | None:
    total = math.fsum(values)
    if tokens and math.isfinite(total):
        return total / tokens
    reason = "a logit is not finite" if tokens else "no row has a token to predict"
    _log.warning("%s is not defined: %s. Recorded as null.", name, reason)
    return None
