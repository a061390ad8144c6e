"""The folder of a checkpoint: tensors as `torch.distributed.checkpoint` writes them, and a manifest beside them.

A checkpoint is written into a folder beside its own, whose name ends in `.partial`, and renamed when all of it is on the
disk. So a folder without that ending is whole, whenever a process was killed.
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
"""What the names of tensors begin with."""

_MANIFEST, _METADATA = "autofunc.json", ".metadata"
_FORMAT = 1
_HARMLESS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"), ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's
}  # fmt: skip
"""What the description of tensors is made of, beside the classes of `torch.distributed.checkpoint.metadata` and dtypes."""


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return path.with_name(f"{path.name}.partial")


def prepare(path: Path) -> Path:
    """Make the folder that a checkpoint is written into; what an interrupted run has left there goes.

    Raises:
        CheckpointError: when there is a checkpoint already, or the folder cannot be made.
    """
    partial = partial_of(path)
    if path.exists():
        raise CheckpointError(f"{shown(path)} is there already, and no checkpoint is overwritten; name another folder")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{shown(partial)} cannot be written: {error.strerror}") from error
    return partial


def publish(path: Path, extra: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose tensors are on the disk, and give its folder its name.

    Raises:
        OSError: when the disk does not take it.
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
    """Delete a checkpoint, or what there is of it: never half of it under its own name.

    Raises:
        OSError: when it cannot be deleted.
    """
    partial = partial_of(path)
    if path.exists():
        path.rename(partial)
    if partial.exists():
        shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    """Have names in a folder on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was given as `extra`.

    Raises:
        CheckpointError: when there is no whole checkpoint of this kind.
    """
    folder = Path(path)
    if not is_folder(folder):
        raise CheckpointError(f"{shown(path)} is no folder; expected one that af.save or a run has written")
    if not (folder / _MANIFEST).exists():
        why = "its run was interrupted while it wrote" if folder.suffix == ".partial" else f"it has no {_MANIFEST}"
        raise CheckpointError(f"{shown(path)} is no whole checkpoint: {why}")
    text = read_plain(folder / _MANIFEST, CheckpointError)
    try:
        manifest = json.loads(text)
        written, extra = manifest["format"], dict(manifest["extra"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{shown(folder / _MANIFEST)} is no manifest of a checkpoint: {reason(error)}") from error
    if written != _FORMAT:
        raise CheckpointError(f"{shown(path)} is of format {shown(written)}; this version reads format {_FORMAT}")
    return extra


def read_metadata(path: Path) -> Metadata:
    """What tensors a checkpoint has. Nothing in the file is executed.

    Raises:
        CheckpointError: when it cannot be read, or holds anything but a description of tensors.
    """
    file = path / _METADATA
    check_file(file, CheckpointError)
    try:
        with file.open("rb") as opened:
            found = _Reader(opened).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(f"{shown(file)} cannot be read: {reason(error)}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{shown(file)} holds a {type(found).__name__}; expected the description of a checkpoint")
    for part in (found.storage_data or {}).values():
        if Path(part.relative_path).name != part.relative_path:
            raise CheckpointError(f"{shown(file)} names {shown(part.relative_path)}, which is not in that folder")
    return found


class _Reader(pickle.Unpickler):
    """Makes descriptions of tensors, and nothing else: torch keeps them as a pickle, which may call any function."""

    def find_class(self, module: str, name: str) -> Any:
        """Of the names in such a file."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and module != Metadata.__module__ and (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a description")
        return super().find_class(module, name)
