"""The files of an untrusted folder: ordinary files only, none outside the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from autofunc.errors import DataError, in_brief, one_of
from autofunc.foreign_file import unfit
from autofunc.shown import quoted, shown

_NOT_ENTERED = {"site-packages", "dist-packages", "__pycache__"}


def files_in(path: Path, suffixes: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield the files of a folder that have one of the suffixes; None takes all.

    Skips installed packages, caches and hidden folders.

    Raises:
        DataError: naming anything that isn't a file, or a link that dangles or leads out of the folder.
    """
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name not in _NOT_ENTERED and not name.startswith(".")]
        for name in names:
            if suffixes is None or name.endswith(tuple(suffixes)):
                file = Path(folder, name)
                if file.is_symlink() or unfit(file) is not None:  # os.walk follows no links, so other files lie inside
                    check_inside(file, path)
                yield file


def check_inside(file: Path, folder: Path) -> None:
    """Refuse anything that isn't a file inside a folder.

    Raises:
        DataError: naming it.
    """
    words = unfit(file)
    if words is None and not file.resolve().is_relative_to(folder.resolve()):
        words = f"leads outside of {shown(folder)}, to {shown(file.resolve())}; name the folder that contains it"
    if words is not None:
        raise DataError(f"{shown(file)} {words}")


def tables_in(path: Path, split: str) -> list[Path]:
    """Return the files of a split, found by their names or through the dataset card (README.md).

    Raises:
        DataError: if there are none, or one lies outside the folder.
    """
    import datasets  # takes seconds to import

    for _ in files_in(path):
        pass
    try:
        found = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:  # datasets raises a different one for each cause
        raise DataError(f"{shown(path)} has no tables: {in_brief(error)}") from error
    if split not in found:
        raise DataError(f"{shown(path)} has no split {quoted(split)}; {one_of(split, found)}")
    files = [Path(file) for file in found[split]]
    for file in files:
        check_inside(file, path)
    return files
