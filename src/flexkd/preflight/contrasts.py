"""Contrasts and seeds are named before results: those that a folder had when its first student was finished."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexkd.compare_record import CompareRecord
from flexkd.errors import ArtifactError
from flexkd.facts.families.table import family_can_rotate
from flexkd.facts.seeds import fewest_seeds, seeds_in_words, seeds_text
from flexkd.preflight.inputs import RecipeInputs
from flexkd.recipe import Recipe
from flexkd.recipe.methods import compared_contrasts, compared_methods, compared_seeds
from flexkd.run_files import CELL_FILE, CELLS_FOLDER, COMPARISON_FILE, CONTRASTS_FILE, SEEDS_FILE

Pairs = Sequence[tuple[str, str]]
"""Methods, each with its reference."""


def contrast_notes(inputs: RecipeInputs) -> Iterator[str]:
    """What the seeds and contrasts of the recipe's `compare` section cannot show, whatever the results."""
    recipe, teacher = inputs.recipe, inputs.models.get("teacher.model")
    if recipe.compare is None or teacher is None or len(compared_seeds(recipe, ())) < 2:
        return
    can_rotate = family_can_rotate(teacher.model_type) if teacher.model_type else None
    methods = compared_methods(recipe, (), can_rotate=can_rotate)
    yield from limits(recipe, compared_contrasts(recipe, methods), compared_seeds(recipe, ()))


def limits(recipe: Recipe, contrasts: Pairs, seeds: Sequence[int]) -> Iterator[str]:
    """What so many seeds, and contrasts that are named now, cannot show, whatever the results."""
    fewest = fewest_seeds(len(contrasts))
    if contrasts and len(seeds) < fewest:
        yield (
            f"compare.seeds: with {len(seeds)} seeds no difference can be significant, whatever the results. "
            f"{seeds_text(len(seeds), len(contrasts))} Give {fewest} or more."
        )
    changes = [
        f"{seeds_in_words(changed)} {'was' if len(changed) == 1 else 'were'} {change}"
        for changed, change in zip(changed_seeds(recipe.folder, seeds), ("added", "left out"), strict=True)
        if changed
    ]
    if changes:
        yield (
            f"compare.seeds: {recipe.folder} holds results, from before {' and '.join(changes)}: record and page will "
            "say so, for no p value counts that seeds are chosen by results. To test a difference, train other seeds "
            "in a new output folder."
        )
    if are_late(recipe.folder, contrasts):
        yield (
            f"compare.contrasts: {recipe.folder} holds results, from before these contrasts were named: their p values "
            "will be called exploratory. To test them, train other seeds in a new output folder."
        )


def are_late(folder: Path, contrasts: Pairs) -> bool:
    """Whether the folder of a comparison had results before these contrasts were named."""
    return _unordered(first_contrasts(folder, contrasts)) != _unordered(contrasts)


def first_contrasts(folder: Path, contrasts: Pairs) -> list[tuple[str, str]]:
    """The contrasts that were named before any result of a comparison, in its folder; these ones where it has none.

    Raises:
        ArtifactError: A file about them cannot be read.
    """
    finished = folder / COMPARISON_FILE
    if not _has_results(folder):
        return list(contrasts)
    named = _read(folder / CONTRASTS_FILE)
    if named is not None:
        return [(method, reference) for method, reference in named]
    if not finished.is_file():
        return []
    # Earlier versions wrote no such file: they named contrasts before training, or compared all with the reference.
    record = CompareRecord.read(finished)
    if record.contrasts:
        return [(contrast.method, contrast.reference) for contrast in record.contrasts]
    return [(method, record.reference) for method in record.methods if method != record.reference]


def changed_seeds(folder: Path, seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """Seeds that were added to a comparison after its folder had results, and those that were left out since."""
    first = first_seeds(folder, seeds)
    return [seed for seed in seeds if seed not in first], [seed for seed in first if seed not in seeds]


def first_seeds(folder: Path, seeds: Sequence[int]) -> list[int]:
    """The seeds that were named before any result of a comparison, in its folder; these ones where it has none.

    Of a comparison that an earlier version did not finish it is not known, and these ones count as the first.

    Raises:
        ArtifactError: A file about them cannot be read.
    """
    if not _has_results(folder):
        return list(seeds)
    named = _read(folder / SEEDS_FILE)
    if named is not None:
        return [int(seed) for seed in named]
    finished = folder / COMPARISON_FILE
    return CompareRecord.read(finished).seeds if finished.is_file() else list(seeds)


def _has_results(folder: Path) -> bool:
    """Whether a student of a comparison is finished."""
    return (folder / COMPARISON_FILE).is_file() or any((folder / CELLS_FOLDER).glob(f"*/{CELL_FILE}"))


def _read(file: Path) -> list[Any] | None:
    """What was named before results; None where no such file was written."""
    if not file.is_file():
        return None
    try:
        named: list[Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file}: cannot be read ({error}). Choose another output folder.") from error
    return named


def _unordered(contrasts: Pairs) -> set[frozenset[str]]:
    """The exact test of two methods is the same in either order."""
    return {frozenset(contrast) for contrast in contrasts}
