"""Teacher and student over the same modules: which adapters are active for whom, and what they must not share."""

import logging
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.models.loading.adapters import unwrapped

logger = logging.getLogger(__name__)


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model in a DistributedDataParallel or a `torch.compile`: a frozen one needs neither, hooks need it bare."""
    bare: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return bare


@contextmanager
def use_adapters(model: nn.Module, names: Collection[str] | None) -> Iterator[None]:
    """Within the context these adapters of a model are active; afterwards each layer has its earlier ones again.

    PEFT's own switches also set `requires_grad`, of an adapter that another model trains too; no flag changes here.

    Args:
        model: With layers of PEFT in it.
        names: Of its adapters; none of them: the base model alone. None: the model stays as it is.
    """
    layers = [] if names is None else adapter_layers(model)
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = list(names or ()), not names
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules of a model that compute with one adapter or another."""
    if "peft" not in sys.modules:
        return []  # nothing else puts such modules in
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def teaching_adapters(teacher: nn.Module, student: nn.Module) -> tuple[str, ...] | None:
    """The adapters that a teacher computes with where it has layers in common with the student.

    A `PeftModel` of its own teaches with the adapter that is active in it, and a base model with none: adapters that
    were put into it afterwards are the student's.

    Args:
        teacher: As the trainer got it, adapters around it included.
        student: As the trainer got it.

    Returns:
        None where no adapter has to be switched.

    Raises:
        UnsupportedModelError: Both are one object.
    """
    if teacher is student:
        adapters = _names(adapter_layers(student))
        advice = (
            f"Say which of its adapters teaches: teacher=flexkd.LiveTeacher(model, adapters=['NAME']) with one of "
            f"{', '.join(adapters)}, or adapters=[] for the base model alone."
            if adapters
            else "Give the teacher a copy (copy.deepcopy(model)), or another model."
        )
        raise UnsupportedModelError(f"teacher: it is the student itself, {type(student).__name__}. {advice}")
    common = {id(layer) for layer in adapter_layers(student)}
    if not any(id(layer) in common for layer in adapter_layers(teacher)):
        return None
    if isinstance(teacher, PreTrainedModel):
        logger.info("teacher: the student's base model, with no active adapter")
        return ()
    wrapper: Any = teacher
    return tuple(wrapper.active_adapters)


def check_adapter_names(model: nn.Module, adapters: Collection[str]) -> None:
    """Refuse adapters that a model does not have.

    Raises:
        UnsupportedModelError: Names the first of them, and those that there are.
    """
    names = _names(adapter_layers(model))
    unknown = sorted(set(adapters) - set(names))
    if unknown:
        has = f"It has: {', '.join(names)}." if names else "It has none."
        raise UnsupportedModelError(f"teacher: {type(model).__name__} has no adapter '{unknown[0]}'. {has}")


def check_not_shared(teacher: nn.Module, student: nn.Module, adapters: Collection[str] | None = None) -> None:
    """Refuse a teacher that is the student, or that a step of the student would change.

    What both share may be frozen: an embedding, a whole body under two heads. Modes and adapters are switched around
    each call of the teacher, so that it takes no dropout from the student and the student none from it.

    Args:
        teacher: The model that answers.
        student: As the trainer got it, adapters around it included.
        adapters: Names of those that the teacher computes with; None: the active ones.

    Raises:
        UnsupportedModelError: Says what is shared and what to do.
    """
    inner, base = unwrapped(teacher), unwrapped(student)
    layers = adapter_layers(inner)
    if inner is base:
        _check_adapters(layers, student, adapters)
    others = set(_names(layers)) - set(adapters) if adapters is not None else set()
    shared = _shared(inner, base, others)
    if shared:
        raise UnsupportedModelError(
            f"teacher: it shares {len(shared)} weights with the student that the student trains (first: "
            f"'{shared[0]}'), and would change with every step. Give the teacher a copy (copy.deepcopy), or freeze "
            "what is shared (requires_grad_(False))."
        )


def _check_adapters(layers: list[Any], student: nn.Module, adapters: Collection[str] | None) -> None:
    """Refuse a teacher and a student over one model whose adapters are the same, or not the active ones."""
    if adapters is None or not layers:
        raise UnsupportedModelError(
            "teacher: it is the model that learns. Give the teacher a copy (copy.deepcopy(model)), or where "
            "the student is an adapter, teacher=flexkd.LiveTeacher(model, adapters=['NAME']), [] for the base alone."
        )
    if any(getattr(layer, "merged_adapters", ()) for layer in layers):
        raise UnsupportedModelError(
            "teacher: an adapter is merged into the weights that it shares with the student, and cannot be switched "
            "off. Call unmerge_adapter() first."
        )
    active = {name for layer in layers if not layer._disable_adapters for name in layer.active_adapters}
    wrapper: Any = student
    learns = active if isinstance(student, PreTrainedModel) else set(wrapper.active_adapters)
    if learns != active:
        raise UnsupportedModelError(
            f"model: the adapter that learns is {_listed(learns)}, and {_listed(active)} is active in its layers. "
            f"Call set_adapter({_listed(learns)}) of the student before the trainer is made."
        )
    if set(adapters) == active:
        raise UnsupportedModelError(
            f"teacher: both compute with the adapter {_listed(active)}, so that the student would learn from itself. "
            "Give the student an adapter of another name (add_adapter, set_adapter)."
        )


def _names(layers: Iterable[Any]) -> list[str]:
    return sorted({name for layer in layers for name in layer._get_available_adapters()})


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "none"


def _shared(teacher: nn.Module, student: nn.Module, idle: Collection[str]) -> list[str]:
    """Names in the teacher of weights that the student trains, without those of adapters that do not teach."""
    trained: list[Tensor] = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # The running statistics of a batch norm change with each batch that the student reads.
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            trained += module.buffers()
    spans: dict[tuple[str, int], list[range]] = defaultdict(list)
    for tensor in trained:
        place, span = _place(tensor)
        spans[place].append(span)

    def is_trained(weight: Tensor) -> bool:
        place, span = _place(weight)
        return any(span.start < other.stop and other.start < span.stop for other in spans.get(place, ()))

    weights = [*teacher.named_parameters(), *teacher.named_buffers()]
    return [name for name, weight in weights if not set(name.split(".")) & set(idle) and is_trained(weight)]


def _place(tensor: Tensor) -> tuple[tuple[str, int], range]:
    """Where a tensor lies: device and storage, and which bytes; the object itself where it does not tell."""
    try:
        storage, first = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a packed or sharded weight
        storage = first = 0
    if storage == 0:
        return ("object", id(tensor)), range(1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.device), storage), range(first, first + (last + 1) * tensor.element_size())
