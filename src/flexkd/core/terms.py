"""The terms of an objective: which loss, how much of it, and between which states."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexkd.core.checks import check_class_labels, check_logit_shapes, check_value_labels
from flexkd.core.log_probs import log_probs_at
from flexkd.core.losses.lens import Lens
from flexkd.core.losses.logit import LogitLoss
from flexkd.core.losses.projector import Projector
from flexkd.core.outputs import TopOutputs, TopRule, at_top
from flexkd.core.selection import UnitPairs
from flexkd.core.tensors import IGNORE_INDEX, Number, can_be_read
from flexkd.errors import RecipeError, ShapeError, unknown_name
from flexkd.facts.losses import FEATURE_LOSS_FACTS, LOGIT_LOSS_FACTS, TASK_LOSS_FACTS, LogitLossFacts, users_of_option

POSITIONS: Final = ("tokens", "supervised")
"""`tokens` are all real tokens; `supervised` are those whose state is read for a label."""

_BASIS_AXES: Final = 2


def _check_weight(where: str, weight: Number) -> None:
    if not 0 <= weight < float("inf"):
        raise RecipeError(f"{where}.weight: must be 0 or above, was {weight}. Use 0 to switch the term off.")


@dataclass(frozen=True)
class TaskTerm:
    """Loss against the labels.

    Attributes:
        loss: `cross_entropy` (one class of several), `binary_cross_entropy` (independent labels, summed over the
            labels of a row) or `mse` (regression).
        weight: Factor of the term.
        label_smoothing: Share of the probability spread over all classes; `cross_entropy` only.
    """

    loss: str = "cross_entropy"
    weight: Number = 1.0
    label_smoothing: Number = 0.0

    def __post_init__(self) -> None:
        if self.loss not in TASK_LOSS_FACTS:
            raise RecipeError(unknown_name("objective.task.loss", "loss", self.loss, TASK_LOSS_FACTS))
        _check_weight("objective.task", self.weight)
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"objective.task.label_smoothing: must be from 0 to below 1, was {self.label_smoothing}.")
        if self.label_smoothing and not self._is_distribution:
            raise RecipeError(f"objective.task.label_smoothing: not used by '{self.loss}'. Leave it at 0.")

    @property
    def _is_distribution(self) -> bool:
        return TASK_LOSS_FACTS[self.loss].is_distribution

    @property
    def is_plain(self) -> bool:
        """Whether the loss of a prediction is the log-probability of its label and nothing else."""
        return self._is_distribution and self.label_smoothing == 0

    def values(self, logits: Float[Tensor, "predictions outputs"], labels: Tensor) -> Float[Tensor, " predictions"]:
        """Loss of every prediction in nats (squared units for `mse`); 0 where there is no label.

        Infinite, and never NaN, where the label is an output that the logits rule out (-inf; smoothing spreads a label
        over all outputs), or where the logits are no distribution.

        Raises:
            ShapeError: The labels are not one for each prediction (of values and independent labels: for each output),
                or there is but one class.
            RecipeError: A class is no whole number.
        """
        if self._is_distribution:
            check_class_labels(logits, labels)
            labels = labels.long()
        else:
            check_value_labels(logits, labels)
        if self.is_plain:
            return _nats(log_probs_at(logits, _lookup_indices(labels)[:, None])[:, 0], labels)
        logits = logits.float()
        if self._is_distribution:
            values = F.cross_entropy(
                logits, labels, reduction="none", ignore_index=IGNORE_INDEX, label_smoothing=self.label_smoothing
            )
        else:
            labels = labels.reshape(logits.shape)
            is_labelled = ~torch.isnan(labels)
            target = torch.where(is_labelled, labels, 0).float()
            loss = (logits - target).square() if self.loss == "mse" else _independent_nats(logits, target)
            labelled_loss = torch.where(is_labelled, loss, 0)
            values = labelled_loss.mean(-1) if self.loss == "mse" else labelled_loss.sum(-1)
        return torch.where(values.isnan(), torch.inf, values)


@dataclass(frozen=True)
class LogitTerm:
    """Divergence between the teacher's and the student's outputs.

    Attributes:
        loss: A name of `LOGIT_LOSS_FACTS` that fits the task term's loss.
        weight: Factor of the term; besides, the loss is multiplied by a power of the temperature (`scale`), so that
            gradients keep their size (Hinton et al., 2015, sec. 2).
        temperature: Divides both logits. Not the temperature of sampling.
        beta: Teacher's share of the mixture in `jensen_shannon`; None: the function's default.
        alpha: Share of the distribution itself in the mixture of `skew_kl` and `skew_reverse_kl`; None: likewise.
        shared_outputs: Number of first outputs that are the same tokens in both models, which pad their vocabularies
            unequally; the divergence is between the distributions over these. None: all outputs of both.
        top_k: Only the k likeliest outputs of the teacher, and all others as one, whether it is live or cached; None:
            all of them. See `core.outputs.at_top`.
        entropy_share: Share of the predictions of each micro-batch, rounded up, at which the term is computed: those of
            which the student is least certain, by the entropy of its outputs. Their mean takes the place of the mean
            over all. None: all predictions.

    Source:
        Tavor et al., 2026, arXiv:2602.01395: the choice by the student's entropy.
    """

    loss: str = "forward_kl"
    weight: Number = 1.0
    temperature: Number = 1.0
    beta: Number | None = None
    alpha: Number | None = None
    shared_outputs: int | None = None
    top_k: int | None = None
    entropy_share: Number | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOGIT_LOSS_FACTS:
            raise RecipeError(unknown_name("objective.logits.loss", "loss", self.loss, LOGIT_LOSS_FACTS))
        _check_weight("objective.logits", self.weight)
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"objective.logits.temperature: must be above 0, was {self.temperature}. 1 is plain.")
        for name, value in self.options.items():
            if name not in self._facts.options:
                user = users_of_option(name)[0]
                raise RecipeError(f"objective.logits.{name}: not used by '{self.loss}'. Remove it or use {user}.")
            if not 0 <= value <= 1:
                raise RecipeError(f"objective.logits.{name}: must be between 0 and 1, was {value}. Choose a share.")
        if self.top_k is not None and (self.top_k < 1 or not self._facts.fits_top_k):
            raise RecipeError(
                f"objective.logits.top_k: {self.top_k} for loss '{self.loss}'. Give 1 or more, or leave it out."
            )
        if self.shared_outputs is not None and self.shared_outputs < 1:
            raise RecipeError(
                f"objective.logits.shared_outputs: must be 1 or more, was {self.shared_outputs}. Leave it out for all."
            )
        if self.entropy_share is not None and not 0 < self.entropy_share <= 1:
            raise RecipeError(
                f"objective.logits.entropy_share: must be above 0 and at most 1, was {self.entropy_share}. Leave it "
                "out for all predictions."
            )
        if self._facts.temperature_exponent == 0 and self.temperature != 1:
            raise RecipeError(
                f"objective.logits.temperature: has no meaning for '{self.loss}', was {self.temperature}. Use 1."
            )

    @property
    def _facts(self) -> LogitLossFacts:
        return LOGIT_LOSS_FACTS[self.loss]

    @property
    def top(self) -> TopRule | None:
        """The part of the teacher's outputs that is read; None: all."""
        return None if self.top_k is None else TopRule(self.top_k, self.temperature, self.shared_outputs)

    @property
    def scale(self) -> Number:
        """Factor that keeps gradients of the same size at any temperature."""
        scale: Number = self.temperature**self._facts.temperature_exponent
        return scale

    @property
    def options(self) -> dict[str, Number]:
        """Further settings of the loss, without those that are None."""
        values = {"beta": self.beta, "alpha": self.alpha}
        return {name: value for name, value in values.items() if value is not None}

    def num_distilled(self, predictions: int) -> int | None:
        """How many predictions of a micro-batch the term is computed at, known before any is made; None: all."""
        if self.entropy_share is None:
            return None
        # Rounding must not add one: 0.1 * 30 is a little above 3.
        return math.ceil(round(self.entropy_share * predictions, 9)) or min(1, predictions)

    def reads_raw_logits(self, outputs: int) -> bool:
        """Whether the student's logits are compared as they are: at temperature 1, over all its outputs."""
        return self.temperature == 1 and self.shared_outputs in (None, outputs)

    def values(
        self, registry: Mapping[str, LogitLoss], student: Float[Tensor, "rows outputs"], teacher: Tensor | TopOutputs
    ) -> Float[Tensor, " rows"]:
        """Divergence of every prediction, not scaled.

        Raises:
            ShapeError: Student and teacher have unequally many outputs.
            RecipeError: The teacher's top was taken at another temperature.
        """
        loss, student = registry[self.loss], self._shared("student", student)
        if self.top is not None and isinstance(teacher, Tensor):
            teacher = self.top(self._shared("teacher", teacher))
        if isinstance(teacher, TopOutputs):
            self._check_top(student, teacher)
            return loss(at_top(student, teacher), teacher.categories(), 1, **self.options)
        return loss(student, self._shared("teacher", teacher), self.temperature, **self.options)

    def values_with_labels(
        self,
        registry: Mapping[str, LogitLoss],
        student: Float[Tensor, "rows outputs"],
        teacher: TopOutputs,
        labels: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Plain cross entropy and divergence of every prediction from one softmax; only where `reads_raw_logits`.

        Raises:
            RecipeError: The teacher's top was taken at another temperature.
        """
        check_class_labels(student, labels)
        labels = labels.long()
        self._check_top(student, teacher)
        # Columns: the teacher's top, the label, all other outputs.
        log_probs = at_top(student, teacher, _lookup_indices(labels))
        parts = torch.cat([log_probs[:, :-2], log_probs[:, -1:]], -1)
        return _nats(log_probs[:, -2], labels), registry[self.loss](parts, teacher.categories(), 1, **self.options)

    def _shared(self, name: str, logits: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows _"]:
        if self.shared_outputs is None:
            return logits
        if self.shared_outputs > logits.shape[-1]:
            raise ShapeError(
                f"objective.logits.shared_outputs: {self.shared_outputs}, but the {name} has {logits.shape[-1]} "
                "outputs. Name as many as both have in common."
            )
        return logits[..., : self.shared_outputs]

    def _check_top(self, student: Tensor, teacher: TopOutputs) -> None:
        """Refuse a top at another temperature, or of another number of outputs than the student's."""
        if teacher.temperature != self.temperature:
            raise RecipeError(
                f"objective.logits.temperature: is {self.temperature}, but the teacher's likeliest outputs were "
                f"taken at {teacher.temperature}, and the rest of them is not known at another one. Compute them again."
            )
        outputs = student.shape[-1] if teacher.outputs is None else teacher.outputs
        if teacher.outputs is None and teacher.indices.numel() and can_be_read(teacher.indices):
            outputs = max(outputs, int(teacher.indices.max()) + 1)
        check_logit_shapes(student.shape, torch.Size((len(teacher), outputs)))


def _lookup_indices(labels: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """Labels with output 0 in the place of `IGNORE_INDEX`, so that all can be looked up."""
    return labels.where(labels != IGNORE_INDEX, 0)


def _independent_nats(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of each label; of a label that is 0 or 1 only one side counts, and 0 * inf is 0."""
    present = torch.where(target == 0, 0, -target * F.logsigmoid(logits))
    return present + torch.where(target == 1, 0, (target - 1) * F.logsigmoid(-logits))


def _nats(log_probs: Float[Tensor, " rows"], labels: Int64[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    nats = torch.where(log_probs.isnan(), torch.inf, -log_probs)
    return torch.where(labels == IGNORE_INDEX, 0, nats)


@dataclass(frozen=True)
class LayerPair:
    """A state of the student, the state of the teacher that it learns, and in which coordinates.

    Attributes:
        student_layer: -1 for the state that the head reads, 1..N for the output of a block.
        teacher_layer: Likewise.
        units: Pairs of units; None: all units of both, in order.
        teacher_basis: `[teacher_hidden, k]`, columns take the place of teacher units (then `units.teacher` counts
            columns); None: coordinates.
    """

    student_layer: int = -1
    teacher_layer: int = -1
    units: UnitPairs | None = None
    # Shape and type are checked below and not by the annotation, so that every run says in words what is wrong.
    teacher_basis: Tensor | None = None

    def __post_init__(self) -> None:
        basis = self.teacher_basis
        if basis is not None and (basis.ndim != _BASIS_AXES or not basis.is_floating_point()):
            raise ShapeError(
                f"teacher_basis: is {basis.dtype} of shape {list(basis.shape)}. Give floating-point numbers "
                "[teacher_hidden, k], one column for each direction."
            )

    @classmethod
    def of_units(cls, units: Int64[Tensor, " k"], *, student_layer: int = -1, teacher_layer: int = -1) -> "LayerPair":
        """The student's first k units learn these teacher units, ascending to ascending."""
        return cls(student_layer, teacher_layer, UnitPairs(torch.arange(len(units)), units))

    def describe(self) -> str:
        """The pair of layers and what is taught between them, for the log."""
        if self.units is None:
            kind = "all units"
        else:
            kind = f"{len(self.units.student)} {'units' if self.teacher_basis is None else 'directions'}"
        return f"{kind} of layer {self.teacher_layer} -> {self.student_layer}"


@dataclass(frozen=True)
class FeatureTerm:
    """Loss between hidden states; with `correlation` and scored units, this is Flex-KD.

    Attributes:
        loss: A name of `FEATURE_LOSS_FACTS`.
        weight: Factor of the mean over live units, layers and positions.
        positions: One of `POSITIONS`.
        layers: Pairs of layers, with equal weights.
        projectors: One for each pair of layers, for a loss that needs them.
        fade: Share of the steps over which the weight falls in a line to 0; None: it stays.
        lenses: The student's and the teacher's, for a loss that needs heads.
        projector_learning_rate: Peak learning rate of the projectors; None: that of the student.
    """

    loss: str = "correlation"
    weight: Number = 1.0
    positions: str = "tokens"
    layers: tuple[LayerPair, ...] = (LayerPair(),)
    projectors: tuple[Projector, ...] = ()
    fade: Number | None = None
    projector_learning_rate: Number | None = None
    lenses: tuple[Lens, ...] = ()

    def __post_init__(self) -> None:
        if self.loss not in FEATURE_LOSS_FACTS:
            raise RecipeError(unknown_name("objective.features.loss", "loss", self.loss, FEATURE_LOSS_FACTS))
        if self.positions not in POSITIONS:
            raise RecipeError(unknown_name("objective.features.positions", "positions", self.positions, POSITIONS))
        _check_weight("objective.features", self.weight)
        if self.fade is not None and not 0 < self.fade <= 1:
            raise RecipeError(
                f"objective.features.fade: must be above 0 and at most 1, was {self.fade}. Give a share of the steps."
            )
        if isinstance(self.layers, LayerPair) or not self.layers:
            raise RecipeError(
                "objective.features.layers: must be a tuple of one LayerPair or more. Give (LayerPair(),)."
            )
        if len(self.projectors) != (len(self.layers) if FEATURE_LOSS_FACTS[self.loss].needs_projector else 0):
            raise RecipeError(
                f"objective.features.projectors: {len(self.projectors)} for loss '{self.loss}' and {len(self.layers)} "
                "pairs of layers. 'projector' takes one Projector for each pair, other losses none."
            )
        if len(self.lenses) != (2 if FEATURE_LOSS_FACTS[self.loss].needs_heads else 0):
            raise RecipeError(
                f"objective.features.lenses: {len(self.lenses)} for loss '{self.loss}'. 'distill_lens' takes the Lens "
                "of the student and that of the teacher, other losses none."
            )
        rate = self.projector_learning_rate
        if rate is not None and (not self.projectors or not 0 < rate < float("inf")):
            raise RecipeError(
                f"objective.features.projector_learning_rate: {rate} for {len(self.projectors)} projectors. Give a "
                "number above 0 where there are projectors, or leave it out."
            )

    def weight_at(self, step: int, num_steps: int) -> Number:
        """The weight in a step.

        Args:
            step: Steps that were taken before it.
            num_steps: Steps of the whole run; 0: not known, and the weight is that of the first step.
        """
        if self.fade is None or num_steps == 0:
            return self.weight
        return self.weight * max(0.0, 1 - step / (self.fade * num_steps))
