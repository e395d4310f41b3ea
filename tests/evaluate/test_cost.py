"""Size, speed and memory are those of the one model in the fresh process."""

import copy
import re
import sys

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from flexkd.errors import ArtifactError, RecipeError
from flexkd.evaluate import cost
from flexkd.evaluate.cost import Cost, measure_costs, weight_bytes
from flexkd.models.loading.int8 import int8_copy, save_int8
from tests.evaluate.language import language_model

BATCHES = [
    {
        "input_ids": torch.ones(rows, 6, dtype=torch.long),
        "attention_mask": torch.ones(rows, 6, dtype=torch.long),
        "labels": torch.zeros(rows, dtype=torch.long),
        "teacher_input_ids": torch.ones(rows, 9, dtype=torch.long),
        "example_id": ["a"] * rows,
    }
    for rows in (4, 2)
]


def save_bert(path, hidden_size: int = 16, num_layers: int = 1) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=8,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(path)
    return model


def save_llama(path) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True)).save_pretrained(path)


@pytest.mark.slow
def test_fresh_processes_measure_size_speed_and_memory(tmp_path):
    # The weights of the first are read by every forward, so that its peak has a lower bound; the parent already
    # holds more, so that a peak which is inherited from it would show. The second one's embeddings are tied.
    model = save_bert(tmp_path / "bert", hidden_size=1024)
    save_llama(tmp_path / "llama")
    ballast = torch.ones(200_000_000)
    first, second = measure_costs([tmp_path / "bert", tmp_path / "llama"], BATCHES, repeats=2, single_rows=6)

    assert first.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert first.bytes_on_disk == (tmp_path / "bert" / "model.safetensors").stat().st_size
    assert first.bytes_on_disk > 4 * first.parameters
    assert 40e6 < first.peak_memory_bytes < 4 * ballast.numel()
    assert first.device == ("cuda" if torch.cuda.is_available() else "cpu")
    embedding, attention, feed_forward, norms = 30 * 16, 4 * 16 * 16, 3 * 16 * 32, 3 * 16
    assert second.parameters == embedding + attention + feed_forward + norms
    assert second.peak_memory_bytes < first.peak_memory_bytes
    assert first.examples_per_second > 0
    assert second.examples_per_second > 0
    for cost_of_model in (first, second):
        assert cost_of_model.latency is not None
        assert (cost_of_model.latency.rows, cost_of_model.latency.tokens) == (6, 0)
        assert 0 < cost_of_model.latency.median_ms <= cost_of_model.latency.p95_ms
        assert cost_of_model.latency.threads == (0 if torch.cuda.is_available() else torch.get_num_threads())
    # 4 million weights are read for every row, by one model alone.
    assert first.latency.median_ms > second.latency.median_ms


@pytest.mark.slow
def test_a_copy_in_int8_and_a_model_with_rows_of_its_own_are_measured_beside_the_others(tmp_path):
    model = save_bert(tmp_path / "bert", hidden_size=256)
    save_int8(int8_copy(model, where="here"), tmp_path / "int8")
    # It knows 30 tokens, and could not read the rows of the others.
    save_llama(tmp_path / "llama")
    plain, int8, llama = measure_costs(
        [tmp_path / "bert", tmp_path / "int8", tmp_path / "llama"],
        [{**batch, "input_ids": torch.full_like(batch["input_ids"], 35)} for batch in BATCHES],
        repeats=1,
        precision="bfloat16",
        own_batches={2: BATCHES},
    )
    assert int8.bytes_on_disk == (tmp_path / "int8" / "int8_model.bin").stat().st_size < plain.bytes_on_disk / 2
    assert min(cost.examples_per_second for cost in (plain, int8, llama)) > 0


STAND_IN = """#!{python}
import os, signal, sys
_, _, _, module, model, inputs, precision, new_tokens = sys.argv
log = lambda *words: print(*words, file=open({log!r}, "a"))
log("start", os.path.basename(model), module, precision, new_tokens)
print({stderr!r}, file=sys.stderr)
print("ready", flush=True)
seconds = iter({seconds})
for line in sys.stdin:
    log(line.strip(), os.path.basename(model))
    if line.startswith("rows"):
        print({rows}, flush=True)
        continue
    if line == "end\\n":
        print('{{"parameters": 1, "rows": 6, "peak_memory_bytes": 3, "device": "cpu", "dtype": ""}}', flush=True)
        break
    answer = next(seconds)
    if answer < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    print(answer, flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replaces the child's Python by a script that logs what it is asked and answers with given seconds."""

    def install(seconds: list[float], stderr: str = "", rows: str = "[]") -> None:
        script = tmp_path / "python"
        log = str(tmp_path / "log")
        filled = STAND_IN.format(python=sys.executable, log=log, seconds=seconds, stderr=stderr, rows=rows)
        script.write_text(filled, encoding="utf-8")
        script.chmod(0o755)
        monkeypatch.setattr(cost.sys, "executable", str(script))

    return install


def folders(tmp_path, *names: str):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"12345")
    return [tmp_path / name for name in names]


def test_a_child_that_fails_says_its_last_lines(tmp_path, stand_in):
    # It asks for more seconds than there are.
    stand_in([1.0], stderr="a line\n" * 20)
    (folder,) = folders(tmp_path, "a")
    with pytest.raises(ArtifactError) as caught:
        measure_costs([folder], BATCHES, repeats=2)
    message = str(caught.value)
    assert message.startswith(f"{folder}: the model could not be measured, its process ended with code 1.")
    assert message.splitlines()[-1] == "  StopIteration"
    assert message.splitlines()[1] == "  a line"
    assert len(message.splitlines()) == 9


def test_models_take_turns_and_the_median_counts(tmp_path, stand_in):
    stand_in([1.0, 50.0, 2.0])
    found = measure_costs(folders(tmp_path, "a", "b"), BATCHES, precision="bfloat16", repeats=3, new_tokens=7)
    assert found == [Cost(1, 5, 3.0, 3, "cpu")] * 2
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == [
        "start a flexkd.evaluate.cost bfloat16 7",
        "start b flexkd.evaluate.cost bfloat16 7",
        *["pass a", "pass b"] * 3,
        "end a",
        "end b",
    ]


def test_models_take_turns_with_a_few_single_rows(tmp_path, stand_in):
    # 20 rows that take 1 to 20 ms; the fake knows which it is asked for.
    stand_in([1.0], rows="[row / 1000 for row in range(int(line.split()[1]) + 1, int(line.split()[2]) + 1)]")
    paths = folders(tmp_path, "a", "b")
    found = measure_costs(paths, BATCHES, repeats=1, new_tokens=4, single_rows=20)
    for cost_of_model in found:
        assert cost_of_model.latency is not None
        assert cost_of_model.latency.median_ms == pytest.approx(10.5)
        assert cost_of_model.latency.p95_ms == pytest.approx(19.05)
        assert cost_of_model.latency.token_ms == pytest.approx(10.5 / 4)
        assert (cost_of_model.latency.rows, cost_of_model.latency.tokens) == (20, 4)
    requests = (tmp_path / "log").read_text(encoding="utf-8").splitlines()[4:-2]
    assert requests == [f"rows {bounds} {name}" for bounds in ("0 8", "8 16", "16 20") for name in ("a", "b")]


def test_a_single_row_has_no_padding_and_keeps_its_numbers():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": mask, "other": torch.tensor([1, 2])}
    first, second, third = cost._single_rows([batch, batch], 0, 3)
    assert first["input_ids"].tolist() == [[5, 6]]
    assert first["attention_mask"].tolist() == [[1, 1]]
    assert first["other"].tolist() == [1]
    assert second["input_ids"].tolist() == [[7, 8, 9]]
    assert torch.equal(third["input_ids"], first["input_ids"])


def test_a_killed_child_points_to_the_memory(tmp_path, stand_in):
    stand_in([1.0, -1.0])
    with pytest.raises(ArtifactError, match=r"ended with code -9. It was killed: the machine may be out of memory"):
        measure_costs(folders(tmp_path, "a", "b"), BATCHES, repeats=3)


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_timed_answers_have_one_length_whatever_the_model_would_say(model_type):
    model = copy.deepcopy(language_model(model_type))
    model.generation_config.eos_token_id = list(range(61))
    model.generation_config.num_beams = 3
    run, prompts = cost._generation(model, BATCHES, 5)
    start = 1 if model_type == "t5" else 6
    assert [run(**batch).shape for batch in prompts] == [(4, start + 5), (2, start + 5)]


def test_rows_are_handed_over_without_labels():
    flat = cost._flat(BATCHES)
    assert sorted(flat) == [
        f"{batch}.{key}" for batch in (0, 1) for key in ("attention_mask", "input_ids", "teacher_input_ids")
    ]
    back = cost._unflat(flat)
    assert [sorted(batch) for batch in back] == [["attention_mask", "input_ids", "teacher_input_ids"]] * 2
    assert all(torch.equal(back[i][key], BATCHES[i][key]) for i in (0, 1) for key in back[i])


def test_batches_keep_their_order_beyond_ten():
    batches = [{"input_ids": torch.tensor([number])} for number in range(12)]
    assert [int(batch["input_ids"]) for batch in cost._unflat(cost._flat(batches))] == list(range(12))


def test_only_weight_files_count_and_safetensors_go_first(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"12345")
    (tmp_path / "model-2.safetensors").write_bytes(b"123")
    (tmp_path / "pytorch_model.bin").write_bytes(b"1" * 100)
    (tmp_path / "tokenizer.json").write_bytes(b"1" * 1000)
    assert weight_bytes(tmp_path) == 8
    with pytest.raises(ArtifactError, match=re.escape(f"{tmp_path / 'none'}: holds no weight files")):
        weight_bytes(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"precision": "bf16"}, "unknown precision 'bf16'"), ({"repeats": 0}, "repeats: must be at least 1, was 0")],
)
def test_settings_are_checked_first(tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        measure_costs([tmp_path], BATCHES, **arguments)
