"""What a captured model comes from: something to call, its parameters by name, and where their values come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Source(Protocol):
    """A module or a function."""

    @property
    def what(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def module(self) -> nn.Module:
        """What is captured; it is never changed."""
        ...

    @property
    def module_names(self) -> Sequence[str]:
        """Names of the parts at which a stage may be asked to begin."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """By canonical path."""
        ...

    @property
    def aliases(self) -> Mapping[str, Sequence[str]]:
        """By canonical path: the other names that the same parameter has."""
        ...

    @property
    def key_name(self) -> str:
        """The entry of a batch that is no argument, but its randomness."""
        ...

    def canonical(self, name: str) -> str:
        """The canonical path of a parameter of `module`."""
        ...

    def select(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a batch that it takes."""
        ...

    def arguments(self, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `module` is called with, given the selected entries."""
        ...

    def has_value(self, path: str) -> bool:
        """Whether a parameter, by its canonical path, has a value: it is not on the meta device, or stored in a file."""
        ...

    def weights(
        self, paths: Iterable[str], seed: int, device: torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Fresh copies of parameters, by canonical path."""
        ...

    def buffer(self, name: str) -> Tensor:
        """A buffer with its real value."""
        ...


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are, or its buffers; the CPU where it has none, or all are on the meta device."""
    held = (leaf.device for leaf in chain(module.parameters(), module.buffers()) if not leaf.is_meta)
    return next(held, torch.device("cpu"))
