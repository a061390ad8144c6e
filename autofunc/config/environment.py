"""`${oc.env:NAME}`: read a variable's text as the type its key takes."""

from __future__ import annotations

import re
from typing import Any, get_args

from autofunc.config.yaml_text import MOST_DIGITS

_VARIABLE = re.compile(r"\$\{oc\.env:[^${}]+\}")
_WORDS = {"true": True, "false": False, "null": None, "~": None}
_NUMBERS = (int, float)


class FromEnvironment(str):
    """A key's whole value, taken from one environment variable: `read` converts it to the type the key takes."""

    __slots__ = ()

    def read(self, takes: Any = Any) -> Any:
        """Return a number, true, false or null if the text is one and the key takes more than text; otherwise the text.

        Args:
            takes: the key's type annotation.
        """
        kinds = _kinds(takes)
        text = str(self)
        if str in kinds and not kinds & {int, float, bool}:
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        looks_like_one = len(text) <= MOST_DIGITS and text.endswith(tuple("0123456789."))
        for number in _NUMBERS if looks_like_one else ():
            try:
                return number(text)
            except ValueError:
                continue
        return text


def mark_environment(raw: Any, resolved: Any) -> Any:
    """Return the resolved values, with each text that comes from one variable as a `FromEnvironment`.

    Args:
        raw: the values as written in the file.
        resolved: the same values with `${...}` resolved.
    """
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {name: mark_environment(raw[name], value) for name, value in resolved.items()}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [mark_environment(*pair) for pair in zip(raw, resolved, strict=True)]
    if isinstance(raw, str) and isinstance(resolved, str) and _VARIABLE.fullmatch(raw.strip()):
        return FromEnvironment(resolved)
    return resolved


def read_environment(node: Any) -> Any:
    """Convert every `FromEnvironment` in nested lists and mappings with `FromEnvironment.read`."""
    if isinstance(node, dict):
        return {name: read_environment(value) for name, value in node.items()}
    if isinstance(node, list):
        return [read_environment(value) for value in node]
    return node.read() if isinstance(node, FromEnvironment) else node


def _kinds(annotation: Any) -> set[Any]:
    """Return the types an annotation is composed of."""
    inside = get_args(annotation)
    if inside:
        return {kind for part in inside for kind in _kinds(part)}
    return {annotation} if isinstance(annotation, type) else set()
