"""The page of all public names: each with the first line of its docstring, and a link to the rest."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import griffe

API = Path(__file__).parents[1] / "api"


def described() -> list[str]:
    """The names that the pages of docs/api show, as `autofunc.pipeline`, in their order."""
    pages = [path.read_text() for path in sorted(API.glob("*.md"))]
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]


@cache
def index() -> str:
    """The page, as Markdown."""
    package = griffe.load("autofunc", search_paths=[API.parents[1]], resolve_aliases=True)
    lines = [
        "# Every name",
        "",
        "`import autofunc as af`; names load when first used, so `from autofunc import schedule` imports no torch.",
        "",
        "| name | |",
        "|---|---|",
    ]
    for name in sorted(described(), key=lambda name: (name.count("."), name.lower())):
        found = package[name.removeprefix("autofunc.")]
        first = found.docstring.value.splitlines()[0] if found.docstring else ""
        lines.append(f"| [`{name.replace('autofunc.', 'af.', 1)}`][{name}] | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
