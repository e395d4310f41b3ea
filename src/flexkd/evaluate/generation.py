"""Answers of a model to prompts, decoded with the settings of the run and never with defaults of the checkpoint."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexkd.core.tensors import Number
from flexkd.data.encoding.collation import Collator
from flexkd.data.encoding.vocabulary import check_largest_id
from flexkd.display.progress import Progress
from flexkd.errors import DataError, RecipeError, UnsupportedModelError
from flexkd.evaluate.inference import inference
from flexkd.evaluate.sampling import token_sampler
from flexkd.models.forward.embeddings import num_embedded_tokens
from flexkd.models.forward.hidden import is_generative
from flexkd.models.forward.positions import has_soft_limit, position_limit
from flexkd.processes import divided

_log = logging.getLogger(__name__)

_PROMPT_KEYS: Final = ("id", "input_ids", "attention_mask")
_NO_SETTINGS: Final = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "use_cache",
    "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config",
)  # fmt: skip
"""Entries of a checkpoint's generation_config that do not affect decoding, or that are used unchanged."""

_SAMPLING: Final = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class GenerationSettings:
    """Decoding settings of every model of a run: teacher, baselines and students, in validation and test.

    Attributes:
        max_new_tokens: Limit of the length of an answer.
        num_beams: 1: greedy decoding, or sampling with `do_sample`.
        do_sample: Sample each token; `temperature`, `top_p` and `top_k` (0: all tokens) have an effect only then.
        repetition_penalty: 1: none.
        no_repeat_ngram_size: 0: no restriction.
        length_penalty: Has an effect only with several beams.
        seeds: Each gives one answer to every prompt; without sampling there is one seed.
        batch_size: Prompts of a batch; affects answers only by rounding.
    """

    max_new_tokens: int
    num_beams: int = 1
    do_sample: bool = False
    temperature: Number = 1.0
    top_p: Number = 1.0
    top_k: int = 0
    repetition_penalty: Number = 1.0
    no_repeat_ngram_size: int = 0
    length_penalty: Number = 1.0
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"generation.{name}: must be 1 or more, was {getattr(self, name)}.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise RecipeError(
                f"generation: temperature is {self.temperature} and top_p {self.top_p}, where the first is above 0 and "
                "the second above 0 and at most 1. Set do_sample: false for the likeliest tokens."
            )
        if self.do_sample and self.num_beams > 1:
            raise RecipeError(
                f"generation.do_sample: cannot go with num_beams {self.num_beams}. Sample with num_beams: 1, or search "
                "with do_sample: false."
            )
        if not self.seeds or (len(self.seeds) > 1 and not self.do_sample):
            raise RecipeError(
                f"generation.seeds: {list(self.seeds)} where do_sample is {self.do_sample}. Give one seed, or sample: "
                "without sampling every seed gives the same answers."
            )


@dataclass(frozen=True)
class Answer:
    """Answer to one prompt; `is_cut` if the limit ended it and not a stop token.

    `num_tokens` counts neither the stop token nor the start token of a decoder; None for answers of no model.
    """

    id: str
    text: str
    num_tokens: int | None
    is_cut: bool


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    seed: int = 0,
    precision: str = "float32",
    progress: str | None = None,
) -> list[Answer]:
    """All answers, in the order of the prompts.

    Args:
        model: As in `iterate_answers`, like all others but the last.
        tokenizer: As in `iterate_answers`.
        prompts: As in `iterate_answers`.
        settings: As in `iterate_answers`.
        stop_ids: As in `iterate_answers`.
        seed: As in `iterate_answers`.
        precision: As in `iterate_answers`.
        progress: Names the work where its progress is shown; None: it is not.
    """
    batches = iterate_answers(model, tokenizer, prompts, settings, stop_ids=stop_ids, seed=seed, precision=precision)
    by_id: dict[str, Answer] = {}
    with nullcontext() if progress is None else Progress(progress, len(prompts), "rows") as shown:
        for answers in batches:
            by_id |= {answer.id: answer for answer in answers}
            if shown is not None:
                shown.advance(len(answers))
    return [by_id[str(prompt["id"])] for prompt in prompts]


def iterate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
    *,
    stop_ids: Sequence[int],
    seed: int = 0,
    precision: str = "float32",
) -> Iterator[list[Answer]]:
    """Batches of answers as they are finished, from the longest prompts to the shortest.

    Of the checkpoint's generation_config only the tokens are used with which its architecture starts:
    `decoder_start_token_id`, and `forced_bos_token_id`, the language of a multilingual decoder. An end token that it
    forces at the limit is not used, as it would hide that an answer was cut. The model does not change.

    A sampled token depends on the seed, the id of the prompt and the distribution, never on other rows of the batch.

    Args:
        model: A causal model, or an encoder-decoder.
        tokenizer: The model's own; decodes the answers, without special tokens.
        prompts: Each with a distinct `id`, `input_ids` and optionally `attention_mask`; not padded.
        settings: How answers are decoded.
        stop_ids: Tokens that end an answer, such as the end of text and the end of turn of a chat template.
        seed: Seed of the sampling; one of `settings.seeds`.
        precision: As in `inference`.

    Raises:
        RecipeError: A prompt and its answer exceed the model's positions.
        DataError: A prompt without tokens, or two prompts with the same id.
        VocabularyError: A token that the model does not know.
        UnsupportedModelError: The model writes no text.
    """
    _check_prompts(model, prompts)
    _check_room(model, prompts, settings)
    config = _generation_config(model, settings, stop_ids)
    assert isinstance(config.pad_token_id, int)
    collator = Collator(config.pad_token_id, padding_side="right" if model.config.is_encoder_decoder else "left")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]["input_ids"]))

    def answer(start: int) -> list[Answer]:
        rows = [prompts[index] for index in order[start : start + settings.batch_size]]
        batch = collator([{key: row[key] for key in _PROMPT_KEYS if key in row} for row in rows])
        ids = batch["input_ids"].to(model.device)
        mask = batch["attention_mask"].to(model.device)
        sampler = _sampler(settings, seed, batch["example_id"])
        with inference(model, precision), _without_defaults(model):
            output = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=sampler
            )
        new = output[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].cpu()
        return [
            _answer(tokenizer, id_, row, stop_ids, config.forced_bos_token_id)
            for id_, row in zip(batch["example_id"], new.tolist(), strict=True)
        ]

    yield from divided(range(0, len(order), settings.batch_size), answer)


def _answer(
    tokenizer: PreTrainedTokenizerBase, id_: str, ids: list[int], stop_ids: Sequence[int], forced: int | None
) -> Answer:
    if ids and forced is not None and ids[0] == forced:
        ids = ids[1:]
    end = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert isinstance(text, str)
    return Answer(id_, text.strip(), end, end == len(ids))


def effective_settings(
    model: PreTrainedModel, settings: GenerationSettings, stop_ids: Sequence[int]
) -> dict[str, object]:
    """Every setting that affects this model's answers; `not_used` holds the defaults of its checkpoint."""
    config = _generation_config(model, settings, stop_ids)
    not_used = {
        key: value
        for key, value in model.generation_config.to_diff_dict().items()
        if key not in _NO_SETTINGS and value is not None and value != getattr(config, key, None)
    }
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {
        **{key: value for key, value in plain.items() if settings.do_sample or key not in _SAMPLING},
        "stop_ids": list(stop_ids),
        "decoder_start_token_id": config.decoder_start_token_id,
        "forced_bos_token_id": config.forced_bos_token_id,
        "early_stopping": False,
        "not_used": not_used,
    }


def saved_settings(model: PreTrainedModel, settings: GenerationSettings, stop_ids: Sequence[int]) -> GenerationConfig:
    """Generation config with which a model is saved, so that plain `generate` decodes as in the evaluation."""
    config = _generation_config(model, settings, stop_ids)
    if settings.do_sample:
        config.update(do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
    config.bos_token_id = model.generation_config.bos_token_id
    return config


def _generation_config(
    model: PreTrainedModel, settings: GenerationSettings, stop_ids: Sequence[int]
) -> GenerationConfig:
    beams = {"length_penalty": settings.length_penalty, "early_stopping": False} if settings.num_beams > 1 else {}
    pad = model.config.pad_token_id
    is_token = pad is not None and 0 <= pad < (num_embedded_tokens(model) or 0)
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        do_sample=False,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        use_cache=True,
        eos_token_id=list(stop_ids),
        # Any token will do: padding is masked, and answers are read up to their stop token.
        pad_token_id=pad if is_token else stop_ids[0],
        decoder_start_token_id=decoder_start(model) if model.config.is_encoder_decoder else None,
        forced_bos_token_id=model.generation_config.forced_bos_token_id,
        **beams,
    )


def decoder_start(model: PreTrainedModel) -> int:
    """The token with which a decoder starts; training puts it before the labels as well."""
    configs = (model.config, model.generation_config)
    starts = [getattr(config, "decoder_start_token_id", None) for config in configs]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its config names no decoder_start_token_id. Set it to the token that its "
            "decoder starts with."
        )
    return int(start)


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Take away the model's generation config, from which `generate` fills in missing settings."""
    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def _check_prompts(model: PreTrainedModel, prompts: Sequence[Mapping[str, Any]]) -> None:
    if not is_generative(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: writes no text. Use flexkd.evaluate.classification.predict."
        )
    distinct_ids: set[str] = set()
    for prompt in prompts:
        id_, ids = str(prompt["id"]), prompt["input_ids"]
        if len(ids) == 0 or id_ in distinct_ids:
            problem = "has no tokens" if len(ids) == 0 else "appears twice"
            raise DataError(f"prompts: '{id_}' {problem}. Give each prompt an id of its own and at least one token.")
        distinct_ids.add(id_)
    largest = max((max(prompt["input_ids"]) for prompt in prompts), default=0)
    check_largest_id(largest, num_embedded_tokens(model), where=type(model).__name__)


def _check_room(model: PreTrainedModel, prompts: Sequence[Mapping[str, Any]], settings: GenerationSettings) -> None:
    longest = max((len(prompt["input_ids"]) for prompt in prompts), default=0)
    config = model.config.to_dict()
    limit = position_limit(config)
    if model.config.is_encoder_decoder:
        # Relative positions (T5) have no limit; the n_positions in such a config is unused.
        limit = config.get("max_position_embeddings")
        needed = max(longest, settings.max_new_tokens)
    else:
        needed = longest + settings.max_new_tokens
    if limit is None or needed <= limit:
        return
    text = (
        f"generation.max_new_tokens: the longest prompt has {longest} tokens; with {settings.max_new_tokens} new ones "
        f"that is more than the {limit} positions of {type(model).__name__}. Lower max_new_tokens or data.max_length."
    )
    if not has_soft_limit(config):
        raise RecipeError(text)
    _log.warning("%s It runs, but was not trained for that.", text)


def _sampler(settings: GenerationSettings, seed: int, ids: Sequence[str]) -> LogitsProcessorList:
    if not settings.do_sample:
        return LogitsProcessorList()
    return token_sampler(seed, ids, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
