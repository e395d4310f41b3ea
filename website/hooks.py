"""Hooks of MkDocs: generated parts in their places, more pages from the repository, nothing from another host."""

import os
import re
import tomllib
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from flexkd.recipe.messages import key_fields
from website.commands import commands_page
from website.links import DOCS, MORE_PAGES, ROOT, file_page, linked_files, with_linked_keys, with_links_of_the_site
from website.notebooks import notebook_page
from website.offline import loaded
from website.program import losses, program
from website.recipe_keys import keys_page, schema_text

KEYS_PAGE: Final = "reference/recipe.md"
NOT_SEARCHED: Final = ("house.md", "cases.md")
"""Lists of files, which would be the first answer to every question."""
ALL_RESULTS: Final = "results/*/README.md"
NOTEBOOKS: Final = "notebooks/*.ipynb"
GENERATED: Final = {"recipe keys": keys_page, "commands": commands_page, "losses": losses, "program": program}
"""What stands in the place of `<!-- generated: NAME -->`."""
_MARK: Final = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the page of each study in the place of `ALL_RESULTS` in the navigation, and link to the project's home."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if address := project["urls"].get("Repository"):
        config.repo_url, config.repo_name = address, project["name"]
    studies = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(ALL_RESULTS))
    for tab in config.nav or []:
        for pages in tab.values():
            if ALL_RESULTS in pages:
                place = pages.index(ALL_RESULTS)
                pages[place : place + 1] = studies
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add documents that stand outside docs/, the files that documents link to, notebooks, and the JSON schema."""
    documents = {file.src_uri: DOCS / file.src_uri for file in files.documentation_pages()}
    documents |= {page: ROOT / place for place, page in MORE_PAGES.items()}
    linked: dict[str, Path] = {}
    for document in documents.values():
        linked |= linked_files(document.read_text(encoding="utf-8"), document)
    contents = {page: (ROOT / place).read_text(encoding="utf-8") for place, page in MORE_PAGES.items()}
    contents |= {page: file_page(file) for page, file in linked.items()}
    contents["reference/recipe.schema.json"] = schema_text()
    for notebook in sorted(DOCS.glob(NOTEBOOKS)):
        contents[notebook.relative_to(DOCS).with_suffix(".md").as_posix()] = notebook_page(notebook)
    for place, content in contents.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put generated parts in their places, and lead links to where files stand on the site."""
    place = page.file.src_uri
    if place in NOT_SEARCHED:
        page.meta["search"] = {"exclude": True}
    if place == KEYS_PAGE:
        page.meta["search"] = {"boost": 2}
    document = next((ROOT / path for path, more in MORE_PAGES.items() if more == place), DOCS / place)
    if document.exists():
        markdown = with_links_of_the_site(markdown, document, place)
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make each key of a recipe that a text names a link to its entry."""
    target = files.get_file_from_path(KEYS_PAGE)
    assert target is not None
    address = os.path.relpath(target.dest_uri, Path(page.file.dest_uri).parent).replace(os.sep, "/")
    names = (".".join(path) for path in key_fields())
    return with_linked_keys(html, {name: f"{address}#{name}" for name in names})


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load anything from another host.

    Raises:
        PluginError: Names each address and the file that has it.
    """
    foreign = []
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            foreign += [
                f"{path.relative_to(config.site_dir)}: {address}" for address in loaded(path.read_text("utf-8"))
            ]
    if foreign:
        raise PluginError("The site would load from elsewhere. Keep these files here:\n" + "\n".join(foreign))
