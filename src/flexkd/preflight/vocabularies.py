"""Whether models and tokenizers speak of the same tokens, and whether rows have room among them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from flexkd.data.encoding.vocabulary import check_largest_id, check_room, compare_vocabularies, one_tokenizer_error
from flexkd.data.examples.classification import ClassificationData
from flexkd.data.examples.generation import GenerationData
from flexkd.errors import DataError, FlexKDError
from flexkd.preflight.evidence import Evidence, tried
from flexkd.preflight.model_files import ModelFiles
from flexkd.preflight.vocabulary_files import TokenizerFile

_COMPARED: Final = 200
"""Rows that two tokenizers are compared on: where they differ at all, nearly every row tells."""


def vocabulary_errors(evidence: Evidence) -> Iterable[FlexKDError]:
    """Losses on tokens need one vocabulary, where the student brings a tokenizer of its own."""
    recipe, models = evidence.recipe, evidence.models
    teacher, student = (evidence.tokenizers.get(f"{name}.tokenizer") for name in ("teacher", "student"))
    if recipe.generation is None or teacher is None or student is None:
        return ()
    # A fresh student has as many outputs as its teacher, whatever tokenizer it reads with.
    second = "student.model" if recipe.student.start == "pretrained" else "teacher.model"
    outputs = [
        _embedded(models.get(name)) or max(tokenizer.get_vocab().values()) + 1
        for name, tokenizer in (("teacher.model", teacher), (second, student))
    ]
    compare_vocabularies(teacher, student, *outputs)
    return ()


def position_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """A classifier is taught at all tokens only where both models read the same ones."""
    features = evidence.recipe.objective.features
    teacher, student = (evidence.tokenizers.get(f"{name}.tokenizer") for name in ("teacher", "student"))
    if not isinstance(evidence.data, ClassificationData) or teacher is None or student is None:
        return
    if features is None or features.weight == 0 or features.positions != "tokens":
        return
    texts = _texts(evidence.data)[:_COMPARED]
    if teacher.rows(texts) != student.rows(texts):
        yield one_tokenizer_error()


def row_errors(evidence: Evidence) -> Iterator[FlexKDError]:
    """Every row has room for text, at least one token, and ids that its model embeds."""
    if isinstance(evidence.data, ClassificationData):
        yield from _class_row_errors(evidence, evidence.data)
    for name, tokenizer in evidence.tokenizers.items():
        where = name.replace("tokenizer", "model")
        size = _embedded(evidence.models.get(where))
        if where == "student.model" and evidence.recipe.student.start != "pretrained":
            continue  # a fresh model gets as many as its tokenizer has
        if evidence.data is None or size is None or max(tokenizer.get_vocab().values()) < size:
            continue
        ids = [max(row, default=0) for row in tokenizer.rows(_texts(evidence.data))]
        check_largest_id(max(ids), size, where=where)


def _class_row_errors(evidence: Evidence, data: ClassificationData) -> Iterator[FlexKDError]:
    errors: list[FlexKDError] = []
    is_pair = len(data.train[0].texts) == 2
    for tokenizer in {id(one): one for one in evidence.tokenizers.values()}.values():
        num_special = tokenizer.num_special(pair=is_pair)
        length = evidence.recipe.data.max_length
        tried(errors, lambda: check_room(length, num_special))  # noqa: B023 (called at once)
        if num_special == 0:
            tried(errors, lambda: _check_tokens(tokenizer, data))  # noqa: B023 (called at once)
    yield from errors


def _check_tokens(tokenizer: TokenizerFile, data: ClassificationData) -> None:
    examples = [example for rows in (data.train, data.validation, data.test) for example in rows]
    for example, row in zip(examples, tokenizer.rows([one.texts for one in examples]), strict=True):
        if not row:
            raise DataError(f"{example.id}: the tokenizer finds no token in this row. Remove the row.")


def _texts(data: ClassificationData | GenerationData) -> Sequence[tuple[str, ...]]:
    if isinstance(data, ClassificationData):
        return [example.texts for rows in (data.train, data.validation, data.test) for example in rows]
    examples = [example for rows in (data.train, data.validation, data.test) for example in rows]
    return [
        (text,)
        for one in examples
        for text in (*(turn.content for turn in one.turns), one.document, one.answer)
        if text is not None
    ]


def _embedded(model: ModelFiles | None) -> int | None:
    """Tokens that a model embeds, as its config says."""
    config = {} if model is None else model.config
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None
