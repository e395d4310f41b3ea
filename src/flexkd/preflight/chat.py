"""Whether conversations can be written: messages need a chat template."""

from collections.abc import Iterator

from flexkd.errors import FlexKDError, VocabularyError
from flexkd.preflight.evidence import Evidence


def template_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Messages, and chat: always, need a chat template; where both tokenizers are here, one of them has it."""
    recipe, models = evidence.recipe, evidence.models
    needs = recipe.data.messages is not None or recipe.data.chat == "always"
    if recipe.generation is None or not needs or recipe.teacher.tokenizer or recipe.student.tokenizer:
        return
    here = [model for model in models.values() if model.folder is not None]
    if len(here) < len(models) or any(model.has_chat_template is not False for model in here):
        return
    why = "data.messages" if recipe.data.messages is not None else "data.chat"
    names = " and ".join(f"{model.where} '{model.source}'" for model in here)
    yield VocabularyError(
        f"{why}: {names}: no chat template. Use a model that was tuned on instructions, put a chat_template.jinja into "
        "the model's folder, or give the rows as prompt and response, which need none."
    )
