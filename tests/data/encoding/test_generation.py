from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexkd.data.encoding.encoded import Cut, EncodedSplit
from flexkd.data.encoding.generation import encode_generation, encode_prompts
from flexkd.data.encoding.prompts import PromptFormat, choose_format, render_prompts
from flexkd.data.encoding.tokenizers import ensure_pad_token
from flexkd.data.examples.generation import GenerationExample, Turn
from flexkd.errors import DataError, UnsupportedModelError
from tests.data.encoding.byte_tokenizers import CHATML, SPECIALS, WITH_BOS, byte_tokenizer

EOS = SPECIALS.index("</s>")
BOS = SPECIALS.index("<s>")


def example(
    prompt: str | None = "Sort", document: str | None = None, answer: str | None = "a b", name: str = "a:1#0"
) -> GenerationExample:
    turns = () if prompt is None else (Turn("user", prompt),)
    return GenerationExample(name, turns, document, answer, () if answer is None else (answer,))


def encode(
    rows: list[GenerationExample], tokenizer: Any, prompt_format: PromptFormat | None = None, **options: Any
) -> EncodedSplit:
    chosen = prompt_format or choose_format({"teacher": tokenizer}, kind="instruction")
    settings = {"max_length": 200, "max_answer_length": 20}
    return encode_generation(rows, tokenizer, chosen, **(settings | options))


def supervised(feature: dict[str, Any]) -> list[int]:
    return [label for label in feature["labels"] if label != -100]


def test_M16_labels_are_the_answer_and_the_token_that_ends_it() -> None:
    tokenizer = byte_tokenizer()
    (row,) = encode([example()], tokenizer).rows
    prompt = "Instruction:\nSort\n\nAnswer:\n"
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}a b</s>"
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    assert tokenizer.decode(supervised(row)) == "a b</s>"
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert row["id"] == "a:1#0"


def test_D01_the_end_of_an_answer_is_taught_although_it_is_the_pad_token_too() -> None:
    tokenizer = byte_tokenizer(pad_token=None, specials=("<s>", "</s>", "<|x|>", "<|end|>"))
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = encode([example()], tokenizer).rows
    assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("post", "chat_template", "expected", "num_doubled"),
    [
        ("<s> $A", WITH_BOS, 1, 0),
        (None, WITH_BOS, 1, 0),
        ("<s> $A", CHATML, 1, 0),
        ("<s> $A </s>", None, 1, 0),
        (None, CHATML, 0, 0),
        (None, "{{ bos_token }}" + WITH_BOS, 1, 0),
        ("<s> $A", "{{ bos_token }}" + WITH_BOS, 1, 0),
        (None, "<s><s>" + CHATML, 2, 0),
    ],
)
def test_D05_a_prompt_has_one_bos_however_it_comes(
    post: str | None, chat_template: str | None, expected: int, num_doubled: int
) -> None:
    tokenizer = byte_tokenizer(post=post, chat_template=chat_template)
    encoded = encode([example()], tokenizer)
    (row,) = encoded.rows
    assert row["input_ids"].count(BOS) == expected
    assert (row["input_ids"][0] == BOS) == bool(expected)
    assert EOS not in row["input_ids"][:-1]
    assert [note for note in encoded.notes if "more than one BOS" in note] == (
        ["1 prompts began with more than one BOS; one is kept."] * num_doubled
    )


def test_D05_doubled_specials_are_told() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML.replace("<|end|>", "{{ '<|end|>' * (m.content | length - 3) }}"))
    encoded = encode([example(), example("Sorts", name="b:2#0")], tokenizer)
    assert encoded.notes == (
        "1 rows hold a special token twice in a row (first b:2#0: <|end|>), written by the template.",
    )


@pytest.mark.parametrize("chat_template", [CHATML, WITH_BOS])
def test_D06_the_boundary_is_the_length_of_the_rendered_prompt(chat_template: str) -> None:
    """What a tokenizing call of the template returns has two keys: its length is no number of tokens."""
    tokenizer = byte_tokenizer(post="<s> $A" if chat_template is WITH_BOS else None, chat_template=chat_template)
    (row,) = encode([example()], tokenizer).rows
    turns = [{"role": "user", "content": "Sort"}]
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "a b"}], return_dict=True)
    assert row["input_ids"] == whole["input_ids"][: len(row["input_ids"])]
    answer = "a b" if chat_template is CHATML else " a b"
    assert row["labels"].count(-100) == len(row["input_ids"]) - len(answer) - 1
    assert row["labels"].count(-100) > len(whole)
    assert tokenizer.decode(supervised(row)) == answer + ("<|end|>" if chat_template is CHATML else "</s>")


def test_D18_the_document_loses_its_end_and_nothing_else() -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    chosen = choose_format({"teacher": tokenizer}, kind="instruction")
    rows = [example("Sort", "word " * 30, name="long"), example("Sort", "word", name="short")]
    fixed = len(tokenizer(render_prompts([example("Sort", "X")], tokenizer, chosen)[0]).input_ids) - 1
    encoded = encode(rows, tokenizer, max_length=fixed + 10 + 8, max_answer_length=8)
    long, short = encoded.rows
    assert tokenizer.decode(long["input_ids"]) == "<|user|>Sort\n\nword word<|end|>\n<|assistant|>a b<|end|>"
    assert encoded.cut == Cut(num_rows=1, mean_lost_tokens=141.0)
    assert tokenizer.decode(short["input_ids"]).count("word") == 1
    assert encoded.dropped == ()


def test_D18_a_row_whose_fixed_parts_or_answer_do_not_fit_is_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer()
    rows = [
        example(),
        example("Sort " * 40, name="long question"),
        example("Sort " * 40, "some text", name="long question with a text"),
        example(answer="a" * 20, name="long answer"),
        example(answer="a" * 19, name="answer that just fits"),
        example(answer=None, name="no answer"),
    ]
    encoded = encode(rows, tokenizer)
    assert [row["id"] for row in encoded.rows] == ["a:1#0", "answer that just fits"]
    assert [(entry.where, entry.reason) for entry in encoded.dropped] == [
        ("long question", "long prompt"),
        ("long question with a text", "long prompt"),
        ("long answer", "long answer"),
        ("no answer", "empty answer"),
    ]
    assert encoded.cut == Cut(0, 0.0)


def test_M01_nothing_left_is_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"no row is left of 2 \(long prompt: 2\) with max_length = 30 and"):
        encode([example(), example()], byte_tokenizer(), max_length=30)
    with pytest.raises(DataError, match=r"data\.max_answer_length: 20 leaves no room for a prompt in max_length = 20"):
        encode([example()], byte_tokenizer(), max_length=20)
    chosen = PromptFormat("text", "{prompt}\n", None, "</s>", "</s>")
    with pytest.raises(DataError, match=r"data\.template: no place for \{context\} or \{document\}, which 1 rows hold"):
        encode([example("Sort", "text")], byte_tokenizer(), chosen)


@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_D17_generation_reads_the_prompts_of_training_and_has_room_for_the_answer(
    chat_template: str | None, seq2seq: bool
) -> None:
    tokenizer = byte_tokenizer(post="<s> $A </s>" if seq2seq else None, chat_template=chat_template)
    chosen = choose_format({"teacher": tokenizer}, kind="instruction", seq2seq=seq2seq)
    rows = [example("Sort", "wörd " * n, "ab " * (n % 5) + "c", name=f"row {n}") for n in range(1, 30)]
    limits: dict[str, Any] = {"max_length": 100, "max_answer_length": 16, "seq2seq": seq2seq}
    trained = encode_generation(rows, tokenizer, chosen, **limits)
    prompts = encode_prompts(rows, tokenizer, chosen, **limits)
    assert trained.cut == prompts.cut
    assert trained.cut.num_rows > 10
    assert len(trained.rows) == len(prompts.rows) == len(rows)
    for row, prompt in zip(trained.rows, prompts.rows, strict=True):
        width = len(prompt["input_ids"])
        assert row["input_ids"][:width] == prompt["input_ids"]
        assert set(prompt) == {"id", "input_ids", "attention_mask"}
        assert width <= (100 if seq2seq else 84)
        if not seq2seq:
            assert row["labels"][:width] == [-100] * width
            assert -100 not in row["labels"][width:]


@pytest.mark.parametrize("post", ["$A </s>", "<s> $A </s>", None])
def test_an_encoder_decoder_has_the_answer_as_a_text_of_its_own(post: str | None) -> None:
    tokenizer = byte_tokenizer(post=post)
    chosen = choose_format({"teacher": tokenizer}, kind="summarization", seq2seq=True)
    encoded = encode([example(None, "Text.")], tokenizer, chosen, seq2seq=True)
    (row,) = encoded.rows
    begin = "<s>" if post and post.startswith("<s>") else ""
    assert tokenizer.decode(row["input_ids"]) == f"{begin}summarize: Text.{'</s>' if post else ''}"
    assert tokenizer.decode(row["labels"]) == f"{begin}a b</s>"
    assert len(row["attention_mask"]) == len(row["input_ids"])


def test_an_answer_after_a_layout_without_a_last_space_begins_with_one() -> None:
    tokenizer = byte_tokenizer()
    chosen = choose_format({"teacher": tokenizer}, kind="instruction", template="{prompt} TL;DR:")
    (row,) = encode([example()], tokenizer, chosen).rows
    assert tokenizer.decode(row["input_ids"]) == "Sort TL;DR: a b</s>"


def test_D03_S08_the_tokenizer_keeps_its_size_and_settings_and_its_template_is_saved(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML, truncation_side="left")
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    first = encode([example("Sort", "word " * 60)], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert (tokenizer.truncation_side, len(tokenizer)) == ("left", 256 + len(SPECIALS))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer)
    assert encode([example("Sort", "word " * 60)], again) == first


def test_a_tokenizer_that_does_not_say_where_tokens_end_cannot_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    chosen = choose_format({"teacher": tokenizer}, kind="instruction")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert len(encode([example("Sort", "word")], tokenizer, chosen).rows) == 1
    with pytest.raises(UnsupportedModelError, match=r"1 rows over data\.max_length cannot be cut"):
        encode([example("Sort", "word " * 60)], tokenizer, chosen)
