"""Predictions of a classifier or a regressor, their metrics, and how far two models agree."""

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from flexkd.core.checks import check_class_labels, check_logit_shapes
from flexkd.core.tensors import IGNORE_INDEX
from flexkd.errors import DataError, RecipeError, ShapeError, unknown_name
from flexkd.evaluate.inference import each_batch, inference, row_ids
from flexkd.facts.metrics import CLASSIFIER_PROBLEMS, METRIC_NAMES
from flexkd.models.forward.hidden import model_inputs, named_errors
from flexkd.processes import divided

_log = logging.getLogger(__name__)

CALIBRATION_BINS: Final = 15

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of a model for each row; `labels` hold -100 or NaN where a row has none."""

    ids: tuple[str, ...]
    logits: Float[Tensor, "rows classes"]
    labels: Tensor


def predict(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    precision: str = "float32",
    as_teacher: bool = False,
) -> Predictions:
    """Logits of every row, float32 on the CPU, in the order of the batches.

    The model runs in eval mode, and its mode is restored. It is given the keys that its forward names, never labels.

    Args:
        model: On any device, in any mode.
        batches: Dicts of tensors with `labels` and a list `example_id`; without it rows are numbered.
        precision: float32 runs the model as it is, bfloat16 and float16 under autocast.
        as_teacher: Read the teacher's own encoding (`teacher_input_ids`, ...) if a batch has one.

    Raises:
        DataError: No batches, or a number of ids that is not the number of rows.
    """
    ids: list[str] = []
    logits: list[Tensor] = []
    labels: list[Tensor | None] = []

    def answer(batch: Mapping[str, Any]) -> Tensor:
        inputs = {
            key: value.to(model.device) for key, value in model_inputs(model, batch, as_teacher=as_teacher).items()
        }
        with named_errors(model):
            output: Tensor = model(**inputs).logits.float().cpu()
        return output

    read, answered = itertools.tee(each_batch(batches))
    with inference(model, precision):
        for output, batch in zip(divided(read, answer), answered, strict=True):
            logits.append(output)
            batch_labels = batch.get("labels")
            labels.append(batch_labels.cpu() if isinstance(batch_labels, Tensor) else None)
            ids.extend(row_ids(batch, len(ids), len(output)))
    if not logits:
        raise DataError("batches: there are none. Give some.")
    sizes = [len(part) for part in logits]
    return Predictions(tuple(ids), torch.cat(logits), _joined(labels, sizes))


def _joined(labels: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """All labels; those of a batch without labels are -100, or NaN where labels are floats."""
    example = next((part for part in labels if part is not None), torch.zeros(0, dtype=torch.int64))
    missing = math.nan if example.is_floating_point() else IGNORE_INDEX
    parts = [
        example.new_full((size, *example.shape[1:]), missing) if part is None else part
        for part, size in zip(labels, sizes, strict=True)
    ]
    return torch.cat(parts)


def constant_outputs(labels: Tensor, problem: str, *, num_outputs: int) -> Float[Tensor, " outputs"]:
    """Outputs of the constant baseline, estimated from the labels alone with add-one smoothing.

    Args:
        labels: Labels of the training rows; rows without a label are left out.
        problem: One of `CLASSIFIER_PROBLEMS`.
        num_outputs: Number of classes, of independent labels, or 1 for a regression.

    Returns:
        Log frequencies of the classes, log odds of the labels, or the mean of the values.
    """
    labels = labels[labelled(labels)]
    if problem == "regression":
        return labels.double().reshape(len(labels), -1).mean(0).float()
    if problem == "multi_label":
        share = (labels.double().sum(0) + 1) / (len(labels) + 2)
        return share.logit().float()
    counts = torch.bincount(labels.long(), minlength=num_outputs).double() + 1
    return (counts / counts.sum()).log().float()


def labelled(labels: Tensor) -> Bool[Tensor, " rows"]:
    """Which rows have a label: none of its values is -100 or NaN."""
    missing = labels.isnan() if labels.is_floating_point() else torch.zeros_like(labels, dtype=torch.bool)
    missing = missing | (labels == IGNORE_INDEX)
    return ~(missing.flatten(1).any(1) if missing.ndim > 1 else missing)


def classification_metrics(
    logits: Float[Tensor, "rows classes"], labels: Tensor, problem: str
) -> dict[str, float | None]:
    """All metrics of a problem; an undefined one is None, with the reason in the log.

    Rows without a label are left out. Macro F1 of single labels is the mean over the classes that occur as label or
    as prediction; multi-label decisions are made at a probability of 0.5, and a label that never occurs and is never
    predicted has F1 0. `nll` is in nats. For calibration see `calibration_error`; with several labels, each pair of row
    and label is one decision.

    Raises:
        ShapeError: The shape of the labels does not fit the logits.
        RecipeError: Unknown problem, or classes that are not integers.
        DataError: A label that does not exist.
    """
    if problem not in CLASSIFIER_PROBLEMS:
        raise RecipeError(unknown_name("problem", "problem", problem, CLASSIFIER_PROBLEMS))
    keep = labelled(labels)
    if len(keep) != len(logits):
        raise ShapeError(f"labels: are of shape {list(labels.shape)} for logits of {list(logits.shape)}.")
    if not keep.all():
        _log.info("%d of %d rows have no label and are left out of the metrics.", int((~keep).sum()), len(keep))
    reason = _unusable(logits[keep])
    if reason:
        _log.warning("No metric is defined: %s. All are recorded as null.", reason)
        return dict.fromkeys(METRIC_NAMES[problem])
    _check_labels(logits[keep], labels[keep], problem)
    return _BY_PROBLEM[problem](logits[keep].double(), labels[keep])


def predicted(logits: Float[Tensor, "rows classes"], problem: str) -> Tensor:
    """What a model says of each row: a class index, a flag for each class (int64), or a number."""
    if problem == "single_label":
        return logits.argmax(-1)
    return logits[:, 0] if problem == "regression" else (logits > 0).long()


def answers_of(labels: Tensor, problem: str) -> Tensor:
    """What is right of each row, in the form of `predicted`."""
    return labels.flatten() if problem == "regression" else labels.long()


def _check_labels(logits: Tensor, labels: Tensor, problem: str) -> None:
    if problem == "single_label":
        if logits.shape[-1] > 1:
            check_class_labels(logits, labels)
        wrong, rule = (labels < 0) | (labels >= logits.shape[-1]), f"classes are 0 to {logits.shape[-1] - 1}"
    elif problem == "multi_label":
        wrong, rule = (labels != 0) & (labels != 1), "each label is 0 (absent) or 1 (present)"
    else:
        wrong, rule = labels.isinf(), "values are finite"
    if bool(wrong.any()):
        raise DataError(f"labels: {labels[wrong][0].item():g} is none of {problem}, whose {rule}.")


@contextmanager
def undefined_metrics_expected() -> Iterator[None]:
    """Silence the log about undefined metrics, for a baseline with the same answer for every row."""
    before = _log.disabled
    _log.disabled = True
    try:
        yield
    finally:
        _log.disabled = before


def _unusable(logits: Tensor) -> str:
    if not len(logits):
        return "no rows are left"
    broken = int((~logits.isfinite()).flatten(1).any(1).sum())
    return f"{broken} of {len(logits)} rows have logits that are not finite" if broken else ""


def _single_label(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    log_probabilities = logits.log_softmax(-1)
    confidence = log_probabilities.exp().amax(-1)
    # argmax of the logits: two that differ by less than rounding have the same log-probability.
    truth, predicted = labels.numpy(), logits.argmax(-1).numpy()
    constant = [name for name, values in (("label", truth), ("prediction", predicted)) if len(np.unique(values)) < 2]
    if constant:
        _log.warning("matthews_correlation is not defined: every %s is the same. Recorded as null.", constant[0])
    return {
        "accuracy": float(sklearn_metrics.accuracy_score(truth, predicted)),
        "macro_f1": float(sklearn_metrics.f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "matthews_correlation": None if constant else float(sklearn_metrics.matthews_corrcoef(truth, predicted)),
        "calibration_error": calibration_error(confidence.numpy(), predicted == truth),
        "nll": float(-log_probabilities.gather(-1, labels[:, None]).mean()),
    }


def _multi_label(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    if labels.shape != logits.shape:
        raise ShapeError(
            f"labels: multi-label labels are {list(labels.shape)}, the logits {list(logits.shape)}. Give one 0 or 1 "
            "for each row and label."
        )
    probabilities = logits.sigmoid()
    predicted = (logits > 0).numpy()
    truth = labels.bool().numpy()
    confidence = torch.maximum(probabilities, 1 - probabilities).numpy()
    # As an indicator matrix even for one label: scikit-learn would take [rows, 1] for a binary problem.
    f1 = {average: _indicator_f1(truth, predicted, average) for average in ("micro", "macro")}
    return {
        "micro_f1": f1["micro"],
        "macro_f1": f1["macro"],
        "subset_accuracy": float(sklearn_metrics.accuracy_score(truth, predicted)),
        "calibration_error": calibration_error(confidence.ravel(), (truth == predicted).ravel()),
    }


def _indicator_f1(truth: npt.NDArray[np.bool_], predicted: npt.NDArray[np.bool_], average: str) -> float:
    labels = list(range(truth.shape[1]))
    pad = np.zeros((len(truth), 1), dtype=bool)
    truth, predicted = np.hstack([truth, pad]), np.hstack([predicted, pad])
    return float(sklearn_metrics.f1_score(truth, predicted, labels=labels, average=average, zero_division=0.0))


def _regression(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    predicted, truth = _single_output(logits), labels.double().reshape(len(labels), -1)[:, 0].numpy()
    return {
        "pearson": _correlation("pearson", stats.pearsonr, predicted, truth),
        "spearman": _correlation("spearman", stats.spearmanr, predicted, truth),
        "mse": float(sklearn_metrics.mean_squared_error(truth, predicted)),
    }


_BY_PROBLEM: Final = {"single_label": _single_label, "multi_label": _multi_label, "regression": _regression}


def _single_output(logits: Tensor) -> _Floats:
    if logits.shape[1] != 1:
        raise ShapeError(
            f"logits: regression has 1 output, this model has {logits.shape[1]}. Use problem: single_label."
        )
    return logits.double()[:, 0].numpy()


def _correlation(
    name: str, measure: Callable[..., tuple[float, float]], first: _Floats, second: _Floats
) -> float | None:
    """A correlation, or None where it is not defined (0/0)."""
    if len(first) < 2:
        _log.warning("%s is not defined: it needs 2 rows, there is %d. Recorded as null.", name, len(first))
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=stats.ConstantInputWarning)
        warnings.simplefilter("ignore", category=stats.NearConstantInputWarning)
        value = float(measure(first, second)[0])
    if np.isfinite(value):
        return value
    _log.warning("%s is not defined: the predictions or the labels are constant. Recorded as null.", name)
    return None


def calibration_error(confidence: _Floats, correct: npt.NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal width, by share of rows.

    Bin m of M holds the rows whose confidence (the largest probability) lies in ((m - 1) / M, m / M].

    Source:
        Guo et al., 2017, arXiv:1706.04599, sec. 2, eq. 3.

    Example:
        >>> calibration_error(np.array([0.9, 0.9]), np.array([True, False]))
        0.4
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def agreement(
    student_logits: Float[Tensor, "rows classes"], teacher_logits: Float[Tensor, "rows classes"], problem: str
) -> dict[str, float | None]:
    """Agreement of the student's predictions with the teacher's, without labels.

    Returns:
        `agreement`, the share of rows (multi-label: of decisions) with the same answer, and `kl`, the mean
        KL(teacher || student) of a row in nats (multi-label: summed over labels). For regression `teacher_pearson` and
        `teacher_mse` of the two predictions.

    Raises:
        ShapeError: The logits of the two models differ in shape.
        RecipeError: Unknown problem.
    """
    if problem not in CLASSIFIER_PROBLEMS:
        raise RecipeError(unknown_name("problem", "problem", problem, CLASSIFIER_PROBLEMS))
    check_logit_shapes(student_logits.shape, teacher_logits.shape)
    reason = _unusable(student_logits) or _unusable(teacher_logits)
    names = ("teacher_pearson", "teacher_mse") if problem == "regression" else ("agreement", "kl")
    if reason:
        _log.warning("Agreement with the teacher is not defined: %s. Recorded as null.", reason)
        return dict.fromkeys(names)
    if problem == "regression":
        student, teacher = _single_output(student_logits), _single_output(teacher_logits)
        mse = float(sklearn_metrics.mean_squared_error(teacher, student))
        values = (_correlation(names[0], stats.pearsonr, student, teacher), mse)
    elif problem == "multi_label":
        is_same = (student_logits > 0) == (teacher_logits > 0)
        decisions = (torch.stack([logits, -logits], -1).double() for logits in (student_logits, teacher_logits))
        values = (float(is_same.double().mean()), _mean_kl(*(functional.logsigmoid(logits) for logits in decisions)))
    else:
        is_same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        log_probs = (logits.double().log_softmax(-1) for logits in (student_logits, teacher_logits))
        values = (float(is_same.double().mean()), _mean_kl(*log_probs))
    return dict(zip(names, values, strict=True))


def _mean_kl(student: Tensor, teacher: Tensor) -> float:
    """KL(teacher || student) of log-probabilities, summed over all but the rows."""
    return float(functional.kl_div(student, teacher, log_target=True, reduction="batchmean"))
