"""How answers were prompted and decoded, and the answers themselves, as page and card show them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexkd.record import AnswerExample, GenerationRecord
from flexkd.report.wording import ROLES, metric_text

_LONGEST_PROMPT: Final = 1200
_LONGEST_ANSWER: Final = 600
SAMPLE_DOCUMENT: Final = "A long text."
_SAMPLE_TEXTS: Final = {"prompt": "Name three colours.", "context": "", "document": SAMPLE_DOCUMENT}
DOCUMENT_SLOT: Final = "{document}"
_SLOT: Final = re.compile(r"\{(prompt|context|document)\}")
_IN_THE_SENTENCE: Final = ("max_new_tokens", "num_beams", "do_sample", "seeds")
"""Settings that `decoding_text` always puts into words."""
_NEUTRAL: Final = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "forced_bos_token_id": None}
_NOT_LISTED: Final = (
    "not_used",
    "batch_size",
    "stop_ids",
    "decoder_start_token_id",
    "early_stopping",
    *_IN_THE_SENTENCE,
)


@dataclass(frozen=True)
class AnswerView:
    """One answer to a prompt, or a reference; `mark` highlights the student's."""

    who: str
    text: str
    score: str
    is_cut: bool = False
    mark: bool = False


def answer_view(example: AnswerExample) -> dict[str, object]:
    """A prompt with its references and the answer of each model, whole but for the ends of long texts."""
    references = [AnswerView("reference", _short(text, _LONGEST_ANSWER), "") for text in example.references]
    answers = [
        AnswerView(
            ROLES.get(who, who.replace("_", " ")),
            _short(text, _LONGEST_ANSWER),
            "" if example.rouge.get(who) is None else f"rougeL {metric_text(example.rouge[who])}",
            is_cut=who in example.cut,
            mark=who == "student",
        )
        for who, text in example.answers.items()
    ]
    return {"prompt": _short(example.prompt, _LONGEST_PROMPT), "answers": [*references, *answers]}


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " ..."


def generation_facts(record: GenerationRecord) -> list[tuple[str, str]]:
    """Prompt, decoding and ROUGE of a run, and the defaults of checkpoints that it did not use."""
    by_role = {role: entry for role, entry in record.decoding.items() if isinstance(entry, Mapping)}
    texts = {role: decoding_text(entry) for role, entry in by_role.items()}
    is_common = len(set(texts.values())) == 1
    if is_common:
        decoding = [("decoding, of every model", next(iter(texts.values())))]
    else:
        decoding = [(f"decoding, {ROLES.get(role, role)}", text) for role, text in texts.items()]
    ignored = [
        f"{ROLES.get(role, role)}: {_pairs(not_used)}"
        for role, entry in by_role.items()
        if isinstance(not_used := entry.get("not_used"), Mapping) and not_used
    ]
    prompt = "the user's turn of the chat template" if record.is_chat else "plain text"
    stemmer = "with Porter's stemmer" if record.stemmer else "without a stemmer"
    return [
        ("prompt", f"{prompt}: {json.dumps(record.layout, ensure_ascii=False)}"),
        *decoding,
        *([("defaults of checkpoints that were not used", "; ".join(ignored))] if ignored else []),
        ("ROUGE", f"F1, {stemmer}, tokenizer {record.tokenizer}"),
    ]


def decoding_text(settings: Mapping[str, object]) -> str:
    """Decoding settings in words: the search, the limit, and every setting that changes something.

    Example:
        >>> decoding_text({"max_new_tokens": 64, "num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 3})
        'greedy, at most 64 new tokens, no repeat ngram size 3'
    """
    beams, seeds = settings.get("num_beams", 1), settings.get("seeds")
    search = "sampling" if settings.get("do_sample") else "greedy" if beams == 1 else f"{beams} beams"
    if settings.get("do_sample") and isinstance(seeds, list):
        search += f" with seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    neutral = {"length_penalty": settings.get("length_penalty"), **_NEUTRAL} if beams == 1 else _NEUTRAL
    others = {
        key: value
        for key, value in settings.items()
        if key not in _NOT_LISTED and not (key in neutral and value == neutral[key])
    }
    parts = [search, f"at most {settings.get('max_new_tokens')} new tokens", _pairs(others)]
    return ", ".join(part for part in parts if part)


def _pairs(settings: Mapping[str, object]) -> str:
    """Names of settings with their values."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())


def example_prompt(record: GenerationRecord, *, open_document: bool = False) -> str:
    """A prompt in the layout of the run, around made-up texts; paragraphs that stay empty are left out.

    Args:
        open_document: Leave the slot `{document}` in the place of the document, or of the context of an instruction.
    """
    texts = _SAMPLE_TEXTS | (dict.fromkeys(("document", "context"), DOCUMENT_SLOT) if open_document else {})
    paragraphs = []
    for paragraph in record.layout.split("\n\n"):
        slots = _SLOT.findall(paragraph)
        if not slots or any(texts[slot] for slot in slots):
            paragraphs.append(_SLOT.sub(lambda match: texts[match[1]], paragraph))
    return "\n\n".join(paragraphs)
