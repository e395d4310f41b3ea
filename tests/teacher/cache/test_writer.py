"""A cache is built once: gone on with, repaired, refused when it is another's, and never larger than it says."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from flexkd.core.objective import Signal
from flexkd.core.outputs import TopOutputs, TopRule
from flexkd.errors import ArtifactError
from flexkd.teacher.cache import manifest, shards
from flexkd.teacher.cache import writer as building
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.writer import CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest
from tests.teacher.cache.caches import MADE_OF, Counting, cache_of, request_of
from tests.tiny import tiny_model
from tests.training.language_rows import answer_rows, collator_of

WANTED = request_of(top=TopRule(4))


@pytest.fixture
def in_five_files(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Twenty rows, four a batch, a batch a file."""
    monkeypatch.setattr(building, "TEACHER_BATCH_SIZE", 4)
    monkeypatch.setattr(building, "SHARD_BYTES", 1)
    return answer_rows(20)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in files(folder)]


def test_K08_a_killed_build_goes_on_behind_the_last_whole_file(
    tmp_path: Path, in_five_files: list[dict[str, Any]]
) -> None:
    model = tiny_model("llama", "causal")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cache_of(whole, model, WANTED, in_five_files)
    assert len(files(whole)) == 5
    # The first call is for the shapes.
    broken = Counting(model, breaks_after=2)
    with pytest.raises(KeyboardInterrupt):
        cache_of(parts, broken, WANTED, in_five_files)
    assert len(files(parts)) == 2
    with pytest.raises(ArtifactError, match=r"3 of 5 files are missing or damaged \(first answers-00002"):
        CachedTeacher(parts)
    going_on = Counting(model)
    cached = cache_of(parts, going_on, WANTED, in_five_files)
    # A batch is compared before, and the first call is for the shapes.
    assert len(going_on.asked) == 1 + 1 + 3
    assert contents(parts) == contents(whole)
    assert cached.describe().partition(":")[2] == CachedTeacher(whole).describe().partition(":")[2]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("harm", ["cut", "gone", "altered"])
def test_K08_a_harmed_file_is_found_and_written_again(
    tmp_path: Path, in_five_files: list[dict[str, Any]], harm: str
) -> None:
    model = tiny_model("llama", "causal")
    cache_of(tmp_path, model, WANTED, in_five_files)
    before = contents(tmp_path)
    harmed, content = files(tmp_path)[3], before[3]
    if harm == "gone":
        harmed.unlink()
    else:
        harmed.write_bytes(content[:-1] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"1 of 5 files are missing or damaged \(first answers-00003"):
        CachedTeacher(tmp_path, checksums=True)
    if harm == "altered":
        # As large as it was: found when bytes are compared, as a build that goes on does.
        CachedTeacher(tmp_path)
        files(tmp_path)[0].unlink()
    again = Counting(model)
    cache_of(tmp_path, again, WANTED, in_five_files)
    assert len(again.asked) == 1 + 1 + (2 if harm == "altered" else 1)
    assert contents(tmp_path) == before


def test_K08_a_second_writer_is_refused_and_a_reader_needs_no_lock(
    tmp_path: Path, in_five_files: list[dict[str, Any]]
) -> None:
    model = tiny_model("llama", "causal")
    tmp_path.joinpath("cache").mkdir()
    with FileLock(tmp_path / "cache" / "lock"):
        with pytest.raises(
            ArtifactError,
            match=r"cache: .*process.* works there\. Wait for it, or choose another folder for this cache",
        ):
            cache_of(tmp_path / "cache", model, WANTED, in_five_files)
        assert files(tmp_path / "cache") == []
    cache_of(tmp_path / "cache", model, WANTED, in_five_files)
    with FileLock(tmp_path / "cache" / "lock"):
        cache_of(tmp_path / "cache", model, WANTED, in_five_files)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
def test_K08_a_full_disk_is_one_message_with_the_bytes_that_are_needed(
    tmp_path: Path, in_five_files: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model, plain = tiny_model("llama", "causal"), shards.save_file

    def full(tensors: Any, path: Path) -> None:
        if "00002" in path.name:
            path.write_bytes(b"half")
            raise error
        plain(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", full)
        with pytest.raises(
            ArtifactError, match=r"answers-00002.* cannot be written .*needs [\d,]+ bytes more, [\d,]+ are"
        ):
            cache_of(tmp_path, model, WANTED, in_five_files)
    assert not list(tmp_path.rglob("*.partial"))
    again = Counting(model)
    cache_of(tmp_path, again, WANTED, in_five_files)
    assert len(again.asked) == 1 + 1 + 3


def test_K09_a_cache_that_the_disk_cannot_hold_is_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(tiny_model("llama", "causal"))
    plan = CachePlan(counting, WANTED, answer_rows(20), collator_of(counting.model), "float16")
    usage = shards.shutil._ntuple_diskusage(10**9, 0, building.DISK_MARGIN + plan.bytes - 1)  # type: ignore[attr-defined]
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _: usage)
    numbers = f"needs {plan.bytes:,} bytes, {usage.free:,} are free, of which {building.DISK_MARGIN:,} stay so"
    with pytest.raises(ArtifactError, match=re.escape(numbers)):
        plan.build(tmp_path, MADE_OF)
    assert len(counting.asked) == 1, "one row, for the shapes"
    assert not files(tmp_path)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("top", [TopRule(4), None])
def test_K09_the_estimate_is_the_size(tmp_path: Path, storage: str, top: TopRule | None) -> None:
    live = LiveTeacher(tiny_model("llama", "causal"))
    plan = CachePlan(live, request_of(top=top), answer_rows(40), collator_of(live.model), storage)
    cached = plan.build(tmp_path, MADE_OF)
    # Each file has a header with the names and places of its tensors.
    assert 0 < cached.bytes - plan.bytes < 1500 * len(files(tmp_path))


@pytest.mark.parametrize(("storage", "most"), [("float16", 800), ("int8", 480)])
def test_a_token_takes_so_many_bytes(tmp_path: Path, storage: str, most: int) -> None:
    """288 units and the top 32 of a vocabulary of 49,152, as SmolLM2's; 12,800 tokens."""

    class Made(LiveTeacher):
        def signal(self, batch: Any, request: SignalRequest) -> Signal:
            count = sum(self.extents(batch, request).predictions)
            log_probs = torch.full((count, 32), -5.0)
            top = TopOutputs(log_probs, torch.randint(49_152, (count, 32)), torch.full((count,), -1.0))
            return Signal(top, (torch.randn(count, 288),))

    model = tiny_model("llama", "causal")
    model.config.vocab_size = 49_152
    data = [
        {"id": str(index), "input_ids": [5] * 65, "attention_mask": [1] * 65, "labels": [-100, *[5] * 64]}
        for index in range(200)
    ]
    wanted = request_of(range(288), "supervised", top=TopRule(32))
    cached = cache_of(tmp_path, Made(model), wanted, data, storage=storage)
    tokens = sum(entry.positions for entry in cached.manifest.written)
    assert tokens == 12_800
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / tokens <= most
    assert "bytes a position" in cached.describe()


CHANGES = {
    "teacher": "c", "tokenizer": "d", "template": "e", "data": "f", "max_length": "256",
}  # fmt: skip


def test_K07_a_cache_of_anything_else_is_refused_with_every_difference(tmp_path: Path) -> None:
    model = tiny_model("llama", "causal")
    old = dict.fromkeys(CHANGES, "old")
    cache_of(tmp_path, model, WANTED, made_of=old)
    for name, value in CHANGES.items():
        with pytest.raises(
            ArtifactError, match=f"belongs to another run: {name} was 'old' and is '{value}' now. Choose"
        ):
            cache_of(tmp_path, model, WANTED, made_of={**old, name: value})
    with pytest.raises(
        ArtifactError, match=r"data was 'old' and is 'f' now; .*storage was 'float16' and is 'int8' now"
    ):
        cache_of(tmp_path, model, WANTED, made_of={**old, "data": "f"}, storage="int8")
    with pytest.raises(ArtifactError, match="rows was '"):
        cache_of(tmp_path, model, WANTED, answer_rows(7), made_of=old)


@pytest.mark.parametrize(
    ("other", "now"),
    [
        (request_of((1, 5), top=TopRule(4)), "layer -1: 2 units"),
        (request_of(layer=2, top=TopRule(4)), "layer 2: 4 units"),
        (request_of(positions="supervised", top=TopRule(4)), "at supervised positions"),
        (request_of(top=TopRule(5)), "the top 5 outputs"),
        (request_of(top=TopRule(4, 2.0)), "at temperature 2"),
    ],
)
def test_K07_other_units_layers_positions_or_rules_are_refused_with_old_and_new(
    tmp_path: Path, other: SignalRequest, now: str
) -> None:
    model = tiny_model("llama", "causal")
    cache_of(tmp_path, model, WANTED)
    old = "it was 'the top 4 outputs at temperature 1; layer -1: 4 units at tokens positions'"
    with pytest.raises(ArtifactError, match=f"{old} and is '.*{now}.*' now"):
        cache_of(tmp_path, model, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ('{"format": 0}', "has format 0, this version of flexkd reads 1"), ("[]", "cannot be")],
)
def test_K07_a_manifest_of_another_format_or_in_pieces_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        manifest.Manifest.read(tmp_path)


def test_the_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    cached = cache_of(tmp_path, tiny_model("llama", "causal"), WANTED)
    found = manifest.Manifest.read(tmp_path)
    assert found == cached.manifest
    found.write(tmp_path)
    assert manifest.Manifest.read(tmp_path) == found
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["made_of"]["teacher"] == "a"


def test_a_manifest_of_an_earlier_version_is_read_and_written_again_byte_for_byte(tmp_path: Path) -> None:
    """The names in the file are older than those in the code; users keep their caches."""
    fidelity = {"predictions": 5, "held": 4.5, "nats": 0.25}
    entry = {"bytes": 100, "checksum": "ab", "rows": 2, "positions": 7, "fidelity": fidelity}
    columns = [{"layer": -1, "basis": None, "units": [1, 5]}]
    holdings = {
        "logits": True,
        "top": {"k": 5, "temperature": 2.0, "shared_outputs": None},
        "positions": "tokens",
        "columns": columns,
    }
    plain = {
        "format": 1,
        "made_of": {"teacher": "a", "storage": "float16"},
        "kind": "decoder",
        "group": 32,
        "holdings": holdings,
        "entries": [entry, None],
    }
    content = json.dumps(plain, indent=1)
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    found = manifest.Manifest.read(tmp_path)
    assert found.columns.columns[0].units == (1, 5)
    assert [one.rounding_error.nats for one in found.written] == [0.25]
    found.write(tmp_path)
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == content
