"""Scores of the teacher's units as a recipe asks for them, computed once for a job."""

import logging

from tqdm.auto import tqdm

from flexkd.core.scores import UnitScores
from flexkd.models.forward.autocast import scoring_dtype
from flexkd.pipeline.job import Job
from flexkd.pipeline.start import rotation_of
from flexkd.recipe import Recipe
from flexkd.recipe.fingerprints import score_seed
from flexkd.recipe.model_sections import ScoresSection
from flexkd.recipe.taught_features import reads_scores, unread_scores_reason
from flexkd.scoring.units import score_units

logger = logging.getLogger(__name__)


def unit_scores(job: Job, recipe: Recipe) -> tuple[UnitScores, ...]:
    """Scores of each layer that the recipe names; runs with the same settings share them."""
    section, seed = recipe.scores, score_seed(recipe)

    def compute() -> tuple[UnitScores, ...]:
        layers = section.layer if isinstance(section.layer, tuple) else (section.layer,)
        batches = tqdm(list(job.batches("train", num_rows=section.rows)), "teacher units, batches scored", leave=False)
        scores = score_units(
            job.teacher,
            batches,
            target=section.target,
            attribution=section.attribution,
            layer=layers,
            seed=seed,
            precision=scoring_dtype(job.teacher_precision),
        )
        return tuple(scores)

    return job.memo.scores(f"{section.model_dump_json()} {seed}", compute)


def are_scores_read(job: Job, recipe: Recipe) -> bool:
    """Whether the scores decide anything under this recipe; the log says why where they do not."""
    rotated = rotation_of(job, recipe) is not None
    if reads_scores(recipe, rotated=rotated):
        return True
    logger.log(
        logging.INFO if recipe.scores == ScoresSection() else logging.WARNING,
        "scores: nothing of this recipe reads them: %s",
        unread_scores_reason(recipe, rotated=rotated),
    )
    return False
