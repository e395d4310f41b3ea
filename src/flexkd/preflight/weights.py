"""Whether stored weights fit their config: names, blocks, embeddings, heads and adapters, from safetensors headers."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.teacher_labels import model_labels
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.families.table import size_keys
from flexkd.facts.names import ADAPTER_STEM, CONFIG_FILE
from flexkd.models.loading.stored_weights import (
    PEFT_PREFIX,
    adapter_error,
    adapter_misfit_error,
    adapter_unexpected_error,
    blocks_error,
    head_error,
    head_misfit_error,
    misfit_error,
    obvious_prefix,
    prefix_error,
    stack_of,
    stacks,
    stored_shapes,
    without_prefix,
)
from flexkd.preflight.inputs import RecipeInputs
from flexkd.preflight.model_files import ModelFiles, adapter_folder, check_adapter, find_model

_Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDINGS: Final = re.compile(r"(^|\.)(word_embeddings|embed_tokens|tok_embeddings|embed_in|wte|shared)\.weight$")
_UPDATE: Final = re.compile(r"(.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
"""The name of a low-rank update, and in it the module that is updated."""


def weight_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The stored weights of each model are those of its config; files other than safetensors are left to the loader."""
    for where, model in inputs.models.items():
        if where == "student.model" and inputs.recipe.student.start == "config":
            continue
        try:
            shapes = _model_shapes(model)
        except UnsupportedModelError as error:
            yield error
            continue
        if shapes is not None:
            yield from _model_errors(model, shapes)


def check_model(where: str, source: str) -> None:
    """Refuse a model that cannot be loaded, as its files show, before any time is spent on it.

    Raises:
        FlexKDError: As `find_model`, or the weights are not those of its config.
    """
    model = find_model(where, source, weights=True)
    shapes = _model_shapes(model)
    for error in () if shapes is None else _model_errors(model, shapes):
        raise error


def teacher_head_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The teacher's adapter fits, and a classification head comes from it or from the model."""
    recipe, teacher = inputs.recipe, inputs.teacher
    adapter = recipe.teacher.adapter
    adapter_shapes: _Shapes | None = None
    if adapter is not None:
        check_adapter("teacher.adapter", adapter)
        adapter_shapes = _adapter_shapes(adapter)
    if recipe.generation is not None or recipe.teacher.fine_tune is not None or teacher is None:
        return
    try:
        shapes = _model_shapes(teacher)
    except UnsupportedModelError:  # `weight_errors` reports it
        return
    # Behind a wrapper's prefix no head has its name; `weight_errors` reports the prefix.
    if shapes is None or obvious_prefix(shapes, teacher.model_type) is not None:
        return
    if adapter is None:
        yield from _head_errors(teacher, shapes)
    elif adapter_shapes is not None:
        num_classes = len(inputs.data.labels.names) if isinstance(inputs.data, ClassificationData) else None
        if teacher.family is not None:
            yield from _unexpected_errors(adapter, adapter_shapes, shapes)
        yield from _adapted_head_errors(teacher, shapes, adapter, adapter_shapes, num_classes)


def _unexpected_errors(source: str, adapter: _Shapes, shapes: _Shapes) -> Iterator[FlexKDError]:
    """Every updated module in a block is one of the model's; outside the blocks a tied weight has no name."""
    updates = [match for name in adapter if stack_of(name) and (match := _UPDATE.fullmatch(name))]
    unknown = [match[0] for match in updates if _missing([match[1]], shapes)]
    if unknown:
        yield adapter_unexpected_error("teacher.adapter", source, unknown)


def _head_errors(teacher: ModelFiles, shapes: _Shapes) -> Iterator[FlexKDError]:
    """The model's files hold a head with one output a class."""
    head = _head_modules(teacher)
    if not head:
        return
    name, missing = f"{head[-1]}.weight", _missing(head, shapes)
    num_classes = len(model_labels(teacher.config, where=teacher.where, source=teacher.source).names)
    if missing and teacher.has_classifier:
        yield head_error(teacher.where, teacher.source, missing, "classification")
    elif not missing and shapes[name][0] != num_classes:
        expected = (num_classes, *shapes[name][1:])
        yield head_misfit_error(teacher.where, teacher.source, name, shapes[name], expected)


def _adapted_head_errors(
    teacher: ModelFiles, shapes: _Shapes, source: str, adapter: _Shapes, num_classes: int | None
) -> Iterator[FlexKDError]:
    """The adapter brings what the model's head lacks, with one output a class of the data."""
    head = _head_modules(teacher)
    if not head:
        return
    name, needed = f"{head[-1]}.weight", _missing(head, shapes)
    if name in shapes and shapes[name][0] != num_classes and num_classes is not None:
        needed = [*needed, name]
    missing = [weight for weight in needed if weight not in adapter]
    if missing:
        yield adapter_error("teacher.adapter", source, missing)
    elif name in adapter and num_classes is not None and adapter[name][0] != num_classes:
        expected = (num_classes, *adapter[name][1:])
        yield adapter_misfit_error("teacher.adapter", source, name, adapter[name], expected)


def _head_modules(teacher: ModelFiles) -> tuple[str, ...]:
    """Modules between the last state and the classes; none where the architecture is not known."""
    return teacher.family.classifier_head if teacher.family is not None else ()


def _model_shapes(model: ModelFiles) -> _Shapes | None:
    """Shapes of the stored weights; None where only loading the model shows them."""
    folder = model.folder
    # A model in the cache of the hub may lack files that a run fetches.
    if folder is None or folder.parent.name == "snapshots" or not (folder / CONFIG_FILE).is_file():
        return None
    return stored_shapes(folder, where=model.where)


def _model_errors(model: ModelFiles, shapes: _Shapes) -> Iterator[FlexKDError]:
    """There are weights, under the names of the architecture, and as many blocks and tokens as the config says."""
    if not shapes:
        yield UnsupportedModelError(
            f"{model.where}: the files of '{model.source}' hold no weights. Save the model again."
        )
        return
    prefix = obvious_prefix(shapes, model.model_type)
    if prefix is not None:
        yield prefix_error(model.where, model.source, {without_prefix(name, prefix) for name in shapes}, prefix)
    elif model.family is not None:
        yield from _block_errors(model, shapes)
        yield from _embedding_errors(model, shapes)


def _embedding_errors(model: ModelFiles, shapes: _Shapes) -> Iterator[FlexKDError]:
    """The embeddings have a row for each token that the config counts."""
    tokens = model.config.get("vocab_size")
    if not isinstance(tokens, int):
        return
    embeddings = [(name, shape) for name, shape in shapes.items() if _EMBEDDINGS.search(name) and len(shape) == 2]
    misfits = [(name, shape, (tokens, shape[1])) for name, shape in embeddings if shape[0] != tokens]
    if misfits:
        yield misfit_error(model.where, model.source, misfits)


def _block_errors(model: ModelFiles, shapes: _Shapes) -> Iterator[FlexKDError]:
    """Every stack has as many blocks as the config says."""
    by_path = stacks(shapes)
    if model.config.get("is_encoder_decoder"):
        sizes = {"decoder": "num_layers", "encoder": "num_encoder_layers"}
        paths = {path: size for path in by_path for part, size in sizes.items() if part in path.split(".")}
    else:
        # Beside the stack of blocks there may be small lists of modules, such as those of a head.
        largest = max(by_path, key=lambda path: sum(map(len, by_path[path].values())), default=None)
        paths = {} if largest is None else {largest: "num_layers"}
    for path, size in paths.items():
        blocks, configured = by_path[path], model.size(size)
        stored = max(blocks) + 1
        if configured is None or configured == stored:
            continue
        if configured < stored:
            surplus = range(configured, stored)
            names = [name for block in surplus for name in blocks.get(block, ())]
        else:
            # Missing blocks have the names of the last stored one, with their own number.
            last, last_names = f".{stored - 1}.", blocks.get(stored - 1, ())
            missing = range(stored, configured)
            names = [name.replace(last, f".{block}.", 1) for block in missing for name in last_names]
        key = size_keys(model.model_type)[size]
        yield blocks_error(
            model.where, model.source, model.config, key, configured=configured, stored=stored, names=names
        )


def _adapter_shapes(source: str) -> _Shapes | None:
    """Shapes of an adapter's weights by the names of its base model; None where only loading shows them."""
    folder = adapter_folder("teacher.adapter", source)
    stored = None if folder is None else stored_shapes(folder, where="teacher.adapter", stem=ADAPTER_STEM)
    if stored is None:
        return None
    prefix = next((before for name in stored if (before := name.partition(PEFT_PREFIX)[0])), "")
    if prefix and all(name.startswith(f"{prefix}{PEFT_PREFIX}") for name in stored):
        raise prefix_error("teacher.adapter", source, {name.removeprefix(prefix) for name in stored}, prefix)
    return {name.removeprefix(PEFT_PREFIX): shape for name, shape in stored.items()}


def _missing(modules: Collection[str], shapes: _Shapes) -> list[str]:
    """Weights of modules that are not stored; a body that was saved alone has names without the body's own."""
    names = [f"{module}.weight" for module in modules]
    return [name for name in names if not any(stored == name or name.endswith(f".{stored}") for stored in shapes)]
