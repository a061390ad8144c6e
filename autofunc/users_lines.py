"""The lines of a traceback that are the user's, which are shown in the place of all of them unless `AUTOFUNC_DEBUG=1`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping

from autofunc.installed import is_installed

DEBUG = "AUTOFUNC_DEBUG"
WHOLE = "1"
"""The word of it that asks for whole tracebacks."""

HEADING = "in your code, outermost line first"
HINT = f"(the whole traceback: {DEBUG}={WHOLE})"


def words_of(environment: Mapping[str, str]) -> frozenset[str]:
    """What AUTOFUNC_DEBUG says, word by word; whether they mean anything is for whoever reads them."""
    return frozenset(word.strip() for word in environment.get(DEBUG, "").split(",")) - {"", "0"}


def wants_whole() -> bool:
    """Whether whole tracebacks are asked for."""
    return WHOLE in words_of(os.environ)


def line_of_user(file: str, line: int | None, name: str, code: str) -> str:
    """One of them, as it is shown."""
    return f"  {file}, line {line}, in {name}: {code.strip()}"


def users_lines(error: BaseException) -> list[str]:
    """Those that led to an error, and then those that led to the first of what it was raised from."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    frames = [frame for each in (error, first) for frame in traceback.extract_tb(each.__traceback__)]
    own = (frame for frame in frames if not is_installed(frame.filename) and not frame.filename.startswith("<frozen "))
    return list(dict.fromkeys(line_of_user(each.filename, each.lineno, each.name, each.line or "") for each in own))


def in_notebook(error: BaseException, message: str) -> list[str]:
    """The lines that a notebook shows of an error made for people."""
    if wants_whole():
        return "".join(traceback.format_exception(error)).splitlines()
    own = users_lines(error)
    return [f"{type(error).__name__}: {message}", *([HEADING, *own] if own else []), HINT]
