"""Whether prompts can be written and answers end: chat templates on the real rows, end tokens, a teacher's answers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexkd.data.encoding.answer_ends import checkpoint_ends
from flexkd.data.encoding.prompts import PromptFormat, choose_format
from flexkd.data.encoding.rendering import SAMPLE, owner_tokenizer, rendering_notes, with_renderable_rows
from flexkd.data.encoding.tokenizers import TokenizerInfo
from flexkd.data.examples.generation import GenerationData
from flexkd.data.examples.teacher_answers import with_teacher_answers
from flexkd.errors import FlexKDError, UnsupportedModelError
from flexkd.facts.names import TOKENIZER_CONFIG_FILE
from flexkd.preflight.inputs import RecipeInputs, collect_errors, rival_sources, student_tokenizer_source
from flexkd.preflight.model_files import tokenizer_folder
from flexkd.preflight.tokenizer_files import read_tokenizer_info
from flexkd.recipe import Recipe

TEMPLATE_NOTE: Final = "data: the chat template of"
"""How a note of `template_notes` begins."""


def template_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """A chat template exists where one is needed, is valid, and renders the rows.

    Raises:
        FlexKDError: As `choose_format` and `with_renderable_rows`.
    """
    recipe, data, tokenizers = inputs.recipe, inputs.data, _read_tokenizers(inputs.recipe)
    if tokenizers is None:
        return ()
    if isinstance(data, GenerationData):
        prompt_format = _prompt_format(inputs, data.has_messages, tokenizers)
        writer = owner_tokenizer(tokenizers, prompt_format)
        with_renderable_rows(data, writer, prompt_format, recipe.data.bad_rows, sample=SAMPLE)
        for tokenizer in _rival_tokenizers(recipe):
            own_format = _prompt_format(inputs, data.has_messages, tokenizer)
            own_writer = owner_tokenizer(tokenizer, own_format)
            with_renderable_rows(data, own_writer, own_format, recipe.data.bad_rows, sample=SAMPLE)
    else:
        # The rows are not on this machine, or cannot be read.
        _prompt_format(inputs, recipe.data.messages is not None, tokenizers)
    return ()


def template_notes(inputs: RecipeInputs) -> Iterator[str]:
    """How the chat template writes prompts, where that is unusual."""
    tokenizers, data = _read_tokenizers(inputs.recipe), inputs.data
    if tokenizers is None or not isinstance(data, GenerationData):
        return
    try:
        prompt_format = _prompt_format(inputs, data.has_messages, tokenizers)
    except FlexKDError:  # `template_errors` reports it
        return
    writer = owner_tokenizer(tokenizers, prompt_format)
    yield from (f"data: {note}" for note in rendering_notes(data, writer, prompt_format))


def end_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The end tokens that checkpoints name are ids; transformers ignores a generation_config.json it cannot read."""
    if inputs.recipe.generation is None:
        return
    errors: list[FlexKDError] = []
    for where, model in inputs.models.items():
        if model.folder is not None:
            with collect_errors(errors):
                checkpoint_ends(_generation_config(model.folder, where), model.config, where=where)
    yield from errors


def answer_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """The file of a teacher's answers has one for every training row.

    Raises:
        FlexKDError: As `with_teacher_answers`.
    """
    if isinstance(inputs.data, GenerationData):
        with_teacher_answers(inputs.data, inputs.recipe.data.teacher_answers)
    return ()


def _read_tokenizers(recipe: Recipe) -> dict[str, TokenizerInfo] | None:
    """The tokenizers whose templates a run reads; None where one is not on this machine, or none is needed."""
    if recipe.generation is None:
        return None
    sources = {"teacher": recipe.teacher.tokenizer or recipe.teacher.model}
    student_source = student_tokenizer_source(recipe)
    if student_source is not None:
        sources["student"] = student_source
    tokenizers = {}
    for name, source in sources.items():
        try:
            folder = tokenizer_folder(f"{name}.tokenizer", source)
        except FlexKDError:  # reported with the model or the tokenizer itself
            return None
        if folder is None or _may_lack_files(folder):
            return None
        tokenizers[name] = read_tokenizer_info(folder, source)
    return tokenizers


def _rival_tokenizers(recipe: Recipe) -> Iterator[dict[str, TokenizerInfo]]:
    """The tokenizer of each rival that is on this machine, by the key of the rival."""
    for where, source in rival_sources(recipe).items():
        try:
            folder = tokenizer_folder(where, source)
        except FlexKDError:  # reported with the model itself
            continue
        if folder is not None and not _may_lack_files(folder):
            yield {where: read_tokenizer_info(folder, source)}


def _may_lack_files(folder: Path) -> bool:
    """Whether the folder is the hub's cache of a model whose tokenizer was never fetched, or not all of it."""
    return folder.parent.name == "snapshots" and not (folder / TOKENIZER_CONFIG_FILE).exists()


def _prompt_format(inputs: RecipeInputs, has_messages: bool, tokenizers: dict[str, TokenizerInfo]) -> PromptFormat:
    """How a run would write its prompts."""
    section, recipe = inputs.recipe.data, inputs.recipe
    assert recipe.task.type != "classification", "no prompt is written there"
    return choose_format(
        tokenizers,
        kind=recipe.task.type,
        chat=section.chat,
        template=section.template,
        has_messages=has_messages,
        seq2seq=inputs.teacher is not None and bool(inputs.teacher.config.get("is_encoder_decoder")),
        date=section.date,
        variables=section.chat_variables,
        markup=section.markup,
    )


def _generation_config(folder: Path, where: str) -> Mapping[str, Any]:
    """Content of generation_config.json; empty where there is none."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(
            f"{where}: {file} is not JSON ({error}). Save the model again, or delete the file: then config.json says "
            "where answers end."
        ) from None
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{where}: {file} holds no settings. Save the model again, or delete the file.")
    return content
