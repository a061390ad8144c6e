"""MkDocs hooks: pages from the repository's root become part of the site, and links to them and to files are resolved."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import names

ROOT = Path(__file__).parents[2]

PAGES = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "README.md": "index.md",
}
"""Pages of the repository's root, by their places on the site."""
FILES = ("bench/RESULTS.md", "examples/*.py", "examples/*.yaml", "examples/*.ipynb")
"""What pages link to and readers download."""

_COMMENT = re.compile(r"^<!-- .*?-->\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)#:\s]+)([)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add pages and files from outside of docs/."""
    for source, place in PAGES.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=_linked((ROOT / source).read_text(), source, place)))
    files.append(File.generated(config, "api/index.md", content=names.index()))
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            place = _download(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Resolve links that lead out of docs/, and leave out comments, which are for the tests of pages."""
    place = page.file.src_uri
    markdown = _COMMENT.sub("", markdown)
    return markdown if place in PAGES.values() and place != "index.md" else _linked(markdown, f"docs/{place}", place)


def _linked(text: str, source: str, place: str) -> str:
    """A page with its relative links as they are on the site. `source` is its path in the repository."""

    def resolved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else _download(path))
        return before + os.path.relpath(inside, posixpath.dirname(place) or ".") + after

    return _LINK.sub(resolved, text)


def _download(path: str) -> str:
    """Where a file of the repository is on the site; Markdown as plain text, so that it is a file and not a page."""
    return "files/" + (path + ".txt" if path.endswith(".md") else path)
