"""Uploads of finished students to the Hugging Face hub: checked before a run, and made after it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flexkd.errors import ArtifactError, FlexKDError, RecipeError, UploadError
from flexkd.facts.names import WEIGHT_ENDINGS
from flexkd.files import is_there
from flexkd.run_files import STUDENT_FOLDER

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KEY: Final = "push_to_hub"
"""The recipe's section, for messages."""

_MESSAGE: Final = "Student distilled by flexkd"
_UNAUTHORIZED: Final = 401
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
_TEXTS: Final = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml")
_ABSOLUTE: Final = re.compile(r"(?<![\w./:<~-])/[\w.+@~-]+(?:/[\w.+@~-]+)+")


def repo_fault(repo: str) -> str:
    """What is wrong with the name of a repository; empty if nothing is."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).partition(":")[0].rstrip(".")
        return f"{repo!r} is no name of a repository ({reason}). Write it as owner/name."
    return ""


def check_upload(repo: str, *, private: bool | None) -> None:
    """Refuse an upload that would fail, before time is spent on the run; the hub is asked who the token belongs to.

    Args:
        repo: owner/name, or a name below the owner of the token.
        private: As in `upload_student`.

    Raises:
        RecipeError: The hub is switched off or cannot be reached, there is no token or none that may write there, or
            the repository is public and is to be private.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    otherwise = f"or set {KEY} to null and upload the finished run with 'flexkd push'"
    if is_offline_mode():
        raise RecipeError(f"{KEY}: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids uploads. Unset it, {otherwise}.")
    if get_token() is None:
        raise RecipeError(
            f"{KEY}: there is no token of the hub on this machine. Run 'hf auth login' or set HF_TOKEN, {otherwise}."
        )
    api = HfApi()
    try:
        account = api.whoami()
        _refuse_public(api, repo, private=private)
    except FlexKDError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code != _UNAUTHORIZED:
            raise RecipeError(
                f"{KEY}: {api.endpoint} refuses to answer ({_line(error)}). Try again, {otherwise}."
            ) from None
        raise RecipeError(
            f"{KEY}: {api.endpoint} does not know the token of this machine (HF_TOKEN, or that of 'hf auth login'). "
            f"Give a valid one, {otherwise}."
        ) from None
    except Exception as error:
        raise RecipeError(f"{KEY}: {api.endpoint} cannot be reached ({_line(error)}). Connect, {otherwise}.") from None
    _refuse_account(account, repo)


def upload_student(folder: Path, repo: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Upload the files of a student's folder in one commit, and nothing else; hidden files stay here.

    Args:
        folder: A student's folder, or a run folder with one.
        repo: As in `check_upload`; made where it does not exist.
        private: Whether only its owner sees it; None: as the hub makes repositories of this owner. Ignored, but for
            True, where the repository exists.
        revision: Branch; made where it does not exist. None: the main one.

    Returns:
        The URL of the commit.

    Raises:
        ArtifactError: There is no student, or a file links out of its folder or names a path of this machine.
        UploadError: The hub did not take it; says why.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    root = student_folder(folder)
    files = list(_files(root))
    for file in files:
        _refuse_local_paths(file)
    api = HfApi()
    try:
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        _refuse_public(api, repo_id, private=private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(file.relative_to(root).as_posix(), file) for file in files]
        return str(api.create_commit(repo_id, additions, commit_message=_MESSAGE, revision=revision).commit_url)
    except FlexKDError:
        raise
    except Exception as error:
        raise UploadError(f"{repo}: {api.endpoint} did not take the student of {root}: {_line(error)}") from error


def student_folder(folder: Path) -> Path:
    """The student's folder that is meant: the folder itself, or the student of a run.

    Raises:
        ArtifactError: It is neither.
    """
    for place in (folder / STUDENT_FOLDER, folder):
        if (place / "config.json").is_file() and any(file.suffix in WEIGHT_ENDINGS for file in place.iterdir()):
            return place
    raise ArtifactError(f"{folder}: holds no finished student. Give a run folder of `flexkd distill`, or its student.")


def _files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(root).parts) or file.is_dir():
            continue
        if not file.resolve().is_relative_to(root.resolve()):
            raise ArtifactError(f"{file}: is a link to a file outside of the folder. Copy it there, or remove it.")
        yield file


def _refuse_local_paths(file: Path) -> None:
    """Refuse a text that names a path of this machine, as the cards of earlier versions do."""
    if file.suffix not in _TEXTS or file.name in _VOCABULARIES:
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        path = next((match[0] for match in _ABSOLUTE.finditer(line) if _is_of_this_machine(match[0])), None)
        if path is not None:
            raise ArtifactError(
                f"{file}:{number}: names '{path}', a path of this machine. Take it out of the file, then push again."
            )


def _is_of_this_machine(text: str) -> bool:
    """Whether an absolute path lies in the home folder, or in a folder of this machine that is not at its root."""
    path = Path(text)
    folders = [folder for folder in (path, *path.parents) if len(folder.parts) > 2]
    return path.is_relative_to(Path.home()) or any(map(is_there, folders))


def _refuse_public(api: "HfApi", repo: str, *, private: bool | None) -> None:
    """Refuse to put into a public repository what is to be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if not private:
        return
    try:
        is_private = api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    if not is_private:
        raise RecipeError(
            f"{KEY}.private: '{repo}' exists and is public. Make it private on the hub, take another repository, or "
            "set private to false."
        )


def _refuse_account(account: dict[str, Any], repo: str) -> None:
    """Refuse a token that cannot write into a repository, as far as the hub says what it may do."""
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise RecipeError(f"{KEY}: the token of this machine may only read. Give one that may write.")
    owner, slash, _ = repo.partition("/")
    names = [str(account["name"]), *(str(organization["name"]) for organization in account.get("orgs") or ())]
    if slash and owner.lower() not in [name.lower() for name in names]:
        raise RecipeError(
            f"{KEY}.repo: '{repo}' is of '{owner}', and the token of this machine belongs to {' and '.join(names)}. "
            f"Write '{names[0]}{slash}{repo.partition('/')[2]}', or give a token of '{owner}'."
        )


def _line(error: Exception) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
