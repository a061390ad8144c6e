"""The source of a captured model: something to call, its parameters by name, and where their values come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Source(Protocol):
    """A module or function to capture."""

    @property
    def what(self) -> str:
        """Its name in messages."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module that is captured; it is never changed."""
        ...

    @property
    def module_names(self) -> Sequence[str]:
        """Names of the parts at which a stage may be asked to begin."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Parameters by canonical path."""
        ...

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """By canonical path: the parameter's other names."""
        ...

    @property
    def key_name(self) -> str:
        """The entry of a batch that holds the randomness key, and is not an argument."""
        ...

    def canonical(self, name: str) -> str:
        """Return the canonical path of a parameter of `module`."""
        ...

    def select(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a batch that it takes."""
        ...

    def arguments(self, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of `module`, given the selected entries."""
        ...

    def has_value(self, path: str) -> bool:
        """Return whether a parameter, by canonical path, has a value: a real one, or one stored in a file."""
        ...

    def weights(
        self, paths: Iterable[str], seed: int, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return fresh copies of parameters, by canonical path."""
        ...

    def buffer(self, name: str) -> Tensor:
        """Return a buffer with its real value."""
        ...


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters or buffers; the CPU if it has none, or all are on the meta device."""
    held = (leaf.device for leaf in chain(module.parameters(), module.buffers()) if not leaf.is_meta)
    return next(held, torch.device("cpu"))
