"""Reading and writing files, with readable errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from autofunc.errors import ScheduleError, one_of
from autofunc.foreign_file import NOT_THERE, StrPath, parse_json, read_plain, unfit
from autofunc.shown import quoted, reason, shown


def read_text(path: StrPath, suffixes: tuple[str, ...]) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        path: the file.
        suffixes: of files to suggest if there is no such file.

    Raises:
        ScheduleError: if the file does not exist, or is not text.
    """
    if unfit(path) == NOT_THERE:
        folder = Path(path).parent
        near = sorted(str(other) for other in folder.iterdir() if other.suffix in suffixes) if folder.is_dir() else []
        suggestion = f"; {one_of(os.fspath(path), near)}" if near else ""
        raise ScheduleError(f"there is no file {quoted(os.fspath(path))}{suggestion}")
    return read_plain(path, ScheduleError)


def read_json(path: StrPath) -> Any:
    """Return the document in a JSON file.

    Raises:
        ScheduleError: if the file does not exist, or is not JSON.
    """
    return parse_json(read_text(path, (".json",)), shown(path), ScheduleError)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file, as UTF-8.

    Raises:
        ScheduleError: if the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write a binary file.

    Raises:
        ScheduleError: if the file cannot be written.
    """
    try:
        Path(path).write_bytes(content)
    except (OSError, ValueError) as error:  # a path with a zero byte raises ValueError
        cause = error.strerror if isinstance(error, OSError) else None
        raise ScheduleError(f"cannot write {shown(path)}: {cause or reason(error)}") from error
