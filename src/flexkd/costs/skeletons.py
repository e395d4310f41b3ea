"""Teacher and student of a recipe without weights: their own code runs, on tensors that have a shape and no storage."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.models.forward.hidden import HEAD_INPUT
from flexkd.models.loading.adapters import LoraSettings, add_lora
from flexkd.models.loading.language import language_builder
from flexkd.models.loading.pretrained import leave_out_foreign_pad, load_config
from flexkd.models.loading.t5_head import build_model
from flexkd.models.slicing.rotation import norms_by_reader
from flexkd.models.slicing.shape import resolve_shape
from flexkd.models.slicing.student import student_config
from flexkd.pipeline.start import config_keys, student_sizes
from flexkd.recipe import Recipe
from flexkd.recipe.taught_features import may_rotate


@dataclass(frozen=True)
class Skeletons:
    """Both models in eval mode.

    Attributes:
        mode: The mode that their tensors belong to; whoever runs the models does so within it.
        teacher: In the number type in which it teaches, with the tokens that the student knows.
        student: As it is saved, without low-rank updates.
        is_rotated: Whether the student is cut along directions of the teacher.
        whole: The teacher with all of its tokens, where the student knows some of them.
        rivals: The models off the shelf that the student is compared with, by name.
    """

    mode: FakeTensorMode
    teacher: PreTrainedModel
    student: PreTrainedModel
    is_rotated: bool = False
    whole: PreTrainedModel | None = None
    rivals: Mapping[str, PreTrainedModel] = field(default_factory=dict)

    @property
    def whole_teacher(self) -> PreTrainedModel:
        """The teacher with all of its tokens."""
        return self.whole or self.teacher


def skeleton(
    mode: FakeTensorMode,
    builder: Any,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.float32,
    updates: LoraSettings | None = None,
) -> PreTrainedModel:
    """A model of a config without storage, in eval mode.

    Args:
        mode: Its tensors belong to it.
        builder: An Auto class.
        config: Stays as it is.
        updates: Low-rank ones that are put into the model; then they alone are trained.
    """
    # Transformers 5 ties each T5 by its config, and says in this key that the head is another matrix.
    own_head = getattr(config, "scale_decoder_outputs", True) is False
    make = functools.partial(builder.from_config, dtype=dtype)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = build_model(make, copy.deepcopy(config), own_head=own_head)
        if updates is not None:
            add_lora(model, updates)
    model.config.architectures = [type(model).__name__]
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    # Nothing is generated, and a cache of keys would be in the way of checkpointing.
    model.config.use_cache = False
    _move(model, mode)
    model.eval()
    return model


def _move(model: PreTrainedModel, mode: FakeTensorMode) -> None:
    """From the meta device, where no code knows what hardware it runs on, to a CPU without storage."""
    copies: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return copies[id(tensor)]

    for module in model.modules():
        tables: Any = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved(tensor)


def skeletons(
    recipe: Recipe, *, labels: int | None = None, vocabulary: int | None = None, num_tokens: int | None = None
) -> Skeletons:
    """The two models of a recipe, with the sizes that they would have in a run.

    Args:
        labels: Outputs of classifiers; None: as the configs say.
        vocabulary: Words of a fresh classifier that knows all tokens; None: as its config says.
        num_tokens: Tokens of the teacher that the student knows; None: all.

    Raises:
        UnsupportedModelError: A config cannot be read, or no student can be cut from this teacher.
        ShapeError: Sizes that the student cannot have.
    """
    mode = FakeTensorMode()
    section = recipe.teacher
    config = _config(recipe, section.model, "teacher.model", labels if section.fine_tune is not None else None)
    # A teacher that learns the task first is stored in float32.
    saved_dtype: Any = config.dtype
    dtype = torch.float32 if section.fine_tune is not None or saved_dtype is None else saved_dtype
    builder = _builder(recipe, "teacher.model", section.model, config)
    teacher = skeleton(mode, builder, config, dtype=dtype)
    models = Skeletons(mode, teacher, teacher, rivals=_rivals(recipe, mode, labels))
    if num_tokens is not None:
        config.get_text_config().vocab_size = num_tokens
        leave_out_foreign_pad(config)
        models = replace(models, teacher=skeleton(mode, builder, config, dtype=dtype), whole=teacher)
    if recipe.student.start == "slice":
        return _sliced(recipe, models)
    return replace(models, student=_named(recipe, models, labels, vocabulary if num_tokens is None else num_tokens))


def _rivals(recipe: Recipe, mode: FakeTensorMode, labels: int | None) -> dict[str, PreTrainedModel]:
    """The models off the shelf that a recipe names, as they are fine-tuned."""
    named = {} if recipe.rivals is None else {f"rivals.models.{i}": name for i, name in enumerate(recipe.rivals.models)}
    configs = {where: _config(recipe, source, where, labels) for where, source in named.items()}
    return {
        named[where]: skeleton(mode, _builder(recipe, where, named[where], config), config)
        for where, config in configs.items()
    }


def learner(models: Skeletons, recipe: Recipe) -> PreTrainedModel:
    """The student as it is trained: with low-rank updates in it, where the recipe asks for them."""
    student, section = models.student, recipe.student.lora
    if section is None:
        return student
    builder = _builder(recipe, "student.model", student.config.model_type, student.config)
    return skeleton(models.mode, builder, student.config, updates=LoraSettings(**section.model_dump()))


def _config(recipe: Recipe, source: str, where: str, labels: int | None) -> PreTrainedConfig:
    config = load_config(source, where=where)
    if recipe.generation is None and labels is not None:
        config.num_labels = labels
    return config


def _builder(recipe: Recipe, where: str, source: str, config: PreTrainedConfig) -> Any:
    return AutoModelForSequenceClassification if recipe.generation is None else language_builder(where, source, config)


def _sliced(recipe: Recipe, models: Skeletons) -> Skeletons:
    teacher = models.teacher
    is_rotated = may_rotate(recipe) and _can_rotate(recipe, models)
    shape = resolve_shape(teacher.config, **student_sizes(recipe, teacher, models.whole, rotated=is_rotated))
    config = student_config(teacher.config, shape, range(shape.num_layers))
    builder = _builder(recipe, "teacher.model", recipe.teacher.model, config)
    return replace(models, student=skeleton(models.mode, builder, config), is_rotated=is_rotated)


def _can_rotate(recipe: Recipe, models: Skeletons) -> bool:
    """Whether the teacher can be rotated, by the same check as in a run."""
    with models.mode:
        ids = torch.zeros(1, 4, dtype=torch.long)
        row: Mapping[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if models.teacher.config.is_encoder_decoder:
            row = {**row, "decoder_input_ids": ids}
        try:
            norms_by_reader(models.teacher, row)
        except UnsupportedModelError:
            if recipe.student.basis == "rotated":
                raise
            return False
    return True


def _named(recipe: Recipe, models: Skeletons, labels: int | None, vocabulary: int | None) -> PreTrainedModel:
    section = recipe.student
    assert section.model is not None, "checked by the recipe"
    config = _config(recipe, section.model, "student.model", labels)
    if section.start == "config":
        sizes = config_keys(config.model_type, student_sizes(recipe, models.teacher, models.whole))
        words = models.teacher.config.get_text_config().vocab_size if recipe.generation is not None else vocabulary
        for key, value in {**sizes, **({} if words is None else {"vocab_size": words})}.items():
            setattr(config, key, value)
        leave_out_foreign_pad(config)
    return skeleton(models.mode, _builder(recipe, "student.model", section.model, config), config)


def outputs_of(model: PreTrainedModel) -> int:
    """Logits of one prediction."""
    head: Any = model.get_output_embeddings()
    labels: Any = model.config.num_labels
    return int(labels if head is None else head.weight.shape[0])


def width_at(model: PreTrainedModel, layer: int) -> int:
    """Units of a state; that before a language model's head is what the head's weight is as wide as."""
    head: Any = model.get_output_embeddings()
    if layer == HEAD_INPUT and head is not None:
        return int(head.weight.shape[1])
    text: Any = model.config.get_text_config(decoder=True)
    return int(text.hidden_size)
