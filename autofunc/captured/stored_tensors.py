"""The tensors of safetensors files, by their stored names. A tensor is read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autofunc.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What files with weights are called in a folder."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredTensors:
    """The tensors of a `.safetensors` file, or of all files of a folder, by their stored names; only headers are read.

    Args:
        path: a file, or a folder with `model.safetensors` or with `model.safetensors.index.json` and its shards.

    Raises:
        ModelError: when it is missing, is no such file, or lacks a shard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}  # of floating-point ones, else None
        self.by_transformers = False
        self._files: dict[str, Path] = {}
        for file, wanted in _files_of(self.path).items():
            with _opened(file) as stored:
                self.by_transformers |= (stored.metadata() or {}).get("format") == "pt"
                known = set(stored.keys())
                lacking = sorted((wanted or set()) - known)
                if lacking:
                    raise ModelError(f"{file} has no {lacking[0]!r}, which {INDEX} says it has")
                for name in sorted(known if wanted is None else wanted):
                    header = stored.get_slice(name)
                    self._files[name] = file
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = _DTYPES.get(header.get_dtype())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors with these stored names, and no others."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with _opened(file) as stored:
                found.update({name: stored.get_tensor(name) for name in inside})
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """The first floating-point dtype in it."""
        return next((dtype for dtype in self.dtypes.values() if dtype is not None), None)


def _files_of(path: Path) -> dict[Path, set[str] | None]:
    """File -> the names in it that count; None: all."""
    if path.is_file() and path.suffix == ".safetensors":
        return {path: None}
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if (path / INDEX).is_file():
        try:
            files: dict[Path, set[str]] = {}
            for name, file in json.loads((path / INDEX).read_text())["weight_map"].items():
                files.setdefault(path / file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path / INDEX} is not an index of shards: {type(error).__name__}: {error}") from error
        lacking = [file.name for file in files if not file.is_file()]
        if lacking:
            raise ModelError(f"{path / INDEX} names {lacking[0]}, which is not there")
        return dict(files)
    if path.is_dir():
        found = ", ".join(sorted(each.name for each in path.iterdir())[:12]) or "nothing"
        raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}; it has {found}")
    raise ModelError(f"no weights at {path}: expected a .safetensors file, or a folder with {SINGLE} or {INDEX}")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise ModelError(f"{file} is not a safetensors file: {error}") from error
