"""Weights as `torch.save` writes them, looked at before transformers loads them: nothing in them is executed."""

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
"""What they are called in a folder."""


def check_saved(folder: Path, wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse files that transformers should not be given; a folder may have none.

    Args:
        folder: of the model.
        wanted: the dtypes of its parameters and buffers, by name.

    Raises:
        ModelError: for an index that leads elsewhere, for files that hold anything but tensors, and for tensors of a kind
            that the model does not have.
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
    """The dtypes of its parameters and buffers, by name."""
    return {name: leaf.dtype for name, leaf in (*module.named_parameters(), *module.named_buffers())}


def check_kinds(path: Path, stored: Mapping[str, torch.dtype | str], wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse dtypes that are not converted: under a name of the model its own, else any that it has.

    Raises:
        ModelError: naming the tensor.
    """
    for name, dtype in stored.items():
        fitting = {wanted[name]} if name in wanted else set(wanted.values())
        words = [misfit(dtype, each) for each in fitting]
        if words and all(words):
            raise ModelError(f"{shown(path)}: {quoted(name)} {words[0]}; convert it, or leave it out")


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, without their values."""
    words = unfit(file)
    if words is not None:
        raise ModelError(f"{shown(file)} {words}")
    try:
        if zipfile.is_zipfile(file):
            _check_plain(file)
        found: Any = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # of torch, of pickle, of zip files
        raise ModelError(
            f"{shown(file)} cannot be loaded without executing what is in it, or is broken "
            f"({in_brief(error).partition(_NEXT)[0]}); save its state_dict as safetensors"
        ) from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{shown(file)} holds a {type(found).__name__}; expected a state dict, of names and tensors")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelError(f"{shown(file)}: {quoted(name)} is a {type(value).__name__}; expected a tensor")
    return dict(found)


_NEXT = "\n"


def _check_plain(file: Path) -> None:
    """Torch compresses nothing, so what is compressed is not its own, and may be of any size."""
    with zipfile.ZipFile(file) as archive:
        packed = [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ModelError(f"{quoted(packed[0])} in it is compressed")
