"""Files from outside, checked before they are read: ordinary files of bounded size, text, JSON."""

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
"""The largest file that is read at once."""

NOT_THERE = "does not exist"

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar",
}  # fmt: skip
"""The first bytes of compressed files."""


def unfit(path: StrPath) -> str | None:
    """Return why a path cannot be read as a file, as the rest of a sentence; None for an ordinary file or a link to one."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116 - a path may have zero bytes in it, not an error here
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return "is a link that points back to itself"
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return f"cannot be read: {error.strerror}"
        if isinstance(error, OSError) and os.path.islink(path):  # noqa: PTH114 - see `is_folder`
            return f"is a link to {quoted(Path(path).readlink())}, which does not exist"
        return NOT_THERE
    return None if kind == stat.S_IFREG else f"is not a file, but {_KINDS.get(kind, 'something else')}"


def is_folder(path: StrPath) -> bool:
    """Return whether a path is a folder; False for strings that cannot be paths."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names that are too long


def check_file(path: StrPath, wrong: type[AutofuncError], most_bytes: int = MOST_TEXT_BYTES) -> None:
    """Refuse anything but an ordinary file of bounded size.

    Args:
        path: the file.
        wrong: the class of the error to raise.
        most_bytes: the largest size allowed.

    Raises:
        AutofuncError: of class `wrong`, naming the file.
    """
    words = unfit(path)
    if words is not None:
        raise wrong(f"{shown(path)} {words}")
    size = Path(path).stat().st_size
    if size > most_bytes:
        raise wrong(f"{shown(path)} has {size:,} bytes; such a file may have at most {most_bytes:,}")


def read_plain(path: StrPath, wrong: type[AutofuncError]) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        AutofuncError: of class `wrong`, naming the file, and the line that is not text.
    """
    check_file(path, wrong)
    try:
        return decoded(Path(path).read_bytes(), path, wrong)
    except OSError as error:
        raise wrong(f"cannot read {shown(path)}: {error.strerror or error}") from error


def decoded(content: bytes, path: StrPath, wrong: type[AutofuncError], first_line: int = 1) -> str:
    """Decode the bytes of a file, which begin at a line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise wrong(f"cannot read {shown(path)}: line {line} is not UTF-8 text: {error.reason}") from error


def parse_json(text: str, what: str, wrong: type[AutofuncError]) -> Any:
    """Parse a JSON document, refusing repeated keys.

    Args:
        text: the document.
        what: its name, for messages.
        wrong: the class of the error to raise.

    Raises:
        AutofuncError: of class `wrong`.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError as error:  # includes numbers of thousands of digits
        raise wrong(f"{what} is not JSON: {reason(error)}") from error
    except RecursionError as error:
        raise wrong(f"{what} is nested too deeply to be read as JSON") from error


def read_json(path: StrPath, wrong: type[AutofuncError]) -> Any:
    """Read a JSON file, see `parse_json`."""
    return parse_json(read_plain(path, wrong), shown(path), wrong)


def compression(path: StrPath) -> str | None:
    """Return a file's kind of compression, judged by its first bytes; None if it is not compressed."""
    with Path(path).open("rb") as file:
        begin = file.read(max(map(len, _MAGIC)))
    return next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), None)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quoted(key)} appears twice")
        found[key] = value
    return found
