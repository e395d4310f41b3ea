"""The whole job with all that it hands over: a student with its card, a page, and an upload where one is asked for."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexkd.compare_record import CompareRecord
from flexkd.errors import FlexKDError, UploadError
from flexkd.files import local_path, written_whole
from flexkd.guards.work import in_run_folder
from flexkd.models.loading.hub import KEY, upload_student
from flexkd.pipeline import compare as comparison
from flexkd.pipeline import distill as pipeline
from flexkd.pipeline import sizes as sizing
from flexkd.processes import alone, is_first
from flexkd.recipe import Recipe
from flexkd.record import RunRecord
from flexkd.report import page
from flexkd.report.card import model_card
from flexkd.run_files import REPORT_FILE, STUDENT_FOLDER
from flexkd.sizes_record import SizesRecord


def distill(recipe: Recipe) -> RunRecord:
    """Run a recipe; its folder then holds scores, the student with its card, predictions, the record and the page.

    An interrupted run continues from its last checkpoint. Where the recipe has `push_to_hub`, the student's folder is
    uploaded last.

    Raises:
        FlexKDError: Recipe, rows or models are wrong, or training failed.
        UploadError: Everything else is done and stays, but the student was not uploaded; says how to do it.
    """
    record = finished_run(recipe)
    upload(recipe)
    return record


@in_run_folder
def finished_run(recipe: Recipe) -> RunRecord:
    """As `distill`, without the upload."""
    record = pipeline.distill(recipe)

    def deliver() -> None:
        page.write_report([record], recipe.folder / REPORT_FILE)
        with written_whole(recipe.folder / STUDENT_FOLDER / "README.md") as partial:
            partial.write_text(model_card(record), encoding="utf-8")

    alone(deliver)
    return record


@in_run_folder
def compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    search: Mapping[str, Any] | None = None,
    tuned: bool = False,
) -> CompareRecord:
    """Run every method with every seed and compare them in pairs; the folder then holds every cell and the page.

    An interrupted comparison continues with the missing cells. Contrasts, searches and the test are explained at
    `pipeline.compare.compare`.

    Args:
        recipe: Describes `flexkd`; `facts.methods.METHODS` says what the other methods change, and its section
            `compare` may define more and name contrasts.
        methods: Names of methods; empty: the recipe's, or the default ones.
        seeds: Seeds of the students; empty: the recipe's, or the default ones.
        search: Recipe key to the values to try for every method, as in `tune`; None: the recipe's.
        tuned: Search nothing, and give each method the values that an earlier `tune` chose for it.

    Raises:
        RecipeError: A method, a contrast or a value of the search does not fit the recipe.
        ArtifactError: Finished students belong to another recipe, or took different numbers of steps; or `tune` has
            left no values for these methods.
        FlexKDError: As `distill`.
    """
    record = comparison.compare(recipe, methods=methods, seeds=seeds, search=search, tuned=tuned)
    alone(lambda: page.write_compare_report(record, recipe.folder / REPORT_FILE))
    return record


@in_run_folder
def sizes(recipe: Recipe, *, values: Sequence[float] = (), seeds: Sequence[int] = ()) -> SizesRecord:
    """Distil a recipe at several sizes; the folder then holds the students of the first seed, the record and the page.

    All sizes have the same teacher, rows and steps. An interrupted call continues with the missing cells, and sizes and
    seeds can be added.

    Args:
        recipe: Its section `sizes` says which key of `student` the sizes differ in.
        values: Of that key; empty: the recipe's, or 0.1, 0.2, 0.35 and 0.5 of the teacher's parameters.
        seeds: Seeds of the students; empty: the recipe's, or `training.seed` alone.

    Raises:
        RecipeError: The values break a rule of the section, or two of them come to the same student.
        ArtifactError: Finished students belong to another recipe, or took different numbers of steps.
        FlexKDError: As `distill`.
    """
    record = sizing.sizes(recipe, values=values, seeds=seeds)
    alone(lambda: page.write_sizes_report(record, recipe.folder / REPORT_FILE))
    return record


def push(folder: str | Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a finished student to the Hugging Face hub, with its card; the files of its folder and nothing else.

    Args:
        folder: A run folder, or the student in it.
        repo: owner/name, or a name below the owner of the token; made where it does not exist.
        private: Whether only its owner sees a new repository; None: as the hub decides for this owner.
        revision: Branch; None: the main one.

    Returns:
        The URL of the commit.

    Raises:
        ArtifactError: There is no student, or a file of it links out of its folder or names a path of this machine.
        UploadError: The hub did not take it.
    """
    return upload_student(local_path(folder, where="RUN"), repo, private=private, revision=revision)


def upload(recipe: Recipe) -> str | None:
    """Upload the student of a finished run where its recipe has `push_to_hub`; the URL of the commit.

    Raises:
        UploadError: Holds the command that uploads it later.
    """
    section = recipe.push_to_hub
    if section is None or not is_first():
        return None
    try:
        return push(recipe.folder, section.repo, private=section.private, revision=section.revision)
    except FlexKDError as error:
        options = [] if section.private is None else ["--private" if section.private else "--public"]
        options += [] if section.revision is None else ["--revision", section.revision]
        command = shlex.join(["flexkd", "push", str(recipe.folder), section.repo, *options])
        raise UploadError(
            f"{KEY}: the run is finished and its student lies in '{recipe.folder / STUDENT_FOLDER}', but it was not "
            f"uploaded. {error}\nTo upload it: {command}"
        ) from error
