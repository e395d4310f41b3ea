"""Debian's package archive, read through this machine's apt sources but with package lists of its own."""

import logging
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from itertools import groupby
from pathlib import Path
from typing import Final

from flexkd.errors import DataError, MissingDependencyError

logger = logging.getLogger(__name__)

_ROLLING: Final = ("stable", "testing", "unstable", "sid")
_ONE_LINE: Final = re.compile(r"deb\s+(\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)")
_CONFIGURATION: Final = """\
#clear Acquire::Languages;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages {{ "en"; }};
Acquire::GzipIndexes "false";
APT::Sandbox::User "root";
Dir::State::lists "{folder}/lists";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{folder}/sources";
"""


@dataclass(frozen=True)
class Archive:
    """Debian's archive with freshly fetched package lists.

    Attributes:
        folder: Holds all files; the caller deletes it.
        packages: Package indexes of Debian itself, without those of other sources of the machine.
        translations: Indexes with the long descriptions.
    """

    folder: Path
    packages: tuple[Path, ...]
    translations: tuple[Path, ...]

    def unpack(self, package: str) -> Path:
        """Download a package and unpack its files, without installing it.

        Raises:
            DataError: The download fails.
        """
        logger.info("apt-get download %s ...", package)
        _run_checked(self.folder, "apt-get", "download", package)
        (file,) = self.folder.glob(f"{package}_*.deb")
        unpacked = self.folder / "unpacked"
        _run_checked(self.folder, "dpkg-deb", "--extract", str(file), str(unpacked))
        return unpacked


def open_archive(folder: Path) -> Archive:
    """Fetch the package lists of Debian into an empty folder, from the Debian sources of this machine.

    Raises:
        MissingDependencyError: This machine has no apt.
        DataError: This machine has no Debian source, or the lists cannot be fetched.
    """
    missing = [program for program in ("apt-get", "apt-config", "dpkg-deb") if shutil.which(program) is None]
    if missing:
        raise MissingDependencyError(f"{missing[0]} is not on this machine. Run on Debian, or give a JSONL file.")
    release = platform.freedesktop_os_release()
    suites = [name for name in (release.get("VERSION_CODENAME"), *_ROLLING) if name]
    sources = debian_sources(_source_files(), suites)
    if not sources:
        raise DataError(
            f"apt: no source of this machine names {suites[0]} with main. Run on Debian, or give a JSONL file."
        )
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (folder / name).mkdir(parents=True)
    for name, text in sources.items():
        (folder / "sources" / name).write_text(text, encoding="utf-8")
    (folder / "apt.conf").write_text(_CONFIGURATION.format(folder=folder), encoding="utf-8")
    logger.info("apt-get update, with lists of its own ...")
    update = _run(folder, "apt-get", "update")
    indexes = _indexes(folder)
    # apt does not fail when a download does, and one broken source among several does no harm: the lists decide.
    if not all(indexes):
        raise DataError(_failure_text("apt-get update", update))
    return Archive(folder, *indexes)


def debian_sources(files: Mapping[str, str], suites: Sequence[str]) -> dict[str, str]:
    """Entries of apt's source files for a suite of Debian and its main component, reduced to these two.

    Args:
        files: File name -> text, in the one-line format or, where the name ends in ".sources", in stanzas.
        suites: Names of Debian's suite, such as bookworm or stable.

    Returns:
        File name -> text of a source file with these entries.
    """
    lines: list[str] = []
    entries: list[str] = []
    for name, text in files.items():
        if name.endswith(".sources"):
            entries += filter(None, (_stanza(stanza, suites) for stanza in re.split(r"\n\s*\n", text)))
        else:
            lines += filter(None, (_line(line.strip(), suites) for line in text.splitlines()))
    sources = {"machine.list": "\n".join([*lines, ""]), "machine.sources": "\n\n".join([*entries, ""])}
    return {name: text for name, text in sources.items() if text.strip()}


def stanzas(lines: Iterable[str]) -> Iterator[Message]:
    """Stanzas of an index, which have the form of the headers of a mail."""
    parser = HeaderParser()
    for is_blank, stanza in groupby(lines, key=lambda line: not line.strip()):
        if not is_blank:
            yield parser.parsestr("".join(stanza))


def _indexes(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The fetched indexes of Debian: those of packages and those of translations."""
    listed = _run_checked(folder, "apt-get", "indextargets", "--format", "$(ORIGIN)|$(CREATED_BY)|$(FILENAME)")
    indexes: dict[str, list[Path]] = {"Packages": [], "Translations": []}
    for line in listed.splitlines():
        origin, creator, name = line.split("|", 2)
        if origin == "Debian" and creator in indexes and Path(name).exists():
            indexes[creator].append(Path(name))
    return tuple(indexes["Packages"]), tuple(indexes["Translations"])


def _run_checked(folder: Path, program: str, *arguments: str) -> str:
    process = _run(folder, program, *arguments)
    if process.returncode:
        raise DataError(_failure_text(f"{program} {arguments[0]}", process))
    return process.stdout


def _run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = ["-c", str(folder / "apt.conf")] if program == "apt-get" else []
    return subprocess.run([program, *settings, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def _failure_text(command: str, process: subprocess.CompletedProcess[str]) -> str:
    reason = (process.stderr.strip() or process.stdout.strip() or "no reason given").splitlines()[-1]
    return f"{command} failed ({reason}). Check the network, or give a JSONL file."


def _source_files() -> dict[str, str]:
    command = ["apt-config", "shell", "FILE", "Dir::Etc::sourcelist/f", "FOLDER", "Dir::Etc::sourceparts/d"]
    shell = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = dict(re.findall(r"^(\w+)='(.*)'$", shell, re.MULTILINE))
    folder = Path(paths.get("FOLDER", ""))
    parts = sorted(folder.iterdir()) if paths.get("FOLDER") and folder.is_dir() else []
    files = [Path(paths.get("FILE", "")), *(part for part in parts if part.suffix in (".list", ".sources"))]
    return {str(file): file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()}


def _line(line: str, suites: Sequence[str]) -> str | None:
    match = _ONE_LINE.fullmatch(line.partition("#")[0].strip())
    if match is None or match["suite"] not in suites or "main" not in match["components"].split():
        return None
    return f"deb {match[1] or ''}{match['uri']} {match['suite']} main"


def _stanza(text: str, suites: Sequence[str]) -> str | None:
    text = "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    fields = HeaderParser().parsestr(text)
    debian_suites = [suite for suite in fields.get("Suites", "").split() if suite in suites]
    types, enabled = fields.get("Types", "").split(), fields.get("Enabled", "yes").lower()
    is_enabled = "deb" in types and enabled not in ("no", "false")
    if not debian_suites or not is_enabled or "main" not in fields.get("Components", "").split():
        return None
    for key, value in (("Types", "deb"), ("Suites", debian_suites[0]), ("Components", "main")):
        text = re.sub(rf"^{key}:.*(\n[ \t].*)*", f"{key}: {value}", text, flags=re.MULTILINE)
    return text
