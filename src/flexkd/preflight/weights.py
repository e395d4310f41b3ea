"""What the headers of safetensors files tell of models and adapters: wrapped names, blocks, heads, missing files."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.teacher_labels import model_labels
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.families.table import size_keys
from flexkd.models.loading.stored_weights import (
    PEFT_PREFIX,
    adapter_error,
    adapter_misfit_error,
    adapter_strangers_error,
    blocks_error,
    head_error,
    head_misfit_error,
    misfit_error,
    obvious_prefix,
    prefix_error,
    stack_of,
    stacks,
    stored_shapes,
    without,
)
from flexkd.preflight.evidence import Evidence
from flexkd.preflight.model_files import ModelFiles, adapter_folder, check_adapter, find_model

_Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDINGS: Final = re.compile(r"(^|\.)(word_embeddings|embed_tokens|tok_embeddings|embed_in|wte|shared)\.weight$")
_UPDATE: Final = re.compile(r"(.+)\.lora_(?:embedding_)?[AB](?:\.weight)?")
"""The name of a low-rank update, and in it the module that is updated."""


def weight_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """What is wrong with the weights of the models; files of another kind are left to the loader."""
    for where, model in evidence.models.items():
        if where == "student.model" and evidence.recipe.student.start == "config":
            continue
        try:
            shapes = _stored(model)
        except UnsupportedModelError as error:
            yield error
            continue
        if shapes is not None:
            yield from _name_errors(model, shapes)


def check_model(where: str, source: str) -> None:
    """Refuse a model whose files tell that it cannot be loaded, before anything is spent.

    Raises:
        FlexKDError: As `find_model`, or its weights are not those of its config.
    """
    model = find_model(where, source, weights=True)
    shapes = _stored(model)
    for error in () if shapes is None else _name_errors(model, shapes):
        raise error


def teacher_head_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """The adapter of a teacher, and a classification head that comes from it or from the model."""
    recipe, teacher = evidence.recipe, evidence.teacher
    source, brought = recipe.teacher.adapter, None
    if source is not None:
        check_adapter("teacher.adapter", source)
        brought = _adapter_shapes(source)
    if recipe.generation is not None or recipe.teacher.fine_tune is not None or teacher is None:
        return
    try:
        shapes = _stored(teacher)
    except UnsupportedModelError:  # reported with the weights
        return
    # Behind a wrapper no head has its name, and the wrapper is what has to go.
    if shapes is not None and obvious_prefix(shapes, teacher.model_type) is None:
        labels = len(evidence.data.labels.names) if isinstance(evidence.data, ClassificationData) else None
        if source is not None and brought is not None and teacher.family is not None:
            yield from _stranger_errors(source, brought, shapes)
        yield from _head_errors(teacher, shapes, source, brought, labels)


def _stranger_errors(source: str, brought: _Shapes, shapes: _Shapes) -> Iterator[FlexKDError]:
    """Updates of modules in blocks that the model does not have; outside of them, a tied weight has no name."""
    updates = [match for name in brought if stack_of(name) and (match := _UPDATE.fullmatch(name))]
    strange = [match[0] for match in updates if _absent([match[1]], shapes)]
    if strange:
        yield adapter_strangers_error("teacher.adapter", source, strange)


def _head_errors(
    teacher: ModelFiles, shapes: _Shapes, source: str | None, brought: _Shapes | None, labels: int | None
) -> Iterator[FlexKDError]:
    """Where each weight of the head comes from: the model, or an adapter, which is known where its file is."""
    head = teacher.family.classifier_head if teacher.family is not None else ()
    if not head:
        return
    name, lacking = f"{head[-1]}.weight", _absent(head, shapes)
    if source is None:
        named = len(model_labels(teacher.config, where=teacher.where, source=teacher.source).names)
        if lacking and teacher.has_classifier:
            yield head_error(teacher.where, teacher.source, lacking, "classification")
        elif not lacking and shapes[name][0] != named:
            yield head_misfit_error(teacher.where, teacher.source, name, shapes[name], (named, *shapes[name][1:]))
        return
    if brought is None:
        return
    if name in shapes and shapes[name][0] != labels and labels is not None:
        lacking = [*lacking, name]
    absent = [weight for weight in lacking if weight not in brought]
    if absent:
        yield adapter_error("teacher.adapter", source, absent)
    elif name in brought and labels is not None and brought[name][0] != labels:
        shape = (labels, *brought[name][1:])
        yield adapter_misfit_error("teacher.adapter", source, name, brought[name], shape)


def _stored(model: ModelFiles) -> _Shapes | None:
    """Shapes of the weights; None where only loading tells."""
    folder = model.folder
    # A model in the cache of the hub may lack files that a run fetches.
    if folder is None or folder.parent.name == "snapshots" or not (folder / "config.json").is_file():
        return None
    return stored_shapes(folder, where=model.where)


def _name_errors(model: ModelFiles, shapes: _Shapes) -> Iterator[FlexKDError]:
    if not shapes:
        yield UnsupportedModelError(
            f"{model.where}: the files of '{model.source}' hold no weights. Save the model again."
        )
        return
    prefix = obvious_prefix(shapes, model.model_type)
    if prefix is not None:
        yield prefix_error(model.where, model.source, {without(name, prefix) for name in shapes}, prefix)
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
    """Every list of blocks has as many as the config says."""
    by_path = stacks(shapes)
    if model.config.get("is_encoder_decoder"):
        sizes = {"decoder": "num_layers", "encoder": "num_encoder_layers"}
        paths = {path: size for path in by_path for part, size in sizes.items() if part in path.split(".")}
    else:
        # Next to the blocks there may be small lists, as those of a head.
        largest = max(by_path, key=lambda path: sum(map(len, by_path[path].values())), default=None)
        paths = {} if largest is None else {largest: "num_layers"}
    for path, size in paths.items():
        blocks, said = by_path[path], model.size(size)
        stored = max(blocks) + 1
        if said is None or said == stored:
            continue
        last = f".{stored - 1}."
        names = [
            name if said < stored else name.replace(last, f".{block}.", 1)
            for block in range(min(said, stored), max(said, stored))
            for name in blocks.get(block if said < stored else stored - 1, ())
        ]
        yield blocks_error(
            model.where,
            model.source,
            model.config,
            size_keys(model.model_type)[size],
            said=said,
            stored=stored,
            names=names,
        )


def _adapter_shapes(source: str) -> _Shapes | None:
    """Shapes of an adapter's weights by the names of its base; None where only loading tells."""
    folder = adapter_folder("teacher.adapter", source)
    stored = None if folder is None else stored_shapes(folder, where="teacher.adapter", stem="adapter_model")
    if stored is None:
        return None
    prefix = next((before for name in stored if (before := name.partition(PEFT_PREFIX)[0])), "")
    if prefix and all(name.startswith(f"{prefix}{PEFT_PREFIX}") for name in stored):
        raise prefix_error("teacher.adapter", source, {name.removeprefix(prefix) for name in stored}, prefix)
    return {name.removeprefix(PEFT_PREFIX): shape for name, shape in stored.items()}


def _absent(head: Collection[str], shapes: _Shapes) -> list[str]:
    """Weights of a head that the file lacks; a body that was saved alone leaves its own name out."""
    names = [f"{module}.weight" for module in head]
    return [name for name in names if not any(stored == name or name.endswith(f".{stored}") for stored in shapes)]
