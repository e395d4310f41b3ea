"""Instruction following and summarization as a run sees them: prompts, answers, likelihoods and their metrics."""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.encoded import EncodedRow, EncodedSplit
from flexkd.data.encoding.generation import encode_generation, encode_prompts, plain_call
from flexkd.data.encoding.prompts import PromptFormat, choose_format, render_prompts, renderings_note
from flexkd.data.encoding.rendering import owner_tokenizer, rendering_notes, with_renderable_rows
from flexkd.data.encoding.tokenizers import same_tokenizer
from flexkd.data.encoding.vocabulary import SharedVocabulary, check_labels
from flexkd.data.examples.generation import GenerationData, GenerationExample
from flexkd.data.examples.row_checks import count_reasons
from flexkd.evaluate.answer_files import write_answers
from flexkd.evaluate.answers import (
    Question,
    answer_examples,
    answer_notes,
    answer_questions,
    baseline_answers,
    first_sentence,
    validation_answers,
)
from flexkd.evaluate.cost import Cost, measure_costs
from flexkd.evaluate.generation import GenerationSettings, effective_settings
from flexkd.evaluate.likelihood import HeadStates, likelihoods
from flexkd.evaluate.rouge import RougeSettings
from flexkd.evaluate.sanity import SanityResult, language_model_sanity
from flexkd.facts.losses import TASK_LOSS_OF
from flexkd.facts.metrics import ROUGE
from flexkd.facts.names import SPLITS
from flexkd.models.forward.autocast import resolve_precision
from flexkd.recipe import Recipe
from flexkd.record import GenerationRecord
from flexkd.tasks.generation_results import GenerationResult, pack, unpack
from flexkd.tasks.generation_rows import notes_on_rows, shown_row
from flexkd.tasks.intervals import text_intervals
from flexkd.tasks.language_models import LanguageModelLoader, stop_ids
from flexkd.tasks.serving import ServingSettings, plain_prompt
from flexkd.tasks.stored_results import StoredResults
from flexkd.tasks.task import EncodedRows, TestReport, check_positions, pad_id
from flexkd.training.fit import ValidationMetrics

logger = logging.getLogger(__name__)

UNTRAINED_ROWS: Final = 32
"""Rows that an untrained student answers at most: its answers show no more than that it says nothing yet."""

COST_ROWS: Final = 16
"""Prompts that speed and memory are measured on."""

COST_TOKENS: Final = 16
"""Number of tokens generated for each of them, without stopping early."""

_ECHO: Final = "question_repeated"


class GenerationTask:
    """A `Task` whose results are answers to prompts and the likelihood of the references.

    Args:
        data: Rows of the recipe.
        tokenizer: The student's.
        teacher_tokenizer: The teacher's, with the same ids for the same tokens.
        seq2seq: Whether both models are encoder-decoders.
        shared_outputs: Outputs that mean the same in both models; None: all of them.

    Attributes:
        data: The rows that the chat template can render.
        all_data: All rows of the recipe.
    """

    loss: str = TASK_LOSS_OF["generation"]
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
        self.tokenizers = {"teacher": teacher_tokenizer}
        if tokenizer is not teacher_tokenizer:
            self.tokenizers["student"] = tokenizer
        self.data = self.all_data = data
        self.format = self._format_of(self.tokenizers)
        writer = owner_tokenizer(self.tokenizers, self.format)
        self.data = with_renderable_rows(data, writer, self.format, recipe.data.bad_rows)
        section = recipe.generation
        plain = section.model_dump(include=set(GenerationSettings.__dataclass_fields__))
        plain["max_new_tokens"] = section.max_new_tokens or recipe.data.max_answer_length
        self.settings = GenerationSettings(**plain)
        self.rouge = RougeSettings(section.stemmer, section.tokenizer)
        self.loader = LanguageModelLoader(
            recipe.teacher, tokenizer, self.format, self.settings, seq2seq, shared_outputs
        )

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

    def encode(self) -> EncodedRows:
        """All rows with their answers; both models read one encoding."""
        return self._encoded

    @cached_property
    def _encoded(self) -> EncodedRows:
        writer = owner_tokenizer(self.tokenizers, self.format)
        note = renderings_note(self.tokenizers, self.format, self.data.train[0])
        prompt_notes = [*rendering_notes(self.data, writer, self.format), *([note] if note is not None else [])]
        for text in prompt_notes:
            logger.warning("data: %s", text)
        splits = {split: self._encode(getattr(self.data, split), self.tokenizer) for split in SPLITS}
        if self.shared_outputs is not None:
            for encoded in splits.values():
                check_labels(encoded.rows, SharedVocabulary(self.shared_outputs))
        notes = notes_on_rows(splits)
        for text in notes:
            logger.warning("data: %s", text)
        logger.info("%s", shown_row(splits["train"].rows[0], self.tokenizer, self.format, seq2seq=self.seq2seq))
        return EncodedRows(
            splits={split: encoded.rows for split, encoded in splits.items()},
            cuts={split: encoded.cut for split, encoded in splits.items()},
            collator=Collator(pad_id(self.tokenizer), seq2seq=self.seq2seq),
            tokenizer=self.tokenizer,
            dropped=count_reasons([row for encoded in splits.values() for row in encoded.dropped]),
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
        """Refuse a model with fewer positions than the longest row, or the longest source and target."""
        check_positions(name, config, self.recipe.data.max_length)

    def stop_ids(self, model: PreTrainedModel) -> list[int]:
        """Tokens that end an answer of a model that reads these rows."""
        return stop_ids(model, self._encoded.tokenizer, self.format)

    def validation_metrics(self) -> ValidationMetrics:
        """The nll of the validation answers; if the recipe has validation rows answered, the metric of the task."""
        section = self.recipe.generation
        assert section is not None
        if section.validation_rows is None:
            return ValidationMetrics("nll")
        limit, metric = section.validation_rows, self.recipe.task.metric
        questions, prompts = self.questions("validation", self._encoded.ids("validation"))

        def of_model(model: PreTrainedModel) -> dict[str, float]:
            answered, answers = validation_answers(
                model,
                self._encoded.tokenizer,
                questions,
                prompts,
                self.settings,
                stop_ids=self.stop_ids(model),
                rouge=self.rouge,
                limit=limit,
                precision=resolve_precision(self.recipe.training.precision),
            )
            metrics = {name: answers.metrics()[name] for name in ROUGE} | answers.own_metrics(answered, metric)
            return {name: float("nan") if value is None else value for name, value in metrics.items()}

        return ValidationMetrics(metric, of_model=of_model)

    def questions(self, split: str, ids: Sequence[str]) -> tuple[list[Question], list[EncodedRow]]:
        """Rows of a split as questions and as prompts."""
        by_id = {example.id: example for example in getattr(self.data, split)}
        examples = [by_id[id_] for id_ in ids]
        tokenizer = self._encoded.tokenizer
        texts = render_prompts(examples, tokenizer, self.format)
        questions = [
            Question(example.id, text, example.references) for example, text in zip(examples, texts, strict=True)
        ]
        prompts = encode_prompts(examples, tokenizer, self.format, **self._lengths()).rows
        return questions, prompts

    def _test_questions(self) -> tuple[list[Question], list[EncodedRow]]:
        assert self.recipe.generation is not None
        return self.questions("test", self._encoded.ids("test")[: self.recipe.generation.rows])

    def look(self, teacher: PreTrainedModel, rows: Sequence[EncodedRow]) -> SanityResult:
        """The likelihood of the validation answers, compared with a unigram model of the training answers."""
        batches = self._encoded.collated(rows, batch_size=self.settings.batch_size)
        precision = resolve_precision(self.recipe.teacher.precision)
        likelihood = likelihoods(teacher, batches, vocab_size=self.shared_outputs, precision=precision)
        train, validation = ([row["labels"] for row in part] for part in (self._encoded.splits["train"], rows))
        return language_model_sanity(likelihood, train, validation, len(self._encoded.tokenizer))

    def predict(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel,
        followed: GenerationResult | None = None,
        is_untrained: bool = False,
    ) -> GenerationResult:
        """Answers to the test prompts, and the likelihood of the references."""
        encoded = self._encoded
        questions, prompts = self._test_questions()
        precision = resolve_precision(self.recipe.training.precision)
        batches = list(encoded.batches("test", num_rows=len(questions), batch_size=self.settings.batch_size))
        states = HeadStates.read(model, batches, precision=precision) if model is teacher else None
        teacher_states = states if followed is None else followed.states
        answers = answer_questions(
            model,
            encoded.tokenizer,
            questions,
            prompts,
            self.settings,
            stop_ids=self.stop_ids(model),
            limit=UNTRAINED_ROWS if is_untrained else None,
            rouge=self.rouge,
            batches=batches,
            states=states,
            teacher=(teacher_states or teacher) if encoded.tokenizer is self.tokenizer else None,
            vocab_size=self.shared_outputs,
            precision=precision,
            progress="test rows",
        )
        return GenerationResult(answers, self.decoding_of(model), states)

    def asked(self, model: PreTrainedModel) -> dict[str, str]:
        """Prompts and labels of the rows, all settings of the decoding, and the outputs that are compared."""
        _, prompts = self._test_questions()
        rows = self._encoded.splits["test"][: len(prompts)]
        texts = json.dumps([[prompt["input_ids"] for prompt in prompts], [row["labels"] for row in rows]])
        return {
            "prompts": hashlib.blake2b(texts.encode(), digest_size=16).hexdigest(),
            "decoding": json.dumps(self.decoding_of(model), sort_keys=True, default=str),
            "shared_outputs": str(self.shared_outputs),
        }

    def pack(self, results: GenerationResult) -> StoredResults:
        """Answers, likelihoods and states; ROUGE follows from the answers."""
        return pack(results)

    def unpack(self, stored: StoredResults, model: PreTrainedModel) -> GenerationResult:
        """Results of a model whose answers and states were stored."""
        questions, _ = self._test_questions()
        results = unpack(stored, model, questions, self.rouge, self.decoding_of(model))
        if tuple(results.answers.answers) != self.settings.seeds:
            raise ValueError("other decoding seeds")
        return results

    def decoding_of(self, model: PreTrainedModel) -> dict[str, object]:
        """Everything that decides the answers of a model."""
        return effective_settings(model, self.settings, self.stop_ids(model))

    def baselines(self) -> dict[str, GenerationResult]:
        """The first sentence of each document that is to be summarized; for other prompts, the question itself."""
        questions, _ = self._test_questions()
        if self.data.kind != "summarization":
            turns = {example.id: example.turns[-1].content for example in self.data.test}
            echoes = [turns[question.id] for question in questions]
            return {_ECHO: GenerationResult(baseline_answers(echoes, questions, self.rouge))}
        documents = {example.id: example.document or "" for example in self.data.test}
        sentences = [first_sentence(documents[question.id]) for question in questions]
        return {"first_sentence": GenerationResult(baseline_answers(sentences, questions, self.rouge))}

    def metrics(self, results: GenerationResult, teacher: GenerationResult) -> dict[str, float | None]:
        """ROUGE, likelihood, agreement with the teacher, and the share of answers that were cut at the limit."""
        of_user = results.answers.own_metrics(self._test_questions()[0], self.recipe.task.metric)
        return {**results.answers.metrics(), **of_user}

    def write(self, path: Path, results: Mapping[str, GenerationResult]) -> None:
        """Prompts, references and all answers with what they score."""
        write_answers(path, self._test_questions()[0], {name: result.answers for name, result in results.items()})

    def report(self, results: Mapping[str, GenerationResult]) -> TestReport:
        """Example answers side by side, and how they were made."""
        assert self.recipe.generation is not None
        questions, _ = self._test_questions()
        adds_special_tokens, prefix = plain_call(self.tokenizer, self.format, seq2seq=self.seq2seq)
        record = GenerationRecord(
            rows=len(questions),
            kind="seq2seq" if self.seq2seq else "causal",
            is_chat=self.format.kind == "chat",
            adds_special_tokens=adds_special_tokens,
            prefix=prefix,
            layout=self.format.layout,
            max_new_tokens=self.settings.max_new_tokens,
            decoding={name: result.decoding for name, result in results.items() if result.decoding},
            cost_tokens=self._cost_tokens,
            stemmer=self.rouge.stemmer,
            tokenizer=self.rouge.tokenizer,
        )
        answers = {name: result.answers for name, result in results.items()}
        # Beside the prompt, an answer that only repeats it would show nothing.
        shown = {name: answer for name, answer in answers.items() if name != _ECHO}
        examples = answer_examples(questions, shown, limit=self.recipe.generation.examples)
        notes = answer_notes(questions, answers, self.rouge)
        intervals = text_intervals(answers, self.recipe.task.metric)
        return TestReport(answers=examples, generation=record, notes=notes, intervals=intervals)

    def serving(self) -> ServingSettings:
        """Columns, lengths, prompt and decoding."""
        section = self.recipe.data
        names = ("document",) if self.data.kind == "summarization" else ("prompt", "context")
        columns = {name: getattr(section, name) for name in (("messages",) if section.messages else names)}
        return ServingSettings(
            task=self.recipe.task.type,
            problem=self.recipe.task.problem,
            columns={name: column for name, column in columns.items() if column is not None},
            max_length=section.max_length,
            max_answer_length=section.max_answer_length,
            prompt=plain_prompt(self.format),
            generation=asdict(self.settings),
        )

    @property
    def _cost_tokens(self) -> int:
        return min(COST_TOKENS, self.settings.max_new_tokens)

    def costs(
        self, folders: Sequence[Path], *, as_teacher: Sequence[bool], own_batches: Mapping[int, list[dict[str, Any]]]
    ) -> list[Cost]:
        """Answers of a fixed length to test prompts."""
        batches = self.cost_batches()
        return measure_costs(
            folders,
            batches,
            precision=resolve_precision(self.recipe.training.precision),
            repeats=3,
            new_tokens=self._cost_tokens,
            single_rows=len(batches[0]["input_ids"]),
            own_batches=own_batches,
        )

    def cost_batches(self, *, as_teacher: bool = False) -> list[dict[str, Any]]:
        """The first test prompts in one batch."""
        assert self.recipe.generation is not None
        num_rows = min(COST_ROWS, self.recipe.generation.rows or COST_ROWS)
        _, prompts = self.questions("test", self._encoded.ids("test")[:num_rows])
        collator = Collator(pad_id(self._encoded.tokenizer), padding_side="right" if self.seq2seq else "left")
        return [collator(prompts)]

    def for_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "GenerationTask":
        """The same task for another language model of this kind, with its own chat template, as when it is served.

        Raises:
            VocabularyError: It has no chat template, and the rows are messages.
            DataError: Its template writes none of the rows, or it reads fewer tokens than the longest row may have.
        """
        is_same = same_tokenizer(tokenizer, self.tokenizer)
        task = copy.copy(self)
        if tokenizer.chat_template or not is_same:
            task.format = self._format_of({"the model": tokenizer})
            task.data = with_renderable_rows(self.data, tokenizer, task.format, self.recipe.data.bad_rows)
        if is_same:
            tokenizer = self.tokenizer
        task.check_config("the model", model.config)
        encoded = task._encode(task.data.test, tokenizer)
        task._encoded = EncodedRows(
            {"test": encoded.rows},
            {"test": encoded.cut},
            Collator(pad_id(tokenizer), seq2seq=self.seq2seq),
            tokenizer,
        )
        return task
