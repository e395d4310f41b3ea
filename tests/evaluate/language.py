"""Language models of every kind, a tokenizer and prompts for them: all tiny."""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import FIRST_WORD, VOCABULARY, tiny_model

STOP = 2
_SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
        "decoder_start_token_id": STOP,
    },
}


@cache
def language_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A causal model or an encoder-decoder; shared, so leave it as it was."""
    if model_type not in _SEQ2SEQ:
        return tiny_model(model_type, "causal", seed)
    shape = {**_SEQ2SEQ[model_type], "d_model": 32, "vocab_size": VOCABULARY}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": STOP}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **shape, **ids))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Id 7 is the word "w7"; the ids below the first word are special."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": f"w{STOP}", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), **special)


def prompts(*lengths: int) -> list[dict[str, Any]]:
    """Prompt "a" has the first length, "b" the second."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"id": chr(97 + index), "input_ids": row, "attention_mask": [1] * len(row)} for index, row in enumerate(rows)
    ]
