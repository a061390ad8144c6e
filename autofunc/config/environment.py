"""`${oc.env:NAME}`: a variable's text, read as the number or word that its key takes."""

from __future__ import annotations

import re
from typing import Any, get_args

from autofunc.config.yaml_text import MOST_DIGITS

_VARIABLE = re.compile(r"\$\{oc\.env:[^${}]+\}")
_WORDS = {"true": True, "false": False, "null": None, "~": None}
_NUMBERS = (int, float)


class FromEnvironment(str):
    """The text of a variable that is a key's whole value: what it is read as depends on what the key takes."""

    __slots__ = ()

    def read(self, takes: Any = Any) -> Any:
        """A number, true, false or null where it says one; else text, and always where the key takes text and no number.

        Args:
            takes: the annotation of what is wanted.
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
    """The resolved values, with texts that came from one variable each as `FromEnvironment`.

    Args:
        raw: as in the file.
        resolved: the same, with values for `${...}`.
    """
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {name: mark_environment(raw[name], value) for name, value in resolved.items()}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [mark_environment(*pair) for pair in zip(raw, resolved, strict=True)]
    if isinstance(raw, str) and isinstance(resolved, str) and _VARIABLE.fullmatch(raw.strip()):
        return FromEnvironment(resolved)
    return resolved


def read_environment(node: Any) -> Any:
    """All that came from variables as numbers and words, in lists and mappings too."""
    if isinstance(node, dict):
        return {name: read_environment(value) for name, value in node.items()}
    if isinstance(node, list):
        return [read_environment(value) for value in node]
    return node.read() if isinstance(node, FromEnvironment) else node


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inside = get_args(annotation)
    if inside:
        return {kind for part in inside for kind in _kinds(part)}
    return {annotation} if isinstance(annotation, type) else set()
