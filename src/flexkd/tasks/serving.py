"""What a saved student needs, besides its model and its tokenizer, to read rows as it did in training."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from flexkd.data.encoding.prompts import PromptFormat
from flexkd.data.examples.turns import GenerationColumns
from flexkd.errors import ArtifactError
from flexkd.evaluate.generation import GenerationSettings
from flexkd.files import written_whole
from flexkd.run_files import STUDENT_SETTINGS_FILE

_FORMAT: Final = 1
"""Version of the file; one of another version is refused."""


@dataclass(frozen=True)
class ServingSettings:
    """How a student reads rows and writes answers; plain JSON in its folder.

    Attributes:
        task: classification, instruction or summarization.
        problem: single_label, multi_label, regression or generation.
        columns: Names of the columns of a row, by what they hold: text, text_pair, prompt, context, document, messages.
        max_length: Longest row in tokens; with an answer, of a decoder, both.
        labels: Classes in the order of the outputs.
        max_answer_length: Longest answer in tokens, as trained.
        prompt: Of `PromptFormat`, without the chat template, which the tokenizer holds; None for classifiers.
        generation: Of `GenerationSettings`; None for classifiers.
    """

    task: str
    problem: str
    columns: Mapping[str, str]
    max_length: int
    labels: tuple[str, ...] = ()
    max_answer_length: int = 0
    prompt: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    format: int = field(default=_FORMAT)

    @property
    def writes_text(self) -> bool:
        """Whether the student answers in words."""
        return self.prompt is not None

    def write(self, folder: Path) -> None:
        """Write the settings into a student's folder."""
        with written_whole(folder / STUDENT_SETTINGS_FILE) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "ServingSettings":
        """The settings in a student's folder.

        Raises:
            ArtifactError: The folder has none, or they are damaged or of another version.
        """
        file = folder / STUDENT_SETTINGS_FILE
        if not file.is_file():
            raise ArtifactError(
                f"{folder}: holds no {STUDENT_SETTINGS_FILE}, which says how rows are read. Give the student's folder "
                "of a run, or make it again with this version of flexkd."
            )
        try:
            settings = TypeAdapter(cls).validate_json(file.read_bytes(), strict=True)
        except ValueError as error:
            raise ArtifactError(f"{file}: damaged ({error}). Restore a copy, or run the recipe again.") from None
        if settings.format != _FORMAT:
            raise ArtifactError(f"{file}: of version {settings.format}, and {_FORMAT} is read here. Use that flexkd.")
        return settings

    def prompt_format(self, chat_template: str | None) -> PromptFormat:
        """How prompts are written, with the template of the student's tokenizer."""
        assert self.prompt is not None, "of a student that writes"
        plain = dict(self.prompt)
        date = plain.pop("date")
        template = chat_template if plain["kind"] == "chat" else None
        return PromptFormat(
            **plain, chat_template=template, date=None if date is None else datetime.date.fromisoformat(date)
        )

    def generation_settings(self) -> GenerationSettings:
        """How answers are decoded."""
        assert self.generation is not None, "of a student that writes"
        return GenerationSettings(**{**self.generation, "seeds": tuple(self.generation["seeds"])})

    def generation_columns(self) -> GenerationColumns:
        """Columns of a row that is answered."""
        names = self.columns
        if "messages" in names:
            return GenerationColumns(messages=names["messages"])
        # An answer is never read: no column has an empty name.
        return GenerationColumns(
            prompt=names.get("prompt"), document=names.get("document") or names.get("context"), answer=""
        )


def plain_prompt(prompt_format: PromptFormat) -> dict[str, Any]:
    """A format as plain values, without its chat template."""
    plain = asdict(prompt_format)
    plain.pop("chat_template")
    return {**plain, "date": None if prompt_format.date is None else prompt_format.date.isoformat()}
