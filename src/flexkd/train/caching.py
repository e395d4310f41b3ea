"""Whether a teacher runs on every batch or once on every row, and where its answers then are."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn

from flexkd.files import local_path
from flexkd.recipe import Recipe
from flexkd.teacher.building import DISK_MARGIN, CachePlan
from flexkd.teacher.cache import CachedTeacher
from flexkd.teacher.holdings import merged
from flexkd.teacher.live import LiveTeacher
from flexkd.teacher.manifest import Manifest, has_manifest
from flexkd.teacher.signal import SignalRequest
from flexkd.train.arguments import autocast_dtype
from flexkd.train.job import Job

logger = logging.getLogger(__name__)

AUTOMATIC_BYTES: Final = 2**32
"""Largest cache that is made without being asked for; beyond it the teacher runs on every batch."""

AUTO: Final = "auto"
ALWAYS: Final = "always"
NEVER: Final = "never"


def live_teacher(job: Job) -> LiveTeacher:
    """The teacher of a job as it runs, on the device of the training."""
    nn.Module.to(job.teacher, "cuda" if torch.cuda.is_available() else "cpu")
    return LiveTeacher(job.teacher, precision=autocast_dtype(job.teacher_precision))


def cache_folder(recipe: Recipe) -> Path:
    """Where the caches of a run or a comparison stand, one folder each."""
    named = recipe.teacher.cache
    return recipe.folder / "cache" if named in (AUTO, ALWAYS, NEVER) else local_path(named, where="teacher.cache")


def cached_teacher(
    job: Job, live: LiveTeacher, request: SignalRequest, *, passes: float | None = None
) -> CachedTeacher | None:
    """Answers to all training and validation rows, from disk where they are there; None: the teacher is to run.

    A cache that lacks what is asked gets another one beside it. One of another teacher, tokenizer, data or storage is
    refused.

    Args:
        job: Gives rows and the recipe, and holds the caches that are open.
        live: Asked where the cache has to be made.
        request: What will be asked.
        passes: How often a student goes over the rows; None: not known yet, and no reason to make a cache.

    Raises:
        ArtifactError: The cache belongs to something else, another process writes it, or the disk is too small.
    """
    section, root = job.recipe.teacher, cache_folder(job.recipe)
    comes_back = passes is not None and passes * job.students > 1
    if section.cache == NEVER or (section.cache == AUTO and not comes_back and not root.is_dir()):
        return None
    found = next((one for one in job.caches if not one.manifest.holdings.lacks(request)), None)
    if found is not None:
        return found
    rows = [row for split in ("train", "validation") for row in job.splits[split]]
    whole = merged([request])[0]
    plan = CachePlan(live, whole, rows, job.encoded.collator, section.cache_storage)
    fingerprints = _fingerprints(job)
    found = _stored(root, request, plan.made_of(fingerprints))
    if found is None and (section.cache != AUTO or (comes_back and _fits(root, plan.bytes))):
        found = plan.build(root / plan.name, fingerprints)
    if found is not None:
        logger.info("teacher: answers from %s", found.describe())
        job.caches.append(found)
    return found


def _fingerprints(job: Job) -> dict[str, str]:
    """All that the teacher's answers hang on; the student's tokenizer has no part in them."""
    own = {name: value for name, value in job.fingerprints.items() if name != "student_tokenizer"}
    return {**own, "precision": job.teacher_precision}


def _stored(root: Path, request: SignalRequest, made_of: Mapping[str, str]) -> CachedTeacher | None:
    """A whole cache below the folder that holds what is asked."""
    for folder in sorted(path.parent for path in root.glob("*/*.json") if has_manifest(path.parent)):
        manifest = Manifest.read(folder)
        manifest.check(folder, made_of)
        if not manifest.holdings.lacks(request) and not manifest.unsound(folder):
            return CachedTeacher(folder)
    return None


def _fits(root: Path, size: int) -> bool:
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    most = min(AUTOMATIC_BYTES, shutil.disk_usage(there).free - DISK_MARGIN)
    if size > most:
        logger.info(
            "teacher: runs on every batch, its answers would take %.1f GB (at most %.1f GB are stored unasked: "
            "teacher.cache)", size / 1e9, most / 1e9,
        )  # fmt: skip
    return size <= most
