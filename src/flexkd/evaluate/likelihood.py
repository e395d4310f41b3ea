"""Likelihood of the reference answers under a model, and agreement of its next tokens with the teacher's."""

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.losses.logit import forward_kl
from flexkd.core.outputs import HeadOutputs
from flexkd.errors import DataError, UnsupportedModelError
from flexkd.evaluate.inference import each_batch, inference, row_ids
from flexkd.models.forward.head import head_is_known, head_of, states_before_head
from flexkd.models.forward.hidden import (
    is_generative,
    model_inputs,
    prediction_labels,
    states_and_logits,
    supervised_mask,
)
from flexkd.processes import divided, num_processes

_log = logging.getLogger(__name__)

_CHUNK: Final = 256
"""Predictions whose log-probabilities are in memory together, in float32 over the whole vocabulary."""

_MOST_STATES: Final = 2**28
"""Bytes of the states of a model that are kept at most."""

_LARGEST_NLL: Final = math.log(1e300)


@dataclass(frozen=True)
class RowLikelihood:
    """Sums over the answer tokens of one row, from which means, perplexities and paired tests are computed.

    Attributes:
        id: The id of the row.
        tokens: Number of supervised tokens, including the end of the answer.
        nll: Negative log-likelihood in nats.
        agreements: Number of tokens for which model and teacher have the same most likely token; None without a
            teacher.
        kl: KL(teacher || model) in nats; None without a teacher.
    """

    id: str
    tokens: int
    nll: float
    agreements: int | None = None
    kl: float | None = None


@dataclass(frozen=True)
class HeadStates:
    """What the head of a model reads at the supervised positions of some batches: its logits without another pass.

    Attributes:
        model: Its head makes the logits.
        of_batches: States of each batch, one row a prediction.
    """

    model: PreTrainedModel
    of_batches: tuple[Float[Tensor, "_ hidden"], ...]

    @classmethod
    def read(
        cls, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], *, precision: str = "float32"
    ) -> "HeadStates | None":
        """The states of all batches, on the CPU; None where they take too much memory, or the head is not known.

        None also where several processes divide the batches: each would have to read all of them.

        Args:
            model: As in `likelihoods`.
            batches: As in `likelihoods`.
            precision: As in `likelihoods`.
        """
        _check_writes(model)
        if num_processes() > 1:
            return None
        states: list[Tensor] = []
        size = 0
        for batch in each_batch(batches):
            with inference(model, precision):
                inputs, supervised, _ = _supervised(model, batch)
                if not states and not head_is_known(model, inputs, who="teacher"):
                    return None
                part = states_before_head(model, inputs, (), positions=supervised, use=lambda outputs: outputs.states)[
                    1
                ]
            states.append(part.cpu())
            size += part.nbytes
            if size > _MOST_STATES:
                return None
        return cls(model, tuple(states))

    def logits(self, number: int, precision: str) -> Float[Tensor, "predictions vocab"]:
        """Logits of the predictions of a batch, as a pass of the model makes them."""
        with inference(self.model, precision):
            return head_of(self.model)(self.of_batches[number].to(self.model.device))


def _states_of(outputs: HeadOutputs) -> Tensor:
    return outputs.states


def likelihoods(
    model: PreTrainedModel | HeadStates,
    batches: Iterable[Mapping[str, Any]],
    *,
    teacher: PreTrainedModel | HeadStates | None = None,
    vocab_size: int | None = None,
    precision: str = "float32",
) -> list[RowLikelihood]:
    """Likelihood of each row's labels with teacher forcing: every token is predicted from the reference before it.

    The heads run on supervised positions alone. Neither model changes.

    Args:
        model: A causal model, or an encoder-decoder; or its states on these batches.
        batches: Padded or packed, with `labels` (-100: not supervised) and a list `example_id`, without which rows are
            numbered.
        teacher: Reads the same batches, or its states on them. May be the model itself, whose agreement is 1.
        vocab_size: Number of outputs that both models share, over which the softmax runs; None: all.
        precision: Precision of both models, as in `inference`.

    Raises:
        UnsupportedModelError: The model writes no text.
        DataError: A batch without labels, or a label beyond the shared outputs.
    """
    _check_writes(model.model if isinstance(model, HeadStates) else model)

    def sums_of(numbered: tuple[int, Mapping[str, Any]]) -> Float64[Tensor, "rows sums"]:
        number, batch = numbered
        logits, labels, rows_of_labels = _predictions(model, batch, number, precision)
        teacher_logits = None
        if teacher is model:
            teacher_logits = logits
        elif teacher is not None:
            teacher_logits = _predictions(teacher, batch, number, precision)[0].to(logits.device)
        outputs = min(logits.shape[1], vocab_size or logits.shape[1])
        if len(labels) and int(labels.max()) >= outputs:
            raise DataError(f"batch: the label {int(labels.max())} does not exist: outputs are 0 to {outputs - 1}.")
        if teacher_logits is not None:
            teacher_logits = teacher_logits[:, :vocab_size]
        sums = _prediction_sums(logits[:, :vocab_size], labels, teacher_logits)
        totals = torch.zeros(_num_rows(batch), sums.shape[1], dtype=torch.float64)
        return totals.index_add_(0, rows_of_labels, sums)

    by_row: list[RowLikelihood] = []
    read, summed = itertools.tee(each_batch(batches))
    for totals, batch in zip(divided(enumerate(read), sums_of), summed, strict=True):
        for id_, total in zip(row_ids(batch, len(by_row), len(totals)), totals.tolist(), strict=True):
            agreement = (round(total[2]), total[3]) if teacher is not None else (None, None)
            by_row.append(RowLikelihood(id_, round(total[0]), total[1], *agreement))
    return by_row


def _check_writes(model: PreTrainedModel) -> None:
    if not is_generative(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: writes no text, and has no likelihood of one. For a classifier, use "
            "flexkd.evaluate.classification.predict."
        )


def _predictions(
    source: PreTrainedModel | HeadStates, batch: Mapping[str, Any], number: int, precision: str
) -> tuple[Float[Tensor, "predictions vocab"], Int[Tensor, " predictions"], Int[Tensor, " predictions"]]:
    """Logits and label of each prediction, and the index of its row."""
    model = source.model if isinstance(source, HeadStates) else source
    with inference(model, precision):
        inputs, supervised, labels = _supervised(model, batch)
        if isinstance(source, HeadStates):
            logits = source.logits(number, precision)
        else:
            _, logits = states_and_logits(model, inputs, (), positions=supervised)
    rows_of_labels = _row_indices(batch)[supervised.cpu()]
    return logits, prediction_labels(model, labels, supervised), rows_of_labels


def _supervised(
    model: PreTrainedModel, batch: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Bool[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Inputs, supervised positions and labels of a batch, on the model's device."""
    if not isinstance(batch.get("labels"), Tensor):
        raise DataError(
            "batch: no tensor 'labels'. Give the ids of the answers, and -100 at positions without a label."
        )
    labels = batch["labels"].to(model.device)
    inputs = {key: value.to(model.device) for key, value in model_inputs(model, batch).items()}
    return inputs, supervised_mask(model, inputs, labels), labels


def _row_indices(batch: Mapping[str, Any]) -> Int[Tensor, "batch seq"]:
    """Index of the row of each position; a packed row begins where `position_ids` is 0."""
    if "position_ids" in batch and "attention_mask" not in batch:
        starts: Tensor = batch["position_ids"] == 0
        return starts.cpu().cumsum(1) - 1
    return torch.arange(len(batch["labels"]))[:, None].expand(batch["labels"].shape)


def _num_rows(batch: Mapping[str, Any]) -> int:
    return int(_row_indices(batch)[-1, -1]) + 1


def _prediction_sums(
    logits: Float[Tensor, "predictions vocab"],
    labels: Int[Tensor, " predictions"],
    teacher_logits: Float[Tensor, "predictions vocab"] | None,
) -> Float[Tensor, "predictions sums"]:
    """For each prediction: 1, its nll and, with a teacher, whether the most likely token is the same, and the KL."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(labels), _CHUNK):
            chunk, targets = logits[start : start + _CHUNK].float(), labels[start : start + _CHUNK]
            nll = -chunk.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            columns = [torch.ones_like(nll), nll]
            if teacher_logits is not None:
                teacher_chunk = teacher_logits[start : start + _CHUNK].float()
                is_same = chunk.argmax(-1) == teacher_chunk.argmax(-1)
                columns += [is_same.float(), forward_kl(chunk, teacher_chunk)]
            parts.append(torch.stack(columns, 1).cpu().double())
    return torch.cat(parts) if parts else torch.zeros(0, 2 if teacher_logits is None else 4, dtype=torch.float64)


def likelihood_metrics(by_row: Sequence[RowLikelihood]) -> dict[str, float | None]:
    """`nll` in nats a token, `perplexity`, and with a teacher `token_agreement` and `kl` a token.

    Every token has the same weight, however long its row. An undefined value is None, with the reason in the log.
    """
    tokens = sum(row.tokens for row in by_row)
    nll = _mean("nll", [row.nll for row in by_row], tokens)
    metrics = {"nll": nll, "perplexity": None if nll is None else _exponential(nll)}
    agreements = [row.agreements for row in by_row if row.agreements is not None]
    kl = [row.kl for row in by_row if row.kl is not None]
    if agreements and len(agreements) == len(by_row):
        metrics |= {"token_agreement": _mean("token_agreement", agreements, tokens), "kl": _mean("kl", kl, tokens)}
    return metrics


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
