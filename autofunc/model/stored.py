"""Initial values that come from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch


class Stored(Protocol):
    """Stored values of parameters, by canonical path."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each, by canonical path."""
        ...

    def read(self, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Some of them, by canonical path; they may be views of files."""
        ...
