"""A disk cache of arrays that are slow to build: one process builds them; the others and later runs read them.

Each key has its own folder in the user's cache; the key holds everything the arrays depend on. `AUTOFUNC_CACHE` names
another folder, or is `off`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from autofunc.errors import DataError
from autofunc.progress_bar import note
from autofunc.shown import shown

FOLDER, OFF = "AUTOFUNC_CACHE", "off"
"""The environment variable with the cache's folder, and the value that turns the cache off."""

Arrays = Mapping[str, np.ndarray]

_FORMAT = 1
_MANIFEST = "manifest.json"


def cache_folder() -> Path | None:
    """Return the folder that holds the arrays; None if the cache is off."""
    named = os.environ.get(FOLDER)
    if named:
        return None if named == OFF else Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autofunc" / "data"


def cached(what: str, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Return a key's arrays: read if present, else built and written, by one process at a time.

    Args:
        what: a name for the arrays, for messages and folder names: letters and digits.
        key: everything the arrays depend on, as JSON values.
        make: builds them.

    Returns:
        Arrays by name, memory-mapped read-only; if the cache is off, what `make` returned.

    Raises:
        DataError: if the cache cannot be written.
    """
    root = cache_folder()
    if root is None:
        return make()
    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    folder = root / f"{what}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    with _unwritable(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    try:
        if folder.exists():
            try:
                return _read(folder, text)
            except _DamagedError as error:
                note(f"the cache {shown(folder)} {error}; rebuilding it")
        made = make()
        with _unwritable(root):
            _write(folder, text, made)
        try:
            return _read(folder, text)
        except _DamagedError as error:
            raise DataError(f"the cache {shown(folder)} {error}, right after it was written: check the disk") from error
    finally:
        lock.release()


@contextmanager
def _unwritable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the cache {shown(root)} cannot be written: {error.strerror or error}; set {FOLDER} to a writable folder, "
            f"or to {OFF}"
        ) from error


def content_of(files: Iterable[Path]) -> list[str]:
    """Return a digest of each file's content, with its suffix: part of a key."""
    found = []
    for file in files:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
        found.append(f"{digest.hexdigest()}{file.suffix}")  # the suffix decides how the file is read
    return found


class _DamagedError(Exception):
    """What is wrong with a cache folder, as the predicate of a sentence."""


def _write(folder: Path, key: str, arrays: Arrays) -> None:
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(made / f"{name}.npy", array, allow_pickle=False)
        sums = {name: _sum_of(made / f"{name}.npy") for name in arrays}
        (made / _MANIFEST).write_text(json.dumps({"key": key, "files": sums}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _read(folder: Path, key: str) -> Arrays:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sums = manifest["files"]
        if manifest["key"] != key:
            raise _DamagedError("belongs to a different key")
        for name, expected in sums.items():
            if _sum_of(folder / f"{name}.npy") != expected:
                raise _DamagedError(f"is damaged: {name}.npy has changed")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in sums}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamagedError(f"is damaged: {type(error).__name__}: {error}") from error


def _sum_of(file: Path) -> int:
    found = 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            found = zlib.crc32(block, found)
    return found
