"""Tokenizers that read a character as a token, so that tests can count, with templates of real kinds."""

from typing import Any, Final

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIALS: Final = ("<s>", "</s>", "<pad>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>")

CHATML: Final = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Every turn ends in a token of its own."""

WITH_BOS: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content | trim }} [A]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Begins with the BOS and ends answers with the EOS."""


def byte_tokenizer(
    *, post: str | None = None, chat_template: str | None = None, specials: tuple[str, ...] = SPECIALS, **options: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer without merges.

    Args:
        post: What it adds by itself, "<s> $A" as an example.
    """
    words = [*specials, *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    if post is not None:
        names = [(name, words.index(name)) for name in ("<s>", "</s>")]
        backend.post_processor = TemplateProcessing(single=post, special_tokens=names)
    settings: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": list(specials[3:]),
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(settings | options))
    tokenizer.chat_template = chat_template
    return tokenizer
