"""A griffe extension: `Example:` sections of docstrings hold code, and are shown as code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_SECTION = re.compile(r"^Examples?:\n((?:    .*\n?|\n)+)", re.MULTILINE)


def as_code(docstring: str) -> str:
    """A docstring with its examples as fenced blocks.

    >>> print(as_code("Adds.\\n\\nExample:\\n    add(1, 2)\\n"))
    Adds.
    <BLANKLINE>
    **Example**
    <BLANKLINE>
    ```python
    add(1, 2)
    ```
    <BLANKLINE>
    """

    def fenced(match: re.Match[str]) -> str:
        code = textwrap.dedent(match[1]).strip("\n")
        return f"**Example**\n\n```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```\n"

    return _SECTION.sub(fenced, docstring)


class ExamplesAreCode(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_code(obj.docstring.value)
