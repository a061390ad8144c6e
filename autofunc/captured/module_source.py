"""A module as a `Source`: its arguments, its parameters, and where their values come from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.batch import COUNTS
from autofunc.captured.initial import initial_buffer, initial_weights
from autofunc.captured.pretrained import Weights
from autofunc.errors import ModelError, one_of
from autofunc.random import KEY, KEY_BESIDE_ENTRY

_TOTAL = "num_items_in_batch"  # of transformers: the count that divides a sum over a whole batch
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class ModuleSource:
    """See `Source`.

    Args:
        module: the module to capture.
        inputs: see `from_module`.
        stored: values to read from files.
        keep_real: whether a parameter with a value in the module keeps it, whatever is stored.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[str] | Mapping[str, str] | None = None,
        stored: Weights | None = None,
        *,
        keep_real: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ModelError(f"expected an nn.Module, got {type(module).__name__}; for a function see af.from_function")
        self.module = module
        self.what = type(module).__name__
        self.parameters = dict(module.named_parameters())
        self.module_names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
        self._inputs, self._stored, self._keep_real = inputs, stored, keep_real
        self._takes = dict(inspect.signature(module.forward).parameters)

    @cached_property
    def _canonical(self) -> dict[str, str]:
        first = {id(leaf): name for name, leaf in self.parameters.items()}
        return {name: first[id(leaf)] for name, leaf in self.module.named_parameters(remove_duplicate=False)}

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """See `Source.aliases`."""
        found: dict[str, list[str]] = {}
        for name, canonical in self._canonical.items():
            if name != canonical:
                found.setdefault(canonical, []).append(name)
        return found

    @cached_property
    def _wanted(self) -> list[str]:
        """The entries listed in `inputs`."""
        return list(self._inputs.values() if isinstance(self._inputs, Mapping) else self._inputs or ())

    @cached_property
    def key_name(self) -> str:
        """See `Source.key_name`."""
        named = [name for name, each in self._takes.items() if each.kind in _NAMED]
        takes_key = KEY in (named if self._inputs is None else self._wanted)
        return KEY_BESIDE_ENTRY if takes_key else KEY

    def canonical(self, name: str) -> str:
        """See `Source.canonical`."""
        return self._canonical[name]

    def select(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Source.select`.

        Raises:
            ModelError: for a batch that lacks an argument of forward.
        """
        entries = {str(name): value for name, value in batch.items() if name not in (self.key_name, COUNTS)}
        if self._inputs is not None:
            wanted = self._wanted
            missing = [name for name in wanted if name not in entries]
            if missing:
                raise ModelError(
                    f"{self.what}: inputs name {missing[0]!r}, which the batch does not have; {one_of(missing[0], entries)}"
                )
            return {name: entries[name] for name in wanted}
        if "batch" in self._takes and "batch" not in entries:
            return entries
        named = {name for name, each in self._takes.items() if each.kind in _NAMED}
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in self._takes.values())
        chosen = {name: value for name, value in entries.items() if name in named or takes_any}
        if _TOTAL in chosen:
            raise ModelError(
                f"{self.what} would divide its loss by {_TOTAL!r}, but microbatches are averaged anyway; leave it out "
                "of the batch, or pass a loss that returns (sum, weight)"
            )
        required = [
            name for name, each in self._takes.items() if each.kind in _NAMED and each.default is inspect.Parameter.empty
        ]
        lacking = [name for name in required if name not in chosen]
        if lacking or not chosen:
            needs = ", ".join(required) or ", ".join(sorted(named)) or "nothing"
            raise ModelError(
                f"{self.what}.forward needs {needs}, but the batch has {', '.join(entries) or 'no entries'}; name the "
                f"entries it takes: inputs={list(entries)[: max(len(required), 1)]}"
            )
        return chosen

    def arguments(self, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `Source.arguments`. Caches of keys and values are for generation, so they are turned off."""
        fixed = {"use_cache": False} if "use_cache" in self._takes and "use_cache" not in batch else {}
        if isinstance(self._inputs, Mapping):
            return (), {name: batch[entry] for name, entry in self._inputs.items()} | fixed
        if self._inputs is not None:
            return tuple(batch[name] for name in self._inputs), fixed
        if "batch" in self._takes and "batch" not in batch:
            return (dict(batch),), fixed
        return (), dict(batch) | fixed

    def weights(
        self, paths: Iterable[str], seed: int, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """See `Source.weights`."""
        made: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {path: self.parameters[path] for path in paths}
        if device.type != "meta":
            read = self._read(path for path in values if not self.keeps(path))
            on_meta = [path for path, leaf in values.items() if leaf.is_meta and path not in read]
            values |= read | (initial_weights(self.module, on_meta, seed) if on_meta else {})
        for path, value in values.items():
            leaf, own = value.detach(), self.parameters[path]
            if leaf.shape != own.shape:  # the module changed after its files were read
                raise ModelError(f"{path!r} is stored as {tuple(leaf.shape)}, but in {self.what} it is {tuple(own.shape)}")
            wanted = dtype if dtype is not None and leaf.is_floating_point() else own.dtype
            made[path] = leaf.to(device=device, dtype=wanted, copy=True)
        return made

    def buffer(self, name: str) -> Tensor:
        """See `Source.buffer`."""
        buffer = self.module.get_buffer(name)
        read = self._read([name])
        if read:
            return read[name].to(buffer.dtype, copy=True)
        return initial_buffer(self.module, name) if buffer.is_meta else buffer

    def keeps(self, path: str) -> bool:
        """True for a parameter whose value is in the module, whatever is stored."""
        return self._keep_real and not self.parameters[path].is_meta

    def has_value(self, path: str) -> bool:
        """See `Source.has_value`."""
        return not self.parameters[path].is_meta or (self._stored is not None and path in self._stored)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = self._stored
        return {} if stored is None else stored.read([name for name in names if name in stored])
