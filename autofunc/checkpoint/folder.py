"""The folder of a checkpoint: tensors as `torch.distributed.checkpoint` writes them, and a manifest next to them.

A checkpoint is written to a sibling folder whose name ends in `.partial`, and renamed once everything is on disk. So a
folder without that suffix is complete, no matter when a process was killed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from autofunc.errors import CheckpointError
from autofunc.foreign_file import check_file, is_folder, read_plain
from autofunc.shown import reason, shown

PARAMS, STATE, OPTIMIZER, AVERAGE = "params", "state", "optimizer", "average"
"""Prefixes of the tensors' names."""

_MANIFEST, _METADATA = "autofunc.json", ".metadata"
_FORMAT = 1
_HARMLESS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's
}  # fmt: skip
"""Classes that a description of tensors may contain, besides `torch.distributed.checkpoint.metadata`'s and dtypes."""


def partial_of(path: Path) -> Path:
    """Return the folder a checkpoint is written to before it is published."""
    return path.with_name(f"{path.name}.partial")


def prepare(path: Path) -> Path:
    """Create the folder a checkpoint is written to, deleting what an interrupted run left there.

    Raises:
        CheckpointError: if the checkpoint already exists, or the folder cannot be created.
    """
    partial = partial_of(path)
    if path.exists():
        raise CheckpointError(f"{shown(path)} already exists, and checkpoints are not overwritten; name another folder")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{shown(partial)} cannot be written: {error.strerror}") from error
    return partial


def publish(path: Path, extra: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose tensors are on disk, and rename its folder to its final name.

    Raises:
        OSError: if writing fails.
    """
    partial = partial_of(path)
    with (partial / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": _FORMAT, "extra": extra}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Delete a checkpoint or its partial folder; no incomplete one is ever visible under its final name.

    Raises:
        OSError: if it cannot be deleted.
    """
    partial = partial_of(path)
    if path.exists():
        path.rename(partial)
    if partial.exists():
        shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the `extra` that `save` was given.

    Raises:
        CheckpointError: if there is no complete checkpoint of this format.
    """
    folder = Path(path)
    if not is_folder(folder):
        raise CheckpointError(f"{shown(path)} is not a folder; expected one written by af.save or a run")
    if not (folder / _MANIFEST).exists():
        why = "its run was interrupted while writing it" if folder.suffix == ".partial" else f"it has no {_MANIFEST}"
        raise CheckpointError(f"{shown(path)} is not a complete checkpoint: {why}")
    text = read_plain(folder / _MANIFEST, CheckpointError)
    try:
        manifest = json.loads(text)
        written, extra = manifest["format"], dict(manifest["extra"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{shown(folder / _MANIFEST)} is not a checkpoint's manifest: {reason(error)}") from error
    if written != _FORMAT:
        raise CheckpointError(f"{shown(path)} has format {shown(written)}; this version reads format {_FORMAT}")
    return extra


def read_metadata(path: Path) -> Metadata:
    """Read the description of a checkpoint's tensors. Nothing in the file is executed.

    Raises:
        CheckpointError: if it cannot be read, or holds anything but a description of tensors.
    """
    file = path / _METADATA
    check_file(file, CheckpointError)
    try:
        with file.open("rb") as opened:
            found = _Reader(opened).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {reason(error)}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{shown(file)} holds a {type(found).__name__}; expected a description of a checkpoint")
    for part in (found.storage_data or {}).values():
        if Path(part.relative_path).name != part.relative_path:
            raise CheckpointError(f"{shown(file)} names {shown(part.relative_path)}, which is not in that folder")
    return found


class _Reader(pickle.Unpickler):
    """Unpickles descriptions of tensors and refuses anything else: torch stores them as a pickle, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name in the pickle.

        Raises:
            pickle.UnpicklingError: if a description of tensors has no use for it.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and module != Metadata.__module__ and (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which does not belong in a description of tensors")
        return super().find_class(module, name)
