"""Whether rows can be tokenized for both models: one vocabulary, lengths that fit, tokens that are embedded."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from flexkd.data.encoding.vocabulary import check_largest_id, check_room, compare_vocabularies, one_tokenizer_error
from flexkd.data.encoding.vocabulary_cut import check_embedded, kept_tokens
from flexkd.data.examples.classification import ClassificationData, Example
from flexkd.data.examples.generation import GenerationData
from flexkd.errors import DataError, FlexKDError, ShapeError
from flexkd.models.forward.positions import has_soft_limit, position_limit
from flexkd.models.forward.row_ends import check_row_ends, row_end
from flexkd.preflight.inputs import RecipeInputs, collect_errors, student_tokenizer_source, tokenizer_key
from flexkd.preflight.model_files import ModelFiles
from flexkd.preflight.tokenizer_files import TokenizerFile

_NUM_COMPARED: Final = 200
"""Rows that two tokenizers are compared on: where they differ at all, nearly every row shows it."""


def length_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """The longest row fits into the positions of every model whose number of positions is fixed."""
    longest = inputs.recipe.data.max_length
    for where, model in inputs.models.items():
        limit = position_limit(model.config)
        if limit is not None and longest > limit and not has_soft_limit(model.config):
            yield ShapeError(
                f"data.max_length: {longest} tokens are more than the {limit} positions of "
                f"{where} '{model.source}'. Use {limit} or fewer."
            )


def length_notes(inputs: RecipeInputs) -> Iterator[str]:
    """Rows that are longer than those that a model with rotary positions was trained on."""
    longest = inputs.recipe.data.max_length
    for where, model in inputs.models.items():
        limit = position_limit(model.config)
        if limit is not None and longest > limit and has_soft_limit(model.config):
            yield f"data.max_length: {longest} is above the {limit} tokens that {where} was trained for."


def vocabulary_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """Both models share one vocabulary, where the student brings its own tokenizer and a loss compares tokens.

    Raises:
        VocabularyError: As `compare_vocabularies`.
    """
    recipe, models = inputs.recipe, inputs.models
    teacher, student = (inputs.tokenizers.get(f"{name}.tokenizer") for name in ("teacher", "student"))
    if recipe.generation is None or teacher is None or student is None:
        return ()
    # A student made from a config has as many outputs as its teacher, whatever tokenizer it reads with.
    student_model = "student.model" if recipe.student.start == "pretrained" else "teacher.model"
    num_outputs = [
        _vocab_size(models.get(name)) or max(tokenizer.get_vocab().values()) + 1
        for name, tokenizer in (("teacher.model", teacher), (student_model, student))
    ]
    compare_vocabularies(teacher, student, *num_outputs)
    return ()


def cut_vocabulary_errors(inputs: RecipeInputs) -> Iterable[FlexKDError]:
    """The teacher's vocabulary can be cut to the tokens that the student is to know.

    Raises:
        VocabularyError: As `kept_tokens` and `check_embedded`.
    """
    size, tokenizer = inputs.recipe.student.vocabulary, inputs.tokenizers.get("teacher.tokenizer")
    if size is not None and tokenizer is not None:
        definition = json.loads(tokenizer.backend.to_str())
        kept_tokens(definition, {}, size=size if isinstance(size, int) else None)
        check_embedded(tokenizer.get_vocab().values(), _vocab_size(inputs.models.get("teacher.model")))
    return ()


def position_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Both models tokenize a row alike, where a classifier's features are compared at all tokens."""
    features = inputs.recipe.objective.features
    teacher, student = (inputs.tokenizers.get(f"{name}.tokenizer") for name in ("teacher", "student"))
    if not isinstance(inputs.data, ClassificationData) or teacher is None or student is None:
        return
    if features is None or features.weight == 0 or features.positions != "tokens":
        return
    texts = _texts(inputs.data)[:_NUM_COMPARED]
    if teacher.encode(texts) != student.encode(texts):
        yield one_tokenizer_error()


def row_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Every row has room for text, at least one token, and only ids that its model embeds.

    Raises:
        VocabularyError: As `check_largest_id`.
    """
    if isinstance(inputs.data, ClassificationData):
        yield from _classification_row_errors(inputs, inputs.data)
    for name, tokenizer in inputs.tokenizers.items():
        where = name.replace("tokenizer", "model")
        size = _vocab_size(inputs.models.get(where))
        if where == "student.model" and inputs.recipe.student.start != "pretrained":
            continue  # a model made from a config embeds as many tokens as its tokenizer has
        if inputs.data is None or size is None or max(tokenizer.get_vocab().values()) < size:
            continue
        largest_ids = [max(ids, default=0) for ids in tokenizer.encode(_texts(inputs.data))]
        check_largest_id(max(largest_ids), size, where=where)


def row_end_errors(inputs: RecipeInputs) -> Iterator[FlexKDError]:
    """Rows of an encoder-decoder that classifies hold its end token alike: its head reads each row at the last one."""
    recipe, data, errors = inputs.recipe, inputs.data, list[FlexKDError]()
    student_reads_as = "teacher" if student_tokenizer_source(recipe) is None else "student"
    readers = {"student.model": f"{student_reads_as}.tokenizer"}
    for where, model in inputs.models.items():
        # What config.json does not hold is a default of the config's class, which is not known here.
        if recipe.generation is not None or "eos_token_id" not in model.config:
            continue
        tokenizer = inputs.tokenizers.get(readers.get(where, tokenizer_key(where)))
        with collect_errors(errors):
            end = row_end(model.config, where=where)
            if end is not None and tokenizer is not None and isinstance(data, ClassificationData):
                counts = [ids.count(end) for ids in tokenizer.encode(_texts(data))]
                check_row_ends(counts, end, where=where, names=[example.id for example in _examples(data)])
    yield from errors


def _classification_row_errors(inputs: RecipeInputs, data: ClassificationData) -> Iterator[FlexKDError]:
    """Rows leave room for text beside special tokens; without special tokens, none of them may be empty."""
    errors: list[FlexKDError] = []
    is_pair = len(data.train[0].texts) == 2
    distinct = {id(tokenizer): tokenizer for tokenizer in inputs.tokenizers.values()}
    for tokenizer in distinct.values():
        num_special = tokenizer.num_special(pair=is_pair)
        with collect_errors(errors):
            check_room(inputs.recipe.data.max_length, num_special)
        if num_special == 0:
            with collect_errors(errors):
                _check_tokens(tokenizer, data)
    yield from errors


def _check_tokens(tokenizer: TokenizerFile, data: ClassificationData) -> None:
    """Refuse a row in which the tokenizer finds nothing."""
    examples = _examples(data)
    for example, ids in zip(examples, tokenizer.encode([example.texts for example in examples]), strict=True):
        if not ids:
            raise DataError(f"{example.id}: the tokenizer finds no token in this row. Remove the row.")


def _examples(data: ClassificationData) -> list[Example]:
    return [*data.train, *data.validation, *data.test]


def _texts(data: ClassificationData | GenerationData) -> Sequence[tuple[str, ...]]:
    """All texts of all splits: of a classified row its text or pair, of other rows each turn, document and answer."""
    if isinstance(data, ClassificationData):
        return [example.texts for example in _examples(data)]
    examples = [example for split in (data.train, data.validation, data.test) for example in split]
    return [
        (text,)
        for example in examples
        for text in (*(turn.content for turn in example.turns), example.document, example.answer)
        if text is not None
    ]


def _vocab_size(model: ModelFiles | None) -> int | None:
    """Tokens that a model embeds, as its config says."""
    config = {} if model is None else model.config
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) else None
