"""Rows of made-up prompts and answers of unequal lengths, for both kinds of language models."""

from typing import Any

import torch
from transformers import PreTrainedModel

from flexkd.data.encoding.collation import Collator
from tests.tiny import FIRST_WORD, VOCABULARY, tiny_model

END = 2


def answer_rows(count: int = 16, *, seq2seq: bool = False) -> list[dict[str, Any]]:
    """Prompts of 3 to 6 tokens, answers of 1 to 6 and their end; beside the prompt, or as a target of their own."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        found: list[int] = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()
        return found

    rows = []
    for index in range(count):
        prompt, answer = draw(3, 7), [*draw(1, 7), END]
        ids = prompt if seq2seq else prompt + answer
        labels = answer if seq2seq else [-100] * len(prompt) + answer
        rows.append({"id": f"row-{index}", "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def collator_of(model: Any, **options: Any) -> Collator:
    """A collator for rows of this model's kind."""
    return Collator(0, seq2seq=bool(model.config.is_encoder_decoder), **options)


def wider_copy(model_type: str, *, seed: int, vocabulary: int) -> PreTrainedModel:
    """A tiny decoder whose first outputs are the model's, and whose padded ones are far from silent."""
    model = tiny_model(model_type, "causal", seed=seed)
    larger = tiny_model(model_type, "causal", seed=seed, vocab_size=vocabulary)
    size = model.config.vocab_size
    state = {name: value for name, value in model.state_dict().items() if value.shape[:1] != (size,)}
    larger.load_state_dict(state, strict=False)
    words, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        larger.get_input_embeddings().weight[:size] = words.weight
        larger.get_output_embeddings().weight[:size] = outputs.weight
        larger.get_output_embeddings().weight[size:] = 5 * outputs.weight[: vocabulary - size]
    return larger
