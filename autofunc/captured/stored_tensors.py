"""The tensors in safetensors files, by stored name. A tensor is read only when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autofunc.errors import ModelError, some_of
from autofunc.foreign_file import NOT_THERE, is_folder, read_json, unfit
from autofunc.model.stored import CONVERTED
from autofunc.shown import quoted, reason, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of files with weights in a folder."""
ADAPTER = "adapter_config.json"
"""PEFT's description of an adapter in a folder."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StoredTensors:
    """The tensors of a `.safetensors` file, or of all files in a folder, by stored name; only headers are read at first.

    Args:
        path: a file, or a folder with `model.safetensors` or with `model.safetensors.index.json` and its shards.

    Raises:
        ModelError: for a file that is missing or not a safetensors file, and for a folder that lacks a shard.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}  # the stored dtype's name if torch has no such dtype
        self.by_transformers = False
        self._files: dict[str, Path] = {}
        for file, wanted in _files_of(self.path).items():
            with _opened(file) as stored:
                self.by_transformers |= (stored.metadata() or {}).get("format") == "pt"
                known = set(stored.keys())
                lacking = sorted((wanted or set()) - known)
                if lacking:
                    raise ModelError(f"{shown(file)} has no {quoted(lacking[0])}, which {INDEX} says it has")
                for name in sorted(known if wanted is None else wanted):
                    header = stored.get_slice(name)
                    self._files[name] = file
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = _DTYPES.get(header.get_dtype(), header.get_dtype())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors with these stored names; no others are read.

        Raises:
            ModelError: if a file changed since its header was read, or torch has no such dtype.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            with _opened(file) as stored:
                for name in inside:
                    try:
                        found[name] = stored.get_tensor(name)
                    except Exception as error:  # safetensors raises several types, and torch more
                        raise ModelError(f"{shown(file)}: {quoted(name)} cannot be read: {reason(error)}") from error
        return found

    @property
    def dtype(self) -> torch.dtype | None:
        """The first floating-point dtype among its tensors; None if there is none."""
        return next((dtype for dtype in self.dtypes.values() if dtype in CONVERTED), None)


def _files_of(path: Path) -> dict[Path, set[str] | None]:
    """Return file -> the names in it that count; None: all."""
    if path.suffix == ".safetensors" and not is_folder(path) and unfit(path) != NOT_THERE:
        return {path: None}
    for name in (SINGLE, INDEX):
        if is_folder(path) and unfit(path / name) != NOT_THERE:
            refuse_adapter(path)
            return {path / SINGLE: None} if name == SINGLE else dict(shards(path / INDEX))
    if is_folder(path):
        for folder in (path, *filter(is_folder, sorted(path.iterdir()))):  # a run leaves its adapter in a folder
            refuse_adapter(folder)
        found = some_of(sorted(each.name for each in path.iterdir()), 12) or "nothing"
        raise ModelError(f"{shown(path)} has neither {SINGLE} nor {INDEX}; it has {found}")
    raise ModelError(f"no weights at {shown(path)}: expected a .safetensors file, or a folder with {SINGLE} or {INDEX}")


def shards(index: Path, suffix: str = ".safetensors") -> dict[Path, set[str]]:
    """Return the files that an index names, all in its folder, with the names of the tensors in each.

    Args:
        index: the index file.
        suffix: the suffix of the files.

    Raises:
        ModelError: for a file that is not an index, and for shards that are missing or outside the folder.
    """
    document = read_json(index, ModelError)
    named = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{shown(index)} is not an index of shards: expected a mapping weight_map, from names to files")
    files: dict[Path, set[str]] = {}
    for name, file in named.items():
        if not isinstance(file, str) or not file.endswith(suffix) or Path(file).name != file or "\\" in file:
            raise ModelError(
                f"{shown(index)}: the shard of {quoted(name)} is {quoted(file)}; expected the name of a {suffix} file in "
                "the folder of the index, not a path"
            )
        files.setdefault(index.parent / file, set()).add(name)
    for path, inside in files.items():
        if unfit(path) == NOT_THERE:
            raise ModelError(f"{shown(index)} names {shown(path.name)}, which is not there, for {quoted(min(inside))}")
    return files


def refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT folder: its weights are changes to those of another model, which lies wherever the folder says.

    Raises:
        ModelError: naming that model, and what to do instead.
    """
    file = folder / ADAPTER
    if unfit(file) == NOT_THERE:
        return
    document = read_json(file, ModelError)
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    raise ModelError(
        f"{shown(folder)} has {ADAPTER}: PEFT adapters for {quoted(base) if base else 'a model it does not name'}, and "
        "nothing outside a folder is read. Merge them into that model (PEFT's merge_and_unload() and save_pretrained(), "
        f"or autofunc export for a run's own) and name the resulting folder; to read a model that lies beside {ADAPTER} "
        "without its adapters, remove that file"
    )


def _opened(file: Path) -> Any:
    words = unfit(file)
    if words is not None:
        raise ModelError(f"{shown(file)} {words}")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise ModelError(f"{shown(file)} is not a safetensors file: {reason(error)}") from error
