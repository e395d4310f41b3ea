"""How answers were asked for and decoded, and the answers themselves, as page and card show them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexkd.record import AnswerExample, GenerationRecord
from flexkd.report.wording import ROLES, shown

_LONGEST_PROMPT: Final = 1200
_LONGEST_ANSWER: Final = 600
_FILLED: Final = {"prompt": "Name three colours.", "context": "", "document": "A long text."}
_SLOT: Final = re.compile(r"\{(prompt|context|document)\}")
_ALWAYS: Final = ("max_new_tokens", "num_beams", "do_sample", "seeds")
_NEUTRAL: Final = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "forced_bos_token_id": None}
_SILENT: Final = ("not_used", "batch_size", "stop_ids", "decoder_start_token_id", "early_stopping", *_ALWAYS)


@dataclass(frozen=True)
class AnswerView:
    """One answer, or a reference; `mark` stands on the student's."""

    who: str
    text: str
    score: str
    is_cut: bool = False
    mark: bool = False


def answer_view(one: AnswerExample) -> dict[str, object]:
    """A prompt with its references and what each model answered, nothing left out but the ends of long texts."""
    references = [AnswerView("reference", _short(text, _LONGEST_ANSWER), "") for text in one.references]
    answers = [
        AnswerView(
            ROLES.get(who, who.replace("_", " ")),
            _short(text, _LONGEST_ANSWER),
            "" if one.rouge.get(who) is None else f"rougeL {shown(one.rouge[who])}",
            is_cut=who in one.cut,
            mark=who == "student",
        )
        for who, text in one.answers.items()
    ]
    return {"prompt": _short(one.prompt, _LONGEST_PROMPT), "said": [*references, *answers]}


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " ..."


def generation_facts(record: GenerationRecord) -> list[tuple[str, str]]:
    """Prompt, decoding and ROUGE of a run, and what checkpoints would have done otherwise."""
    by_role = {role: entry for role, entry in record.decoding.items() if isinstance(entry, Mapping)}
    texts = {role: decoding_text(entry) for role, entry in by_role.items()}
    one = len(set(texts.values())) == 1
    ignored = [
        f"{ROLES.get(role, role)}: {_pairs(not_used)}"
        for role, entry in by_role.items()
        if isinstance(not_used := entry.get("not_used"), Mapping) and not_used
    ]
    prompt = "the user's turn of the chat template" if record.is_chat else "plain text"
    stemmer = "with Porter's stemmer" if record.stemmer else "without a stemmer"
    return [
        ("prompt", f"{prompt}: {json.dumps(record.layout, ensure_ascii=False)}"),
        *(
            [("decoding, of every model", next(iter(texts.values())))]
            if one
            else [(f"decoding, {ROLES.get(role, role)}", text) for role, text in texts.items()]
        ),
        *([("defaults of checkpoints that were not used", "; ".join(ignored))] if ignored else []),
        ("ROUGE", f"F1, {stemmer}, tokenizer {record.tokenizer}"),
    ]


def decoding_text(settings: Mapping[str, object]) -> str:
    """Settings of decoding in words: the search, the limit, and everything that is not neutral.

    Example:
        >>> decoding_text({"max_new_tokens": 64, "num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 3})
        'greedy, at most 64 new tokens, no repeat ngram size 3'
    """
    beams, seeds = settings.get("num_beams", 1), settings.get("seeds")
    search = "sampling" if settings.get("do_sample") else "greedy" if beams == 1 else f"{beams} beams"
    if settings.get("do_sample") and isinstance(seeds, list):
        search += f" with seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    plain = {"length_penalty": settings.get("length_penalty"), **_NEUTRAL} if beams == 1 else _NEUTRAL
    rest = {
        key: value
        for key, value in settings.items()
        if key not in _SILENT and not (key in plain and value == plain[key])
    }
    parts = [search, f"at most {settings.get('max_new_tokens')} new tokens", _pairs(rest)]
    return ", ".join(part for part in parts if part)


def _pairs(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items())


def example_prompt(record: GenerationRecord) -> str:
    """A prompt as the run wrote them, around a made-up text; paragraphs that stay empty are left out."""
    paragraphs = []
    for paragraph in record.layout.split("\n\n"):
        slots = _SLOT.findall(paragraph)
        if not slots or any(_FILLED[slot] for slot in slots):
            paragraphs.append(_SLOT.sub(lambda match: _FILLED[match[1]], paragraph))
    return "\n\n".join(paragraphs)
