"""Loading the language models of a run, and the tokens that end their answers."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.prompts import PromptFormat
from flexkd.evaluate.generation import GenerationSettings, decoder_start, saved_settings
from flexkd.evaluate.stopping import ends_of
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.loading.adapters import load_adapter
from flexkd.models.loading.language import fresh_language_model, load_language_model
from flexkd.recipe.model_sections import TeacherSection
from flexkd.tasks.task import TEACHER_KEY, pad_id


@dataclass(frozen=True)
class LanguageModelLoader:
    """A `ModelLoader` of decoders and encoder-decoders.

    Attributes:
        section: The recipe's teacher.
        tokenizer: The student's.
        format: How prompts are written.
        settings: How answers are decoded.
        seq2seq: Whether both models are encoder-decoders.
        shared_outputs: As in `Task`.
    """

    section: TeacherSection
    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    settings: GenerationSettings
    seq2seq: bool
    shared_outputs: int | None

    def load_teacher(self) -> PreTrainedModel:
        """The teacher in its own number type, or in float32 if it will be fine-tuned first."""
        return self._with_start(language_teacher(self.section))

    def load(
        self, source: str, *, where: str, seed: int = 0, own_head: bool = False
    ) -> tuple[PreTrainedModel, list[str]]:
        """A language model with its own head; none of its weights are newly initialised."""
        return self._with_start(load_language_model(source, where=where)), []

    def _with_start(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model; one whose decoder has no known start token is refused."""
        if self.seq2seq:
            decoder_start(model)
        return model

    def fresh(self, source: str, sizes: dict[str, int], *, seed: int) -> PreTrainedModel:
        """A language model with random weights."""
        return fresh_language_model(source, sizes, seed=seed)

    def make_ready(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Write how answers are decoded, so that plain `generate` stops and writes as the student was evaluated.

        The student learns from its teacher where answers end, so the end tokens of both stop it.
        """
        student_ends = stop_ids(student, self.tokenizer, self.format)
        # A teacher's id beyond the shared outputs is another token of the student, or none.
        shared = self.shared_outputs or num_embedded_tokens(student) or 0
        teacher_ends = [token for token in stop_ids(teacher, self.tokenizer, self.format) if token < shared]
        config = saved_settings(student, self.settings, list(dict.fromkeys([*student_ends, *teacher_ends])))
        config.pad_token_id = pad_id(self.tokenizer)
        student.generation_config = config
        if self.format.chat_template is not None:
            self.tokenizer.chat_template = self.format.chat_template

    def notes_on_model(self, model: PreTrainedModel, *, where: str) -> tuple[str, ...]:
        """What is unusual about the tokens that end its answers."""
        return ends_of(model, self.tokenizer, self.format.stop_token, where=where).notes


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[int]:
    """Tokens that end an answer of a model."""
    return list(ends_of(model, tokenizer, prompt_format.stop_token).ids)


def language_teacher(section: TeacherSection) -> PreTrainedModel:
    """The teacher in its own number type, or in float32 if it will be fine-tuned first; with its adapter."""
    if section.fine_tune is not None:
        model = load_language_model(section.model, where=TEACHER_KEY)
    else:
        model = load_language_model(section.model, dtype=None, quantization=section.quantization, where=TEACHER_KEY)
    return model if section.adapter is None else load_adapter(model, section.adapter)
