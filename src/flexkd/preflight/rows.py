"""The rows of a recipe, read and checked for its kind of task."""

from flexkd.data.generation import GenerationData, load_generation
from flexkd.data.sources import is_remote, parts_of
from flexkd.data.tasks import ClassificationData, load_classification
from flexkd.recipe import Recipe


def remote_sources(recipe: Recipe) -> dict[str, str]:
    """Splits whose rows are on the hub or not fetched yet, which cannot be read without a network."""
    given = {split: getattr(recipe.data, split) for split in ("train", "validation", "test")}
    return {
        split: source
        for split, source in given.items()
        if isinstance(source, str) and any(map(is_remote, parts_of(source)))
    }


def read_rows(recipe: Recipe) -> ClassificationData | GenerationData:
    """The rows of a recipe, wherever they are.

    Their order does not follow `training.seed`: students of all seeds share one teacher and one set of scored rows.

    Raises:
        DataError: As `load_classification` and `load_generation`.
    """
    data = recipe.data
    if recipe.task.type == "classification":
        return load_classification(
            train=data.train,
            validation=data.validation,
            test=data.test,
            text=data.text,
            text_pair=data.text_pair,
            label=data.label,
            problem=recipe.task.problem,
            label_names=data.label_names,
            where=data.where,
            bad_rows=data.bad_rows,
            unlabelled=data.unlabelled,
            max_rows=data.max_rows,
        )
    return load_generation(
        train=data.train,
        validation=data.validation,
        test=data.test,
        kind=recipe.task.type,
        prompt=data.prompt,
        context=data.context,
        response=data.response,
        messages=data.messages,
        document=data.document,
        summary=data.summary,
        group=data.group,
        where=data.where,
        bad_rows=data.bad_rows,
        max_rows=data.max_rows,
    )
