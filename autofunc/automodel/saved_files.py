"""Checks of `torch.save` weights before transformers loads them; nothing in the files is executed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured.stored_tensors import shards
from autofunc.errors import ModelError, in_brief
from autofunc.foreign_file import NOT_THERE, unfit
from autofunc.model.stored import misfit
from autofunc.shown import quoted, shown

SAVED, SAVED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Their file names in a folder."""


def check_saved(folder: Path, wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse files that transformers should not load; a folder may have none.

    Args:
        folder: of the model.
        wanted: the dtypes of its parameters and buffers, by name.

    Raises:
        ModelError: for an index that leads out of the folder, files that hold anything but tensors, and tensors of a dtype
            that does not convert to the model's.
    """
    if unfit(folder / SAVED) != NOT_THERE:
        files = [folder / SAVED]
    elif unfit(folder / SAVED_INDEX) != NOT_THERE:
        files = list(shards(folder / SAVED_INDEX, ".bin"))
    else:
        return
    for file in files:
        check_kinds(file, {name: leaf.dtype for name, leaf in _tensors(file).items()}, wanted)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtypes of a module's parameters and buffers, by name."""
    return {name: leaf.dtype for name, leaf in (*module.named_parameters(), *module.named_buffers())}


def check_kinds(path: Path, stored: Mapping[str, torch.dtype | str], wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse stored dtypes that cannot be converted to the dtype of that name in the model, or to any for unknown names.

    Raises:
        ModelError: naming the tensor.
    """
    for name, dtype in stored.items():
        fitting = {wanted[name]} if name in wanted else set(wanted.values())
        words = [misfit(dtype, each) for each in fitting]
        if words and all(words):
            raise ModelError(f"{shown(path)}: {quoted(name)} {words[0]}; convert it, or leave it out")


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file on the meta device, by name."""
    words = unfit(file)
    if words is not None:
        raise ModelError(f"{shown(file)} {words}")
    try:
        if zipfile.is_zipfile(file):
            _check_plain(file)
        found: Any = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own
        first = in_brief(error).partition("\n")[0]
        raise ModelError(
            f"{shown(file)} cannot be loaded without executing code in it, or is broken ({first}); save its state_dict as "
            "safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{shown(file)} holds a {type(found).__name__}; expected a state dict of tensors by name")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelError(f"{shown(file)}: {quoted(name)} is a {type(value).__name__}; expected a tensor")
    return dict(found)


def _check_plain(file: Path) -> None:
    """Refuse compressed entries: torch writes none, and they could expand to any size."""
    with zipfile.ZipFile(file) as archive:
        packed = [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ModelError(f"its entry {quoted(packed[0])} is compressed")
