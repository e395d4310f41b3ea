"""Checks of the arguments of losses: shapes and types that do not fit are refused before anything broadcasts."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor

from flexkd.errors import RecipeError, ShapeError

Function = TypeVar("Function", bound=Callable[..., Any])

_CLASSES: Final = 2
_STATE_AXES: Final = 2
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_loss(loss: Function) -> Function:
    """Decorate a loss between logits `[*rows, classes]`, of two classes or more, with `check_logits`."""
    return _logit_loss(loss, fewest=_CLASSES)


def output_loss(loss: Function) -> Function:
    """Decorate a loss between independent outputs `[*rows, outputs]` with `check_logits`."""
    return _logit_loss(loss, fewest=1)


def _logit_loss(loss: Function, *, fewest: int) -> Function:
    @wraps(loss)
    def checked(student_logits: Tensor, teacher_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_logits(student_logits, teacher_logits, fewest=fewest)
        return loss(student_logits, teacher_logits, *args, **kwargs)

    return cast(Function, checked)


def unit_loss(loss: Function) -> Function:
    """Decorate a loss that compares unit i with unit i of states `[*positions, units]` with `check_states`."""
    return _state_loss(loss, same_width=True)


def state_loss(loss: Function) -> Function:
    """Decorate a loss between states `[*positions, units]` of any two widths with `check_states`."""
    return _state_loss(loss, same_width=False)


def _state_loss(loss: Function, *, same_width: bool) -> Function:
    @wraps(loss)
    def checked(student: Tensor, teacher: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        check_states(student, teacher, mask, same_width=same_width)
        return loss(student, teacher, mask, **kwargs)

    return cast(Function, checked)


def check_logits(student: Tensor, teacher: Tensor, *, fewest: int = 1) -> None:
    """Refuse logits that are not of the same predictions and outputs.

    Raises:
        ShapeError: Names both shapes, or too few outputs.
        RecipeError: Not floating-point numbers.
    """
    check_logit_shapes(student.shape, teacher.shape)
    _check_floating("logits", student, teacher)
    check_width(student, fewest)


def check_logit_shapes(student: Sequence[int], teacher: Sequence[int]) -> None:
    """Refuse shapes `[*rows, outputs]` that are not the same.

    Raises:
        ShapeError: Names both.
    """
    if student != teacher or len(student) == 0:
        raise ShapeError(
            f"logits: the student has outputs of shape {list(student)}, the teacher of {list(teacher)}. Give both the "
            "same predictions and labels, or name the shared_outputs of both."
        )


def check_width(logits: Tensor, fewest: int) -> None:
    """Refuse logits over fewer outputs than their loss needs.

    Raises:
        ShapeError: Says how many there are.
    """
    if logits.shape[-1] < fewest:
        raise ShapeError(
            f"logits: {logits.shape[-1]} output where classes are compared, of shape {_shape(logits)}: the only class "
            "always has probability 1, and nothing is learnt. Use 'mse' for a value, 'binary_cross_entropy' (and "
            "bernoulli_kl) for a label that is present or absent, or a head of two classes."
        )


def check_states(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, same_width: bool = True) -> None:
    """Refuse states that are not of the same positions, or whose units are not pairs.

    Args:
        student: `[*positions, units]`.
        teacher: `[*positions, units]`.
        mask: `[*positions]`, or None.
        same_width: Unit i of one side is compared with unit i of the other.

    Raises:
        ShapeError: Names both shapes.
        RecipeError: States that are not floating-point numbers, or a mask that is not boolean.
    """
    for name, states in (("student", student), ("teacher", teacher)):
        if states.ndim < _STATE_AXES or states.shape[-1] == 0:
            raise ShapeError(
                f"features: the {name}'s states are {_shape(states)}. Give one row of units for each position, "
                "[positions, units]."
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"features: the student's states are {_shape(student)}, the teacher's {_shape(teacher)}. Give both the "
            "same positions."
        )
    if same_width and student.shape[-1] != teacher.shape[-1]:
        raise ShapeError(
            f"features: {student.shape[-1]} units of the student for {teacher.shape[-1]} of the teacher (states of "
            f"{_shape(student)} and {_shape(teacher)}). Pair as many of one as of the other (UnitPairs), or use 'cka' "
            "or 'projector'."
        )
    _check_floating("features", student, teacher)
    if mask is None:
        return
    if mask.shape != student.shape[:-1]:
        raise ShapeError(
            f"mask: is {_shape(mask)} for states of {_shape(student)}. Give one entry for each position, "
            f"{_shape(student[..., 0])}."
        )
    if mask.dtype != torch.bool:
        raise RecipeError(f"mask: is {_name(mask)}, which chooses rows by number. Give booleans (mask.bool()).")


def check_class_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not one class for each prediction; whether the class exists is not checked here.

    Raises:
        ShapeError: Not one for each prediction, or there is but one class.
        RecipeError: Not whole numbers.
    """
    check_width(logits, _CLASSES)
    if labels.dtype not in _INTEGERS:
        raise RecipeError(
            f"labels: are {_name(labels)} where each is a class of {logits.shape[-1]}. Give whole numbers "
            "(labels.long()), or use 'binary_cross_entropy' or 'mse'."
        )
    if labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"labels: are of shape {_shape(labels)} for logits of {_shape(logits)}. Give one class for each prediction."
        )


def check_value_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not one number for each output of each prediction.

    Raises:
        ShapeError: Names both shapes.
    """
    if labels.shape != logits.shape and (labels.shape != logits.shape[:1] or logits.shape[-1] != 1):
        raise ShapeError(
            f"labels: are of shape {_shape(labels)} for outputs of {_shape(logits)}. Give one number for each output."
        )


def _check_floating(what: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise RecipeError(f"{what}: are {_name(tensor)}. Give floating-point numbers ({what}.float()).")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
