"""Whether the rows can be written as prompts: by the chat template that a run would take, on the real rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flexkd.data.encoding.prompts import PromptFormat, choose_format
from flexkd.data.encoding.rendering import SAMPLE, owner_tokenizer, rendering_notes, with_renderable_rows
from flexkd.data.encoding.tokenizers import TokenizerInfo
from flexkd.data.examples.generation import GenerationData
from flexkd.errors import FlexKDError
from flexkd.preflight.evidence import Evidence
from flexkd.preflight.model_files import tokenizer_folder
from flexkd.preflight.tokenizer_files import read_words
from flexkd.recipe import Recipe

TEMPLATE_NOTE: Final = "data: the chat template of"
"""Begins what `template_notes` says."""


def template_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A template is there where one is needed, is one, and writes the rows of the task.

    Raises:
        FlexKDError: As `choose_format` and `with_renderable_rows`.
    """
    recipe, tokenizers = evidence.recipe, _tokenizers(evidence.recipe)
    if tokenizers is not None and isinstance(evidence.data, GenerationData):
        prompt_format = _format(evidence, evidence.data.has_messages, tokenizers)
        _renderable(recipe, evidence.data, tokenizers, prompt_format)
    elif tokenizers is not None:
        # The rows are not here, or cannot be read.
        _format(evidence, recipe.data.messages is not None, tokenizers)
    yield from ()


def template_notes(evidence: Evidence) -> Iterator[str]:
    """How the template writes prompts, where that is unusual."""
    tokenizers, data = _tokenizers(evidence.recipe), evidence.data
    if tokenizers is None or not isinstance(data, GenerationData):
        return
    try:
        prompt_format = _format(evidence, data.has_messages, tokenizers)
    except FlexKDError:  # an error of its own
        return
    yield from (
        f"data: {note}" for note in rendering_notes(data, owner_tokenizer(tokenizers, prompt_format), prompt_format)
    )


def _tokenizers(recipe: Recipe) -> dict[str, TokenizerInfo] | None:
    """The tokenizers whose templates a run would look at; None where one is not on this machine, or none is needed."""
    if recipe.generation is None:
        return None
    student = recipe.student
    sources = {"teacher": recipe.teacher.tokenizer or recipe.teacher.model}
    reads_own = student.tokenizer or (student.model if student.start == "pretrained" else None)
    if reads_own is not None:
        sources["student"] = reads_own
    tokenizers = {}
    for name, source in sources.items():
        try:
            folder = tokenizer_folder(f"{name}.tokenizer", source)
        except FlexKDError:  # said of the model, or of the tokenizer
            return None
        if folder is None or _may_lack_files(folder):
            return None
        tokenizers[name] = read_words(folder, source)
    return tokenizers


def _may_lack_files(folder: Path) -> bool:
    """Whether the folder is the hub's cache of a model whose tokenizer was never fetched, or not all of it."""
    return folder.parent.name == "snapshots" and not (folder / "tokenizer_config.json").exists()


def _format(evidence: Evidence, has_messages: bool, tokenizers: dict[str, TokenizerInfo]) -> PromptFormat:
    section, recipe = evidence.recipe.data, evidence.recipe
    assert recipe.task.type != "classification", "no prompt is written there"
    return choose_format(
        tokenizers,
        kind=recipe.task.type,
        chat=section.chat,
        template=section.template,
        has_messages=has_messages,
        seq2seq=evidence.teacher is not None and bool(evidence.teacher.config.get("is_encoder_decoder")),
        date=section.date,
        variables=section.chat_variables,
        markup=section.markup,
    )


def _renderable(
    recipe: Recipe, data: GenerationData, tokenizers: dict[str, TokenizerInfo], prompt_format: PromptFormat
) -> GenerationData:
    writer = owner_tokenizer(tokenizers, prompt_format)
    return with_renderable_rows(data, writer, prompt_format, recipe.data.bad_rows, sample=SAMPLE)
