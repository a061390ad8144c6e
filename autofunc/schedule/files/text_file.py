"""Reading and writing files, with errors for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from autofunc.errors import ScheduleError, one_of

StrPath = str | os.PathLike[str]


def read_text(path: StrPath, suffixes: tuple[str, ...]) -> str:
    """The text of a file, without a byte order mark.

    Args:
        path: the file.
        suffixes: of files that could be meant, for suggestions.

    Raises:
        ScheduleError: when there is none, or it is no text.
    """
    file = Path(path)
    if not file.is_file():
        folder = file.parent
        near = sorted(str(other) for other in folder.iterdir() if other.suffix in suffixes) if folder.is_dir() else []
        raise ScheduleError(f"there is no file {str(path)!r}" + (f"; {one_of(str(path), near)}" if near else ""))
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"cannot read {path}: {error}") from error


def read_json(path: StrPath) -> Any:
    """The document in a JSON file.

    Raises:
        ScheduleError: when there is none, or it is no JSON.
    """
    try:
        return json.loads(read_text(path, (".json",)))
    except json.JSONDecodeError as error:
        raise ScheduleError(f"{path} is no JSON: {error}") from error


def write_text(path: StrPath, text: str) -> None:
    """Write a file.

    Raises:
        ScheduleError: when that is not possible.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write a file that is no text.

    Raises:
        ScheduleError: when that is not possible.
    """
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ScheduleError(f"cannot write {path}: {error.strerror or error}") from error
