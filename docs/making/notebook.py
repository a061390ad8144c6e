"""The tutorial as a notebook: `python docs/making/notebook.py` makes examples/tutorial.ipynb from docs/tutorial.md.

Python becomes cells, commands become cells of the shell, files are written by cells, and all else is text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"

_FENCE = re.compile(r"(^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```\n", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


def made(page: str) -> str:
    """The notebook of a page, as JSON."""
    cells: list[dict[str, Any]] = []
    prose, end = "", 0
    for match in _FENCE.finditer(page):
        prose, end = prose + page[end : match.start()], match.end()
        code = _code(match["language"], match["text"])
        if match["mark"] == "output":
            continue
        if code is None:
            prose += match[0]
            continue
        cells += [*_text(prose), _cell("code", code)]
        prose = ""
    cells += _text(prose + page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _code(language: str, text: str) -> str | None:
    """What a cell of this block runs; None for a block that a notebook only shows."""
    file = _FILE.match(text)
    if file:
        return f"%%writefile {file[1]}\n{text}"
    if language == "bash":
        return f"%%bash\n{text}" if text.startswith(("autofunc", "torchrun")) else None
    return text if language == "python" else None


def _text(prose: str) -> list[dict[str, Any]]:
    """A cell of text, with links as they are from the folder of the notebook; none for blank lines."""
    prose = re.sub(r"\]\((?!\w+:|\.\./)([^)#]+)", r"](../docs/\1", prose).strip("\n")
    return [_cell("markdown", prose)] if prose.strip() else []


def _cell(kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": "",
        "metadata": {},
        "source": text.rstrip("\n").splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    NOTEBOOK.write_text(made(PAGE.read_text()))
