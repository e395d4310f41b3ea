"""Answers of another engine are found: by what a manifest says of it, and by answering rows again."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexkd.core.outputs import TopRule
from flexkd.errors import ArtifactError
from flexkd.fingerprints import DECISIVE, REPORTED, describe_engine, differences
from flexkd.models.forward import engine
from flexkd.models.forward.engine import engine_of, rounding_noise
from flexkd.teacher.cache import writer as building
from flexkd.teacher.cache.manifest import Manifest
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.writer import CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from tests.teacher.cache.caches import MADE_OF, Counting, cache_of, request_of
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import rows as classified_rows

KINDS = {
    "llama": ("causal", None),
    "llama top": ("causal", TopRule(4, 2.0)),
    "t5": ("seq2seq", None),
    "bert": ("classification", None),
}


def material(kind: str) -> tuple[Any, list[dict[str, Any]], SignalRequest]:
    """A model, rows and what is asked of them."""
    head, top = KINDS[kind]
    name = kind.split()[0]
    rows = classified_rows(40) if name == "bert" else answer_rows(40, seq2seq=head == "seq2seq")
    return tiny_model(name, head), rows, request_of(top=top)


def plan_of(live: LiveTeacher, rows: list[dict[str, Any]], request: SignalRequest, storage: str) -> CachePlan:
    return CachePlan(live, request, rows, collator_of(live.model), storage)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_R09_the_same_engine_is_within_the_limit_and_other_weights_are_not(
    tmp_path: Path, kind: str, storage: str
) -> None:
    """Noise of 5 % of the weights: the fingerprint, which a script makes up, does not tell it."""
    model, rows, request = material(kind)
    cached = cache_of(tmp_path, model, request, rows, storage=storage)
    plan = plan_of(LiveTeacher(model), rows, request, storage)
    said = plan.verify(cached, cached.manifest.made_of, thorough=True)
    assert said is not None
    assert said.num_rows == len(rows)
    assert len(said.deviations) == 2
    # Half a step is the worst that storing rounds, a step over root 12 the mean: not a limit that holds everything.
    assert all(one.value <= one.limit < 6 * one.value or one.value == 0 for one in said.deviations)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    with pytest.raises(ArtifactError, match=r"not those of this teacher\. Of 40 rows .* deviate by .* \(limit "):
        plan.verify(cached, cached.manifest.made_of, thorough=True)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_R09_the_limit_holds_the_rounding_of_its_own_precision_and_no_coarser_one(tmp_path: Path, kind: str) -> None:
    """Float32 stands in for another machine in bfloat16: it lies apart by the walk of one of the two."""
    model, rows, request = material(kind)
    exact, half = LiveTeacher(model), LiveTeacher(model, precision=torch.bfloat16)
    caches = {name: cache_of(tmp_path / name, live, request, rows) for name, live in (("exact", exact), ("half", half))}
    described = {name: cached.manifest.made_of for name, cached in caches.items()}
    assert plan_of(half, rows, request, "float16").verify(caches["exact"], described["exact"])
    plan = plan_of(exact, rows, request, "float16")
    with pytest.raises(ArtifactError, match="precision was 'bfloat16' and is 'float32' now"):
        plan.verify(caches["half"], plan.made_of(MADE_OF))
    with pytest.raises(ArtifactError, match="are not those of this teacher"):
        plan.verify(caches["half"], described["half"])


def changed(model: Any, name: str) -> tuple[dict[str, str], dict[str, str]]:
    now = engine_of(model, None)
    return now, {**now, name: "another"}


@pytest.mark.parametrize("name", [*DECISIVE[:4], "device", "torch", "transformers"])
def test_R09_another_precision_or_attention_is_refused_and_another_version_is_said(name: str) -> None:
    now, stored = changed(tiny_model("llama", "causal"), name)
    refused, told = differences({**MADE_OF, **stored}, {**MADE_OF, **now})
    expected = [f"{name} was 'another' and is '{now[name]}' now"]
    assert (refused, told) == ((expected, []) if name in DECISIVE else ([], expected))
    assert name in DECISIVE + REPORTED


def test_R09_the_engine_is_read_from_the_model_that_answers() -> None:
    model = tiny_model("llama", "causal")
    model.set_attn_implementation("eager")
    first = engine_of(model, None)
    assert (first["attention"], first["precision"], first["weights"]) == ("eager", "float32", "float32")
    model.set_attn_implementation("sdpa")
    second = engine_of(model.to(torch.bfloat16), torch.bfloat16)
    assert (second["attention"], second["precision"], second["weights"]) == ("sdpa", "bfloat16", "bfloat16")
    assert second["torch"] == torch.__version__
    assert "attention sdpa" in describe_engine(second)
    assert describe_engine({"teacher": "a"}) == "an engine that was not written down"
    # An encoder-decoder is as deep as both of its parts.
    noise = rounding_noise(tiny_model("t5", "seq2seq"), None)
    assert noise > rounding_noise(tiny_model("llama", "causal"), None)
    assert rounding_noise(model, None) > 100 * noise


def test_R09_products_in_a_coarser_type_are_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "causal")
    exact = rounding_noise(model, None)
    monkeypatch.setattr(engine.torch, "get_float32_matmul_precision", lambda: "high")
    assert engine_of(model, None)["precision"] == "float32, products high"
    assert rounding_noise(model, None) > 100 * exact


def replace_engine(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Give a cache another description."""
    manifest = Manifest.read(folder)
    replace(manifest, made_of=change(dict(manifest.made_of))).write(folder)


@pytest.fixture
def in_batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "TEACHER_BATCH_SIZE", 4)
    monkeypatch.setattr(building, "SHARD_BYTES", 1)


@pytest.mark.usefixtures("in_batches_of_four")
def test_R09_an_older_cache_is_compared_more_widely_then_used_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of an earlier version says nothing of the engine but its precision."""
    model, rows, request = material("llama")
    cache_of(tmp_path, model, request, rows)
    replace_engine(tmp_path, lambda made_of: {k: v for k, v in made_of.items() if k not in (*DECISIVE[1:], *REPORTED)})
    counting = Counting(model)
    with caplog.at_level(logging.INFO, "flexkd"):
        cache_of(tmp_path, counting, request, rows)
    assert [len(batch) for batch in counting.asked] == [4, 4, 4], "first, middle, last; not one is answered anew"
    assert "its engine was not written down: attention (now 'sdpa'), device" in caplog.text
    assert "12 rows were answered again: predictions deviate by" in caplog.text
    other = tiny_model("llama", "causal", seed=9)
    with pytest.raises(ArtifactError, match=r"its engine was not written down: attention .*or delete this one to"):
        cache_of(tmp_path, other, request, rows)


@pytest.mark.usefixtures("in_batches_of_four")
def test_R09_a_cache_is_not_gone_on_with_by_another_engine(tmp_path: Path) -> None:
    model, rows, request = material("llama")
    cache_of(tmp_path, model, request, rows)
    (tmp_path / "answers-00002.safetensors").unlink()
    replace_engine(tmp_path, lambda made_of: {**made_of, "torch": "1.0"})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"What is known: torch was '1\.0' and is"):
        cache_of(tmp_path, tiny_model("llama", "causal", seed=9), request, rows)
    assert not (tmp_path / "answers-00002.safetensors").exists()
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(cache_of(tmp_path, model, request, rows).manifest.written) == 10


def test_R09_reordered_and_edited_answers_are_found_when_bytes_are_compared(tmp_path: Path) -> None:
    model, rows, request = material("llama")
    cache_of(tmp_path, model, request, rows)
    path = tmp_path / "answers-00000.safetensors"
    tensors = load_file(path)
    flipped = {**tensors, "log_probs": tensors["log_probs"].flip(0)}
    save_file(flipped, path)
    with pytest.raises(ArtifactError, match=re.escape("are missing or damaged (first answers-00000.safetensors)")):
        CachedTeacher(tmp_path, checksums=True)
    cached = CachedTeacher(tmp_path)
    with pytest.raises(ArtifactError, match=r"predictions deviate by .* nats"):
        plan_of(LiveTeacher(model), rows, request, "float16").verify(cached, cached.manifest.made_of)
    # The advice of the first message, followed.
    path.unlink()
    cache_of(tmp_path, model, request, rows)
    CachedTeacher(tmp_path, checksums=True)
