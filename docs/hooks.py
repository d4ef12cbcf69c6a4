"""Files outside of docs/ that a page links to are copied into the site as plain text.

So the same link leads somewhere in the repository and in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]+)\)")
FOLDER = "repository"  # of the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to."""
    docs = Path(config.docs_dir)
    for target in sorted({link for page in docs.glob("*.md") for link in LINK.findall(page.read_text("utf-8"))}):
        path = docs / target
        if path.is_file():  # what is missing stays a broken link, which ends a strict build
            files.append(File.generated(config, copied(target), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a page link to those copies."""
    return LINK.sub(
        lambda link: f"]({copied(link[1])})" if files.get_file_from_path(copied(link[1])) else link[0], markdown
    )


def copied(target: str) -> str:
    """Where the site has the file that docs/ calls `target`."""
    return posixpath.join(FOLDER, f"{target.removeprefix('../')}.txt")
