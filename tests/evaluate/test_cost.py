"""Size, speed and memory are those of the one model in the fresh process."""

import json
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from flexkd.errors import ArtifactError, RecipeError
from flexkd.evaluate import cost
from flexkd.evaluate.cost import Cost, measure_cost, weight_bytes

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
        vocab_size=30,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=8,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(path)
    return model


def test_a_fresh_process_measures_size_speed_and_memory(tmp_path):
    # 64 MB of weights that every forward reads, so that the peak has a lower bound; the parent already holds more,
    # so that a peak which is inherited from it would show.
    model = save_bert(tmp_path, hidden_size=1024, num_layers=1)
    ballast = torch.ones(200_000_000)
    found = measure_cost(tmp_path, BATCHES, repeats=2)

    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert found.bytes_on_disk > 4 * found.parameters
    assert found.examples_per_second > 0
    assert 40e6 < found.peak_memory_bytes < 4 * ballast.numel()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_tied_weights_count_once(tmp_path):
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    save_file({"0.input_ids": torch.ones(1, 4, dtype=torch.long)}, tmp_path / "rows")
    cost._measure(str(tmp_path), str(tmp_path / "rows"), str(tmp_path / "result"), "bfloat16", "1")

    found = json.loads((tmp_path / "result").read_text(encoding="utf-8"))
    embedding, attention, feed_forward, norms = 30 * 16, 4 * 16 * 16, 3 * 16 * 32, 3 * 16
    assert found["parameters"] == embedding + attention + feed_forward + norms


def test_a_child_that_fails_says_its_last_lines(tmp_path):
    save_bert(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        measure_cost(tmp_path, [{"input_ids": torch.full((1, 6), 30)}], repeats=1)  # id 30 of a vocabulary of 30
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: the model could not be measured, its process ended with code 1.")
    assert "IndexError: index out of range" in message.splitlines()[-1]
    assert len(message.splitlines()) <= 9


def test_a_killed_child_points_to_the_memory(tmp_path, monkeypatch):
    save_bert(tmp_path)
    monkeypatch.setattr(cost.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], -9, "", ""))
    with pytest.raises(ArtifactError, match=r"ended with code -9. It was killed: the machine may be out of memory"):
        measure_cost(tmp_path, BATCHES)


def test_every_model_is_handed_the_same_rows_without_labels(tmp_path, monkeypatch):
    save_bert(tmp_path)
    seen = []

    def run(command, **settings):
        _, _, _, module, _, inputs, result, precision, repeats = command
        seen.append((module, load_file(inputs), precision, repeats))
        numbers = '{"parameters": 1, "examples_per_second": 2.0, "peak_memory_bytes": 3, "device": "cpu"}'
        with open(result, "w", encoding="utf-8") as file:
            file.write(numbers)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cost.subprocess, "run", run)
    first = measure_cost(tmp_path, BATCHES, precision="bfloat16", repeats=3)
    measure_cost(tmp_path, BATCHES)
    assert first == Cost(1, weight_bytes(tmp_path), 2.0, 3, "cpu")
    (module, rows, precision, repeats), (_, again, *_) = seen
    assert (module, precision, repeats) == ("flexkd.evaluate.cost", "bfloat16", "3")
    assert sorted(rows) == [
        f"{batch}.{key}" for batch in (0, 1) for key in ("attention_mask", "input_ids", "teacher_input_ids")
    ]
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert torch.equal(rows["1.input_ids"], BATCHES[1]["input_ids"])


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
        measure_cost(tmp_path, BATCHES, **arguments)
