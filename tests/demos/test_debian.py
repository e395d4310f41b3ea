import shutil
import stat
from pathlib import Path

import pytest

from flexkd.demos.debian import debian_sources, open_archive, stanzas
from flexkd.demos.descriptions import COMMON_PARAGRAPH, join_descriptions
from flexkd.demos.foldoc import fetch_definitions, read_definitions
from flexkd.errors import DataError, MissingDependencyError

STANZAS = """\
# the archive
Types: deb deb-src
# an old place
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
 non-free
Signed-By:
 -----BEGIN KEY-----
 .
 -----END KEY-----

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://tools.example/linux/debian
Suites: bookworm
Components: stable
"""
LINES = """\
deb [arch=amd64 signed-by=/a.gpg] http://mirror.example/debian bookworm main contrib  # own
# deb http://off.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb http://tools.example/apt tools-bookworm main
deb http://tools.example/apt bookworm stable
"""


def test_only_entries_of_debians_suite_and_main_are_kept() -> None:
    result = debian_sources({"/a/debian.sources": STANZAS, "/a/sources.list": LINES}, ["bookworm", "stable"])
    assert result["machine.list"] == "deb [arch=amd64 signed-by=/a.gpg] http://mirror.example/debian bookworm main\n"
    assert result["machine.sources"].strip().splitlines() == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Suites: bookworm",
        "Components: main",
        "Signed-By:",
        " -----BEGIN KEY-----",
        " .",
        " -----END KEY-----",
    ]
    assert debian_sources({"a.sources": STANZAS, "b.list": LINES}, ["trixie"]) == {}


def test_stanzas_keep_their_lines() -> None:
    text = "Package: a\nSize: 3\n more\nText: one\n two\n .\n three: 3\n\n\npackage: b\n"
    assert [dict(stanza) for stanza in stanzas(text.splitlines(keepends=True))] == [
        {"Package": "a", "Size": "3\n more", "Text": "one\n two\n .\n three: 3"},
        {"package": "b"},
    ]


LONG = " " + "word " * 30 + "end\n"
COMMON = " Stands in many packages.\n"


def package(name: str, section: str = "utils", source: str = "", md5: str = "1") -> str:
    origin = f"Source: {source}\n" if source else ""
    return f"Package: {name}\nVersion: 1\n{origin}Section: {section}\nDescription-md5: {md5}\n\n"


def described(name: str, long: str = LONG, md5: str = "1") -> str:
    return f"Package: {name}\nDescription-md5: {md5}\nDescription-en: about {name}\n{long}\n"


def join(packages: list[str], translations: list[str]) -> list[dict[str, str]]:
    return join_descriptions("".join(packages).splitlines(True), "".join(translations).splitlines(True))


def test_descriptions_are_joined_by_package_and_hash_one_for_each_source() -> None:
    extra = " And more\n of it:\n  * a point\n  * another\n .\n A second paragraph.\n"
    rows = join(
        [
            package("tool", source="suite (2.0)"),
            package("tool-more", source="suite"),
            package("alone"),
            package("changed", md5="2"),
            package("tool-debug", section="debug"),
            package("old", section="contrib/oldlibs"),
            package("short"),
            package("copy"),
        ],
        [
            described("tool"),
            described("tool-more", LONG + extra),
            described("alone", f"{LONG} .\n Alone.\n"),
            described("changed", md5="1"),
            described("tool-debug", LONG + " x\n"),
            described("old", LONG + " y\n"),
            described("short", " few words\n"),
            described("copy", f"{LONG} .\n Alone.\n"),
        ],
    )
    words = "word " * 30 + "end"
    assert rows == [
        {"document": f"{words}\n\nAlone.", "summary": "about alone", "source": "alone", "package": "alone"},
        {
            "document": f"{words} And more of it:\n* a point\n* another\n\nA second paragraph.",
            "summary": "about tool-more",
            "source": "suite",
            "package": "tool-more",
        },
    ]


def test_a_paragraph_of_many_packages_is_dropped() -> None:
    names = [f"package{n}" for n in range(COMMON_PARAGRAPH)]

    def documents(count: int) -> list[str]:
        texts = [described(name, f" {name} {LONG} .\n{COMMON}") for name in names[:count]]
        return [row["document"] for row in join([package(name) for name in names[:count]], texts)]

    assert all("Stands in many packages." in entry for entry in documents(COMMON_PARAGRAPH - 1))
    assert not any("Stands in many packages." in entry for entry in documents(COMMON_PARAGRAPH))
    assert len(documents(COMMON_PARAGRAPH)) == COMMON_PARAGRAPH


ENTRIES = {
    "gadget": "Gadget\ngizmo\n\n   <tool, humour> (GG) A {device} that {turns\n   (turning)} {knobs {of} all (many"
    " (x))} kinds.\n\n"
    "   A second paragraph.\n\n   (1999-01-27)\n",
    "gizmo": "",
    "reference": "Reference\n\n   {some other entry of this long kind}\n",
    "short": "Short\n\n   <tool> Two words.\n",
    "address": "Address\n\n   <tool> A program by one <one@mail.example> for all of you.\n",
    "cited": "Cited\n\n   A thing that is cited here. [{Some File}] (2001-02-03)\n",
}


def dictionary() -> tuple[bytes, str]:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    text, lines, place = b"", ["00-database-info\tA\tB"], ("A", "A")
    for term, entry in ENTRIES.items():
        if entry:
            place = (number(len(text)), number(len(entry.encode())))
            text += entry.encode()
        lines.append("\t".join((term, *place)))
    return text, "\n".join(lines)


def test_definitions_are_plain_text_and_only_whole_ones() -> None:
    assert read_definitions(*dictionary()) == [
        {
            "instruction": 'What does "Gadget" mean in computing?',
            "output": "(GG) A device that turns knobs of all kinds.",
            "term": "Gadget",
        },
        {
            "instruction": 'What does "Cited" mean in computing?',
            "output": "A thing that is cited here.",
            "term": "Cited",
        },
    ]


def program(folder: Path, name: str, lines: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose apt is a script: it has one source, and its archive one package."""
    programs, sources = tmp_path / "bin", tmp_path / "etc"
    programs.mkdir()
    (sources / "parts").mkdir(parents=True)
    (sources / "sources.list").write_text("deb http://mirror.example/debian bookworm main\n")
    program(programs, "apt-config", f"echo \"FILE='{sources}/sources.list'\"; echo \"FOLDER='{sources}/parts'\"")
    program(programs, "dpkg-deb", 'mkdir -p "$3/usr/share/dictd"; cp ../source/* "$3/usr/share/dictd"')
    program(
        programs,
        "apt-get",
        'test "$1" = -c && grep -q "$PWD/lists" "$2" || exit 1\n'
        'case "$3" in\n'
        "update) cp ../source/index lists/index ;;\n"
        'indextargets) for kind in Packages Translations; do echo "Debian|$kind|$PWD/lists/index"; done\n'
        '  echo "Other|Packages|$PWD/lists/index"; echo "Debian|Packages|$PWD/lists/none" ;;\n'
        'download) touch "$4_1_all.deb" ;;\n'
        "esac",
    )
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    (tmp_path / "source").mkdir()
    (tmp_path / "work").mkdir()
    return tmp_path


def test_the_archive_is_read_with_lists_of_its_own(machine: Path) -> None:
    import gzip

    text, index = dictionary()
    (machine / "source" / "index").write_text("lists")
    (machine / "source" / "foldoc.dict.dz").write_bytes(gzip.compress(text))
    (machine / "source" / "foldoc.index").write_text(index)
    rows = fetch_definitions(machine / "work")
    assert [row["term"] for row in rows] == ["Gadget", "Cited"]
    assert (machine / "work" / "sources" / "machine.list").read_text().startswith("deb http://mirror.example/debian")


def test_what_is_missing_is_one_error_that_names_the_way_round(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^apt-get update failed \(cp: .*\)\. Check the network, or give a"):
        open_archive(machine / "work")
    (machine / "etc" / "sources.list").write_text("deb http://mirror.example/ubuntu noble main\n")
    with pytest.raises(DataError, match="no source of this machine names bookworm with main"):
        open_archive(machine / "work")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"apt-get is not on this machine\. Run on Debian, or give a"):
        open_archive(machine / "work")
