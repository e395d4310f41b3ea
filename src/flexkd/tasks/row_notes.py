"""What a log and a page say of encoded rows: how one of them reads to a model, and which did not fit."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexkd.data.encoding.encoded import EncodedSplit
from flexkd.data.encoding.prompts import PromptFormat
from flexkd.data.examples.row_checks import count_reasons


def shown_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, *, seq2seq: bool
) -> str:
    """One training row as the models read it, special tokens and all."""
    answer = [token for token in row["labels"] if token >= 0]
    prompt = row["input_ids"] if seq2seq else row["input_ids"][: -len(answer)]
    is_chat = prompt_format.kind == "chat"
    how = f"with the chat template of the {prompt_format.owner}" if is_chat else "in a plain layout"
    read = f"{tokenizer.decode(prompt)!r}, and the answer {tokenizer.decode(answer)!r}"
    return f"prompts are written {how}; row {row['id']}: {read}"


def notes_on_rows(encoded: Mapping[str, EncodedSplit]) -> list[str]:
    """What a reader has to know of the rows of each split: odd ones, and those that are left out."""
    notes = [f"{split}: {text}" for split, one in encoded.items() for text in one.notes]
    for split, one in encoded.items():
        if one.dropped:
            reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count_reasons(one.dropped).items())
            notes.append(f"{split}: {len(one.dropped):,} rows do not fit and are left out ({reasons}).")
    return notes
