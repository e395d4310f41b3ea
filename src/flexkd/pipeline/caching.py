"""Whether a teacher runs on every batch or once on every row, and where its answers are cached."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn

from flexkd.errors import ArtifactError
from flexkd.facts.names import AUTO, NEVER
from flexkd.models.forward.autocast import autocast_dtype
from flexkd.pipeline.job import Job
from flexkd.processes import decided
from flexkd.teacher.cache.columns import merged
from flexkd.teacher.cache.manifest import Manifest, has_manifest
from flexkd.teacher.cache.reader import CachedTeacher
from flexkd.teacher.cache.verification import Verification
from flexkd.teacher.cache.writer import DISK_MARGIN, CachePlan
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.signal import SignalRequest

logger = logging.getLogger(__name__)

AUTOMATIC_BYTES: Final = 2**32
"""Size of the largest cache that `auto` makes; where it would be larger, the teacher runs on every batch."""


def live_teacher(job: Job) -> LiveTeacher:
    """The teacher of a job, moved to the device of the training."""
    nn.Module.to(job.teacher, "cuda" if torch.cuda.is_available() else "cpu")
    return LiveTeacher(job.teacher, precision=autocast_dtype(job.teacher_precision))


def cached_teacher(
    job: Job, live: LiveTeacher, request: SignalRequest, *, passes: float | None = None
) -> CachedTeacher | None:
    """The teacher's answers to all training and validation rows, on disk; None: the teacher runs on every batch.

    Looks for a cache in this order: one that an earlier run of the job opened, one on disk that covers the request, a
    new one. Where a cache on disk lacks a requested column, another cache is made beside it. A cache of another
    teacher, tokenizer, data or storage is refused; so is one to whose first rows the teacher gives other answers now.

    Args:
        job: Its memo holds the open caches.
        live: Answers the rows if a cache has to be made.
        request: What students will read.
        passes: How often a student goes over the rows; None: not known yet, and no new cache is made automatically.

    Raises:
        ArtifactError: The cache belongs to something else, another process writes it, or the disk is too small.
    """
    section, root = job.recipe.teacher, job.recipe.cache_folder
    # Of all rows, which a cache answers, a student may learn from a share.
    share = len(job.splits["train"]) / len(job.encoded.splits["train"])
    is_read_again = passes is not None and passes * job.students * share > 1
    if section.cache == NEVER or (section.cache == AUTO and not is_read_again and not decided(root.is_dir)):
        return None
    shared = job.memo.cache_for(request)
    if shared is not None:
        return shared
    plan, made_of = _plan(job, live, request)
    cache = _stored(root, request, made_of)
    if cache is not None:
        plan.verify(cache, made_of)
    elif section.cache != AUTO or (is_read_again and decided(lambda: _fits(root, plan.bytes))):
        cache = plan.build(root / plan.name, _fingerprints(job))
    if cache is not None:
        logger.info("teacher: answers from %s", cache.describe())
        job.memo.add_cache(cache)
    return cache


def verified_cache(job: Job, live: LiveTeacher, request: SignalRequest) -> tuple[CachedTeacher, Verification]:
    """The cache that a run would read, after comparing its checksums and letting the teacher answer some rows again.

    Raises:
        ArtifactError: No such cache exists, a file is damaged, or its answers are another teacher's.
    """
    root = job.recipe.cache_folder
    plan, made_of = _plan(job, live, request)
    stored = _stored(root, request, made_of)
    if stored is None:
        raise ArtifactError(
            f"{root}: holds no complete cache of what this recipe reads. Make it first: flexkd cache without --verify."
        )
    cache = CachedTeacher(stored.folder, checksums=True)
    verification = plan.verify(cache, made_of, thorough=True)
    assert verification is not None, "the cache is whole"
    return cache, verification


def _plan(job: Job, live: LiveTeacher, request: SignalRequest) -> tuple[CachePlan, dict[str, str]]:
    """The plan of a cache for the training and validation rows, and the fingerprints of its answers."""
    rows = [row for split in ("train", "validation") for row in job.encoded.splits[split]]
    plan = CachePlan(live, merged([request])[0], rows, job.encoded.collator, job.recipe.teacher.cache_storage)
    return plan, plan.made_of(_fingerprints(job))


def _fingerprints(job: Job) -> dict[str, str]:
    """Fingerprints of what the answers depend on: not on the student's tokenizer."""
    return {name: value for name, value in job.fingerprints.items() if name != "student_tokenizer"}


def _stored(root: Path, request: SignalRequest, made_of: Mapping[str, str]) -> CachedTeacher | None:
    """A complete cache below the folder that holds everything the request reads."""

    def name() -> str | None:
        for folder in sorted(path.parent for path in root.glob("*/*.json") if has_manifest(path.parent)):
            manifest = Manifest.read(folder)
            manifest.check(folder, made_of)
            if not manifest.columns.lacks(request) and not manifest.unsound(folder):
                return folder.name
        return None

    stored = decided(name)
    return None if stored is None else CachedTeacher(root / stored)


def _fits(root: Path, size: int) -> bool:
    """Whether a cache of `size` bytes is small enough to be made automatically, and the disk has room for it."""
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    most = min(AUTOMATIC_BYTES, shutil.disk_usage(existing).free - DISK_MARGIN)
    if size > most:
        logger.info(
            "teacher: runs on every batch, as its answers take %.1f GB (teacher.cache: auto stores %.1f GB at most)",
            size / 1e9, most / 1e9,
        )  # fmt: skip
    return size <= most
