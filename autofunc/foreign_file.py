"""Files from outside, looked at before they are read: ordinary files of bounded size, of text, of JSON."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from autofunc.errors import AutofuncError
from autofunc.shown import quoted, reason, shown

StrPath = str | os.PathLike[str]

MOST_TEXT_BYTES = 2**28
"""Of a file that is read at once."""

NOT_THERE = "is not there"

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar",
}  # fmt: skip
"""What compressed files begin with."""


def unfit(path: StrPath) -> str | None:
    """Why a path cannot be read as a file, as the rest of a sentence; None for an ordinary file, or a link to one."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116 - a path may have zero bytes in it, which are no error here
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return "is a link that leads in a circle"
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return f"cannot be read: {error.strerror}"
        if isinstance(error, OSError) and os.path.islink(path):  # noqa: PTH114 - see `is_folder`
            return f"is a link to {quoted(Path(path).readlink())}, which is not there"
        return NOT_THERE
    return None if kind == stat.S_IFREG else f"is not a file, but {_KINDS.get(kind, 'something else')}"


def is_folder(path: StrPath) -> bool:
    """Whether there is such a folder; no error for what cannot be a path."""
    return os.path.isdir(path)  # noqa: PTH112 - which raises for names that are too long


def check_file(path: StrPath, wrong: type[AutofuncError], most_bytes: int = MOST_TEXT_BYTES) -> None:
    """Refuse what is no ordinary file, or is too large.

    Args:
        path: of the file.
        wrong: the class of the error.
        most_bytes: that it may have.

    Raises:
        AutofuncError: of that class, naming the file.
    """
    words = unfit(path)
    if words is not None:
        raise wrong(f"{shown(path)} {words}")
    size = Path(path).stat().st_size
    if size > most_bytes:
        raise wrong(f"{shown(path)} has {size:,} bytes; such a file may have {most_bytes:,}")


def read_plain(path: StrPath, wrong: type[AutofuncError]) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        AutofuncError: of the class `wrong`, naming the file, and the line that is no text.
    """
    check_file(path, wrong)
    try:
        return decoded(Path(path).read_bytes(), path, wrong)
    except OSError as error:
        raise wrong(f"cannot read {shown(path)}: {error.strerror or error}") from error


def decoded(content: bytes, path: StrPath, wrong: type[AutofuncError], first_line: int = 1) -> str:
    """Bytes of a file, from a line on, as text."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise wrong(f"cannot read {shown(path)}: line {line} is no UTF-8 text: {error.reason}") from error


def parse_json(text: str, what: str, wrong: type[AutofuncError]) -> Any:
    """A JSON document in which no key is there twice.

    Args:
        text: of the document.
        what: where it is, for messages.
        wrong: the class of the error.

    Raises:
        AutofuncError: of that class.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError as error:  # also for numbers of thousands of digits
        raise wrong(f"{what} is no JSON: {reason(error)}") from error
    except RecursionError as error:
        raise wrong(f"{what} is no JSON that can be read: it is nested too deeply") from error


def read_json(path: StrPath, wrong: type[AutofuncError]) -> Any:
    """The document in a JSON file, see `parse_json`."""
    return parse_json(read_plain(path, wrong), shown(path), wrong)


def compression(path: StrPath) -> str | None:
    """How a file is compressed, by its first bytes."""
    with Path(path).open("rb") as file:
        begin = file.read(max(map(len, _MAGIC)))
    return next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), None)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quoted(key)} is there twice")
        found[key] = value
    return found
