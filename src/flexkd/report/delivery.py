"""The whole job with all that it hands over: a student with its card, a page, and an upload where one is asked for."""

import shlex
from pathlib import Path

from flexkd.errors import FlexKDError, UploadError
from flexkd.files import local_path
from flexkd.models.loading.hub import KEY, upload_student
from flexkd.pipeline import distill as pipeline
from flexkd.recipe import Recipe
from flexkd.record import RunRecord
from flexkd.report import page
from flexkd.report.card import model_card
from flexkd.run_files import REPORT_FILE, STUDENT_FOLDER


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


def finished_run(recipe: Recipe) -> RunRecord:
    """As `distill`, without the upload."""
    record = pipeline.distill(recipe)
    page.write_report([record], recipe.folder / REPORT_FILE)
    (recipe.folder / STUDENT_FOLDER / "README.md").write_text(model_card(record), encoding="utf-8")
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
    if section is None:
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
