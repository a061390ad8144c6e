"""Buffers that a captured forward reads but does not write: their values are fixed, and a key changes with them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.cache import Identity
from autofunc.fingerprint import Fingerprint, Fingerprinted

_MOST_COMPARED = 1 << 20  # elements; larger tensors are not compared by value


class KeptBuffers(Fingerprinted):
    """Some buffers of a module, by name; the fingerprint changes when one of them gets another value.

    Args:
        module: the module that holds them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str) -> None:
        """Include this buffer from now on."""
        self._names[name] = None

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """The current values."""
        for name in self._names:
            keys.note(f"the module ({type(self._module).__name__})", [name, name], partial(self._members, name))
        return tuple((name, content_of(self._live(name))) for name in self._names)

    def key(self, name: str, value: Tensor) -> Hashable:
        """Return the key of a buffer with a given real value, which may lie elsewhere and be read again each time."""
        return content_of(value if value.numel() <= _MOST_COMPARED else self._live(name))

    def _live(self, name: str) -> Tensor | None:
        holder, _, own = name.rpartition(".")
        return self._module.get_submodule(holder)._buffers.get(own)

    def _members(self, name: str) -> tuple[Tensor | None, str]:
        buffer = self._live(name)
        return buffer, writes_of(buffer)


def writes_of(value: Tensor | None) -> str:
    """Return how often a tensor was written to, as an interned string; "" for tensors without a count."""
    return "" if value is None or value.is_inference() else sys.intern(str(value._version))


def content_of(value: Tensor | None) -> Hashable:
    """Return a key of a tensor: of its values, or, for large or meta tensors, of its identity and number of writes."""
    if value is None:
        return None
    if value.is_meta or value.numel() > _MOST_COMPARED:
        return Identity(value), writes_of(value)
    plain: Any = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    content = plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return value.dtype, value.device, tuple(value.shape), hashlib.blake2b(content).digest()
