"""Notes on the encoded rows of a text task."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from flexkd.data.encoding.encoded import EncodedRow, EncodedSplit
from flexkd.data.encoding.prompts import PromptFormat
from flexkd.data.examples.row_checks import count_reasons


def shown_row(
    row: EncodedRow, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, *, seq2seq: bool
) -> str:
    """One training row as the models read it, with its special tokens, for the log."""
    answer = [token for token in row["labels"] if token >= 0]
    prompt = row["input_ids"] if seq2seq else row["input_ids"][: -len(answer)]
    is_chat = prompt_format.kind == "chat"
    how = f"with the chat template of the {prompt_format.owner}" if is_chat else "in a plain layout"
    text = f"{tokenizer.decode(prompt)!r}, and the answer {tokenizer.decode(answer)!r}"
    return f"prompts are written {how}; row {row['id']}: {text}"


def notes_on_rows(encoded: Mapping[str, EncodedSplit]) -> list[str]:
    """Notes on the rows of each split: unusual ones, and those that are left out."""
    notes = [f"{name}: {text}" for name, split in encoded.items() for text in split.notes]
    for name, split in encoded.items():
        if split.dropped:
            reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count_reasons(split.dropped).items())
            notes.append(f"{name}: {len(split.dropped):,} rows do not fit and are left out ({reasons}).")
    return notes
