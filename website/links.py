"""Links of the documents: files outside docs/ become pages, and a key of a recipe in a text leads to its entry."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
MORE_PAGES: Final = {
    "README.md": "readme.md",
    "recipes/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Documents outside docs/ that are pages, and where they stand on the site."""
_FILES: Final = "files"
_LINK: Final = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
_LANGUAGES: Final = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".json": "json", ".txt": "text", "": "text"}


def page_of(file: Path) -> str | None:
    """Where a file or folder of the repository stands on the site; None for what lies in docs/ or is not there.

    A folder is shown by its README, or by that of the folder around it.
    """
    if not file.is_relative_to(ROOT) or file.is_relative_to(DOCS):
        return None
    if file.is_dir():
        return page_of(file / "README.md") if (file / "README.md").exists() else page_of(file.parent)
    if not file.exists():
        return None
    place = file.relative_to(ROOT).as_posix()
    return MORE_PAGES.get(place, f"{_FILES}/{place}.md")


def linked_files(text: str, document: Path) -> dict[str, Path]:
    """Files outside docs/ that a document links to and that no other page shows, by their place on the site."""
    targets = [(document.parent / link[0]).resolve() for link in _LINK.findall(text)]
    pages = {page_of(file): file for file in targets}
    return {page: file for page, file in pages.items() if page is not None and page.startswith(f"{_FILES}/")}


def file_page(file: Path) -> str:
    """A file of the repository as a page, which the search leaves out."""
    place, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    head = f"---\ntitle: {place}\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# `{place}`\n\n"
    return f"{head}{fence}{_LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n"


def with_links_of_the_site(text: str, document: Path, page: str) -> str:
    """The text of a document with links to where their targets stand on the site.

    Args:
        document: The file that the text is from.
        page: Its place on the site.
    """

    def on_site(link: re.Match[str]) -> str:
        target = (document.parent / link[1]).resolve()
        place = page_of(target) or (target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else None)
        if place is None:
            return link[0]
        return os.path.relpath(place, Path(page).parent).replace(os.sep, "/") + (link[2] or "")

    return _LINK.sub(on_site, text)


def with_linked_keys(content: str, keys: Mapping[str, str]) -> str:
    """The HTML of a page in which code that names a key of a recipe is a link.

    Args:
        keys: Address of the entry of each key.
    """
    pieces = re.split(r"(<pre.*?</pre>|<a\b.*?</a>|<h[1-6].*?</h[1-6]>)", content, flags=re.DOTALL)
    return "".join(piece if index % 2 else _CODE.sub(_linked(keys), piece) for index, piece in enumerate(pieces))


_CODE: Final = re.compile(r"<code>([a-z0-9_.]+)((?:=|: )[^<]*)?</code>")


def _linked(keys: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    def link(code: re.Match[str]) -> str:
        address = keys.get(code[1]) if "." in code[1] else None
        return code[0] if address is None else f'<a class="key" href="{address}">{code[0]}</a>'

    return link
