"""Instruction following and summarization as a run sees them: prompts, answers, likelihoods and their metrics."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedSplit
from flexkd.data.encoding.generation import encode_generation, encode_prompts, plain_call
from flexkd.data.encoding.prompts import PromptFormat, choose_format, render_prompts, renderings_note
from flexkd.data.encoding.rendering import owner_tokenizer, rendering_notes, with_renderable_rows
from flexkd.data.encoding.tokenizers import same_tokenizer
from flexkd.data.encoding.vocabulary import SharedVocabulary, check_labels
from flexkd.data.examples.generation import GenerationData, GenerationExample
from flexkd.data.examples.row_checks import count_reasons
from flexkd.evaluate.answer_files import write_answers
from flexkd.evaluate.answers import (
    ModelAnswers,
    Question,
    answer_examples,
    answer_notes,
    answer_questions,
    given_answers,
    validation_metrics,
)
from flexkd.evaluate.cost import Cost, measure_costs
from flexkd.evaluate.generation import GenerationSettings, decoder_start, effective_settings, saved_settings
from flexkd.evaluate.likelihood import likelihoods
from flexkd.evaluate.rouge import ROUGE, RougeSettings
from flexkd.evaluate.sanity import SanityLook, look_at_likelihood
from flexkd.evaluate.sentences import first_sentence
from flexkd.evaluate.stopping import ends_of
from flexkd.facts.names import SPLITS
from flexkd.models.forward.autocast import resolve_precision
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.loading.language import fresh_language_model, load_language_model
from flexkd.recipe import Recipe
from flexkd.record import GenerationRecord
from flexkd.tasks.row_notes import notes_on_rows, shown_row
from flexkd.tasks.task import EncodedRows, TestReport, check_positions, pad_id
from flexkd.tasks.teachers import language_teacher
from flexkd.training.fit import ValidationMetrics

logger = logging.getLogger(__name__)

COST_ROWS: Final = 16
"""Prompts that speed and memory are measured on."""

COST_TOKENS: Final = 16
"""Tokens that each of them is answered with, whatever the model would say."""


_ECHO: Final = "question_repeated"


@dataclass(frozen=True)
class GenerationResult:
    """What one model answered, and everything that decided how; nothing did for a baseline without a model."""

    answers: ModelAnswers
    decoding: dict[str, object] = field(default_factory=dict)


class GenerationTask:
    """A `Task` whose results are answers to prompts and the likelihood of the references.

    Args:
        recipe: Of the run.
        data: Its rows.
        tokenizer: The student's.
        teacher_tokenizer: The same words with the same ids.
        seq2seq: Both models are encoder-decoders.
        shared_outputs: Outputs that mean the same in both; None: all of them.

    Attributes:
        data: The rows that its chat template can write.
        rows: All of them.
    """

    loss: str = "cross_entropy"
    labels: tuple[str, ...] = ()

    def __init__(
        self,
        recipe: Recipe,
        data: GenerationData,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        seq2seq: bool,
        shared_outputs: int | None = None,
    ) -> None:
        assert recipe.generation is not None, "filled in where text is written"
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.seq2seq = seq2seq
        self.shared_outputs = shared_outputs
        both = {"teacher": teacher_tokenizer, "student": tokenizer}
        self.tokenizers = {"teacher": tokenizer} if teacher_tokenizer is tokenizer else both
        self.data = self.rows = data
        self.format = self._format_of(self.tokenizers)
        writer = owner_tokenizer(self.tokenizers, self.format)
        self.data = with_renderable_rows(data, writer, self.format, recipe.data.bad_rows)
        section = recipe.generation
        plain = section.model_dump(include=set(GenerationSettings.__dataclass_fields__))
        plain["max_new_tokens"] = section.max_new_tokens or recipe.data.max_answer_length
        self.settings = GenerationSettings(**plain)
        self.rouge = RougeSettings(section.stemmer, section.tokenizer)

    def _format_of(self, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> PromptFormat:
        section = self.recipe.data
        return choose_format(
            tokenizers,
            kind=self.data.kind,
            chat=section.chat,
            template=section.template,
            has_messages=self.data.has_messages,
            seq2seq=self.seq2seq,
            date=section.date,
            variables=section.chat_variables,
            markup=section.markup,
        )

    def as_read_by(self, tokenizer: PreTrainedTokenizerBase) -> "GenerationTask":
        """The task as any other model is asked: with its own chat template, as whoever serves it would ask it.

        Raises:
            VocabularyError: It has no chat template, and the rows are messages.
            DataError: Its template writes none of the rows.
        """
        if not tokenizer.chat_template and same_tokenizer(tokenizer, self.tokenizer):
            return self
        task = copy.copy(self)
        task.format = self._format_of({"the model": tokenizer})
        task.data = with_renderable_rows(self.data, tokenizer, task.format, self.recipe.data.bad_rows)
        return task

    def encode(self) -> EncodedRows:
        """All rows with their answers; both models read one encoding."""
        writer = owner_tokenizer(self.tokenizers, self.format)
        note = renderings_note(self.tokenizers, self.format, self.data.train[0])
        prompt_notes = [*rendering_notes(self.data, writer, self.format), *([note] if note is not None else [])]
        for text in prompt_notes:
            logger.warning("data: %s", text)
        encoded = {split: self._encode(getattr(self.data, split), self.tokenizer) for split in SPLITS}
        if self.shared_outputs is not None:
            for one in encoded.values():
                check_labels(one.rows, SharedVocabulary(self.shared_outputs))
        notes = notes_on_rows(encoded)
        for text in notes:
            logger.warning("data: %s", text)
        logger.info("%s", shown_row(encoded["train"].rows[0], self.tokenizer, self.format, seq2seq=self.seq2seq))
        return EncodedRows(
            splits={split: one.rows for split, one in encoded.items()},
            cuts={split: one.cut for split, one in encoded.items()},
            collator=Collator(pad_id(self.tokenizer), seq2seq=self.seq2seq),
            tokenizer=self.tokenizer,
            dropped=count_reasons([row for one in encoded.values() for row in one.dropped]),
            notes=(*notes, *prompt_notes),
        )

    def _encode(self, examples: Sequence[GenerationExample], tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        return encode_generation(examples, tokenizer, self.format, **self._lengths())

    def _lengths(self) -> dict[str, Any]:
        section = self.recipe.data
        return {
            "max_length": section.max_length,
            "max_answer_length": section.max_answer_length,
            "seq2seq": self.seq2seq,
        }

    def check_config(self, name: str, config: PreTrainedConfig) -> None:
        """The longest row, or the longest source and target, fit into the model's positions."""
        check_positions(name, config, self.recipe.data.max_length)

    def load_teacher(self, *, fine_tunes: bool) -> PreTrainedModel:
        """The teacher in its own number type, or in float32 where it is to learn the task first."""
        return self._with_start(language_teacher(self.recipe.teacher, fine_tunes=fine_tunes))

    def load(
        self, source: str, *, where: str, seed: int = 0, own_head: bool = False
    ) -> tuple[PreTrainedModel, list[str]]:
        """A language model, whose head is always its own; none of its weights are new."""
        return self._with_start(load_language_model(source, where=where)), []

    def _with_start(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, refused where nothing says what its decoder starts with."""
        if self.seq2seq:
            decoder_start(model)
        return model

    def fresh(self, source: str, sizes: dict[str, int], *, seed: int) -> PreTrainedModel:
        """A language model with random weights."""
        return fresh_language_model(source, sizes, seed=seed)

    def make_ready(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """How answers are decoded, so that plain `generate` stops and writes as the student was judged.

        It learns from its teacher where answers end, and so it ends where either of them does.
        """
        own = self.stop_ids(student, self.tokenizer)
        # Above that, an id of the teacher is another token of the student, or none.
        shared = self.shared_outputs or num_embedded_tokens(student) or 0
        taught = [token for token in self.stop_ids(teacher, self.tokenizer) if token < shared]
        config = saved_settings(student, self.settings, list(dict.fromkeys([*own, *taught])))
        config.pad_token_id = pad_id(self.tokenizer)
        student.generation_config = config
        if self.format.chat_template is not None:
            self.tokenizer.chat_template = self.format.chat_template

    def stop_ids(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that end an answer of a model."""
        return list(ends_of(model, tokenizer, self.format.stop_token).ids)

    def notes_on_model(self, model: PreTrainedModel, *, where: str) -> tuple[str, ...]:
        """What is unusual about where its answers end."""
        return ends_of(model, self.tokenizer, self.format.stop_token, where=where).notes

    def validation_metrics(self, encoded: EncodedRows) -> ValidationMetrics:
        """By the nll of the validation answers, or, where rows are answered for it, by the metric of the task."""
        section = self.recipe.generation
        assert section is not None
        if section.validation_rows is None:
            return ValidationMetrics("nll")
        limit = section.validation_rows
        questions, prompts = self.questions(encoded, "validation", encoded.ids("validation"))

        def of_model(model: PreTrainedModel) -> dict[str, float]:
            found = validation_metrics(
                model,
                encoded.tokenizer,
                questions,
                prompts,
                self.settings,
                stop_ids=self.stop_ids(model, encoded.tokenizer),
                rouge=self.rouge,
                limit=limit,
                precision=resolve_precision(self.recipe.training.precision),
            )
            return {name: float("nan") if (value := found[name]) is None else value for name in ROUGE}

        return ValidationMetrics(self.recipe.task.metric, of_model=of_model)

    def questions(
        self, encoded: EncodedRows, split: str, ids: Sequence[str]
    ) -> tuple[list[Question], list[dict[str, Any]]]:
        """Rows of a split as questions and as prompts."""
        by_id = {example.id: example for example in getattr(self.data, split)}
        examples = [by_id[id_] for id_ in ids]
        texts = render_prompts(examples, encoded.tokenizer, self.format)
        questions = [Question(one.id, text, one.references) for one, text in zip(examples, texts, strict=True)]
        prompts = encode_prompts(examples, encoded.tokenizer, self.format, **self._lengths()).rows
        return questions, prompts

    def _test_questions(self, encoded: EncodedRows) -> tuple[list[Question], list[dict[str, Any]]]:
        assert self.recipe.generation is not None
        return self.questions(encoded, "test", encoded.ids("test")[: self.recipe.generation.rows])

    def look(self, encoded: EncodedRows, teacher: PreTrainedModel, *, precision: str) -> SanityLook:
        """The likelihood of the answers against that under a unigram model of the training answers."""
        batches = encoded.batches("validation", rows=None, batch_size=self.settings.batch_size)
        rows = likelihoods(teacher, batches, vocab_size=self.shared_outputs, precision=precision)
        labels = {split: [row["labels"] for row in encoded.splits[split]] for split in ("train", "validation")}
        return look_at_likelihood(rows, labels["train"], labels["validation"], len(encoded.tokenizer))

    def ask(
        self, encoded: EncodedRows, model: PreTrainedModel, *, precision: str, teacher: PreTrainedModel
    ) -> GenerationResult:
        """Answers to the test prompts, and how likely the references are."""
        questions, prompts = self._test_questions(encoded)
        answers = answer_questions(
            model,
            encoded.tokenizer,
            questions,
            prompts,
            self.settings,
            stop_ids=self.stop_ids(model, encoded.tokenizer),
            rouge=self.rouge,
            batches=encoded.batches("test", rows=len(questions), batch_size=self.settings.batch_size),
            teacher=teacher if encoded.tokenizer is self.tokenizer else None,
            vocab_size=self.shared_outputs,
            precision=precision,
            progress="answers",
        )
        return GenerationResult(answers, self.decoding_of(model, encoded))

    def decoding_of(self, model: PreTrainedModel, encoded: EncodedRows) -> dict[str, object]:
        """Everything that decides the answers of a model."""
        return effective_settings(model, self.settings, self.stop_ids(model, encoded.tokenizer))

    def baselines(self, encoded: EncodedRows) -> dict[str, GenerationResult]:
        """The first sentence of each document that is to be summarized; of other questions, their own words."""
        questions, _ = self._test_questions(encoded)
        if self.data.kind != "summarization":
            turns = {example.id: example.turns[-1].content for example in self.data.test}
            return {_ECHO: GenerationResult(given_answers([turns[one.id] for one in questions], questions, self.rouge))}
        documents = {example.id: example.document or "" for example in self.data.test}
        firsts = [first_sentence(documents[question.id]) for question in questions]
        return {"first_sentence": GenerationResult(given_answers(firsts, questions, self.rouge))}

    def metrics(self, results: GenerationResult, teacher: GenerationResult) -> dict[str, float | None]:
        """ROUGE, likelihood, agreement with the teacher, share of answers that the limit cut."""
        return results.answers.metrics()

    def write(self, path: Path, encoded: EncodedRows, results: Mapping[str, GenerationResult]) -> None:
        """Prompts, references and all answers with what they score."""
        write_answers(path, self._test_questions(encoded)[0], _answers(results))

    def report(self, encoded: EncodedRows, results: Mapping[str, GenerationResult]) -> TestReport:
        """Example answers side by side, and how they were made."""
        assert self.recipe.generation is not None
        questions, _ = self._test_questions(encoded)
        adds_special_tokens, prefix = plain_call(self.tokenizer, self.format, seq2seq=self.seq2seq)
        record = GenerationRecord(
            rows=len(questions),
            kind="seq2seq" if self.seq2seq else "causal",
            is_chat=self.format.kind == "chat",
            adds_special_tokens=adds_special_tokens,
            prefix=prefix,
            layout=self.format.layout,
            max_new_tokens=self.settings.max_new_tokens,
            decoding={name: said.decoding for name, said in results.items() if said.decoding},
            cost_tokens=self._cost_tokens,
            stemmer=self.rouge.stemmer,
            tokenizer=self.rouge.tokenizer,
        )
        answers = _answers(results)
        # A question that is repeated stands there as the prompt.
        shown = {name: answer for name, answer in answers.items() if name != _ECHO}
        examples = answer_examples(questions, shown, limit=self.recipe.generation.examples)
        return TestReport(answers=examples, generation=record, notes=answer_notes(questions, answers, self.rouge))

    @property
    def _cost_tokens(self) -> int:
        return min(COST_TOKENS, self.settings.max_new_tokens)

    def costs(
        self, encoded: EncodedRows, folders: Sequence[Path], *, as_teacher: Sequence[bool], precision: str
    ) -> list[Cost]:
        """Answers of a fixed length to test prompts; the models take turns."""
        assert self.recipe.generation is not None
        rows = min(COST_ROWS, self.recipe.generation.rows or COST_ROWS)
        _, prompts = self.questions(encoded, "test", encoded.ids("test")[:rows])
        batch = Collator(pad_id(encoded.tokenizer), padding_side="right" if self.seq2seq else "left")(prompts)
        return measure_costs(folders, [batch], precision=precision, repeats=3, new_tokens=self._cost_tokens)

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EncodedRows:
        """The test rows for any language model of the same kind, in the same layout.

        Raises:
            DataError: It reads fewer tokens than the longest row may have.
        """
        self.check_config("the model", model.config)
        encoded = self._encode(self.data.test, tokenizer)
        return EncodedRows(
            {"test": encoded.rows},
            {"test": encoded.cut},
            Collator(pad_id(tokenizer), seq2seq=self.seq2seq),
            tokenizer,
        )


def _answers(results: Mapping[str, GenerationResult]) -> dict[str, ModelAnswers]:
    return {name: said.answers for name, said in results.items()}
