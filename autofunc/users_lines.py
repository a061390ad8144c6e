"""The user's lines of a traceback, shown instead of the whole unless `AUTOFUNC_DEBUG` asks for it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping

from autofunc.installed import is_installed

DEBUG = "AUTOFUNC_DEBUG"
WHOLE = "1"
"""The word in it that asks for whole tracebacks."""

HEADING = "in your code, outermost line first"
HINT = f"(the whole traceback: {DEBUG}={WHOLE})"


def words_of(environment: Mapping[str, str]) -> frozenset[str]:
    """Return the words in AUTOFUNC_DEBUG, unchecked."""
    return frozenset(word.strip() for word in environment.get(DEBUG, "").split(",")) - {"", "0"}


def wants_whole() -> bool:
    """Return whether whole tracebacks are wanted."""
    return WHOLE in words_of(os.environ)


def line_of_user(file: str, line: int | None, name: str, code: str) -> str:
    """Format a line."""
    return f"  {file}, line {line}, in {name}: {code.strip()}"


def users_lines(error: BaseException) -> list[str]:
    """Return the lines that led to an error, then those that led to the first error in its chain."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = [frame for each in (error, first) for frame in traceback.extract_tb(each.__traceback__)]
    own = (frame for frame in frames if not is_installed(frame.filename) and not frame.filename.startswith("<frozen "))
    return list(dict.fromkeys(line_of_user(each.filename, each.lineno, each.name, each.line or "") for each in own))


def in_notebook(error: BaseException, message: str) -> list[str]:
    """Return the lines that a notebook shows of an error meant for people."""
    if wants_whole():
        return "".join(traceback.format_exception(error)).splitlines()
    own = users_lines(error)
    return [f"{type(error).__name__}: {message}", *([HEADING, *own] if own else []), HINT]
